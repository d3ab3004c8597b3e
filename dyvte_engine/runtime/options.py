"""Which of transformers' generation options are served, the values they take, and which are refused."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import transformers
from transformers.generation import BaseWatermarkingConfig

from ..errors import InvalidArgumentError

Rule = tuple[Callable[[Any], bool], str]  # whether a value is accepted, and what is


def _is_int(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _is_number(v: Any) -> bool:
    return (_is_int(v) or isinstance(v, float)) and abs(v) <= sys.float_info.max


def _is_token(v: Any) -> bool:
    return _is_int(v) and 0 <= v < 2**63


def _is_text(v: Any) -> bool:
    return isinstance(v, str) and v != ""


def _is_list(v: Any, accepts: Callable[[Any], bool], least: int = 0) -> bool:
    return isinstance(v, (list, tuple)) and len(v) >= least and all(map(accepts, v))


def _is_words(v: Any) -> bool:
    return _is_list(v, lambda word: _is_list(word, _is_token, 1), 1)


def _is_bias(v: Any) -> bool:
    """Pairs of token ids and a number, which may be infinite: that forbids."""
    pairs = list(v.items()) if isinstance(v, dict) else v
    if not _is_list(pairs, lambda pair: isinstance(pair, (list, tuple)) and len(pair) == 2, 1):
        return False
    biases = all(b == -math.inf or (_is_number(b) and abs(b) <= 1e9) for _, b in pairs)
    return biases and _is_words([ids for ids, _ in pairs])


def _is_decay(v: Any) -> bool:
    return _is_list(v, _is_number) and len(v) == 2 and _is_int(v[0]) and v[0] >= 0 and _FACTOR[0](v[1])


def _whole(low: int, note: str = "") -> Rule:
    return lambda v: _is_int(v) and v >= low, f"an integer of at least {low}{note}"


_FLAG: Rule = (lambda v: isinstance(v, bool), "True, False")
_SHARE: Rule = (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_PART: Rule = (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, up to 1")
# All of these together leave finite what float32 holds of logits.
_FACTOR: Rule = (lambda v: _is_number(v) and 1e-4 <= v <= 1e4, "a number from 1e-4 to 1e4")
_TOKENS: Rule = (lambda v: _is_list(v, _is_token), "a list of token ids")
_END: Rule = (lambda v: _is_token(v) or _is_list(v, _is_token), "a token id or a list of token ids")

_ONLY_SAMPLING: dict[str, Rule] = {
    "temperature": (
        lambda v: _is_number(v) and 1e-20 <= v <= 1e20,
        "a number from 1e-20 to 1e20 (do_sample=False is greedy)",
    ),
    "top_h": _PART,
    "top_k": _whole(0, " (0 is off)"),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "typical_p": _PART,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
}
_SERVED: dict[str, Rule] = {
    "max_new_tokens": _whole(1),
    "max_length": _whole(1),
    "min_new_tokens": _whole(0),
    "min_length": _whole(0),
    "max_time": (lambda v: _is_number(v) and v >= 0, "seconds, at least 0"),
    "stop_strings": (lambda v: _is_text(v) or _is_list(v, _is_text, 1), "a string or a list of strings, none empty"),
    "eos_token_id": (_END[0], f"{_END[1]}; with [] no token ends an answer"),
    "do_sample": _FLAG,
    **_ONLY_SAMPLING,
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": _whole(0),
    "encoder_no_repeat_ngram_size": _whole(0),
    "sequence_bias": (_is_bias, "{(token ids): number} or [[[token ids], number], ...], numbers up to 1e9"),
    "bad_words_ids": (_is_words, "a list of lists of token ids, none empty"),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "forced_bos_token_id": (_is_token, "a token id"),
    "forced_eos_token_id": (lambda v: _END[0](v) and v != [], _END[1]),
    "exponential_decay_length_penalty": (_is_decay, f"(an integer of at least 0, {_FACTOR[1]})"),
    "remove_invalid_values": _FLAG,
    "renormalize_logits": _FLAG,
    "watermarking_config": (
        lambda v: isinstance(v, (dict, BaseWatermarkingConfig)),
        "transformers' WatermarkingConfig or SynthIDTextWatermarkingConfig, or a dict of the former's arguments",
    ),
}
# Other searches, second models, several answers: the values that ask for none of it.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "is_assistant": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (None, False),
    "synced_gpus": (None, False),
}
# Of no effect without one of those, or about how transformers computes.
_IDLE = {
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "low_memory", "speculation_type"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
    *("prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"),
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
}
_OUTPUTS = {"return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"}
_PLAIN = (bool, int, float, str, type(None))  # what `repr` says all of
_OF_TOKENS = (
    *("eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("bad_words_ids", "sequence_bias"),
)


def merge_config(base: Any, given: Any | None, options: dict[str, Any], vocab_size: int | None = None) -> Any:
    """The checkpoint's GenerationConfig, replaced by `given` if there is one, updated with keyword `options`.

    Special tokens that `given` leaves out are the checkpoint's. `base`, `given` and `options` are left as they are.

    Args:
        vocab_size: number of logits. Token ids that the caller names must be below it.

    Raises:
        InvalidArgumentError: an option that is unknown or not served, or a value that is not accepted; wherever it
            comes from, unless it has no effect there.
    """
    defaults = transformers.GenerationConfig()
    _check_names(options, defaults)
    if given is not None and not isinstance(given, transformers.GenerationConfig):
        raise InvalidArgumentError(f"generation_config is a {type(given).__name__}; accepted: a GenerationConfig")
    config = copy.deepcopy(base if given is None else given)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(base, name))
    if config.max_length == defaults.max_length:
        config.max_length = None  # releases before 5 have a default, which asks for nothing
    values = vars(config) | options
    _check_served(values, options)
    _check_refused(values)
    _check_unknown(values, base, defaults)
    _check_tokens(values, base, vocab_size)
    chosen = copy.deepcopy({k: v for k, v in options.items() if k != "synced_gpus"})
    try:
        if isinstance(chosen.get("watermarking_config"), dict):
            chosen["watermarking_config"] = transformers.WatermarkingConfig(**chosen["watermarking_config"])
        config.update(**chosen)
    except (TypeError, ValueError) as e:  # combinations that transformers refuses
        raise InvalidArgumentError(f"generation options {', '.join(chosen)}: {e}") from e
    return config


class MergedConfigs:
    """`merge_config`, which gives again what it made of the same: a call takes 0.3 ms, and most are alike.

    What it gives belongs to all who ask, and is only read. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._newest: tuple[Any, Any] = None, None  # what was asked, and the answer

    def __call__(self, base: Any, given: Any | None, options: dict[str, Any], vocab_size: int) -> Any:
        plain = given is None and all(type(value) in _PLAIN for value in options.values())
        if not plain:
            return merge_config(base, given, options, vocab_size)
        asked = repr((vars(base), options, vocab_size))
        known, config = self._newest
        if asked != known:
            config = merge_config(base, given, options, vocab_size)
            self._newest = asked, config
        return config


def check_seed(seed: Any) -> int:
    """The seed of one sequence. Raises InvalidArgumentError unless it is an integer of at most 64 bits."""
    if not _is_int(seed) or not -(2**63) <= seed < 2**64:
        raise InvalidArgumentError(f"seed is {seed!r}; accepted: an integer from -2**63 to 2**64 - 1")
    return int(seed)


def sequence_seeds(seed: Any, n: int) -> list[int]:
    """The seeds of n sequences: seed + i for one seed, or those listed.

    Raises:
        InvalidArgumentError: as `check_seed`, or a list of another length.
    """
    if not isinstance(seed, Sequence) or isinstance(seed, (str, bytes)):
        return [check_seed(check_seed(seed) + i) for i in range(n)]
    if len(seed) != n:
        raise InvalidArgumentError(f"seed has {len(seed)} entries for {n} prompts")
    return list(map(check_seed, seed))


def _check_names(options: dict[str, Any], defaults: Any) -> None:
    known = [name for name in _SERVED if hasattr(defaults, name)]  # top_h is not known to every release
    for name in options:
        if name not in known and name not in _REFUSED:
            raise InvalidArgumentError(f"unknown option {name!r}; accepted: {', '.join(known)}")


def _check_served(values: dict[str, Any], options: dict[str, Any]) -> None:
    for name, (accepts, accepted) in _SERVED.items():
        value = values.get(name)
        used = name in options or name not in _ONLY_SAMPLING or values["do_sample"]
        if used and value is not None and not accepts(value):
            raise InvalidArgumentError(f"{name} is {value!r}; accepted: {accepted}")
    if values["forced_eos_token_id"] is not None and values["max_new_tokens"] is values["max_length"] is None:
        raise InvalidArgumentError("forced_eos_token_id needs max_new_tokens: it is forced at the last place")


def _check_refused(values: dict[str, Any]) -> None:
    for name, off in _REFUSED.items():
        value = values.get(name)
        if name == "penalty_alpha" and (values["do_sample"] or values["top_k"] in (0, 1)):
            continue  # transformers looks at it in a greedy search with a choice
        if not any(_same(value, v) for v in off):
            accepted = " or ".join(map(str, off))
            raise InvalidArgumentError(f"{name} is {value!r}, which is not served; accepted: {accepted}")


def _check_unknown(values: dict[str, Any], base: Any, defaults: Any) -> None:
    """Options of other releases and outputs that nobody gives; what the checkpoint alone says of outputs is left."""
    for name in sorted(values.keys() - _SERVED.keys() - _REFUSED.keys() - _IDLE):
        value, default = values[name], getattr(defaults, name, None)
        from_checkpoint = hasattr(base, name) and _same(value, getattr(base, name))
        ignored = from_checkpoint and (name in _OUTPUTS or not hasattr(defaults, name))
        off = value is None or (not value and not default) or _same(value, default)
        if not (name.startswith("_") or ignored or off):
            raise InvalidArgumentError(f"{name} is {value!r} in generation_config, which is not served")


def _check_tokens(values: dict[str, Any], base: Any, vocab_size: int | None) -> None:
    for name in _OF_TOKENS:
        value = values[name]
        if vocab_size is None or _same(value, getattr(base, name)):
            continue
        beyond = [t for t in _token_ids(value) if t >= vocab_size]
        if beyond:
            raise InvalidArgumentError(f"{name} has token {beyond[0]}; accepted: below {vocab_size} (vocabulary)")


def _token_ids(value: Any) -> Iterator[int]:
    """All token ids in an option's value; the numbers of a bias are no ids."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value:
            bias = isinstance(part, (list, tuple)) and len(part) == 2 and isinstance(part[0], (list, tuple))
            yield from _token_ids(part[0] if bias else part)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
