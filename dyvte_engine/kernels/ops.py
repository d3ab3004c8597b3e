"""The native kernels as `torch.ops.dyvte.*`, CPU and CUDA, with fake kernels and plain torch `_ref` twins (`ref.py`).

Shapes: B sequences, N packed rows, d hidden size, Hq/Hkv heads, D head size (at most 256 in attention). Data is
float32, float16 or bfloat16, summed in float32; index tensors are int32. Where rows are read, the row stride is free
(q, k and v may be slices of one fused projection) and everything inside a row is contiguous. All tensors of a call
share one device. There is no autograd: these ops are for inference.

A wrong shape, dtype or device raises RuntimeError naming the op, the argument, what is accepted and what was given:
the check is made in C++ and not translated, to keep a call at a few microseconds. Values inside index tensors are
checked on the CPU only; on CUDA they are trusted, since reading them would wait for the device.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NativeLibraryError
from .ref import (
    add_layer_norm_ref,
    add_linear_ref,
    add_rms_norm_ref,
    decode_attention_ref,
    exit_head_ref,
    kv_compact_ref,
    layer_norm_ref,
    linear_ref,
    norm_gate_up_ref,
    norm_linear_ref,
    norm_qkv_append_ref,
    packed_linear_ref,
    packed_silu_mul_ref,
    paged_attention_ref,
    quick_gelu_ref,
    rms_norm_ref,
    rope_append_attention_ref,
    rope_append_ref,
    silu_mul_ref,
    token_score_ref,
    varlen_attention_ref,
)

__all__ = [
    "LAST_TEXT",
    "LAST_VISUAL",
    "MEAN_TEXT",
    "MEAN_VISUAL",
    "PageAllocator",
    "add_layer_norm",
    "add_layer_norm_ref",
    "add_linear_",
    "add_linear_ref",
    "add_rms_norm_",
    "add_rms_norm_ref",
    "build_info",
    "contiguous_block_table",
    "decode_attention",
    "decode_attention_ref",
    "exit_head",
    "exit_head_ref",
    "few_rows",
    "in_panels",
    "intel",
    "kv_compact_",
    "kv_compact_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "linear_ref",
    "load_library",
    "multiplies_panels",
    "norm_gate_up",
    "norm_gate_up_ref",
    "norm_linear",
    "norm_linear_ref",
    "norm_qkv_append_",
    "norm_qkv_append_ref",
    "packed_linear",
    "packed_linear_ref",
    "packed_silu_mul",
    "packed_silu_mul_ref",
    "paged_attention",
    "paged_attention_ref",
    "quick_gelu_",
    "quick_gelu_ref",
    "rms_norm",
    "rms_norm_ref",
    "rope_append_",
    "rope_append_attention_",
    "rope_append_attention_ref",
    "rope_append_ref",
    "silu_mul",
    "silu_mul_ref",
    "token_score",
    "token_score_ref",
    "varlen_attention",
    "varlen_attention_ref",
]

MEAN_VISUAL, LAST_VISUAL, MEAN_TEXT, LAST_TEXT = 1, 2, 4, 8
"""Bits of `exit_head`'s `states`, in the order in which the pooled vectors are concatenated."""


def load_library() -> None:
    """Load libdyvte.so, which registers `torch.ops.dyvte.*`. A second call does nothing.

    Raises:
        NativeLibraryError: it is missing or does not load into this torch.
    """
    path = Path(__file__).parent.parent / "libdyvte.so"
    build = "build it with `make build` (or `pip install -e .`) in the repository"
    if not path.exists():
        raise NativeLibraryError(f"the native library {path.name} is missing from {path.parent}; {build}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise NativeLibraryError(f"{path} does not load into torch {torch.__version__}: {error}; {build}") from error


load_library()
try:
    from .. import _C
except ImportError as error:
    raise NativeLibraryError(
        f"dyvte_engine._C does not load: {error}; build it for this Python with `make build` (or `pip install -e .`)"
    ) from error

PageAllocator = _C.PageAllocator

_exit_head = torch.ops.dyvte.exit_head.default
_kv_compact = torch.ops.dyvte.kv_compact_.default
_rope_append = torch.ops.dyvte.rope_append_.default
_token_score = torch.ops.dyvte.token_score.default
_decode_attention = torch.ops.dyvte.decode_attention.default
_rope_append_attention = torch.ops.dyvte.rope_append_attention_.default
_varlen_attention = torch.ops.dyvte.varlen_attention.default
_paged_attention = torch.ops.dyvte.paged_attention.default
_add_rms_norm = torch.ops.dyvte.add_rms_norm_.default
_add_rms_norm_into = torch.ops.dyvte.add_rms_norm_into_.default
_rms_norm = torch.ops.dyvte.rms_norm.default
_linear = torch.ops.dyvte.linear.default
_packed_linear = torch.ops.dyvte.packed_linear.default
_packed_silu_mul = torch.ops.dyvte.packed_silu_mul.default
_silu_mul = torch.ops.dyvte.silu_mul.default
_layer_norm = torch.ops.dyvte.layer_norm.default
_add_layer_norm = torch.ops.dyvte.add_layer_norm.default
_quick_gelu = torch.ops.dyvte.quick_gelu_.default
_norm_gate_up = torch.ops.dyvte.norm_gate_up.default
_norm_linear = torch.ops.dyvte.norm_linear.default
_add_linear = torch.ops.dyvte.add_linear_.default
_norm_qkv_append = torch.ops.dyvte.norm_qkv_append_.default


def build_info() -> dict[str, Any]:
    """What was built: version, compiler, torch_target, torch_built_against, cuda, cuda_reason (why not), cuda_version,
    cuda_archs; and cpu_isa, the instruction set the CPU kernels use on this machine."""
    return dict(_C.build_info())


def contiguous_block_table(layers: int, batch: int, device: torch.device | str | None = None) -> Tensor:
    """Block table int32 [layers, batch, 1] of a contiguous cache: one page per (layer, sequence), max_len rows long."""
    return torch.arange(layers * batch, dtype=torch.int32, device=device).view(layers, batch, 1)


def exit_head(
    hidden: Tensor,
    text_ranges: Tensor,
    visual_rows: Tensor | None,
    visual_cu: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    states: int = MEAN_TEXT | LAST_TEXT,
    threshold: float = 0.5,
    rms_eps: float | None = None,
    b1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Should the visual tokens of each sequence leave after this layer? (DyVTE, arXiv 2411.19628, section 3)

    Pools token states of each sequence, then softmax(w2 gelu(w1 pooled + b1)) with exact GELU.

    Args:
        hidden: [N, d], the residual stream of the packed rows.
        text_ranges: int32 [B, 2], begin and end row of the text after the last visual token.
        visual_rows: int32 [V], rows of the visual tokens, sequence after sequence; visual_cu: int32 [B + 1], where each
            sequence's begin. Both exactly when `states` asks for a visual state, else None.
        w1: [h, n_states * d]; w2: [2, h], rows keep and exit; the dtype of hidden.
        states: bits MEAN_VISUAL, LAST_VISUAL, MEAN_TEXT (without the last text row, unless it is the only one),
            LAST_TEXT; the pooled vectors are concatenated in this order.
        rms_eps: if given, each pooled vector is divided by its root mean square first.
        b1: [h], the dtype of hidden; None: no bias.

    Returns:
        p_exit float32 [B] and exit bool [B], p_exit > threshold. A sequence without rows of a requested state gets
        0 and False.
    """
    return _exit_head(hidden, text_ranges, visual_rows, visual_cu, w1, w2, states, threshold, rms_eps, b1)


def kv_compact_(
    k_pool: Tensor, v_pool: Tensor, block_table: Tensor, lens: Tensor, keep: Tensor, keep_cu: Tensor
) -> None:
    """Keep a sorted set of cached rows of each (layer, sequence), in place and bit for bit; rows move to the front.

    Args:
        k_pool, v_pool: [P, page, Hkv, D].
        block_table: int32 [L, B, M], the pages of each (layer, sequence).
        lens: int32 [L, B], rows in use; overwritten with the kept counts.
        keep: int32, strictly ascending row numbers; those of (l, b) are keep[keep_cu[i]:keep_cu[i + 1]], i = l * B + b.
        keep_cu: int32 [L * B + 1].
    """
    _kv_compact(k_pool, v_pool, block_table, lens, keep, keep_cu)


def rope_append_(
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
    """Rotate q and k in place at their position ids and write k, v into one layer's cache. `lens` is not changed.

    Args:
        q: [N, Hq, D]; k, v: [N, Hkv, D].
        cos_sin: float32 [max_pos, rot_dim], cosines of the rot_dim / 2 angles, then their sines. The first rot_dim
            channels of a head are rotated, channel i together with i + rot_dim / 2.
        positions: int32 [N], any order, gaps allowed.
        cu_seqlens: int32 [B + 1], where each sequence's rows begin; its row i goes to cache row lens[b] + i.
        k_pool, v_pool: [P, page, Hkv, D]; block_table: int32 [B, M]; lens: int32 [B].
    """
    _rope_append(q, k, v, cos_sin, positions, cu_seqlens, k_pool, v_pool, block_table, lens)


def token_score(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float) -> Tensor:
    """Attention each key receives, averaged over heads and its sequence's query rows; no attention map is stored.

    Causal, aligned at the end: query row i of nq sees the keys up to nk - nq + i. FastV (arXiv 2403.06764) ranks by it.

    Args:
        q: [Nq, Hq, D]; k: [Nk, Hkv, D], packed and rotated.
        cu_q, cu_k: int32 [B + 1].
        scale: factor on q k^T.

    Returns:
        float32 [Nk]; zeros for a sequence without queries.
    """
    return _token_score(q, k, cu_q, cu_k, scale)


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    arrived: Tensor | None = None,
) -> Tensor:
    """Attention of one query row per sequence over its first kv_lens[b] cached rows.

    On CUDA it never waits for the device and may be captured in a graph.

    Args:
        q: [B, Hq, D]; k_pool, v_pool: [P, page, Hkv, D]; block_table: int32 [B, M]; kv_lens: int32 [B].
        scale: factor on q k^T.
        arrived: int32, at least B * Hq zeros, which are zeros again afterwards; calls that may run at the same time
            must not share them. On CUDA one kernel then does what else are two, with the same bits.

    Returns:
        [B, Hq, D]; zeros where kv_lens is 0.
    """
    return _decode_attention(q, k_pool, v_pool, block_table, kv_lens, scale, arrived)


def rope_append_attention_(
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
    """`rope_append_` of one row of each sequence and `decode_attention` to all rows, in one kernel. CUDA only.

    Rounded where these round one after the other; q and k are left as they are.

    Args:
        q: [B, Hq, D]; k, v: [B, Hkv, D]; cos_sin: float32 [max_pos, rot_dim].
        positions: int32 [B]; lens: int32 [B], rows in the cache before this one, not changed.
        k_pool, v_pool: [P, page, Hkv, D]; block_table: int32 [B, M].
        scale, arrived: as in `decode_attention`.

    Returns:
        [B, Hq, D].
    """
    return _rope_append_attention(q, k, v, cos_sin, positions, k_pool, v_pool, block_table, lens, scale, arrived)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, causal: bool = True) -> Tensor:
    """Attention of packed sequences over themselves, without an attention map. CPU only; FlashAttention serves CUDA.

    Args:
        q: [N, Hq, D]; k, v: [N, Hkv, D], packed and rotated.
        cu_seqlens: int32 [B + 1], where each sequence's rows begin.
        scale: factor on q k^T.
        causal: whether a row sees only itself and the rows before it.

    Returns:
        [N, Hq, D].
    """
    return _varlen_attention(q, k, v, cu_seqlens, scale, causal)


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    before: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of packed sequences over the cache, which holds them behind what came before. CPU only.

    Row i of a sequence sees cache rows 0 to before[b] + i. The same bits as `varlen_attention` gives with all rows.

    Args:
        q: [N, Hq, D], rotated; k_pool, v_pool: [P, page, Hkv, D]; block_table: int32 [B, M].
        before: int32 [B]; cu_seqlens: int32 [B + 1], where each sequence's rows begin.
        scale: factor on q k^T.

    Returns:
        [N, Hq, D].
    """
    return _paged_attention(q, k_pool, v_pool, block_table, before, cu_seqlens, scale)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """residual += x, both [..., d]; returns `rms_norm(residual, weight, eps)`, in `out` if given, contiguous."""
    if out is None:
        return _add_rms_norm(residual, x, weight, eps)
    _add_rms_norm_into(residual, x, weight, eps, out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] over its root mean square, rounded to the dtype, times weight [d] (Llama's rounding); contiguous.

    The leading dimensions may have any two strides, so the heads of a fused projection need no copy.
    """
    return _rms_norm(x, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[N, 2 m] -> silu(gate) * up [N, m], where gate is the first half of each row."""
    return _silu_mul(gate_up)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of x [N, d] with weight and bias [d]; contiguous."""
    return _layer_norm(x, weight, bias, eps)


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, both [N, d], and `layer_norm` of that rounded sum."""
    return _add_layer_norm(x, y, weight, bias, eps)


def quick_gelu_(x: Tensor) -> Tensor:
    """x times the sigmoid of 1.702 x, in place; x is contiguous."""
    _quick_gelu(x)
    return x


def few_rows(dtype: torch.dtype, k: int, packed: bool = False) -> int:
    """Up to so many rows of k elements `linear` is faster than torch's own, or than one with weights packed before.

    Measured (`benchmarks.kernels`) on a Zen 5, and on an Intel processor whose matrix units torch uses for 16 bits.
    """
    if dtype != torch.float16 and _in_panels():
        if packed:
            return 96 if k >= 2048 else 64 if k >= 1024 else 16
        if dtype == torch.bfloat16:
            return 128 if k >= 1024 else 48
        return sys.maxsize
    if dtype == torch.float32:
        return 16
    return 4 if packed else 10


@functools.cache
def _in_panels() -> bool:
    """Whether `linear` multiplies some dozen rows at the processor's speed, which no matrix units exceed."""
    return build_info()["cpu_isa"] == "avx512_bf16" and not intel()


@functools.cache
def intel() -> bool:
    """Whether this processor is Intel's."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "GenuineIntel" in info.read_text()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, k] times weight [n, k] transposed, plus bias [n]: [N, n]. CPU only; meant for at most `few_rows` rows.

    The weight is read as it lies in memory, once for up to 128 rows. A row's result depends on how many rows there are
    (the order of summation does), not on what is in the others, nor on the number of threads. bfloat16 is multiplied by
    the processor where it can; it takes subnormal numbers for zeros.
    """
    return _linear(x, weight, bias)


def in_panels(weight: Tensor, gated: bool = False) -> Tensor:
    """weight [n, k] for `packed_linear`: its rows as columns, 64 side by side, and zeros where the last ones are none.

    float32 [panels, k, 64]; of bfloat16, or of float32 that bfloat16 has all numbers of, as checkpoints usually do,
    bfloat16 [panels, ceil(k / 2), 64, 2]. gated: for `packed_silu_mul`, a panel is 32 gates, which are the first half
    of the weight's rows, and the 32 rows that they belong to.
    """
    if gated:
        halves = (F.pad(half, (0, 0, 0, -len(half) % 32)).unflatten(0, (-1, 32)) for half in weight.chunk(2))
        weight = torch.cat(list(halves), dim=1).flatten(0, 1)
    n, k = weight.shape
    half = weight.bfloat16()
    if weight.dtype == torch.float32 and not torch.equal(half.float(), weight):
        return F.pad(weight, (0, 0, 0, -n % _PANEL)).unflatten(0, (-1, _PANEL)).transpose(1, 2).contiguous()
    half = F.pad(half, (0, k % 2, 0, -n % _PANEL))
    return half.unflatten(0, (-1, _PANEL)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()


_PANEL = 64


def multiplies_panels(dtype: torch.dtype) -> bool:
    """Whether `packed_linear` is what is fastest here for any number of rows (measured on a Zen 5).

    Intel's processors have matrix units for bfloat16, and for float32 it was not measured there.
    """
    isa = build_info()["cpu_isa"]
    return not intel() and isa in {torch.float32: _AVX512, torch.bfloat16: _AVX512[1:]}.get(dtype, ())


_AVX512 = ("avx512", "avx512_bf16")


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x [N, k] times a weight [n, k] that is `in_panels`, plus bias [n]: [N, n]. CPU only; float32 and bfloat16.

    bfloat16 panels serve both: to float32 they are the numbers that they were made of. A row's result depends neither
    on the other rows, nor on how many there are, nor on the number of threads. bfloat16 is multiplied as by `linear`.
    """
    return _packed_linear(x, weight, bias, n)


def packed_silu_mul(x: Tensor, weight: Tensor, n: int) -> Tensor:
    """`silu_mul` of x [N, k] times a weight [2 n, k] that is `in_panels`, gated: [N, n]. See `packed_linear`."""
    return _packed_silu_mul(x, weight, n)


def norm_gate_up(hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`silu_mul` of the product of `rms_norm(hidden, norm, eps)` and weight, in one kernel. CUDA only.

    This and the next three stream a weight once, for the few rows of a decoding step. They take float16 and bfloat16,
    at most 8 rows, columns and row strides in multiples of 8, and begin early behind each other where the GPU can.

    Args:
        hidden: [B, k]; norm: [k]; weight: [2 m, k], the gate's rows first; bias: [2 m].

    Returns:
        [B, m].
    """
    return _norm_gate_up(hidden, norm, eps, weight, bias)


def norm_linear(hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of `rms_norm(hidden, norm, eps)` [B, k] and weight [n, k], plus bias [n], unrounded: float32 [B, n].

    See `norm_gate_up`.
    """
    return _norm_linear(hidden, norm, eps, weight, bias)


def add_linear_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """residual [B, n] += x [B, k] times weight [n, k] transposed, plus bias [n]. See `norm_gate_up`."""
    _add_linear(residual, x, weight, bias)


def norm_qkv_append_(
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
    """q, k and v of `rms_norm(hidden, norm, eps)`, rotated; k and v go behind the cached rows. See `norm_gate_up`.

    Args:
        hidden: [B, k]; norm: [k]; weight: [(Hq + 2 Hkv) D, k], the heads of q, k and v; bias: [(Hq + 2 Hkv) D].
        cos_sin: float32 [max_pos, D], as in `rope_append_`; D a multiple of 16, all of which is rotated.
        positions, lens: int32 [B]; k_pool, v_pool: [P, page, Hkv, D]; block_table: int32 [B, M].

    Returns:
        q [B, Hq, D].
    """
    return _norm_qkv_append(hidden, norm, eps, weight, bias, cos_sin, positions, k_pool, v_pool, block_table, lens)


# --- fake kernels: shapes and dtypes only, for torch.compile and opcheck ----------------------------------------------


@torch.library.register_fake("dyvte::exit_head")
def _(hidden: Tensor, text_ranges: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    size = text_ranges.shape[:1]
    return hidden.new_empty(size, dtype=torch.float32), hidden.new_empty(size, dtype=torch.bool)


@torch.library.register_fake("dyvte::kv_compact_")
@torch.library.register_fake("dyvte::add_linear_")
@torch.library.register_fake("dyvte::quick_gelu_")
@torch.library.register_fake("dyvte::add_rms_norm_into_")
@torch.library.register_fake("dyvte::rope_append_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("dyvte::token_score")
def _(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return k.new_empty(k.shape[:1], dtype=torch.float32)


@torch.library.register_fake("dyvte::varlen_attention")
@torch.library.register_fake("dyvte::decode_attention")
@torch.library.register_fake("dyvte::rope_append_attention_")
@torch.library.register_fake("dyvte::paged_attention")
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("dyvte::layer_norm")
@torch.library.register_fake("dyvte::rms_norm")
@torch.library.register_fake("dyvte::add_rms_norm_")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("dyvte::add_layer_norm")
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("dyvte::silu_mul")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.register_fake("dyvte::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("dyvte::packed_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


@torch.library.register_fake("dyvte::packed_silu_mul")
def _(x: Tensor, weight: Tensor, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


@torch.library.register_fake("dyvte::norm_gate_up")
def _(hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0] // 2)


@torch.library.register_fake("dyvte::norm_linear")
def _(hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.register_fake("dyvte::norm_qkv_append_")
def _(hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, *rest: Tensor) -> Tensor:
    heads, dim = rest[2].shape[2:]  # of k_pool
    return hidden.new_empty(hidden.shape[0], weight.shape[0] // dim - 2 * heads, dim)
