"""Results on disk as JSON lines, so that a killed run continues where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError, InvalidArgumentError
from ..files import parse_json, write_text


class LineFile:
    """One JSON object a line after a first line that says what they are of; a last line cut off by a kill is dropped.

    kinds: what each object holds, by name: a type or several.

    Raises:
        InvalidArgumentError: the file is there and its first line is not `header`, or another line is no such object;
            `what` names it in the message.
        FileError: it cannot be read or written.
    """

    def __init__(self, path: Path, header: dict[str, Any], what: str, kinds: Mapping[str, Any]):
        self.path = path
        if path.exists() and not path.is_file():
            raise InvalidArgumentError(f"{what}: {path} is a folder or a device; accepted: a file")
        if not path.exists():
            write_text(path, json.dumps(header) + "\n")
        try:
            lines = path.read_text(errors="replace").split("\n")
        except OSError as error:
            raise FileError(f"{what}: {path} cannot be read: {error.strerror}") from error
        if lines[0] != json.dumps(header):
            given = f"{what}: {path} is of another model or dtype ({lines[0]}; this is {json.dumps(header)})"
            raise InvalidArgumentError(f"{given}; name a new file")
        if lines[-1]:
            write_text(path, "\n".join([*lines[:-1], ""]))
        self.entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines[1:-1], 2):
            try:
                entry = parse_json(line)
                whole = entry.keys() == kinds.keys() and all(isinstance(entry[n], kind) for n, kind in kinds.items())
            except (ValueError, AttributeError):
                whole = False
            if not whole:
                raise InvalidArgumentError(f"{what}: line {number} of {path} is damaged; remove it or name a new file")
            self.entries.append(entry)

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        entries = list(entries)
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error
        self.entries += entries
