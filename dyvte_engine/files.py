"""Files that are either whole or not there, whenever the process is killed or the disk is full; and JSON of anybody."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import FileError


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write NAME.part in the folder of `path`, make sure of the disk, then rename; makes the folder.

    A pipe or a device (`/dev/stdout`) is written as it is.

    Raises:
        FileError: the folder or the file cannot be written. What was at `path` is still there.
    """
    path = named(path)
    try:
        special = path.exists() and not path.is_file()
        part = path if special else path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                if not special:
                    os.fsync(file.fileno())
            if not special:
                part.replace(path)
        except BaseException:
            if not special:
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error


def named(path: str | Path) -> Path:
    """The path to write to. Raises FileError where no file can have this name."""
    if "\0" in str(path):
        raise FileError(f"{str(path)!r} cannot be written: no file has a null byte in its name")
    return Path(path)


def write_text(path: str | Path, text: str) -> None:
    """As `write_bytes`, UTF-8."""
    write_bytes(path, text.encode())


def parse_json(text: str) -> Any:
    """As `json.loads`; raises ValueError also for what is nested deeper than it can follow."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def check_writable(path: str | Path, folder: bool = False) -> None:
    """Try to write where `path` will be, a file or a folder, before hours of work; leaves nothing behind.

    Raises:
        FileError: a part of the path is not a folder, is read-only or is on a full disk.
    """
    path = named(path)
    try:
        if path.exists() and not folder:
            open(path, "ab").close()
            if not path.is_file():
                return
        there = path if folder else path.parent
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dyvte_engine, by default ~/.cache/dyvte_engine; made if it is not there.

    Raises:
        FileError: it is not there and cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "dyvte_engine"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be made: {error.strerror}; XDG_CACHE_HOME names another place") from error
    return folder
