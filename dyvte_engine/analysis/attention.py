"""Attention and entropy statistics of every layer (docs/method.md section 7), without any n x n map.

The softmax rows of a few queries exist at a time, in fp32, and are reduced at once: memory grows with the sequence, not
with its square. What is measured are the rows that each layer really computed, so exits are seen too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..eval.lines import LineFile
from ..eval.task import Sample
from ..models.rows import Rows
from ..policies import FixedExit, KeepAll, VisualTokenPolicy

if TYPE_CHECKING:
    from ..engine import Engine

BLOCK_ELEMENTS = 1 << 22  # attention probabilities that exist at a time: 16 MB in fp32
KEYS = ("text", "visual", "all")
WEIGHTS = ("w_visual", "w_cross", "w_text")
# Of one layer and sequence: the three weights, then for each set of keys the entropy in the paper's reading, then the
# normalised one of each head. NaN where there are no such rows.
FIELDS = (*WEIGHTS, *(f"paper_{k}" for k in KEYS), *(f"head_{k}" for k in KEYS))


def attention_rows(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Iterator[Tensor]:
    """Causal softmax of the given query rows, block after block: f32 [Hkv, b, Hq / Hkv, m], over columns 0..m-1.

    q [n, Hq, D] and k [n, Hkv, D], rotated; rows int64, ascending. A block holds at most BLOCK_ELEMENTS (one row if a
    single one has more); its last row is number m - 1.
    """
    n, kv_heads, width = k.shape
    keys = k.float().transpose(0, 1)  # [Hkv, n, D]
    columns = torch.arange(n, device=k.device)
    for block in rows.split(max(1, BLOCK_ELEMENTS // (n * q.shape[1]))) if len(rows) else ():
        m, size = int(block[-1]) + 1, len(block)
        queries = q[block].float().view(size, kv_heads, -1, width).transpose(0, 1).reshape(kv_heads, -1, width)
        logits = torch.bmm(queries, keys[:, :m].mT).view(kv_heads, size, -1, m).mul_(scale)
        logits.masked_fill_((columns[:m] > block[:, None])[None, :, None], -torch.inf)
        yield logits.sub_(logits.amax(-1, keepdim=True)).exp_().div_(logits.sum(-1, keepdim=True))


def layer_statistics(q: Tensor, k: Tensor, visual: Tensor, n_tail: int, scale: float) -> Tensor:
    """f64 [FIELDS] of one sequence in one layer. With A the maximum over heads of the attention map:

    - w_visual = sum A[V, V] / |V|, w_cross = sum A[T, V] / |T|, w_text = sum A[T, T] / |T|;
    - paper_K = -sum_j A_ij ln A_ij over the keys K, mean over the rows i in T. The paper gives no formula; its values
      exceed what a distribution over so many keys can have, so A is taken as it is, not normalised;
    - head_K = the entropy in nats of each head's own attention renormalised over the keys K, mean over heads and T.

    q [n, Hq, D], k [n, Hkv, D]: the rows of the sequence in this layer. V: bool [n] `visual`; T: the last `n_tail`
    rows. Keys "all" are every row there is, the system prompt included; other text between pictures is in "all" alone.
    """
    n = len(k)
    text, nothing = torch.arange(n - n_tail, n, device=k.device), float("nan")
    seen = visual.nonzero()[:, 0]
    inner = sum(float(p.amax((0, 2))[:, visual[: p.shape[-1]]].sum()) for p in attention_rows(q, k, seen, scale))
    total = torch.zeros(len(FIELDS), dtype=torch.float64)
    for p in attention_rows(q, k, text, scale):
        top, m = p.amax((0, 2)), p.shape[-1]  # [b, m]
        sets: dict[str, Any] = {"text": slice(n - n_tail, m), "visual": visual[:m], "all": slice(0, m)}
        sums = [top[:, sets[name]].sum() for name in ("visual", "text")]
        paper = [torch.special.entr(top[:, keys]).sum() for keys in sets.values()]
        heads = [_entropy(p[..., keys]).sum() / (p.shape[0] * p.shape[2]) for keys in sets.values()]
        total += torch.stack((sums[0].new_zeros(()), *sums, *paper, *heads)).double().cpu() / n_tail
    total[0] = inner / len(seen) if len(seen) else nothing
    if not len(seen):
        total[[FIELDS.index("paper_visual"), FIELDS.index("head_visual")]] = nothing
    return total


def _entropy(p: Tensor) -> Tensor:
    """p [..., m], not negative -> entropy [...] in nats of p / sum p; 0 where all of it is 0."""
    mass = p.sum(-1)
    safe = mass.clamp_min(torch.finfo(p.dtype).tiny)
    return torch.where(mass > 0, safe.log() + torch.special.entr(p).sum(-1) / safe, 0.0)


class AttentionWatch:
    """What `Engine.prefill_prepared` calls in every layer; `table` f64 [B, L, FIELDS] afterwards."""

    def __init__(self, scale: float):
        self.scale = scale
        self._layers: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, rows: Rows) -> None:
        start, found = 0, []
        for n, tail in zip(rows.lengths.host, rows.n_tail, strict=True):
            here = slice(start, start + n)
            found.append(layer_statistics(q[here], k[here], rows.visual[here], tail, self.scale))
            start += n
        self._layers.append(torch.stack(found))

    @property
    def table(self) -> np.ndarray:
        return torch.stack(self._layers, dim=1).numpy()


def measure(
    engine: Engine,
    samples: Sequence[Sample],
    exit_layer: int | None = None,
    file: LineFile | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """f64 [N, L, FIELDS]: the statistics of each sample's prefill, in order.

    `exit_layer`: all visual tokens leave after it (-1: before layer 0); None: none ever leave. What `file` already
    holds is not computed again.
    """
    name = "none" if exit_layer is None else str(exit_layer)
    entries = [] if file is None else [e for e in file.entries if e["exit"] == name]
    known = {e["key"]: np.array(e["values"], float) for e in entries}
    waiting, size = [s for s in samples if s.key not in known], engine.config.max_batch
    progress(len(samples) - len(waiting))
    policy = KeepAll() if exit_layer is None else FixedExit(exit_layer)
    for start in range(0, len(waiting), size):
        chosen = waiting[start : start + size]
        tables = _tables(engine, chosen, policy)
        known.update(zip([s.key for s in chosen], tables, strict=True))
        if file is not None:
            file.add({"exit": name, "key": s.key, "values": _plain(t)} for s, t in zip(chosen, tables, strict=True))
        progress(len(chosen))
    return np.stack([known[s.key] for s in samples])


def _plain(table: np.ndarray) -> list[Any]:
    """For JSON: NaN as None."""
    plain = table.astype(object)
    plain[np.isnan(table)] = None
    return plain.tolist()


def _tables(engine: Engine, samples: Sequence[Sample], policy: VisualTokenPolicy) -> np.ndarray:
    watch = AttentionWatch(engine.model.decoder.scale)
    prompts = engine.prepare([s.prompt for s in samples], [s.picture for s in samples], policy=policy)
    engine.prefill_prepared(prompts, policy, watch).close()
    return watch.table.round(7)  # as a file keeps it: a continued run ends in the same bytes
