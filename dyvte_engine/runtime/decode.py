"""One token step for running sequences: every layer reads the K/V it has, which after an exit differs per layer.

A step is a few hundred small kernels, which Python cannot launch as fast as the device runs them: they are captured
once, as a CUDA graph for each padded number of sequences and bucket of lengths, on a CPU as a tape for each number of
sequences. A step is then one launch.
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
from ..models.fused import FusedLayers
from .kv_cache import KVCache, PagePool


class _OneEach:
    """See `LayerRows`: one row for each sequence. positions and lens int32 [L, B], block_table int32 [L, B, M]."""

    workspace: Tensor | None = None

    def __init__(self, decoder: Decoder, pool: PagePool, positions: Tensor, block_table: Tensor, lens: Tensor):
        self.decoder, self.pool = decoder, pool
        self.cu = torch.arange(lens.shape[1] + 1, dtype=torch.int32, device=lens.device)
        self.of_layer = list(zip(*(t.unbind() for t in (positions, block_table, lens, lens + 1)), strict=True))
        self._arrived: Tensor | None = None  # on CUDA, of one layer after another
        if lens.is_cuda:
            self._arrived = lens.new_zeros(lens.shape[1] * decoder.shape.num_heads)

    def attend(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pool, decoder = self.pool, self.decoder
        positions, table, lens, kv_lens = self.of_layer[layer]
        if self._arrived is not None:
            row, place = (q, k, v, decoder.cos_sin, positions), (pool.k, pool.v, table, lens)
            return hidden, ops.rope_append_attention_(*row, *place, decoder.scale, self._arrived)
        ops.rope_append_(q, k, v, decoder.cos_sin, positions, self.cu, pool.k, pool.v, table, lens)
        return hidden, ops.decode_attention(q, pool.k, pool.v, table, kv_lens, decoder.scale)

    def added(self, layer: int) -> None:
        return None


def decode_step(
    decoder: Decoder,
    pool: PagePool,
    tokens: Tensor,
    positions: Tensor,
    block_table: Tensor,
    lens: Tensor,
    fused: FusedLayers | None = None,
) -> Tensor:
    """tokens int64 [B] -> f32 logits [B, vocab]; appends one row to every layer's cache. Nothing here knows the host.

    positions and lens int32 [L, B]; block_table int32 [L, B, M] with room for the rows. The caller raises the former.
    fused: what computes it for as many sequences as it takes.
    """
    rows = _OneEach(decoder, pool, positions, block_table, lens)
    hidden = F.embedding(tokens, decoder.embed.weight)  # [B, d]
    if fused is not None and len(tokens) <= fused.most:
        return fused.run(hidden, pool.k, pool.v, rows.of_layer)
    x = decoder.enter(hidden)
    for layer in range(len(decoder.layers)):
        hidden, x = decoder.layer(layer, hidden, x, rows)
    return decoder.logits(x)


@dataclass(eq=False)
class _Home:
    """The state of running sequences that graphs work on, at fixed addresses.

    alive: int32 [S], what a step adds to the lengths and positions: 0 in the slots that fill a batch up.
    """

    tokens: Tensor
    alive: Tensor
    block_table: Tensor
    lens: Tensor
    positions: Tensor
    tenant: weakref.ref[KVCache] | None = field(default=None, init=False)  # if its lengths are those that were `lent`
    lent: Tensor | None = field(default=None, init=False)
    count: int = field(default=0, init=False)  # of slots that are alive

    @classmethod
    def of(cls, slots: int, pages: int, pool: PagePool) -> _Home:
        device, layers = pool.k.device, pool.num_layers
        numbers = torch.zeros(layers, slots, dtype=torch.int32, device=device)
        return cls(
            tokens=torch.zeros(slots, dtype=torch.int64, device=device),
            alive=numbers[0].clone(),
            block_table=torch.full((layers, slots, pages), pool.spare, dtype=torch.int32, device=device),
            lens=numbers,
            positions=numbers.clone(),
        )

    def enliven(self, count: int) -> None:
        """The first slots; nothing is launched where as many were alive before."""
        if count != self.count:
            self.count = 0  # until it is done: an interrupt may come between
            self.alive.fill_(0)
            self.alive[:count].fill_(1)
            self.count = count

    def admit(self, cache: KVCache) -> None:
        """`cache` keeps its device state here from now on; one that still does takes its own along.

        Whoever is interrupted in this finds either of them whole: all its state is replaced in one go.
        """
        before = self.tenant() if self.tenant is not None else None
        if before is not None and before.lens is self.lent:
            if before is cache:
                return
            vars(before).update({name: getattr(before, name).clone() for name in _STATE})
        slots = cache.lens.shape[1]
        views = {name: getattr(self, name)[:, :slots] for name in _STATE}
        for name, view in views.items():
            getattr(self, name)[:, slots:].fill_(cache.pool.spare if name == "block_table" else 0)
            view.copy_(getattr(cache, name))
        self.tenant, self.lent = weakref.ref(cache), views["lens"]
        vars(cache).update(views)


_STATE = "block_table", "lens", "positions"


def padded(count: int, most: int) -> int:
    """So many sequences a graph for `count` of them runs: a power of two, at most `most`."""
    return min(1 << (count - 1).bit_length(), most)


class DecodeGraphs:
    """Captured decode steps of one engine, for each (padded number of sequences, bucket of pages).

    A bucket is a power of two of pages: the attention kernel splits its work by the most rows the table can hold.
    `padded` false: for each number of sequences, whatever their lengths; so it is on a CPU, whose kernels do no work
    for what is not there. All running batches share one home; changing between them costs three small copies. Graphs
    are made at first use, until `sealed`: from then on a step that none covers runs without.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: PagePool,
        slots: int,
        max_len: int,
        capture: Callable[..., Replay[Tensor] | None] = capture_cuda,
        padded: bool = True,
        fused: FusedLayers | None = None,
    ):
        self.decoder, self.pool, self._capture, self._padded = decoder, pool, capture, padded
        self.fused = fused
        self.sealed = False
        self._slots, self._pages = slots, pool.pages(max_len)
        self._home = _Home.of(slots, self._pages, pool)
        self._replays: dict[tuple[int, int], Replay[Tensor] | None] = {}  # None: it cannot be captured
        self._memory: list[Any] = []  # the handle of the pool that all graphs share

    def buckets(self) -> list[tuple[int, int]]:
        """Every (sequences, pages) that a step can ask for."""
        if not self._padded:
            return [(n, self._pages) for n in range(1, self._slots + 1)]
        counts = sorted({padded(n, self._slots) for n in range(1, self._slots + 1)})
        pages = sorted({self._bucket(n) for n in range(self._pages)})
        return [(n, p) for n in counts for p in pages]

    def _bucket(self, full_pages: int) -> int:
        return min(self._pages, 1 << full_pages.bit_length())

    def _key(self, cache: KVCache) -> tuple[int, int]:
        """Of the graph that a step of `cache` takes."""
        if not self._padded:
            return cache.count, self._pages
        return padded(cache.count, self._slots), self._bucket(cache.longest // self.pool.page_size)

    def step(self, cache: KVCache, tokens: Tensor) -> Tensor | None:
        """`decode_step` of the state in `cache`, lengths and positions raised; None where no graph covers it."""
        count, key = cache.count, self._key(cache)
        if cache.slots > self._slots or (key not in self._replays and self.sealed):
            return None
        home = self._home
        home.admit(cache)
        home.tokens[:count].copy_(tokens)
        home.enliven(count)
        if key not in self._replays:
            self.capture(key)
        replay = self._replays[key]
        return None if replay is None else replay()[:count].clone()  # the next replay writes over it

    def capture(self, key: tuple[int, int]) -> None:
        """The graph for (sequences, pages). What runs meanwhile writes only rows that the next step writes again."""
        home, (count, pages) = self._home, key

        def step() -> Tensor:
            table, here = home.block_table[:, :count, :pages], slice(count)
            lens, positions = home.lens[:, here], home.positions[:, here]
            logits = decode_step(self.decoder, self.pool, home.tokens[here], positions, table, lens, self.fused)
            lens += home.alive[here]
            positions += home.alive[here]
            return logits

        def undone(call: Callable[[], Any]) -> Any:
            before = home.lens.clone(), home.positions.clone()
            out = call()
            home.lens.copy_(before[0])
            home.positions.copy_(before[1])
            return out

        if self.pool.k.is_cuda:
            undone(step)  # libraries set themselves up
        self._replays[key] = undone(lambda: self._capture(step, self._memory))
