"""Records of what was run against the server, in docs/serving, and their tables in docs/serving.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Sheet, into_page, markdown

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "serving"
PAGE = ROOT / "docs" / "serving.md"


def record(name: str) -> Any:
    """What was recorded under a name."""
    return json.loads((RECORDS / f"{name}.json").read_text())


def text(sheets: Sequence[Sheet]) -> str:
    """The tables as they are in the page."""
    return "\n\n".join(markdown(sheet) for sheet in sheets)


def write(name: str, found: Any, sheets: Sequence[Sheet]) -> None:
    """Keep a record, and put its tables between its marks in the page."""
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(into_page(PAGE.read_text(), name, text(sheets)))
