"""What the user gives (strings or conversations, pictures) -> the text for the processor, one mark per picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import InvalidArgumentError, PromptError
from .images import load_image

USERS_MARK = "<image>"
Prompt = str | Sequence[dict[str, Any]]  # a user's question, or a conversation in transformers' format


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt (a string or one conversation) and not a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))


def as_batch(prompts: Any, images: Any) -> tuple[list[Prompt], list[list[Image.Image]]]:
    """Normalise one or many prompts with their pictures: a list of prompts, and the loaded pictures of each."""
    batch: list[Prompt] = [prompts] if is_single(prompts) else list(prompts)
    if is_single(prompts):
        images = [images]
    elif images is None:
        images = [None] * len(batch)
    elif isinstance(images, (str, Path, Image.Image)) or len(images) != len(batch):
        raise InvalidArgumentError(
            f"images must be a list with one entry (a picture, a list, or None) for each of {len(batch)} prompts"
        )
    for prompt in batch:
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise InvalidArgumentError(
                "each of prompts must be a string or a non-empty list of messages (dicts with role and content)"
            )
    if any(p.get("type") == "video" for prompt in batch for p in _parts(prompt)):
        raise PromptError("a message holds a video; accepted: pictures (hf.enable takes videos, in generate)")
    given = [_given_images(i) or _message_images(p) for p, i in zip(batch, images, strict=True)]
    return batch, [[load_image(i) for i in row] for row in given]


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(isinstance(m, dict) for m in prompt)


def _given_images(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _message_images(prompt: Prompt) -> list[Any]:
    """Pictures written into a conversation's content as {"type": "image", "image" or "path": ...}."""
    found = [p.get("image", p.get("path")) for p in _parts(prompt) if p.get("type") == "image"]
    return [f for f in found if f is not None]


def _parts(prompt: Prompt) -> list[dict[str, Any]]:
    """The typed parts of a conversation's messages."""
    if isinstance(prompt, str):
        return []
    return [p for m in prompt if not isinstance(m.get("content"), str) for p in m.get("content") or []]


def render(prompt: Prompt, n_images: int, processor: Any, chat: bool = True) -> str:
    """The text for the processor, holding exactly `n_images` of its image marks.

    A string is one user turn (its own marks or `<image>` say where the pictures go; without them they come first), or
    with chat=False the finished text. Raises PromptError when marks and pictures disagree or no chat template exists.
    """
    mark = processor.image_token
    if isinstance(prompt, str) and not chat:
        text = prompt
    else:
        if not getattr(processor, "chat_template", None):
            raise PromptError("this checkpoint has no chat template; give the finished text with chat=False")
        messages = _as_messages(prompt, n_images, mark) if isinstance(prompt, str) else list(prompt)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if text.count(mark) != n_images:
        raise PromptError(f"the prompt has {text.count(mark)} {mark} marks for {n_images} pictures")
    return text


def _as_messages(prompt: str, n_images: int, mark: str) -> list[dict[str, Any]]:
    pieces = prompt.split(mark if mark in prompt else USERS_MARK)
    if len(pieces) == 1:
        content: list[dict[str, Any]] = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
    else:
        content = []
        for number, piece in enumerate(pieces):
            if number:
                content.append({"type": "image"})
            if piece.strip():
                content.append({"type": "text", "text": piece.strip()})
    return [{"role": "user", "content": content}]
