"""transformers' own `generate`, with this project's prefill and decoding inside.

>>> from dyvte_engine import FixedExit, hf
>>> hf.enable(model, FixedExit(16))  # from here on model.generate, pipelines and streamers exit after layer 16
>>> model.generate(**inputs, max_new_tokens=64)
>>> model.generate(**inputs, custom_generate=hf.generate, policy=FixedExit(16))  # or for one call, by the official hook

What transformers prepares is used as it comes: vision features, position ids, logits processors, stopping criteria,
lengths. Its K/V cache is not: `past_key_values` of the result is None.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .config import EngineConfig
from .engine import Engine
from .errors import InvalidArgumentError
from .models import VisionLanguageModel
from .policies import VisualTokenPolicy
from .runtime.running import Running
from .runtime.token_loop import drain

_BY_TOKEN = ("position_ids", "mm_token_type_ids", "token_type_ids")  # [..., B, n], padded like the ids
_NOT_NEEDED = ("past_key_values", "cache_position", "use_cache", "logits_to_keep", "attention_mask")


class Exit:
    """What `enable` leaves at a transformers model.

    Attributes:
        exit_layers: of the last call, the layer after which each prompt's last visual token left, or None.
    """

    def __init__(self, model: Any, policy: VisualTokenPolicy | None, **options: Any):
        config = EngineConfig(model.device, model.dtype, **options)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.engine = Engine(VisionLanguageModel(model, None, name, config.max_len), config)
        self.exit_layers: list[int | None] = []
        if policy is not None:
            self.policy = policy

    @property
    def policy(self) -> VisualTokenPolicy:
        """Asked at every call. Raises InvalidArgumentError for one that acts in the tower, which transformers runs."""
        return self.engine.policy

    @policy.setter
    def policy(self, policy: VisualTokenPolicy) -> None:
        if isinstance(policy, VisualTokenPolicy) and policy.acts_in_tower:
            given = f"policy {type(policy).__name__} acts in the vision tower, which transformers runs before"
            raise InvalidArgumentError(f"{given}; accepted here: policies that act behind it (Engine takes all)")
        self.engine.policy = policy


def enable(model: Any, policy: VisualTokenPolicy | None = None, **options: Any) -> Exit:
    """Give a live transformers model this project's generation, for its own `generate` and all that calls it.

    Args:
        policy: when visual tokens leave; default `KeepAll()`. To be changed at the returned object.
        **options: max_batch, max_len, page_size, attn_backend, drop_early_kv, cuda_graphs, pack_weights: as in
            `Engine.from_pretrained`, but pack_weights is False: with True the weights must not change any more.

    The model's weights are used where they are, in eval mode and without gradients; move it before, not after.

    Raises:
        ModelError: a family that the engine does not run. InvalidArgumentError: an option that is not accepted.
    """
    disable(model)
    model.dyvte_exit = Exit(model, policy, **options)
    model.generate = functools.partial(type(model).generate, model, custom_generate=generate)
    return model.dyvte_exit


def disable(model: Any) -> None:
    """transformers' own generation again."""
    for name in ("dyvte_exit", "generate"):
        model.__dict__.pop(name, None)


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    policy: VisualTokenPolicy | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """For `model.generate(custom_generate=...)`: greedy search or sampling of one prompt or a left-padded batch.

    `policy` is for this call; the other arguments are transformers'. Returns what its `generate` returns.

    Raises:
        InvalidArgumentError: beams, speculative decoding, a filled cache, right padding, attention maps, or inputs that
            do not fit `max_batch` and `max_len`.
    """
    if "dyvte_exit" not in model.__dict__:
        model.dyvte_exit = Exit(model, None, max_batch=len(input_ids))
    state: Exit = model.dyvte_exit
    before = state.policy
    if policy is not None:
        state.policy = policy
    try:
        _check_config(generation_config, synced_gpus)
        _check_sizes(state.engine, model, input_ids, generation_config)
        inputs, lengths = _inputs(model, input_ids, model_kwargs)
        prepared = state.engine.model.prepare_inputs(inputs, lengths, _n_images(state.engine, inputs))
        with state.engine.prefill_prepared(prepared) as running:
            state.exit_layers = list(running.exit_layers)
            streamer = _of_caller("streamer")
            return _decode(running, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    finally:
        if policy is not None:
            state.policy = before


def _of_caller(name: str) -> Any:
    """A local variable of transformers' generate, which keeps `streamer` and `assistant_model` from its hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_code is not generate.__code__:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def _check_config(config: Any, synced_gpus: bool) -> None:
    mode = config.get_generation_mode(_of_caller("assistant_model")).value
    if mode not in ("greedy_search", "sample"):
        raise InvalidArgumentError(f"generation mode is {mode}; accepted: greedy_search, sample (num_beams 1)")
    refused = {
        "num_return_sequences": (config.num_return_sequences or 1) > 1,
        "output_attentions": config.return_dict_in_generate and config.output_attentions,
        "output_hidden_states": config.return_dict_in_generate and config.output_hidden_states,
        "synced_gpus": synced_gpus,
    }
    for name, asked in refused.items():
        if asked:
            raise InvalidArgumentError(f"{name} is {getattr(config, name, synced_gpus)}; not accepted here")


def _check_sizes(engine: Engine, model: Any, input_ids: Tensor, config: Any) -> None:
    if (model.device, model.dtype) != (engine.config.device, engine.config.dtype):
        moved = f"the model is {model.dtype} on {model.device}, enabled as {engine.config.dtype} on"
        raise InvalidArgumentError(f"{moved} {engine.config.device}; enable it again after moving it")
    if len(input_ids) > engine.config.max_batch:
        given = f"input_ids holds {len(input_ids)} prompts"
        raise InvalidArgumentError(f"{given}; accepted: max_batch {engine.config.max_batch} (enable(max_batch=...))")
    if config.max_length > engine.max_len:
        given = f"max_length (prompt and answer) is {config.max_length}"
        raise InvalidArgumentError(f"{given}; accepted: max_len {engine.max_len} (enable(max_len=...))")


def _inputs(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The inputs of the model's forward, padded on the right, and the length of each prompt."""
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise InvalidArgumentError("past_key_values holds tokens; accepted: an empty cache")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape or (mask.diff(dim=1) < 0).any() or not mask[:, -1].all():
        given = f"attention_mask is {list(mask.shape)} or not padded on the left"
        raise InvalidArgumentError(f"{given}; accepted: zeros, then ones, {list(input_ids.shape)}")
    lengths = mask.sum(1)
    n = input_ids.shape[1]
    index = (torch.arange(n, device=input_ids.device) + (n - lengths)[:, None]) % n  # [B, n]
    known = inspect.signature(model.model.forward).parameters
    inputs = {"input_ids": input_ids.gather(1, index), "attention_mask": mask.gather(1, index)}
    for name, value in model_kwargs.items():
        if value is None or name in _NOT_NEEDED:
            continue
        if name not in known:
            raise InvalidArgumentError(f"{name} is not an input of this model's forward")
        inputs[name] = value.gather(-1, index.expand_as(value)) if name in _BY_TOKEN else value
    return inputs, lengths.tolist()


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
