"""Layers of a prefill that see text only, as CUDA graphs: one launch for each, where the plain loop needs about ten.

After an exit, and in prompts without a picture, a layer of few rows is bound by reading its weights: a few rows more
cost next to nothing, but a host may not issue the launches as fast as the device runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.attention import AttentionFn, Lengths
from ..kernels.graphs import Replay, capture_cuda
from ..models.decoder import Decoder
from ..models.rows import Rows
from .kv_cache import KVCache, PagePool

# Rows. In steps of a tile of a product: from some 250 on arithmetic binds, and what fills up costs like any row. With
# more than the last, a layer is long enough to hide its launches.
BUCKETS = (32, *range(64, 513, 64))


@dataclass(eq=False)
class _Home:
    """What has fixed addresses for a batch of one size; the sequence after its last one is the padding.

    cu: int32 [B+2], where each sequence's rows begin; table: int32 [L, B+1, M], their pages; empty: int32 [B+1], zeros.
    """

    cu: Tensor
    table: Tensor
    empty: Tensor


class _Captured:
    """See `LayerRows`: `bucket` rows at fixed addresses, of sequences in one home and the padding."""

    workspace: Tensor | None = None

    def __init__(self, graphs: TextGraphs, home: _Home, bucket: int):
        self.graphs, self.home, self.bucket = graphs, home, bucket

    def attend(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        graphs, home = self.graphs, self.home
        decoder, pool, table = graphs.decoder, graphs.pool, home.table[layer]
        cos_sin, numbers = graphs.cos_sin[: self.bucket], graphs.numbers[: self.bucket]
        ops.rope_append_(q, k, v, cos_sin, numbers, home.cu, pool.k, pool.v, table, home.empty)
        if layer < len(decoder.layers) - 1:
            return hidden, graphs.attention(q, k, v, Lengths(home.cu, [self.bucket]), decoder.scale)
        ends = (home.cu[1:] - 1).long()  # the other rows would feed nothing but the cache
        read = ops.decode_attention(q[ends], pool.k, pool.v, table, home.cu.diff(), decoder.scale)
        return hidden[ends], read

    def added(self, layer: int) -> None:
        return None


class TextGraphs:
    """Captured layers of one engine, for each (layer, batch size, bucket of rows).

    What fills a bucket up is one more sequence: it attends to itself alone, and its K/V goes to the pool's spare page.
    It starts as zeros in every prompt, so it stays finite; attention kernels may weigh what follows a sequence by 0.
    `attention` must take the lengths from the device (`attention.CAPTURABLE`). Graphs are made at first use, until
    `sealed`: from then on rows that none covers are not taken.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: PagePool,
        attention: AttentionFn,
        capture: Callable[..., Replay[Any]] = capture_cuda,
    ):
        self.decoder, self.pool, self.attention, self._capture = decoder, pool, attention, capture
        self.sealed = False
        most = BUCKETS[-1]
        self._hidden = decoder.norm.new_zeros(most, decoder.shape.hidden_size)
        self._x = torch.zeros_like(self._hidden)
        self.cos_sin = decoder.cos_sin.new_zeros(most, decoder.cos_sin.shape[1])  # of each row
        self.numbers = torch.arange(most, dtype=torch.int32, device=decoder.norm.device)
        self._homes: dict[int, _Home] = {}
        self._replays: dict[tuple[int, int, int], Replay[Any]] = {}
        self._memory: list[Any] = []  # the handle of the pool that all graphs share

    def take(self, layer: int, rows: Rows) -> bool:
        """Whether these rows can run here from this layer on."""
        total = sum(rows.lengths.host)
        if any(rows.n_visual) or layer < len(rows.additions) or total > BUCKETS[-1]:
            return False
        return not self.sealed or (layer, len(rows.n_visual), _bucket(total)) in self._replays

    def run(self, first: int, cache: KVCache, rows: Rows, hidden: Tensor, x: Tensor) -> Tensor:
        """Layers `first` to the last, all with pages for these rows: hidden [N, d] -> [B, d], as `Prefilled.hidden`.

        x [N, d]: `hidden`, normalised for layer `first`.
        """
        batch, bucket = len(rows.n_visual), _bucket(len(hidden))
        self._admit(self._home(batch), cache.block_table[first:], rows, hidden, x, bucket)
        for layer in range(first, len(self.decoder.layers)):
            out = self._replay(layer, batch, bucket)
        return out[:batch].clone()  # the next replay writes over it

    def warm_up(self, batch: int, bucket: int) -> None:
        """The graphs of all layers for so many sequences and rows; what they compute goes to the spare page."""
        home = self._home(batch)
        home.table.fill_(self.pool.spare)
        home.cu.copy_(self.numbers[: batch + 2].clamp(max=bucket))
        home.cu[-1:].fill_(bucket)
        for state in (self._hidden, self._x):
            state.zero_()
        for layer in range(len(self.decoder.layers)):
            self._replay(layer, batch, bucket)

    def _replay(self, layer: int, batch: int, bucket: int) -> Any:
        key = layer, batch, bucket
        if key in self._replays:
            return self._replays[key]()
        rows = _Captured(self, self._home(batch), bucket)

        def step() -> Tensor | None:
            """In place; the last layer gives the [B+1, d] last rows, normalised."""
            _, x = self.decoder.layer(layer, self._hidden[:bucket], self._x[:bucket], rows)
            if layer == len(self.decoder.layers) - 1:
                return x
            self._x[:bucket].copy_(x)
            return None

        out = step()  # libraries set themselves up
        self._replays[key] = self._capture(step, self._memory)
        return out

    def _admit(self, home: _Home, block_table: Tensor, rows: Rows, hidden: Tensor, x: Tensor, bucket: int) -> None:
        """Copy in what the graphs read: `bucket` rows with the padding, and the pages of the last layers."""
        layers, total = len(block_table), len(hidden)
        for here, given in ((self._hidden, hidden), (self._x, x)):
            here[:total].copy_(given)
            here[total:bucket].zero_()
        cos_sin, numbers = rows.rotation_table(self.decoder.cos_sin)
        torch.index_select(cos_sin, 0, numbers, out=self.cos_sin[:total])
        home.cu[:-1].copy_(rows.lengths.cu)
        home.cu[-1:].fill_(bucket)
        pages = block_table[..., : home.table.shape[2]]
        home.table[-layers:, :-1, : pages.shape[2]].copy_(pages)

    def _home(self, batch: int) -> _Home:
        if batch not in self._homes:
            pages = self.pool.pages(BUCKETS[-1])
            table = self.numbers.new_full((len(self.decoder.layers), batch + 1, pages), self.pool.spare)
            self._homes[batch] = _Home(self.numbers.new_zeros(batch + 2), table, self.numbers.new_zeros(batch + 1))
        return self._homes[batch]


def _bucket(rows: int) -> int:
    return next(size for size in BUCKETS if rows <= size)
