"""What is run: models, questions with pictures, the methods compared, and one request's way from call to tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from benchmarks.common import wait_for
from dyvte_engine import (
    NANO_HEADS,
    DivPrune,
    Downsample,
    DynamicExit,
    Engine,
    FastV,
    FixedExit,
    KeepAll,
    PyramidDrop,
    Random,
    ToMe,
    VisionZip,
    VisualTokenPolicy,
    compose,
    search_vtw,
)
from dyvte_engine.heads.exit_head import ExitHeadConfig, ExitHeads
from dyvte_engine.models.presets import PRESETS, preset, tiles
from dyvte_engine.training.nano.evaluate import scene_items

# Layers at which an exit is forced where weights are random. 7B: mean exit on SQA-I, 13.4 (Table 4, MT+LT). 13B: what
# Table 2's 18.6 -> 8.2 TFLOPs on SQA-I comes to, 11.3. Half depth where the paper has no figure. (arXiv 2411.19628)
PAPER_EXITS = {"llava-1.5-7b": 13, "llava-1.5-13b": 11, "llava-next-7b": 13}
HF = "transformers, SDPA"
HF_EAGER = "transformers, eager"


def load(model: str, dtype: str, device: str, max_batch: int, new_tokens: int, **options: Any) -> Engine:
    """A preset with random weights, "nano", or a checkpoint; room for `max_batch` of `questions` and their answers."""
    nothing_kept: dict[str, Any] = dict(picture_cache=0, prefix_cache=0)  # every run is the first one
    common = dict(dtype=dtype, device=device, max_batch=max_batch, **nothing_kept, **options)
    if model in PRESETS:
        config = preset(model)
        engine = Engine.from_config(model, max_len=config.image_seq_length + 128 + new_tokens, **common)
    else:
        engine = Engine.from_pretrained(model, **common)
    _without_end(engine)
    return engine


def _without_end(engine: Engine) -> None:
    """An end token that never comes: every answer has the length asked for, here and in transformers."""
    engine.model.hf.generation_config.eos_token_id = engine.model.shape.vocab_size


@contextmanager
def endless(engine: Engine) -> Iterator[None]:
    """While this runs, answers do not end by themselves."""
    config = engine.model.hf.generation_config
    before = config.eos_token_id
    _without_end(engine)
    try:
        yield
    finally:
        config.eos_token_id = before


def questions(model: str, n: int, split: str = "heldout") -> tuple[list[str], list[list[Image.Image]]]:
    """Generated scenes with a question each, and as many pictures of it as the model cuts one into."""
    items = scene_items(0, split, 0, 2 * n, number=1)[:n]
    copies = tiles(preset(model)) if model in PRESETS else 1
    return [i.question.text for i in items], [[i.picture] * copies for i in items]


def forced_exit(engine: Engine, layer: int, light: bool = False) -> DynamicExit:
    """Exit heads of the paper's size, or light ones, whose weights say "exit" after `layer` and "stay" before it.

    The work is that of real heads: a call after every layer up to `layer`.
    """
    shape = engine.model.shape
    form: dict[str, Any] = dict(head_hidden=min(2048, shape.hidden_size // 2))
    if light:
        form = dict(head_hidden=min(256, shape.hidden_size // 2), rms_eps=1e-6, shared=True)
    with torch.device(engine.config.device):
        heads = ExitHeads(ExitHeadConfig(shape.hidden_size, shape.num_layers, **form), seed=None)
    heads = heads.to(engine.config.dtype).requires_grad_(False)
    heads.w2.data.fill_(0.0)
    if heads.b1 is None:  # gelu's mean over random inputs is above 0, so a column of ones sums to a positive logit
        heads.w2.data[:layer, 0] = 1.0
        heads.w2.data[layer:, 1] = 1.0
    else:  # far below 0 gelu gives 0 or a little less, far above what it was given
        heads.b1.data[:layer] = -20.0
        heads.b1.data[layer:] = 20.0
        heads.w2.data[0, 1] = 1.0
    return DynamicExit(heads, threshold=0.5)


def methods(engine: Engine, model: str) -> dict[str, VisualTokenPolicy]:
    """Every method at its published setting; exits by nano's heads, else forced."""
    layers = engine.model.shape.num_layers
    half = layers // 2 - 1
    if model == "nano":
        dynamic: VisualTokenPolicy = DynamicExit.from_file(NANO_HEADS)
        vtw = search_vtw(engine, *questions(model, 20, split="train"))
    else:
        dynamic = forced_exit(engine, PAPER_EXITS.get(model, half))
        vtw = FixedExit(half)
    tokens = engine.model.vision.tokens
    return {
        "KeepAll": KeepAll(),
        "FastV": FastV(),
        "ToMe": ToMe(),
        f"VTW ({vtw.layer})": vtw,
        "PyramidDrop": PyramidDrop(),
        "DivPrune": DivPrune(),
        "VisionZip": VisionZip(max(1, round(54 / 576 * tokens)), max(1, round(10 / 576 * tokens))),
        "Random": Random(),
        "Downsample": Downsample(),
        "DyVTE": dynamic,
        f"DyVTE at layer {half}": forced_exit(engine, half),
        "DyVTE+FastV": compose(FastV(), dynamic),
        "DyVTE+ToMe": compose(ToMe(), dynamic),
    }


@dataclass
class Timeline:
    """When things happened in one request, in seconds of one clock."""

    start: float = 0.0
    vision: list[float] = field(default_factory=list)  # entry into the model, end of the projector; filled at the end
    tokens: list[float] = field(default_factory=list)  # each token of all sequences

    @property
    def processor(self) -> float:
        return self.vision[0] - self.start

    @property
    def vision_seconds(self) -> float:
        return self.vision[-1] - self.vision[0]

    @property
    def prefill(self) -> float:
        """From the projector's end to the first token."""
        return self.tokens[0] - self.vision[-1]

    def until(self, token: int) -> float:
        """From the call to the token numbered from 1."""
        return self.tokens[token - 1] - self.start

    @property
    def per_token(self) -> float | None:
        n = len(self.tokens) - 1
        return (self.tokens[-1] - self.tokens[0]) / n if n else None


class _DeviceClock:
    """When a device gets to a point of its work, on the host's clock, and without a wait for it there.

    Whoever waited at the end of the vision would measure himself: the host could prepare nothing for the decoder while
    the tower runs, and all of that would come after it. So an event is recorded there and read when the request is
    done. Both clocks meet at `start`, when the device has nothing else to do; they differ by the microseconds that an
    event takes to reach it. A CPU's work is done when its call returns.
    """

    def __init__(self, device: torch.device):
        self._device = device
        wait_for(device)
        self.start = time.perf_counter()
        self._begun = self._recorded()

    def _recorded(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stamp(self) -> Callable[[], float]:
        """Called later: when the device was here."""
        begun, here = self._begun, self._recorded()
        if begun is None or here is None:
            now = time.perf_counter()
            return lambda: now

        def read() -> float:
            here.synchronize()
            return self.start + begun.elapsed_time(here) / 1000

        return read


@contextmanager
def watched(engine: Engine, entry: torch.nn.Module) -> Iterator[Timeline]:
    """A timeline that starts now; of the model that both sides share it notes when vision begins and has projected.

    Vision begins on the host, where `entry` is called, the module that it begins with, and ends on the device. The
    engine captures no tower that somebody hooked.
    """
    clock, stamps = _DeviceClock(engine.config.device), list[Callable[[], float]]()

    def entered(*_: Any) -> None:
        now = time.perf_counter()
        stamps.append(lambda: now)

    handles = [
        entry.register_forward_pre_hook(entered),
        engine.model.hf.model.multi_modal_projector.register_forward_hook(lambda *_: stamps.append(clock.stamp())),
    ]
    line = Timeline(clock.start)
    try:
        yield line
        line.vision = [stamp() for stamp in stamps]
    finally:
        for handle in handles:
            handle.remove()


class _TokenTimes(BaseStreamer):
    """transformers calls `put` with the prompt, then with every step's tokens, which are on the host by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Request:
    """One batch of questions on an engine; `run_*` answer it with `new_tokens` greedy tokens each."""

    engine: Engine
    texts: Sequence[str]
    pictures: Sequence[Sequence[Image.Image]]

    @property
    def batch(self) -> int:
        return len(self.texts)

    def run(self, policy: VisualTokenPolicy, new_tokens: int) -> tuple[Timeline, list[Any]]:
        """On the engine, under a policy that it has bound already: binding moves heads and is no part of a request."""
        results = []
        with watched(self.engine, self.engine.model.hf.model) as line:
            for chunk in self.engine.stream(
                list(self.texts), list(self.pictures), policy=policy, max_new_tokens=new_tokens
            ):
                if chunk.index == self.batch - 1:
                    line.tokens.append(time.perf_counter())
                if chunk.result is not None:
                    results.append(chunk.result)
        return line, results

    def run_hf(self, attention: str, new_tokens: int) -> tuple[Timeline, Any]:
        """transformers' generate on the same weights, as its documentation says: left padding, dynamic cache."""
        model, processor, streamer = self.engine.model.hf, self.engine.model.processor, _TokenTimes()
        bos = processor.tokenizer.bos_token
        with _attention(model, attention), watched(self.engine, model.model.vision_tower) as line:
            chats = [_chat(t, len(p)) for t, p in zip(self.texts, self.pictures, strict=True)]
            prompts = [processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
            inputs = processor(
                text=prompts,
                images=[p for pictures in self.pictures for p in pictures],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=not (bos and prompts[0].startswith(bos)),
            ).to(model.device, self.engine.config.dtype)
            out = model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=streamer,
            )
        line.tokens = streamer.times[1:]
        return line, out


def _chat(text: str, pictures: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}]


@contextmanager
def _attention(model: Any, kind: str) -> Iterator[None]:
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")  # the engine's own calls of the tower


Call = Callable[[Request, int], tuple[Timeline, Any]]


def runners(named: dict[str, VisualTokenPolicy]) -> dict[str, Call]:
    """Everything to compare, as calls that take a request and the number of new tokens; policies are bound already."""

    def hf(attention: str) -> Call:
        return lambda request, new_tokens: request.run_hf(attention, new_tokens)

    def ours(policy: VisualTokenPolicy) -> Call:
        return lambda request, new_tokens: request.run(policy, new_tokens)

    return {HF_EAGER: hf("eager"), HF: hf("sdpa")} | {name: ours(policy) for name, policy in named.items()}


def requests(engine: Engine, model: str, batch: int, n: int) -> list[Request]:
    """n batches of questions, no question twice."""
    texts, pictures = questions(model, n * batch)
    parts = [slice(i * batch, (i + 1) * batch) for i in range(n)]
    return [Request(engine, texts[p], pictures[p]) for p in parts]
