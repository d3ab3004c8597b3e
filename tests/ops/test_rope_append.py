import pytest
import torch
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors, cumulative, int32, page_table

MAX_POS = 211


def turns(rot_dim: int, device: str) -> Tensor:
    """Of positions up to MAX_POS: f32 [MAX_POS, rot_dim], cosines and sines."""
    angles = torch.rand(MAX_POS, rot_dim // 2, device=device) * 7
    return torch.cat((angles.cos(), angles.sin()), 1)


def make(
    device: str, dtype: torch.dtype, added: list[int], heads: tuple[int, int], dim: int, rot_dim: int, page: int
) -> dict:
    rows, (hq, hkv) = sum(added), heads
    qkv = torch.randn(rows, (hq + 2 * hkv) * dim, device=device).to(dtype)  # one fused projection
    parts = qkv.split([hq * dim, hkv * dim, hkv * dim], 1)
    q, k, v = (t.view(rows, h, dim) for t, h in zip(parts, (hq, hkv, hkv), strict=True))
    cos_sin = turns(rot_dim, device)
    lens = torch.randint(0, 100, (len(added),))
    table = page_table(len(added), (max(added, default=0) + 100) // page + 1, device)
    pools = [torch.zeros(max(1, table.numel()), page, hkv, dim, device=device, dtype=dtype) for _ in range(2)]
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos_sin": cos_sin,
        "positions": torch.randint(0, MAX_POS, (rows,)).to(device, torch.int32),
        "cu_seqlens": cumulative(added, device),
        "k_pool": pools[0],
        "v_pool": pools[1],
        "block_table": table,
        "lens": lens.to(device, torch.int32),
    }


def rotated(x: Tensor, args: dict, dtype: torch.dtype) -> Tensor:
    """transformers' form of the rotation, every step in `dtype`."""
    rot_dim = args["cos_sin"].shape[1]
    halves = args["cos_sin"][args["positions"].long()].to(dtype)[:, None].chunk(2, -1)
    cos, sin = (torch.cat((t, t), -1) for t in halves)
    turn, rest = x[..., :rot_dim].to(dtype), x[..., rot_dim:].to(dtype)
    first, second = turn.chunk(2, -1)
    return torch.cat((turn * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def cached(args: dict, pool: str) -> Tensor:
    """What the pool holds at the places the packed rows belong to."""
    table, page, cu = args["block_table"].tolist(), args[pool].shape[1], args["cu_seqlens"].tolist()
    at = [
        table[b][r // page] * page + r % page
        for b, n in enumerate(args["lens"].tolist())
        for r in range(n, n + cu[b + 1] - cu[b])
    ]
    return args[pool].flatten(0, 1)[torch.tensor(at, dtype=torch.long, device=args[pool].device)]


CASES = [
    ([1], (4, 2), 64, 64, 16),
    ([1] * 8, (8, 8), 128, 128, 256),
    ([3, 0, 83, 7], (6, 2), 80, 32, 64),
    ([5, 1], (2, 2), 83, 82, 7),
    ([769], (1, 1), 7, 6, 1000),
    ([4], (2, 1), 8, 0, 3),
    ([0, 0], (2, 1), 64, 64, 16),
]


@pytest.mark.parametrize("added,heads,dim,rot_dim,page", CASES)
def test_against_torch(device, dtype, added, heads, dim, rot_dim, page) -> None:
    args = make(device, dtype, added, heads, dim, rot_dim, page)
    before = {n: args[n].clone() for n in ("q", "k", "v", "lens")}
    ops.rope_append_(**args)
    for name in ("q", "k"):
        exact, own = (rotated(before[name], args, t) for t in (torch.float64, dtype))
        assert_as_good_as_torch(args[name], own, exact)
        assert torch.equal(args[name][..., rot_dim:], before[name][..., rot_dim:])
    assert torch.equal(args["v"], before["v"])
    assert torch.equal(args["lens"], before["lens"])
    assert torch.equal(cached(args, "k_pool"), args["k"])
    assert torch.equal(cached(args, "v_pool"), args["v"])
    written = sum(added)
    assert (args["v_pool"].flatten(2).abs().sum(-1) > 0).sum() <= written  # and nothing else


def test_prefill_equals_steps(device: str) -> None:
    """Appending a sequence at once and row by row leave the same cache."""
    whole = make(device, torch.bfloat16, [9], (4, 2), 64, 64, 4)
    steps = {n: t.clone() for n, t in whole.items()}
    ops.rope_append_(**whole)
    for i in range(9):
        row = {n: steps[n][i : i + 1] for n in ("q", "k", "v", "positions")}
        ops.rope_append_(**{**steps, **row, "cu_seqlens": int32([0, 1], device), "lens": steps["lens"] + i})
    assert torch.equal(whole["k_pool"], steps["k_pool"])
    assert torch.equal(whole["v_pool"], steps["v_pool"])


def test_one_layer_of_a_table(device: str) -> None:
    """block_table and lens may be one layer's slice, also one with a row stride."""
    args = make(device, torch.float32, [3, 2], (2, 1), 64, 64, 16)
    table = args["block_table"]
    wide = torch.cat((table, table), 1)[:, : table.shape[1]]
    assert not wide.is_contiguous()
    ops.rope_append_(**{**args, "block_table": wide})
    assert torch.equal(cached(args, "k_pool"), args["k"])


def test_ref_and_opcheck(device: str, dtype: torch.dtype) -> None:
    args = make(device, dtype, [3, 0, 9], (4, 2), 64, 48, 16)
    args = {n: t.contiguous() for n, t in args.items()}
    copy = {n: t.clone() for n, t in args.items()}
    torch.library.opcheck(torch.ops.dyvte.rope_append_.default, tuple(args.values()), test_utils=OPCHECK)
    ops.rope_append_(**args)
    ops.rope_append_ref(**copy)
    rounding = torch.finfo(dtype).eps
    for name, tensor in args.items():
        torch.testing.assert_close(tensor, copy[name], rtol=4 * rounding, atol=4 * rounding)


def test_errors(device: str) -> None:
    good = make(device, torch.float32, [3, 2], (4, 2), 64, 64, 16)
    check_errors(
        ops.rope_append_,
        good,
        [
            ("q", good["q"][..., :63], ""),
            ("q", good["q"].half(), "must have the dtype of q"),
            ("q", good["q"].transpose(1, 2).contiguous().transpose(1, 2), ""),
            ("k", good["k"][1:], ""),
            ("v", good["v"][:, :1], ""),
            ("v", good["v"].half(), ""),
            ("cos_sin", good["cos_sin"].half(), ""),
            ("cos_sin", good["cos_sin"][:, :63], ""),
            ("cos_sin", torch.ones(9, 66, device=device), ""),
            ("positions", good["positions"][1:], ""),
            ("positions", good["positions"].long(), ""),
            ("cu_seqlens", good["cu_seqlens"][:0], ""),
            ("k_pool", good["k_pool"][:, :, :1], "v_pool must"),
            ("block_table", good["block_table"][:1], ""),
            ("lens", good["lens"][:1], ""),
        ],
    )


def test_index_values_on_cpu() -> None:
    good = make("cpu", torch.float32, [3, 2], (4, 2), 64, 64, 16)
    check_errors(
        ops.rope_append_,
        good,
        [
            ("positions", good["positions"] + MAX_POS, r"positions\[0\] must be in 0..210"),
            ("cu_seqlens", int32([0, 3, 4], "cpu"), r"cu_seqlens\[2\] must be in 5..5, got 4"),
            ("lens", good["lens"] + 900, r"lens\[0\] must be in 0.."),
            ("lens", good["lens"] - 900, r"lens\[0\] must be in 0.."),
            ("block_table", good["block_table"] + 900, r"block_table\[\d+\] must be in 0.."),
        ],
    )
