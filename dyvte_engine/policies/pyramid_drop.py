"""PyramidDrop (CVPR 2025): visual tokens leave in stages, ranked by what the next layer is going to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import is_real
from ..errors import InvalidArgumentError
from ..kernels import ops
from .base import Decision, LayerState, VisualTokenPolicy, highest, visual_attention


@dataclass(frozen=True)
class PyramidDrop(VisualTokenPolicy):
    """Entering the layers L/4, L/2 and 3L/4, keep `keep` of the visual tokens that entered the language model.

    The score is the attention of the last prompt token over all rows, averaged over heads, with the q/k projections of
    the layer about to run. int(keep * V) tokens stay in each sequence, over all its pictures, in their order.

    Settled from the authors' code: the ranking query is the last token of the prompt, the shares are of the original
    V, the stages are after L/4, L/2, 3L/4 layers. There every stage is numbered anew from 0, and a decoded token has
    another position in every stage: `renumber=True`. By default positions are kept, as in docs/method.md section 2. A
    sequence that another policy has brought below the share is left alone.
    """

    keep: tuple[float, float, float] = (0.5, 0.25, 0.125)
    renumber: bool = False

    def __post_init__(self) -> None:
        shares = self.keep if isinstance(self.keep, tuple) and len(self.keep) == 3 else (None,)
        if not (all(map(is_real, shares)) and 1 >= shares[0] >= shares[1] >= shares[2] >= 0):
            raise InvalidArgumentError(f"PyramidDrop keep is {self.keep!r}; accepted: three falling shares, 1 to 0")
        if not isinstance(self.renumber, bool):
            raise InvalidArgumentError(f"PyramidDrop renumber is {self.renumber!r}; accepted: True, False")

    def bind(self, model: Any) -> VisualTokenPolicy:
        if model.shape.num_layers < 4:
            raise InvalidArgumentError(f"PyramidDrop needs 4 layers; the model has {model.shape.num_layers}")
        return self

    def layers(self, num_layers: int) -> set[int]:
        return set(_stages(num_layers))

    def decide(self, state: LayerState) -> Decision:
        rows, decoder = state.rows, state.decoder
        share = self.keep[_stages(state.num_layers).index(state.layer)]
        following = decoder.layers[state.layer + 1]
        x = ops.rms_norm(state.hidden, following.input_norm, decoder.eps)
        q, k = following.project_qk(x, rows.last_rows)
        table, at = rows.rotation_table(decoder.cos_sin)
        q, k = decoder.rotate(q, table[at[rows.last_rows]]), decoder.rotate(k, table[at])
        visual = visual_attention(rows, q, k, state.scale)
        return [highest(s, int(n * share)) for n, s in zip(rows.n_entered, visual, strict=True)]

    def renumbers(self, layer: int, num_layers: int) -> bool:
        return self.renumber


def _stages(num_layers: int) -> list[int]:
    """The layers after which tokens leave."""
    return [num_layers * quarter // 4 - 1 for quarter in (1, 2, 3)]
