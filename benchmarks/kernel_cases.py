"""What `benchmarks.kernels` times: each operation in this project's form and as plain torch, at published sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.kernels import ops
from dyvte_engine.models.fused import MOST_ROWS
from dyvte_engine.models.linear import packing_fault


@dataclass(frozen=True)
class Sizes:
    """A decoder layer and a prompt: text tokens, visual tokens, batch."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    head_hidden: int
    text: int
    visual: int

    @property
    def rows(self) -> int:
        return self.text + self.visual


SIZES = {
    "nano": Sizes(256, 4, 2, 64, 640, 128, 24, 144),
    "llava-200m": Sizes(1024, 16, 16, 64, 2816, 512, 64, 576),
    "llava-1.5-7b": Sizes(4096, 32, 32, 128, 11008, 2048, 64, 576),
    "llava-1.5-13b": Sizes(5120, 40, 40, 128, 13824, 2048, 64, 576),
    "llava-next-7b": Sizes(4096, 32, 32, 128, 11008, 2048, 64, 2880),
    "qwen2.5-vl-7b": Sizes(3584, 28, 4, 128, 18944, 2048, 64, 1296),  # a picture of 1008 x 1008 pixels
}


@dataclass(frozen=True)
class Case:
    """Two forms of one operation, and what any form must do: bytes to move, and where they count, FLOPs.

    `packed`: a third, with a weight that was brought into oneDNN's layout before. `plain` false: the second is made of
    our kernels too, which torch.compile leaves as they are.
    """

    ours: Callable[[], Any]
    torch_form: Callable[[], Any]
    bytes: int
    flops: float = 0.0
    packed: Callable[[], Any] | None = None
    plain: bool = True


class TooLarge(Exception):
    """The tensors of a case need more memory than the benchmark was given, or a kernel takes fewer rows."""


@dataclass(eq=False)
class Inputs:
    """Tensors of one size, shared by the cases; raises `TooLarge` beyond `budget` bytes of one case."""

    s: Sizes
    batch: int
    dtype: torch.dtype
    device: torch.device
    budget: float = float("inf")

    def randn(self, *shape: int) -> Tensor:
        self.budget -= math.prod(shape) * self.dtype.itemsize
        if self.budget < 0:
            raise TooLarge(f"{math.prod(shape) * self.dtype.itemsize / 2**30:.1f} GiB in one tensor")
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def ints(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)


PAGE = 16


def _cache(i: Inputs, rows: int, layers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """k_pool, v_pool and a shuffled block table int32 [layers, batch, pages] with room for `rows` rows."""
    pages = -(-rows // PAGE)
    order = torch.randperm(layers * i.batch * pages, generator=torch.Generator().manual_seed(0))
    table = i.ints(order.view(layers, i.batch, pages))
    pool = (layers * i.batch * pages, PAGE, i.s.kv_heads, i.s.head_dim)
    return i.randn(*pool), i.randn(*pool), table


def exit_head(i: Inputs) -> Case:
    s = i.s
    hidden = i.randn(i.batch * s.rows, s.hidden)
    w1, w2 = i.randn(s.head_hidden, 2 * s.hidden) * 0.02, i.randn(2, s.head_hidden)
    ends = torch.arange(1, i.batch + 1) * s.rows
    ranges = i.ints(torch.stack((ends - s.text, ends), 1))

    def torch_form() -> Tensor:
        text = hidden.view(i.batch, s.rows, -1)[:, -s.text :]
        pooled = torch.cat((text[:, :-1].mean(1), text[:, -1]), -1)
        return F.linear(F.gelu(F.linear(pooled, w1)), w2).float().softmax(-1)[:, 1] > 0.5

    moved = w1.nbytes + w2.nbytes + i.batch * s.text * s.hidden * hidden.itemsize
    return Case(lambda: ops.exit_head(hidden, ranges, None, None, w1, w2), torch_form, moved)


def kv_compact(i: Inputs) -> Case:
    """Eight layers, the visual rows leave: text after them moves to the front."""
    s, layers = i.s, 8
    k, v, table = _cache(i, s.rows, layers)
    full = torch.full((layers, i.batch), s.rows, dtype=torch.int32, device=i.device)
    lens = full.clone()
    first = min(8, s.text)  # the system prompt stays where it is
    kept = i.ints([*range(first), *range(first + s.visual, s.rows)])
    keep, cu = kept.repeat(layers * i.batch), i.ints(torch.arange(layers * i.batch + 1) * len(kept))
    index = kept.long()

    def ours() -> None:
        lens.copy_(full)
        ops.kv_compact_(k, v, table, lens, keep, cu)

    def torch_form() -> None:
        for pool in (k, v):
            rows = pool[table.long()].flatten(2, 3)[:, :, index]  # gathered copy [L, B, kept, Hkv, D]
            new = torch.zeros(*table.shape, PAGE, *rows.shape[3:], dtype=pool.dtype, device=pool.device)
            new.flatten(2, 3)[:, :, : len(index)] = rows
            pages = -(-len(index) // PAGE)
            pool[table[:, :, :pages].long()] = new[:, :, :pages]

    row = s.kv_heads * s.head_dim * k.itemsize
    return Case(ours, torch_form, 2 * 2 * layers * i.batch * (len(kept) - first) * row)


def _rope(i: Inputs, rows: int) -> Case:
    s, n = i.s, i.batch * rows
    qkv = i.randn(n, s.heads + 2 * s.kv_heads, s.head_dim)
    q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
    table_cs = torch.randn(4096, s.head_dim, device=i.device)
    k_pool, v_pool, table = _cache(i, s.rows + 1)
    lens = i.ints([s.rows - rows + 1] * i.batch)
    cu, positions = i.ints(torch.arange(i.batch + 1) * rows), i.ints(torch.arange(rows).repeat(i.batch))
    spots = (lens[:, None] + torch.arange(rows, device=i.device)).long()
    page, slot = table[0].long().gather(1, spots // PAGE).flatten(), (spots % PAGE).flatten()

    def torch_form() -> None:
        half = s.head_dim // 2
        cs = table_cs[positions.long()]
        cos, sin = (torch.cat((t, t), -1)[:, None].to(i.dtype) for t in (cs[:, :half], cs[:, half:]))
        for t in (q, k):
            t.copy_(t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin)
        k_pool[page, slot] = k
        v_pool[page, slot] = v

    def ours() -> None:
        ops.rope_append_(q, k, v, table_cs, positions, cu, k_pool, v_pool, table[0], lens)

    item = qkv.itemsize * s.head_dim * n
    return Case(ours, torch_form, item * (2 * s.heads + 5 * s.kv_heads))


def rope_append_prefill(i: Inputs) -> Case:
    return _rope(i, i.s.rows)


def rope_append_decode(i: Inputs) -> Case:
    return _rope(i, 1)


def token_score(i: Inputs) -> Case:
    s = i.s
    q, k = i.randn(i.batch, s.heads, s.head_dim), i.randn(i.batch * s.rows, s.kv_heads, s.head_dim)
    cu_q, cu_k = i.ints(torch.arange(i.batch + 1)), i.ints(torch.arange(i.batch + 1) * s.rows)
    scale = s.head_dim**-0.5

    def torch_form() -> Tensor:
        keys = k.view(i.batch, s.rows, s.kv_heads, s.head_dim).repeat_interleave(s.heads // s.kv_heads, 2)
        return (torch.einsum("bhd,bnhd->bhn", q, keys).float() * scale).softmax(-1).mean(1)

    return Case(lambda: ops.token_score(q, k, cu_q, cu_k, scale), torch_form, k.nbytes + q.nbytes + 4 * len(k))


def decode_attention(i: Inputs) -> Case:
    """Against SDPA on a contiguous cache, which has no page table to follow."""
    s = i.s
    q = i.randn(i.batch, s.heads, s.head_dim)
    k_pool, v_pool, table = _cache(i, s.rows)
    lens, scale = i.ints([s.rows] * i.batch), s.head_dim**-0.5
    k, v = (i.randn(i.batch, s.kv_heads, s.rows, s.head_dim) for _ in range(2))

    def torch_form() -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=s.heads != s.kv_heads)

    return Case(lambda: ops.decode_attention(q, k_pool, v_pool, table[0], lens, scale), torch_form, k.nbytes + v.nbytes)


def _add_rms_norm(i: Inputs, n: int) -> Case:
    x, residual, weight = i.randn(n, i.s.hidden), i.randn(n, i.s.hidden), i.randn(i.s.hidden)

    def torch_form() -> Tensor:
        residual.add_(x)
        return F.rms_norm(residual, (i.s.hidden,), weight, 1e-6)

    return Case(lambda: ops.add_rms_norm_(residual, x, weight, 1e-6), torch_form, 4 * x.nbytes)


def add_rms_norm(i: Inputs) -> Case:
    return _add_rms_norm(i, i.batch * i.s.rows)


def add_rms_norm_decode(i: Inputs) -> Case:
    """One row of each sequence."""
    return _add_rms_norm(i, i.batch)


def silu_mul(i: Inputs) -> Case:
    x, m = i.randn(i.batch * i.s.rows, 2 * i.s.intermediate), i.s.intermediate
    return Case(lambda: ops.silu_mul(x), lambda: F.silu(x[:, :m]) * x[:, m:], x.nbytes * 3 // 2)


TOWER = (577, 1024, 4096)  # rows of a picture in CLIP-L at 336 pixels, their width, that of an MLP


def add_layer_norm(i: Inputs) -> Case:
    """In a vision tower, of the pictures of the batch."""
    rows, width, _ = TOWER
    x, y, weight, bias = i.randn(i.batch * rows, width), i.randn(i.batch * rows, width), i.randn(width), i.randn(width)

    def torch_form() -> Tensor:
        return F.layer_norm(x + y, (width,), weight, bias, 1e-5)

    return Case(lambda: ops.add_layer_norm(x, y, weight, bias, 1e-5), torch_form, 4 * x.nbytes)


def quick_gelu(i: Inputs) -> Case:
    x = i.randn(i.batch * TOWER[0], TOWER[2])
    return Case(lambda: ops.quick_gelu_(x), lambda: x * torch.sigmoid(1.702 * x), 2 * x.nbytes)


def _linear(i: Inputs, rows: int, panels: bool = False) -> Case:
    """The largest weight of a layer times so many rows. panels: of numbers that bfloat16 has."""
    x, weight = i.randn(rows, i.s.hidden), i.randn(2 * i.s.intermediate, i.s.hidden)
    packed: Callable[[], Any] | None = None
    if packing_fault(i.dtype) is None:
        layout = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        packed = functools.partial(torch.ops.mkldnn._linear_pointwise, x, layout, None, "none", [], "")
    flops, theirs = 2.0 * rows * weight.numel(), functools.partial(F.linear, x, weight)
    if panels:
        copy = ops.in_panels(weight.bfloat16().to(i.dtype))
        return Case(lambda: ops.packed_linear(x, copy, None, len(weight)), theirs, copy.nbytes, flops, packed)
    return Case(lambda: ops.linear(x, weight), theirs, weight.nbytes, flops, packed)


def linear_decode(i: Inputs) -> Case:
    """One row of each sequence."""
    return _linear(i, i.batch)


def linear_text(i: Inputs) -> Case:
    """What remains of the prompts after an exit."""
    return _linear(i, i.batch * i.s.text)


def packed_linear_decode(i: Inputs) -> Case:
    return _linear(i, i.batch, panels=True)


def packed_linear_text(i: Inputs) -> Case:
    return _linear(i, i.batch * i.s.text, panels=True)


def varlen_attention(i: Inputs) -> Case:
    """Against one SDPA call for all sequences, which have equal lengths here."""
    s = i.s
    qkv = i.randn(i.batch * s.rows, s.heads + 2 * s.kv_heads, s.head_dim)
    q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
    cu, scale = i.ints(torch.arange(i.batch + 1) * s.rows), s.head_dim**-0.5

    def torch_form() -> Tensor:
        a, b, c = (t.unflatten(0, (i.batch, s.rows)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=s.heads != s.kv_heads)

    flops = 2.0 * i.batch * s.heads * s.head_dim * s.rows * (s.rows + 1)  # half of two full products
    return Case(lambda: ops.varlen_attention(q, k, v, cu, scale), torch_form, qkv.nbytes + q.nbytes, flops)


def decode_attention_in_one(i: Inputs) -> Case:
    """Its parts combined by the last of its own blocks, against a second launch that combines them."""
    s = i.s
    q = i.randn(i.batch, s.heads, s.head_dim)
    k_pool, v_pool, table = _cache(i, s.rows)
    args = q, k_pool, v_pool, table[0], i.ints([s.rows] * i.batch), s.head_dim**-0.5
    arrived = i.ints([0] * (i.batch * s.heads))
    moved = 2 * i.batch * s.rows * s.kv_heads * s.head_dim * q.itemsize
    return Case(lambda: ops.decode_attention(*args, arrived), lambda: ops.decode_attention(*args), moved, plain=False)


def rope_append_attention(i: Inputs) -> Case:
    """A decoding step's rotation, appending and attention, against two launches, or three."""
    s = i.s
    q, k, v = i.randn(i.batch, s.heads + 2 * s.kv_heads, s.head_dim).split((s.heads, s.kv_heads, s.kv_heads), 1)
    k_pool, v_pool, table = _cache(i, s.rows)
    lens, kv_lens, scale = i.ints([s.rows - 1] * i.batch), i.ints([s.rows] * i.batch), s.head_dim**-0.5
    cos_sin, cu = torch.randn(4096, s.head_dim, device=i.device), i.ints(torch.arange(i.batch + 1))
    cache, arrived = (k_pool, v_pool, table[0]), i.ints([0] * (i.batch * s.heads))

    def usual() -> Tensor:
        ops.rope_append_(q, k, v, cos_sin, lens, cu, *cache, lens)
        return ops.decode_attention(q, *cache, kv_lens, scale)

    def ours() -> Tensor:
        return ops.rope_append_attention_(q, k, v, cos_sin, lens, *cache, lens, scale, arrived)

    return Case(ours, usual, 2 * i.batch * s.rows * s.kv_heads * s.head_dim * q.itemsize, plain=False)


def _few(i: Inputs) -> int:
    if i.batch > MOST_ROWS:
        raise TooLarge(f"for at most {MOST_ROWS} rows")
    return i.batch


# The following stand against decoding as it is: our norm, torch's product, our kernel behind it.


def norm_qkv_append(i: Inputs) -> Case:
    s, rows = i.s, _few(i)
    hidden, norm = i.randn(rows, s.hidden), i.randn(s.hidden)
    weight = i.randn((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden)
    k_pool, v_pool, table = _cache(i, s.rows + 1)
    lens, positions = i.ints([s.rows] * rows), i.ints([s.rows] * rows)
    cos_sin, cu = torch.randn(4096, s.head_dim, device=i.device), i.ints(torch.arange(rows + 1))

    def usual() -> None:
        qkv = F.linear(ops.rms_norm(hidden, norm, 1e-6), weight).view(rows, -1, s.head_dim)
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), 1)
        ops.rope_append_(q, k, v, cos_sin, positions, cu, k_pool, v_pool, table[0], lens)

    def ours() -> None:
        ops.norm_qkv_append_(hidden, norm, 1e-6, weight, None, cos_sin, positions, k_pool, v_pool, table[0], lens)

    return Case(ours, usual, weight.nbytes, 2.0 * rows * weight.numel(), plain=False)


def _add_linear(i: Inputs, width: int) -> Case:
    rows = _few(i)
    residual, x, weight = i.randn(rows, i.s.hidden), i.randn(rows, width), i.randn(i.s.hidden, width)
    norm = i.randn(i.s.hidden)

    def usual() -> None:
        ops.add_rms_norm_(residual, F.linear(x, weight), norm, 1e-6)

    return Case(
        lambda: ops.add_linear_(residual, x, weight), usual, weight.nbytes, 2.0 * rows * weight.numel(), plain=False
    )


def add_linear_out(i: Inputs) -> Case:
    return _add_linear(i, i.s.heads * i.s.head_dim)


def add_linear_down(i: Inputs) -> Case:
    return _add_linear(i, i.s.intermediate)


def norm_gate_up(i: Inputs) -> Case:
    rows = _few(i)
    hidden, norm, weight = i.randn(rows, i.s.hidden), i.randn(i.s.hidden), i.randn(2 * i.s.intermediate, i.s.hidden)

    def usual() -> Tensor:
        return ops.silu_mul(F.linear(ops.rms_norm(hidden, norm, 1e-6), weight))

    flops = 2.0 * rows * weight.numel()
    return Case(lambda: ops.norm_gate_up(hidden, norm, 1e-6, weight), usual, weight.nbytes, flops, plain=False)


def norm_linear(i: Inputs) -> Case:
    """The LM head of a Vicuna."""
    rows = _few(i)
    hidden, norm, weight = i.randn(rows, i.s.hidden), i.randn(i.s.hidden), i.randn(32000, i.s.hidden)

    def usual() -> Tensor:
        return F.linear(ops.rms_norm(hidden, norm, 1e-6), weight).float()

    flops = 2.0 * rows * weight.numel()
    return Case(lambda: ops.norm_linear(hidden, norm, 1e-6, weight), usual, weight.nbytes, flops, plain=False)


CASES = (
    exit_head,
    kv_compact,
    rope_append_prefill,
    rope_append_decode,
    token_score,
    decode_attention,
    add_rms_norm,
    silu_mul,
    add_layer_norm,
    quick_gelu,
)
CPU_CASES = (  # on CUDA torch's own products and FlashAttention serve
    linear_decode,
    linear_text,
    packed_linear_decode,
    packed_linear_text,
    varlen_attention,
)
CUDA_CASES = (
    add_rms_norm_decode,
    rope_append_attention,
    decode_attention_in_one,
    norm_qkv_append,
    add_linear_out,
    norm_gate_up,
    add_linear_down,
    norm_linear,
)


def cases(device: torch.device) -> tuple[Callable[[Inputs], Case], ...]:
    """Every operation there is on this device."""
    return CASES + (CPU_CASES if device.type == "cpu" else CUDA_CASES)
