"""Policies that ask nothing of the model: keep everything, or leave after a given layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import is_whole
from ..errors import InvalidArgumentError
from .base import Decision, LayerState, VisualTokenPolicy


@dataclass(frozen=True)
class KeepAll(VisualTokenPolicy):
    """The plain model."""


@dataclass(frozen=True)
class FixedExit(VisualTokenPolicy):
    """All visual tokens leave after `layer`; -1: before the first. VTW "entering layer K" is `FixedExit(K - 1)`."""

    layer: int

    @property
    def all_or_none(self) -> bool:
        return type(self).decide is FixedExit.decide

    def bind(self, model: Any) -> VisualTokenPolicy:
        last = model.shape.num_layers - 1
        if not (is_whole(self.layer) and -1 <= self.layer <= last):
            raise InvalidArgumentError(f"FixedExit layer is {self.layer!r}; accepted: -1 to {last}")
        return self

    def layers(self, num_layers: int) -> set[int]:
        return {self.layer}

    def most(self, visual: int, num_layers: int) -> list[int]:
        return [visual if layer <= self.layer else 0 for layer in range(num_layers)]

    def decide(self, state: LayerState) -> Decision:
        nothing = state.rows.source[:0]
        return [nothing] * len(state.rows.n_visual)
