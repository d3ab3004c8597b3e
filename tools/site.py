"""Hooks of `make docs` (MkDocs calls the `on_` functions): the pages that are not files in docs/.

README.md is the front page. The notebook is run, so its pictures are those of this code. Links from a page to a file
outside docs/ lead to a page with that file. Mermaid diagrams become pictures.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mermaidx
import nbformat
from mkdocs.exceptions import BuildError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOK = ROOT / "examples" / "the_exit.ipynb"
PAGES = {  # outside docs/ -> page of the site
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "dyvte_engine" / "assets" / "nano" / "README.md": "nano-card.md",
    NOTEBOOK: "the_exit.md",
}
OUTSIDE = re.compile(r'<(script|img|iframe)[^>]* src="?(https?:)?//|<link[^>]*stylesheet[^>]*href="?(https?:)?//')
SPREAD = re.compile(r"(?<=\d) \(([\d.,]+)-([\d.,]+)\)")  # quartiles, which stay on one line
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)


def on_config(config: Any) -> Any:
    entry = next(part for part in config.nav if "Benchmarks" in part)
    entry["Benchmarks"] = ["benchmarks.md", *(f"benchmarks/{p.name}" for p in sorted(DOCS.glob("benchmarks/*.md")))]
    return config


def on_files(files: Files, config: Any) -> Files:
    for path, uri in PAGES.items():
        if path != NOTEBOOK:
            files.append(_generated(config, uri, path.read_text()))
    for uri, content in _notebook():
        files.append(_generated(config, uri, content))
    files.append(_generated(config, "reference/commands.md", _commands()))
    for path in sorted({target for page in _written() for target in _linked(page)} - set(PAGES)):
        if not path.is_relative_to(DOCS):
            files.append(_generated(config, _uri(path), _source(path)))
            for name in () if path.is_file() else sorted(path.glob("*.json")):
                files.append(_generated(config, f"{_uri(path)[:-3]}/{name.name}", name.read_text()))
    for page in _written():
        for number, diagram in enumerate(MERMAID.findall(page.read_text())):
            svg = mermaidx.render(diagram, theme="neutral").svg()
            files.append(_generated(config, f"diagrams/{page.stem}-{number}.svg", svg))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    origin = next((path for path, made in PAGES.items() if made == uri), DOCS / uri)
    up = "../" * uri.count("/")
    numbers = iter(range(len(markdown)))
    markdown = MERMAID.sub(lambda _: f"![diagram]({up}diagrams/{origin.stem}-{next(numbers)}.svg)", markdown)

    def moved(found: re.Match[str]) -> str:
        path = (origin.parent / found[1]).resolve()
        return up + _uri(path) if path.exists() else found[1]

    return SPREAD.sub("\u00a0(\\1\u2011\\2)", LINK.sub(moved, markdown))


def on_post_build(config: Any) -> None:
    """A page that loads something from elsewhere ends the build."""
    pages = [page for page in Path(config.site_dir).rglob("*.html") if OUTSIDE.search(page.read_text())]
    if pages:
        raise BuildError(f"pages load something from elsewhere: {', '.join(page.name for page in pages)}")


def _generated(config: Any, uri: str, content: str | bytes) -> File:
    return File.generated(config, uri, content=content)


def _written() -> list[Path]:
    """Pages that are files of the repository."""
    return [*sorted(DOCS.rglob("*.md")), *(path for path in PAGES if path != NOTEBOOK)]


def _linked(page: Path) -> Iterator[Path]:
    """Files and folders that a page links to."""
    targets = (page.parent / link for link in LINK.findall(page.read_text()))
    return (target.resolve() for target in targets if target.exists())


def _uri(path: Path) -> str:
    """Where the site has a file or folder of the repository, from its root."""
    if path in PAGES:
        return PAGES[path]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def _source(path: Path) -> str:
    """A page with a program, or with all programs of a folder and links to its JSON files."""
    if path.is_file():
        return f"# {path.name}\n\n```{path.suffix[1:]}\n{path.read_text()}```\n"
    parts = [f"# {path.relative_to(ROOT)}"]
    for script in sorted(path.glob("*.py")):
        parts.append(f"## {script.name}\n\n```python\n{script.read_text()}```")
    parts += [f"- [{p.name}]({path.name}/{p.name})" for p in sorted(path.glob("*.json"))]
    return "\n\n".join(parts) + "\n"


def _notebook() -> Iterator[tuple[str, str | bytes]]:
    """(uri, content) of the notebook's page and pictures. An error in a cell ends the build."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    os.environ |= {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # of the kernel: no stray lines
    sockets = Config(ConnectionFileMixin={"transport": "ipc"})  # files instead of ports
    options: Any = dict(timeout=300, coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}})
    NotebookClient(notebook, config=sockets, **options).execute()
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, picture in resources["outputs"].items():
        text = text.replace(f"({name})", f"(the_exit/{name})")
        yield f"the_exit/{name}", picture
    yield PAGES[NOTEBOOK], text


def _commands() -> str:
    """The command line's options, as `--help` has them."""
    typer = (sys.executable, "-m", "typer", "dyvte_engine.commands.main", "utils", "docs", "--name", "dyvte-engine")
    made = subprocess.run(typer, cwd=ROOT, capture_output=True, text=True, check=True)
    return made.stdout.replace("# `dyvte-engine`", "# Command line", 1)
