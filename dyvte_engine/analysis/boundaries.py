"""Where the stages begin: change points of the statistics over layers, and how firmly the samples put them there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InvalidArgumentError

MOST = 5  # numbers of segments that are compared


@dataclass(frozen=True)
class Boundaries:
    """Change points of a piecewise constant fit.

    Attributes:
        first: the first layer of every segment after the first.
        same: for each, the share of resamples in which it is at this layer.
        ci95: for each, the interval of layers that holds it in 95 % of the resamples.
        explained: share of the variance over layers that the fit explains.
        by_chance: share of random orders of the layers whose best fit explains as much.
        bic: Bayesian information criterion of fits with 1, 2, ... segments; lower is better.
    """

    first: tuple[int, ...]
    same: tuple[float, ...]
    ci95: tuple[tuple[int, int], ...]
    explained: float
    by_chance: float
    bic: tuple[float, ...]


def standardised(curves: np.ndarray) -> np.ndarray:
    """curves [L, C], positive -> their logarithms, each of mean 0 and variance 1 over layers (a constant one: 0)."""
    logs = np.log(np.maximum(curves, 1e-12))
    spread = logs.std(0)
    return (logs - logs.mean(0)) / np.where(spread > 1e-9, spread, np.inf)


def check_layers(layers: int, count: int, least: int = 1) -> None:
    """Raises InvalidArgumentError as `segment` does."""
    if layers < count * least:
        raise InvalidArgumentError(f"{layers} layers; accepted: at least {count * least} for {count} stages")


def segment(series: np.ndarray, count: int, least: int = 1) -> tuple[tuple[int, ...], float]:
    """series [L, C] cut into `count` segments of at least `least` layers with the least squared error around means.

    Dynamic programming over all cuts: the optimum, the earliest where several are as good. Returns the first layer of
    each later segment, and the squared error.

    Raises:
        InvalidArgumentError: fewer than count * least layers.
    """
    layers = len(series)
    check_layers(layers, count, least)
    cost = _costs(series)
    best = cost[0].copy()  # best[j]: layers 0..j-1 in the segments so far
    best[:least] = np.inf
    cuts: list[np.ndarray] = []
    for _ in range(count - 1):
        total = best[:, None] + cost  # [i, j]: the last segment is i..j-1
        total[np.arange(layers + 1)[None] - np.arange(layers + 1)[:, None] < least] = np.inf
        cuts.append(total.argmin(0))
        best = total.min(0)
    found, end = [], layers
    for cut in reversed(cuts):
        end = int(cut[end])
        found.append(end)
    return tuple(reversed(found)), float(best[layers])


def _costs(series: np.ndarray) -> np.ndarray:
    """[L + 1, L + 1]: squared error of layers i..j-1 around their mean, 0 where there are none."""
    sums = np.concatenate((np.zeros((1, series.shape[1])), series.cumsum(0)))
    squares = np.concatenate(([0.0], (series**2).sum(1).cumsum()))
    lengths = np.arange(len(sums))[None] - np.arange(len(sums))[:, None]
    spans = sums[None] - sums[:, None]
    cost = squares[None] - squares[:, None] - (spans**2).sum(-1) / np.maximum(lengths, 1)
    return np.where(lengths > 0, np.maximum(cost, 0.0), 0.0)


def resampled_means(per_sample: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[N, ...] -> [resamples, ...], means over N samples drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(per_sample)
    return np.stack([per_sample[rng.integers(0, n, n)].mean(0) for _ in range(resamples)])


def detect(
    curves: np.ndarray, drawn: np.ndarray, stages: int = 3, least: int = 1, seed: int = 0
) -> tuple[Boundaries, np.ndarray]:
    """Change points of the mean curves [L, C] (`standardised`), judged by those of the resampled means [R, L, C].

    Returns them and the change points of each resample, int [R, stages - 1]. The arguments determine everything;
    `seed` is of the random orders of the layers, as many as resamples.
    """
    rng, series = np.random.default_rng(seed), standardised(curves)
    first, error = segment(series, stages, least)
    total = float((series**2).sum())
    layers = np.array([segment(standardised(d), stages, least)[0] for d in drawn]).reshape(-1, stages - 1)
    shuffled = [segment(series[rng.permutation(len(series))], stages, least)[1] for _ in drawn]
    low, high = np.percentile(layers, (2.5, 97.5), axis=0, method="nearest")
    found = Boundaries(
        first,
        tuple(float(x) for x in (layers == np.array(first)).mean(0)),
        tuple((int(a), int(b)) for a, b in zip(low, high)),
        1 - error / total if total else 0.0,
        float(np.mean(np.array(shuffled) <= error + 1e-9)),
        tuple(_bic(series, count, least) for count in range(1, min(MOST, len(series) // least) + 1)),
    )
    return found, layers


def _bic(series: np.ndarray, count: int, least: int) -> float:
    """n ln(error / n) + p ln n, where p counts the means and the cuts."""
    n = series.size
    error = max(segment(series, count, least)[1], 1e-9)
    return float(n * np.log(error / n) + (count * series.shape[1] + count - 1) * np.log(n))
