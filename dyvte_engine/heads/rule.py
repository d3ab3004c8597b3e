"""When p_exit becomes an exit: for one sequence, layer by layer, and for a table of samples at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import is_real, is_whole
from ..errors import InvalidArgumentError


@dataclass(frozen=True)
class ExitRule:
    """Exit at the first asked layer that ends a run of `hysteresis` asked layers with p_exit > threshold.

    Asked are `min_layer`, then every `every_k`-th layer; never the last one, since nothing follows it.
    threshold: 0 to 1, one value or a value for each layer of the model. Values are compared as they are, unrounded.

    Raises:
        InvalidArgumentError: a value out of its range.
    """

    threshold: float | tuple[float, ...]
    min_layer: int = 0
    every_k: int = 1
    hysteresis: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.threshold, list):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not values or not all(is_real(v) and 0 <= v <= 1 for v in values):  # NaN is not
            given = f"threshold is {self.threshold}"
            raise InvalidArgumentError(f"{given}; accepted: 0 to 1, or such a value for each layer")
        for name, least in (("min_layer", 0), ("every_k", 1), ("hysteresis", 1)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise InvalidArgumentError(f"{name} is {value}; accepted: whole numbers, at least {least}")

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], threshold: float | tuple[float, ...] | None = None) -> ExitRule:
        """The rule that a heads file states: its threshold, else 0.5, with the options of its calibration.

        threshold: instead of the one stated there.
        """
        calibration = metadata.get("calibration") or {}
        options = {name: calibration[name] for name in ("min_layer", "every_k", "hysteresis") if name in calibration}
        chosen: Any = metadata.get("threshold", 0.5) if threshold is None else threshold
        return cls(chosen, **options)

    def check(self, num_layers: int) -> None:
        """Raises InvalidArgumentError where there is not one threshold for each of `num_layers` layers."""
        if isinstance(self.threshold, tuple) and len(self.threshold) != num_layers:
            given = f"threshold has {len(self.threshold)} values"
            raise InvalidArgumentError(f"{given}; accepted: one, or {num_layers}, a value for each layer")

    def layers(self, num_layers: int) -> range:
        """The layers asked, of a model with `num_layers`."""
        return range(self.min_layer, num_layers - 1, self.every_k)

    def threshold_at(self, layer: int) -> float:
        return self.threshold[layer] if isinstance(self.threshold, tuple) else self.threshold

    def step(self, run: int, p_exit: float, layer: int) -> tuple[int, bool]:
        """One sequence at one asked layer. run: how many asked layers before it fired in a row, 0 at first.

        Returns the run that the next asked layer gets, and whether the sequence exits here.
        """
        run = run + 1 if p_exit > self.threshold_at(layer) else 0
        return run, run >= self.hysteresis

    def first_exits(self, p_exit: Tensor) -> Tensor:
        """p_exit [N, L] -> int64 [N], the layer each sample exits after; L - 1, the last, where it never does."""
        num_layers = p_exit.shape[1]
        self.check(num_layers)
        asked = list(self.layers(num_layers))
        above = torch.tensor([self.threshold_at(layer) for layer in asked], dtype=torch.float64, device=p_exit.device)
        fired = (p_exit[:, asked] > above).cumsum(1)
        in_a_row = min(self.hysteresis, len(asked) + 1)  # more than there are never fire
        before = torch.nn.functional.pad(fired, (in_a_row, 0))[:, : len(asked)]
        enough = fired - before == in_a_row  # so many of the last `hysteresis` asked layers fired
        exits = torch.tensor([*asked, num_layers - 1], device=p_exit.device)
        return exits[torch.nn.functional.pad(enough, (0, 1), value=True).int().argmax(1)]
