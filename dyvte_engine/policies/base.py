"""What a policy is: the layers after which the loop must ask, and which visual tokens stay then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..segments import Pack

Decision = Sequence[
    Tensor | None
]  # per sequence: None (all stay) or ascending int64 numbers of the visual rows that stay


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a policy may look at after layer `layer` of `num_layers`.

    hidden [N, d] is the residual stream leaving the layer; q [N, Hq, D] and k [N, Hkv, D] are the layer's rotated
    queries and keys; scale multiplies q k^T.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    q: Tensor
    k: Tensor
    scale: float
    pack: Pack


class VisualTokenPolicy:
    """Base of all policies. Subclasses are dataclasses that override `layers` and `decide`."""

    def bind(self, model: Any) -> VisualTokenPolicy:
        """This policy, ready to run on `model` (a `VisionLanguageModel`); a typed error if it cannot."""
        return self

    def layers(self, num_layers: int) -> set[int]:
        """Layers after which `decide` is called (0-based; "after l" means layers 0..l see what leaves)."""
        return set()

    def decide(self, state: LayerState) -> Decision:
        """Which visual tokens stay from here on, for each sequence."""
        raise NotImplementedError
