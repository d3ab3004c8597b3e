"""rms_norm, add_rms_norm_, silu_mul, layer_norm, add_layer_norm and quick_gelu_."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors

WIDTHS = [1, 7, 64, 83, 128, 769, 1032, 4096, 8192, 16392]


def llama_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """transformers' LlamaRMSNorm; in float64 without its roundings."""
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(inner)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(dtype) * x.to(dtype)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rms_norm(device: str, dtype: torch.dtype, rows: int, d: int) -> None:
    x = torch.randn(rows, d + 8, device=device).to(dtype)[:, :d]
    weight = torch.randn(d, device=device).to(dtype)
    out = ops.rms_norm(x, weight, 1e-5)
    assert out.is_contiguous() and out.dtype == dtype
    exact, own = (llama_norm(x, weight, 1e-5, t) for t in (torch.float64, dtype))
    assert_as_good_as_torch(out, own, exact)


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (3, 2, 5, 64), (0, 3, 64), (7, 1, 83)])
def test_rms_norm_shapes(device: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    assert_as_good_as_torch(
        ops.rms_norm(x, weight, 1e-6), *(llama_norm(x, weight, 1e-6, t) for t in (x.dtype, torch.float64))
    )


@pytest.mark.parametrize("rows,heads,d", [(5, 3, 64), (1, 8, 128), (7, 1, 83), (9, 4, 1)])
def test_rms_norm_of_heads(device: str, dtype: torch.dtype, rows: int, heads: int, d: int) -> None:
    """The q heads of a fused projection: two strides, no copy."""
    fused = torch.randn(rows, (heads + 2) * d, device=device).to(dtype)
    q = fused[:, : heads * d].view(rows, heads, d)
    weight = torch.randn(d, device=device).to(dtype)
    assert torch.equal(ops.rms_norm(q, weight, 1e-6), ops.rms_norm(q.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("shift", [0, 1])
def test_add_rms_norm(device: str, dtype: torch.dtype, shift: int, rows: int, d: int) -> None:
    """Shifted: no row of x begins at a multiple of 16 bytes."""
    x = torch.randn(rows, d + 16, device=device).to(dtype)[:, shift:][:, :d]
    residual = torch.randn(rows, d + 8, device=device).to(dtype)[:, :d]
    weight = torch.randn(d, device=device).to(dtype)
    total = residual + x
    out = ops.add_rms_norm_(residual, x, weight, 1e-5)
    assert torch.equal(residual, total)
    exact, own = (llama_norm(total, weight, 1e-5, t) for t in (torch.float64, dtype))
    assert_as_good_as_torch(out, own, exact)


def test_a_norm_of_a_sum_into_given_memory(device: str, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(s, device=device).to(dtype) for s in ((5, 4096), (5, 4096), (4096,)))
    twin, memory = residual.clone(), torch.zeros(7, 4096, device=device, dtype=dtype)
    out = ops.add_rms_norm_(residual, x, weight, 1e-5, memory[1:6])
    assert out.data_ptr() == memory[1].data_ptr()
    assert torch.equal(out, ops.add_rms_norm_(twin, x, weight, 1e-5)) and torch.equal(residual, twin)
    assert memory[0].count_nonzero() == 0 and memory[6].count_nonzero() == 0
    torch.library.opcheck(
        torch.ops.dyvte.add_rms_norm_into_.default, (residual, x, weight, 1e-5, memory[1:6]), test_utils=OPCHECK
    )
    good = {"residual": residual, "x": x, "weight": weight, "eps": 1e-5, "out": memory[1:6]}
    bad = [
        ("out", memory, ""),
        ("out", memory[1:6].double(), ""),
        ("out", torch.cat((memory, memory), 1)[1:6, :4096], ""),
    ]
    check_errors(ops.add_rms_norm_, good, bad)


def test_the_norm_is_of_the_rounded_sum(device: str) -> None:
    """As transformers has it: 256 + 0.9 is 256 in bfloat16, and its norm is exactly 1 in rows of equal numbers."""
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        residual = torch.full((3, 83), large, dtype=dtype, device=device)
        x = torch.full_like(residual, 0.9)
        out = ops.add_rms_norm_(residual, x, torch.ones_like(x[0]), 1e-5)
        assert (residual == large).all() and (out == 1).all()


@pytest.mark.parametrize("m", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_silu_mul(device: str, dtype: torch.dtype, rows: int, m: int) -> None:
    gate_up = (4 * torch.randn(rows, 2 * m + 8, device=device)).to(dtype)[:, : 2 * m]
    gate, up = gate_up.chunk(2, -1)
    out = ops.silu_mul(gate_up)
    assert out.shape == (rows, m)
    assert_as_good_as_torch(out, F.silu(gate) * up, F.silu(gate.double()) * up.double())


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("shift", [0, 1])
def test_add_layer_norm(device: str, dtype: torch.dtype, shift: int, rows: int, d: int) -> None:
    """Rows that are far from zero: their mean is taken out before squares are summed."""
    x = (torch.randn(rows, d + 16, device=device) + 3).to(dtype)[:, shift:][:, :d]
    y = torch.randn(rows, d + 8, device=device).to(dtype)[:, :d]
    weight, bias = (torch.randn(d, device=device).to(dtype) for _ in range(2))
    total, out = ops.add_layer_norm(x, y, weight, bias, 1e-5)
    assert torch.equal(total, x + y) and out.is_contiguous()
    parts = total, (d,), weight, bias
    exact = F.layer_norm(*(t if isinstance(t, tuple) else t.double() for t in parts), 1e-5)
    assert_as_good_as_torch(out, F.layer_norm(*parts, 1e-5), exact)
    assert_as_good_as_torch(ops.layer_norm(total, weight, bias, 1e-5), F.layer_norm(*parts, 1e-5), exact)


@pytest.mark.parametrize("shape", [(0,), (1,), (5, 83), (3, 7, 64), (5, 4096)])
def test_quick_gelu(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (4 * torch.randn(shape, device=device)).to(dtype)
    exact, own = (t * torch.sigmoid(1.702 * t) for t in (x.double(), x))
    assert ops.quick_gelu_(x) is x
    assert_as_good_as_torch(x, own, exact)


@pytest.mark.parametrize("d", [64, 1024, 5128, 9000])
def test_layer_norm_of_equal_channels(device: str, d: int) -> None:
    """However large they are, rounding makes their variance no negative number, which has no root."""
    x = torch.logspace(0, 15, 61, device=device)[:, None].expand(61, d).contiguous()
    bias = torch.randn(d, device=device)
    for out in (ops.layer_norm(x, x[0], bias, 1e-5), ops.add_layer_norm(x, x, x[0], bias, 1e-5)[1]):
        assert out.isfinite().all()


def test_extreme_values(device: str) -> None:
    x = torch.tensor([[-3e38, -88.0, 0.0, 88.0, 300.0, torch.inf, torch.nan, -5e-39] + [1.0] * 8], device=device)
    out = ops.silu_mul(x)
    torch.testing.assert_close(out, F.silu(x[:, :8]) * x[:, 8:], equal_nan=True)
    torch.testing.assert_close(ops.quick_gelu_(x.clone()), x * torch.sigmoid(1.702 * x), equal_nan=True)
    big = torch.full((2, 64), 3e4, device=device, dtype=torch.float16)
    torch.testing.assert_close(ops.rms_norm(big, torch.ones_like(big[0]), 1e-5), torch.ones_like(big))


def test_refs_and_opcheck(device: str, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(s, device=device).to(dtype) for s in ((5, 83), (5, 83), (83,)))
    twin, tolerance = residual.clone(), {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    even = x[:, :82].contiguous()
    checks = [
        ("rms_norm", (x, weight, 1e-5)),
        ("add_rms_norm_", (residual, x, weight, 1e-5)),
        ("silu_mul", (even,)),
        ("layer_norm", (x, weight, weight, 1e-5)),
        ("add_layer_norm", (residual, x, weight, weight, 1e-5)),
        ("quick_gelu_", (x.clone(),)),
    ]
    for name, args in checks:
        torch.library.opcheck(getattr(torch.ops.dyvte, name).default, args, test_utils=OPCHECK)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), ops.rms_norm_ref(x, weight, 1e-5), **tolerance)
    torch.testing.assert_close(
        ops.add_rms_norm_(residual, x, weight, 1e-5), ops.add_rms_norm_ref(twin, x, weight, 1e-5), **tolerance
    )
    assert torch.equal(residual, twin)
    torch.testing.assert_close(ops.silu_mul(even), ops.silu_mul_ref(even), **tolerance)
    norm = weight, weight, 1e-5
    torch.testing.assert_close(ops.layer_norm(x, *norm), ops.layer_norm_ref(x, *norm), **tolerance)
    torch.testing.assert_close(ops.add_layer_norm(x, twin, *norm), ops.add_layer_norm_ref(x, twin, *norm), **tolerance)
    torch.testing.assert_close(ops.quick_gelu_(x.clone()), ops.quick_gelu_ref(x.clone()), **tolerance)


def test_errors(device: str) -> None:
    x, weight = torch.randn(5, 64, device=device), torch.randn(64, device=device)
    good = {"x": x, "weight": weight, "eps": 1e-5}
    bad = [
        ("x", x[:, :63], "weight must"),
        ("x", x.double(), ""),
        ("x", x.t().contiguous().t(), ""),
        ("x", torch.randn(4, 5, 6, 7, 128, device=device)[::2, ::2, ::2, ::2, ::2][..., :64], ""),
        ("weight", weight[1:], ""),
        ("weight", weight.half(), ""),
    ]
    check_errors(ops.rms_norm, good, bad)
    check_errors(
        ops.add_rms_norm_, good | {"residual": x.clone()}, [("residual", x[1:].clone(), ""), ("residual", x.half(), "")]
    )
    bad += [("x", x[0], ""), ("bias", weight[1:], ""), ("bias", x, ""), ("bias", weight.half(), "")]
    check_errors(ops.layer_norm, good | {"bias": weight}, bad)
    check_errors(
        ops.add_layer_norm,
        good | {"y": x, "bias": weight},
        [*bad, ("y", x[1:], ""), ("y", x.half(), ""), ("y", x.t(), "")],
    )
    check_errors(ops.quick_gelu_, {}, [("x", x.t(), ""), ("x", x.double(), "")])
    check_errors(ops.silu_mul, {}, [("gate_up", x[0], ""), ("gate_up", x[:, :63], ""), ("gate_up", x.t(), "")])
