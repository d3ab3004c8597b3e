import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors, int32, page_table


def make(device: str, dtype: torch.dtype, lens: list[int], heads: tuple[int, int], dim: int, page: int) -> dict:
    hq, hkv = heads
    table = page_table(len(lens), max(lens, default=0) // page + 1, device)
    pools = [torch.randn(table.numel(), page, hkv, dim, device=device).to(dtype) for _ in range(2)]
    q = torch.randn(len(lens), (hq + 2) * dim, device=device).to(dtype)[:, : hq * dim].unflatten(1, (hq, dim))
    return {
        "q": q,
        "k_pool": pools[0],
        "v_pool": pools[1],
        "block_table": table,
        "kv_lens": int32(lens, device),
        "scale": dim**-0.5,
    }


def plain(args: dict, dtype: torch.dtype) -> Tensor:
    """torch's own attention over the gathered rows, in `dtype`."""
    q, page = args["q"].to(dtype), args["k_pool"].shape[1]
    out = torch.zeros_like(q)
    for b, n in enumerate(args["kv_lens"].tolist()):
        at = torch.arange(n, device=q.device)
        at = args["block_table"][b].long()[at // page] * page + at % page
        k, v = (args[pool].flatten(0, 1)[at].to(dtype).transpose(0, 1) for pool in ("k_pool", "v_pool"))
        group = q.shape[1] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        if n:
            out[b] = F.scaled_dot_product_attention(q[b, :, None], k, v, scale=args["scale"])[:, 0]
    return out


CASES = [
    ([1], (2, 2), 64, 16),
    ([0, 83, 7, 520], (8, 2), 64, 16),
    ([769], (7, 1), 128, 256),
    ([0, 0], (4, 4), 80, 5),
    ([40, 2200], (12, 2), 83, 4096),
    ([64, 512, 513], (2, 1), 256, 32),
    ([37, 2], (3, 1), 7, 8),
    ([1500] * 3, (32, 8), 128, 64),
    ([5], (1, 1), 1, 1),
    ([191, 192, 193, 0, 385], (4, 2), 64, 16),
    ([21, 3], (80, 2), 40, 4),
]


@pytest.mark.parametrize("lens,heads,dim,page", CASES)
def test_against_torch(device, dtype, lens, heads, dim, page) -> None:
    args = make(device, dtype, lens, heads, dim, page)
    out = ops.decode_attention(**args)
    assert out.dtype == dtype and out.is_contiguous()
    assert_as_good_as_torch(out, plain(args, dtype), plain(args, torch.float64))
    assert all((out[b] == 0).all() for b, n in enumerate(lens) if n == 0)
    assert torch.equal(out, ops.decode_attention(**args))


@pytest.mark.parametrize("lens,heads,dim,page", CASES)
def test_in_one_kernel(device, dtype, lens, heads, dim, page) -> None:
    """The same bits, whichever block comes last; what it counts with is as it was."""
    args = make(device, dtype, lens, heads, dim, page)
    want, arrived = ops.decode_attention(**args), int32([0] * (len(lens) * heads[0]), device)
    for _ in range(10):
        assert torch.equal(ops.decode_attention(**args, arrived=arrived), want)
    assert arrived.count_nonzero() == 0


def test_empty_batch(device: str) -> None:
    args = make(device, torch.float32, [3], (4, 2), 64, 16)
    empty = args | {"q": args["q"][:0], "block_table": args["block_table"][:0], "kv_lens": args["kv_lens"][:0]}
    assert ops.decode_attention(**empty).shape == (0, 4, 64)


def test_rows_past_the_length_are_not_read(device: str, dtype: torch.dtype) -> None:
    args = make(device, dtype, [19], (4, 2), 64, 16)
    expected = ops.decode_attention(**args)
    page = args["block_table"][0, 1]
    args["k_pool"][page, 3:], args["v_pool"][page, 3:] = torch.nan, torch.nan
    assert torch.equal(ops.decode_attention(**args), expected)


def test_sequences_do_not_mix(dtype: torch.dtype) -> None:
    """A sequence's result is the same alone and among others, whatever these hold, and on any number of threads."""
    args = make("cpu", dtype, [83, 7, 0, 300, 1], (4, 2), 64, 16)
    expected, threads = ops.decode_attention(**args), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.decode_attention(**args), expected)
    finally:
        torch.set_num_threads(threads)
    for b in range(len(expected)):
        one = {n: args[n][b : b + 1] for n in ("q", "block_table", "kv_lens")}
        assert torch.equal(ops.decode_attention(**args | one)[0], expected[b])
    args["k_pool"][args["block_table"][1]], args["v_pool"][args["block_table"][1]] = torch.nan, torch.inf
    others = [0, 2, 3, 4]
    assert torch.equal(ops.decode_attention(**args)[others], expected[others])


def test_large_scores_and_nan(device: str) -> None:
    args = make(device, torch.float32, [700], (2, 1), 64, 64) | {"scale": 1000.0}
    torch.testing.assert_close(ops.decode_attention(**args).double(), plain(args, torch.float64), rtol=1e-3, atol=1e-3)
    args["k_pool"][args["block_table"][0, 2], 5] = torch.nan
    assert ops.decode_attention(**args).isnan().all()


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("counts", [False, True])
def test_nan_in_few_rows(device: str, rows: int, counts: bool) -> None:
    """Also where a row, or a query, is all that a block sees."""
    args = make(device, torch.float32, [rows], (2, 1), 64, 64)
    if counts:
        args["arrived"] = int32([0, 0], device)
    query = args["q"].clone()
    query[0, 1, 7] = torch.nan
    out = ops.decode_attention(**args | {"q": query})
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all()
    args["k_pool"][args["block_table"][0, 0], rows - 1, 0, 3] = torch.nan
    assert ops.decode_attention(**args).isnan().all()


@pytest.mark.gpu
def test_graph_capture() -> None:
    """A captured call follows lengths that change on the device."""
    args = make("cuda", torch.bfloat16, [700, 30], (8, 2), 128, 64)
    ops.decode_attention(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.decode_attention(**args)
    for lens in ([700, 30], [1, 650], [0, 64]):
        args["kv_lens"].copy_(int32(lens, "cuda"))
        graph.replay()
        assert torch.equal(out, ops.decode_attention(**args))


def test_ref_and_opcheck(device: str, dtype: torch.dtype) -> None:
    args = make(device, dtype, [0, 83, 7], (4, 2), 64, 16)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        ops.decode_attention(**args), ops.decode_attention_ref(**args), rtol=rounding, atol=rounding
    )
    torch.library.opcheck(torch.ops.dyvte.decode_attention.default, tuple(args.values()), test_utils=OPCHECK)


def test_errors(device: str) -> None:
    good = make(device, torch.float32, [5, 9], (4, 2), 64, 16)
    check_errors(
        ops.decode_attention,
        good,
        [
            ("q", good["q"][..., 1:], ""),
            ("q", good["q"][:, :3], ""),
            ("q", good["q"].half(), "k_pool must"),
            ("v_pool", good["v_pool"][:, 1:], ""),
            ("block_table", good["block_table"][1:], ""),
            ("block_table", good["block_table"].long(), ""),
            ("kv_lens", good["kv_lens"][1:], ""),
            ("arrived", int32([0] * 7, device), ""),
            ("arrived", int32([0] * 8, device).long(), ""),
        ],
    )


def test_index_values_on_cpu() -> None:
    good = make("cpu", torch.float32, [5, 9], (4, 2), 64, 16)
    check_errors(
        ops.decode_attention,
        good,
        [
            ("kv_lens", int32([5, 17], "cpu"), r"kv_lens\[1\] must be in 0..16, got 17"),
            ("kv_lens", int32([-1, 9], "cpu"), r"kv_lens\[0\] must be in 0..16, got -1"),
            ("block_table", good["block_table"] + 2, r"block_table\[\d\] must be in 0..1"),
        ],
    )
