"""What the op tests share: packed lengths, page tables, and the two ways of comparing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def int32(values: Sequence[int] | Sequence[Sequence[int]], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def cumulative(lengths: Sequence[int], device: str) -> Tensor:
    return int32([0, *accumulate(lengths)], device)


def page_table(slots: int, max_pages: int, device: str) -> Tensor:
    """Distinct pages in random order, int32 [slots, max_pages]."""
    return torch.randperm(slots * max_pages).to(torch.int32).view(slots, max_pages).to(device)


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice torch's own in the same dtype, plus one rounding of the result."""
    assert ours.shape == exact.shape
    if ours.numel() == 0:
        return
    error, torch_error = ((t.double() - exact).abs().max().item() for t in (ours, torchs))
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= 2 * torch_error + rounding, f"error {error:.3g}, torch's {torch_error:.3g}, rounding {rounding:.3g}"


def check_errors(call: Callable[..., object], good: dict[str, object], bad: list[tuple[str, object, str]]) -> None:
    """Each (argument, value, words) put into `good` raises RuntimeError with the words, or else '<argument> must'."""
    for name, value, words in bad:
        with pytest.raises(RuntimeError, match=words or rf"\b{name} must"):
            call(**{**good, name: value})
