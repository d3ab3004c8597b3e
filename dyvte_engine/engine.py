"""`Engine`: a checkpoint and a policy, ready to answer questions about pictures."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .assets import resolve_model
from .chat import Chat
from .checks import is_whole
from .config import EngineConfig, EngineOptions
from .errors import DeviceError, InvalidArgumentError, PromptError
from .flops import vision_flops
from .inputs.images import check_processed
from .inputs.prompts import as_batch, is_single, render
from .models import PreparedPrompt, TokenizedPrompt, VisionLanguageModel
from .models.linear import packing_fault
from .models.loading import load_model
from .models.presets import preset
from .models.random_model import byte_processor, random_model
from .models.rows import runs
from .policies import KeepAll, VisualTokenPolicy
from .policies.binding import PolicyCache
from .requests import GenerationResult, Handle, Request, StreamChunk
from .runtime import sequence
from .runtime.options import MergedConfigs
from .runtime.prefill import Watch
from .runtime.runner import Runner
from .runtime.running import Running
from .runtime.sampling import Sampler, StopRules, answer_limit, end_tokens, sequence_seeds
from .runtime.scheduler import Scheduler
from .runtime.worker import Worker

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DEFAULT_NEW_TOKENS = 128


class Engine:
    """Answers questions about pictures with a Hugging Face checkpoint whose decoder runs in this project's loop.

    Its methods may be called from any thread; requests of all of them are answered in one running batch.
    """

    def __init__(self, model: VisionLanguageModel, config: EngineConfig, policy: VisualTokenPolicy | str | None = None):
        self.model, self.config = model, config
        if config.pack_weights:
            fault = packing_fault(config.dtype)
            if fault is not None:
                raise DeviceError(f"pack_weights does not work here with {config.dtype}: {fault}")
            model.pack()
        if config.device.type == "cpu":
            _keep_freed_memory()
        self.runner = Runner(model, config)
        self.max_len, self.pool, self.attn_backend = self.runner.max_len, self.runner.pool, self.runner.attn_backend
        self._scheduler = Scheduler(self.runner)
        self._worker = Worker(self._scheduler)
        self._policies, self._merged = PolicyCache(model), MergedConfigs()
        self._policy = self.bind(KeepAll() if policy is None else policy)
        if config.warm_up and config.device.type == "cuda":
            self.warm_up(progress=True)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "nano",
        policy: VisualTokenPolicy | str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        *,
        trust_remote_code: bool = False,
        **options: Unpack[EngineOptions],
    ) -> Engine:
        """Load a checkpoint (docs/families.md): a folder, a hub id, "nano", the model that comes with the package, or
        "smol", whose parts are fetched and put together at the first call (docs/smol.md).

        Args:
            policy: when visual tokens leave, unless a request says otherwise: a policy or its notation ("fixed:15";
                "auto": the exit heads that came with the model); default `KeepAll()`.
            dtype: "float32", "bfloat16", "float16" or the torch dtype; "auto" is bfloat16 on CUDA, float32 on CPU.
            device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where there is one.
            trust_remote_code: run Python code that comes with the checkpoint.
            **options: see `EngineOptions`.

        Raises:
            ModelError, DeviceError, HeadsError, InvalidArgumentError: each with the argument and what is accepted.
            SourceError, FileError: smol's parts cannot be fetched, or not be kept in the cache.
        """
        made = _checked(device, dtype, options)
        loaded = load_model(resolve_model(model), made.dtype, made.device, made.max_len, trust_remote_code)
        return cls(loaded, _packed(made, options, loaded), policy)

    @classmethod
    def from_config(
        cls,
        config: Any,
        weights: str = "random",
        seed: int = 0,
        policy: VisualTokenPolicy | str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        **options: Unpack[EngineOptions],
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
        made = _checked(device, dtype, options)
        name, hf_config = (config, preset(config)) if isinstance(config, str) else ("random", config)
        hf_model = random_model(hf_config, seed, made.dtype, made.device)
        model = VisionLanguageModel(hf_model, byte_processor(hf_config), f"{name} (random weights)", made.max_len)
        return cls(model, _packed(made, options, model), policy)

    @property
    def policy(self) -> VisualTokenPolicy:
        """Of requests that name none, bound to the model."""
        return self._policy

    @policy.setter
    def policy(self, policy: VisualTokenPolicy | str) -> None:
        self._policy = self.bind(policy)

    def bind(self, policy: VisualTokenPolicy | str | None) -> VisualTokenPolicy:
        """A policy, its notation, or None for the engine's own -> that policy, checked and ready to run on the model.

        Done once for each policy; so is reading the heads of a notation, unless their file changes. On CUDA a policy
        that acts in the vision tower is captured there, for one picture; one that comes with a request is not.

        Raises:
            InvalidArgumentError, HeadsError, CalibrationError, ModelError: it cannot run here.
        """
        bound = self._bound(policy)
        self.runner.capture_tower(bound)
        return bound

    def _bound(self, policy: VisualTokenPolicy | str | None) -> VisualTokenPolicy:
        return self._policy if policy is None else self._policies.bound(policy)

    def warm_up(self, progress: bool = False) -> None:
        """Capture every graph (on a CPU: tape) that a request may ask for. From here on none is, inside a request.

        progress: show a bar.
        """
        if not progress or self.runner.graphs is None:
            self.runner.warm_up()
        else:
            from rich.progress import Progress

            with Progress(transient=True) as bar:
                task = bar.add_task("graphs")
                self.runner.warm_up(lambda done, total: bar.update(task, completed=done, total=total))
        self.runner.capture_tower(self._policy)

    def submit(self, request: Request) -> Handle:
        """Queue a request; it is answered while nobody waits too. For its tokens, result or end see `Handle`.

        Raises:
            PromptError, ImageError, InvalidArgumentError, ...: at once, before anything is computed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """As `submit`, of several, all or none; the processor sees a prompt once, however many of them hold it."""
        seen: dict[tuple[Any, ...], list[TokenizedPrompt]] = {}
        handles = self._enqueue([one for request in requests for one in self._prepare_request(request, seen)])
        self._worker.start()
        return handles

    def _prepare_request(
        self, request: Request, seen: dict[tuple[Any, ...], list[TokenizedPrompt]] | None = None
    ) -> list[sequence.Sequence]:
        if not isinstance(request, Request):
            raise InvalidArgumentError(f"request is a {type(request).__name__}; accepted: a Request")
        if not is_single(request.prompt):
            raise InvalidArgumentError("request.prompt must be one prompt: a string or a list of messages")
        if not is_whole(request.priority):
            raise InvalidArgumentError(f"request.priority is {request.priority!r}; accepted: an integer")
        if not isinstance(request.options, Mapping):
            raise InvalidArgumentError(f"request.options is a {type(request.options).__name__}; accepted: a mapping")
        _check_hooks(request, self.model.shape.vocab_size)
        config = self._config(request.generation_config, dict(request.options))
        given = request.prompt, request.images, request.videos, request.video_fps, request.chat
        seen, same = {} if seen is None else seen, tuple(map(id, given))  # of objects that the requests keep alive
        inputs = seen[same] if same in seen else seen.setdefault(same, self._tokenize(*given))
        hooks = request.processors, request.stop_text, request.logprobs
        return self._sequences(inputs, request.policy, [request.seed], config, request.priority, *hooks)

    def generate(
        self,
        prompts: Any,
        images: Any = None,
        *,
        videos: Any = None,
        video_fps: float = 2.0,
        chat: bool = True,
        policy: VisualTokenPolicy | str | None = None,
        seed: int | Sequence[int] = 0,
        generation_config: Any = None,
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Answer one prompt or a list of them, at most `max_batch` at a time.

        Args:
            prompts: a question, a conversation (messages as transformers takes them), or a list of either.
            images: for one prompt a picture or a list; for many, such an entry (or None) for each. Paths, `data:` URLs
                or PIL images; messages may hold them too, also as OpenAI writes it. `<image>` in a question says where
                a picture goes; without it they come first.
            videos: in the same way; a video is a list of PIL images, an array uint8 [T, H, W, 3], or the path of an
                animated picture (GIF, WebP, APNG) or of a folder of frames. `<video>` is its mark. Every frame is used.
            video_fps: frames of the videos in a second, for families that tell the model the time.
            chat: apply the checkpoint's chat template to questions; False takes them as finished text.
            policy: when visual tokens leave, a policy or its notation; default the engine's.
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
        config = self._config(generation_config, options)
        inputs = self._tokenize(prompts, images, videos, video_fps, chat)
        sequences = self._sequences(inputs, policy, seed, config)
        for s in sequences:
            s.streams = False
        handles = self._enqueue(sequences)
        with _cancelling(handles):
            results = [handle.result() for handle in handles]
        return results[0] if is_single(prompts) else results

    def stream(
        self,
        prompts: Any,
        images: Any = None,
        *,
        videos: Any = None,
        video_fps: float = 2.0,
        chat: bool = True,
        policy: VisualTokenPolicy | str | None = None,
        seed: int | Sequence[int] = 0,
        generation_config: Any = None,
        **options: Any,
    ) -> Iterator[StreamChunk]:
        """As `generate`, yielding every token as it comes; the last chunk of a prompt carries its result.

        Arguments are checked at the call, not at the first token. Leaving the loop cancels what is left.
        """
        config = self._config(generation_config, options)
        inputs = self._tokenize(prompts, images, videos, video_fps, chat)
        return self._drain(self._sequences(inputs, policy, seed, config))

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation, in which pictures are computed once (docs/again.md).

        options: of `generate`, for every turn: policy, max_new_tokens, ...

        Raises:
            InvalidArgumentError, HeadsError, ...: the policy cannot run here.
        """
        return Chat(self.generate, self.stream, {**options, "policy": self.bind(options.get("policy"))}, system)

    def forget(self) -> None:
        """Drop all pictures and prefixes that are kept, as after a change of the model's weights."""
        with self.runner.lock:
            self.runner.pictures.clear()
            self.runner.prefixes.clear()

    def _drain(self, sequences: list[sequence.Sequence]) -> Iterator[StreamChunk]:
        """The chunks of all sequences in the order they come."""
        chunks: deque[StreamChunk] = deque()
        handles = self._enqueue(sequences, chunks)
        with _cancelling(handles):
            done = False
            while not done:
                self._worker.run_until(lambda: bool(chunks) or all(h.done for h in handles))
                done = all(h.done for h in handles)  # before the chunks are looked at: another thread may add some
                while chunks:
                    yield chunks.popleft()
            for handle in handles:
                handle.result()  # an error of one is raised when all others have ended

    def _sequences(
        self,
        inputs: Sequence[TokenizedPrompt],
        policy: VisualTokenPolicy | str | None,
        seed: int | Sequence[int],
        config: Any,
        priority: int = 0,
        processors: Sequence[Callable[[Any, Any], Any]] = (),
        stop_text: Sequence[str] = (),
        logprobs: int | None = None,
    ) -> list[sequence.Sequence]:
        """What the scheduler takes, all checked. Nothing has been computed yet."""
        seeds = sequence_seeds(seed, len(inputs))
        bound, tokenizer = self._bound(policy), self.model.processor.tokenizer
        ends, merges = end_tokens(config, tokenizer), bound.tower_merges
        flops = vision_flops(self.model.hf.config.vision_config, merges) if merges else self._tower_flops
        out = []
        for index, (prompt, one_seed) in enumerate(zip(inputs, seeds, strict=True)):
            n, budget = len(prompt.input_ids), self._budget(len(prompt.input_ids), config)
            passes, may_leave = self.model.tower_passes(prompt), self.model.count_visual(prompt.input_ids[:-1])
            worst = self.runner.worst_pages(n + budget - 1, may_leave, bound, None)  # refused here, not in its turn
            out.append(
                sequence.Sequence(
                    index,
                    prompt,
                    bound,
                    Sampler(config, prompt.input_ids, one_seed, ends, self.config.device, processors),
                    StopRules(config, tokenizer, ends, n, budget),
                    budget,
                    tokenizer,
                    self.model.count_visual(prompt.input_ids),
                    may_leave,
                    worst,
                    (passes * flops, passes * self._tower_flops),
                    priority,
                    stop_text,
                    logprobs,
                )
            )
        return out

    @functools.cached_property
    def _tower_flops(self) -> float:
        return vision_flops(self.model.hf.config.vision_config)

    def _enqueue(self, sequences: list[sequence.Sequence], chunks: deque[StreamChunk] | None = None) -> list[Handle]:
        self._worker.check_process()  # before a lock is taken that a thread held when this process was forked
        for s in sequences:
            s.handle = Handle(self._worker, functools.partial(self._cancel, s), chunks, len(s.prompt.input_ids))
        self._scheduler.submit(sequences)
        return [s.handle for s in sequences if s.handle is not None]

    def _cancel(self, s: sequence.Sequence) -> None:
        self._scheduler.cancel(s)
        self._worker.notify()

    def prefill(
        self,
        inputs_embeds: Tensor | Sequence[Tensor],
        visual_mask: Tensor | Sequence[Tensor],
        position_ids: Tensor | Sequence[Tensor] | None = None,
        policy: VisualTokenPolicy | str | None = None,
    ) -> Running:
        """The lower entry, for models whose vision code lives elsewhere: prefill sequences under the policy.

        What the policy would do inside a vision tower is left out; all else applies.

        Args:
            inputs_embeds: [n, d] of one sequence, or a list of such; moved to the engine's device and dtype.
            visual_mask: bool [n] for each, true at visual tokens; each unbroken stretch counts as one picture.
            position_ids: integer [n] for each, ascending and below `max_len`; default 0..n-1. For models whose
                positions have three axes (Qwen-VL) also [3, n].
            policy: as in `generate`.

        Returns:
            A `Running` batch: `.logits`, `.step(tokens)`, `.exit_layers`; close it (or use `with`) to free its cache.
            Its pages are taken from the same pool as those of requests.

        Raises:
            InvalidArgumentError: shapes, dtypes or values that do not fit, naming the argument.
        """
        embeds, masks = _as_list("inputs_embeds", inputs_embeds), _as_list("visual_mask", visual_mask)
        if position_ids is None:
            positions = [torch.arange(len(e), device="cpu") for e in embeds]
        else:
            positions = _as_list("position_ids", position_ids)
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
        return self.prefill_prepared(prompts, policy)

    def _check_entry(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> None:
        n = len(embeds)
        if (
            embeds.dim() != 2
            or embeds.shape[1] != self.model.shape.hidden_size
            or not 1 <= n <= self.max_len
            or embeds.dtype not in (*_DTYPES.values(), torch.float64)
        ):
            given = f"{embeds.dtype} {list(embeds.shape)}"
            rows = f"n from 1 to max_len {self.max_len}"
            raise InvalidArgumentError(
                f"inputs_embeds is {given}; accepted: floating [n, {self.model.shape.hidden_size}], {rows}"
            )
        if not torch.isfinite(embeds).all():
            raise InvalidArgumentError("inputs_embeds holds NaN or infinity; accepted: finite values")
        if mask.dtype != torch.bool or mask.shape != (n,):
            raise InvalidArgumentError(f"visual_mask is {mask.dtype} {list(mask.shape)}; accepted: bool [{n}]")
        axes = self.model.family.axes
        shapes = [(n,)] if axes == 1 else [(n,), (axes, n)]
        if positions.dtype not in _WHOLE or positions.shape not in shapes:
            accepted = "integer " + " or ".join(str(list(shape)) for shape in shapes)
            raise InvalidArgumentError(
                f"position_ids is {positions.dtype} {list(positions.shape)}; accepted: {accepted}"
            )
        ascends = positions.dim() == 2 or not (positions.long().diff() <= 0).any()  # uint8 would wrap
        if positions.min() < 0 or positions.max() >= self.max_len or not ascends:
            raise InvalidArgumentError(f"position_ids must ascend within 0 to {self.max_len - 1} (max_len - 1)")

    def tokenize(
        self, prompts: Any, images: Any = None, *, videos: Any = None, video_fps: float = 2.0, chat: bool = True
    ) -> list[list[int]]:
        """The token ids of each prompt as the model reads it, visual ones included; arguments as in `generate`."""
        return [prompt.input_ids for prompt in self._tokenize(prompts, images, videos, video_fps, chat)]

    def _tokenize(self, prompts: Any, images: Any, videos: Any, video_fps: float, chat: bool) -> list[TokenizedPrompt]:
        batch, pictures, clips = as_batch(prompts, images, videos)
        texts = []
        for prompt, own, videos_of in zip(batch, pictures, clips, strict=True):
            check_processed(own, getattr(self.model.processor, "image_processor", None))
            texts.append(render(prompt, len(own), self.model.processor, chat, len(videos_of)))
        return self.model.tokenize(texts, pictures, clips, video_fps, self.runner.pictures.processor)

    def prepare(
        self, prompts: Any, images: Any, chat: bool = True, policy: VisualTokenPolicy | str | None = None
    ) -> list[PreparedPrompt]:
        """Each prompt at the decoder's entry, for `prefill_prepared`; arguments as in `generate`."""
        inputs, size, bound = self._tokenize(prompts, images, None, 2.0, chat), self.config.max_batch, self.bind(policy)
        with self.runner.lock:
            parts = [self.runner.pictures.prepare(inputs[i : i + size], bound) for i in range(0, len(inputs), size)]
        return [seen.prompt for part in parts for seen in part]

    def prefill_prepared(
        self,
        prompts: Sequence[PreparedPrompt],
        policy: VisualTokenPolicy | str | None = None,
        watch: Watch | None = None,
    ) -> Running:
        """As `prefill`, of what `prepare` gave: at most `max_batch` prompts. `watch` sees every layer's attention."""
        if not 1 <= len(prompts) <= self.config.max_batch:
            given = f"prompts holds {len(prompts)} sequences"
            raise InvalidArgumentError(f"{given}; accepted: 1 to max_batch {self.config.max_batch}")
        longest = max(len(p.inputs_embeds) for p in prompts)
        if longest > self.max_len:
            raise PromptError(f"a prompt has {longest} tokens; accepted: at most max_len {self.max_len}")
        return self.runner.run(prompts, self.bind(policy), watch)

    def _config(self, given: Any, options: dict[str, Any]) -> Any:
        return self._merged(self.model.hf.generation_config, given, options, self.model.shape.vocab_size)

    def _budget(self, prompt_len: int, config: Any) -> int:
        """Answer tokens a prompt of `prompt_len` tokens may have. Raises PromptError when it does not fit."""
        room, limit = self.max_len - prompt_len, answer_limit(config, prompt_len)
        wanted = config.max_new_tokens or min(limit or _DEFAULT_NEW_TOKENS, max(room, 1))
        if wanted > room:
            given = f"the prompt has {prompt_len} tokens and max_new_tokens is {wanted}"
            raise PromptError(f"{given}; accepted: together at most max_len {self.max_len}")
        return wanted

    @property
    def load(self) -> dict[str, int]:
        """Requests `waiting`, `prefilling` and `running`; K/V pages `pages` and of these `pages_promised`."""
        pool = self.pool
        return dict(self._scheduler.counts, pages=pool.n_pages, pages_promised=pool.n_pages - pool.claimable)

    def check_integrity(self) -> None:
        """Every page of the K/V pool is free or held once, and all promises add up, while no request is under way.

        Raises:
            CacheError: they do not, which is a bug here.
        """
        with self.runner.lock:
            if not self._scheduler.has_work:
                self.runner.check_integrity()


def _check_hooks(request: Request, vocab_size: int) -> None:
    given, stops, top = request.processors, request.stop_text, request.logprobs
    if not isinstance(given, (list, tuple)) or not all(map(callable, given)):
        raise InvalidArgumentError(f"request.processors is {given!r}; accepted: a list of callables (ids, scores)")
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) and s for s in stops):
        raise InvalidArgumentError(f"request.stop_text is {stops!r}; accepted: a list of strings, none empty")
    if top is not None and not (is_whole(top) and 0 <= top <= vocab_size):
        raise InvalidArgumentError(f"request.logprobs is {top!r}; accepted: None, or 0 to {vocab_size} (vocabulary)")


@contextmanager
def _cancelling(handles: Sequence[Handle]) -> Iterator[None]:
    """However this ends, nothing of the handles is computed any further."""
    try:
        yield
    finally:
        for handle in handles:
            if not handle.done:
                handle.cancel()


def _as_list(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Dense tensors that hold something, of at least one axis."""
    tensors: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    for t in tensors:
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_meta or t.dim() == 0 or t.is_quantized:
            raise InvalidArgumentError(f"{name} is {_kind(t)}; accepted: a dense tensor, or a list of them")
    return tensors


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor {list(value.shape)}, {value.dtype}, {value.layout}, on {value.device}"


def _checked(device: str | torch.device, dtype: str | torch.dtype, options: EngineOptions) -> EngineConfig:
    """The options, checked, but for `pack_weights`, which needs to see the model."""
    target, others = _resolve_device(device), dict[str, Any](options)
    unknown = sorted(others.keys() - EngineOptions.__annotations__.keys())
    if unknown:
        accepted = ", ".join(EngineOptions.__annotations__)
        raise InvalidArgumentError(f"{unknown[0]} is no option of an engine; accepted: {accepted}")
    others.pop("pack_weights", None)
    return EngineConfig(target, _resolve_dtype(dtype, target), **others)


def _packed(config: EngineConfig, options: EngineOptions, model: VisionLanguageModel) -> EngineConfig:
    """The options with `pack_weights` decided."""
    asked = options.get("pack_weights", "auto")
    if not isinstance(asked, (bool, str)) or (isinstance(asked, str) and asked != "auto"):
        raise InvalidArgumentError(f"pack_weights is {asked!r}; accepted: True, False, 'auto'")
    if asked == "auto":
        weights = sum(p.nbytes for p in model.hf.parameters())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        asked = config.device.type == "cpu" and packing_fault(config.dtype) is None and 4 * weights <= memory
    return replace(config, pack_weights=bool(asked))


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the system when they are freed, and then has each page of the next made anew.

    That was a tenth of the prefill of four prompts. Once a block of up to 32 MiB has been freed, those of its size are
    kept, and twice as much at the end of the heap (mallopt(3), M_MMAP_THRESHOLD). The pages of this one stay untouched.
    """
    torch.empty((32 << 20) - 4096, dtype=torch.uint8, device="cpu")


def _resolve_device(device: str | torch.device) -> torch.device:
    """The device, made sure of. Raises DeviceError when it is not there."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise DeviceError(f"device {device!r} is not known: {e}; accepted: auto, cpu, cuda, cuda:N") from e
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} is not supported; accepted: auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {device!r} is not there: this torch sees {torch.cuda.device_count()} CUDA devices")
    return resolved


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if not isinstance(dtype, (str, torch.dtype)):
        raise DeviceError(f"dtype is a {type(dtype).__name__}; accepted: auto, {', '.join(_DTYPES)}, or torch's")
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise DeviceError(f"dtype {dtype!r} is not supported; accepted: auto, {', '.join(_DTYPES)}")
    return resolved
