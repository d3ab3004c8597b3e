"""Answers of a given form: the tokens that a JSON schema allows next, by llguidance."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgumentError, first_line
from .errors import ApiError
from .protocol import ResponseFormat

_PARAM = "response_format"
# A small model that may write blanks for ever does.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes processors for `response_format`. The tokenizer's table is built at first use, which takes a second.

    Args:
        tokenizer: a fast one of transformers; vocab_size: number of logits; end: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end: list[int], most_characters: int):
        self._tokenizer, self._vocab_size, self._end, self._most = tokenizer, vocab_size, end, most_characters
        self._table: Any = None
        self._lock = threading.Lock()

    def processors(self, asked: ResponseFormat | None, n: int) -> list[Any]:
        """One for each of n answers; none for free text.

        Raises:
            ApiError: no llguidance here, a tokenizer it cannot read, a schema it does not know.
        """
        if asked is None or asked.type == "text":
            return []
        try:
            import llguidance
        except ImportError:
            raise ApiError(400, f"{_PARAM} needs llguidance, which this server does not have", _PARAM) from None
        schema: Any = {"type": "object"} if asked.json_schema is None else asked.json_schema.json_schema
        text = json.dumps(schema)
        if len(text) > self._most:
            raise ApiError(400, f"{_PARAM} holds {len(text):,} characters; accepted: {self._most:,}", _PARAM)
        table = self._tokens()
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT)
            matchers = [llguidance.LLMatcher(table, grammar, log_level=0) for _ in range(n)]
        except (ValueError, TypeError) as e:
            raise ApiError(400, f"{_PARAM} is not accepted: {first_line(e)}", _PARAM) from None
        wrong = next((m.get_error() for m in matchers if m.is_error()), None)
        if wrong:
            raise ApiError(400, f"{_PARAM} is not accepted: {wrong.splitlines()[0][:300]}", _PARAM)
        return [Constraint(matcher) for matcher in matchers]

    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._table is None:
                try:
                    self._table = from_tokenizer(self._tokenizer, self._vocab_size, list(self._end))
                except Exception as e:  # of its library; says which part of a tokenizer it does not know
                    why = f"{_PARAM} does not work with this model's tokenizer"
                    raise ApiError(400, f"{why}: {first_line(e)}", _PARAM) from e
            return self._table


class Constraint:
    """A logits processor of one answer: forbids what its grammar does not allow next."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._seen: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids int64 [1, n], scores f32 [1, vocab] -> scores, -inf where a token may not come."""
        new = [] if self._seen is None else ids[0, self._seen :].tolist()
        self._seen = ids.shape[1]
        if new and not self._matcher.consume_tokens(new):
            raise InvalidArgumentError(f"{_PARAM}: {self._matcher.get_error()}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool)
        mask = torch.zeros(scores.shape[1], dtype=torch.bool, device="cpu")
        mask[: len(allowed)] = torch.from_numpy(allowed)
        if not mask.any():
            raise InvalidArgumentError(f"{_PARAM}: no token continues it; {self._matcher.get_error()}")
        return scores.masked_fill(~mask.to(scores.device), float("-inf"))
