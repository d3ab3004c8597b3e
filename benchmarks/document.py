"""Writes docs/benchmarks.md, a page and a plot for each record, and tables of README.md, docs/nano.md, docs/again.md.

Records are in benchmarks/results. `python -m benchmarks.document` works from them; with `--results
outputs/benchmarks` it takes what is there among them first.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import again
from benchmarks.common import Data
from benchmarks.conclusions import conclusion
from benchmarks.report import into_page, limits_line, markdown, save_figure
from benchmarks.summary import NO_GPU, nano, overview, readme

ROOT = Path(__file__).parent.parent
OWN_PAGE = "again"  # docs/again.md has its tables
ORDER = (
    "policies",
    "curves",
    "breakdown",
    "decisions",
    "decoding",
    "growth",
    "capacity",
    "kernels",
    "versus",
    "serving",
)
INTRO = """# Benchmarks

What the exit and the engine save in time and memory, and where they do not.

```sh
make bench bench-docs
```

measures on this CPU (`make gpu-bench` on a GPU) and writes these pages from the records in
[benchmarks/results](../benchmarks/results); do not edit them.
"""
HOW = """## How to read it

Everything compared in a table ran in one process in turn (`versus` and `serving`: processes in turn), so ratios hold
where absolute times depend on what else the machine did. Figures are medians with quartiles. Limits are measured with
torch's own matmul and copy just before; "share" is the least time these limits allow over the measured time (a cache
that holds the data can make it exceed 100 %). Models with random weights have published sizes and force the exit at a
given layer; nano is the trained model that comes with the package. [Read the figures](figures.md) says more.
"""

OVERVIEW = """## At a glance

How many times faster than transformers' `generate` (SDPA attention) on the same weights, one request at a time; how
many more sequences fit into the same K/V memory; other engines. On nano its own heads decide."""


def overview_page(results: Sequence[tuple[str, Data]]) -> str:
    """docs/benchmarks.md: what each record, (file name, data), shows, and the tables a reader asks for first."""
    parts = [INTRO, "## What this shows"]
    if not any("gpu" in data["machine"] for _, data in results):
        parts.append(NO_GPU)
    parts.append("\n".join(f"- [{name}](benchmarks/{name}.md): {conclusion(data)}" for name, data in _sorted(results)))
    return _joined([*parts, f"{OVERVIEW}\n\n{overview(results)}", HOW])


def record_page(name: str, data: Data) -> str:
    """docs/benchmarks/<name>.md."""
    module = importlib.import_module(f"benchmarks.{data['benchmark']}")
    parts = [
        f"# {name}",
        (module.__doc__ or "").strip().splitlines()[0],
        f"**What this shows.** {conclusion(data)}",
        f"```sh\n{data['command']}\n```",
        _machine(data),
        f"![{name}]({name}.png)",
    ]
    return _joined([*parts, *map(markdown, module.tables(data))])


def _sorted(results: Sequence[tuple[str, Data]]) -> list[tuple[str, Data]]:
    """Those with a page, in the order of the overview."""
    shown = [r for r in results if r[1]["benchmark"] in ORDER]
    return sorted(shown, key=lambda r: (ORDER.index(r[1]["benchmark"]), r[0]))


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _machine(data: Data) -> str:
    about = data["machine"]
    where = f"{about['gpu']}, driver {about['driver']}" if "gpu" in about else about["cpu"]
    rest = f"{about['threads']} threads, load {about['load']} at the start, torch {about['torch']}, transformers "
    rest += f"{about['transformers']}, commit {about['commit']}, Python {about['python']}"
    return f"{data['date']}; {where}, {rest}. {limits_line(data)}"


def again_page(text: str, results: Sequence[tuple[str, Data]]) -> str:
    """docs/again.md with what `benchmarks.again` measured between its marks."""
    found = [(name, data) for name, data in results if data["benchmark"] == OWN_PAGE]
    parts = [part for name, data in found for part in (_machine(data), again.section(name, data))]
    return into_page(text, "again", "\n\n".join(parts) or "Not measured yet.")


def records(root: Path) -> list[tuple[str, Data]]:
    """(file name, data) of every record below a repository's root."""
    return [(p.stem, json.loads(p.read_text())) for p in sorted((root / "benchmarks" / "results").glob("*.json"))]


def take(path: Path, root: Path) -> None:
    """Put a result among the records. Raises ValueError for one that does not tell where it was measured."""
    data = json.loads(path.read_text())
    if data.get("benchmark") not in (*ORDER, OWN_PAGE):
        print(f"{path}: left out, no benchmark of this page")
        return
    about = data["machine"]
    wanted = ("device", "torch", "commit", *(("gpu", "driver") if about["device"].startswith("cuda") else ()))
    missing = [name for name in wanted if not about.get(name)]
    if missing:
        raise ValueError(f"{path} does not tell {', '.join(missing)} (without git DYVTE_COMMIT tells the commit)")
    (root / "benchmarks" / "results" / path.name).write_text(path.read_text())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="folder of JSON files to take among the records")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository written to")
    args = parser.parse_args(argv)
    for path in sorted(args.results.glob("*.json")) if args.results else ():
        take(path, args.root)
    found = records(args.root)
    for name, data in found:
        module = importlib.import_module(f"benchmarks.{data['benchmark']}")
        save_figure(module.figure(data), args.root / "docs" / "benchmarks" / f"{name}.png")
    for name, data in _sorted(found):
        (args.root / "docs" / "benchmarks" / f"{name}.md").write_text(record_page(name, data))
    pages = ("README.md", "docs/benchmarks.md", "docs/nano.md", "docs/again.md")
    entry, detail, own, asked = (args.root / name for name in pages)
    entry.write_text(readme(entry.read_text(), found))
    detail.write_text(overview_page(found))
    own.write_text(nano(own.read_text()))
    asked.write_text(again_page(asked.read_text(), found))
    print(entry, detail, own, asked)


if __name__ == "__main__":
    main()
