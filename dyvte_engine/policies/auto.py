"""The policy "auto": the exit heads that came with a model."""

from __future__ import annotations

from pathlib import Path

from ..assets import resolve_model
from . import parse
from .base import VisualTokenPolicy
from .dynamic import DynamicExit
from .fixed import KeepAll


def heads_of(model: str | Path) -> Path:
    """Where the exit heads of a checkpoint folder are, if it has any."""
    return Path(resolve_model(model)) / "exit_heads.safetensors"


def policy_for(text: str, model: str | Path) -> VisualTokenPolicy:
    """A policy from its notation; "auto" is the exit heads in the model's folder, else keep-all.

    Raises:
        InvalidArgumentError, HeadsError: as `parse` and `DynamicExit.from_file`.
    """
    if text != "auto":
        return parse(text)
    heads = heads_of(model)
    return DynamicExit.from_file(heads) if heads.is_file() else KeepAll()
