"""The policies "auto" and "dynamic:auto": the exit heads that came with a model."""

from __future__ import annotations

import re
from pathlib import Path

from ..assets import heads_of
from . import parse
from .base import VisualTokenPolicy
from .dynamic import DynamicExit
from .fixed import KeepAll


def policy_for(text: str, model: str | Path) -> VisualTokenPolicy:
    """A policy from its notation, with "auto" for the exit heads in the model's folder.

    "auto" alone is keep-all where there are none; "dynamic:auto,target_agreement=0.99" needs them.

    Raises:
        InvalidArgumentError, HeadsError: as `parse` and `DynamicExit.from_file`.
    """
    heads = heads_of(model)
    if text != "auto":
        return parse(re.sub(r"(?<![^+\s])dynamic:\s*auto(?=\s*(,|\+|$))", lambda _: f"dynamic:{heads}", text))
    return DynamicExit.from_file(heads) if heads.is_file() else KeepAll()
