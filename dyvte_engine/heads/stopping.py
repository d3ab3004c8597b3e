"""Thresholds for each layer, found as an optimal-stopping problem: a path of rules from "never exit" to "always".

An exit of sample n after layer l is worth `agree[n, l] - price * flops[n, l] / flops[n, -1]`. At every price the
thresholds are sought that are worth most on average. One layer's threshold at a time: with the other layers' fixed, a
sample has one exit if this layer fires and another if it does not, so the best cut among all values that the head said
is exact, whatever `ExitRule`'s options. Layers are taken in turn until nothing improves. Starts are the best fixed
layer or common threshold, and the last price's thresholds: no point of the path is worth less than these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .calibration import THRESHOLDS
from .rule import ExitRule

# What a prefill without an exit costs, in answers: from "leave where nothing changes" to "leave at once".
PRICES: tuple[float, ...] = tuple(torch.logspace(-2, 2, 81, dtype=torch.float64).tolist())
STEEPEST = 12.0  # logit, in place of the infinite ones of "never" and "always"
Thresholds = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Stopping:
    """The samples that thresholds are sought on: p_exit [N, L], agree bool [N, L], share [N, L] of the full FLOPs."""

    p_exit: Tensor
    agree: Tensor
    share: Tensor
    options: Mapping[str, int]

    def worth(self, thresholds: Thresholds, price: float) -> Tensor:
        """f64 [N], what each sample's exit is worth."""
        at = ExitRule(thresholds, **self.options).first_exits(self.p_exit)[:, None]
        return (self.agree.gather(1, at).double() - price * self.share.gather(1, at))[:, 0]

    def with_best_cut(self, thresholds: Thresholds, layer: int, price: float) -> Thresholds:
        """The thresholds with the best one for `layer`, the others as they are."""
        always, never = ((*thresholds[:layer], value, *thresholds[layer + 1 :]) for value in (0.0, 1.0))
        said, order = self.p_exit[:, layer].double().sort(descending=True)
        gain = (self.worth(always, price) - self.worth(never, price))[order].cumsum(0)
        # Cut k lets the k + 1 surest samples fire. Between equal values there is no cut.
        cuts = torch.cat([(said[:-1] + said[1:]) / 2, said.new_zeros(1)])
        gain[:-1][said[:-1] == said[1:]] = -torch.inf
        best = int(gain.argmax())
        cut = float(cuts[best]) if gain[best] > 0 else 1.0
        return (*thresholds[:layer], cut, *thresholds[layer + 1 :])

    def climb(self, start: Thresholds, price: float) -> tuple[float, Thresholds]:
        """Layer after layer, from the last asked to the first, until nothing improves: what it is worth, and it."""
        best, found = float(self.worth(start, price).mean()), start
        while True:
            thresholds = found
            for layer in reversed(ExitRule(0.5, **self.options).layers(len(start))):
                thresholds = self.with_best_cut(thresholds, layer, price)
            value = float(self.worth(thresholds, price).mean())
            if value <= best + 1e-12:
                return best, found
            best, found = value, thresholds


def stopping_path(
    p_exit: Tensor,
    agree: Tensor,
    flops: Tensor,
    options: Mapping[str, int] | None = None,
    prices: Sequence[float] = PRICES,
) -> list[Thresholds]:
    """Different thresholds [L] for rising prices; the first never exit. p_exit, agree bool and flops: [N, L] each.

    options: of `ExitRule`. The path is as good as these samples are many; it promises nothing for others.
    """
    sought = Stopping(p_exit, agree, flops.double() / flops[:, -1:].double(), options or {})
    layers = p_exit.shape[1]
    plain = _fixed_layers(layers, ExitRule(0.5, **sought.options)) + [(t,) * layers for t in THRESHOLDS]
    kept, spent = (torch.stack([sought.worth(t, price).mean() for t in plain]) for price in (0.0, 1.0))
    path = [(1.0,) * layers]
    for price in prices:
        start = plain[int((kept - price * (kept - spent)).argmax())]
        found = max(sought.climb(path[-1], price), sought.climb(start, price), key=lambda pair: pair[0])[1]
        if found != path[-1]:
            path.append(found)
    return path


def refined(path: Sequence[Thresholds], between: int = 3) -> list[Thresholds]:
    """The path with a gentle start and small steps, so that a promise is not lost at a jump.

    Its second point is approached from "never exit" under a common least threshold that falls; between any two later
    ones come `between` more, evenly spaced in logits.
    """
    found = [path[0]]
    for least in THRESHOLDS if len(path) > 1 else ():
        found.append(tuple(max(value, least) for value in path[1]))
    for before, after in pairwise(path[1:]):
        start, end = (torch.tensor(t, dtype=torch.float64).logit().clamp(-STEEPEST, STEEPEST) for t in (before, after))
        steps = [start.lerp(end, n / (between + 1)).sigmoid().tolist() for n in range(1, between + 1)]
        found += [*map(tuple, steps), after]
    return [t for t, last in zip(found, [None, *found[:-1]], strict=True) if t != last]


def _fixed_layers(layers: int, rule: ExitRule) -> list[Thresholds]:
    """For each asked layer thresholds under which every sample exits there, or as soon after as hysteresis allows."""
    return [(1.0,) * layer + (0.0,) * (layers - layer) for layer in rule.layers(layers)]
