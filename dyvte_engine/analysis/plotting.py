"""What all figures share: an Axes to draw on, a band around a mean, shading of stages."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..lazy import optional
from ..training.metrics import Z95

COLORS = {"visual": "#2b6cb0", "cross": "#c05621", "text": "#2f855a", "full": "#4a5568", "exit": "#b83280"}


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure, sizes in inches. Raises SourceError when matplotlib is not installed."""
    return optional("matplotlib.figure", "eval").Figure(figsize=(width, height), layout="constrained")


def grid_of(count: int, across: int = 3, height: float = 2.5) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, `across` in a row, with the panels."""
    down = -(-count // across)
    figure = new_figure(3.6 * min(count, across), height * down + 0.3)
    panels = list(figure.subplots(down, min(count, across), squeeze=False).flat)
    for spare in panels[count:]:
        spare.axis("off")
    return figure, panels[:count]


def mean_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N, ...] -> mean and 95 % interval (normal, of the standard error); NaN where no sample has a value."""
    there = (~np.isnan(values)).sum(0)
    mean = np.where(there > 0, np.nansum(values, 0) / np.maximum(there, 1), np.nan)
    squares = np.nansum((values - mean) ** 2, 0) / np.maximum(there - 1, 1)
    half = Z95 * np.sqrt(squares / np.maximum(there, 1))
    return mean, mean - half, mean + half


def line_with_band(axes: Any, x: np.ndarray, values: np.ndarray, label: str, color: Any, **options: Any) -> None:
    mean, low, high = mean_band(values)
    axes.plot(x, mean, color=color, label=label, **{"marker": "o", "ms": 3, "lw": 1.5, **options})
    axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def layer_axis(axes: Any, layers: int, label: str = "layer") -> None:
    axes.set_xticks(range(0, layers, max(1, -(-layers // 12))))
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
