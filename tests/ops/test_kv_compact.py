import pytest
import torch
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, check_errors, cumulative, int32, page_table


def make(device: str, dtype: torch.dtype, lens: list[list[int]], page: int, heads: int, dim: int, part: float) -> dict:
    layers, batch, longest = len(lens), len(lens[0]), max(map(max, lens))
    table = page_table(layers * batch, longest // page + 1, device).view(layers, batch, -1)
    pools = [torch.randn(table.numel(), page, heads, dim, device=device).to(dtype) for _ in range(2)]
    keep = [torch.randperm(n)[: round(n * part)].sort().values.to(torch.int32) for row in lens for n in row]
    return {
        "k_pool": pools[0],
        "v_pool": pools[1],
        "block_table": table,
        "lens": int32(lens, device),
        "keep": torch.cat(keep).to(device),
        "keep_cu": cumulative([len(k) for k in keep], device),
    }


def rows_of(args: dict, pool: str, slot: int, n: int) -> Tensor:
    """The first n cached rows of one (layer, sequence), gathered through the block table."""
    table, page = args["block_table"].flatten(0, 1)[slot].long(), args[pool].shape[1]
    at = torch.arange(n, device=table.device)
    return args[pool].flatten(0, 1)[table[at // page] * page + at % page]


LENS = [[100, 7, 0], [1, 83, 769]]


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("page,heads,dim", [(16, 2, 64), (256, 1, 83), (1, 3, 7), (1000, 4, 8), (64, 1, 1)])
def test_keeps_rows_bit_for_bit(device: str, dtype: torch.dtype, page: int, heads: int, dim: int, part: float) -> None:
    args = make(device, dtype, LENS, page, heads, dim, part)
    flat, cu = [n for row in LENS for n in row], args["keep_cu"].tolist()
    expected = [
        [rows_of(args, pool, slot, n)[args["keep"][cu[slot] : cu[slot + 1]].long()] for slot, n in enumerate(flat)]
        for pool in ("k_pool", "v_pool")
    ]
    ops.kv_compact_(**args)
    assert args["lens"].flatten().tolist() == [cu[i + 1] - cu[i] for i in range(len(flat))]
    for pool, slots in zip(("k_pool", "v_pool"), expected, strict=True):
        for slot, rows in enumerate(slots):
            assert torch.equal(rows_of(args, pool, slot, len(rows)), rows)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_few_slots(device: str, shape: tuple[int, int]) -> None:
    pool = torch.randn(4, 16, 2, 8, device=device)
    table = torch.zeros(*shape, 1, dtype=torch.int32, device=device)
    lens = torch.zeros(shape, dtype=torch.int32, device=device)
    ops.kv_compact_(pool, pool.clone(), table, lens, int32([], device), cumulative([0] * (shape[0] * shape[1]), device))
    assert lens.sum() == 0


def test_contiguous_cache(device: str) -> None:
    """One page per (layer, sequence), as long as the longest sequence: plain indexing of [L, B, max_len, ...]."""
    layers, batch, max_len = 3, 2, 40
    k, v = (torch.randn(layers * batch, max_len, 2, 8, device=device) for _ in range(2))
    keep = int32([0, 5, 6, 7, 39], device)
    expected = k[:, keep.long()].clone()
    lens = torch.full((layers, batch), max_len, dtype=torch.int32, device=device)
    table = ops.contiguous_block_table(layers, batch, device)
    ops.kv_compact_(k, v, table, lens, keep.repeat(layers * batch), cumulative([5] * layers * batch, device))
    assert torch.equal(k[:, :5], expected)
    assert lens.flatten().tolist() == [5] * layers * batch


def test_first_layers_only(device: str) -> None:
    """Slices of the tables compact the early layers and leave the others alone."""
    args = make(device, torch.bfloat16, LENS, 16, 2, 64, 0.5)
    late = [rows_of(args, "k_pool", slot, LENS[1][slot - 3]).clone() for slot in (3, 4, 5)]
    count = args["keep_cu"][3]
    ops.kv_compact_(
        args["k_pool"],
        args["v_pool"],
        args["block_table"][:1],
        args["lens"][:1],
        args["keep"][:count],
        args["keep_cu"][:4],
    )
    assert args["lens"][1].tolist() == LENS[1]
    assert all(torch.equal(rows_of(args, "k_pool", s, LENS[1][s - 3]), late[s - 3]) for s in (3, 4, 5))


def test_ref_and_opcheck(device: str, dtype: torch.dtype) -> None:
    args = make(device, dtype, LENS, 16, 2, 8, 0.6)
    copy = {name: t.clone() for name, t in args.items()}
    torch.library.opcheck(torch.ops.dyvte.kv_compact_.default, tuple(args.values()), test_utils=OPCHECK)
    ops.kv_compact_(**args)
    ops.kv_compact_ref(**copy)
    for name, tensor in args.items():
        assert torch.equal(tensor, copy[name]), name


def test_errors(device: str) -> None:
    good = make(device, torch.float32, LENS, 16, 2, 8, 0.5)
    check_errors(
        ops.kv_compact_,
        good,
        [
            ("k_pool", good["k_pool"].transpose(1, 2), "_pool must"),
            ("k_pool", good["k_pool"].double(), ""),
            ("v_pool", good["v_pool"][1:], ""),
            ("v_pool", good["v_pool"].half(), ""),
            ("block_table", good["block_table"][0], ""),
            ("block_table", good["block_table"].long(), ""),
            ("lens", good["lens"][:1], ""),
            ("keep", good["keep"].long(), ""),
            ("keep_cu", good["keep_cu"][1:], ""),
        ],
    )


def test_index_values_on_cpu() -> None:
    good = make("cpu", torch.float32, [[10, 5]], 4, 1, 8, 1.0)
    before = good["k_pool"].clone()
    swapped, repeated, late = good["keep"].clone(), good["keep"].clone(), good["keep"].clone()
    swapped[3], repeated[3], late[-1] = 9, 2, 5
    check_errors(
        ops.kv_compact_,
        good,
        [
            ("keep", swapped, r"keep\[4\] must be in 10..9, got 4"),
            ("keep", repeated, r"keep\[3\] must be in 3..9, got 2"),
            ("keep", late, r"keep\[14\] must be in 4..4, got 5"),
            ("lens", int32([[99, 5]], "cpu"), r"lens\[0\] must be in 0..12, got 99"),
            ("keep_cu", int32([0, 11, 10], "cpu"), r"keep_cu\[2\] must be in 11..15, got 10"),
            ("block_table", good["block_table"] + 90, r"block_table\[0\] must be in"),
        ],
    )
    assert torch.equal(good["k_pool"], before)
