"""A decoding step's rotation, appending and attention in one kernel: what `ref.py` says everywhere, itself on a GPU."""

import pytest
import torch
from torch import Tensor

from dyvte_engine.kernels import ops

from . import test_decode_attention
from .common import OPCHECK, assert_as_good_as_torch, check_errors, int32
from .test_rope_append import MAX_POS, rotated, turns

CUDA_ONLY = [pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [  # rows in the cache, heads, their size, rotated channels, rows of a page
    ([0], (2, 2), 64, 64, 16),
    ([639], (40, 40), 128, 128, 64),
    ([130], (32, 32), 128, 128, 16),
    ([0, 83, 7, 520], (8, 2), 64, 64, 16),
    ([15, 16, 31, 32, 63, 64, 2000, 0], (28, 4), 128, 128, 64),
    ([769, 1, 300], (7, 1), 128, 128, 256),
    ([40, 2200], (18, 2), 80, 32, 7),
    ([64, 512, 513], (2, 1), 256, 256, 32),
    ([40, 513, 5], (9, 1), 83, 82, 4096),
    ([37, 2], (3, 1), 7, 0, 8),
    ([5], (1, 1), 1, 0, 1),
    ([63, 0, 700], (6, 2), 96, 96, 16),
    ([300, 0], (10, 2), 64, 32, 64),
    ([129], (16, 1), 128, 64, 3),
]
NARROW = [  # only the new rows keep these from 16-byte accesses: other blocks than those of two kernels
    ([300, 0, 16], (10, 2), 64, 18, 16),
    ([63, 700], (7, 1), 128, 2, 64),
]


def make(
    device: str, dtype: torch.dtype, lens: list[int], heads: tuple[int, int], dim: int, rot_dim: int, page: int
) -> dict:
    (hq, hkv), batch = heads, len(lens)
    cache = test_decode_attention.make(device, dtype, [n + 1 for n in lens], heads, dim, page)
    qkv = torch.randn(batch, hq + 2 * hkv, dim, device=device).to(dtype)  # one fused projection
    q, k, v = qkv.split((hq, hkv, hkv), dim=1)
    cos_sin = turns(rot_dim, device)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos_sin": cos_sin,
        "positions": torch.randint(0, MAX_POS, (batch,)).to(device, torch.int32),
        **{name: cache[name] for name in ("k_pool", "v_pool", "block_table")},
        "lens": int32(lens, device),
        "scale": cache["scale"],
        "arrived": int32([0] * (batch * hq), device),
    }


def copied(args: dict) -> dict:
    return {n: t.clone() if isinstance(t, Tensor) else t for n, t in args.items()}


def in_two(args: dict) -> Tensor:
    """By the two kernels; writes into `args`."""
    cu = torch.arange(len(args["q"]) + 1, dtype=torch.int32, device=args["q"].device)
    pools = [args[n] for n in ("k_pool", "v_pool", "block_table")]
    ops.rope_append_(*(args[n] for n in ("q", "k", "v", "cos_sin", "positions")), cu, *pools, args["lens"])
    return ops.decode_attention(args["q"], *pools, args["lens"] + 1, args["scale"])


def misaligned(rows: Tensor) -> Tensor:
    """Equal rows, of which none begins at a multiple of 16 bytes."""
    memory = rows.new_empty(len(rows), rows[0].numel() + 8)[:, 1:-7]
    return memory.copy_(rows.flatten(1)).unflatten(1, rows.shape[1:])


@pytest.mark.parametrize("lens,heads,dim,rot_dim,page", CASES + NARROW)
def test_against_torch(device, dtype, lens, heads, dim, rot_dim, page) -> None:
    check_against_torch(make(device, dtype, lens, heads, dim, rot_dim, page))


@pytest.mark.parametrize("device", CUDA_ONLY)
@pytest.mark.parametrize("odd", ["q", "k", "v"])
@pytest.mark.parametrize("lens,heads,dim,rot_dim,page", CASES)
def test_addresses_at_odd_places(device, dtype, lens, heads, dim, rot_dim, page, odd) -> None:
    args = make(device, dtype, lens, heads, dim, rot_dim, page)
    check_against_torch(args | {odd: misaligned(args[odd])})


def check_against_torch(args: dict) -> None:
    given, lens, device, dtype = copied(args), args["lens"], args["q"].device, args["q"].dtype
    page = args["k_pool"].shape[1]
    on_cpu = device.type == "cpu"
    out = ops.rope_append_attention_ref(**args) if on_cpu else ops.rope_append_attention_(**args)
    assert out.dtype == dtype and out.is_contiguous()

    def plain(inner: torch.dtype) -> Tensor:
        pools = {n: given[n].to(inner) for n in ("k_pool", "v_pool")}
        b = torch.arange(len(lens), device=device)
        at = given["block_table"][b, given["lens"].long() // page].long(), given["lens"].long() % page
        pools["k_pool"][at], pools["v_pool"][at] = rotated(given["k"], given, inner), given["v"].to(inner)
        table = {"block_table": given["block_table"], "kv_lens": given["lens"] + 1, "scale": given["scale"]}
        return test_decode_attention.plain({"q": rotated(given["q"], given, inner), **pools, **table}, inner)

    assert_as_good_as_torch(out, plain(dtype), plain(torch.float64))


@pytest.mark.parametrize("device", CUDA_ONLY)
@pytest.mark.parametrize("lens,heads,dim,rot_dim,page", CASES)
def test_the_bits_of_two_kernels(device, dtype, lens, heads, dim, rot_dim, page) -> None:
    """Also when what was where the new rows go is no number; nothing else is written, and the counts are as before."""
    args = make(device, dtype, lens, heads, dim, rot_dim, page)
    two = copied(args)
    want = in_two(two)
    at = args["lens"].long()
    at = args["block_table"].long().gather(1, (at // page)[:, None])[:, 0], at % page
    for _ in range(10):
        before = copied(args)
        args["k_pool"][at], args["v_pool"][at] = torch.nan, torch.nan
        assert torch.equal(ops.rope_append_attention_(**args), want)
        for name in ("k_pool", "v_pool"):
            assert torch.equal(args[name], two[name])
        for name in ("q", "k", "v", "lens", "arrived"):
            assert torch.equal(args[name], before[name])


@pytest.mark.parametrize("device", CUDA_ONLY)
@pytest.mark.parametrize("heads", [(28, 4), (4, 4), (18, 2)])
def test_pages_that_several_have(device: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Full pages are only read. Slots that fill a batch up write one row of one page, and none reads another's."""
    args = make(device, dtype, [130, 64, 191, 0, 0, 0, 0, 0], heads, 128, 128, 64)
    table, page = args["block_table"], args["block_table"][3, 0].clone()
    table[1, :1], table[2, :2] = table[0, :1], table[0, :2]
    table[3:] = page
    shared = table[0, :2].long()
    two = copied(args)
    want = in_two(two)
    group = heads[0] // heads[1]
    for _ in range(20):
        for name in ("k_pool", "v_pool"):
            args[name][page] = torch.nan
        out = ops.rope_append_attention_(**args)
        assert torch.equal(out[:3], want[:3])
        assert torch.equal(out[3:], args["v"][3:].repeat_interleave(group, 1))
        for name in ("k_pool", "v_pool"):
            assert torch.equal(args[name][shared], two[name][shared])
            assert args[name][page, 1:].isnan().all() and args[name][page, 0].isfinite().all()


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_counts_that_calls_of_other_sizes_share(device: str) -> None:
    calls = [
        make(device, torch.bfloat16, lens, heads, 128, 128, 64)
        for lens, heads in (([600] * 8, (32, 32)), ([2000], (40, 40)), ([9, 800, 0], (28, 4)), ([0], (32, 8)))
    ]
    wants = [in_two(copied(args)) for args in calls]
    arrived = int32([0] * 256, device)
    for _ in range(10):
        for args, want in zip(calls, wants, strict=True):
            assert torch.equal(ops.rope_append_attention_(**args | {"arrived": arrived}), want)
    assert arrived.count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_between_other_work_of_a_stream(captured: bool, elsewhere: bool) -> None:
    """It begins behind what is no kernel, too, and what follows writes over its arguments only when it has ended."""
    args, other = (make("cuda", torch.bfloat16, [700, 3, 64], (28, 4), 128, 128, 64) for _ in range(2))
    want, given, side = in_two(copied(args)), copied(args), torch.cuda.Stream()
    names = ("q", "k", "v", "positions", "lens", "block_table")  # the last one by a copy, not a kernel

    def step() -> Tensor:
        stream = torch.cuda.current_stream()
        if elsewhere:
            side.wait_stream(stream)
        with torch.cuda.stream(side if elsewhere else stream):
            torch.cuda._sleep(2_000_000)  # the host is ahead
            for name in names:
                args[name].copy_(given[name])
        if elsewhere:
            stream.wait_stream(side)
        out = ops.rope_append_attention_(**args)
        for name in names:
            args[name].copy_(other[name])
        return out

    if captured:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    for _ in range(20):
        if captured:
            graph.replay()
        else:
            out = step()
        assert torch.equal(out, want)


@pytest.mark.gpu
def test_layers_in_a_graph() -> None:
    """As in a decoding step: products between the layers, other lengths in each, counts that all of them share."""
    layers, batch, heads, dim = 12, 3, (28, 4), 128
    sizes = [[(97 * layer + 211 * b) % 500 for b in range(batch)] for layer in range(layers)]
    calls = [make("cuda", torch.bfloat16, lens, heads, dim, dim, 64) for lens in sizes]
    weight = (torch.randn((heads[0] + 2 * heads[1]) * dim, heads[0] * dim, device="cuda") / 60).bfloat16()
    start = torch.randn(batch, heads[0] * dim, device="cuda").bfloat16()

    def step() -> list[tuple[Tensor, Tensor]]:
        arrived, x, steps = calls[0]["lens"].new_zeros(batch * heads[0]), start, []
        for args in calls:
            qkv = torch.nn.functional.linear(x, weight)
            q, k, v = qkv.view(batch, -1, dim).split((heads[0], heads[1], heads[1]), dim=1)
            x = ops.rope_append_attention_(**args | {"q": q, "k": k, "v": v, "arrived": arrived}).flatten(1)
            steps.append((qkv, x))
        return steps

    twins = [copied(args) for args in calls]
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps = step()
    for _ in range(10):
        start.normal_()
        graph.replay()
        for args, (qkv, x) in zip(twins, steps, strict=True):
            q, k, v = qkv.clone().view(batch, -1, dim).split((heads[0], heads[1], heads[1]), dim=1)
            assert torch.equal(in_two(args | {"q": q, "k": k, "v": v}).flatten(1), x)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("heads", [(32, 32), (40, 40), (28, 4), (32, 8)])
def test_steps_in_a_graph(batch: int, heads: tuple[int, int]) -> None:
    """Replays behind each other, each of which appends a row that the next ones read."""
    args = make("cuda", torch.bfloat16, [130 * b % 641 for b in range(batch)], heads, 128, 128, 64)
    pages = args["block_table"].shape[1] + 2
    args["block_table"] = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
    for name in ("k_pool", "v_pool"):
        args[name] = torch.randn(batch * pages, 64, heads[1], 128, device="cuda").bfloat16()
    two, rows = copied(args), torch.randn(40, *args["q"].shape, device="cuda").bfloat16()

    def step() -> Tensor:
        args["q"].mul_(1)  # a kernel that it begins behind
        out = ops.rope_append_attention_(**args)
        args["lens"] += 1
        return out

    lens = args["lens"].clone()
    step()
    args["lens"].copy_(lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for row in rows:
        args["q"].copy_(row)
        two["q"].copy_(row)
        two["k"].copy_(args["k"])
        graph.replay()
        want = in_two(two)
        two["lens"] += 1
        assert torch.equal(out, want)
    assert torch.equal(args["k_pool"], two["k_pool"]) and torch.equal(args["lens"], two["lens"])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_small_kernels_behind_each_other(dtype: torch.dtype, rows: int) -> None:
    """Each reads what the ones before it wrote, and writes nothing that these still read; also captured."""
    torch.manual_seed(0)
    first, weight = torch.randn(rows, 5120, device="cuda").to(dtype), torch.randn(5120, device="cuda").to(dtype)
    product = (torch.randn(10240, 5120, device="cuda") / 72).to(dtype)

    def layers(x: Tensor, wait: bool = False) -> Tensor:
        hidden, synchronize = x.clone(), torch.cuda.synchronize if wait else lambda: None
        for _ in range(20):
            x = ops.add_rms_norm_(hidden, x, weight, 1e-5)
            synchronize()
            x = torch.nn.functional.linear(x, product)
            synchronize()
            x = ops.silu_mul(x)
            synchronize()
            x = ops.rms_norm(x, weight, 1e-5)
            synchronize()
            x = ops.rms_norm(x.view(rows, 40, 128), weight[:128], 1e-5).flatten(1)
            synchronize()
        return x

    want = layers(first, wait=True)
    x, graph = first.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers(x)
    for _ in range(20):
        assert torch.equal(layers(first), want)
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    args = {n: t.contiguous() if isinstance(t, Tensor) else t for n, t in make(device, dtype, *CASES[3]).items()}
    torch.library.opcheck(torch.ops.dyvte.rope_append_attention_.default, tuple(args.values()), test_utils=OPCHECK)


def test_shapes_without_data() -> None:
    args = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in make("cpu", torch.bfloat16, *CASES[3]).items()}
    assert ops.rope_append_attention_(**args).shape == (4, 8, 64)


def test_a_cpu_is_refused() -> None:
    args = make("cpu", torch.float32, *CASES[3])
    check_errors(ops.rope_append_attention_, args, [("q", args["q"], "q must be on CUDA")])


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_an_empty_batch(device: str) -> None:
    args = make(device, torch.float32, [3], (4, 2), 64, 64, 16)
    by_row = ("q", "k", "v", "positions", "block_table", "lens")
    assert ops.rope_append_attention_(**args | {n: args[n][:0] for n in by_row}).shape == (0, 4, 64)


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_errors(device: str) -> None:
    good = make(device, torch.float32, [3, 2], (4, 2), 64, 64, 16)
    bad = [
        ("q", good["q"][..., :63], ""),
        ("q", good["q"].half(), "must have the dtype of q"),
        ("k", good["k"][1:], ""),
        ("k", good["k"].half(), ""),
        ("v", good["v"][:, :1], ""),
        ("cos_sin", good["cos_sin"].half(), ""),
        ("cos_sin", good["cos_sin"][:, :63].contiguous(), ""),
        ("positions", good["positions"][1:], ""),
        ("k_pool", good["k_pool"][:, :, :1].contiguous(), "v_pool must"),
        ("block_table", good["block_table"][1:], ""),
        ("lens", good["lens"].long(), ""),
        ("arrived", good["arrived"][1:], ""),
    ]
    check_errors(ops.rope_append_attention_, good, bad)
