"""The interfaces of the flash-attn packages, which themselves need a GPU: tests/engine/test_gpu.py runs those there."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from dyvte_engine import DeviceError
from dyvte_engine.attention import _FUNCTIONS, _PACKAGES, BACKENDS, Lengths, choose_backend

LENGTHS = Lengths(torch.tensor([0, 3, 4, 11], dtype=torch.int32), [3, 1, 7])


def causal(q, k, v, scale):
    """Plain torch in float64: q [n, Hq, D], k and v [n, Hkv, D]."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def package(with_lse):
    """A module with the packages' published signature, computing in plain torch."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        assert causal and max_seqlen_q == max_seqlen_k == 7
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        parts = [reference(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in pairwise(ends)]
        out = torch.cat(parts).to(q.dtype)
        return (out, torch.zeros(q.shape[1], len(q))) if with_lse else out

    reference = globals()["causal"]
    module = ModuleType("package")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", _PACKAGES)
def test_packages_are_called_by_their_interface(name, with_lse, monkeypatch):
    monkeypatch.setitem(sys.modules, _PACKAGES[name], package(with_lse))
    q, k, v = torch.randn(3, 11, 4, 8).unbind()
    got = _FUNCTIONS[name](q, k[:, :2], v[:, :2], LENGTHS, 0.3)
    torch.testing.assert_close(got, _FUNCTIONS["sdpa"](q, k[:, :2], v[:, :2], LENGTHS, 0.3))
    want = torch.cat([causal(q[a:b], k[a:b, :2], v[a:b, :2], 0.3) for a, b in ((0, 3), (3, 4), (4, 11))])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_every_backend_that_does_not_work_here_says_why():
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 64)[0] == "sdpa"
    for name in BACKENDS[:-1]:
        with pytest.raises(DeviceError, match=f"{name}: runs on CUDA devices only"):
            choose_backend(name, torch.device("cpu"), torch.float32, 64)
    with pytest.raises(DeviceError, match="accepted: auto, flash_attn_3, flash_attn_4, flash_attn, torch_flash, sdpa"):
        choose_backend("flash", torch.device("cpu"), torch.float32, 64)
