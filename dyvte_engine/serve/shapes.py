"""Answers in OpenAI's JSON: whole, and as the chunks of a stream."""

from __future__ import annotations

import time
from typing import Any

from .answer import Answer, Delta, chat_logprobs, completion_logprobs


class ChatShape:
    """Of /v1/chat/completions. `tokenizer` writes out the tokens of log-probabilities."""

    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, request_id: str, model: str, tokenizer: Any, with_usage: bool):
        self._tokenizer, self._with_usage = tokenizer, with_usage
        self._head = dict(id=f"{self.prefix}-{request_id}", created=int(time.time()), model=model)

    def whole(self, answers: list[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [{"index": i, **self._choice(a), "finish_reason": a.finish_reason} for i, a in enumerate(answers)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a choice's stream begins with."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)

    def deltas(self, index: int, delta: Delta, offset: int) -> list[dict[str, Any]]:
        """Of one token; `offset`: characters of the choice before it."""
        out = []
        if delta.text or delta.logprobs is not None:
            logprobs = chat_logprobs([delta], self._tokenizer)
            out.append(self._chunk(index, {"delta": {"content": delta.text}, "logprobs": logprobs}, None))
        if delta.finish_reason is not None:
            out.append(self._chunk(index, {"delta": {}, "logprobs": None}, delta.finish_reason))
        return out

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": message, "logprobs": chat_logprobs(answer.deltas, self._tokenizer)}

    def _chunk(self, index: int, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choices = [{"index": index, **content, "finish_reason": finish_reason}]
        usage = {"usage": None} if self._with_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": choices, **usage}


class CompletionShape(ChatShape):
    """Of /v1/completions."""

    whole_object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def deltas(self, index: int, delta: Delta, offset: int) -> list[dict[str, Any]]:
        if not delta.text and delta.logprobs is None and delta.finish_reason is None:
            return []
        logprobs = completion_logprobs([delta], self._tokenizer, offset)
        return [self._chunk(index, {"text": delta.text, "logprobs": logprobs}, delta.finish_reason)]

    def _choice(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text, "logprobs": completion_logprobs(answer.deltas, self._tokenizer)}
