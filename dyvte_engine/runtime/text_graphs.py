"""Layers of a prefill that see text only, as CUDA graphs: one launch for each, where the plain loop needs about ten.

After an exit, and in prompts without a picture, a layer of few rows is bound by reading its weights: a few rows more
cost next to nothing, but a host may not issue the launches as fast as the device runs them.
"""

from __future__ import annotations

import functools
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
_BUCKETS = (32, *range(64, 513, 64))


@dataclass(frozen=True, eq=False)
class _Home:
    """What lies at fixed addresses for a batch of one size; the sequence after its last one is the padding.

    cu: int32 [B+2], where each sequence's rows begin; table: int32 [L, B+1, M], their pages; empty: int32 [B+1], zeros.
    """

    cu: Tensor
    table: Tensor
    empty: Tensor


class TextGraphs:
    """Captured layers of one engine, made at first use for each (layer, batch size, bucket of rows).

    What fills a bucket up is one more sequence: it attends to itself alone, and its K/V goes to the pool's spare page.
    It starts as zeros in every prompt, so it stays finite; attention kernels may weigh what follows a sequence by 0.
    `attend` must take the lengths from the device (`attention.CAPTURABLE`).
    """

    def __init__(
        self, decoder: Decoder, pool: PagePool, attend: AttentionFn, capture: Callable[..., Replay[Any]] = capture_cuda
    ):
        self.decoder, self.pool, self._attend, self._capture = decoder, pool, attend, capture
        most = _BUCKETS[-1]
        self._hidden = decoder.norm.new_zeros(most, decoder.shape.hidden_size)
        self._x = torch.zeros_like(self._hidden)
        self._cos_sin = decoder.cos_sin.new_zeros(most, decoder.cos_sin.shape[1])  # of each row
        self._numbers = torch.arange(most, dtype=torch.int32, device=decoder.norm.device)
        self._homes: dict[int, _Home] = {}
        self._replays: dict[tuple[int, int, int], Replay[Any]] = {}
        self._memory: list[Any] = []  # the handle of the pool that all graphs share

    def take(self, number: int, rows: Rows) -> bool:
        """Whether these rows can run here from layer `number` on."""
        text_only = not any(rows.n_visual) and number >= len(rows.additions)
        return text_only and sum(rows.lengths.host) <= _BUCKETS[-1]

    def run(self, first: int, cache: KVCache, rows: Rows, hidden: Tensor, x: Tensor) -> Tensor:
        """Layers `first` to the last, all with pages for these rows: hidden [N, d] -> [B, d], as `Prefilled.hidden`.

        x [N, d]: `hidden`, normalised for layer `first`.
        """
        batch, bucket = len(rows.n_visual), next(size for size in _BUCKETS if len(hidden) <= size)
        home = self._admit(cache.block_table[first:], rows, hidden, x, bucket)
        for number in range(first, len(self.decoder.layers)):
            key = number, batch, bucket
            if key in self._replays:
                out = self._replays[key]()
            else:
                layer = functools.partial(self._layer, number, home, bucket)
                out = layer()  # libraries set themselves up
                self._replays[key] = self._capture(layer, self._memory)
        return out[:batch].clone()  # the next replay writes over it

    def _admit(self, block_table: Tensor, rows: Rows, hidden: Tensor, x: Tensor, bucket: int) -> _Home:
        """Copy in what the graphs read: `bucket` rows with the padding, and the pages of the last layers."""
        layers, batch, _ = block_table.shape
        if batch not in self._homes:
            self._homes[batch] = self._home(batch)
        home = self._homes[batch]
        total = len(hidden)
        for here, given in ((self._hidden, hidden), (self._x, x)):
            here[:total].copy_(given)
            here[total:bucket].zero_()
        cos_sin, numbers = rows.rotation_table(self.decoder.cos_sin)
        torch.index_select(cos_sin, 0, numbers, out=self._cos_sin[:total])
        home.cu[:-1].copy_(rows.lengths.cu)
        home.cu[-1:].fill_(bucket)
        pages = block_table[..., : home.table.shape[2]]
        home.table[-layers:, :-1, : pages.shape[2]].copy_(pages)
        return home

    def _home(self, batch: int) -> _Home:
        pages = -(-_BUCKETS[-1] // self.pool.page_size)
        table = self._numbers.new_full((len(self.decoder.layers), batch + 1, pages), self.pool.spare)
        return _Home(self._numbers.new_zeros(batch + 2), table, self._numbers.new_zeros(batch + 1))

    def _layer(self, number: int, home: _Home, rows: int) -> Tensor | None:
        """A layer of what lies here, in place; the last one gives the [B+1, d] last rows, normalised."""
        decoder, pool, table = self.decoder, self.pool, home.table[number]
        hidden, x = self._hidden[:rows], self._x[:rows]
        q, k, v = decoder.layers[number].project_qkv(x)
        cos_sin, numbers = self._cos_sin[:rows], self._numbers[:rows]
        ops.rope_append_(q, k, v, cos_sin, numbers, home.cu, pool.k, pool.v, table, home.empty)
        if number == len(decoder.layers) - 1:  # the other rows would feed nothing but the cache
            ends = (home.cu[1:] - 1).long()
            attended = ops.decode_attention(q[ends], pool.k, pool.v, table, home.cu.diff(), decoder.scale)
            return decoder.after_attention(number, hidden[ends], attended)
        attended = self._attend(q, k, v, Lengths(home.cu, [rows]), decoder.scale)
        x.copy_(decoder.after_attention(number, hidden, attended))
        return None
