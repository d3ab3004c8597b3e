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
    """Next tokens for a batch, every sequence as if it were alone.

    `prompts` are the prompts' ids, which penalties look at too, as in transformers; `seeds` one int per sequence.
    """

    def __init__(
        self, config: Any, prompts: Sequence[list[int]], seeds: Sequence[int], eos: Sequence[int], device: torch.device
    ):
        self.greedy = not config.do_sample
        self.chains = [_processors(config, len(ids), list(eos), device) for ids in prompts]
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]

    def __call__(self, logits: Tensor, sequences: Sequence[int], ids: Sequence[list[int]]) -> Tensor:
        """logits f32 [B, vocab] of the sequences numbered `sequences`, whose ids so far are `ids` -> int64 [B]."""
        if self.greedy and not any(self.chains[s] for s in sequences):
            return logits.argmax(-1)
        chosen = []
        for row, s, so_far in zip(logits, sequences, ids, strict=True):
            scores = self.chains[s](torch.tensor([so_far], device=row.device), row[None].clone())[0]
            if self.greedy:
                chosen.append(scores.argmax())
            else:
                chosen.append(torch.multinomial(scores.softmax(-1), 1, generator=self.generators[s])[0])
        return torch.stack(chosen)


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
