"""Several policies as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Decision, LayerState, VisualTokenPolicy


@dataclass(frozen=True, eq=False)
class Composed(VisualTokenPolicy):
    """Asks each part at its own layers; where two ask at one layer, a token stays only if both keep it."""

    parts: tuple[VisualTokenPolicy, ...]

    def bind(self, model: Any) -> Composed:
        return Composed(tuple(part.bind(model) for part in self.parts))

    def layers(self, num_layers: int) -> set[int]:
        return set().union(*(part.layers(num_layers) for part in self.parts))

    def decide(self, state: LayerState) -> Decision:
        merged: list[Tensor | None] = [None] * len(state.pack.n_visual)
        for part in self.parts:
            if state.layer not in part.layers(state.num_layers):
                continue
            for b, keep in enumerate(part.decide(state)):
                before = merged[b]
                if before is None or keep is None:
                    merged[b] = before if keep is None else keep
                else:
                    merged[b] = keep[torch.isin(keep, before)]
        return merged


def compose(*parts: VisualTokenPolicy) -> VisualTokenPolicy:
    """`compose(FastV(2, 0.5), DynamicExit(heads))` is the paper's DyVTE+FastV."""
    return Composed(parts)
