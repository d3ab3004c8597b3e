"""The products of a decoding step: the kernels on a GPU, and everywhere what `ref.py` says of them, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors, int32, page_table

EPS, MAX_POS = 1e-5, 211
CUDA_ONLY = [pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = [1, 2, 3, 5, 8]


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def weights(device: str, dtype: torch.dtype, rows: int, n: int, k: int, bias: bool) -> dict:
    """x and weight with strides of their own."""
    x, weight = torch.randn(rows, k + 8), torch.randn(n, k + 16) / k**0.5
    made = {"x": x, "norm": 1 + torch.randn(k) / 4, "weight": weight, "bias": torch.randn(n)}
    made = {name: t.to(device, dtype) for name, t in made.items()}
    made["x"], made["weight"] = made["x"][:, :k], made["weight"][:, :k]
    return made if bias else made | {"bias": None}


def norm_of(args: dict, dtype: torch.dtype) -> Tensor:
    """Rounded twice, as Llama's."""
    return F.rms_norm(args["hidden"].to(dtype), args["norm"].shape, None, EPS) * args["norm"].to(dtype)


def product(x: Tensor, args: dict, dtype: torch.dtype) -> Tensor:
    bias = args["bias"]
    return F.linear(x, args["weight"].to(dtype), None if bias is None else bias.to(dtype))


def entry(device: str, dtype: torch.dtype, rows: int, n: int, k: int, bias: bool) -> dict:
    made = weights(device, dtype, rows, n, k, bias)
    return {"hidden": made["x"], "norm": made["norm"], "eps": EPS, "weight": made["weight"], "bias": made["bias"]}


SHAPES = [(8, 8), (83, 72), (640, 256), (1000, 1032), (2816, 1024)]  # halves of a tile, and channels that end in one


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m,k", SHAPES)
def test_norm_gate_up(device, dtype, rows, m, k, bias) -> None:
    args = entry(device, dtype, rows, 2 * m, k, bias)
    out = (ops.norm_gate_up_ref if device == "cpu" else ops.norm_gate_up)(**args)
    assert out.shape == (rows, m) and out.dtype == dtype and out.is_contiguous()

    def plain(dtype: torch.dtype) -> Tensor:
        gate, up = product(norm_of(args, dtype), args, dtype).chunk(2, dim=-1)
        return F.silu(gate) * up

    assert_as_good_as_torch(out, plain(dtype), plain(torch.float64))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n,k", SHAPES)
def test_norm_linear(device, dtype, rows, n, k) -> None:
    """Unrounded: the error is that of rounding what is multiplied."""
    args = entry(device, dtype, rows, n, k, n % 2 == 1)
    out = (ops.norm_linear_ref if device == "cpu" else ops.norm_linear)(**args)
    assert out.shape == (rows, n) and out.dtype == torch.float32
    exact, rounded = (product(norm_of(args, t).double(), args, torch.float64) for t in (torch.float64, dtype))
    assert (out - exact).abs().max() <= 2 * (rounded - exact).abs().max() + 1e-4


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n,k", [(1, 8), (83, 72), (1024, 2816), (1000, 4104)])
def test_add_linear(device, dtype, rows, n, k, bias) -> None:
    args = weights(device, dtype, rows, n, k, bias)
    del args["norm"]
    wide = torch.randn(rows, n + 3).to(device, dtype)
    before, residual = wide.clone(), wide[:, :n]
    (ops.add_linear_ref if device == "cpu" else ops.add_linear_)(residual=residual, **args)

    def plain(dtype: torch.dtype) -> Tensor:
        return before[:, :n].to(dtype) + product(args["x"].to(dtype), args, dtype)

    assert_as_good_as_torch(residual, plain(dtype), plain(torch.float64))
    assert torch.equal(wide[:, n:], before[:, n:])


def qkv(device: str, dtype: torch.dtype, rows: int, heads: tuple[int, int], dim: int, k: int, bias: bool) -> dict:
    hq, hkv = heads
    page, lens = 16, torch.randint(0, 47, (rows,)).tolist()
    table = page_table(rows, 4, device)[:, :3]
    pools = {n: torch.randn(rows * 4, page, hkv, dim).to(device, dtype) for n in ("k_pool", "v_pool")}
    rest = {
        "cos_sin": torch.randn(MAX_POS, dim, device=device),
        "positions": int32([7 * b for b in range(rows)], device),
    }
    cache = {**pools, "block_table": table, "lens": int32(lens, device)}
    return {**entry(device, dtype, rows, (hq + 2 * hkv) * dim, k, bias), **rest, **cache}


def turned(args: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in `dtype`."""
    hkv, dim = args["k_pool"].shape[2:]
    heads = product(norm_of(args, dtype), args, dtype).unflatten(1, (-1, dim))
    q, k, v = heads.split((heads.shape[1] - 2 * hkv, hkv, hkv), dim=1)
    cos, sin = (t.to(dtype)[:, None].repeat(1, 1, 2) for t in args["cos_sin"][args["positions"].long()].chunk(2, 1))
    q, k = (t * cos + torch.cat((-t[..., dim // 2 :], t[..., : dim // 2]), -1) * sin for t in (q, k))
    return q, k, v


HEADS = [((2, 2), 64, 128), ((6, 2), 80, 264), ((3, 1), 96, 72), ((8, 8), 128, 1024), ((28, 4), 128, 3584)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads,dim,k", [*HEADS, ((1, 1), 16, 8)])
def test_norm_qkv_append(device, dtype, rows, heads, dim, k, bias) -> None:
    args = qkv(device, dtype, rows, heads, dim, k, bias)
    before = {name: args[name].clone() for name in ("k_pool", "v_pool")}
    q = (ops.norm_qkv_append_ref if device == "cpu" else ops.norm_qkv_append_)(**args)
    own, exact = turned(args, dtype), turned(args, torch.float64)
    assert q.dtype == dtype and q.is_contiguous()
    assert_as_good_as_torch(q, own[0], exact[0])
    lens = args["lens"].long()
    at = args["block_table"].long().gather(1, (lens // 16)[:, None])[:, 0], lens % 16
    for name, low, high in zip(before, own[1:], exact[1:]):
        assert_as_good_as_torch(args[name][at], low, high)
        before[name][at] = args[name][at]
        assert torch.equal(args[name], before[name]), "something else was written"


def test_a_layer_of_them_equals_the_usual_kernels(dtype: torch.dtype) -> None:
    """What `ref.py` says, on a CPU, against the ops that a layer usually is made of."""
    torch.manual_seed(0)
    args = qkv("cpu", dtype, 3, (6, 2), 64, 256, True)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    usual, hidden = {name: args[name].clone() for name in ("k_pool", "v_pool")}, args["hidden"].contiguous()
    x = ops.rms_norm(hidden, args["norm"], EPS)
    q, k, v = ops.linear(x, args["weight"], args["bias"]).view(3, -1, 64).split((6, 2, 2), dim=1)
    cu = int32([0, 1, 2, 3], "cpu")
    ops.rope_append_(
        q, k, v, args["cos_sin"], args["positions"], cu, *usual.values(), args["block_table"], args["lens"]
    )
    torch.testing.assert_close(ops.norm_qkv_append_ref(**args), q, **tolerance)
    for name, pool in usual.items():
        torch.testing.assert_close(args[name], pool, **tolerance)

    up, down = entry("cpu", dtype, 3, 160, 256, False), weights("cpu", dtype, 3, 256, 80, True)
    inner = ops.silu_mul(ops.linear(ops.rms_norm(hidden, up["norm"], EPS), up["weight"]))
    torch.testing.assert_close(ops.norm_gate_up_ref(**(up | {"hidden": hidden})), inner, **tolerance)
    want = hidden + ops.linear(inner, down["weight"], down["bias"])
    ops.add_linear_ref(hidden, inner, down["weight"], down["bias"])
    torch.testing.assert_close(hidden, want, **tolerance)
    logits = ops.linear(ops.rms_norm(hidden, up["norm"], EPS), up["weight"]).float()
    torch.testing.assert_close(ops.norm_linear_ref(hidden, up["norm"], EPS, up["weight"]), logits, **tolerance)


@pytest.mark.parametrize("device", CUDA_ONLY)
@pytest.mark.parametrize("rows", [1, 8])
def test_behind_each_other_as_one_by_one(device: str, dtype: torch.dtype, rows: int) -> None:
    """Each begins early where the GPU can, and reads what the one before wrote; also captured, as in a step."""
    torch.manual_seed(0)
    first = torch.randn(rows, 1024).to(device, dtype)
    layers = [
        (entry(device, dtype, rows, 2 * 2816, 1024, False), weights(device, dtype, rows, 1024, 2816, False)["weight"])
        for _ in range(6)
    ]

    def step(x: Tensor, wait: bool = False) -> Tensor:
        for up, down in layers:
            inner = ops.norm_gate_up(x, up["norm"], EPS, up["weight"])
            if wait:
                torch.cuda.synchronize()
            ops.add_linear_(x, inner, down)
            if wait:
                torch.cuda.synchronize()
        return x

    want, x = step(first.clone(), wait=True), first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x)
    for _ in range(50):
        assert torch.equal(step(first.clone()), want)
        x.copy_(first)
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    args = entry(device, dtype, 3, 32, 64, True)
    torch.library.opcheck(torch.ops.dyvte.norm_gate_up.default, tuple(args.values()), test_utils=OPCHECK)
    torch.library.opcheck(torch.ops.dyvte.norm_linear.default, tuple(args.values()), test_utils=OPCHECK)
    add = weights(device, dtype, 3, 32, 64, True)
    add = (torch.zeros(3, 32).to(device, dtype), add["x"], add["weight"], add["bias"])
    torch.library.opcheck(torch.ops.dyvte.add_linear_.default, add, test_utils=OPCHECK)
    args = qkv(device, dtype, 3, (4, 2), 64, 64, True)
    torch.library.opcheck(torch.ops.dyvte.norm_qkv_append_.default, tuple(args.values()), test_utils=OPCHECK)


def test_shapes_without_data() -> None:
    args = qkv("meta", torch.bfloat16, 3, (4, 2), 64, 128, True)
    assert ops.norm_qkv_append_(**args).shape == (3, 4, 64)
    gate = {name: args[name] for name in ("hidden", "norm", "eps", "weight", "bias")}
    assert ops.norm_gate_up(**gate).shape == (3, 256)
    assert ops.norm_linear(**gate).dtype == torch.float32


def test_a_cpu_is_refused(dtype: torch.dtype) -> None:
    args = entry("cpu", dtype, 1, 16, 8, False)
    check_errors(ops.norm_gate_up, args, [("hidden", args["hidden"], "hidden must be on CUDA")])


@pytest.mark.parametrize("device", CUDA_ONLY)
def test_errors(device: str) -> None:
    good = entry(device, torch.bfloat16, 3, 32, 64, True)
    wide = torch.zeros(3, 65, device=device, dtype=torch.bfloat16)
    bad = [
        ("hidden", good["hidden"].float(), "hidden must be float16 or bfloat16"),
        ("hidden", good["hidden"].half(), "weight must"),
        ("hidden", good["hidden"].repeat(3, 1), ""),
        ("hidden", wide[:, :64], ""),
        ("hidden", wide[:, 1:], ""),
        ("norm", good["norm"][1:], ""),
        ("weight", good["weight"][:31], "weight must|bias must"),
        ("weight", good["weight"][:, :63], ""),
        ("bias", good["bias"][1:], ""),
    ]
    check_errors(ops.norm_gate_up, good, bad)
    good = qkv(device, torch.bfloat16, 3, (4, 2), 64, 64, False)
    bad = [
        ("cos_sin", good["cos_sin"][:, :32], ""),
        ("positions", good["positions"][1:], ""),
        ("lens", good["lens"].long(), ""),
        ("block_table", good["block_table"][1:], ""),
        ("k_pool", good["k_pool"][..., :56].contiguous(), "v_pool must"),
        ("weight", good["weight"][:250], ""),
    ]
    check_errors(ops.norm_qkv_append_, good, bad)
