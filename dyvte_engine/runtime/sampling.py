"""Choosing the next token and when to stop: transformers' own processors and criteria, for one sequence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import InvalidArgumentError, first_line
from ..kernels.transfer import copy_later, to_device
from ..requests import TokenLogprobs
from .options import check_seed, merge_config, sequence_seeds

__all__ = [
    "Sampler",
    "StopRules",
    "answer_limit",
    "check_seed",
    "end_tokens",
    "merge_config",
    "most_likely",
    "sequence_seeds",
    "token_logprobs",
]

_Asked = tuple[str, Any, Callable[[], Any]]  # an option, whether it is on, its processor


def end_tokens(config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the config's, or the tokenizer's where the config has none."""
    ids = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else sorted(set(ids))


def answer_limit(config: Any, prompt_len: int) -> int | None:
    """The longest answer that a config of `merge_config` allows, in tokens; None if it names no length.

    Raises:
        InvalidArgumentError: `max_length`, which counts the prompt, leaves no room for an answer.
    """
    if config.max_new_tokens is not None or config.max_length is None:
        return config.max_new_tokens
    if config.max_length <= prompt_len:
        given = f"max_length (prompt and answer) is {config.max_length} and the prompt has {prompt_len} tokens"
        raise InvalidArgumentError(f"{given}; accepted: more than that, or max_new_tokens")
    return config.max_length - prompt_len


class Sampler:
    """The next tokens of one sequence, as transformers' generate would choose them with a random stream of its own.

    Args:
        config: of `merge_config`.
        prompt_ids: the prompt, which penalties look at too, as in transformers.
        seed: of this sequence's draws; nothing else has a part in them.
        eos: the end tokens.
        device: of the logits.
        processors: of the request, put where transformers puts those that its caller gives.

    Attributes:
        plain: the argmax of the logits is the answer.

    Raises:
        InvalidArgumentError: a value that only transformers' processors refuse.
    """

    def __init__(
        self,
        config: Any,
        prompt_ids: list[int],
        seed: int,
        eos: Sequence[int],
        device: torch.device,
        processors: Sequence[Callable[[Any, Any], Any]] = (),
    ):
        self._prompt = _OnDevice(prompt_ids, device)
        self._chain = _processors(config, self._prompt, eos, processors)
        self._stream = torch.Generator(device).manual_seed(check_seed(seed)) if config.do_sample else None
        self.plain = not self._chain and self._stream is None

    @cached_property
    def _ids(self) -> Tensor:
        """Those that the chain has seen."""
        return self._prompt.tensor

    def __call__(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """logits f32 [vocab] of the next token, all ids so far, which only ever grow -> int64 [] on their device.

        Raises:
            InvalidArgumentError: no token may be drawn; on a GPU torch ends the process then.
        """
        scores = self.scores(logits, ids)
        if self._stream is None:
            return scores.argmax()
        try:
            return torch.multinomial(scores.softmax(-1), 1, generator=self._stream)[0]
        except RuntimeError as e:
            given = f"the options leave no token to draw: {first_line(e)}"
            raise InvalidArgumentError(f"{given}; accepted: some that allow one") from e

    def scores(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """The processed scores f32 [vocab] that the token is chosen from; arguments as in a call."""
        if not self._chain:
            return logits
        new = to_device(ids[len(self._ids) :], logits.device, torch.int64)
        self._ids = torch.cat((self._ids, new))
        try:
            return self._chain(self._ids[None], logits[None].clone())[0]
        except OverflowError as e:  # of a penalty that grows with the answer
            raise InvalidArgumentError(f"the options overflow after {len(ids)} tokens: {first_line(e)}") from e


def most_likely(logits: Tensor) -> tuple[Tensor, Callable[[], list[int]]]:
    """f32 [B, vocab] -> int64 [B] on its device, which may be written to, and a function that reads them by then.

    It gives -1 where the logits are not finite. On CUDA one kernel and one copy.
    """
    if not logits.is_cuda:
        best, tokens = logits.max(-1)  # NaN is above all
        return tokens, lambda: _finite(best.tolist(), tokens.tolist())
    n = len(logits)
    memory = torch.empty(12 * n, dtype=torch.uint8, device=logits.device)

    def views(of: Tensor) -> tuple[Tensor, Tensor]:
        return of[8 * n :].view(torch.float32), of[: 8 * n].view(torch.int64)

    best, tokens = views(memory)
    torch.max(logits, -1, out=(best, tokens))

    def taken(of: Tensor) -> list[int]:
        return _finite(*(there.tolist() for there in views(of)))

    return tokens, lambda: copy_later(memory, taken)()


def _finite(values: list[float], tokens: list[int]) -> list[int]:
    return [token if math.isfinite(value) else -1 for value, token in zip(values, tokens, strict=True)]


def token_logprobs(logits: Tensor, token: Tensor, top: int) -> TokenLogprobs:
    """Of one place: logits f32 [vocab], the chosen token int64 [], and how many of the most likely ones to name."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


class StopRules:
    """When one sequence ends. Its `max_time` runs from here.

    Args:
        config: of `merge_config`.
        tokenizer: for `stop_strings`.
        eos: the end tokens.
        prompt_len, max_new_tokens: tokens of the prompt, and the most of the answer.

    Raises:
        InvalidArgumentError: stop strings that no token of the tokenizer can end.
    """

    def __init__(self, config: Any, tokenizer: Any, eos: Sequence[int], prompt_len: int, max_new_tokens: int):
        self._eos = frozenset(eos)
        limit = answer_limit(config, prompt_len)
        self._limit = max_new_tokens if limit is None else min(limit, max_new_tokens)
        self._deadline = None if config.max_time is None else time.perf_counter() + config.max_time
        self._strings = None
        if config.stop_strings is not None:
            try:
                with torch.device("cpu"):  # whatever device the caller has made the default
                    self._strings = transformers.StopStringCriteria(tokenizer, config.stop_strings)
            except ValueError as e:
                raise InvalidArgumentError(f"stop_strings is {config.stop_strings!r}: {e}") from e

    def reason(self, ids: Sequence[int], new: Sequence[int]) -> str | None:
        """After a token was appended to all `ids` and to the `new` ones: why the sequence ends there, if it does.

        "stop" (an end token), "stop_string", "length", "time", in this order, or None.
        """
        if new[-1] in self._eos:
            return "stop"
        if self._strings is not None:
            last = ids[-self._strings.maximum_token_len :]  # a stop string is at most as many tokens as characters
            with torch.device("cpu"):
                if bool(self._strings(torch.tensor([last]), None)[0]):
                    return "stop_string"
        if len(new) >= self._limit:
            return "length"
        return "time" if self._deadline is not None and time.perf_counter() > self._deadline else None


class _Watermark(transformers.LogitsProcessor):  # type: ignore[misc]
    """The watermark's own processor, made when the size of the vocabulary is seen."""

    def __init__(self, config: Any):
        self._config = config
        self._processor: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._processor is None:
            self._processor = self._config.construct_processor(scores.shape[-1], scores.device)
        return self._processor(input_ids, scores)


@dataclass
class _OnDevice:
    """Token ids, which are copied to the device when somebody looks at them there: mostly nobody does."""

    ids: Sequence[int]
    device: torch.device

    @cached_property
    def tensor(self) -> Tensor:
        return to_device(list(self.ids), self.device, torch.int64)


def _processors(config: Any, prompt: _OnDevice, eos: Sequence[int], given: Sequence[Callable[[Any, Any], Any]]) -> Any:
    """transformers' chain in transformers' order, holding only what the config turns on and what is given."""
    chain = transformers.LogitsProcessorList(_made(config, _penalties(config, prompt, eos)))
    chain.extend(given)
    chain.extend(_made(config, _warpers(config, prompt.device) if config.do_sample else []))
    c, t = config, transformers
    last: list[_Asked] = [
        ("watermarking_config", c.watermarking_config, lambda: _Watermark(c.watermarking_config)),
        ("renormalize_logits", c.renormalize_logits, t.LogitNormalization),
    ]
    chain.extend(_made(config, last))
    return chain


def _made(config: Any, asked: list[_Asked]) -> list[Any]:
    made = []
    for name, on, make in asked:
        try:
            if on:
                made.append(make())
        except (TypeError, ValueError) as e:
            raise InvalidArgumentError(f"{name} is {getattr(config, name)!r}: {e}") from e
    return made


def _penalties(c: Any, prompt: _OnDevice, eos: Sequence[int]) -> list[_Asked]:
    """What greedy search looks at too. The prompt [n] is what transformers calls the encoder's input here."""
    t, n, device, end = transformers, len(prompt.ids), str(prompt.device), _OnDevice(eos, prompt.device)
    least = c.min_length if c.min_new_tokens is None else c.min_new_tokens and n + c.min_new_tokens
    begin = n if n > 1 or c.forced_bos_token_id is None else n + 1
    decay, limit = c.exponential_decay_length_penalty, answer_limit(c, n) or 0  # merge_config wants one where it counts
    return [
        ("sequence_bias", c.sequence_bias, lambda: t.SequenceBiasLogitsProcessor(_biases(c.sequence_bias))),
        (
            "encoder_repetition_penalty",
            _differs(c.encoder_repetition_penalty, 1),
            lambda: t.EncoderRepetitionPenaltyLogitsProcessor(float(c.encoder_repetition_penalty), prompt.tensor[None]),
        ),
        (
            "repetition_penalty",
            _differs(c.repetition_penalty, 1),
            lambda: t.RepetitionPenaltyLogitsProcessor(float(c.repetition_penalty)),
        ),
        (
            "no_repeat_ngram_size",
            c.no_repeat_ngram_size,
            lambda: t.NoRepeatNGramLogitsProcessor(c.no_repeat_ngram_size),
        ),
        (
            "encoder_no_repeat_ngram_size",
            c.encoder_no_repeat_ngram_size,
            lambda: t.EncoderNoRepeatNGramLogitsProcessor(c.encoder_no_repeat_ngram_size, prompt.tensor[None]),
        ),
        (
            "bad_words_ids",
            c.bad_words_ids,
            lambda: t.NoBadWordsLogitsProcessor(list(map(list, c.bad_words_ids)), end.tensor if eos else None),
        ),
        ("min_length", least and eos, lambda: t.MinLengthLogitsProcessor(least, end.tensor, device)),
        (
            "forced_bos_token_id",
            c.forced_bos_token_id is not None,
            lambda: t.ForcedBOSTokenLogitsProcessor(c.forced_bos_token_id),
        ),
        (
            "forced_eos_token_id",
            c.forced_eos_token_id is not None,
            lambda: t.ForcedEOSTokenLogitsProcessor(n + limit, c.forced_eos_token_id, device),
        ),
        ("remove_invalid_values", c.remove_invalid_values, t.InfNanRemoveLogitsProcessor),
        (
            "exponential_decay_length_penalty",
            decay and eos,
            lambda: t.ExponentialDecayLengthPenalty(decay, end.tensor, n),
        ),
        ("suppress_tokens", c.suppress_tokens, lambda: t.SuppressTokensLogitsProcessor(c.suppress_tokens, device)),
        (
            "begin_suppress_tokens",
            c.begin_suppress_tokens,
            lambda: t.SuppressTokensAtBeginLogitsProcessor(c.begin_suppress_tokens, begin, device),
        ),
    ]


def _warpers(c: Any, device: torch.device) -> list[_Asked]:
    """What shapes the distribution that is sampled."""
    t, top_h = transformers, getattr(c, "top_h", None)  # which releases before 5 do not have
    top_k = c.top_k
    if top_k is None and t.GenerationConfig().top_k is None:
        top_k = 50  # what transformers takes for a value that is not set
    return [
        ("temperature", _differs(c.temperature, 1), lambda: t.TemperatureLogitsWarper(float(c.temperature))),
        ("top_h", top_h, lambda: t.TopHLogitsWarper(top_h)),
        ("top_k", top_k, lambda: t.TopKLogitsWarper(top_k)),
        ("top_p", _differs(c.top_p, 1), lambda: t.TopPLogitsWarper(c.top_p)),
        ("min_p", c.min_p is not None, lambda: t.MinPLogitsWarper(c.min_p)),
        ("typical_p", _differs(c.typical_p, 1), lambda: t.TypicalLogitsWarper(c.typical_p)),
        ("epsilon_cutoff", 0 < (c.epsilon_cutoff or 0) < 1, lambda: t.EpsilonLogitsWarper(c.epsilon_cutoff)),
        ("eta_cutoff", 0 < (c.eta_cutoff or 0) < 1, lambda: t.EtaLogitsWarper(c.eta_cutoff, device=str(device))),
    ]


def _differs(value: float | None, neutral: float) -> bool:
    return value is not None and value != neutral


def _biases(given: Any) -> dict[tuple[int, ...], float]:
    pairs = given.items() if isinstance(given, dict) else given
    return {tuple(ids): float(bias) for ids, bias in pairs}
