"""One token step for a running batch: every layer reads the K/V it has, which after an exit differs per layer.

On CUDA a step is a few hundred small launches, which a host cannot issue as fast as the device runs them: they are
captured once as a graph for each batch size and length bucket, and a step is then one launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import ops
from ..kernels.graphs import Replay, capture_cuda
from ..models.decoder import Decoder
from .kv_cache import KVCache, PagePool


def decode_step(
    decoder: Decoder, pool: PagePool, tokens: Tensor, positions: Tensor, block_table: Tensor, lens: Tensor
) -> Tensor:
    """tokens int64 [B] -> f32 logits [B, vocab]; appends one row to every layer's cache. Nothing here knows the host.

    positions and lens int32 [L, B], both one higher afterwards; block_table int32 [L, B, M] with room for the rows.
    """
    layers = decoder.layers
    cu = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
    kv_lens = lens + 1
    hidden = F.embedding(tokens, decoder.embed.weight)  # [B, d]
    x = ops.rms_norm(hidden, layers[0].input_norm, decoder.eps)
    for number, layer in enumerate(layers):
        q, k, v = layer.project_qkv(x)
        table = block_table[number]
        ops.rope_append_(q, k, v, decoder.cos_sin, positions[number], cu, pool.k, pool.v, table, lens[number])
        attended = ops.decode_attention(q, pool.k, pool.v, table, kv_lens[number], decoder.scale)
        x = decoder.after_attention(number, hidden, attended)
    lens += 1
    positions += 1
    return decoder.logits(x)


@dataclass(eq=False)
class _Home:
    """Where the state of a batch of one size lies while graphs run on it: their addresses are fixed."""

    tokens: Tensor
    block_table: Tensor
    lens: Tensor
    positions: Tensor
    tenant: weakref.ref[KVCache] | None = field(default=None, init=False)

    def admit(self, cache: KVCache) -> None:
        """`cache` keeps its device state here from now on; one that still does takes its own along."""
        if cache.lens is self.lens:
            return
        before = self.tenant() if self.tenant is not None else None
        for name in ("block_table", "lens", "positions"):
            here = getattr(self, name)
            if before is not None and getattr(before, name) is here:
                setattr(before, name, here.clone())
            here.copy_(getattr(cache, name))
            setattr(cache, name, here)
        self.tenant = weakref.ref(cache)


class DecodeGraphs:
    """Captured decode steps of one engine, made at first use for each (batch size, bucket of pages).

    A bucket is a power of two of pages: the attention kernel splits its work by the most rows the table can hold.
    Running batches of one size share one home; changing between them costs three small copies.
    """

    def __init__(self, decoder: Decoder, pool: PagePool, capture: Callable[..., Replay[Tensor]] = capture_cuda):
        self.decoder, self.pool, self._capture = decoder, pool, capture
        self._homes: dict[int, _Home] = {}
        self._replays: dict[tuple[int, int], Replay[Tensor]] = {}
        self._memory: list[Any] = []  # the handle of the pool that all graphs share

    def step(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """`decode_step` of the state in `cache`."""
        batch, most = len(tokens), cache.block_table.shape[2]
        if batch not in self._homes:
            state = (tokens, cache.block_table, cache.lens, cache.positions)
            self._homes[batch] = _Home(*[torch.empty_like(t) for t in state])
        home = self._homes[batch]
        home.admit(cache)
        home.tokens.copy_(tokens)
        pages = min(most, 1 << (cache.longest // self.pool.page_size).bit_length())
        if (batch, pages) not in self._replays:
            self._replays[batch, pages] = self._captured(home, pages)
        return self._replays[batch, pages]().clone()  # the next replay writes over it

    def _captured(self, home: _Home, pages: int) -> Replay[Tensor]:
        def step() -> Tensor:
            table = home.block_table[..., :pages]
            return decode_step(self.decoder, self.pool, home.tokens, home.positions, table, home.lens)

        step()  # on the first rows that the replay will write again
        home.lens -= 1
        home.positions -= 1
        return self._capture(step, self._memory)
