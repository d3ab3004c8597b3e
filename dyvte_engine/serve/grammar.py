"""Answers of a given form: the tokens that a JSON schema or an expression allows next, by llguidance."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgumentError, first_line
from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest

# A small model that may write blanks for ever does.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# A tenth of its own: expressions such as (a{1000}){1000} would hold up everybody's tokens for seconds.
_LIMITS: Any = {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 20_000, "step_max_items": 5_000}


class Grammars:
    """Makes processors for what a request says of its answer's form.

    The tokenizer's table is built at first use, which takes a second.

    Args:
        tokenizer: a fast one of transformers; vocab_size: number of logits; end: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end: list[int], most_characters: int):
        self._tokenizer, self._vocab_size, self._end, self._most = tokenizer, vocab_size, end, most_characters
        self._table: Any = None
        self._lock = threading.Lock()

    def processors(self, body: ChatRequest | CompletionRequest, n: int) -> list[Constraint]:
        """One for each of n answers; none for free text.

        Raises:
            ApiError: no llguidance here, a tokenizer it cannot read, a schema or an expression it does not know.
        """
        asked = _asked(body)
        if asked is None:
            return []
        place, kind, given = asked
        if body.ignore_eos or body.min_tokens:  # what has its form is at its end, and nothing may follow
            name = "ignore_eos" if body.ignore_eos else "min_tokens"
            raise ApiError(400, f"{name} and {place} are given; accepted: one of the two", name)
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise ApiError(400, f"{place} needs llguidance, which this server does not have", place) from None
        text = json.dumps(given)
        if len(text) > self._most:
            raise ApiError(400, f"{place} holds {len(text):,} characters; accepted: {self._most:,}", place)
        table = self._tokens(place)
        try:
            make = LLMatcher.grammar_from_regex
            grammar = make(given) if kind == "regex" else LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT)
            first = LLMatcher(table, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
            first.compute_bitmask()  # the longest one, here and not between the tokens of others
        except (ValueError, TypeError) as e:
            raise ApiError(400, f"{place} is not accepted: {first_line(e)}", place) from None
        if first.is_error():
            raise ApiError(400, f"{place} is not accepted: {first.get_error().splitlines()[0][:300]}", place)
        return [Constraint(matcher, place) for matcher in (first, *(first.deep_copy() for _ in range(n - 1)))]

    def _tokens(self, place: str) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._table is None:
                try:
                    self._table = from_tokenizer(self._tokenizer, self._vocab_size, list(self._end))
                except Exception as e:  # of its library; says which part of a tokenizer it does not know
                    why = f"{place} does not work with this model's tokenizer"
                    raise ApiError(400, f"{why}: {first_line(e)}", place) from e
            return self._table


class Constraint:
    """A logits processor of one answer: forbids what its grammar does not allow next. `place` is for errors."""

    def __init__(self, matcher: Any, place: str):
        self._matcher, self._place = matcher, place
        self._seen: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids int64 [1, n], scores f32 [1, vocab] -> scores, -inf where a token may not come."""
        new = [] if self._seen is None else ids[0, self._seen :].tolist()
        self._seen = ids.shape[1]
        if new and not self._matcher.consume_tokens(new):
            raise self._broken()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool)
        mask = torch.zeros(scores.shape[1], dtype=torch.bool, device="cpu")
        mask[: len(allowed)] = torch.from_numpy(allowed)
        if not mask.any():
            raise self._broken()
        return scores.masked_fill(~mask.to(scores.device), float("-inf"))

    def _broken(self) -> InvalidArgumentError:
        reason = (self._matcher.get_error() or "no token continues it").splitlines()[0]
        return InvalidArgumentError(f"{self._place} cannot be kept to: {reason[:300]}")


def _asked(body: ChatRequest | CompletionRequest) -> tuple[str, str, Any] | None:
    """The argument's name, "json" or "regex", and the schema or expression; None for free text."""
    format, other = body.response_format, body.structured_outputs
    if other is not None:
        if other.json_schema is not None:
            return "structured_outputs", "json", other.json_schema
        expression = other.regex if other.choice is None else "|".join(map(re.escape, other.choice))
        return "structured_outputs", "regex", expression
    if format is None or format.type == "text":
        return None
    return (
        "response_format",
        "json",
        {"type": "object"} if format.json_schema is None else format.json_schema.json_schema,
    )
