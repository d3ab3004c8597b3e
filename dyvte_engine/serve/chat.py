"""From OpenAI's messages to the engine's, with a check that nobody writes control tokens into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..inputs.chat_templates import apply_template
from .errors import ApiError
from .protocol import Message, TextPart


def check_length(texts: Iterable[str], most: int) -> None:
    """Raises ApiError 413 for more characters than `most` together: to count their tokens would take long."""
    given = sum(map(len, texts))
    if given > most:
        raise ApiError(413, f"the request holds {given:,} characters of text; accepted: {most:,}", "messages")


def texts_of(messages: list[Message]) -> Iterator[str]:
    """All text that users wrote."""
    for message in messages:
        if isinstance(message.content, str):
            yield message.content
        else:
            yield from (part.text for part in message.content if isinstance(part, TextPart))


def conversation(messages: list[Message], media: list[Any]) -> list[dict[str, Any]]:
    """Messages as the engine takes them, `media` in the order of their parts."""
    left = iter(media)
    return [
        {"role": _role(m), "content": m.content if isinstance(m.content, str) else [_part(p, left) for p in m.content]}
        for m in messages
    ]


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _part(part: Any, media: Iterator[Any]) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    kind = part.type.removesuffix("_url")
    return {"type": kind, kind: next(media)}


def check_text(processor: Any, messages: list[Message]) -> None:
    """Raises ApiError where the text of messages would be read as control tokens: marks of pictures, turns, the end.

    The tokens that control are compared with those of the same conversation with "x" for every text, so it does not
    matter how they came about: written out, put together of several parts, or by the tokenizer's normaliser.
    """
    given, blank = (_control_tokens(processor, [_shape(m, hide) for m in messages]) for hide in (False, True))
    if given == blank:
        return
    at = next((i for i, (a, b) in enumerate(zip(given, blank)) if a != b), min(len(given), len(blank)))
    named = repr(processor.tokenizer.convert_ids_to_tokens(given[at])) if at < len(given) else "control tokens"
    raise ApiError(400, f"messages hold {named} as text, which controls this model; accepted: other text", "messages")


def _shape(message: Message, hide: bool) -> dict[str, Any]:
    def shown(text: str) -> str:
        return "x" if hide and text else text

    content: Any = message.content
    if isinstance(content, str):
        return {"role": _role(message), "content": shown(content)}
    parts = [
        {"type": "text", "text": shown(p.text)} if isinstance(p, TextPart) else {"type": p.type.removesuffix("_url")}
        for p in content
    ]
    return {"role": _role(message), "content": parts}


def _control_tokens(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    control = control_ids(processor)
    ids = processor.tokenizer(apply_template(processor, messages), add_special_tokens=False).input_ids
    return [token for token in ids if token in control]


def control_ids(processor: Any) -> set[int]:
    """Ids of all special tokens, marks of pictures and videos included; that of unknown words is not one."""
    tokenizer = processor.tokenizer
    ids = set(tokenizer.all_special_ids)
    ids |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (ids | mark_ids(processor)) - {tokenizer.unk_token_id}


def mark_ids(processor: Any) -> set[int]:
    """Ids of the marks of pictures and videos."""
    marks = (getattr(processor, name, None) for name in ("image_token", "video_token"))
    ids = {processor.tokenizer.convert_tokens_to_ids(mark) for mark in marks if mark}
    return ids - {processor.tokenizer.unk_token_id}
