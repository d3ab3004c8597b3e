"""The prompts nano's exit heads are trained and measured on."""

from __future__ import annotations

import random

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.training.head_data import Example
from dyvte_engine.training.nano.evaluate import Item, easy_items, scene_items

FIRST_SCENE = 1_000_000  # training scenes nano itself was not trained on, with words from its training list


def _examples(items: list[Item]) -> list[Example]:
    return [Example(item.picture, item.question.text, item.question.answer) for item in items]


def training_examples(seed: int, count: int) -> list[Example]:
    """Two thirds fresh generated scenes, one third easy-VQA training questions, shuffled."""
    rng, asked = random.Random(seed), easy_items("train")
    if count > 3 * len(asked) - 2:
        raise InvalidArgumentError(f"samples is {count}; accepted for nano: at most {3 * len(asked) - 2}")
    fresh = scene_items(seed, "train", FIRST_SCENE, count // 3, 2)
    easy = rng.sample(asked, count - 2 * (count // 3))
    examples = _examples(fresh) + _examples(easy)
    rng.shuffle(examples)
    return examples[:count]


def held_out_examples(seed: int, limit: int | None) -> dict[str, list[Example]]:
    """The easy-VQA test questions and questions about held-out scenes; `limit` takes a random part of each."""
    sets = {"easy_vqa_test": easy_items("test"), "heldout_scenes": scene_items(seed, "heldout", 0, 2000)}
    rng = random.Random(seed)
    return {name: _examples(rng.sample(items, min(limit or len(items), len(items)))) for name, items in sets.items()}


def named(name: str, seed: int, limit: int | None) -> list[Example]:
    """`nano`: the training examples (6,600 by default); `nano:easy_vqa_test`, `nano:heldout_scenes`: held-out ones."""
    if name == "nano":
        return training_examples(seed, limit or 6600)
    sets = held_out_examples(seed, limit)
    chosen = name.partition(":")[2]
    if chosen not in sets:
        raise InvalidArgumentError(f"data is {name!r}; accepted: nano, {', '.join(f'nano:{s}' for s in sets)}")
    return sets[chosen]
