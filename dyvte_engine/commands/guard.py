"""Errors of a command as one line on stderr. Standard library only: the doctor uses it where nothing else is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from ..errors import DyvteError

CLOSED = "the output was closed before all of it was written"


def guarded(command: Callable[[], object]) -> None:
    """Run a command; a DyvteError or an error of the system (full disk, closed pipe) is one line and exit code 2."""
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # a full disk shows here, where it can still be reported
    except (DyvteError, OSError) as error:
        with suppress(OSError):
            print("error:", _line(error), file=sys.stderr)
        _drop_unwritable_output()
        sys.exit(2)


def _line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, BrokenPipeError):
        text = CLOSED
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'output'}: {error.strerror}"
    return " ".join(line.strip() for line in text.splitlines())


def _drop_unwritable_output() -> None:
    """What stdout still holds and cannot write, the interpreter would complain about once more as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
