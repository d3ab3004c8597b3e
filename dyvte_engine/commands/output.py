"""What the commands share in writing: the console for messages, a progress bar, and options that name an output."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..errors import InvalidArgumentError
from ..files import check_writable

# Without markup: brackets in paths and in "dyvte-engine[eval]" are text.
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def quiet() -> None:
    """No notes and no progress bars of transformers between the lines of a command."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def loading(model: str) -> AbstractContextManager[Any]:
    """A sign of life while a checkpoint is read."""
    return err.status(Text(f"loading {model}"))


def progress() -> Progress:
    """A bar on a terminal; nothing in a file."""
    name = TextColumn("{task.description}", markup=False)
    return Progress(
        name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal
    )


def _file(path: Path | None) -> Path | None:
    if path is not None:
        check_writable(path)
    return path


def check_folder(path: Path | None) -> Path | None:
    if path is not None:
        check_writable(path, folder=True)
    return path


def apart(written: dict[str, Path | None], read: Iterable[Path] = ()) -> None:
    """Raises InvalidArgumentError where a file that a command writes is another one that it writes, or reads."""
    seen = {path.resolve(): f"a file that is read, {path}" for path in read}
    for name, path in written.items():
        if path is None or (path.exists() and not path.is_file()):  # a pipe or a device takes all there is
            continue
        where = path.resolve()
        if where in seen:
            raise InvalidArgumentError(f"{name} is {path}, and so is {seen[where]}; accepted: a file of its own")
        seen[where] = name


def out_file(help: str) -> Any:
    """An option naming a file to write; that it can be is checked before the command starts."""
    return typer.Option(help=help, callback=_file)


def out_folder(help: str) -> Any:
    """An option naming a folder to write into, checked in the same way."""
    return typer.Option(help=help, callback=check_folder)
