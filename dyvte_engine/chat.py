"""A conversation: every turn is a request that holds all turns before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .requests import GenerationResult, StreamChunk


class Chat:
    """What was said, as messages in transformers' format, and the next turn.

    A turn that fails, or a stream that is left before its end, leaves the conversation as it was. One thread at a time.
    """

    def __init__(
        self,
        generate: Callable[..., GenerationResult | list[GenerationResult]],
        stream: Callable[..., Iterator[StreamChunk]],
        options: dict[str, Any],
        system: str | None = None,
    ):
        """generate, stream: an engine's; `options` are theirs, for every turn that does not give its own."""
        self._generate, self._stream, self._options = generate, stream, options
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append(_said("system", system))

    def ask(self, text: str, images: Any = None, **options: Any) -> GenerationResult:
        """The next turn: a question, with further pictures if there are any (one or a list), and its answer.

        options: as in `Engine.generate`.

        Raises:
            PromptError, ImageError, InvalidArgumentError: before anything is computed.
        """
        turn = _said("user", text, images)
        result = self._generate([*self.messages, turn], **{**self._options, **options})
        assert isinstance(result, GenerationResult)
        self.messages += [turn, _said("assistant", result.text)]
        return result

    def stream(self, text: str, images: Any = None, **options: Any) -> Iterator[StreamChunk]:
        """As `ask`, yielding every token as it comes; the last chunk carries the result."""
        turn = _said("user", text, images)
        chunks = self._stream([*self.messages, turn], **{**self._options, **options})
        return self._drain(chunks, turn)

    def _drain(self, chunks: Iterator[StreamChunk], turn: dict[str, Any]) -> Iterator[StreamChunk]:
        for chunk in chunks:
            if chunk.result is not None:
                self.messages += [turn, _said("assistant", chunk.result.text)]
            yield chunk


def _said(role: str, text: str, images: Any = None) -> dict[str, Any]:
    pictures = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}
