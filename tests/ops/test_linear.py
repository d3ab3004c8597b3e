"""linear: rows times a weight, on the CPU."""

import sys

import pytest
import torch
import torch.nn.functional as F

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors


@pytest.mark.parametrize(
    "n,k", [(1, 1), (83, 7), (83, 64), (5, 83), (769, 33), (130, 1032), (96, 4096), (0, 8), (8, 0)]
)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 16, 24, 83, 135])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, rows: int, n: int, k: int, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, k + 8).to(dtype)[:, :k]
    weight = (torch.randn(n, k + 3) / max(k, 1) ** 0.5).to(dtype)[:, :k]
    b = torch.randn(n).to(dtype) if bias else None
    out = ops.linear(x, weight, b)
    assert out.shape == (rows, n) and out.dtype == dtype and out.is_contiguous()
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert_as_good_as_torch(out, F.linear(x, weight, b), exact)


@pytest.mark.parametrize("rows", [*range(1, 10), 16, 17, 24, 25, 33, 41, 49, 65, 97, 128, 129, 200, 300])
def test_every_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    """Each division into panels, and a depth of several blocks with a rest."""
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 2305).to(dtype), (torch.randn(101, 2305) / 48).to(dtype)
    assert_as_good_as_torch(ops.linear(x, weight), F.linear(x, weight), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("rows", [2, 7, 13, 24, 40, 61, 128])
def test_rows_do_not_mix(dtype: torch.dtype, rows: int) -> None:
    """A row's result is the same whatever the others are, wherever it is among equals, and on any number of threads."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 97).to(dtype), torch.randn(1200, 97).to(dtype)
    threads = torch.get_num_threads()
    try:
        together = []
        for n in (1, 3):
            torch.set_num_threads(n)
            together.append(ops.linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*together)
    others = x.clone()
    others[1::2] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0]).to(dtype)[torch.arange(97) % 5]
    assert torch.equal(ops.linear(others, weight)[::2], together[0][::2])


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_spread(dtype: torch.dtype, rows: int, value: float) -> None:
    """As in torch: from x into its row, from the weight into its column, whichever element it is."""
    for at in (0, 31, 82):
        x, weight = torch.ones(rows, 83, dtype=dtype), torch.ones(40, 83, dtype=dtype)
        x[rows // 2, at] = weight[33, at] = value
        torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight), equal_nan=True)


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not multiply in panels, few rows means a dozen."""
    for panels, want in ((False, [16, 16, 4, 10, 4, 10]), (True, [96, sys.maxsize, 96, 128, 4, 10])):
        monkeypatch.setattr(ops, "_in_panels", lambda panels=panels: panels)
        types = (torch.float32, torch.bfloat16, torch.float16)
        assert [ops.few_rows(t, 4096, packed) for t in types for packed in (True, False)] == want
    assert [ops.few_rows(torch.bfloat16, k, packed=True) for k in (256, 1024)] == [16, 64]
    assert ops.few_rows(torch.bfloat16, 256) == 48


def test_ref_and_opcheck(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).div(3).to(dtype) for s in ((5, 83), (64, 83), (64,)))
    for args in ((x, weight, bias), (x, weight, None)):
        torch.library.opcheck(torch.ops.dyvte.linear.default, args, test_utils=OPCHECK)
        tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
        torch.testing.assert_close(ops.linear(*args), ops.linear_ref(*args), **tolerance)


def test_errors() -> None:
    x, weight, bias = torch.randn(5, 64), torch.randn(32, 64), torch.randn(32)
    bad = [
        ("x", x[0], ""),
        ("x", x[:, :63], "weight must"),
        ("x", x.double(), ""),
        ("x", x.half(), "weight must"),
        ("x", torch.randn(64, 5).t(), ""),
        ("weight", weight[0], ""),
        ("weight", weight.t().contiguous().t(), ""),
        ("bias", bias[1:], ""),
        ("bias", bias.half(), ""),
    ]
    check_errors(ops.linear, {"x": x, "weight": weight, "bias": bias}, bad)


@pytest.mark.gpu
def test_refuses_cuda() -> None:
    x = torch.randn(2, 64, device="cuda")
    check_errors(ops.linear, {"x": x, "weight": x}, [("x", x, "x must be on the CPU")])


PANELS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "stored"), PANELS)
@pytest.mark.parametrize(
    "n,k", [(1, 1), (83, 7), (64, 64), (50, 83), (769, 33), (130, 1032), (96, 4097), (0, 8), (8, 0)]
)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 13, 24, 96, 199])
@pytest.mark.parametrize("bias", [False, True])
def test_in_panels(dtype: torch.dtype, stored: torch.dtype, rows: int, n: int, k: int, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(199, k + 8).to(dtype)[:, :k]  # torch's error is that of all, which depends less on luck
    weight = (torch.randn(n, k + 3) / max(k, 1) ** 0.5).to(stored)[:, :k].to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    panels = ops.in_panels(weight)
    assert panels.dtype == stored or not weight.numel()
    out = ops.packed_linear(x[:rows], panels, b, n)
    assert out.shape == (rows, n) and out.dtype == dtype and out.is_contiguous()
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    theirs = F.linear(x, weight, b)
    assert_as_good_as_torch(torch.cat((out, theirs[rows:])), theirs, exact)
    torch.testing.assert_close(ops.packed_linear_ref(x, panels, b, n).double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("dtype", "stored"), PANELS)
@pytest.mark.parametrize("m,k", [(1, 1), (32, 64), (83, 7), (640, 256), (45, 1500), (0, 8), (8, 0)])
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 24, 100])
def test_gated_panels(dtype: torch.dtype, stored: torch.dtype, rows: int, m: int, k: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(100, k).to(dtype), (2 * torch.randn(2 * m, k) / max(k, 1) ** 0.5).to(stored).to(dtype)
    panels = ops.in_panels(weight, gated=True)
    out = ops.packed_silu_mul(x[:rows], panels, m)
    theirs, exact = (F.silu(gate) * up for gate, up in (F.linear(t, w).chunk(2, dim=1) for t, w in
                     ((x, weight), (x.double(), weight.double()))))  # fmt: skip
    assert out.shape == (rows, m) and out.dtype == dtype and out.is_contiguous()
    assert_as_good_as_torch(torch.cat((out, theirs[rows:])), theirs, exact)
    assert_as_good_as_torch(ops.packed_silu_mul_ref(x, panels, m), theirs, exact)
    alone = [ops.packed_silu_mul(row[None], panels, m) for row in x[:rows]]
    assert torch.equal(torch.cat([out[:0], *alone]), out)


@pytest.mark.parametrize(("dtype", "stored"), PANELS)
@pytest.mark.parametrize("k", [97, 1500])
def test_panels_know_no_other_rows(dtype: torch.dtype, stored: torch.dtype, k: int) -> None:
    """Bit for bit: alone or among others of any kind and number, on any number of threads."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, k).to(dtype), torch.randn(700, k).to(stored).to(dtype)
    panels, threads = ops.in_panels(weight), torch.get_num_threads()
    alone = torch.cat([ops.packed_linear(row[None], panels, None, 700) for row in x])
    others = x.clone()
    others[1::2] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 0.0]).to(dtype)[torch.arange(k) % 5]
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.packed_linear(others, panels, None, 700)[::2], alone[::2])
            for first, last in ((0, 2), (3, 10), (20, 115), (0, 200)):
                assert torch.equal(ops.packed_linear(x[first:last], panels, None, 700), alone[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("dtype", "stored"), PANELS)
def test_nan_and_infinity_spread_through_panels(dtype: torch.dtype, stored: torch.dtype, value: float) -> None:
    """The zeros beside a last odd element meet nothing."""
    for at in (0, 31, 82):
        x, weight = torch.ones(5, 83, dtype=dtype), torch.full((40, 83), 1.0 if stored != dtype else 1.1).to(dtype)
        x[2, at] = weight[33, at] = value
        out = ops.packed_linear(x, ops.in_panels(weight), None, 40)
        torch.testing.assert_close(out, F.linear(x, weight), equal_nan=True, rtol=1e-2, atol=1e-2)


def test_panels_keep_every_number() -> None:
    """As bfloat16 if that has all of them, subnormal ones too; else as they are."""
    torch.manual_seed(0)
    weight = torch.randn(70, 9).bfloat16().float()
    weight[0, :4] = torch.tensor([1e-40, -1e-40, 3e38, 0.0]).bfloat16().float()
    assert ops.in_panels(weight).dtype == torch.bfloat16
    units = torch.eye(9)
    assert torch.equal(ops.packed_linear(units, ops.in_panels(weight), None, 70), weight.t())
    weight[69, 8] *= 1 + 2**-12
    assert ops.in_panels(weight).dtype == torch.float32
    assert torch.equal(ops.packed_linear(units, ops.in_panels(weight), None, 70)[8], weight[:, 8])
    weight[3, 3] = torch.nan
    assert ops.in_panels(weight).dtype == torch.float32, "which equals no number"


def test_where_panels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    types = (torch.float32, torch.bfloat16, torch.float16)
    for isa, want in (("avx2", (False,) * 3), ("avx512", (True, False, False)), ("avx512_bf16", (True, True, False))):
        monkeypatch.setattr(ops, "build_info", lambda isa=isa: {"cpu_isa": isa})
        for intel in (False, True):
            monkeypatch.setattr(ops, "intel", lambda intel=intel: intel)
            assert tuple(map(ops.multiplies_panels, types)) == (want if not intel else (False,) * 3)


def test_panels_opcheck_and_errors() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 83), torch.randn(70, 83), torch.randn(70)
    panels, half = ops.in_panels(weight), ops.in_panels(weight.bfloat16())
    for args in ((x, panels, bias, 70), (x, half, None, 70), (x.bfloat16(), half, bias.bfloat16(), 70)):
        torch.library.opcheck(torch.ops.dyvte.packed_linear.default, args, test_utils=OPCHECK)
    gated = ops.in_panels(weight, gated=True)
    torch.library.opcheck(torch.ops.dyvte.packed_silu_mul.default, (x, gated, 35), test_utils=OPCHECK)
    check_errors(ops.packed_silu_mul, {"x": x, "weight": gated, "n": 35}, [("n", 65, "weight must"), ("x", x[0], "")])
    bad = [
        ("x", x[0], ""),
        ("x", x[:, :81], "weight must"),
        ("x", x.half(), "x must be float32 or bfloat16"),
        ("x", x.bfloat16(), "weight must be bfloat16, got float32"),
        ("x", torch.randn(83, 5).t(), ""),
        ("weight", panels.half(), "weight must be bfloat16 or float32"),
        ("weight", half[..., 0], ""),
        ("weight", panels.transpose(1, 2).contiguous().transpose(1, 2), ""),
        ("bias", bias[1:], ""),
        ("n", 129, "weight must"),
        ("n", 64, "weight must"),
        ("n", -1, "n must not be negative"),
    ]
    check_errors(ops.packed_linear, {"x": x, "weight": panels, "bias": bias, "n": 70}, bad)
