"""From measured data to what people read: a table on the terminal, a JSON file, a plot, a table in Markdown.

A benchmark module has `tables(data)` and `figure(data)`; both see only what its JSON holds, so that a page can be made
from recorded results (`benchmarks.document`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.common import Data

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#882255")


@dataclass(frozen=True)
class Sheet:
    """One table; `note` says how to read it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def finish(
    data: Data, out: Path, name: str, tables: Callable[[Data], list[Sheet]], figure: Callable[[Data], Figure]
) -> None:
    """Show the tables; write `<out>/<name>.json` and `.png`."""
    data = json.loads(json.dumps(data))  # tables and plot see what a reader of the file sees
    console = Console(width=200)
    for sheet in tables(data):
        table = Table(*sheet.columns, title=sheet.title, caption=sheet.note or None)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    console.print(limits_line(data))
    path = write(data, out, name)
    save_figure(figure(data), out / f"{name}.png")
    print(path)


def write(data: Data, out: Path, name: str) -> Path:
    """The record `<out>/<name>.json`, whole at any moment."""
    out.mkdir(parents=True, exist_ok=True)
    path, new = out / f"{name}.json", out / f"{name}.json.new"
    new.write_text(json.dumps(data, indent=1) + "\n")
    return new.replace(path)


def save_figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=80, metadata={"Software": None})  # the same bytes whatever matplotlib writes


def limits_line(data: Data) -> str:
    flops, moved = data["limits"]["flops"], data["limits"]["bytes"]
    dtype = data["args"]["dtype"]
    return f"Limits measured in that run: matmul {flops / 1e9:,.0f} GFLOP/s ({dtype}), copy {moved / 1e9:.1f} GB/s."


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure (sizes in inches) and its axes, always as an array [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def scaled(value: Data | None, factor: float = 1.0, digits: int = 1) -> str:
    """A `spread` as "median (q1-q3)"; nothing for None."""
    if value is None:
        return ""
    mid, low, high = (factor * value[k] for k in ("median", "q1", "q3"))
    return f"{mid:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def milliseconds(value: Data | None) -> str:
    """A `spread` of seconds; sub-millisecond figures get three digits."""
    return "" if value is None else scaled(value, 1e3, 1 if value["median"] >= 0.01 else 2)


def markdown(sheet: Sheet) -> str:
    lines = [f"**{sheet.title}**" + (f" ({_escaped(sheet.note)})" if sheet.note else ""), ""]
    lines += [_row(sheet.columns), _row(["---"] * len(sheet.columns))]
    return "\n".join(lines + [_row(row) for row in sheet.rows])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def into_page(page: str, name: str, text: str) -> str:
    """The page with the text between its two marks of this name replaced. Raises ValueError where it has none."""
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)
