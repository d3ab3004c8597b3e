"""What the user gives (strings or conversations, pictures, videos) -> the text for the processor, one mark for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InvalidArgumentError, PromptError
from .chat_templates import apply_template
from .images import is_video, load_image, load_video

Prompt = str | Sequence[dict[str, Any]]  # a user's question, or a conversation in transformers' format
_NAMES = {"image": "images", "video": "videos"}
_ACCEPTED = "a string, a non-empty list of messages (dicts with role and content), or a list of either"


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt (a string or one conversation) and not a list of them.

    Raises InvalidArgumentError for what is neither.
    """
    if not isinstance(prompts, (str, list, tuple)):
        raise InvalidArgumentError(f"prompts is a {type(prompts).__name__}; accepted: {_ACCEPTED}")
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))


def as_batch(
    prompts: Any, images: Any, videos: Any = None
) -> tuple[list[Prompt], list[list[Image.Image]], list[list[np.ndarray]]]:
    """Normalise one or many prompts: a list of prompts, and the loaded pictures and videos of each.

    What messages hold of pictures and videos is taken out of them; a part {"type": "image"} stays where it was.

    Raises:
        InvalidArgumentError, ImageError: naming the place, as `prompts[2][0]` or `images[1]`.
    """
    single = is_single(prompts)
    batch: list[Prompt] = [prompts] if single else list(prompts)
    places = ["prompts"] if single else [f"prompts[{i}]" for i in range(len(batch))]
    given = {"image": _one_each("images", "a picture", images, single, len(batch))}
    given["video"] = _one_each("videos", "a video", videos, single, len(batch))
    sources: dict[str, list[list[tuple[str, Any]]]] = {"image": [], "video": []}
    for i, prompt in enumerate(batch):
        batch[i], inside = _taken_out(prompt, places[i])
        for kind, rows in sources.items():
            name = _NAMES[kind] if single else f"{_NAMES[kind]}[{i}]"
            outside = _listed(kind, given[kind][i], name)
            if outside and inside[kind]:
                both = f"{name} is given, and {places[i]} holds {_NAMES[kind]}"
                raise InvalidArgumentError(f"{both}; accepted: one of the two")
            rows.append(outside or inside[kind])
    pictures = [[load_image(source, place) for place, source in row] for row in sources["image"]]
    return batch, pictures, [[load_video(source, place) for place, source in row] for row in sources["video"]]


def _one_each(name: str, what: str, given: Any, single: bool, n: int) -> list[Any]:
    """`given` as a list with one entry for each of `n` prompts."""
    if single:
        return [given]
    if given is None:
        return [None] * n
    if not isinstance(given, (list, tuple)) or len(given) != n:
        raise InvalidArgumentError(
            f"{name} must be a list with one entry ({what}, a list, or None) for each of {n} prompts"
        )
    return list(given)


def _listed(kind: str, given: Any, name: str) -> list[tuple[str, Any]]:
    """One entry of `images` or `videos`, which is one of them or a list, with the place of each.

    A video may itself be a list, of frames.
    """
    if given is None:
        return []
    if not isinstance(given, (list, tuple)) or (kind == "video" and is_video(given)):
        return [(name, given)]
    return [(f"{name}[{i}]", one) for i, one in enumerate(given)]


def _taken_out(prompt: Any, place: str) -> tuple[Prompt, dict[str, list[tuple[str, Any]]]]:
    """The prompt without the pictures and videos in its messages, and those with their places."""
    found: dict[str, list[tuple[str, Any]]] = {"image": [], "video": []}
    if isinstance(prompt, str):
        return prompt, found
    if not isinstance(prompt, (list, tuple)) or not prompt:
        given = "an empty list" if isinstance(prompt, (list, tuple)) else f"a {type(prompt).__name__}"
        raise InvalidArgumentError(f"{place} is {given}; accepted: {_ACCEPTED}")
    messages = []
    for i, message in enumerate(prompt):
        where = f"{place}[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            given = "has no role" if isinstance(message, dict) else f"is a {type(message).__name__}"
            raise InvalidArgumentError(f"{where} {given}; accepted: a message, a dict with role and content")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [_part(part, f"content[{j}] of {where}", found) for j, part in enumerate(content)]
        elif not isinstance(content, str):
            given = f"content of {where} is a {type(content).__name__}"
            raise InvalidArgumentError(f"{given}; accepted: text or a list of parts")
        messages.append({**message, "content": content})
    return messages, found


def _part(part: Any, place: str, found: dict[str, list[tuple[str, Any]]]) -> dict[str, Any]:
    """A part of a message's content as chat templates know it; what it holds of pictures goes to `found`.

    Pictures are {"type": "image"} with an entry "image", "path" or "url", videos the same way, and in OpenAI's notation
    {"type": "image_url", "image_url": {"url": ...}}.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    kind = kind if isinstance(kind, str) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return dict(part)
    if kind == "image_url":
        url = part.get("image_url")
        found["image"].append((place, url.get("url") if isinstance(url, dict) else url))
        return {"type": "image"}
    if kind not in found:
        given = f"of type {kind!r}" if kind else f"a {type(part).__name__} without a type"
        raise InvalidArgumentError(f"{place} is {given}; accepted: dicts of type text (a string), image or video")
    sources = [part[name] for name in (kind, "path", "url") if part.get(name) is not None]
    if len(sources) > 1:
        raise InvalidArgumentError(f"{place} names its {kind} {len(sources)} times; accepted: {kind}, path or url")
    found[kind] += [(place, source) for source in sources]
    return {"type": kind}


def render(prompt: Prompt, n_images: int, processor: Any, chat: bool = True, n_videos: int = 0) -> str:
    """The text for the processor, holding exactly `n_images` of its image marks and `n_videos` of its video marks.

    A string is one user turn (its own marks, or `<image>` and `<video>`, say where they go; without them they come
    first), or with chat=False the finished text. Raises PromptError when marks and what is given disagree or no chat
    template exists.
    """
    if not isinstance(chat, bool):
        raise InvalidArgumentError(f"chat is {chat!r}; accepted: True or False")
    if not isinstance(getattr(processor, "image_token", None), str):
        raise PromptError(f"the processor ({type(processor).__name__}) has no image_token to say where pictures go")
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
        text = apply_template(processor, messages)
    if not _is_unicode(text):
        raise PromptError("the prompt holds half of a surrogate pair, which is no text; accepted: Unicode")
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


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
