"""Layers of a prefill as CUDA graphs: one launch for each, and one for its projections, where the plain loop needs ten.

A layer of a prompt with one picture takes some 0.3 ms on a fast device, and behind an exit less than half of that. That
is less than a host needs to issue its launches, and where an exit may be decided after every layer, it cannot issue
them ahead.
"""

from __future__ import annotations

import weakref
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
from .kv_cache import PagePool

# Rows. In steps of a tile of a product: from some 250 on arithmetic binds, and what fills up costs like any row. With
# more than the last, a layer is long enough to hide its launches.
BUCKETS = (32, *range(64, 1025, 64))
ALONE_FROM = 128  # rows; below, FlashAttention 2 is ahead of what torch picks for one sequence (H100)


@dataclass(eq=False)
class _Home:
    """What has fixed addresses for a batch of one size; the sequence after its last one is the padding.

    cu: int32 [B+2], where each sequence's rows begin; table: int32 [L, B+1, M], their pages; empty: int32 [B+1], zeros.
    """

    cu: Tensor
    table: Tensor
    empty: Tensor


@dataclass(frozen=True, eq=False)
class _Arrival:
    """What rows that are left behind an exit need here.

    index: int64 [bucket], their numbers among those before, then that of a row of zeros; cos_sin: [n, rot_dim], of
    each; cu: int32 [B+2], as in `_Home`.
    """

    rows: Rows
    bucket: int
    index: Tensor
    cos_sin: Tensor
    cu: Tensor


class _Captured:
    """See `LayerRows`: `bucket` rows at fixed addresses, of sequences in one home and the padding."""

    workspace: Tensor | None = None

    def __init__(self, graphs: LayerGraphs, home: _Home, bucket: int):
        self.graphs, self.home, self.bucket = graphs, home, bucket
        self.queries_keys: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        graphs, home = self.graphs, self.home
        decoder, pool, table = graphs.decoder, graphs.pool, home.table[layer]
        cos_sin, numbers = graphs.cos_sin[: self.bucket], graphs.numbers[: self.bucket]
        ops.rope_append_(q, k, v, cos_sin, numbers, home.cu, pool.k, pool.v, table, home.empty)
        self.queries_keys = q, k
        if layer < len(decoder.layers) - 1:
            if graphs.alone is not None and len(home.empty) == 2 and self.bucket >= ALONE_FROM:
                return hidden, graphs.alone(q, k, v, decoder.scale)
            return hidden, graphs.attention(q, k, v, Lengths(home.cu, [self.bucket]), decoder.scale)
        ends = (home.cu[1:] - 1).long()  # the other rows would feed nothing but the cache
        read = ops.decode_attention(q[ends], pool.k, pool.v, table, home.cu.diff(), decoder.scale)
        return hidden[ends], read

    def added(self, layer: int) -> None:
        return None


@dataclass(eq=False)
class Layer:
    """What a captured layer gives, at fixed addresses: x, and q [N, Hq, D] and k [N, Hkv, D], rotated.

    x: [B+1, d] last rows behind the last layer; else it is in the graphs' memory.
    """

    x: Tensor | None
    q: Tensor
    k: Tensor


class LayerGraphs:
    """Captured layers of one engine, for each (layer, batch size, bucket of rows), behind the projections to q, k, v.

    These are launched by themselves, so that the device has them to do while the host waits for a decision. What fills
    a bucket up is one more sequence: it attends to itself alone, and its K/V goes to the pool's spare page. It starts
    as zeros in every prompt, so it stays finite; attention kernels may weigh what follows a sequence by 0. `alone`, if
    given, is the attention of a longer prompt by itself, of which what fills up is the end: nothing sees that either.
    `attention` must take the lengths from the device (`attention.CAPTURABLE`). Graphs are made at first use, until
    `sealed`: from then on rows that none covers are not taken. One prefill at a time has its rows here.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: PagePool,
        attention: AttentionFn,
        capture: Callable[..., Replay[Any]] = capture_cuda,
        alone: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None,
    ):
        self.decoder, self.pool, self._capture = decoder, pool, capture
        self.attention, self.alone = attention, alone
        self.sealed = False
        most = BUCKETS[-1]
        # One row more, which stays zero: what fills up is selected from there.
        self._hidden = decoder.norm.new_zeros(most + 1, decoder.shape.hidden_size)
        self._x = torch.zeros_like(self._hidden)
        # Of a layer and the one before it, at which a decision may still look.
        self._qkv = decoder.norm.new_zeros(2, most + 1, len(decoder.layers[0].qkv.weight))
        self.cos_sin = decoder.cos_sin.new_zeros(most, decoder.cos_sin.shape[1])  # of each row
        self.numbers = torch.arange(most, dtype=torch.int32, device=decoder.norm.device)
        self._homes: dict[int, _Home] = {}
        self._replays: dict[tuple[int, int, int], Replay[Layer]] = {}
        self._memory: list[Any] = []  # the handle of the pool that all graphs share
        self._tenant: weakref.ref[Any] | None = None
        self._bucket = self._loaded = 0  # loaded: layers up to this one have the tenant's pages
        self._ends = torch.tensor(BUCKETS, dtype=torch.int32, device=decoder.norm.device)
        self._nothing = torch.full((most,), most, device=decoder.norm.device)  # numbers of the row that stays zero
        self._expected: _Arrival | None = None

    def take(self, tenant: Any, layer: int, rows: Rows) -> bool:
        """Whether this layer can run here for `tenant`, who has these rows."""
        other = None if self._tenant is None else self._tenant()
        total = sum(rows.lengths.host)
        if layer < len(rows.additions) or total > BUCKETS[-1] or other not in (None, tenant):
            return False
        return not self.sealed or (layer, len(rows.n_visual), bucket_of(total)) in self._replays

    def holds(self, tenant: Any) -> bool:
        """Whether its rows are here, as the last layer left them."""
        return self._tenant is not None and self._tenant() is tenant

    def leave(self, tenant: Any) -> None:
        """Its rows are of no use any more, or elsewhere."""
        if self.holds(tenant):
            self._tenant = self._expected = None

    def admit(self, tenant: Any, rows: Rows, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its rows are here from now on: hidden [N, d] and x. Returns where both are."""
        self._tenant, self._loaded = weakref.ref(tenant), 0
        total, self._bucket = len(hidden), bucket_of(len(hidden))
        self._fill(self._hidden, hidden)
        self._fill(self._x, x)
        cos_sin, numbers = rows.rotation_table(self.decoder.cos_sin)
        torch.index_select(cos_sin, 0, numbers, out=self.cos_sin[:total])
        torch.cat((rows.lengths.cu, self._end(self._bucket)), out=self._home(len(rows.n_visual)).cu)
        return self._hidden[:total], self._x[:total]

    def expect(self, rows: Rows, stay: Tensor) -> None:
        """Make ready what `keep` needs of these."""
        if self._expected is None or self._expected.rows is not rows:
            self._expected = self._arrival(rows, stay)

    def _arrival(self, rows: Rows, stay: Tensor) -> _Arrival:
        bucket = bucket_of(len(stay))
        table, numbers = rows.rotation_table(self.decoder.cos_sin)
        index = torch.cat((stay, self._nothing[len(stay) : bucket]))
        cu = torch.cat((rows.lengths.cu, self._end(bucket)))
        return _Arrival(rows, bucket, index, table.index_select(0, numbers), cu)

    def keep(self, layer: int, rows: Rows, stay: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tenant's rows, which are projected for this layer, those numbered `stay` int64 [n] are left: `rows`.

        Returns where they are, and where x is going to be.
        """
        self.expect(rows, stay)
        assert self._expected is not None
        arrival, self._expected = self._expected, None
        self._bucket = arrival.bucket
        for here in (self._hidden, self._qkv[layer % 2]):
            here[: self._bucket].copy_(here.index_select(0, arrival.index))  # by way of other memory: rows move up
        self.cos_sin[: len(stay)].copy_(arrival.cos_sin)
        self._home(len(rows.n_visual)).cu.copy_(arrival.cu)
        return self._hidden[: len(stay)], self._x[: len(stay)]

    def _end(self, bucket: int) -> Tensor:
        """int32 [1] on the device."""
        place = BUCKETS.index(bucket)
        return self._ends[place : place + 1]

    def _fill(self, here: Tensor, given: Tensor) -> None:
        here[: len(given)].copy_(given)
        if len(given) < self._bucket:
            here[len(given) : self._bucket].zero_()

    def project(self, layer: int, total: int) -> Tensor:
        """q, k and v [total, n] of x, side by side, not rotated yet; for `run`."""
        qkv = self._qkv[layer % 2, : self._bucket]
        self.decoder.layers[layer].qkv.into(self._x[: self._bucket], qkv)
        return qkv[:total]

    def load(self, layers: range, block_table: Tensor) -> None:
        """The tenant's pages in these layers, unless they are here; block_table: int32 [L, B, M], of all layers."""
        if layers.stop > self._loaded:
            pages = block_table[layers.start : layers.stop]
            home = self._home(pages.shape[1])
            most = min(pages.shape[2], home.table.shape[2])
            home.table[layers.start : layers.stop, :-1, :most].copy_(pages[..., :most])
            self._loaded = layers.stop

    def unload(self, tenant: Any) -> None:
        """Its pages are others now."""
        if self.holds(tenant):
            self._loaded = 0

    def run(self, layer: int, batch: int) -> Layer:
        """The rest of a layer of so many sequences."""
        return self._replay(layer, batch, self._bucket)

    def warm_up(self, batch: int, bucket: int) -> None:
        """The graphs of all layers for so many sequences and rows; what they compute goes to the spare page.

        Who has rows here moves out.
        """
        other = None if self._tenant is None else self._tenant()
        if other is not None:
            other.move_out()
        home = self._home(batch)
        home.table.fill_(self.pool.spare)
        home.cu.copy_(self.numbers[: batch + 2].clamp(max=bucket))
        home.cu[-1:].fill_(bucket)
        for state in (self._hidden, self._x, self._qkv):
            state.zero_()
        for layer in range(len(self.decoder.layers)):
            self._replay(layer, batch, bucket)

    def _replay(self, layer: int, batch: int, bucket: int) -> Layer:
        key = layer, batch, bucket
        if key in self._replays:
            return self._replays[key]()
        decoder, last = self.decoder, len(self.decoder.layers) - 1

        def step() -> Layer:
            """Leaves hidden and x in the graphs' memory."""
            rows = _Captured(self, self._home(batch), bucket)
            qkv = self._qkv[layer % 2, :bucket]
            into = self._x[:bucket] if layer < last else None
            _, x = decoder.behind_projections(layer, self._hidden[:bucket], qkv, rows, into)
            q, k, _ = decoder.layers[layer].split_heads(qkv)
            if decoder.layers[layer].qk_norm is not None:  # these are elsewhere: not to be kept by every graph
                assert rows.queries_keys is not None
                q.copy_(rows.queries_keys[0])
                k.copy_(rows.queries_keys[1])
            return Layer(x if layer == last else None, q, k)

        out = step()  # libraries set themselves up
        self._replays[key] = self._capture(step, self._memory)
        return out

    def _home(self, batch: int) -> _Home:
        if batch not in self._homes:
            pages = self.pool.pages(BUCKETS[-1])
            table = self.numbers.new_full((len(self.decoder.layers), batch + 1, pages), self.pool.spare)
            self._homes[batch] = _Home(self.numbers.new_zeros(batch + 2), table, self.numbers.new_zeros(batch + 1))
        return self._homes[batch]


def bucket_of(rows: int) -> int:
    """The smallest that holds so many rows."""
    return next(size for size in BUCKETS if rows <= size)
