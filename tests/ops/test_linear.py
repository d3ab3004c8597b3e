"""linear: few rows times a weight, on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from dyvte_engine.kernels import ops

from .common import OPCHECK, assert_as_good_as_torch, check_errors


@pytest.mark.parametrize(
    "n,k", [(1, 1), (83, 7), (83, 64), (5, 83), (769, 33), (130, 1032), (96, 4096), (0, 8), (8, 0)]
)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 8, 16])
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


def test_rows_do_not_mix(dtype: torch.dtype) -> None:
    """A row's result is the same alone and among others, and on any number of threads."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 96).to(dtype), torch.randn(1200, 96).to(dtype)
    threads = torch.get_num_threads()
    try:
        together = []
        for n in (1, 3):
            torch.set_num_threads(n)
            together.append(ops.linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*together)
    assert torch.equal(together[0], torch.cat([ops.linear(row[None], weight) for row in x]))


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
