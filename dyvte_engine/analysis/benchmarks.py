"""The seam between the paper's tables and what measures a benchmark: this package's own tasks, or another harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ..errors import InvalidArgumentError
from ..eval.named import named
from ..eval.run import AnswerFile, answer_all
from ..eval.task import Task
from ..policies import DynamicExit
from .plotting import mean_band

if TYPE_CHECKING:
    from ..engine import Engine
    from ..policies import VisualTokenPolicy

EXIT_LAYER, FLOPS = "exit layer", "FLOPs"


class Measured(NamedTuple):
    """One figure of one benchmark, over `n` questions, with its 95 % interval.

    task: a name of `dyvte_engine.eval.TASKS`. metric: EXIT_LAYER (mean, 0-based; tokens that never leave count as
    leaving after the last), FLOPS (share of those without any policy), or the benchmark's own; shares are in percent.
    """

    task: str
    metric: str
    value: float
    n: int
    interval: tuple[float, float]


class Benchmarks(Protocol):
    """All that the tables need to know of a harness. One for lmms-eval would run a model there and read its results."""

    def measure(self, policy: VisualTokenPolicy, identity: str, tasks: Sequence[str]) -> Iterator[Measured]:
        """The figures of those of `tasks` it has, under a policy; `identity` tells policies apart in what it keeps."""
        ...


def heads_policy(notation: str, model: str) -> tuple[DynamicExit, str]:
    """Exit heads written FILE[,THRESHOLD][,NAME=VALUE], with what tells them apart in an answers file."""
    file, comma, options = notation.partition(",")
    chosen = named(f"dynamic:{notation}", model)
    if not isinstance(chosen.policy, DynamicExit):
        raise InvalidArgumentError(f"heads is {notation!r}; accepted: FILE[,THRESHOLD][,NAME=VALUE], without '+'")
    return chosen.policy, f"dynamic:{Path(file).name}{comma}{options} {chosen.identity.split()[-1]}"


class DrawnTasks:
    """The nine generated tasks of docs/tasks.md as `Benchmarks`."""

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        file: AnswerFile | None = None,
        progress: Callable[[str, int], None] = lambda what, done: None,
    ):
        self.engine, self.file, self.progress = engine, file, progress
        self.tasks = {task.name: task for task in tasks if task.samples}

    def measure(self, policy: VisualTokenPolicy, identity: str, tasks: Sequence[str]) -> Iterator[Measured]:
        last = self.engine.model.shape.num_layers - 1
        for name in tasks:
            if name not in self.tasks:
                continue
            task, step = self.tasks[name], partial(self.progress, name)
            answers = answer_all(self.engine, task.samples, policy, identity, self.file, step)
            score = task.score([a.text for a in answers])
            of = f" of {score['of']}" if "of" in score else ""
            scale = 1.0 if of else 100.0
            low, high = (scale * x for x in score["ci95"])
            yield Measured(name, score["metric"] + of, scale * score["value"], score["n"], (low, high))
            layers = np.array([last if a.exit_layer is None else a.exit_layer for a in answers], float)
            yield _mean(name, EXIT_LAYER, layers)
            yield _mean(name, FLOPS, 100 * np.array([a.flops / a.flops_keep_all for a in answers]))


def _mean(task: str, metric: str, values: np.ndarray) -> Measured:
    mean, low, high = (float(x) for x in mean_band(values))
    return Measured(task, metric, mean, len(values), (low, high))
