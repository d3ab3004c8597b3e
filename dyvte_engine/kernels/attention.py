"""Prefill attention: causal, variable length, packed rows; one backend chosen once, by trying it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeviceError

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


AttentionFn = Callable[[Tensor, Tensor, Tensor, Lengths, float], Tensor]  # q [N,Hq,D], k, v [N,Hkv,D] -> [N,Hq,D]


def _package(module: str) -> AttentionFn:
    """The attention of an installed flash-attn package; ImportError comes with the first call."""

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
        longest = max(lengths.host)
        out = importlib.import_module(module).flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=lengths.cu,
            cu_seqlens_k=lengths.cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out  # some versions give the log-sum-exp too

    return attend


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
    longest = max(lengths.host)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, lengths.cu, lengths.cu, longest, longest, 0.0, True, False, scale=scale
    )[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
    parts, start = [], 0
    for n in lengths.host:
        rows = slice(start, start + n)
        q_b, k_b, v_b = (t[None, rows].transpose(1, 2) for t in (q, k, v))  # [1, H, n, D]
        o = torch.nn.functional.scaled_dot_product_attention(
            q_b, k_b, v_b, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(o[0].transpose(0, 1))
        start += n
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def native_gains(dtype: torch.dtype, longest: int) -> bool:
    """Whether our kernel is ahead of torch's on a CPU: it is, but where matrix units take long 16-bit products."""
    return dtype == torch.float32 or longest <= 256 or not torch.cpu._is_amx_tile_supported()


def _native(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float) -> Tensor:
    if not native_gains(q.dtype, max(lengths.host)):
        return _sdpa(q, k, v, lengths, scale)
    from . import ops  # the other backends work, and tell so, without the native library

    return ops.varlen_attention(q, k, v, lengths.cu, scale)


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
