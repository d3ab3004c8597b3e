"""The model's own greedy answers, in full or under an exit at every layer."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from transformers import GenerationConfig

from dyvte_engine.engine import Engine
from dyvte_engine.policies import FixedExit, KeepAll, VisualTokenPolicy
from dyvte_engine.requests import Request


def own_answers(
    engine: Engine, texts: Sequence[str], pictures: Sequence[Image.Image], max_new_tokens: int
) -> list[list[int]]:
    """Greedy token ids for every finished prompt with its picture, the end token included when it came."""
    return _greedy(engine, texts, pictures, [KeepAll()], max_new_tokens)[0]


def branch_answers(
    engine: Engine, texts: Sequence[str], pictures: Sequence[Image.Image], max_new_tokens: int
) -> list[list[list[int]]]:
    """For every prompt L lists of token ids, its greedy answer with an exit after each layer; the last is the full one.

    That one comes first, so that all others find the picture computed as deep as they need it (docs/again.md).
    """
    exits = [FixedExit(layer) for layer in range(engine.model.shape.num_layers - 1)]
    full, *others = _greedy(engine, texts, pictures, [KeepAll(), *exits], max_new_tokens)
    return [list(of_one) for of_one in zip(*others, full, strict=True)]


def _greedy(
    engine: Engine,
    texts: Sequence[str],
    pictures: Sequence[Image.Image],
    policies: Sequence[VisualTokenPolicy],
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """[P][n] token ids. The most likely token each time, whatever the checkpoint's own generation config asks for."""
    plain, images = GenerationConfig(max_new_tokens=max_new_tokens), [[picture] for picture in pictures]
    handles = engine.submit_all(
        [
            Request(text, own, chat=False, policy=policy, generation_config=plain)
            for policy in policies
            for text, own in zip(texts, images, strict=True)
        ]
    )
    answers, n = [handle.result().token_ids for handle in handles], len(texts)
    return [answers[first : first + n] for first in range(0, len(answers), n)]
