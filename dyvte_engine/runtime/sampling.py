"""Choosing the next token: transformers' own logits processors and names, one random stream per sequence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import InvalidArgumentError

SUPPORTED = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "stop_strings",
    "eos_token_id",
)


def merge_config(base: Any, given: Any | None, options: dict[str, Any]) -> Any:
    """The checkpoint's GenerationConfig, replaced by `given` if there is one, updated with keyword `options`.

    Raises:
        InvalidArgumentError: an option this engine does not know, or a value transformers refuses.
    """
    unknown = sorted(set(options) - set(SUPPORTED))
    if unknown:
        raise InvalidArgumentError(f"unknown option {unknown[0]!r}; accepted: {', '.join(SUPPORTED)}")
    config = copy.deepcopy(base if given is None else given)
    if (config.num_beams or 1) > 1:
        raise InvalidArgumentError(f"num_beams is {config.num_beams}; accepted: 1")
    _check_ranges(options)
    config.update(**options)
    return config


def _check_ranges(options: dict[str, Any]) -> None:
    rules = {
        "max_new_tokens": (lambda v: isinstance(v, int) and v >= 1, "an integer of at least 1"),
        "temperature": (lambda v: v > 0, "more than 0 (do_sample=False is greedy)"),
        "top_k": (lambda v: isinstance(v, int) and v >= 0, "an integer of at least 0 (0 is off)"),
        "top_p": (lambda v: 0 < v <= 1, "above 0, up to 1"),
        "min_p": (lambda v: 0 <= v <= 1, "0 to 1"),
        "repetition_penalty": (lambda v: v > 0, "more than 0"),
    }
    for name, (accepts, accepted) in rules.items():
        value = options.get(name)
        if value is not None and not accepts(value):
            raise InvalidArgumentError(f"{name} is {value!r}; accepted: {accepted}")


class Sampler:
    """The next tokens of one sequence. `prompt_ids` are what penalties look at too, as in transformers."""

    def __init__(
        self,
        config: Any,
        prompt_ids: list[int],
        seed: int,
        eos: Sequence[int],
        device: torch.device,
        tokenizer: Any = None,
    ):
        self._greedy = not config.do_sample
        self._chain = _processors(config, len(prompt_ids), list(eos), device)
        self.plain = self._greedy and not self._chain
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """logits f32 [vocab] after all `ids` so far -> int64 []."""
        scores = self._chain(torch.tensor([ids], device=logits.device), logits[None].clone())[0]
        if self._greedy:
            return scores.argmax()
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[0]


class StopRules:
    """When one sequence ends."""

    def __init__(self, config: Any, tokenizer: Any, eos: Sequence[int], prompt_len: int, max_new_tokens: int):
        self._eos, self._max = set(eos), max_new_tokens
        self._strings = transformers.StopStringCriteria(tokenizer, config.stop_strings) if config.stop_strings else None

    def reason(self, ids: Sequence[int], new: Sequence[int]) -> str | None:
        """After a token was appended: "stop" (end token), "stop_string", "length", or None."""
        if new[-1] in self._eos:
            return "stop"
        if self._strings is not None and bool(self._strings(torch.tensor([ids]), None)[0]):
            return "stop_string"
        return "length" if len(new) >= self._max else None


def end_tokens(config: Any, tokenizer: Any) -> list[int]:
    eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _processors(config: Any, prompt_len: int, eos: list[int], device: torch.device) -> Any:
    """transformers' chain in transformers' order, holding only what the config turns on."""
    t = transformers
    chain = t.LogitsProcessorList()
    if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
        chain.append(t.RepetitionPenaltyLogitsProcessor(penalty=float(config.repetition_penalty)))
    if config.no_repeat_ngram_size:
        chain.append(t.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.min_new_tokens and eos:
        chain.append(t.MinNewTokensLengthLogitsProcessor(prompt_len, config.min_new_tokens, eos, device=str(device)))
    if config.do_sample:
        if config.temperature is not None and config.temperature != 1.0:
            chain.append(t.TemperatureLogitsWarper(float(config.temperature)))
        top_k = 50 if config.top_k is None else config.top_k  # what transformers' generate takes for "unset"
        if top_k:
            chain.append(t.TopKLogitsWarper(top_k))
        if config.top_p is not None and config.top_p < 1.0:
            chain.append(t.TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            chain.append(t.MinPLogitsWarper(config.min_p))
    return chain
