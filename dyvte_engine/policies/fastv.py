"""FastV (ECCV 2024): after the layer before K, the visual tokens with the least attention leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import is_real, is_whole
from ..errors import InvalidArgumentError
from .base import Decision, LayerState, VisualTokenPolicy, highest, visual_attention


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
        numbers = is_whole(self.k) and self.k >= 1 and is_real(self.r) and 0 <= self.r <= 1
        if not (numbers and isinstance(self.queries, str) and self.queries in ("last", "all")):
            given = f"FastV k={self.k!r}, r={self.r!r}, queries={self.queries!r}"
            raise InvalidArgumentError(f"{given}; accepted: a whole k >= 1, 0 <= r <= 1, queries 'last' or 'all'")

    def bind(self, model: Any) -> VisualTokenPolicy:
        if self.k >= model.shape.num_layers:
            raise InvalidArgumentError(f"FastV k is {self.k}; accepted: 1 to {model.shape.num_layers - 1}")
        return self

    def layers(self, num_layers: int) -> set[int]:
        return {self.k - 1}

    def most(self, visual: int, num_layers: int) -> list[int]:
        return [visual if layer < self.k else self._staying(visual) for layer in range(num_layers)]

    def _staying(self, visual: int) -> int:
        return visual - int(visual * self.r)

    def decide(self, state: LayerState) -> Decision:
        rows = state.rows
        if self.queries == "all":
            visual = visual_attention(rows, state.q, state.k, state.scale, rows.lengths.cu)
        else:
            visual = visual_attention(rows, state.q[rows.last_rows], state.k, state.scale)
        return [highest(s, self._staying(len(s))) for s in visual]
