"""Results on disk as JSON lines, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError


class LineFile:
    """One JSON object a line after a first line that says what they are of; a last line cut off by a kill is dropped.

    Raises:
        InvalidArgumentError: the file is there and its first line is not `header`; `what` names it in the message.
    """

    def __init__(self, path: Path, header: dict[str, Any], what: str):
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n")
        lines = path.read_text().split("\n")
        if lines[0] != json.dumps(header):
            given = f"{what}: {path} is of another model or dtype ({lines[0]}; this is {json.dumps(header)})"
            raise InvalidArgumentError(f"{given}; name a new file")
        if lines[-1]:
            path.write_text("\n".join([*lines[:-1], ""]))
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines[1:-1]]

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        entries = list(entries)
        with self.path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        self.entries += entries
