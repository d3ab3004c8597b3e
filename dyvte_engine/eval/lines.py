"""Results on disk as JSON lines, so that a killed run continues where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import FileError, InvalidArgumentError
from ..files import write_text


class LineFile:
    """One JSON object a line after a first line that says what they are of; a last line cut off by a kill is dropped.

    Raises:
        InvalidArgumentError: the file is there and its first line is not `header`; `what` names it in the message.
        FileError: it cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any], what: str):
        self.path = path
        if path.exists() and not path.is_file():
            raise InvalidArgumentError(f"{what}: {path} is a folder or a device; accepted: a file")
        if not path.exists():
            write_text(path, json.dumps(header) + "\n")
        lines = path.read_text().split("\n")
        if lines[0] != json.dumps(header):
            given = f"{what}: {path} is of another model or dtype ({lines[0]}; this is {json.dumps(header)})"
            raise InvalidArgumentError(f"{given}; name a new file")
        if lines[-1]:
            write_text(path, "\n".join([*lines[:-1], ""]))
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines[1:-1]]

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        entries = list(entries)
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error
        self.entries += entries
