"""What a task is: samples with a picture, a prompt and a reference, and a score over the answers to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from ..errors import InvalidArgumentError

# Prompt forms. What a small model was never asked in training it cannot be judged by.
YES_NO = "yes or no"  # presence and relations: "Is there a red circle in the picture?"
SHORT = "one word"
SENTENCE = "one sentence"
READ = "reading"
STATEMENT = "yes or no about a statement"  # "Are there three circles in the picture?"
CHOICE = "multiple choice"
DESCRIBE = "description"
FORMS = (YES_NO, SHORT, SENTENCE, READ, STATEMENT, CHOICE, DESCRIBE)

# Kinds: what is asked, in whatever form.
PRESENCE = "presence"
ATTRIBUTE = "attribute"  # what colour something has
IDENTITY = "identity"  # what has a colour, which of some things is there
COUNTING = "counting"
RELATION = "relation"  # where one thing is from another
LOCATION = "location"  # where in the picture
READING = "reading"
DESCRIPTION = "description"
KINDS = (PRESENCE, ATTRIBUTE, IDENTITY, COUNTING, RELATION, LOCATION, READING, DESCRIPTION)


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        key: names the sample within its suite; equal keys mean equal samples.
        draw: paints the picture, RGB; the same one at every call.
        reference: what the task's score compares with (each metric says what it expects).
        form: one of FORMS.
        meta: at least "split", the part of the task the sample counts in, and "style", how its picture is drawn; in the
            nine tasks "kind" as well, one of KINDS.
    """

    key: str
    draw: Callable[[], Image.Image] = field(repr=False)
    prompt: str
    reference: Any
    form: str
    meta: dict[str, Any]

    @property
    def picture(self) -> Image.Image:
        return self.draw()


Metric = Callable[[Sequence[Sample], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """Samples with the metric of the benchmark they mirror; `chance` is the score of guessing, where it is plain."""

    name: str
    original: str
    source: str
    samples: tuple[Sample, ...]
    metric: Metric
    chance: float | None = None

    def score(self, answers: Sequence[str]) -> dict[str, Any]:
        """Score of one answer for each sample, in order.

        Returns:
            {"metric": name, "value": float, "n": samples, "ci95": [low, high], "splits": {...}, ...}; shares
            are 0 to 1, an MME score up to 200 for each of its subtasks.

        Raises:
            InvalidArgumentError: not as many answers as samples, or no samples.
        """
        if len(answers) != len(self.samples) or not self.samples:
            raise InvalidArgumentError(f"answers has {len(answers)} entries; accepted: {len(self.samples)}, above 0")
        result = self.metric(self.samples, answers)
        styles = sorted({s.meta["style"] for s in self.samples})
        if len(styles) > 1:
            result["styles"] = {style: self._score_of(style, answers) for style in styles}
        return result

    def _score_of(self, style: str, answers: Sequence[str]) -> dict[str, Any]:
        chosen = [(s, a) for s, a in zip(self.samples, answers) if s.meta["style"] == style]
        return self.metric(*zip(*chosen))

    def within(self, forms: Collection[str]) -> tuple[Task, dict[str, int]]:
        """The task with samples of these forms only, and how many of each other form were left out."""
        left_out = Counter(s.form for s in self.samples if s.form not in forms)
        return replace(self, samples=tuple(s for s in self.samples if s.form in forms)), dict(left_out)
