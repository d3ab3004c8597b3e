"""Plain torch twins of `torch.ops.dyvte.*`: what each op computes, written to be read. Arguments as in `ops.py`.

They loop over sequences in Python, read index tensors on the host, and round where the kernels round: pooled states,
scores and sums stay in float32. Slow, and used by tests, the doctor and readers only.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def _state_rows(states: int, visual: Tensor, begin: int, end: int) -> list[Tensor]:
    """The row numbers behind each requested state, in the order mean visual, last visual, mean text, last text."""
    text = torch.arange(begin, end)
    rows = [visual, visual[-1:], text[:-1] if len(text) > 1 else text, text[-1:]]
    return [r for bit, r in enumerate(rows) if states >> bit & 1]


def exit_head_ref(
    hidden: Tensor,
    text_ranges: Tensor,
    visual_rows: Tensor | None,
    visual_cu: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    states: int = 12,
    threshold: float = 0.5,
    rms_eps: float | None = None,
    b1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    p_exit = torch.zeros(len(text_ranges), dtype=torch.float32, device=hidden.device)
    none = torch.empty(0, dtype=torch.int32)
    for b, (begin, end) in enumerate(text_ranges.tolist()):
        visual = none if visual_rows is None or visual_cu is None else visual_rows[visual_cu[b] : visual_cu[b + 1]]
        rows = _state_rows(states, visual, begin, end)
        if any(len(r) == 0 for r in rows):
            continue
        pooled = torch.stack([hidden[r.to(hidden.device).long()].float().mean(0) for r in rows])  # [n_states, d]
        if rms_eps is not None:
            pooled = pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + rms_eps)
        inner = w1.float() @ pooled.flatten()
        logits = w2.float() @ F.gelu(inner if b1 is None else inner + b1.float())
        p_exit[b] = logits.softmax(-1)[1]
    return p_exit, p_exit > threshold


def _slots(block_table: Tensor, page: int, rows: Tensor) -> Tensor:
    """Row numbers of one sequence -> row numbers in the pool seen as [P * page, ...]; block_table [M]."""
    rows = rows.long()
    return block_table.long()[rows // page] * page + rows % page


def kv_compact_ref(
    k_pool: Tensor, v_pool: Tensor, block_table: Tensor, lens: Tensor, keep: Tensor, keep_cu: Tensor
) -> None:
    page, flat_lens, cu = k_pool.shape[1], lens.view(-1), keep_cu.tolist()
    for slot, table in enumerate(block_table.flatten(0, 1)):
        rows = keep[cu[slot] : cu[slot + 1]]
        source = _slots(table, page, rows)
        target = _slots(table, page, torch.arange(len(rows), device=rows.device))
        for pool in (k_pool.flatten(0, 1), v_pool.flatten(0, 1)):
            pool[target] = pool[source]
        flat_lens[slot] = len(rows)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x [N, H, D] in place at cos, sin [N, rot_dim / 2]."""
    half = cos.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos[:, None], sin[:, None]
    x[..., : 2 * half] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_append_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lens: Tensor,
) -> None:
    cos, sin = cos_sin[positions.long()].chunk(2, dim=-1)
    _rotate(q, cos, sin)
    _rotate(k, cos, sin)
    cu = cu_seqlens.tolist()
    for b, table in enumerate(block_table):
        rows = slice(cu[b], cu[b + 1])
        at = _slots(table, k_pool.shape[1], lens[b] + torch.arange(cu[b + 1] - cu[b], device=q.device))
        k_pool.flatten(0, 1)[at] = k[rows]
        v_pool.flatten(0, 1)[at] = v[rows]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [n, Hq, D], k [m, Hkv, D] -> float32 [Hq, n, m]."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("nhd,mhd->hnm", q.float(), k) * scale


def token_score_ref(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float) -> Tensor:
    out = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    cq, ck = cu_q.tolist(), cu_k.tolist()
    for b in range(len(cq) - 1):
        (q0, q1), (k0, k1) = cq[b : b + 2], ck[b : b + 2]
        if q0 == q1 or k0 == k1:
            continue
        s = _scores(q[q0:q1], k[k0:k1], scale)
        hidden = torch.ones(s.shape[1:], dtype=torch.bool, device=s.device).triu(k1 - k0 - (q1 - q0) + 1)
        p = s.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)  # a row that sees no key scores nothing
        out[k0:k1] = p.mean((0, 1))
    return out


def decode_attention_ref(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    arrived: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, n in enumerate(kv_lens.tolist()):
        if n == 0:
            continue
        at = _slots(block_table[b], k_pool.shape[1], torch.arange(n, device=q.device))
        k, v = k_pool.flatten(0, 1)[at], v_pool.flatten(0, 1)[at].float()  # [n, Hkv, D]
        p = _scores(q[b : b + 1], k, scale).softmax(-1)[:, 0]  # [Hq, n]
        out[b] = torch.einsum("hn,nhd->hd", p, v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)).to(q.dtype)
    return out


def rope_append_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    arrived: Tensor,
) -> Tensor:
    q, k, cu = q.clone(), k.clone(), torch.arange(len(q) + 1)
    rope_append_ref(q, k, v, cos_sin, positions, cu, k_pool, v_pool, block_table, lens)
    return decode_attention_ref(q, k_pool, v_pool, block_table, lens + 1, scale)


def varlen_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, causal: bool = True
) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    cu = cu_seqlens.tolist()
    for begin, end in pairwise(cu):
        s = _scores(q[begin:end], k[begin:end], scale)  # [Hq, n, n]
        if causal:
            s = s.masked_fill(torch.ones(s.shape[1:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
        values = v[begin:end].float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[begin:end] = torch.einsum("hnm,mhd->nhd", s.softmax(-1), values).to(q.dtype)
    return out


def paged_attention_ref(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    before: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        seen = int(before[b]) + end - begin
        pages = block_table[b, : -(-seen // k_pool.shape[1])].long()
        k, v = (pool[pages].flatten(0, 1)[:seen] for pool in (k_pool, v_pool))
        s = _scores(q[begin:end], k, scale)  # [Hq, n, m]
        later = torch.ones(s.shape[1:], dtype=torch.bool, device=s.device).triu(1 + int(before[b]))
        values = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        weights = s.masked_fill(later, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)
    return out


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


def add_rms_norm_ref(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm_ref(residual, weight, eps)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _product(x, weight, bias).to(x.dtype)


def _rows_of(panels: Tensor) -> Tensor:
    """[panels * 64, k, or one more]."""
    if panels.dim() == 4:  # two elements of each column together
        panels = panels.transpose(2, 3).flatten(1, 2)
    return panels.transpose(1, 2).flatten(0, 1)


def packed_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return linear_ref(x, _rows_of(weight)[:n, : x.shape[1]], bias)


def packed_silu_mul_ref(x: Tensor, weight: Tensor, n: int) -> Tensor:
    both = _product(x, _rows_of(weight)[:, : x.shape[1]], None).unflatten(1, (-1, 2, 32))
    gate, up = both.transpose(1, 2).flatten(2)[:, :, :n].unbind(1)
    return (F.silu(gate) * up).to(x.dtype)


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def add_layer_norm_ref(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x + y, layer_norm_ref(x + y, weight, bias, eps)


def quick_gelu_ref(x: Tensor) -> Tensor:
    return x.copy_(x.float() * torch.sigmoid(1.702 * x.float()))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, unrounded."""
    out = x.float() @ weight.float().T
    return out if bias is None else out + bias.float()


def norm_gate_up_ref(hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    gate, up = _product(rms_norm_ref(hidden, norm, eps), weight, bias).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(hidden.dtype)


def norm_linear_ref(hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _product(rms_norm_ref(hidden, norm, eps), weight, bias)


def add_linear_ref(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    residual.copy_(residual.float() + _product(x, weight, bias))


def norm_qkv_append_ref(
    hidden: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lens: Tensor,
) -> Tensor:
    page, heads, dim = k_pool.shape[1:]
    qkv = _product(rms_norm_ref(hidden, norm, eps), weight, bias).unflatten(1, (-1, dim))
    q, k, v = qkv.split((qkv.shape[1] - 2 * heads, heads, heads), dim=1)
    cos, sin = cos_sin[positions.long()].chunk(2, dim=-1)
    _rotate(q, cos, sin)
    _rotate(k, cos, sin)
    at = block_table.long().gather(1, (lens // page).long()[:, None])[:, 0] * page + lens % page
    k_pool.flatten(0, 1)[at] = k.to(k_pool.dtype)
    v_pool.flatten(0, 1)[at] = v.to(v_pool.dtype)
    return q.to(hidden.dtype)
