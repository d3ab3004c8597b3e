"""Several policies as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..kernels.transfer import read_later
from .base import Awaited, Decision, LayerState, VisualTokenPolicy, at_most

if TYPE_CHECKING:
    from ..models.vision import VisionTower
    from ..models.vision_run import VisionRun


@dataclass(frozen=True, eq=False)
class Composed(VisualTokenPolicy):
    """Asks each part at its own places; where two ask at one layer, a token stays only if both keep it."""

    parts: tuple[VisualTokenPolicy, ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.parts, tuple) and all(isinstance(part, VisualTokenPolicy) for part in self.parts)):
            raise InvalidArgumentError(f"compose got {self.parts!r}; accepted: policies")
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

    @property
    def state(self) -> Hashable:
        return tuple(part.state for part in self.parts)

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
        sizes = state.rows.n_visual

        def read() -> Decision:
            return _settled(_both([_settled(d) for d in decisions], sizes))

        known = [d for d in decisions if not callable(d)]
        together = _both(known, sizes) if known else read
        if len(known) == len(decisions):
            return together
        return read if callable(together) else Awaited(read, together)

    def most(self, visual: int, num_layers: int) -> list[int]:
        parts = [at_most(part, visual, num_layers) for part in self.parts]
        return [min(each) for each in zip([visual] * num_layers, *parts, strict=True)]

    def renumbers(self, layer: int, num_layers: int) -> bool:
        return any(layer in p.layers(num_layers) and p.renumbers(layer, num_layers) for p in self.parts)


def _both(decisions: Sequence[Decision], sizes: Sequence[int]) -> Decision | Callable[[], Decision]:
    """What every decision keeps of the `sizes` visual rows; where only a device knows how many, a function."""
    merged: list[Tensor | None] = []
    open_: dict[int, Tensor] = {}  # sequences of which several decisions keep a part: bool [n], true where all keep
    for b, (keeps, n) in enumerate(zip(zip(*decisions, strict=True), sizes, strict=True)):
        parts = [keep for keep in keeps if keep is not None and len(keep) < n]
        fewest = min(parts, key=len, default=None)
        merged.append(fewest)
        if fewest is not None and len(parts) > 1 and len(fewest) > 0:
            marks = fewest.new_zeros((len(parts), n), dtype=torch.bool)
            for mark, keep in zip(marks, parts, strict=True):
                mark.index_fill_(0, keep, True)
            open_[b] = marks.all(dim=0)
    if not open_:
        return merged
    counts = torch.stack([stays.sum() for stays in open_.values()])
    read = read_later(counts)

    def settle() -> Decision:
        for (b, stays), count in zip(open_.items(), read(), strict=True):
            merged[b] = torch.nonzero_static(stays, size=count)[:, 0]
        return merged

    return settle if counts.is_cuda else settle()


def _settled(decision: Decision | Callable[[], Decision]) -> Decision:
    return decision() if callable(decision) else decision


def compose(*parts: VisualTokenPolicy) -> VisualTokenPolicy:
    """`compose(FastV(2, 0.5), DynamicExit(heads))` is the paper's DyVTE+FastV."""
    return Composed(parts)
