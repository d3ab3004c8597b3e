"""transformers' own `generate`, with this project's prefill and decoding inside.

>>> from dyvte_engine import FixedExit, hf
>>> hf.enable(model, FixedExit(16))  # from here on model.generate, pipelines and streamers exit after layer 16
>>> model.generate(**inputs, max_new_tokens=64)
>>> model.generate(**inputs, custom_generate=hf.generate, policy=FixedExit(16))  # or for one call, by the official hook

What transformers prepares is used as it comes: vision features, position ids, logits processors, stopping criteria,
lengths. Its K/V cache is not: the cache of the result is None. The model stays its user's: it keeps its mode, its
gradients and its other callers in other threads. Changed weights are read anew at the next call; adapters, hooks and
other code around the decoder, which would not run, are refused. A copy of an enabled model is not enabled.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .config import EngineConfig
from .engine import Engine
from .errors import InvalidArgumentError
from .models import PreparedPrompt, VisionLanguageModel
from .policies import KeepAll, VisualTokenPolicy
from .runtime.running import Running
from .runtime.token_loop import drain

_BY_TOKEN = ("position_ids", "mm_token_type_ids", "token_type_ids")  # [..., B, n], padded like the ids
_NOT_NEEDED = ("cache_position", "use_cache", "logits_to_keep", "attention_mask")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEPT_FROM_HOOKS = ("streamer", "assistant_model", "synced_gpus")  # by transformers' generate

_exits: weakref.WeakKeyDictionary[Any, Exit] = weakref.WeakKeyDictionary()  # of the models that were met here
_exits_lock = threading.Lock()


class Exit:
    """What `enable` makes of a transformers model. Calls in several threads take turns."""

    def __init__(self, model: Any, policy: VisualTokenPolicy | str | None, grows: bool = False, **options: Any):
        """`grows`: nobody chose `max_batch`, so that a larger batch makes it larger."""
        self._lock = threading.RLock()
        self._model = weakref.proxy(model)  # the model may go while this is kept for it
        self._grows, self._options = grows, options
        self._last = threading.local()
        self._given: VisualTokenPolicy | str = KeepAll()
        self._engine: Engine | None = self._read()
        if policy is not None:
            self.policy = policy

    def _read(self) -> Engine:
        """Take the model over as it is now."""
        model = self._model
        if model.dtype not in _DTYPES:
            accepted = ", ".join(map(str, _DTYPES))
            raise InvalidArgumentError(f"the model is {model.dtype}; accepted: {accepted}")
        config = EngineConfig(model.device, model.dtype, **self._options)
        name = getattr(model.config, "_name_or_path", "") or model.__class__.__name__  # not its type: a proxy
        with torch.inference_mode(False):  # what is kept must serve calls in any mode
            return Engine(VisionLanguageModel(model, None, name, config.max_len), config)

    def release(self) -> None:
        """Give back what the engine holds; the next call makes another."""
        with self._lock:
            self._engine = None

    @property
    def engine(self) -> Engine:
        """That of the last call, or a new one where the model has changed since. Raises as a call does."""
        with self.ready(0) as engine:
            return engine

    @property
    def policy(self) -> VisualTokenPolicy | str:
        """Asked at every call. Raises InvalidArgumentError for one that acts in the tower, which transformers runs."""
        return self._given

    @policy.setter
    def policy(self, policy: VisualTokenPolicy | str) -> None:
        with self.ready(0) as engine:
            bound(engine, policy)
            self._given = policy

    @property
    def exit_layers(self) -> list[int | None]:
        """Of this thread's last call, the layer after which each prompt's last visual token left, or None."""
        return list(getattr(self._last, "exit_layers", []))

    @contextmanager
    def ready(self, batch: int) -> Iterator[Engine]:
        """The engine, for one caller at a time, with the model's weights of now.

        Raises ModelError when something around the decoder would be ignored.
        """
        with self._lock:
            if self._grows and batch > self._options["max_batch"]:
                self._options["max_batch"], self._engine = batch, None
            if self._engine is None or self._engine.model.guard.changed():
                self._engine = None  # a device may not have room for two
                self._engine = self._read()
            yield self._engine

    def prefill(
        self, engine: Engine, prepared: list[PreparedPrompt], policy: VisualTokenPolicy | str | None
    ) -> Running:
        """The prompts under the policy of one call, or else under the one that is set."""
        running = engine.prefill_prepared(prepared, bound(engine, self._given if policy is None else policy))
        self._last.exit_layers = list(running.exit_layers)
        return running


def bound(engine: Engine, policy: VisualTokenPolicy | str) -> VisualTokenPolicy:
    """`policy`, ready for this engine's model. Raises InvalidArgumentError, ModelError, HeadsError if it cannot be."""
    ready = engine.bind(policy)
    if ready.acts_in_tower:
        given = f"policy {type(ready).__name__} acts in the vision tower, which transformers runs before"
        raise InvalidArgumentError(f"{given}; accepted here: policies that act behind it (Engine takes all)")
    return ready


def enable(model: Any, policy: VisualTokenPolicy | str | None = None, **options: Any) -> Exit:
    """Give a live transformers model this project's generation, for its own `generate` and all that calls it.

    Args:
        policy: when visual tokens leave; default `KeepAll()`. To be changed at the returned object.
        **options: max_batch, max_len, page_size, attn_backend, drop_early_kv, graphs, pack_weights: as in
            `Engine.from_pretrained`, but pack_weights is False: with True the weights exist twice.

    The model's weights are used where they are. Those that are exchanged later, by `to`, `load_state_dict` or a merged
    adapter, are read anew at the next call. With pack_weights so are those that are written to, unless by `.data` into
    some numbers of a row alone, or of a vision tower's weight into a few rows alone.

    Raises:
        ModelError: a family that the engine does not run, or something around the decoder (adapters, hooks, layers of
            another type) that would be ignored. InvalidArgumentError: an option that is not accepted.
    """
    disable(model)
    state = Exit(model, policy, **options)
    with _exits_lock:
        _exits[model] = state
    model.generate = _Generate(model, model.__dict__.get("generate"))
    return state


def disable(model: Any) -> None:
    """transformers' own generation again, or what was in its place before `enable`."""
    with _exits_lock:
        state = _exits.pop(model, None)
    if state is not None:
        state.release()
    generates = model.__dict__.get("generate")
    if isinstance(generates, _Generate):
        del model.generate
        if generates.before is not None:
            model.generate = generates.before


class _Generate:
    """`generate` of an enabled model: transformers' own, which calls back. A copy of it is transformers' alone."""

    def __init__(self, model: Any, before: Callable[..., Any] | None):
        self.model, self.before = model, before
        self.__signature__ = inspect.signature(type(model).generate.__get__(model))

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (type(self.model).generate, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        theirs = given.pop("custom_generate", None)
        if theirs not in (None, generate):
            return type(self.model).generate(self.model, custom_generate=theirs, **given)
        config = given.get("generation_config")
        if config is not None and config.stop_strings is not None:  # transformers has no tokenizer for its hooks
            given["generation_config"] = copy.copy(config)
            given["generation_config"].stop_strings = None
            given.setdefault("stop_strings", config.stop_strings)
        asked = {name: given.get(name) for name in _KEPT_FROM_HOOKS}
        hook = functools.partial(_generate, asked, tokenizer=given.pop("tokenizer", None))
        return type(self.model).generate(self.model, custom_generate=hook, **given)


def _asked_of(model: Any) -> Mapping[str, Any]:
    """What transformers' generate was called with and keeps from its hooks: looked up in its frame, and in no other."""
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is model):
        frame = frame.f_back
    return {} if frame is None else {name: frame.f_locals.get(name) for name in _KEPT_FROM_HOOKS}


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    policy: VisualTokenPolicy | str | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """For `model.generate(custom_generate=...)`: greedy search or sampling of one prompt or a left-padded batch.

    `policy` is for this call; the other arguments are transformers'. It keeps `tokenizer` to itself, which stop strings
    need: they work in an enabled model, or with `custom_generate=functools.partial(hf.generate, tokenizer=tokenizer)`.
    Returns what transformers' generate returns.

    Raises:
        InvalidArgumentError: beams, speculative decoding, a filled cache, right padding, attention maps, inputs that
            are not of ids and pictures, or that do not fit `max_batch` and `max_len`.
        ModelError: as `enable`.
    """
    prepared = (input_ids, logits_processor, stopping_criteria, generation_config, policy, stop_strings, tokenizer)
    return _generate(_asked_of(model), model, *prepared, **model_kwargs)


def _generate(
    asked: Mapping[str, Any],
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    policy: VisualTokenPolicy | str | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """`generate`, with what else transformers' was `asked` for."""
    _forget_unfilled_cache(model)
    _check_config(generation_config, asked)
    criteria = _with_strings(stopping_criteria, stop_strings, tokenizer)
    state = _exit_of(model, len(input_ids))
    with state.ready(len(input_ids)) as engine:
        _check_sizes(engine, input_ids, generation_config)
        inputs, lengths = _inputs(model, input_ids, model_kwargs)
        prepared = engine.model.prepare_inputs(inputs, lengths, _n_images(engine, inputs))
        with state.prefill(engine, prepared, policy) as running:
            streamer = asked.get("streamer")
            return _decode(running, input_ids, logits_processor, criteria, generation_config, streamer)


def _forget_unfilled_cache(model: Any) -> None:
    """transformers 4 keeps a static cache for its next call, which stumbles over one that was never written to."""
    cache = model.__dict__.get("_cache")
    if cache is not None and not getattr(cache, "is_initialized", True):
        del model._cache


def _exit_of(model: Any, batch: int) -> Exit:
    with _exits_lock:
        if model not in _exits:
            _exits[model] = Exit(model, None, grows=True, max_batch=batch)
        return _exits[model]


def _with_strings(criteria: Any, strings: str | list[str] | None, tokenizer: Any) -> Any:
    """Stopping criteria, at `strings` too."""
    if strings is None:
        return criteria
    if tokenizer is None:
        accepted = "`tokenizer` with hf.enable, or custom_generate=functools.partial(hf.generate, tokenizer=...)"
        raise InvalidArgumentError(f"stop_strings is {strings!r}, without a tokenizer; accepted: {accepted}")
    from transformers import StoppingCriteriaList, StopStringCriteria

    return StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)])


def _check_config(config: Any, asked: Mapping[str, Any]) -> None:
    mode = config.get_generation_mode(asked.get("assistant_model")).value
    if mode not in ("greedy_search", "sample"):
        raise InvalidArgumentError(f"generation mode is {mode}; accepted: greedy_search, sample (num_beams 1)")
    refused = {
        "num_return_sequences": (config.num_return_sequences or 1) > 1,
        "output_attentions": config.return_dict_in_generate and config.output_attentions,
        "output_hidden_states": config.return_dict_in_generate and config.output_hidden_states,
        "synced_gpus": asked.get("synced_gpus"),
    }
    for name, given in refused.items():
        if given:
            raise InvalidArgumentError(f"{name} is {getattr(config, name, given)}; not accepted here")


def _check_sizes(engine: Engine, input_ids: Tensor, config: Any) -> None:
    if len(input_ids) > engine.config.max_batch:
        given = f"input_ids holds {len(input_ids)} prompts"
        raise InvalidArgumentError(f"{given}; accepted: max_batch {engine.config.max_batch} (enable(max_batch=...))")
    if config.max_length > engine.max_len:
        given = f"max_length (prompt and answer) is {config.max_length}"
        raise InvalidArgumentError(f"{given}; accepted: max_len {engine.max_len} (enable(max_len=...))")


def _inputs(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The inputs of the model's forward, padded on the right, and the length of each prompt."""
    given = {name: value for name, value in model_kwargs.items() if value is not None and name not in _NOT_NEEDED}
    given = {name: value for name, value in given.items() if not _is_cache(name, value)}
    parameters = inspect.signature(model.model.forward).parameters.values()
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"inputs_embeds"}
    for name in given:
        if name not in known:
            raise InvalidArgumentError(f"{name} is given; accepted: input_ids and what this model's forward takes")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape or (mask.diff(dim=1) < 0).any() or not mask[:, -1].all():
        wrong = f"attention_mask is {list(mask.shape)} or not padded on the left"
        raise InvalidArgumentError(f"{wrong}; accepted: zeros, then ones, {list(input_ids.shape)}")
    lengths = mask.sum(1)
    n = input_ids.shape[1]
    index = (torch.arange(n, device=input_ids.device) + (n - lengths)[:, None]) % n  # [B, n]
    inputs = {"input_ids": input_ids.gather(1, index), "attention_mask": mask.gather(1, index)}
    for name, value in given.items():
        inputs[name] = value.gather(-1, index.expand_as(value)) if name in _BY_TOKEN else value
    return inputs, lengths.tolist()


def _is_cache(name: str, value: Any) -> bool:
    """Whether this is a K/V cache, under whatever name. Raises InvalidArgumentError for one that holds tokens."""
    is_cache = hasattr(value, "get_seq_length")
    layers = value if isinstance(value, (tuple, list)) else ()  # older releases: keys and values of each
    pairs = any(isinstance(p, (tuple, list)) and any(isinstance(t, Tensor) for t in p) for p in layers)
    if pairs or (is_cache and int(value.get_seq_length()) > 0):
        raise InvalidArgumentError(f"{name} holds tokens; accepted: an empty cache, and the whole conversation as ids")
    return is_cache


def _n_images(engine: Engine, inputs: dict[str, Any]) -> int:
    """Pictures of all prompts where each has equally many rows; elsewhere nobody asks."""
    if not engine.model.family.same_rows:
        return 0
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    given = inputs.get("pixel_values") if encoded is None else encoded.pooler_output
    return 0 if given is None else len(given)


def _decode(running: Running, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any) -> Any:
    """transformers' token loop. Prompts that have finished leave the batch where it would fill them with padding."""
    pads = any(hasattr(c, "eos_token_id") for c in criteria)
    unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    logits = running.logits.clone()  # of finished prompts too, which processors see as transformers shows them
    wanted = {"scores": config.output_scores, "logits": config.output_logits}
    kept: dict[str, tuple[Tensor, ...]] = {k: () for k, w in wanted.items() if w and config.return_dict_in_generate}

    def choose(newest: Tensor, active: Sequence[int]) -> tuple[Tensor, list[int]]:
        nonlocal ids, unfinished
        logits[list(active)] = newest
        scores = processors(ids, logits.clone())
        for name, values in kept.items():
            kept[name] = (*values, scores if name == "scores" else logits.clone())
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
        if pads:
            tokens = torch.where(unfinished, tokens, config._pad_token_tensor.to(tokens))
        ids = torch.cat((ids, tokens[:, None]), dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~criteria(ids, kept.get("scores"))
        if not unfinished.any():
            return tokens, []
        return tokens[list(active)], [i for i, b in enumerate(active) if unfinished[b] or not pads]

    drain(running, choose)
    if streamer is not None:
        streamer.end()
    return _result(ids, kept, config)


def _result(ids: Tensor, kept: dict[str, tuple[Tensor, ...]], config: Any) -> Any:
    if not config.return_dict_in_generate:
        return ids
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=ids, **kept)
