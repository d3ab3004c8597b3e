"""What kind of number an argument is. NumPy's scalars count, truth values do not."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeGuard


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> TypeGuard[float]:
    """NaN is one too: it fails every comparison, so write ranges as `low <= value <= high`."""
    return isinstance(value, Real) and not isinstance(value, bool)
