"""DivPrune (CVPR 2025): before the language model, keep the visual tokens that differ most from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_real
from ..errors import InvalidArgumentError
from .base import VisualTokenPolicy


@dataclass(frozen=True)
class DivPrune(VisualTokenPolicy):
    """Of each picture's projected tokens keep round(`keep` * V), chosen greedily to be far apart by cosine distance.

    The first is the one whose nearest neighbour is farthest, each next one the one whose nearest chosen token is
    farthest; ties go to the earlier token. What stays keeps its order.

    Settled from the authors' code: the start, the rounding, cosine distance of the projector's output. Different: a
    token is never chosen twice (theirs can be, when tokens repeat); with several pictures each is pruned by itself
    (theirs takes one picture); at least one token stays.
    """

    keep: float = 0.098

    def __post_init__(self) -> None:
        if not (is_real(self.keep) and 0 < self.keep <= 1):
            raise InvalidArgumentError(f"DivPrune keep is {self.keep!r}; accepted: above 0 up to 1")

    def reduce(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        kept: dict[int, Tensor] = {}
        for size in {len(f) for f in features}:  # pictures of one size go as one batch
            same = [i for i, f in enumerate(features) if len(f) == size]
            rows = self.select(torch.stack([features[i] for i in same]))
            kept |= {i: features[i][r] for i, r in zip(same, rows, strict=True)}
        return [kept[i] for i in range(len(features))]

    def select(self, features: Tensor) -> Tensor:
        """features [P, V, d] -> int64 [P, round(keep * V)], ascending rows that stay."""
        pictures, size, _ = features.shape
        unit = F.normalize(features.float(), dim=-1)
        distance = 1 - unit @ unit.mT  # [P, V, V]
        at = torch.arange(pictures, device=features.device)
        # The second smallest distance of a row: the smallest is that to itself.
        nearest = distance.topk(min(2, size), dim=-1, largest=False).values[..., -1]
        chosen = [nearest.argmax(-1)]
        nearest = distance[at, chosen[0]].clone()
        for _ in range(max(round(self.keep * size), 1) - 1):
            nearest.scatter_(1, chosen[-1][:, None], -torch.inf)
            chosen.append(nearest.argmax(-1))
            nearest = torch.minimum(nearest, distance[at, chosen[-1]])
        return torch.stack(chosen, dim=-1).sort(-1).values
