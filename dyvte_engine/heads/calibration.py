"""From a promise to a threshold: which p_exit is high enough so that answers stay as they are.

The thresholds of a path are tested one after another, from "never exit" on (fixed-sequence testing, as in Learn then
Test, arXiv 2110.01052). At each, the share of answers an exit changes is bounded from above by the exact binomial
(Clopper-Pearson) limit at level delta. The last threshold before the first whose limit exceeds 1 - target is taken.
With probability at least 1 - delta over the drawing of the calibration samples, the share of changed answers on further
prompts of the same kind is then at most 1 - target. The calibration samples have no say in the path: it is a fixed grid
of common thresholds, or one of thresholds for each layer that other samples chose (`heads.stopping`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import is_real
from ..errors import CalibrationError, InvalidArgumentError
from .rule import ExitRule

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Threshold = float | tuple[float, ...]  # for all layers, or for each

# 1 never fires; then a quarter of a logit apart. Fixed, so that no calibration sample has a say in it.
THRESHOLDS: tuple[float, ...] = (1.0, *torch.sigmoid(torch.linspace(12, -6, 73, dtype=torch.float64)).tolist())


@lru_cache(maxsize=1 << 16)
def binomial_limit(hits: int, count: int, delta: float) -> float:
    """Clopper-Pearson: the largest rate under which `hits` or fewer of `count` still have probability delta."""
    if hits >= count:
        return 1.0
    ways = torch.arange(hits + 1, dtype=torch.float64)
    choose = torch.lgamma(torch.tensor(count + 1.0).double()) - torch.lgamma(ways + 1) - torch.lgamma(count - ways + 1)
    low, high = hits / count, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        tail = (choose + ways * math.log(rate) + (count - ways) * math.log1p(-rate)).logsumexp(0).exp()
        low, high = (rate, high) if tail > delta else (low, rate)
    return high


@dataclass(frozen=True)
class Calibration:
    """What `samples` prompts that neither heads nor path were made from did at each threshold of a path.

    thresholds: the path; each one value, or one for each layer (a list is taken as a tuple).
    changed: answers that an exit changed; limit: their share's upper limit at level delta; mean_layer: exit layer;
    flops: mean FLOPs of a prefill over those without an exit (the paper's count, vision tower included). The other
    fields are the options of `ExitRule` this holds for.
    """

    samples: int
    delta: float
    thresholds: list[Threshold]
    changed: list[int]
    limit: list[float]
    mean_layer: list[float]
    flops: list[float]
    min_layer: int = 0
    every_k: int = 1
    hysteresis: int = 1

    def __post_init__(self) -> None:
        curves = self.thresholds, self.changed, self.limit, self.mean_layer, self.flops
        if len({len(curve) for curve in curves}) != 1 or not self.thresholds:
            raise InvalidArgumentError(f"calibration has curves of {[len(c) for c in curves]} points; accepted: equal")
        path: list[Threshold] = [tuple(t) if isinstance(t, list) else t for t in self.thresholds]
        object.__setattr__(self, "thresholds", path)

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Calibration | None:
        """The calibration that a heads file holds, if any."""
        stored = metadata.get("calibration")
        return cls(**stored) if stored else None

    @classmethod
    def measure(
        cls,
        p_exit: Tensor,
        agree: Tensor,
        flops: Tensor,
        delta: float = 0.05,
        options: Mapping[str, int] | None = None,
        path: Sequence[Threshold] = THRESHOLDS,
    ) -> Calibration:
        """p_exit [N, L]; agree bool [N, L], whether the answer stays; flops [N, L]; options: of `ExitRule`.

        path: thresholds from "never exit" on, chosen without these samples.
        """
        _check_samples(p_exit, agree, flops, delta)
        options, count = dict(options or {}), len(p_exit)
        layers = [ExitRule(threshold, **options).first_exits(p_exit)[:, None] for threshold in path]
        changed = [count - int(agree.gather(1, at).sum()) for at in layers]
        return cls(
            samples=count,
            delta=delta,
            thresholds=list(path),
            changed=changed,
            limit=[binomial_limit(hits, count, delta) for hits in changed],
            mean_layer=[float(at.double().mean()) for at in layers],
            flops=[float((flops.gather(1, at)[:, 0] / flops[:, -1]).mean()) for at in layers],
            **options,
        )

    @property
    def options(self) -> dict[str, int]:
        return {"min_layer": self.min_layer, "every_k": self.every_k, "hysteresis": self.hysteresis}

    def for_agreement(self, target: float) -> Threshold:
        """The threshold of the path under which at least `target` of the answers stay, in the sense of this module.

        Raises:
            CalibrationError: not even an exit that changed no answer would show that with so few samples.
        """
        check_target(target, self.samples, self.delta)
        passed = 0
        while passed + 1 < len(self.limit) and self.limit[passed + 1] <= 1 - target:
            passed += 1
        return self.thresholds[passed]

    def for_flops(self, target: float) -> Threshold:
        """The first threshold of the path whose mean prefill FLOPs are at most `target` of those without an exit.

        An average over the calibration samples; nothing is promised about the answers.

        Raises:
            CalibrationError: every threshold of the grid costs more.
        """
        check_flops(target)
        for threshold, share in zip(self.thresholds, self.flops, strict=True):
            if share <= target:
                return threshold
        raise CalibrationError(
            f"target_flops {target} is out of reach: these heads need at least {min(self.flops):.3f}"
        )

    def at(self, threshold: Threshold | list[float]) -> dict[str, Any]:
        """The measured figures of one threshold of the path."""
        sought = tuple(threshold) if isinstance(threshold, list) else threshold
        if not ((is_real(sought) or isinstance(sought, tuple)) and sought in self.thresholds):
            raise InvalidArgumentError(
                f"threshold is {threshold!r}; accepted: one of the path's {len(self.thresholds)}"
            )
        i = self.thresholds.index(sought)
        names = ("changed", "limit", "mean_layer", "flops")
        return {"samples": self.samples, "delta": self.delta} | {name: getattr(self, name)[i] for name in names}


def _check_samples(p_exit: Tensor, agree: Tensor, flops: Tensor, delta: float) -> None:
    check_risk("delta", delta)
    wanted = {"p_exit": (p_exit, _FLOATS), "agree": (agree, (torch.bool,)), "flops": (flops, _FLOATS)}
    shape = p_exit.shape if isinstance(p_exit, Tensor) else ()
    for name, (tensor, dtypes) in wanted.items():
        plain = isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.layout == torch.strided
        if not plain or tensor.dtype not in dtypes or tensor.dim() != 2 or tensor.shape != shape or 0 in shape:
            given = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            kind = "bool" if name == "agree" else "float"
            raise InvalidArgumentError(f"{name} is {given}; accepted: {kind} [N >= 1, L >= 1], all three of one shape")
    if not p_exit.isfinite().all() or not (flops.isfinite().all() and (flops > 0).all()):
        raise InvalidArgumentError("p_exit or flops holds NaN, infinity or FLOPs of 0; accepted: finite numbers")


def check_risk(name: str, value: Any) -> None:
    if not (is_real(value) and 0 < value < 1):
        raise InvalidArgumentError(f"{name} is {value!r}; accepted: above 0 and below 1")


def check_flops(target: Any) -> None:
    if not (is_real(target) and 0 < target <= 1):
        raise InvalidArgumentError(f"target_flops is {target!r}; accepted: above 0, at most 1")


def check_target(target: float, samples: int, delta: float) -> None:
    """Raises CalibrationError when `samples` cannot show an agreement of `target` at level delta, whatever they do."""
    check_risk("target_agreement", target)
    check_risk("delta", delta)
    needed = math.ceil(math.log(delta) / math.log(target))
    if samples < needed:
        given = f"target_agreement {target} cannot be guaranteed with {samples} calibration samples at delta {delta}"
        raise CalibrationError(f"{given}; accepted: at least {needed} of them, or a lower target")
