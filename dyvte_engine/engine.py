"""`Engine`: a checkpoint and a policy, ready to answer questions about pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .assets import resolve_model
from .config import EngineConfig
from .errors import DeviceError, InvalidArgumentError, PromptError
from .flops import vision_flops
from .inputs.prompts import as_batch, is_single, render
from .inputs.splice import reduce_pictures
from .kernels.attention import CAPTURABLE, choose_backend
from .models import PreparedPrompt, TokenizedPrompt, VisionLanguageModel
from .models.linear import packing_fault
from .models.loading import load_model
from .models.presets import preset
from .models.random_model import byte_processor, random_model
from .models.rows import Rows, runs
from .policies import KeepAll, VisualTokenPolicy
from .runtime.decode import DecodeGraphs
from .runtime.generation import GenerationResult, PrefillFigures, Request, Running, StreamChunk, TokenLoop
from .runtime.kv_cache import KVCache, PagePool
from .runtime.prefill import Watch, prefill
from .runtime.sampling import answer_limit, merge_config, sequence_seeds
from .runtime.text_graphs import TextGraphs

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_NEW_TOKENS = 128


class Engine:
    """Answers questions about pictures with a Hugging Face checkpoint, its decoder run in this project's loop.

    Not thread-safe: one call at a time.
    """

    def __init__(self, model: VisionLanguageModel, config: EngineConfig, policy: VisualTokenPolicy | None = None):
        self.model, self.config = model, config
        self.max_len = model.decoder.max_len
        shape = model.shape
        self.attn_backend, self._attend = choose_backend(
            config.attn_backend, config.device, config.dtype, shape.head_dim
        )
        pages = shape.num_layers * config.max_batch * -(-self.max_len // config.page_size)
        self.pool = PagePool(shape, pages, config.page_size, config.dtype, config.device)
        if config.pack_weights:
            fault = packing_fault(config.dtype)
            if fault is not None:
                raise DeviceError(f"pack_weights does not work here with {config.dtype}: {fault}")
            model.pack()
        self._graphs = self._text_graphs = None
        if config.device.type == "cuda" and config.cuda_graphs:
            self._graphs = DecodeGraphs(model.decoder, self.pool)
            if self.attn_backend in CAPTURABLE:
                self._text_graphs = TextGraphs(model.decoder, self.pool, self._attend)
            model.capture_tower()
        self.policy = policy or KeepAll()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "nano",
        policy: VisualTokenPolicy | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attn_backend: str = "auto",
        max_batch: int = 8,
        max_len: int | None = None,
        page_size: int = 16,
        drop_early_kv: bool = False,
        cuda_graphs: bool = True,
        pack_weights: bool | str = "auto",
        trust_remote_code: bool = False,
    ) -> Engine:
        """Load a checkpoint (docs/families.md): a folder, a hub id, or "nano", the model that comes with the package.

        Args:
            policy: when visual tokens leave; default `KeepAll()`.
            dtype: "float32", "bfloat16", "float16" or the torch dtype; "auto" is bfloat16 on CUDA, float32 on CPU.
            device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where there is one.
            attn_backend: "auto", "flash_attn_3", "flash_attn_4", "flash_attn", "torch_flash", "native" (on a CPU) or
                "sdpa"; of the prefill, decoding uses the own kernel.
            max_batch, max_len: sequences run together, and prompt + answer tokens of each; they size the K/V pool.
                max_len defaults to the model's positions, at most 4096.
            page_size: rows of one K/V page.
            drop_early_kv: after the prefill, take the rows that left out of the earlier layers' K/V too.
            cuda_graphs: on CUDA, decoding, prefill layers without visual tokens (not with "sdpa") and towers of one
                picture size run as graphs, captured at first use for each batch size, bucket of lengths or pictures.
            pack_weights: on a CPU, keep the linear layers' weights a second time, in the layout the matrix units read
                (faster prompts); "auto": where all weights take at most a quarter of the machine's memory.

        Raises:
            ModelError, DeviceError, HeadsError, InvalidArgumentError: each with the argument and what is accepted.
        """
        config = _options(device, dtype, attn_backend, max_batch, max_len, page_size, drop_early_kv, cuda_graphs)
        loaded = load_model(resolve_model(model), config.dtype, config.device, max_len, trust_remote_code)
        return cls(loaded, _packed(config, pack_weights, loaded), policy)

    @classmethod
    def from_config(
        cls,
        config: Any,
        weights: str = "random",
        seed: int = 0,
        policy: VisualTokenPolicy | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attn_backend: str = "auto",
        max_batch: int = 8,
        max_len: int | None = None,
        page_size: int = 16,
        drop_early_kv: bool = False,
        cuda_graphs: bool = True,
        pack_weights: bool | str = "auto",
    ) -> Engine:
        """A model of a given size with random weights, made on the device; nothing is downloaded.

        For measurements and tests: what it says means nothing. Its tokenizer has one token for every byte.

        Args:
            config: a transformers LlavaConfig, or the name of one of `models.presets.PRESETS`: "llava-1.5-7b",
                "llava-1.5-13b", "llava-next-7b" (a prompt of five pictures has its 2,880 visual tokens), "llava-200m".
            weights: "random", initialised as transformers does.
            seed: equal seeds give equal weights on the same kind of device.
            others: as in `from_pretrained`.

        Raises:
            ModelError, DeviceError, InvalidArgumentError: each with the argument and what is accepted.
        """
        if weights != "random":
            raise InvalidArgumentError(f"weights is {weights!r}; accepted: 'random' (from_pretrained loads real ones)")
        options = _options(device, dtype, attn_backend, max_batch, max_len, page_size, drop_early_kv, cuda_graphs)
        name, hf_config = (config, preset(config)) if isinstance(config, str) else ("random", config)
        hf_model = random_model(hf_config, seed, options.dtype, options.device)
        model = VisionLanguageModel(hf_model, byte_processor(hf_config), f"{name} (random weights)", max_len)
        return cls(model, _packed(options, pack_weights, model), policy)

    @property
    def policy(self) -> VisualTokenPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: VisualTokenPolicy) -> None:
        if not isinstance(policy, VisualTokenPolicy):
            raise InvalidArgumentError(f"policy is a {type(policy).__name__}; accepted: a VisualTokenPolicy")
        bound = policy.bind(self.model)
        self.model.check(bound)
        self._policy = bound

    def generate(
        self,
        prompts: Any,
        images: Any = None,
        *,
        videos: Any = None,
        video_fps: float = 2.0,
        chat: bool = True,
        seed: int | Sequence[int] = 0,
        generation_config: Any = None,
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Answer one prompt or a list of them (batches of at most `max_batch`).

        Args:
            prompts: a question, a conversation (messages as transformers takes them), or a list of either.
            images: for one prompt a picture or a list; for many, such an entry (or None) for each. Paths or PIL images.
                `<image>` in a question says where a picture goes; without it they come first.
            videos: likewise; a video is a list of PIL images, an array uint8 [T, H, W, 3], or the path of an animated
                picture (GIF, WebP, APNG) or of a folder of frames. `<video>` is its mark. Every frame is used.
            video_fps: frames of the videos in a second, for families that tell the model the time.
            chat: apply the checkpoint's chat template to questions; False takes them as finished text.
            seed: seeds sequence i with seed + i, or one seed for each.
            generation_config: transformers' GenerationConfig instead of the checkpoint's; its special tokens stay.
            **options: as in transformers: max_new_tokens, max_length, min_new_tokens, min_length, max_time,
                stop_strings, eos_token_id, do_sample, temperature, top_k, top_p, min_p, top_h, typical_p,
                epsilon_cutoff, eta_cutoff, repetition_penalty, no_repeat_ngram_size, both with `encoder_` (of the
                prompt), sequence_bias, bad_words_ids, suppress_tokens, begin_suppress_tokens, forced_bos_token_id,
                forced_eos_token_id, exponential_decay_length_penalty, remove_invalid_values, renormalize_logits,
                watermarking_config. Beams, drafts, guidance and several answers are refused, whatever asks for them.

        Raises:
            PromptError, ImageError, InvalidArgumentError: before anything is computed.
        """
        given: dict[str, Any] = dict(videos=videos, video_fps=video_fps, chat=chat, seed=seed)
        chunks = self.stream(prompts, images, **given, generation_config=generation_config, **options)
        results = {c.index: c.result for c in chunks if c.result is not None}
        return results[0] if is_single(prompts) else [results[i] for i in range(len(results))]

    def stream(
        self,
        prompts: Any,
        images: Any = None,
        *,
        videos: Any = None,
        video_fps: float = 2.0,
        chat: bool = True,
        seed: int | Sequence[int] = 0,
        generation_config: Any = None,
        **options: Any,
    ) -> Iterator[StreamChunk]:
        """As `generate`, yielding every token as it comes; the last chunk of a prompt carries its result.

        Arguments are checked at the call, not at the first token.
        """
        config = merge_config(self.model.hf.generation_config, generation_config, options, self.model.shape.vocab_size)
        inputs = self._tokenize(prompts, images, videos, video_fps, chat)
        seeds = sequence_seeds(seed, len(inputs))
        budgets = [self._budget(len(i.input_ids), config) for i in inputs]
        batches = [slice(i, i + self.config.max_batch) for i in range(0, len(inputs), self.config.max_batch)]
        return (c for b in batches for c in self._stream_batch(b.start, inputs[b], budgets[b], config, seeds[b]))

    def prefill(
        self,
        inputs_embeds: Tensor | Sequence[Tensor],
        visual_mask: Tensor | Sequence[Tensor],
        position_ids: Tensor | Sequence[Tensor] | None = None,
    ) -> Running:
        """The lower entry, for models whose vision code lives elsewhere: prefill sequences under the policy.

        What the policy would do inside a vision tower is left out; all else applies.

        Args:
            inputs_embeds: [n, d] of one sequence, or a list of such; moved to the engine's device and dtype.
            visual_mask: bool [n] for each, true at visual tokens; each unbroken stretch counts as one picture.
            position_ids: integer [n] for each, ascending and below `max_len`; default 0..n-1. For models whose
                positions have three axes (Qwen-VL) also [3, n].

        Returns:
            A `Running` batch: `.logits`, `.step(tokens)`, `.exit_layers`; close it (or use `with`) to free its cache.

        Raises:
            InvalidArgumentError: shapes, dtypes or values that do not fit, naming the argument.
        """
        embeds, masks = _as_list(inputs_embeds), _as_list(visual_mask)
        positions = [torch.arange(len(e)) for e in embeds] if position_ids is None else _as_list(position_ids)
        if not len(embeds) == len(masks) == len(positions):
            raise InvalidArgumentError(
                f"{len(embeds)} inputs_embeds, {len(masks)} visual_mask, {len(positions)} position_ids"
            )
        if not 1 <= len(embeds) <= self.config.max_batch:
            raise InvalidArgumentError(
                f"inputs_embeds holds {len(embeds)} sequences; accepted: 1 to max_batch {self.config.max_batch}"
            )
        for e, m, p in zip(embeds, masks, positions, strict=True):
            self._check_entry(e, m, p)
        device = self.config.device
        prompts = []
        for e, m, p in zip(embeds, masks, positions, strict=True):
            plain, rotations = self.model.place(p.to(device))
            entering = e.to(device, self.config.dtype)
            prompts.append(PreparedPrompt(entering, m.cpu(), plain, runs(m.cpu()), rotations))
        return self.prefill_prepared(prompts)

    def _check_entry(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> None:
        n = len(embeds)
        if (
            embeds.dim() != 2
            or embeds.shape[1] != self.model.shape.hidden_size
            or n == 0
            or not embeds.is_floating_point()
        ):
            given = f"{embeds.dtype} {list(embeds.shape)}"
            raise InvalidArgumentError(
                f"inputs_embeds is {given}; accepted: floating [n >= 1, {self.model.shape.hidden_size}]"
            )
        if mask.dtype != torch.bool or mask.shape != (n,):
            raise InvalidArgumentError(f"visual_mask is {mask.dtype} {list(mask.shape)}; accepted: bool [{n}]")
        axes = self.model.family.axes
        shapes = [(n,)] if axes == 1 else [(n,), (axes, n)]
        if positions.is_floating_point() or positions.shape not in shapes:
            accepted = "integer " + " or ".join(str(list(shape)) for shape in shapes)
            raise InvalidArgumentError(
                f"position_ids is {positions.dtype} {list(positions.shape)}; accepted: {accepted}"
            )
        ascends = positions.dim() == 2 or not (positions.diff() <= 0).any()
        if positions.min() < 0 or positions.max() >= self.max_len or not ascends:
            raise InvalidArgumentError(f"position_ids must ascend within 0 to {self.max_len - 1} (max_len - 1)")

    def _tokenize(self, prompts: Any, images: Any, videos: Any, video_fps: float, chat: bool) -> list[TokenizedPrompt]:
        batch, pictures, clips = as_batch(prompts, images, videos)
        texts = [
            render(p, len(i), self.model.processor, chat, len(v))
            for p, i, v in zip(batch, pictures, clips, strict=True)
        ]
        return self.model.tokenize(texts, pictures, clips, video_fps)

    def prepare(self, prompts: Any, images: Any, chat: bool = True) -> list[PreparedPrompt]:
        """Each prompt at the decoder's entry, for `prefill_prepared`; arguments as in `generate`."""
        inputs, size = self._tokenize(prompts, images, None, 2.0, chat), self.config.max_batch
        parts = [self.model.prepare(inputs[i : i + size], self.policy) for i in range(0, len(inputs), size)]
        return [prompt for part in parts for prompt in part]

    @torch.inference_mode()
    def prefill_prepared(self, prompts: Sequence[PreparedPrompt], watch: Watch | None = None) -> Running:
        """As `prefill`, of what `prepare` gave: at most `max_batch` prompts. `watch` sees every layer's attention."""
        prompts = reduce_pictures(self.policy, prompts)
        cache = KVCache(self.pool, self.model.shape.num_layers, len(prompts), self.max_len)
        try:
            done = prefill(
                self.model.decoder,
                self._attend,
                cache,
                torch.cat([p.inputs_embeds for p in prompts]),
                _pack(prompts, self.model.decoder.cos_sin),
                self.policy,
                self.config.drop_early_kv,
                watch,
                self._text_graphs,
            )
            return Running(self.model.decoder, cache, done, self._graphs)
        except BaseException:
            cache.close()
            raise

    def _budget(self, prompt_len: int, config: Any) -> int:
        """Answer tokens a prompt of `prompt_len` tokens may have. Raises PromptError when it does not fit."""
        room, limit = self.max_len - prompt_len, answer_limit(config, prompt_len)
        wanted = config.max_new_tokens or min(limit or _DEFAULT_NEW_TOKENS, max(room, 1))
        if wanted > room:
            given = f"the prompt has {prompt_len} tokens and max_new_tokens is {wanted}"
            raise PromptError(f"{given}; accepted: together at most max_len {self.max_len}")
        return wanted

    def _check_positions(self, prepared: Sequence[PreparedPrompt], budgets: Sequence[int]) -> None:
        """With several axes a position may be beyond the number of rows (slow videos)."""
        for p, n in zip(prepared, budgets, strict=True):
            if p.rotations is not None and int(p.positions[-1]) + n >= self.max_len:
                given = f"the prompt ends at position {int(p.positions[-1])} and the answer has {n} tokens"
                raise PromptError(f"{given}; accepted: together below max_len {self.max_len}")

    def _stream_batch(
        self, first: int, inputs: list[TokenizedPrompt], budgets: list[int], config: Any, seeds: list[int]
    ) -> Iterator[StreamChunk]:
        started = time.perf_counter() - sum(i.seconds for i in inputs)
        prepared = self.model.prepare(inputs, self.policy)
        self._check_positions(prepared, budgets)
        if self.config.device.type == "cuda":
            torch.cuda.synchronize(self.config.device)
        vision_s = time.perf_counter() - started
        requests = [
            Request(list(i.input_ids), int(self.model.visual(torch.tensor(i.input_ids)).sum()), n)
            for i, n in zip(inputs, budgets, strict=True)
        ]
        loop = TokenLoop(requests, config, self.model.processor.tokenizer, seeds, self.config.device)
        tower = self.model.hf.config.vision_config
        picture_flops = vision_flops(tower, self.policy.tower_merges), vision_flops(tower)
        passes = [self.model.tower_passes(i) for i in inputs]
        with self.prefill_prepared(prepared) as running:
            figures = [
                PrefillFigures.of(running, b, len(r.ids), *(passes[b] * f for f in picture_flops))
                for b, r in enumerate(requests)
            ]
            for b, token, text in loop.run(running):
                request = requests[b]
                result = request.result(figures[b], started, vision_s) if request.finish_reason else None
                yield StreamChunk(first + b, token, text, result)


def _pack(prompts: Sequence[PreparedPrompt], cos_sin: Tensor) -> Rows:
    """The rows of all prompts, one after the other. `cos_sin` serves those whose positions have one axis."""
    turned, rotations = any(p.rotations is not None for p in prompts), None
    if turned:
        rotations = torch.cat([cos_sin[p.positions.long()] if p.rotations is None else p.rotations for p in prompts])
    additions = [
        torch.cat([p.additions[k] if p.additions else torch.zeros_like(p.inputs_embeds) for p in prompts])
        for k in range(max(len(p.additions) for p in prompts))
    ]
    return Rows.from_sequences([p.visual for p in prompts], [p.positions for p in prompts], rotations, additions)


def _as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _options(device: str | torch.device, dtype: str | torch.dtype, *others: Any) -> EngineConfig:
    target = _resolve_device(device)
    return EngineConfig(target, _resolve_dtype(dtype, target), *others)


def _packed(config: EngineConfig, asked: bool | str, model: VisionLanguageModel) -> EngineConfig:
    """The options with `pack_weights` decided."""
    if asked != "auto" and not isinstance(asked, bool):
        raise InvalidArgumentError(f"pack_weights is {asked!r}; accepted: True, False, 'auto'")
    if asked == "auto":
        weights = sum(p.nbytes for p in model.hf.parameters())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        asked = config.device.type == "cpu" and packing_fault(config.dtype) is None and 4 * weights <= memory
    return replace(config, pack_weights=bool(asked))


def _resolve_device(device: str | torch.device) -> torch.device:
    """The device, made sure of. Raises DeviceError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise DeviceError(f"device {device!r} is not known: {e}; accepted: auto, cpu, cuda, cuda:N") from e
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} is not supported; accepted: auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {device!r} is not there: this torch sees {torch.cuda.device_count()} CUDA devices")
    return resolved


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise DeviceError(f"dtype {dtype!r} is not supported; accepted: auto, {', '.join(_DTYPES)}")
    return resolved
