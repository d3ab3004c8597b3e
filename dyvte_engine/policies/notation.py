"""How a policy is written: `parse` reads the command line's notation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ..errors import InvalidArgumentError
from .base import VisualTokenPolicy
from .composed import compose
from .divprune import DivPrune
from .downsample import Downsample
from .dynamic import DynamicExit
from .fastv import FastV
from .fixed import FixedExit, KeepAll
from .pyramid_drop import PyramidDrop
from .random import Random
from .tome import ToMe
from .visionzip import VisionZip


class Notation(NamedTuple):
    """How a policy is written, what makes it of the arguments behind the colon, and their types.

    `options`: further arguments, written NAME=VALUE, and their types.
    """

    usage: str
    make: Callable[..., VisualTokenPolicy]
    types: tuple[Callable[[str], object], ...] = ()
    options: Mapping[str, Callable[[str], object]] = MappingProxyType({})


_DYNAMIC = {
    "target_agreement": float,
    "target_flops": float,
    "min_layer": int,
    "every_k": int,
    "hysteresis": int,
    "keep": int,
}

POLICIES = {
    "keep-all": Notation("keep-all", KeepAll),
    "fixed": Notation("fixed:LAYER", FixedExit, (int,)),
    "dynamic": Notation(
        "dynamic:HEADS_FILE[,THRESHOLD][,target_agreement=A][,keep=K]", DynamicExit.from_file, (str, float), _DYNAMIC
    ),
    "fastv": Notation("fastv[:K,R]", FastV, (int, float)),
    "pyramiddrop": Notation("pyramiddrop", PyramidDrop),
    "divprune": Notation("divprune[:KEEP]", DivPrune, (float,)),
    "visionzip": Notation("visionzip[:DOMINANT,CONTEXTUAL]", VisionZip, (int, int)),
    "tome": Notation("tome[:KEEP]", ToMe, (float,)),
    "random": Notation("random[:PLACE,RATIO,SEED]", Random, (int, float, int)),
    "downsample": Notation("downsample[:FACTOR]", Downsample, (int,)),
}
NOTATION = f"{', '.join(n.usage for n in POLICIES.values())}, or several joined by '+'"


def parse(text: str) -> VisualTokenPolicy:
    """A policy from its notation, for example "fastv:2,0.5+dynamic:heads.safetensors".

    Raises:
        InvalidArgumentError: the text is not of that form (NOTATION).
    """
    if not isinstance(text, str):
        raise InvalidArgumentError(f"policy is a {type(text).__name__}; accepted: {NOTATION}")
    parts = [_parse_one(part) for part in text.split("+")]
    return parts[0] if len(parts) == 1 else compose(*parts)


def files_in(text: str) -> list[str]:
    """The files that a notation names."""
    parts = [part.strip().partition(":") for part in text.split("+")]
    return [rest.split(",")[0].strip() for name, _, rest in parts if name == "dynamic"]


def _parse_one(text: str) -> VisualTokenPolicy:
    name, _, rest = text.strip().partition(":")
    args = [a.strip() for a in rest.split(",")] if rest else []
    notation = POLICIES.get(name)
    named = dict(a.split("=", 1) for a in args if "=" in a)
    args = [a for a in args if "=" not in a]
    try:
        if notation is not None and len(args) <= len(notation.types) and set(named) <= set(notation.options):
            options = {key: notation.options[key](value) for key, value in named.items()}
            return notation.make(*(kind(a) for kind, a in zip(notation.types, args, strict=False)), **options)
    except InvalidArgumentError:
        raise
    except (ValueError, TypeError):  # TypeError: too few
        pass
    raise InvalidArgumentError(f"policy {text!r} is not understood; accepted: {NOTATION}")
