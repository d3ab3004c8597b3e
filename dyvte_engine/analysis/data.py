"""What is analysed: generated tasks, or prompts about pictures from a file, in the form of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidArgumentError
from ..eval import TASKS, Sample, Task, load_tasks, metrics
from ..eval.task import SENTENCE
from ..training.head_data import Example
from ..training.named_examples import examples_named, has_own_pictures

EVERY = "all"


def load_data(
    data: str, limit: int = 100, seed: int = 0, images: Path | None = None, source: str = "shapes"
) -> list[Task]:
    """Tasks of at most `limit` samples each.

    Args:
        data: names of tasks joined by "," or "all" (docs/tasks.md); a FILE.jsonl or FILE.json of prompts with pictures
            (docs/training.md); or nano[:SET], smol[:SET].
        images: folder of a file's pictures, default its own.
        source: of the tasks' pictures.

    Raises:
        InvalidArgumentError, DataError, SourceError: what cannot be read or is not known, by name.
    """
    names = list(TASKS) if data == EVERY else [name.strip() for name in data.split(",")]
    if all(name in TASKS for name in names):
        if images is not None:
            raise InvalidArgumentError(
                f"images is {images}, and tasks draw their own; accepted: with a file of prompts"
            )
        return load_tasks(names, seed, limit, source)
    if not has_own_pictures(data) and Path(data).suffix not in (".json", ".jsonl"):
        raise InvalidArgumentError(
            f"data is {data!r}; accepted: {EVERY}, {', '.join(TASKS)}, a .jsonl or .json, nano:SET, smol:SET"
        )
    if source != "shapes":
        raise InvalidArgumentError(f"source is {source!r}, and data {data!r} has its own pictures; accepted: for tasks")
    return [task_of(examples_named(data, images, limit, seed), Path(data).stem)]


def task_of(examples: Sequence[Example], name: str) -> Task:
    """Prompts with pictures as a task, scored by equality with the answers where all of them have one.

    Answers may have as many tokens as those of one sentence (`eval.run.BUDGETS`).
    """
    if not examples:
        raise InvalidArgumentError("examples is empty; accepted: at least one")
    known = all(e.answer is not None for e in examples)
    samples = []
    for number, example in enumerate(examples):
        digest = hashlib.sha256(json.dumps(example.identity()).encode()).hexdigest()[:12]
        reference, meta = example.answer if known else None, {"split": "all", "style": ""}
        samples.append(Sample(f"{name}/{number}/{digest}", example.load, example.prompt, reference, SENTENCE, meta))
    return Task(name, name, name, tuple(samples), metrics.accuracy)
