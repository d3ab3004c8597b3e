"""Names of a package that are looked up at first use."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any


def find(package: str, name: str, homes: Sequence[str]) -> Any:
    """`name` from the first of the package's modules `homes` that has it. Raises AttributeError when none does."""
    for home in homes:
        module = importlib.import_module(f".{home}", package)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
