"""Inputs with a video, written by hand: transformers' video processors need torchvision."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.families.zoo import EXTRA, PATCH, SIDE, SPECIALS, VOCABULARY


def _frames(seed: int, *groups: int) -> list[list[int]]:
    """Ids of a prompt: words, then for each group its frame tokens between marks and a word."""
    rng = random.Random(seed)
    word = lambda: rng.randrange(len(SPECIALS) + len(EXTRA), VOCABULARY)  # noqa: E731
    ids = [word(), word()]
    for n in groups:
        ids += [8, *[5] * n, 9, word()]
    return [[*ids, word(), word()]]


def _qwen_video(seed: int, apart: bool = False) -> dict[str, Any]:
    """Three steps of 4 x 6 patches, that is 6 rows each; `apart`: every step between marks of its own (Qwen3)."""
    grid = torch.tensor([[3, 4, 6]])
    ids = torch.tensor(_frames(seed, *([6] * 3 if apart else [18])))
    torch.manual_seed(seed)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=2 * (ids == 5).int(),
        pixel_values_videos=torch.randn(int(grid.prod()), 3 * 2 * PATCH**2),
        video_grid_thw=grid,
    )


def _onevision_video(seed: int) -> dict[str, Any]:
    """Three frames, pooled to 2 x 2 rows each, and one row for the end."""
    ids = torch.tensor(_frames(seed, 3 * 4 + 1))
    torch.manual_seed(seed)
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=torch.randn(1, 3, 3, SIDE, SIDE)
    )


VIDEOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "llava_onevision": _onevision_video,
    "qwen2_vl": _qwen_video,
    "qwen2_5_vl": _qwen_video,
    "qwen3_vl": lambda seed: _qwen_video(seed, apart=True),
}


def video(family: str, seed: int) -> dict[str, Any]:
    """The model inputs of a prompt with a video."""
    inputs = VIDEOS[family](seed)
    if transformers.__version__ < "5":
        inputs.pop("mm_token_type_ids", None)  # not known yet
    return inputs
