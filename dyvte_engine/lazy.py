"""Names of a package that are looked up at first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def find(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """`name` from the module of the package that `homes` gives for it ("" : a module of that name itself).

    Raises AttributeError for a name that is not in the table.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    home = homes[name]
    module = importlib.import_module(f".{home or name}", package)
    return getattr(module, name) if home else module
