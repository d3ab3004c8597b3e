"""Coarser pictures: the plain alternative to choosing tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..checks import is_whole
from ..errors import InvalidArgumentError
from .base import VisualTokenPolicy


@dataclass(frozen=True)
class Downsample(VisualTokenPolicy):
    """Before the language model, average each picture's g x g grid of projected tokens over `factor` x `factor` cells.

    ceil(g / factor)^2 tokens remain, row by row; cells at the right and lower edge average what they hold.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        if not (is_whole(self.factor) and self.factor >= 1):
            raise InvalidArgumentError(f"Downsample factor is {self.factor!r}; accepted: whole numbers, at least 1")

    def reduce(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._pool(f) for f in features]

    def _pool(self, features: Tensor) -> Tensor:
        side = math.isqrt(len(features))
        if side * side != len(features):
            raise InvalidArgumentError(f"Downsample got a picture of {len(features)} tokens; accepted: a square grid")
        grid = features.T.unflatten(1, (side, side))[None]  # [1, d, g, g]
        pooled = F.avg_pool2d(grid, min(self.factor, side), ceil_mode=True, count_include_pad=False)
        return pooled[0].flatten(1).T
