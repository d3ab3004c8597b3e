"""Held-out questions, packed like those of training: how many answers are right, beside the blind baseline.

An answer counts as right if each of its tokens is the likeliest after the right ones: greedy decoding then gives it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from dyvte_engine.eval.emoji import COLORS
from dyvte_engine.eval.emoji_sets import NOUNS, UNSEEN_STYLE
from dyvte_engine.eval.metrics import NUMBERS
from dyvte_engine.eval.task import CHOICE, Sample
from dyvte_engine.training.metrics import share
from dyvte_engine.training.packing import Packed, pack, right_questions
from dyvte_engine.training.smol.data import Scenes, Step, Steps, spoken

NAMED = re.compile(rf"\b(?:{'|'.join([*NOUNS, *COLORS, *NUMBERS])})\b")


def pattern(prompt: str) -> str:
    """A question without what it names; of a choice its first line, of a context nothing but that it is one."""
    first = prompt.partition("\n")[0]
    return NAMED.sub("_", re.sub(r"Context: .*", "Context", re.sub(r'"\w+"', "_", first)))


class Blind:
    """The most frequent answer of training to each pattern of a question."""

    def __init__(self, scenes: Scenes, pictures: int):
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        for number in range(pictures):
            for printed in (False, True):
                for _, sample in scenes.ask(number, printed, 24):
                    seen[pattern(sample.prompt)][spoken(sample)] += 1
        self.answers = {text: counts.most_common(1)[0][0] for text, counts in seen.items()}

    def __call__(self, sample: Sample) -> str:
        return self.answers.get(pattern(sample.prompt), "")


Groups = Callable[[str, Sample], tuple[str, ...]]  # of a task and its question: where it counts


def by_task(task: str, sample: Sample) -> tuple[str, ...]:
    return (task,)


def by_kind(task: str, sample: Sample) -> tuple[str, ...]:
    """The kind of an open question; one with options counts among all choices and among those of its kind."""
    kind = sample.meta["kind"]
    return ("choice", f"choice: {kind}") if sample.form == CHOICE else (kind,)


class Judge:
    """Questions about the pictures of `steps`, and which of them were answered right."""

    def __init__(self, steps: Steps):
        self.steps, self.scenes = steps, steps.scenes
        self.asked: list[tuple[str, Sample]] = []
        self.right: dict[int, bool] = {}

    def batches(self) -> Iterator[Step]:
        """Each picture once."""
        self.asked, self.right = [], {}
        for printed, count in self.steps.sizes:
            rows = self.steps.block if printed else self.steps.rows
            for first in range(0, count, self.steps.batch):
                numbers = list(range(first, min(first + self.steps.batch, count)))
                encoded = []
                for number in numbers:
                    about = self.scenes.ask(number, printed, rows // 20)
                    start = len(self.asked)
                    encoded.append([self.steps.encoded(*one)._replace(kind=start + i) for i, one in enumerate(about)])
                    self.asked += about
                yield Step(numbers, printed, pack(encoded, rows, self.steps.prefix, self.steps.block))

    def count(self, logits: Tensor, packed: Packed) -> None:
        self.right |= dict(zip(packed.kinds.tolist(), right_questions(logits, packed).tolist()))

    def shares(self) -> dict[str, float]:
        """By task, of the last `batches`."""
        return {task: round(sum(hits) / len(hits), 3) for task, hits in self._grouped(self.right, by_task).items()}

    def report(self, blind: Blind, groups: Groups = by_task) -> dict[str, Any]:
        """By group: n, share and 95 % interval, in all, in the style that training never showed, and blind."""
        guessed = {i: blind(self.asked[i][1]) == spoken(self.asked[i][1]) for i in self.right}
        unseen = {i: hit for i, hit in self.right.items() if self.asked[i][1].meta["style"] == UNSEEN_STYLE}
        parts = (("all", self.right), ("unseen style", unseen), ("blind", guessed))
        made: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, answers in parts:
            for group, hits in self._grouped(answers, groups).items():
                made[group][name] = share(sum(hits), len(hits))
        return dict(made)

    def _grouped(self, right: dict[int, bool], groups: Groups) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] = defaultdict(list)
        for index, hit in sorted(right.items()):
            for group in groups(*self.asked[index]):
                found[group].append(hit)
        return dict(sorted(found.items()))
