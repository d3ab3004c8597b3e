"""Attention stages (the paper's Fig 2): how much each modality attends to itself and to the other, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidArgumentError
from ..eval.lines import LineFile
from ..eval.task import Sample
from .attention import WEIGHTS, measure
from .boundaries import Boundaries, detect, resampled_means
from .plotting import COLORS, layer_axis, line_with_band, mean_band, new_figure

if TYPE_CHECKING:
    from ..engine import Engine

STAGES = 3
# The paper's three stages: which of WEIGHTS must be higher in which stage than in which other, counted from 0
PATTERN = {
    "cross-attention falls from stage 1 to stage 2 (early fusion ends)": (1, 0, 1),
    "visual self-attention rises from stage 1 to stage 2 (intra-modality modelling)": (0, 1, 0),
    "cross-attention rises from stage 2 to stage 3 (multimodal reasoning)": (1, 2, 1),
}
NAMES = {
    "w_visual": ("visual", "visual to visual, $W_v$"),
    "w_cross": ("cross", "text to visual, $W_c$"),
    "w_text": ("text", "text to text, $W_t$"),
}


@dataclass(frozen=True, eq=False)
class AttentionStages:
    """Of N prompts: weights f64 [N, L, 3] as in WEIGHTS, the boundaries found, and the share of the resamples in which
    each sentence of the paper's pattern holds. `by_task` has the boundaries of each task alone.
    """

    weights: np.ndarray
    boundaries: Boundaries
    pattern: dict[str, float]
    by_task: dict[str, Boundaries] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer: its stage, the three weights and their 95 % intervals."""
        mean, low, high = mean_band(self.weights)
        return [
            {"layer": layer, "stage": 1 + sum(layer >= b for b in self.boundaries.first)}
            | {name: float(mean[layer, i]) for i, name in enumerate(WEIGHTS)}
            | {f"{name}_ci95": [float(low[layer, i]), float(high[layer, i])] for i, name in enumerate(WEIGHTS)}
            for layer in range(mean.shape[0])
        ]

    def record(self) -> dict[str, Any]:
        return {
            "samples": len(self.weights),
            "boundaries": asdict(self.boundaries),
            "pattern": self.pattern,
            "by_task": {name: asdict(b) for name, b in self.by_task.items()},
            "rows": self.rows(),
        }

    def plot(self, axes: Any = None) -> Any:
        """Draws on `axes` (a new one without) and returns it."""
        axes = axes or new_figure(9.5, 4).subplots()
        layers = self.weights.shape[1]
        for i, name in enumerate(WEIGHTS):
            color, label = NAMES[name]
            line_with_band(axes, np.arange(layers), self.weights[..., i], label, COLORS[color])
        starts = (0, *self.boundaries.first)
        for stage, (start, end) in enumerate(zip(starts, (*starts[1:], layers))):
            axes.axvspan(start - 0.5, end - 0.5, color="0.5", alpha=0.05 + 0.05 * (stage % 2), lw=0, zorder=0)
            axes.text(
                (start + end - 1) / 2, 1.01, f"stage {stage + 1}", transform=axes.get_xaxis_transform(), ha="center"
            )
        for first, same in zip(self.boundaries.first, self.boundaries.same):
            label = f"boundary before layer {first}:\nin {100 * same:.0f} % of resamples"
            axes.axvline(first - 0.5, color="0.3", ls="--", lw=1, label=label)
        layer_axis(axes, layers)
        axes.set_xlim(-0.5, layers - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("attention weight: row sum of the\nhead-maximum map, mean over query rows")
        title = f"{len(self.weights)} prompts, mean and 95 % interval"
        axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, title_fontsize=8)
        return axes


def attention_stages(
    engine: Engine,
    samples: Sequence[Sample],
    tasks: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    file: LineFile | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> AttentionStages:
    """The weights of each sample's prefill without any exit, and the stages found in their means.

    The boundaries are the two cuts of the layers that minimise the squared error within three segments (of at least
    two layers where there are six or more) of the logarithms of the three mean curves, each of mean 0 and variance 1.
    Stability: the same over `resamples` draws of the samples. `tasks`: the task of each sample, for `by_task`.

    Raises:
        InvalidArgumentError: no samples, fewer than three layers, or a prompt without a picture.
    """
    if not samples or (tasks is not None and len(tasks) != len(samples)):
        given = f"{len(samples)} samples and {'no' if tasks is None else len(tasks)} tasks"
        raise InvalidArgumentError(f"samples has {given}; accepted: at least one, with a task each or none")
    weights = measure(engine, samples, None, file, progress)[..., : len(WEIGHTS)]
    if np.isnan(weights).any():
        raise InvalidArgumentError("samples holds a prompt without a picture; accepted: prompts with one or more")
    found, pattern = _stages(weights, resamples, seed)
    names = list(dict.fromkeys(tasks or ()))
    parts = {name: weights[np.array([t == name for t in tasks or ()])] for name in names}
    alone = {name: _stages(part, resamples, seed)[0] for name, part in parts.items()} if len(names) > 1 else {}
    return AttentionStages(weights, found, pattern, alone)


def _stages(weights: np.ndarray, resamples: int, seed: int) -> tuple[Boundaries, dict[str, float]]:
    drawn = resampled_means(weights, resamples, seed)
    found, layers = detect(weights.mean(0), drawn, STAGES, 2 if weights.shape[1] >= 2 * STAGES else 1, seed)
    levels = np.stack([[part.mean(0) for part in np.split(d, cuts)] for d, cuts in zip(drawn, layers)])  # [R, 3, C]
    held = {text: levels[:, up, w] > levels[:, than, w] for text, (w, up, than) in PATTERN.items()}
    return found, {text: float(of.mean()) for text, of in held.items()}
