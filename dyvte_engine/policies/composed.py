"""Several policies as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from .base import Decision, LayerState, VisualTokenPolicy

if TYPE_CHECKING:
    from ..models.vision import VisionTower
    from ..models.vision_run import VisionRun


@dataclass(frozen=True, eq=False)
class Composed(VisualTokenPolicy):
    """Asks each part at its own places; where two ask at one layer, a token stays only if both keep it."""

    parts: tuple[VisualTokenPolicy, ...]

    def __post_init__(self) -> None:
        in_tower = [type(part).__name__ for part in self.parts if part.acts_in_tower]
        if len(in_tower) > 1:
            raise InvalidArgumentError(f"compose got {' and '.join(in_tower)}; accepted: one policy in the tower")

    @property
    def acts_in_tower(self) -> bool:
        return any(part.acts_in_tower for part in self.parts)

    @property
    def acts_before_decoder(self) -> bool:
        return any(part.acts_before_decoder for part in self.parts)

    @property
    def tower_merges(self) -> tuple[int, ...]:
        return next((part.tower_merges for part in self.parts if part.tower_merges), ())

    @property
    def tower_key(self) -> Hashable | None:
        return next((part.tower_key for part in self.parts if part.acts_in_tower), None)

    def bind(self, model: Any) -> Composed:
        return Composed(tuple(part.bind(model) for part in self.parts))

    def in_tower(self, tower: VisionTower, run: VisionRun) -> None:
        for part in self.parts:
            part.in_tower(tower, run)

    def reduce(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        for part in self.parts:
            features = part.reduce(features)
        return features

    def layers(self, num_layers: int) -> set[int]:
        return set().union(*(part.layers(num_layers) for part in self.parts))

    def decide(self, state: LayerState) -> Decision | Callable[[], Decision]:
        asked = [part for part in self.parts if state.layer in part.layers(state.num_layers)]
        decisions = [part.decide(state) for part in asked]
        if any(callable(d) for d in decisions):
            return lambda: _both([d() if callable(d) else d for d in decisions])
        return _both(decisions)  # type: ignore[arg-type]

    def renumbers(self, layer: int, num_layers: int) -> bool:
        return any(layer in p.layers(num_layers) and p.renumbers(layer, num_layers) for p in self.parts)


def _both(decisions: Sequence[Decision]) -> Decision:
    """What every decision keeps."""
    merged: list[Tensor | None] = list(decisions[0])
    for decision in decisions[1:]:
        for b, (before, keep) in enumerate(zip(merged, decision, strict=True)):
            if before is None or keep is None:
                merged[b] = before if keep is None else keep
            else:
                merged[b] = keep[torch.isin(keep, before)]
    return merged


def compose(*parts: VisualTokenPolicy) -> VisualTokenPolicy:
    """`compose(FastV(2, 0.5), DynamicExit(heads))` is the paper's DyVTE+FastV."""
    return Composed(parts)
