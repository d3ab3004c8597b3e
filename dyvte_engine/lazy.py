"""What is looked up at first use: names of a package, and packages that only some of its parts need."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from .errors import SourceError


def find(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """`name` from the module of the package that `homes` gives for it ("" : a module of that name itself).

    Raises AttributeError for a name that is not in the table.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    home = homes[name]
    module = importlib.import_module(f".{home or name}", package)
    return getattr(module, name) if home else module


def optional(module: str, extra: str) -> Any:
    """A module of a package that one of the extras installs.

    Raises SourceError when it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourceError(f"{module.split('.')[0]} is not installed; pip install 'dyvte-engine[{extra}]'") from error
