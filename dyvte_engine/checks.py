"""What kind of number an argument is (NumPy's scalars count, truth values do not), and names that must differ."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

from .errors import InvalidArgumentError


def is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_real(value: Any) -> TypeGuard[float]:
    """NaN is one too: it fails every comparison, so write ranges as `low <= value <= high`."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_seed(value: Any) -> None:
    """Raises InvalidArgumentError for what NumPy's generators do not take."""
    if not (is_whole(value) and value >= 0):
        raise InvalidArgumentError(f"seed is {value!r}; accepted: whole numbers, at least 0")


def check_names(what: str, names: Sequence[str]) -> None:
    """Raises InvalidArgumentError for a name that comes twice: of two results under one name, one would be lost."""
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise InvalidArgumentError(f"{what} names {twice[0]!r} twice; accepted: a name for each")
