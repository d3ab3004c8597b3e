"""Odd values: of wrong types, shapes, dtypes and sizes, and the same values in unusual forms."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_VALUES: list[Callable[[], Any]] = [
    *(lambda v=v: v for v in (None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, -(2**70))),
    *(lambda v=v: v for v in (0.0, 0.5, 1.0, -0.5, 1e300, 1e-300, math.nan, math.inf, -math.inf, 1j)),
    *(lambda v=v: v for v in ("", " ", "auto", "x", "0", "cpu", "<image>", "\0", "\ud800", "a" * 5000, b"x")),
    *(lambda v=v: v for v in ((), (0,), (None,), range(3), frozenset(), Path("."), Path("/nowhere"), Decimal("1.5"))),
    lambda: [], lambda: {}, lambda: [None], lambda: [[]], lambda: [[[]]], lambda: {"role": "user"}, lambda: [{}],
    lambda: ["w1", 2], lambda: [{"role": "user", "content": 3}], lambda: [{"role": 1, "content": [{"type": "image"}]}],
    lambda: [{"role": "user", "content": [{"type": "text"}]}], lambda: [{"role": "user", "content": [5]}],
    object, lambda: object, lambda: print, lambda: iter("ab"), lambda: (x for x in (1, 2)), lambda: {1, 2},
    lambda: np.int64(3), lambda: np.float32(0.5), lambda: np.array(["a"]), lambda: np.zeros((0, 3)),
    lambda: torch.tensor(3), lambda: torch.tensor(math.nan), lambda: torch.zeros(0), lambda: torch.ones(2, 3),
    lambda: torch.zeros(2, 64, device="meta"), lambda: torch.zeros(4, 64).to(torch.float8_e4m3fn),
    lambda: torch.zeros(3, 64, dtype=torch.complex64), lambda: torch.eye(64).to_sparse(), lambda: torch.float64,
    lambda: torch.float8_e4m3fn, lambda: torch.int8, lambda: torch.device("meta"), lambda: torch.nn.Linear(1, 1),
    lambda: Image.new("RGB", (9, 9)), lambda: Image.new("1", (1, 1)), lambda: [Image.new("L", (5, 300))],
]  # fmt: skip

# ways to hold the same numbers
_SAME: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2],
    lambda t: torch.cat([t, t])[: len(t)],
    lambda t: t.double() if t.is_floating_point() else t,
    lambda t: torch.nn.Parameter(t.clone(), requires_grad=t.is_floating_point()),
]

# other numbers or shapes, some of them accepted
_OTHER: list[Callable[[Tensor], Any]] = [
    lambda t: t[:0], lambda t: t[None], lambda t: t[0], lambda t: t[1:], lambda t: t.flip(0), lambda t: t.flatten(),
    lambda t: t.to("meta"), lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to(torch.float16), lambda t: t.int(),
    lambda t: t.to(torch.complex64), lambda t: t.bool(), lambda t: t.to(torch.uint8), lambda t: t.to_sparse(),
    lambda t: t * 1e30, lambda t: t + -(10**6), lambda t: t.float() * math.nan, lambda t: t.numpy(),
    lambda t: t[..., :3], lambda t: t.expand(2, *t.shape), lambda t: t[:1].expand(400, *t.shape[1:]),
    lambda t: t[:1].expand(2**40, *t.shape[1:]), lambda t: [t], lambda t: [t, t], lambda t: [t] * 9,
    lambda t: (t, None), lambda t: t.tolist(), lambda t: iter([t]),
       lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
]  # fmt: skip

_AROUND: list[Callable[[], Any]] = [
    *[contextlib.nullcontext] * 5,
    torch.inference_mode,
    torch.no_grad,
    torch.enable_grad,
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: torch.device("meta"),
    lambda: default_dtype(torch.float64),
    lambda: default_dtype(torch.float16),
]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def odd(rng: random.Random) -> Any:
    return rng.choice(_VALUES)()


def same(rng: random.Random, tensor: Tensor) -> Tensor:
    return rng.choice(_SAME)(tensor)


def other(rng: random.Random, tensor: Tensor) -> Any:
    return rng.choice(_OTHER)(tensor)


def around(rng: random.Random) -> Any:
    """A context of torch's that may be active when a user calls."""
    return rng.choice(_AROUND)()


def varied(rng: random.Random, valid: dict[str, Any], most: int = 2) -> dict[str, Any]:
    """`valid` with up to `most` of its entries replaced."""
    count = rng.randint(0, most)
    return valid | {name: odd(rng) for name in rng.sample(sorted(valid), min(count, len(valid)))}


def damaged(rng: random.Random, content: bytes) -> bytes:
    """A file's bytes, cut, with bytes changed, or with a stretch doubled."""
    kind, at = rng.randrange(4), rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[max(0, at - 20) :]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 40))):
        changed[rng.randrange(len(changed) if kind == 2 else min(len(changed), 300))] = rng.randrange(256)
    return bytes(changed)


def damaged_json(rng: random.Random, value: Any) -> Any:
    """A JSON value with one entry, somewhere, replaced or taken away."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: damaged_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_json(rng, value[at]), *value[at + 1 :]]
    numbers = (0, -1, 1, 7, 2**31, 2**63, 2**70, 0.5, 1e308)
    return rng.choice((None, True, "x", "", [], {}, [1, 2], {"a": 1}, *numbers))
