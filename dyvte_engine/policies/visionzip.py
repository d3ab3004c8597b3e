"""VisionZip (CVPR 2025): the tower's most attended tokens, and a few merged from the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_whole
from ..errors import InvalidArgumentError
from .base import VisualTokenPolicy
from .sums import add_rows

if TYPE_CHECKING:
    from ..models.vision import VisionTower
    from ..models.vision_run import VisionRun

_QUERIES = 64  # rows of the attention map that exist at a time in towers without class token


@dataclass(frozen=True)
class VisionZip(VisualTokenPolicy):
    """Each picture enters the projector as `dominant` tokens of the tower's output and `contextual` merged ones.

    Dominant are the tokens with the most attention, summed over heads, from the class token in the block whose output
    is used. Of the rest, every (rest // contextual)-th becomes a contextual token; each other one joins the contextual
    token with the most similar key (cosine, averaged over heads). Dominant tokens come first, each group in order.

    Settled from the authors' code: the class token itself is one of the `dominant` (54 are it and 53 patches), though
    the projector never met one; a contextual token is itself plus the mean of those that joined it (a sum, not an
    average); attention, keys and output are those of one block. Without class token (SigLIP) the score is the mean
    attention a token receives, as the paper says; that map is summed over a few queries at a time.
    """

    dominant: int = 54
    contextual: int = 10

    acts_in_tower = True

    def __post_init__(self) -> None:
        dominant, contextual = self.dominant, self.contextual
        if not (is_whole(dominant) and is_whole(contextual) and dominant >= 1 and contextual >= 0):
            given = f"VisionZip dominant is {dominant!r}, contextual {contextual!r}"
            raise InvalidArgumentError(f"{given}; accepted: whole numbers, at least 1 and at least 0")

    def bind(self, model: Any) -> VisualTokenPolicy:
        most = model.vision.tokens
        if self.dominant + self.contextual > most:
            given = f"VisionZip keeps {self.dominant} + {self.contextual} tokens"
            raise InvalidArgumentError(f"{given}; accepted: together at most the tower's {most}")
        return self

    def in_tower(self, tower: VisionTower, run: VisionRun) -> None:
        block = tower.blocks[tower.used - 1]
        attention = block.self_attn
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(out: Any) -> None:
                seen[name] = out[0] if isinstance(out, tuple) else out

            return hook

        def zipped(args: Any, kwargs: dict[str, Any]) -> Any:
            q, k = (seen[name].unflatten(-1, (attention.num_heads, -1)) for name in ("q", "k"))
            return (self.zip(seen["out"], q, k, attention.scale, tower.cls),), kwargs

        for name, module in (("q", attention.q_proj), ("k", attention.k_proj), ("out", block)):
            run.after(module, keep(name))
        run.before(tower.projector, zipped)

    def zip(self, x: Tensor, q: Tensor, k: Tensor, scale: float, cls: int) -> Tensor:
        """Tower output x [P, N, d] with the q, k [P, N, H, D] of its block -> [P, dominant + contextual, d]."""
        rows = self.select(q, k, scale, cls)
        left = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, rows, False)
        rest = torch.nonzero_static(left, size=left.shape[0] * (left.shape[1] - rows.shape[1]))[:, 1]
        rest = rest.view(len(x), -1)  # [P, R]
        dominant = _rows(x, rows)
        if self.contextual == 0:
            return dominant
        return torch.cat((dominant, self._context(_rows(x, rest), _rows(k.mean(dim=2), rest))), dim=1)

    def select(self, q: Tensor, k: Tensor, scale: float, cls: int) -> Tensor:
        """int64 [P, dominant], ascending rows of the dominant tokens."""
        if not cls:
            return _attention_received(q, k, scale).topk(self.dominant).indices.sort(dim=-1).values
        logits = torch.einsum("phd,pnhd->phn", q[:, 0].float(), k.float()) * scale
        score = logits.softmax(dim=-1).sum(dim=1)[:, 1:]
        patches = score.topk(self.dominant - 1).indices.sort(dim=-1).values + 1
        return F.pad(patches, (1, 0))

    def _context(self, x: Tensor, keys: Tensor) -> Tensor:
        """The rest, x [P, R, d] with keys [P, R, D], as [P, contextual, d]."""
        size = x.shape[1]
        targets = torch.arange(size, device=x.device)[:: max(1, size // self.contextual)][: self.contextual]
        joining = torch.ones(size, dtype=torch.bool, device=x.device).index_fill_(0, targets, False)
        others = torch.nonzero_static(joining, size=size - len(targets))[:, 0]
        unit = F.normalize(keys.float(), dim=-1)
        nearest = (unit[:, others] @ unit[:, targets].mT).argmax(dim=-1)  # [P, R - contextual]
        joined = F.pad(x[:, others].float(), (0, 1), value=1)  # the last channel counts
        sums = add_rows(joined.new_zeros(len(x), len(targets), x.shape[2] + 1), nearest, joined)
        return (x[:, targets] + sums[..., :-1] / sums[..., -1:].clamp(min=1)).to(x.dtype)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [P, N, d], rows [P, n] -> [P, n, d]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def _attention_received(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q, k [P, N, H, D] -> f32 [P, N], attention on each token, over all heads and queries."""
    total = torch.zeros(k.shape[:2], device=k.device)
    for part in q.float().split(_QUERIES, dim=1):
        logits = torch.einsum("pqhd,pnhd->phqn", part, k.float()) * scale
        total += logits.softmax(dim=-1).sum(dim=(1, 2))
    return total
