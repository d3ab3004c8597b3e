"""Writes docs/benchmarks.md and its plots from recorded results; nothing in the page is typed by hand.

Results are copied into docs/benchmarks/ beside the plots, so the page can be made again from there:
`python -m benchmarks.document [--results outputs/benchmarks]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Data
from benchmarks.report import Sheet, limits_line, save_figure

DOCS = Path(__file__).parent.parent / "docs"
ORDER = ("policies", "curves", "breakdown", "growth", "kernels", "versus")
INTRO = """# Benchmarks

Made by `make bench-docs` from the results in [docs/benchmarks](benchmarks); do not edit. `make bench` measures on a
CPU, `make gpu-bench` on a GPU.

How to read it: everything compared in a table ran in one process in turn (`versus`: processes in turn), so ratios hold
where absolute times depend on what else the machine did. Figures are medians with quartiles. Limits are measured with
torch's own matmul and copy just before; "share" is the least time these limits allow over the measured time (a cache
that holds the data can make it exceed 100 %). Models with random weights have published sizes and force the exit at a
given layer; nano is the trained model that comes with the package.
"""


def page(results: Sequence[tuple[str, Data]]) -> str:
    """Markdown of all results, (file name, data) each."""
    parts = [INTRO]
    if not any("gpu" in data["machine"] for _, data in results):
        parts.append("No result of a GPU is recorded yet.")
    for name, data in sorted(results, key=lambda r: (ORDER.index(r[1]["benchmark"]), r[0])):
        module = importlib.import_module(f"benchmarks.{data['benchmark']}")
        summary = (module.__doc__ or "").strip().splitlines()[0]
        parts += [
            f"## {name}",
            summary,
            f"```sh\n{data['command']}\n```",
            _machine(data),
            f"![{name}](benchmarks/{name}.png)",
        ]
        parts += [markdown(sheet) for sheet in module.tables(data)]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def _machine(data: Data) -> str:
    about = dict(data["machine"])
    where = about.pop("gpu", None) or about["cpu"]
    rest = f"{about['threads']} threads, load {about['load']} at the start, torch {about['torch']}, transformers "
    rest += f"{about['transformers']}, commit {about['commit']}, Python {about['python']}"
    return f"{data['date']}; {where}, {rest}. {limits_line(data)}"


def markdown(sheet: Sheet) -> str:
    lines = [f"**{sheet.title}**" + (f" ({_escaped(sheet.note)})" if sheet.note else ""), ""]
    lines += [_row(sheet.columns), _row(["---"] * len(sheet.columns))]
    return "\n".join(lines + [_row(row) for row in sheet.rows])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=DOCS / "benchmarks", help="folder of JSON files to take in")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args(argv)
    kept = args.docs / "benchmarks"
    kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.results.glob("*.json")):
        data = json.loads(path.read_text())
        if data.get("benchmark") not in ORDER:
            print(f"{path}: left out, no benchmark of this page")
            continue
        if args.results.resolve() != kept.resolve():
            (kept / path.name).write_text(path.read_text())
        module = importlib.import_module(f"benchmarks.{data['benchmark']}")
        save_figure(module.figure(data), kept / f"{path.stem}.png")
    results = [(path.stem, json.loads(path.read_text())) for path in sorted(kept.glob("*.json"))]
    (args.docs / "benchmarks.md").write_text(page(results))
    print(args.docs / "benchmarks.md")


if __name__ == "__main__":
    main()
