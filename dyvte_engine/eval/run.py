"""Runs tasks through an engine: batched, with progress, and resumable from the file of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..training.nano.scenes import SIZE
from .lines import LineFile
from .task import CHOICE, DESCRIBE, FORMS, READ, SENTENCE, SHORT, STATEMENT, YES_NO, Sample

if TYPE_CHECKING:
    from ..engine import Engine
    from ..policies import VisualTokenPolicy

# tokens an answer of each form may have
BUDGETS = {YES_NO: 8, SHORT: 12, SENTENCE: 40, READ: 16, STATEMENT: 8, CHOICE: 12, DESCRIBE: 160}
# nano was taught neither options to choose from, nor statements to judge, nor descriptions
NANO_FORMS = (YES_NO, SHORT, SENTENCE, READ)


@dataclass(frozen=True)
class Answer:
    """What one sample got: its text, the exit layer (None: visual tokens stayed) and the prefill's FLOPs."""

    key: str
    text: str
    exit_layer: int | None
    tokens: int
    flops: float
    flops_keep_all: float
    flops_true: float
    flops_true_keep_all: float


def known_forms(model: Any) -> tuple[str, ...]:
    """Prompt forms the model was trained on, as far as known: nano's for a model of nano's picture size, else all."""
    return NANO_FORMS if getattr(model.hf.config.vision_config, "image_size", None) == SIZE else FORMS


class AnswerFile:
    """Answers on disk, one JSON line each after a first line that names the model."""

    def __init__(self, path: Path, model: str):
        kinds = {"policy": str, **get_type_hints(Answer)}
        self._lines = LineFile(path, {"model_fingerprint": model}, "answers", kinds)
        self.known: dict[tuple[str, str], Answer] = {}
        for entry in self._lines.entries:
            of = {k: v for k, v in entry.items() if k != "policy"}
            self.known[entry["policy"], entry["key"]] = Answer(**of)

    def add(self, policy: str, answers: Sequence[Answer]) -> None:
        self._lines.add([{"policy": policy, **asdict(a)} for a in answers])
        self.known.update({(policy, a.key): a for a in answers})


def answer_all(
    engine: Engine,
    samples: Sequence[Sample],
    policy: VisualTokenPolicy,
    name: str,
    file: AnswerFile | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Greedy answers of the engine under a policy, in the order of the samples.

    Samples of one form run together, `max_batch` at a time; `progress` is called with how many more are done. What
    `file` already holds for (name, sample) is not computed again, so each policy needs a `name` of its own.
    """
    known = {} if file is None else {key: a for (by, key), a in file.known.items() if by == name}
    answers = {s.key: known[s.key] for s in samples if s.key in known}
    progress(len(answers))
    size = engine.config.max_batch
    for form in FORMS:
        waiting = [s for s in samples if s.form == form and s.key not in answers]
        for start in range(0, len(waiting), size):
            done = _batch(engine, waiting[start : start + size], policy, BUDGETS[form])
            answers.update({a.key: a for a in done})
            if file is not None:
                file.add(name, done)
            progress(len(done))
    return [answers[s.key] for s in samples]


def _batch(engine: Engine, samples: Sequence[Sample], policy: VisualTokenPolicy, max_new_tokens: int) -> list[Answer]:
    prompts, pictures = [s.prompt for s in samples], [s.picture for s in samples]
    results = engine.generate(prompts, pictures, policy=policy, max_new_tokens=max_new_tokens, do_sample=False)
    assert isinstance(results, list)
    return [
        Answer(
            s.key,
            r.text.strip(),
            r.stats.exit_layer,
            r.stats.visual_tokens + r.stats.text_tokens,
            1e12 * r.stats.prefill_tflops,
            1e12 * r.stats.prefill_tflops_keep_all,
            1e12 * r.stats.prefill_tflops_true,
            1e12 * r.stats.prefill_tflops_true_keep_all,
        )
        for s, r in zip(samples, results, strict=True)
    ]
