"""Entropy of what text tokens attend to, layer by layer, with and without exits (the paper's Fig 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidArgumentError
from ..eval.lines import LineFile
from ..eval.task import Sample
from .attention import FIELDS, KEYS, measure
from .plotting import layer_axis, line_with_band, mean_band, new_figure

if TYPE_CHECKING:
    from ..engine import Engine

READINGS = {"paper": "paper's reading", "head": "normalised"}
OVER = {"text": "text keys (self-attention)", "visual": "visual keys (cross-attention)", "all": "all keys"}


@dataclass(frozen=True, eq=False)
class AttentionEntropy:
    """Of N prompts and E settings: `exits` (None: no exit; else the layer after which all visual tokens left) and
    `tables` f64 [E, N, L, FIELDS] as `layer_statistics` defines them, in nats. The first setting is without exit.
    """

    exits: tuple[int | None, ...]
    tables: np.ndarray

    def of(self, reading: str, keys: str) -> np.ndarray:
        """[E, N, L]; reading "paper" or "head", keys "text", "visual" or "all"; NaN where no such key is left."""
        return self.tables[..., FIELDS.index(f"{reading}_{keys}")]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each reading, keys, exit and layer: mean, 95 % interval, and the paired difference to no exit."""
        out = []
        for reading in READINGS:
            for keys in KEYS:
                values = self.of(reading, keys)
                means, changes = mean_band_each(values), mean_band_each(values - values[0])
                for e, exit_layer in enumerate(self.exits):
                    for layer in range(values.shape[2]):
                        mean, low, high = (float(x[e, layer]) for x in means)
                        change = {"difference": float(changes[0][e, layer])}
                        change["difference_ci95"] = [float(x[e, layer]) for x in changes[1:]]  # type: ignore[assignment]
                        of = {"reading": reading, "keys": keys, "exit": exit_layer, "layer": layer}
                        out.append({**of, "entropy": mean, "ci95": [low, high], **change})
        return out

    def later_change(self, reading: str, keys: str = "text") -> list[tuple[float, float, float]]:
        """For each setting but the first: mean change against no exit over all layers after the exit, 95 % interval."""
        values, found = self.of(reading, keys), []
        for e, exit_layer in enumerate(self.exits[1:], 1):
            assert exit_layer is not None
            change = (values[e] - values[0])[:, exit_layer + 1 :].mean(1)
            mean, low, high = mean_band(change)
            found.append((float(mean), float(low), float(high)))
        return found

    def record(self) -> dict[str, Any]:
        changes = {
            f"{reading}_text": [
                {"exit": layer, "mean": mean, "ci95": [low, high]}
                for layer, (mean, low, high) in zip(self.exits[1:], self.later_change(reading))
            ]
            for reading in READINGS
        }
        return {"samples": self.tables.shape[1], "change_after_the_exit": changes, "rows": self.rows()}

    def plot(self, axes: Any = None, reading: str = "paper", keys: str = "text") -> Any:
        """One panel on `axes` (a new one without); returns it."""
        axes = axes or new_figure(6, 4).subplots()
        values = self.of(reading, keys)
        layers = np.arange(values.shape[2])
        for e, exit_layer in enumerate(self.exits):
            color = "0.25" if exit_layer is None else f"C{e - 1}"
            label = "no exit" if exit_layer is None else _label(exit_layer)
            line_with_band(axes, layers, values[e], label, color, zorder=3 if exit_layer is None else 2)
            if exit_layer is not None:
                axes.axvline(exit_layer + 0.5, color=color, ls=":", lw=1)
        layer_axis(axes, len(layers))
        axes.set_title(f"{READINGS[reading]}, {OVER[keys]}", fontsize=9)
        axes.set_ylabel("entropy (nats)")
        return axes

    def plot_all(self) -> Any:
        """All readings and keys as one figure."""
        figure = new_figure(11, 6.2)
        panels = figure.subplots(len(READINGS), len(KEYS), sharex=True)
        for line, reading in zip(panels, READINGS):
            for axes, keys in zip(line, KEYS):
                self.plot(axes, reading, keys)
        handles, labels = panels[0][0].get_legend_handles_labels()
        title = f"{self.tables.shape[1]} prompts, mean over text rows, 95 % interval"
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=title, fontsize=9)
        return figure


def mean_band_each(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """[E, N, L] -> mean and interval over N, each [E, L]."""
    return tuple(np.stack(part) for part in zip(*(mean_band(v) for v in values)))


def _label(exit_layer: int) -> str:
    return "exit before layer 0" if exit_layer < 0 else f"exit after layer {exit_layer}"


def chosen_exits(num_layers: int) -> tuple[int, ...]:
    """Layers after which an exit is shown where none are named: after 1/6, 1/3, 1/2 and 3/4 of the layers."""
    seeing = (min(max(round(share * num_layers), 1), num_layers - 1) for share in (1 / 6, 1 / 3, 1 / 2, 3 / 4))
    return tuple(sorted({k - 1 for k in seeing}))


def checked_exits(num_layers: int, exits: Sequence[int] | None) -> tuple[int, ...]:
    """`exits`, or those chosen where none are named.

    Raises InvalidArgumentError for one that leaves no layer behind it, or that comes twice.
    """
    chosen = chosen_exits(num_layers) if exits is None else tuple(exits)
    if len(set(chosen)) < len(chosen) or not all(-1 <= layer < num_layers - 1 for layer in chosen):
        given = f"exits is {list(chosen)}"
        raise InvalidArgumentError(f"{given}; accepted: whole numbers from -1 to {num_layers - 2}, each once")
    return chosen


def attention_entropy(
    engine: Engine,
    samples: Sequence[Sample],
    exits: Sequence[int] | None = None,
    file: LineFile | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> AttentionEntropy:
    """Entropy of the text rows' attention without an exit and with one after each of `exits` (-1: before layer 0).

    Raises:
        InvalidArgumentError: no samples, or exits that `checked_exits` refuses.
    """
    if not samples:
        raise InvalidArgumentError("samples is empty; accepted: at least one")
    settings: tuple[int | None, ...] = (None, *checked_exits(engine.model.shape.num_layers, exits))
    return AttentionEntropy(settings, np.stack([measure(engine, samples, e, file, progress) for e in settings]))
