"""paged_attention: packed sequences over what the cache holds of them, on the CPU."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors, cumulative, int32


def make(dtype: torch.dtype, before: list[int], rows: list[int], heads: tuple[int, int], dim: int, page: int) -> dict:
    """Pages in random order; what no sequence may see is NaN."""
    torch.manual_seed(0)
    hq, hkv = heads
    most = max((-(-(a + n) // page) for a, n in zip(before, rows, strict=True)), default=0) + 1
    pools = torch.full((2, len(rows) * most + 3, page, hkv, dim), torch.nan).to(dtype)
    table = torch.randperm(len(rows) * most).view(len(rows), most).to(torch.int32) + 3
    for b, (a, n) in enumerate(zip(before, rows, strict=True)):
        at = torch.arange(a + n)
        pools[:, table[b, at // page].long(), at % page] = torch.randn(2, a + n, hkv, dim).to(dtype)
    return {
        "q": torch.randn(sum(rows), hq + 1, dim).to(dtype)[:, :hq],
        "k_pool": pools[0],
        "v_pool": pools[1],
        "block_table": table,
        "before": int32(before, "cpu"),
        "cu_seqlens": cumulative(rows, "cpu"),
        "scale": dim**-0.5,
    }


def plain(args: dict, dtype: torch.dtype) -> Tensor:
    """torch's own attention of each sequence, in `dtype`."""
    out = torch.empty(args["q"].shape, dtype=dtype)
    for b, (start, end) in enumerate(pairwise(args["cu_seqlens"].tolist())):
        n, seen = end - start, int(args["before"][b]) + end - start
        q, k, v = (t.to(dtype).transpose(0, 1)[None] for t in (args["q"][start:end], *cached(args, b, seen)))
        mask = torch.ones(n, seen, dtype=torch.bool).tril(seen - n)
        if n:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=args["scale"], enable_gqa=True)
            out[start:end] = o[0].transpose(0, 1)
    return out


def cached(args: dict, b: int, n: int) -> tuple[Tensor, Tensor]:
    """K and V [n, Hkv, D] of sequence b, in order."""
    at, page = torch.arange(n), args["k_pool"].shape[1]
    pages = args["block_table"][b, at // page].long()
    return args["k_pool"][pages, at % page], args["v_pool"][pages, at % page]


CASES = [
    ([0], [1], (1, 1), 1, 1),
    ([144], [20], (4, 2), 64, 16),
    ([0, 83, 7, 200, 300], [65, 0, 7, 70, 1], (8, 2), 64, 16),
    ([129], [64], (7, 1), 128, 5),
    ([64, 0], [65, 128], (3, 3), 83, 64),
    ([31], [2], (2, 1), 256, 7),
]


@pytest.mark.parametrize("before,rows,heads,dim,page", CASES)
def test_against_torch(dtype, before, rows, heads, dim, page) -> None:
    args = make(dtype, before, rows, heads, dim, page)
    out = ops.paged_attention(**args)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == args["q"].shape
    assert_as_good_as_torch(out, plain(args, dtype), plain(args, torch.float64))


@pytest.mark.parametrize("neighbours", [True, False])
def test_bits_are_those_of_all_rows_together(dtype, neighbours) -> None:
    """Wherever the pages are, and wherever the prompt is cut."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(211, heads, 64).to(dtype) for heads in (4, 2, 2))
    whole = ops.varlen_attention(q, k, v, cumulative([211], "cpu"), 0.125)
    order = torch.arange(14) if neighbours else torch.randperm(14)
    pools = torch.zeros(2, 14, 16, 2, 64, dtype=dtype)
    pools[:, order] = F.pad(torch.stack((k, v)), (0, 0, 0, 0, 0, 13)).unflatten(1, (14, 16))
    table = order.to(torch.int32)[None]
    for cut in (0, 1, 63, 64, 128, 200):
        args = (*pools, table, int32([cut], "cpu"), cumulative([211 - cut], "cpu"), 0.125)
        assert torch.equal(ops.paged_attention(q[cut:], *args), whole[cut:])


def test_ref_and_opcheck(dtype) -> None:
    args = make(dtype, [7, 0, 40], [0, 9, 30], (4, 2), 64, 16)
    rounding = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    got, want = ops.paged_attention(**args), ops.paged_attention_ref(**args)
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)
    torch.library.opcheck(torch.ops.dyvte.paged_attention.default, tuple(args.values()), test_utils=OPCHECK)


def test_errors() -> None:
    good = make(torch.float32, [5, 9], [4, 6], (4, 2), 64, 4)
    bad = [
        ("q", good["q"][0], ""),
        ("q", good["q"][:, :3], ""),
        ("q", good["q"].double(), ""),
        ("q", good["q"][..., 1:], ""),
        ("k_pool", good["k_pool"].half(), "v_pool must have the dtype of k_pool"),
        ("v_pool", good["v_pool"][1:], ""),
        ("block_table", good["block_table"].long(), ""),
        ("block_table", good["block_table"][:1], ""),
        ("block_table", good["block_table"] * 0 - 1, r"block_table\[0\] must be in 0..\d+, got -1"),
        ("before", int32([5], "cpu"), ""),
        ("before", int32([5, -1], "cpu"), r"before\[1\] must be in 0..\d+, got -1"),
        ("before", int32([5, 90], "cpu"), r"before\[1\] must be in 0..\d+, got 90"),
        ("cu_seqlens", good["cu_seqlens"].long(), ""),
        ("cu_seqlens", int32([0, 4, 9], "cpu"), r"cu_seqlens\[2\] must be in 10..10, got 9"),
    ]
    check_errors(ops.paged_attention, good, bad)


@pytest.mark.gpu
def test_refuses_cuda() -> None:
    good = make(torch.float32, [5, 9], [4, 6], (4, 2), 64, 4)
    check_errors(ops.paged_attention, good, [("q", good["q"].cuda(), "q must be on the CPU")])
