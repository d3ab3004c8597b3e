"""Policies: when visual tokens leave, and which. `parse` reads the command line's notation."""

from __future__ import annotations

from ..errors import InvalidArgumentError
from .base import Decision, LayerState, VisualTokenPolicy
from .compose import Composed, compose
from .dynamic import DynamicExit
from .fastv import FastV
from .fixed import FixedExit, KeepAll

NOTATION = "keep-all, fixed:LAYER, fastv:K,R, dynamic:HEADS_FILE[,THRESHOLD], or several joined by '+'"

__all__ = [
    "NOTATION",
    "Composed",
    "Decision",
    "DynamicExit",
    "FastV",
    "FixedExit",
    "KeepAll",
    "LayerState",
    "VisualTokenPolicy",
    "compose",
    "parse",
]


def parse(text: str) -> VisualTokenPolicy:
    """A policy from its notation, for example "fastv:2,0.5+dynamic:heads.safetensors".

    Raises:
        InvalidArgumentError: the text is not of that form (NOTATION).
    """
    parts = [_parse_one(part) for part in text.split("+")]
    return parts[0] if len(parts) == 1 else compose(*parts)


def _parse_one(text: str) -> VisualTokenPolicy:
    name, _, rest = text.strip().partition(":")
    args = [a.strip() for a in rest.split(",")] if rest else []
    try:
        if name == "keep-all" and not args:
            return KeepAll()
        if name == "fixed" and len(args) == 1:
            return FixedExit(int(args[0]))
        if name == "fastv" and len(args) <= 2:
            return FastV(*(kind(a) for kind, a in zip((int, float), args, strict=False)))
        if name == "dynamic" and 1 <= len(args) <= 2:
            return DynamicExit.from_file(args[0], float(args[1]) if len(args) == 2 else None)
    except InvalidArgumentError:
        raise
    except ValueError:
        pass
    raise InvalidArgumentError(f"policy {text!r} is not understood; accepted: {NOTATION}")
