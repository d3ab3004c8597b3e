"""FastV (ECCV 2024): after the layer before K, the visual tokens with the least attention leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..errors import InvalidArgumentError
from .base import Decision, LayerState, VisualTokenPolicy


@dataclass(frozen=True)
class FastV(VisualTokenPolicy):
    """Entering layer `k`, keep the top (1 - `r`) of each sequence's visual tokens by attention in layer k - 1.

    The score is averaged over heads; queries="last" takes the last token (the authors' code), "all" the mean over
    all tokens (the paper's text). No attention map is formed.
    """

    k: int = 2
    r: float = 0.5
    queries: str = "last"

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.r <= 1 or self.queries not in ("last", "all"):
            given = f"FastV k={self.k}, r={self.r}, queries={self.queries!r}"
            raise InvalidArgumentError(f"{given}; accepted: k >= 1, 0 <= r <= 1, queries 'last' or 'all'")

    def bind(self, model: Any) -> VisualTokenPolicy:
        if self.k >= model.shape.num_layers:
            raise InvalidArgumentError(f"FastV k is {self.k}; accepted: 1 to {model.shape.num_layers - 1}")
        return self

    def layers(self, num_layers: int) -> set[int]:
        return {self.k - 1}

    def decide(self, state: LayerState) -> Decision:
        pack, cu = state.pack, state.pack.lengths.cu
        if self.queries == "all":
            scores = ops.token_score(state.q, state.k, cu, cu, state.scale)
        else:
            one_each = torch.arange(len(cu), dtype=torch.int32, device=cu.device)
            scores = ops.token_score(state.q[pack.last_rows], state.k, one_each, cu, state.scale)
        visual = scores[pack.visual_rows].split(pack.n_visual)
        return [s.topk(len(s) - int(len(s) * self.r)).indices.sort().values for s in visual]
