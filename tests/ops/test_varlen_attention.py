"""varlen_attention: packed sequences over themselves, on the CPU."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors, cumulative, int32


def make(dtype: torch.dtype, lengths: list[int], heads: tuple[int, int], dim: int, causal: bool = True) -> dict:
    """q, k and v are slices of one fused projection with some more columns."""
    torch.manual_seed(0)
    hq, hkv = heads
    qkv = torch.randn(sum(lengths), (hq + 2 * hkv + 1) * dim).to(dtype).unflatten(1, (-1, dim))
    q, k, v, _ = qkv.split((hq, hkv, hkv, 1), dim=1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": cumulative(lengths, "cpu"),
        "scale": dim**-0.5,
        "causal": causal,
    }


def plain(args: dict, dtype: torch.dtype) -> Tensor:
    """torch's own attention of each sequence, in `dtype`."""
    q, k, v = (args[n].to(dtype).transpose(0, 1) for n in ("q", "k", "v"))
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    out = torch.empty_like(q)
    for a, b in pairwise(args["cu_seqlens"].tolist()):
        options = {"is_causal": args["causal"], "scale": args["scale"]}
        if a < b:
            out[:, a:b] = F.scaled_dot_product_attention(q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], **options)
    return out.transpose(0, 1)


CASES = [
    ([1], (1, 1), 1),
    ([190], (4, 2), 64),
    ([0, 83, 7, 0, 300, 1], (8, 2), 64),
    ([129], (7, 1), 128),
    ([64, 65, 63, 128], (3, 3), 80),
    ([40, 200], (12, 2), 83),
    ([31], (2, 1), 256),
    ([17, 2], (3, 1), 7),
    ([700], (2, 2), 64),
    ([95, 96, 97, 24, 25], (4, 2), 72),
    ([48, 49], (3, 1), 112),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths,heads,dim", CASES)
def test_against_torch(dtype, lengths, heads, dim, causal) -> None:
    args = make(dtype, lengths, heads, dim, causal)
    out = ops.varlen_attention(**args)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == args["q"].shape
    assert_as_good_as_torch(out, plain(args, dtype), plain(args, torch.float64))


def test_sequences_do_not_mix(dtype) -> None:
    """A sequence's result is the same alone and among others, and on any number of threads."""
    lengths = [0, 83, 7, 300, 1]
    args = make(dtype, lengths, (4, 2), 64)
    threads = torch.get_num_threads()
    try:
        together = []
        for n in (1, 3):
            torch.set_num_threads(n)
            together.append(ops.varlen_attention(**args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*together)
    for a, b in pairwise(args["cu_seqlens"].tolist()):
        one = {n: args[n][a:b] for n in ("q", "k", "v")} | {"cu_seqlens": cumulative([b - a], "cpu")}
        assert torch.equal(ops.varlen_attention(**args | one), together[0][a:b])


@pytest.mark.parametrize("row", [0, 64, 100, 150])
def test_later_rows_are_not_seen(row: int) -> None:
    args = make(torch.float32, [151], (4, 2), 64)
    expected = ops.varlen_attention(**args)
    for name in ("k", "v"):
        args[name][row + 1 :] = 1e4
    out = ops.varlen_attention(**args)
    assert torch.equal(out[: row + 1], expected[: row + 1])
    assert not torch.isclose(out[row + 1 :], expected[row + 1 :]).any()


def test_large_scores_and_nan() -> None:
    args = make(torch.float32, [200], (2, 1), 64, causal=False) | {"scale": 1000.0}
    torch.testing.assert_close(ops.varlen_attention(**args).double(), plain(args, torch.float64), rtol=1e-3, atol=1e-3)
    args["k"][130, 0, 3] = torch.nan
    assert ops.varlen_attention(**args).isnan().all()


def test_nan_in_a_query() -> None:
    args = make(torch.float32, [200], (4, 2), 64)
    expected = ops.varlen_attention(**args)
    args["q"][37, 1, 5] = torch.nan
    out = ops.varlen_attention(**args)
    assert out[37, 1].isnan().all()
    out[37, 1] = expected[37, 1]
    assert torch.equal(out, expected)


def test_empty() -> None:
    args = make(torch.float32, [], (4, 2), 64)
    assert ops.varlen_attention(**args).shape == (0, 4, 64)
    assert ops.varlen_attention(**args | {"cu_seqlens": int32([0, 0], "cpu")}).shape == (0, 4, 64)


@pytest.mark.parametrize("causal", [True, False])
def test_ref_and_opcheck(dtype, causal) -> None:
    args = make(dtype, [0, 83, 7], (4, 2), 64, causal)
    rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    got, want = ops.varlen_attention(**args), ops.varlen_attention_ref(**args)
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)
    torch.library.opcheck(torch.ops.dyvte.varlen_attention.default, tuple(args.values()), test_utils=OPCHECK)


def test_errors() -> None:
    good = make(torch.float32, [5, 9], (4, 2), 64)
    bad = [
        ("q", good["q"][0], ""),
        ("q", good["q"][:, :3], ""),
        ("q", good["q"].double(), ""),
        ("q", good["q"].transpose(1, 2).contiguous().transpose(1, 2), ""),
        ("k", good["k"][1:], ""),
        ("k", good["k"].half(), ""),
        ("v", good["v"][:, 1:], ""),
        ("v", good["v"][..., 1:], ""),
        ("cu_seqlens", good["cu_seqlens"].long(), ""),
        ("cu_seqlens", int32([0, 5, 13], "cpu"), r"cu_seqlens\[2\] must be in 14..14, got 13"),
        ("cu_seqlens", int32([0, 15, 14], "cpu"), r"cu_seqlens\[1\] must be in 0..14, got 15"),
    ]
    check_errors(ops.varlen_attention, good, bad)


@pytest.mark.gpu
def test_refuses_cuda() -> None:
    good = make(torch.float32, [5, 9], (4, 2), 64)
    check_errors(ops.varlen_attention, good, [("q", good["q"].cuda(), "q must be on the CPU")])
