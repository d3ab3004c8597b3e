"""A report that is written once and comes out as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ..files import write_text

_STYLE = """body{font:15px/1.5 sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1a202c}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #cbd5e0;padding:.25em .6em;text-align:left}
img{max-width:100%}code{background:#edf2f7;padding:0 .2em}"""


@dataclass
class Page:
    """Headings, paragraphs, lists, tables and pictures, in order. Text may hold `code`."""

    title: str
    _parts: list[tuple[str, str]] = field(default_factory=list)  # Markdown, HTML

    def heading(self, text: str) -> None:
        self._parts.append((f"## {text}", f"<h2>{_inline(text)}</h2>"))

    def paragraph(self, text: str) -> None:
        self._parts.append((text, f"<p>{_inline(text)}</p>"))

    def points(self, lines: Sequence[str]) -> None:
        items = "".join(f"<li>{_inline(line)}</li>" for line in lines)
        self._parts.append(("\n".join(f"- {line}" for line in lines), f"<ul>{items}</ul>"))

    def table(self, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        cells = lambda row, tag: "".join(f"<{tag}>{_inline(c)}</{tag}>" for c in row)  # noqa: E731
        html = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
        lines = [_row(head), "|" + " --- |" * len(head), *(_row(row) for row in body)]
        self._parts.append(("\n".join(lines), f"<table><tr>{cells(head, 'th')}</tr>{html}</table>"))

    def picture(self, file: str, alt: str) -> None:
        self._parts.append((f"![{alt}]({file})", f'<p><img src="{escape(file)}" alt="{escape(alt)}"></p>'))

    def markdown(self) -> str:
        return "\n\n".join([f"# {self.title}", *(md for md, _ in self._parts)]) + "\n"

    def html(self) -> str:
        body = "\n".join([f"<h1>{_inline(self.title)}</h1>", *(html for _, html in self._parts)])
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{_STYLE}</style>'
        return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'

    def write(self, folder: Path, name: str) -> None:
        """NAME.md and NAME.html."""
        write_text(folder / f"{name}.md", self.markdown())
        write_text(folder / f"{name}.html", self.html())


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
