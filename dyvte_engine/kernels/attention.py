"""Prefill attention: causal, variable length, packed rows; one backend chosen once, by trying it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ..errors import DeviceError
from .transfer import to_device

# Modules of the flash-attn packages 3, 4 and 2, which share a function's name and arguments.
_PACKAGES = {"flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute", "flash_attn": "flash_attn"}
BACKENDS = (*_PACKAGES, "torch_flash", "native", "sdpa")
MAX_HEAD_DIM = 256  # of our kernels
CAPTURABLE = (*_PACKAGES, "torch_flash")  # CUDA's that take the lengths from the device, all but the largest


@dataclass(frozen=True)
class Lengths:
    """Lengths of the packed sequences: `cu` int32 [B+1] on the device, `host` the same as a list of lengths."""

    cu: Tensor
    host: list[int]

    @classmethod
    def of(cls, host: list[int], device: torch.device) -> Lengths:
        return cls(to_device([0, *accumulate(host)], device, torch.int32), host)

    @cached_property
    def counts(self) -> Tensor:
        """int32 [B], the lengths."""
        return self.cu.diff()

    @cached_property
    def last(self) -> Tensor:
        """int64 [B], the last row of each sequence."""
        return (self.cu[1:] - 1).long()


class AttentionFn(Protocol):
    """q [N, Hq, D], k and v [M, Hkv, D] -> [N, Hq, D].

    A sequence's queries are its last rows; `keys` are the lengths of k and v where they are not those of q.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float, keys: Lengths | None = None
    ) -> Tensor: ...


def _package(module: str) -> AttentionFn:
    """The attention of an installed flash-attn package; ImportError comes with the first call."""

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float, keys: Lengths | None = None) -> Tensor:
        keys = keys or lengths
        out = importlib.import_module(module).flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=lengths.cu,
            cu_seqlens_k=keys.cu,
            max_seqlen_q=max(lengths.host),
            max_seqlen_k=max(keys.host),
            softmax_scale=scale,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out  # some versions give the log-sum-exp too

    return attend


def _torch_flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float, keys: Lengths | None = None
) -> Tensor:
    keys = keys or lengths
    longest = max(lengths.host), max(keys.host)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, lengths.cu, keys.cu, *longest, 0.0, True, False, scale=scale
    )[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float, keys: Lengths | None = None) -> Tensor:
    parts, start, first = [], 0, 0
    for n, m in zip(lengths.host, (keys or lengths).host, strict=True):
        q_b, (k_b, v_b) = q[start : start + n], (t[first : first + m] for t in (k, v))
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        parts.append(_one(q_b, k_b, v_b, mask, scale))
        start, first = start + n, first + m
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [n, Hq, D], k and v [m, Hkv, D] of one sequence, causal without a mask -> [n, Hq, D]."""
    a, b, c = (t[None].transpose(1, 2) for t in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(
        a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o[0].transpose(0, 1)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [N, Hq, D], k and v [N, Hkv, D] of a single sequence -> [N, Hq, D], by the kernel that torch picks."""
    return _one(q, k, v, None, scale)


def native_gains(dtype: torch.dtype, longest: int) -> bool:
    """Whether our kernel is ahead of torch's on a CPU: it is, but where matrix units take long 16-bit products."""
    return dtype == torch.float32 or longest <= 256 or not torch.cpu._is_amx_tile_supported()


def _native(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float, keys: Lengths | None = None) -> Tensor:
    if keys is not None or not native_gains(q.dtype, max(lengths.host)):
        return _sdpa(q, k, v, lengths, scale, keys)
    from . import ops  # the other backends work, and tell so, without the native library

    return ops.varlen_attention(q, k, v, lengths.cu, scale)


@dataclass(frozen=True)
class Paged:
    """Where packed sequences are in the cache: block_table int32 [B, M], before int32 [B] cached rows that come first,
    and `rows`, for each sequence all its rows there.
    """

    k_pool: Tensor
    v_pool: Tensor
    block_table: Tensor
    before: Tensor
    rows: Lengths


def attend_pages(attend: AttentionFn, q: Tensor, lengths: Lengths, scale: float, cached: Paged) -> Tensor:
    """Causal attention [N, Hq, D] of q over what the cache holds of its sequences, which includes their own rows.

    On a CPU the pages are read where they are; for the backends of CUDA, K and V are put together first.
    """
    if attend is _native and native_gains(q.dtype, max(lengths.host)):
        from . import ops

        pools = cached.k_pool, cached.v_pool
        return ops.paged_attention(q, *pools, cached.block_table, cached.before, lengths.cu, scale)
    k, v = gather(cached)
    return attend(q, k, v, lengths, scale, cached.rows)


def gather(cached: Paged) -> tuple[Tensor, Tensor]:
    """K and V [M, Hkv, D] of all rows of all sequences, packed."""
    page = cached.k_pool.shape[1]
    slots = []
    for b, n in enumerate(cached.rows.host):
        at = torch.arange(n, device=cached.block_table.device)
        slots.append(cached.block_table[b, at // page].long() * page + at % page)
    where = torch.cat(slots)
    return cached.k_pool.flatten(0, 1)[where], cached.v_pool.flatten(0, 1)[where]


_FUNCTIONS: dict[str, AttentionFn] = {
    **{name: _package(module) for name, module in _PACKAGES.items()},
    "torch_flash": _torch_flash,
    "native": _native,
    "sdpa": _sdpa,
}


def try_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str | None:
    """Run a tiny call of one backend. Returns None if it works here, else the reason in one sentence."""
    if name != "sdpa" and (device.type == "cpu") != (name == "native"):
        return "runs on the CPU only" if name == "native" else "runs on CUDA devices only"
    try:
        q = torch.randn(5, 2, head_dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        lengths = Lengths(torch.tensor([0, 2, 5], dtype=torch.int32, device=device), [2, 3])
        got = _FUNCTIONS[name](q, q, q, lengths, 1 / math.sqrt(head_dim))
        want = _sdpa(q, q, q, lengths, 1 / math.sqrt(head_dim))
        if not torch.allclose(got.float(), want.float(), atol=3e-2):
            return "its result differs from scaled_dot_product_attention"
    except ImportError as e:
        return f"not importable: {e}"
    except Exception as e:  # whatever a backend raises is the reason it does not work here
        return f"{type(e).__name__}: {str(e).splitlines()[0]}"
    return None


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, order: Sequence[str] = BACKENDS
) -> tuple[str, AttentionFn]:
    """The backend asked for, or with "auto" the first of `order` that works here.

    Raises:
        DeviceError: unknown name, or the named backend does not work here (with the reason).
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise DeviceError(f"attn_backend {name!r} is not known; accepted: auto, {', '.join(BACKENDS)}")
    reasons = []
    for candidate in order if name == "auto" else (name,):
        reason = try_backend(candidate, device, dtype, head_dim)
        if reason is None:
            return candidate, _FUNCTIONS[candidate]
        reasons.append(f"{candidate}: {reason}")
    raise DeviceError(f"attn_backend {name!r} does not work on {device} with {dtype}; " + "; ".join(reasons))
