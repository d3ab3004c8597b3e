"""The prompts smol's exit heads are trained and measured on."""

from __future__ import annotations

from itertools import count

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.training.head_data import Example
from dyvte_engine.training.smol.data import Scenes, spoken

SETS = {"smol": "train", "smol:heldout": "heldout"}
EACH = 2  # questions about a picture
PRINTED = 9  # every so many pictures are a printed word
USUAL = 5000


def named(name: str, seed: int, limit: int | None) -> list[Example]:
    """`smol`: training scenes that smol itself was not trained on; `smol:heldout`: held-out ones, in all styles.

    Needs the drawings of the emoji scenes (docs/tasks.md).

    Raises:
        InvalidArgumentError, SourceError: another name; the drawings are not to be had.
    """
    if name not in SETS:
        raise InvalidArgumentError(f"data is {name!r}; accepted: {', '.join(SETS)}")
    scenes, wanted = Scenes(SETS[name], -1 - seed), limit or USUAL  # smol's own have seeds from 0
    examples: list[Example] = []
    for number in count():
        for task, sample in scenes.ask(number, number % PRINTED == PRINTED - 1, EACH):
            where = f"{name}, seed {seed}, picture {number}, {task}"
            examples.append(Example(sample.draw, sample.prompt, spoken(sample), where))
        if len(examples) >= wanted:
            break
    return examples[:wanted]
