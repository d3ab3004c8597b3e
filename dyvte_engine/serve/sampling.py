"""OpenAI's sampling options as the engine's."""

from __future__ import annotations

import secrets
from typing import Any

import torch
import transformers
from torch import Tensor

from .errors import ApiError
from .options import ServeOptions
from .protocol import ChatRequest, CompletionRequest


class Penalty:
    """A logits processor of one answer: OpenAI's presence and frequency penalties, of the answer's own tokens."""

    def __init__(self, presence: float, frequency: float):
        self._presence, self._frequency = presence, frequency
        self._counts: Tensor | None = None  # f32 [vocab]
        self._seen = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids int64 [1, n], scores f32 [1, vocab]; the ids of the first call are the prompt's."""
        if self._counts is None:
            self._counts, self._seen = torch.zeros_like(scores[0]), ids.shape[1]
        new = ids[0, self._seen :]
        self._seen = ids.shape[1]
        self._counts.index_add_(0, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._frequency * self._counts - self._presence * (self._counts > 0)


def options_of(body: ChatRequest | CompletionRequest, base: Any, max_len: int) -> dict[str, Any]:
    """Options of `Engine.generate`. `base`: the checkpoint's GenerationConfig, for what the request leaves open.

    Raises:
        ApiError: a key of logit_bias that is no token id.
    """
    longest = body.max_tokens
    if isinstance(body, ChatRequest):
        longest = longest or body.max_completion_tokens
    options = dict(
        max_new_tokens=longest,
        max_length=max_len if longest is None and base.max_new_tokens is None else None,
        min_new_tokens=body.min_tokens,
        repetition_penalty=body.repetition_penalty,
        eos_token_id=[] if body.ignore_eos else None,
        sequence_bias=_biases(body.logit_bias) or None,
        **_draws(body, base),
    )
    return {name: value for name, value in options.items() if value is not None}


def _draws(body: ChatRequest | CompletionRequest, base: Any) -> dict[str, Any]:
    """A temperature, or something that only makes sense with one, turns sampling on; 0 turns it off."""
    shapes = (body.temperature, body.top_p, body.top_k, body.min_p)
    on = base.do_sample if all(v is None for v in shapes) else body.temperature != 0
    if not on:
        return dict(do_sample=False)
    top_k = body.top_k
    if top_k is None:  # transformers' own default is 50, OpenAI's none
        top_k = base.top_k if base.top_k != (transformers.GenerationConfig().top_k or 50) else None
    return dict(
        do_sample=True, temperature=body.temperature, top_p=body.top_p, top_k=max(top_k or 0, 0), min_p=body.min_p
    )


def _biases(given: dict[str, float] | None) -> dict[tuple[int, ...], float]:
    for key in given or {}:
        if not (key.isascii() and key.isdigit() and len(key) < 16):
            raise ApiError(400, f"logit_bias has the key {key[:40]!r}; accepted: token ids", "logit_bias")
    return {(int(key),): float(bias) for key, bias in (given or {}).items()}


def stops_of(body: ChatRequest | CompletionRequest) -> list[str]:
    """The stop strings as a list."""
    return [body.stop] if isinstance(body.stop, str) else list(body.stop or [])


def seed_of(body: ChatRequest | CompletionRequest) -> int:
    """The request's seed, or one that nobody can guess."""
    return secrets.randbits(62) if body.seed is None else body.seed


def penalties(body: ChatRequest | CompletionRequest) -> list[Penalty]:
    """For one answer; none where they are 0."""
    presence, frequency = body.presence_penalty, body.frequency_penalty
    return [Penalty(presence, frequency)] if presence or frequency else []


def top_logprobs(body: ChatRequest | CompletionRequest) -> int | None:
    """How many alternatives to name at each place; None for no log-probabilities at all."""
    if isinstance(body, CompletionRequest):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def check_bounds(body: ChatRequest | CompletionRequest, choices: int, options: ServeOptions) -> None:
    """Raises ApiError for more than the operator allows in one request."""
    stops = stops_of(body)
    longest = max(map(len, stops), default=0)
    bounds = [
        ("n", choices, options.max_choices),
        ("logprobs", top_logprobs(body) or 0, options.max_logprobs),
        ("stop", len(stops), options.max_stops),
        ("stop", longest, options.max_stop_characters),
    ]
    for name, given, most in bounds:
        if given > most:
            what = " characters in one string" if given is longest else ""
            raise ApiError(400, f"{name} asks for {given}{what}; accepted: at most {most}", name)
    if "" in stops:
        raise ApiError(400, "stop holds an empty string; accepted: strings of a character or more", "stop")
