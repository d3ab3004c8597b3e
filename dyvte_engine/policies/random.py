"""Visual tokens that leave by chance: the baseline every ranking has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import is_real, is_whole
from ..errors import InvalidArgumentError
from ..kernels.transfer import to_device
from .base import Decision, LayerState, VisualTokenPolicy


@dataclass(frozen=True)
class Random(VisualTokenPolicy):
    """Entering layer `place`, `ratio` of the visual tokens leave, drawn uniformly without replacement.

    place 0 is before the language model (the projector works row by row, so before or after it is the same): each
    picture by itself, positions new and contiguous. A later place takes
    from all of a sequence's visual tokens and keeps positions, as FastV does; V - int(ratio * V) stay either way. The
    draw depends on `seed` and V alone, so a prompt gets the same answer in every batch.
    """

    place: int = 0
    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = is_whole(self.place) and is_real(self.ratio) and is_whole(self.seed)
        if not (numbers and self.place >= 0 and 0 <= self.ratio <= 1 and 0 <= self.seed < 2**63):
            given = f"Random place is {self.place!r}, ratio {self.ratio!r}, seed {self.seed!r}"
            raise InvalidArgumentError(f"{given}; accepted: place >= 0, ratio 0 to 1, seed 0 to 2^63 - 1")

    @property
    def acts_before_decoder(self) -> bool:
        return self.place == 0

    def bind(self, model: Any) -> VisualTokenPolicy:
        if self.place >= model.shape.num_layers:
            raise InvalidArgumentError(f"Random place is {self.place}; accepted: 0 to {model.shape.num_layers - 1}")
        return self

    def reduce(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.place > 0:
            return features
        return [f[to_device(self.select(len(f)), f.device, torch.int64)] for f in features]

    def layers(self, num_layers: int) -> set[int]:
        return {self.place - 1} if self.place > 0 else set()

    def decide(self, state: LayerState) -> Decision:
        return [to_device(self.select(n), state.hidden.device, torch.int64) for n in state.rows.n_visual]

    def select(self, size: int) -> Tensor:
        """int64 [size - int(ratio * size)], ascending rows that stay."""
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
        return drawn[int(size * self.ratio) :].sort().values
