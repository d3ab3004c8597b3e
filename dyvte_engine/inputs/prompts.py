"""What the user gives (strings or conversations, pictures, videos) -> the text for the processor, one mark for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InvalidArgumentError, PromptError
from .images import is_video, load_image, load_video

Prompt = str | Sequence[dict[str, Any]]  # a user's question, or a conversation in transformers' format


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt (a string or one conversation) and not a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))


def as_batch(
    prompts: Any, images: Any, videos: Any = None
) -> tuple[list[Prompt], list[list[Image.Image]], list[list[np.ndarray]]]:
    """Normalise one or many prompts: a list of prompts, and the loaded pictures and videos of each."""
    batch: list[Prompt] = [prompts] if is_single(prompts) else list(prompts)
    for prompt in batch:
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise InvalidArgumentError(
                "each of prompts must be a string or a non-empty list of messages (dicts with role and content)"
            )
    images = _one_each("images", "a picture", images, prompts, batch)
    videos = _one_each("videos", "a video", videos, prompts, batch)
    pictures = [_given_images(i) or _in_messages(p, "image") for p, i in zip(batch, images, strict=True)]
    clips = [_given_videos(v) or _in_messages(p, "video") for p, v in zip(batch, videos, strict=True)]
    return batch, [[load_image(i) for i in row] for row in pictures], [[load_video(v) for v in row] for row in clips]


def _one_each(name: str, what: str, given: Any, prompts: Any, batch: list[Prompt]) -> list[Any]:
    """`given` as a list with one entry for each of the prompts."""
    if is_single(prompts):
        return [given]
    if given is None:
        return [None] * len(batch)
    if not isinstance(given, (list, tuple)) or len(given) != len(batch):
        raise InvalidArgumentError(
            f"{name} must be a list with one entry ({what}, a list, or None) for each of {len(batch)} prompts"
        )
    return list(given)


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(isinstance(m, dict) for m in prompt)


def _given_images(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _given_videos(videos: Any) -> list[Any]:
    """One entry is a video, which may be a list of frames, or a list of videos."""
    if videos is None:
        return []
    return list(videos) if isinstance(videos, (list, tuple)) and not is_video(videos) else [videos]


def _in_messages(prompt: Prompt, kind: str) -> list[Any]:
    """Pictures or videos written into a conversation's content as {"type": kind, kind or "path": ...}."""
    found = [p.get(kind, p.get("path")) for p in _parts(prompt) if p.get("type") == kind]
    return [f for f in found if f is not None]


def _parts(prompt: Prompt) -> list[dict[str, Any]]:
    """The typed parts of a conversation's messages."""
    if isinstance(prompt, str):
        return []
    return [p for m in prompt if not isinstance(m.get("content"), str) for p in m.get("content") or []]


def render(prompt: Prompt, n_images: int, processor: Any, chat: bool = True, n_videos: int = 0) -> str:
    """The text for the processor, holding exactly `n_images` of its image marks and `n_videos` of its video marks.

    A string is one user turn (its own marks, or `<image>` and `<video>`, say where they go; without them they come
    first), or with chat=False the finished text. Raises PromptError when marks and what is given disagree or no chat
    template exists.
    """
    marks = {"image": processor.image_token}
    if getattr(processor, "video_token", None) is not None:
        marks["video"] = processor.video_token
    counts = {"image": n_images, "video": n_videos}
    if isinstance(prompt, str) and not chat:
        text = prompt
    else:
        if not getattr(processor, "chat_template", None):
            raise PromptError("this checkpoint has no chat template; give the finished text with chat=False")
        messages = _as_messages(prompt, counts, marks) if isinstance(prompt, str) else list(prompt)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for kind, mark in marks.items():
        if text.count(mark) != counts[kind]:
            what = {"image": "pictures", "video": "videos"}[kind]
            raise PromptError(f"the prompt has {text.count(mark)} {mark} marks for {counts[kind]} {what}")
    return text


def _as_messages(prompt: str, counts: dict[str, int], marks: dict[str, str]) -> list[dict[str, Any]]:
    """One user turn. Pictures or videos that the prompt has no marks of come first."""
    kinds = {mark if mark in prompt else f"<{kind}>": kind for kind, mark in marks.items()}
    unmarked = [kind for mark, kind in kinds.items() if mark not in prompt]
    content: list[dict[str, Any]] = [{"type": kind} for kind in unmarked for _ in range(counts[kind])]
    for piece in re.split("(" + "|".join(map(re.escape, kinds)) + ")", prompt):
        if piece in kinds:
            content.append({"type": kinds[piece]})
        elif piece.strip() or piece == prompt:
            content.append({"type": "text", "text": piece if piece == prompt else piece.strip()})
    return [{"role": "user", "content": content}]
