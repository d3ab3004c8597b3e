"""The published easy-VQA set (PyPI package `easy-vqa`, MIT): one half trains, the test half only measures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dyvte_engine.errors import SourceError
from dyvte_engine.training.nano.questions import Question
from dyvte_engine.training.nano.scenes import EASY_COLORS, EASY_SHAPES, SIZE


def kind_of(answer: str) -> str:
    """Kind of an easy-VQA question, recognised by its answer."""
    return "color" if answer in EASY_COLORS else "shape" if answer in EASY_SHAPES else "presence"


def load_easy_vqa(split: str) -> tuple[list[str], list[list[Question]]]:
    """Picture files and each picture's questions, of "train" (4,000 and 38,575) or "test" (1,000 and 9,673)."""
    try:
        import easy_vqa  # an optional dependency; who takes only the generated scenes does without
    except ImportError as error:
        raise SourceError("task easy-vqa needs the package easy-vqa: pip install 'dyvte-engine[eval]'") from error

    texts, answers, pictures = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    order = sorted(paths)
    asked: dict[int, list[Question]] = {index: [] for index in order}
    for text, answer, picture in zip(texts, answers, pictures):
        asked[picture].append(Question(text, answer, kind_of(answer)))
    return [paths[index] for index in order], [asked[index] for index in order]


def load_pictures(paths: list[str]) -> np.ndarray:
    """uint8 [N, 96, 96, 3], resized as the image processor does."""
    resized = (Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for path in paths)
    return np.stack([np.asarray(picture) for picture in resized])
