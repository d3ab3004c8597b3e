"""What an exit after each layer does to the answers (the paper's Fig 3), and where the heads exit (Fig 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..eval.metrics import bootstrap, credit, report
from ..eval.run import AnswerFile, answer_all
from ..eval.task import Task
from ..policies import FixedExit, KeepAll, VisualTokenPolicy
from ..training.metrics import wilson
from .plotting import COLORS, grid_of, layer_axis, mean_band

if TYPE_CHECKING:
    from ..engine import Engine

Progress = Callable[[int], None]
MARGIN = 0.02  # what the mean credit may be below the full model's on the plateau
KEEP_ALL = "keep-all"


@dataclass(frozen=True, eq=False)
class TaskExits:
    """One task of n samples under an exit after the first k layers, k = 0..L (k = L: no exit).

    scores: of each k, the task's metric as `Task.score` gives it; same, credit: [n, L + 1], whether the answer is the
    full model's, and what it is worth (0 to 1).
    """

    name: str
    scores: list[dict[str, Any]]
    same: np.ndarray
    credit: np.ndarray

    def plateau(self, margin: float = MARGIN) -> int:
        """The smallest k from which on the mean credit is never more than `margin` below the full model's."""
        means = self.credit.mean(0)
        low = np.flatnonzero(means < means[-1] - margin - 1e-9)
        return int(low[-1]) + 1 if len(low) else 0

    def difference(self, k: int) -> tuple[float, float, float]:
        """Credit after k layers less the full model's: mean and 95 % interval of paired differences (bootstrap)."""
        paired = self.credit[:, k] - self.credit[:, -1]
        return float(paired.mean()), *bootstrap(len(paired), lambda rows: float(paired[rows].mean()))


@dataclass(frozen=True, eq=False)
class ManualExit:
    """Accuracy against k, the layers that see the visual tokens, of every task."""

    tasks: tuple[TaskExits, ...]

    @property
    def num_layers(self) -> int:
        return len(self.tasks[0].scores) - 1

    def rows(self) -> list[dict[str, Any]]:
        """A row for each task and k: score, interval, share of answers equal to the full model's and its interval."""
        out: list[dict[str, Any]] = []
        for task in self.tasks:
            for k, score in enumerate(task.scores):
                same = int(task.same[:, k].sum()), len(task.same)
                shares: dict[str, Any] = {"same": same[0] / same[1], "same_ci95": list(wilson(*same))}
                of: dict[str, Any] = {
                    name: score[name] for name in ("metric", "value", "ci95", "n", "of") if name in score
                }
                out.append({"task": task.name, "k": k, **of, **shares})
        return out

    def record(self) -> dict[str, Any]:
        plateaus: dict[str, Any] = {}
        for task in self.tasks:
            k = task.plateau()
            mean, low, high = task.difference(k)
            plateaus[task.name] = {
                "k": k,
                "difference": mean,
                "ci95": [low, high],
                "same": float(task.same[:, k].mean()),
            }
        return {
            "samples": {t.name: len(t.same) for t in self.tasks},
            "plateau": {"margin": MARGIN, **plateaus},
            "rows": self.rows(),
        }

    def plot(self) -> Any:
        """A panel for each task; returns the figure."""
        figure, panels = grid_of(len(self.tasks))
        ks = np.arange(self.num_layers + 1)
        for axes, task in zip(panels, self.tasks):
            scale = 100 / task.scores[0].get("of", 1)
            value = np.array([scale * s["value"] for s in task.scores])
            low, high = (np.array([scale * s["ci95"][i] for s in task.scores]) for i in (0, 1))
            axes.plot(ks, value, "o-", ms=3, color=COLORS["visual"], label="score, 95 % interval")
            axes.fill_between(ks, low, high, color=COLORS["visual"], alpha=0.18, lw=0)
            axes.plot(ks, 100 * task.same.mean(0), "--", lw=1.2, color=COLORS["cross"], label="answer unchanged")
            axes.axhline(value[-1], color=COLORS["full"], lw=0.8, ls=":", label="score without exit")
            axes.axvline(task.plateau(), color=COLORS["text"], lw=1, label=f"plateau (within {100 * MARGIN:g} points)")
            layer_axis(axes, self.num_layers + 1, "layers that see the picture, k")
            axes.set_title(f"{task.name}: {task.scores[0]['metric']}, n = {task.scores[0]['n']}", fontsize=9)
            axes.set_ylim(-3, 103)
            axes.set_ylabel("%")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
        return figure


def manual_exit(
    engine: Engine, tasks: Sequence[Task], file: AnswerFile | None = None, progress: Progress = lambda done: None
) -> ManualExit:
    """Answers all samples with every visual token removed after the first k layers, for k = 0..L.

    k = 0 is the model without the picture, at the positions it has with it. Samples without a reference
    (None) are scored by agreement with the full model.
    """
    layers = engine.model.shape.num_layers
    samples = [s for task in tasks for s in task.samples]
    runs = [answer_all(engine, samples, FixedExit(k - 1), f"fixed:{k - 1}", file, progress) for k in range(layers)]
    runs.append(answer_all(engine, samples, KeepAll(), KEEP_ALL, file, progress))
    found, start = [], 0
    for task in tasks:
        texts = [[a.text for a in run[start : start + len(task.samples)]] for run in runs]  # [L + 1][n]
        found.append(_of_task(task, texts))
        start += len(task.samples)
    return ManualExit(tuple(found))


def _of_task(task: Task, texts: Sequence[Sequence[str]]) -> TaskExits:
    same = np.array([[a == b for a, b in zip(run, texts[-1])] for run in texts]).T
    if any(s.reference is None for s in task.samples):
        splits = [s.meta["split"] for s in task.samples]
        scores = [report("same answers", column.tolist(), splits) for column in same.astype(float).T]
        return TaskExits(task.name, scores, same, same.astype(float))
    worth = np.array([[credit(s, text) for s, text in zip(task.samples, run)] for run in texts]).T
    return TaskExits(task.name, [task.score(run) for run in texts], same, worth)


@dataclass(frozen=True, eq=False)
class ExitHistogram:
    """{task: int [n]}, the layer after which the tokens left, L - 1 where they never did, as in the paper's tables.

    `earliest`: the same of the first layer after which an exit already gives the full model's answer, where measured.
    """

    layers: dict[str, np.ndarray]
    num_layers: int
    policy: str
    earliest: dict[str, np.ndarray]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each task: n, mean layer with its 95 % interval, samples that left after each layer."""
        out = []
        for name, layers in self.layers.items():
            mean, low, high = (float(x) for x in mean_band(layers.astype(float)))
            counts = np.bincount(layers, minlength=self.num_layers).tolist()
            row = {"task": name, "n": len(layers), "mean": mean, "ci95": [low, high], "counts": counts}
            if name in self.earliest:
                row["earliest_mean"] = float(self.earliest[name].mean())
            out.append(row)
        return out

    def record(self) -> dict[str, Any]:
        return {"policy": self.policy, "layers": self.num_layers, "rows": self.rows()}

    def plot(self) -> Any:
        """A panel for each task, earliest mean exit first; returns the figure."""
        order = sorted(self.layers, key=lambda name: self.layers[name].mean())
        figure, panels = grid_of(len(order), height=2.2)
        bins = np.arange(self.num_layers + 1) - 0.5
        for axes, name in zip(panels, order):
            layers = self.layers[name]
            share = np.bincount(layers, minlength=self.num_layers) / len(layers)
            axes.bar(range(self.num_layers), 100 * share, color=COLORS["visual"], label="exit layer")
            if name in self.earliest:
                first = np.bincount(self.earliest[name], minlength=self.num_layers) / len(layers)
                axes.stairs(100 * first, bins, color=COLORS["cross"], lw=1.2, label="first layer with the same answer")
            axes.axvline(layers.mean(), color="0.2", lw=1, ls="--", label="mean exit layer")
            layer_axis(axes, self.num_layers, f"layer (0-{self.num_layers - 1}; the last: never left)")
            axes.set_title(f"{name}: mean {layers.mean():.1f}, n = {len(layers)}", fontsize=9)
            axes.set_ylabel("% of prompts")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        return figure


def exit_histogram(
    engine: Engine,
    tasks: Sequence[Task],
    policy: VisualTokenPolicy,
    name: str,
    file: AnswerFile | None = None,
    progress: Progress = lambda done: None,
    manual: ManualExit | None = None,
) -> ExitHistogram:
    """Where `policy` lets the visual tokens of each sample go. `name` tells policies apart in the answers file.

    `manual`: of the same tasks, for the earliest layers.
    """
    last = engine.model.shape.num_layers - 1
    answers = {t.name: answer_all(engine, t.samples, policy, name, file, progress) for t in tasks}
    layers = {
        task: np.array([last if a.exit_layer is None else a.exit_layer for a in given])
        for task, given in answers.items()
    }
    earliest = {t.name: t.same[:, 1:].argmax(1) for t in manual.tasks} if manual else {}
    return ExitHistogram(layers, last + 1, name, earliest)
