"""From prepared prompts to tokens: the token loop of one batch, its stop rules and its figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..flops import paper_flops, true_flops
from ..kernels.transfer import to_device
from ..models import Decoder
from .decode import DecodeGraphs, decode_step
from .kv_cache import KVCache
from .prefill import Prefilled
from .sampling import Sampler, StopRules, end_tokens


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one answer. Bytes are those of the pages held right after the prefill.

    Attributes:
        exit_layer: layer after which the last visual token left (-1: before the first); None if some stayed or there
            were none.
        visual_tokens: of the prompt, before any policy.
        tokens_per_layer: prompt rows that each layer computed.
        ttft_s: seconds from the call to the first token of this batch (processor, vision, prefill, sampling).
        vision_s: the part of it spent in processor, vision tower and projector.
        decode_tokens_per_s: this sequence's tokens after the first, over the time they took; 0 for one token.
        prefill_tflops: the paper's count (spec section 4), vision tower included; `_keep_all` without any exit.
        prefill_tflops_true: grouped-query projections and causal attention counted as they are, LM head included.
    """

    exit_layer: int | None
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    tokens_per_layer: list[int]
    ttft_s: float
    vision_s: float
    decode_tokens_per_s: float
    prefill_tflops: float
    prefill_tflops_keep_all: float
    prefill_tflops_true: float
    prefill_tflops_true_keep_all: float
    kv_bytes: int
    kv_bytes_keep_all: int


@dataclass(frozen=True)
class GenerationResult:
    """An answer. `finish_reason` is "stop" (end token, which `token_ids` hold), "stop_string", "length", "time"."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats


@dataclass(frozen=True)
class StreamChunk:
    """One token of prompt `index`: the text it adds (may be empty) and, with the last one, the whole `result`."""

    index: int
    token_id: int
    text: str
    result: GenerationResult | None = None


class Running:
    """A prefilled batch that can be stepped; `logits` f32 [B, vocab] are those of the next token."""

    def __init__(self, decoder: Decoder, cache: KVCache, prefilled: Prefilled, graphs: DecodeGraphs | None = None):
        self.decoder, self.cache, self._graphs = decoder, cache, graphs
        self.exit_layers, self.rows = prefilled.exit_layers, prefilled.rows
        self.logits = decoder.logits(prefilled.hidden)

    @property
    def positions(self) -> Tensor:
        """int32 [B], the next token's position in the first layer; in all layers, unless a policy renumbered."""
        return self.cache.positions[0]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append one token to every sequence; returns (and keeps) the next logits.

        tokens: B numbers, or int64 [B] on the device: then nothing waits for the device.

        Raises:
            CacheError: the pool is out of pages.
        """
        cache = self.cache
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=cache.lens.device)
        cache.reserve_next()
        if self._graphs is None:
            state = cache.positions, cache.block_table, cache.lens
            self.logits = decode_step(self.decoder, cache.pool, ids, *state)
        else:
            self.logits = self._graphs.step(cache, ids)
        cache.host_lens += 1
        return self.logits

    @torch.inference_mode()
    def select(self, keep: Sequence[int]) -> None:
        """Go on with the sequences listed; the others give their memory back."""
        self.cache.select(keep)
        self.logits = self.logits[to_device(list(keep), self.logits.device, torch.int64)]

    @torch.inference_mode()
    def close(self) -> None:
        """Give all memory of the cache back."""
        self.cache.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class PrefillFigures:
    """The part of `GenerationStats` that is known after the prefill."""

    exit_layer: int | None
    tokens_per_layer: list[int]
    prefill_tflops: float
    prefill_tflops_keep_all: float
    prefill_tflops_true: float
    prefill_tflops_true_keep_all: float
    kv_bytes: int
    kv_bytes_keep_all: int

    @classmethod
    def of(cls, running: Running, b: int, prompt_len: int, vision: float, vision_keep_all: float) -> PrefillFigures:
        """Figures of sequence b, read before any sequence leaves the batch.

        `prompt_len` tokens before any policy; `vision` FLOPs of the tower, under the policy and without one.
        """
        shape, pool = running.decoder.shape, running.cache.pool
        rows = [layer[b] for layer in running.rows]
        full = [prompt_len] * shape.num_layers
        return cls(
            exit_layer=running.exit_layers[b],
            tokens_per_layer=rows,
            prefill_tflops=paper_flops(shape, rows, vision) / 1e12,
            prefill_tflops_keep_all=paper_flops(shape, full, vision_keep_all) / 1e12,
            prefill_tflops_true=true_flops(shape, rows, vision) / 1e12,
            prefill_tflops_true_keep_all=true_flops(shape, full, vision_keep_all) / 1e12,
            kv_bytes=running.cache.bytes_of(b),
            kv_bytes_keep_all=shape.num_layers * -(-prompt_len // pool.page_size) * pool.page_bytes,
        )


@dataclass
class Request:
    """One prompt on its way: all ids so far, the new ones, their text, and when the first and the last came."""

    ids: list[int]
    visual_tokens: int
    max_new_tokens: int
    new: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    first_at: float = 0.0
    last_at: float = 0.0

    def result(self, figures: PrefillFigures, started: float, vision_s: float) -> GenerationResult:
        decode_s = self.last_at - self.first_at
        stats = GenerationStats(
            visual_tokens=self.visual_tokens,
            text_tokens=len(self.ids) - len(self.new) - self.visual_tokens,
            new_tokens=len(self.new),
            ttft_s=self.first_at - started,
            vision_s=vision_s,
            decode_tokens_per_s=(len(self.new) - 1) / decode_s if decode_s > 0 else 0.0,
            **vars(figures),
        )
        assert self.finish_reason is not None
        return GenerationResult(self.text, list(self.new), self.finish_reason, stats)


class TokenLoop:
    """Sampling, stop rules and text of one batch. Knows tokens; knows nothing of layers or pictures."""

    def __init__(
        self, sequences: list[Request], config: Any, tokenizer: Any, seeds: Sequence[int], device: torch.device
    ):
        eos = end_tokens(config, tokenizer)
        self.sequences, self.tokenizer = sequences, tokenizer
        self.samplers = [Sampler(config, s.ids, seed, eos, device) for s, seed in zip(sequences, seeds, strict=True)]
        self.stops = [StopRules(config, tokenizer, eos, len(s.ids), s.max_new_tokens) for s in sequences]

    def run(self, running: Running) -> Iterator[tuple[int, int, str]]:
        """Yield (sequence, token, new text) until every sequence has finished; finished ones leave the batch."""
        active = list(range(len(self.sequences)))
        queued = running.logits.is_cuda
        while active:
            rows = zip(running.logits, active, strict=True)
            tokens = torch.stack([self.samplers[s](row, self.sequences[s].ids) for row, s in rows])
            came = list(zip(active, tokens.tolist(), strict=True))
            for s, token in came:
                self._accept(self.sequences[s], token, self.stops[s])
            stay = [i for i, s in enumerate(active) if self.sequences[s].finish_reason is None]
            if queued:  # the device is at work on the next token while this one becomes text
                _go_on(running, tokens, stay)
            for s, token in came:
                yield s, token, self._new_text(self.sequences[s])
            if not queued:
                _go_on(running, tokens, stay)
            active = [active[i] for i in stay]

    def _accept(self, s: Request, token: int, stops: StopRules) -> None:
        s.last_at = time.perf_counter()
        s.first_at = s.first_at or s.last_at
        s.ids.append(token)
        s.new.append(token)
        s.finish_reason = stops.reason(s.ids, s.new)

    def _new_text(self, s: Request) -> str:
        """What the newest token adds; an unfinished multi-byte character waits for its rest."""
        text = self.tokenizer.decode(s.new, skip_special_tokens=True)
        if text.endswith("\ufffd") and s.finish_reason is None:
            return ""
        added, s.text = text[len(s.text) :], text
        return added


def _go_on(running: Running, tokens: Tensor, stay: list[int]) -> None:
    """The next step, of the sequences that stay; none, if none does."""
    if stay and len(stay) < len(tokens):
        running.select(stay)
        tokens = tokens[to_device(stay, tokens.device, torch.int64)]
    if stay:
        running.step(tokens)
