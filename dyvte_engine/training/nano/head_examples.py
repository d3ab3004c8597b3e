"""The prompts nano's exit heads are trained and measured on; the references are nano's own answers."""

from __future__ import annotations

import random

from dyvte_engine.training.head_data import Example
from dyvte_engine.training.nano.evaluate import Item, easy_items, scene_items

FIRST_SCENE = 1_000_000  # training scenes nano itself was not trained on, with words from its training list


def _examples(items: list[Item]) -> list[Example]:
    return [Example(item.picture, item.question.text) for item in items]


def training_examples(seed: int, count: int) -> list[Example]:
    """Two thirds fresh generated scenes, one third easy-VQA training questions, shuffled."""
    rng = random.Random(seed)
    fresh = scene_items(seed, "train", FIRST_SCENE, count // 3, 2)
    easy = rng.sample(easy_items("train"), count - 2 * (count // 3))
    examples = _examples(fresh) + _examples(easy)
    rng.shuffle(examples)
    return examples[:count]


def held_out_examples(seed: int, limit: int | None) -> dict[str, list[Example]]:
    """The easy-VQA test questions and questions about held-out scenes; `limit` takes a random part of each."""
    sets = {"easy_vqa_test": easy_items("test"), "heldout_scenes": scene_items(seed, "heldout", 0, 2000)}
    rng = random.Random(seed)
    return {name: _examples(rng.sample(items, min(limit or len(items), len(items)))) for name, items in sets.items()}
