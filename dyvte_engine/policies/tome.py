"""ToMe (ICLR 2023) as used with multimodal models: similar patches merge inside the vision tower."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_real
from ..errors import InvalidArgumentError
from .base import VisualTokenPolicy
from .sums import add_rows

if TYPE_CHECKING:
    from ..models.vision import VisionTower
    from ..models.vision_run import VisionRun


@dataclass(frozen=True)
class ToMe(VisualTokenPolicy):
    """`keep` of the patches reach the language model; the others merge, as many in each block of the tower as in any.

    Between attention and MLP of a block the tokens are split alternately into two sets; each of the first is paired
    with the most similar of the second (cosine of the keys, averaged over heads), and the r closest pairs merge into
    their average, weighted by how many patches a token holds. That number's log is added to the attention
    logits (proportional attention, a mask of one row: attention stays fused). The class token never merges.

    Settled from the authors' code: the matching, its sets, keys before merging, order inside the tower (unmerged
    tokens of the first set, then the second set). Different: r differs by at most one between blocks so that exactly
    the share asked stays; unmerged tokens stay in order in towers without a class token too (theirs are then sorted
    by similarity); and since a language model reads an order, the tokens leave the tower by the mean raster position
    of their patches.
    """

    keep: float = 0.5
    tower_merges: tuple[int, ...] = field(default=(), repr=False)  # set by bind: r of each block

    acts_in_tower = True

    def __post_init__(self) -> None:
        if not (is_real(self.keep) and 0 < self.keep <= 1):
            raise InvalidArgumentError(f"ToMe keep is {self.keep!r}; accepted: above 0 up to 1")

    @property
    def tower_key(self) -> Hashable:
        return ToMe, self.tower_merges

    def bind(self, model: Any) -> ToMe:
        tower = model.vision
        leave = tower.tokens - max(round(self.keep * tower.tokens), 1)
        ends = [leave * (block + 1) // tower.used for block in range(tower.used)]
        merges = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        if any(2 * r > tower.tokens - sum(merges[:block]) for block, r in enumerate(merges)):
            least = 1 / (tower.used + 1)  # where the last block halves what is left
            raise InvalidArgumentError(f"ToMe keep is {self.keep!r}; accepted in this tower: {least:.3f} to 1")
        return replace(self, tower_merges=merges)

    def in_tower(self, tower: VisionTower, run: VisionRun) -> None:
        merged = _Merged(tower.cls)
        for number, (block, r) in enumerate(zip(tower.blocks, self.tower_merges, strict=False)):
            _merge_in(run, block, r, merged, last=number == tower.used - 1)
        for block in tower.blocks[tower.used :]:  # computed by HF's code, used by nobody
            _merge_in(run, block, 0, merged, last=False)


class _Merged:
    """What the tokens of all pictures hold: `size` f32 [P, N] patches, `place` f32 [P, N] their mean index.

    From the first merge to the last block whose output is used; the tower's next call begins anew.
    """

    def __init__(self, cls: int):
        self.cls = cls
        self.size: Tensor | None = None  # as long as nothing has merged
        self.place = torch.empty(0)

    def merge(self, x: Tensor, keys: Tensor, r: int) -> Tensor:
        """x [P, N, d] with keys [P, N, D] -> [P, N - r, d]."""
        if self.size is None:
            self.size = torch.ones(x.shape[:2], device=x.device)
            self.place = torch.arange(x.shape[1], device=x.device).float().expand_as(self.size)
        stay, pairs = match(keys, r, self.cls)
        weight = self.size[..., None]
        sums = merge_rows(torch.cat((x * weight, self.place[..., None] * weight, weight), dim=-1), stay, pairs)
        self.size = sums[..., -1]
        means = sums[..., :-1] / sums[..., -1:]
        self.place = means[..., -1]
        return means[..., :-1].to(x.dtype)

    def finish(self, x: Tensor) -> Tensor:
        """x [P, N, d] by place."""
        if self.size is None:
            return x
        order = self.place.argsort(dim=-1, stable=True)
        self.size = None
        return x.gather(1, order[..., None].expand_as(x))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """log size as an attention mask [P, 1, 1, N]."""
        return None if self.size is None else self.size.log()[:, None, None].to(dtype)


def match(keys: Tensor, r: int, cls: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """keys [P, N, D] -> rows of the first set (0, 2, ...) that stay [P, a - r], and the pairs that merge.

    Pairs are numbers [P, r] in the first set and of their partners in the second (1, 3, ...).
    """
    unit = F.normalize(keys.float(), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT
    if cls:
        similarity[:, 0] = -torch.inf
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merging = order[:, :r]
    return order[:, r:].sort(dim=-1).values, (merging, partner.gather(1, merging))


def merge_rows(x: Tensor, stay: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """x [P, N, c] -> [P, N - r, c]: what stays of the first set, then the second with its partners added."""
    first, second = x[:, ::2], x[:, 1::2]
    width = x.shape[-1]
    unmerged, merging = (first.gather(1, rows[..., None].expand(-1, -1, width)) for rows in (stay, pairs[0]))
    return torch.cat((unmerged, add_rows(second, pairs[1], merging)), dim=1)


def _merge_in(run: VisionRun, block: Any, r: int, merged: _Merged, last: bool) -> None:
    """In this run, `block` merges r pairs of tokens after its attention.

    The attention half runs here; the block's own forward then finds an attention that adds nothing, so that what
    remains of it (second norm, MLP, residual, return type) is HF's code on the shorter rows.
    """
    attention, whole = block.self_attn.forward, block.forward
    keys: list[Tensor] = []

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = block.layer_norm1(hidden_states)
        x = hidden_states + attention(hidden_states=normed, attention_mask=merged.bias(normed.dtype))[0]
        key = keys.pop().unflatten(-1, (block.self_attn.num_heads, -1)).mean(dim=-2)
        if r > 0:
            x = merged.merge(x, key, r)
        if last:
            x = merged.finish(x)
        return whole(x, *args, **kwargs)

    def nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None

    run.after(block.self_attn.k_proj, keys.append)
    run.replace(block, forward)
    run.replace(block.self_attn, nothing)
