"""The K/V cache: one pool of pages for all layers, and a length for every (layer, sequence).

After a visual-token exit the layers hold different numbers of rows, so nothing here assumes one length
per sequence. Whoever will need pages claims them first: claims never exceed the pool, so a sequence within its claim
always gets its pages. Sequences that begin alike read the same pages (`SharedPages`), which are full, and which nobody
writes any more.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..config import DecoderShape
from ..errors import CacheError, first_line
from ..kernels import ops
from ..kernels.transfer import copy_into, to_device


class PagePool:
    """K and V pages `[n_pages + 1, page_size, Hkv, D]`, shared by all layers and sequences of one engine.

    The last one, `spare`, is never given to anybody: rows that fill up a batch of fixed size write there.
    """

    def __init__(self, shape: DecoderShape, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        size = (n_pages + 1, page_size, shape.num_kv_heads, shape.head_dim)
        try:
            self.k, self.v = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        except RuntimeError as e:
            asked = f"{2 * math.prod(size) * dtype.itemsize:,} bytes ({n_pages} pages of {page_size} rows)"
            raise CacheError(
                f"the K/V pool of {asked} cannot be had: {first_line(e)}; lower max_batch or max_len"
            ) from e
        self.num_layers, self.page_size = shape.num_layers, page_size
        self.page_bytes = 2 * self.k[0].nbytes
        self.allocator = ops.PageAllocator(n_pages)
        self.n_pages = self.spare = n_pages
        self.claimed = 0  # pages that somebody holds or may still take
        self.idle = 0  # further ones, shared pages that no sequence reads
        self.reclaim: Callable[[int], object] = lambda pages: None  # makes idle ones leave: so many at least
        self.released: Callable[[], object] = lambda: None  # called when sequences left
        self.lock = threading.RLock()  # of both: a cache that nobody closed gives up when it is collected

    def pages(self, rows: int) -> int:
        """Pages that so many rows fill in one layer."""
        return -(-rows // self.page_size)

    def claim(self, n: int) -> None:
        """Make sure of n more pages (fewer, if negative). Raises CacheError when they are not to be had."""
        with self.lock:
            if n > self.claimable:
                free = f"{n} pages asked, {self.claimable} not spoken for"
                raise CacheError(f"the K/V pool is out of pages: {free}; raise kv_memory, max_batch or max_len")
            short = n + self.idle - self.claimable
            if short > 0:
                self.reclaim(short)
            self.claimed += n

    def recount(self, held: Sequence[int], claimed: int, idle: int) -> None:
        """These pages are held, so many of them idle, so many are claimed, and all others are free."""
        allocator = ops.PageAllocator(self.n_pages)
        allocator.free(sorted(set(allocator.alloc(self.n_pages)) - set(held)))
        with self.lock:
            self.allocator, self.claimed, self.idle = allocator, claimed, idle

    @property
    def claimable(self) -> int:
        """Pages that nobody has claimed, or that leave when somebody does."""
        return self.n_pages - self.claimed

    @property
    def bytes_held(self) -> int:
        """Bytes of the pages that are read now: by sequences, each once."""
        return (self.allocator.used_count - self.idle) * self.page_bytes


class SharedPages:
    """Full pages that several sequences begin with, in each layer; `numbers[l]`, in order, are claimed by this object.

    They stay until nobody reads them and whoever keeps them has given them up (`discard`).
    """

    def __init__(self, pool: PagePool):
        self._pool, self.numbers = pool, [list[int]() for _ in range(pool.num_layers)]
        self.users, self.kept = 0, True

    @property
    def count(self) -> int:
        """Pages over all layers."""
        return sum(map(len, self.numbers))

    def acquire(self) -> None:
        """One more sequence reads them, or will."""
        with self._pool.lock:
            self.users += 1
            if self.users == 1:
                self._wake(self.count)

    def release(self) -> None:
        """One fewer."""
        with self._pool.lock:
            self.users -= 1
            if self.users == 0:
                self._wake(-self.count)
            self._leave()

    def discard(self) -> None:
        """Nobody else will begin with them: they leave now, or with the last that reads them."""
        with self._pool.lock:
            self.kept = False
            self._leave()

    def _leave(self) -> None:
        if self.users or self.kept:
            return
        pages = [page for numbers in self.numbers for page in numbers]
        self.numbers = [[] for _ in self.numbers]
        self._pool.allocator.free(pages)
        self._pool.idle -= len(pages)

    def _wake(self, pages: int) -> None:
        """So many are no longer idle but claimed."""
        self._pool.idle -= pages
        self._pool.claimed += pages


class KVCache:
    """Pages, lengths and next positions of sequences in numbered slots; the first `count` of them are in use.

    On the device, and replaced as a whole by whoever moves them (`decode.DecodeGraphs`):
        block_table: int32 [L, S, M], the pages of each layer's sequences.
        lens: int32 [L, S], rows in use; `host_lens`, a numpy array, mirrors it.
        positions: int32 [L, S], the next token's position in each layer: alike, unless a policy renumbered.
    A slot that is not in use holds no rows, and its pages are the spare one.
    """

    def __init__(self, pool: PagePool, slots: int, max_len: int, count: int = 0):
        self.pool, self.count = pool, count
        layers = pool.num_layers
        self._host_table = np.full((layers, slots, pool.pages(max_len)), pool.spare, dtype=np.int32)
        self._held = np.zeros((layers, slots), dtype=np.int64)  # pages
        self._shared = np.zeros((layers, slots), dtype=np.int64)  # the first of these, which are not its own
        self._host_lens, self._grown = np.zeros((layers, slots), dtype=np.int64), 0
        self._room = 0  # rows that every sequence surely has pages for, in all layers
        self.claims = [0] * count
        self.leases: list[SharedPages | None] = [None] * count  # what their first pages are of
        self.given_up: set[int] = set()

    # Made at first use: a request's cache is there before its picture is on the way to the device.

    @cached_property
    def block_table(self) -> Tensor:
        return torch.full(self._host_table.shape, self.pool.spare, dtype=torch.int32, device=self.pool.k.device)

    @cached_property
    def lens(self) -> Tensor:
        return torch.zeros(self.host_lens.shape, dtype=torch.int32, device=self.pool.k.device)

    @cached_property
    def positions(self) -> Tensor:
        return torch.zeros_like(self.lens)

    @property
    def host_lens(self) -> np.ndarray:
        """int64 [L, S]"""
        self._count_rows()
        return self._host_lens

    def _count_rows(self) -> None:
        """Before `count` changes: these sequences have grown, and no others."""
        if self._grown:
            self._host_lens[:, : self.count] += self._grown
            self._grown = 0

    def grew(self) -> None:
        """Every sequence has one more row in every layer; `host_lens` says so when somebody looks."""
        self._grown += 1

    @property
    def slots(self) -> int:
        return self._host_lens.shape[1]

    def claim(self, sequence: int, pages: int) -> None:
        """The sequence may hold so many pages from here on, at least those that it holds now.

        Raises:
            CacheError: the pool has no such pages.
        """
        self.pool.claim(pages - self.claims[sequence])
        self.claims[sequence] = pages

    def lease(self, sequence: int, shared: SharedPages) -> None:
        """The sequence begins with what is in these pages (`share`), until it leaves."""
        shared.acquire()
        self.leases[sequence] = shared

    def share(self, layers: range, sequence: int, pages: np.ndarray) -> None:
        """It has no page in these layers; its first ones are somebody else's: int [layers, n]."""
        n = pages.shape[1]
        if n == 0 or sequence in self.given_up:
            return
        place = slice(layers.start, layers.stop), sequence
        self._host_table[place][:, :n] = pages
        self._held[place] = self._shared[place] = n
        numbers = torch.from_numpy(np.ascontiguousarray(pages, dtype=np.int32))
        copy_into(self.block_table[place][:, :n], numbers)

    def donate(self, layer: int, sequence: int, n: int) -> None:
        """Its first n pages of this layer, which are full, belong to its lease from here on."""
        lease, shared = self.leases[sequence], int(self._shared[layer, sequence])
        if lease is None or n <= shared:
            return
        lease.numbers[layer] += self._host_table[layer, sequence, shared:n].tolist()
        self._shared[layer, sequence] = n
        self.claims[sequence] -= n - shared

    def pages_of(self, layers: range, sequence: int, first: int, end: int) -> np.ndarray:
        """int32 [layers, end - first], numbers of its pages from `first` on."""
        return self._host_table[layers.start : layers.stop, sequence, first:end]

    def reserve(self, layers: range, rows: Sequence[int]) -> None:
        """Take pages so that sequence b of these layers can hold `rows[b]` rows; one small copy to the device.

        Raises:
            CacheError: beyond what was claimed, and the pool is out of pages.
        """
        self._take(layers, self._missing(layers, np.array([rows] * len(layers))))

    def reserve_claimed(self, layers: range, rows: np.ndarray) -> bool:
        """As `reserve`, of int [layers, B] rows, if that is within what was claimed. Returns whether it is."""
        missing = self._missing(layers, rows)
        for b, n in enumerate(missing.sum(axis=0).tolist()):
            if self.held(b) + n > self.claims[b]:
                return False
        self._take(layers, missing)
        return True

    def trim(self, layers: range, rows: Sequence[int]) -> None:
        """Give back what these layers have beyond `rows[b]` rows of sequence b."""
        for b, n in enumerate(rows):
            self._free(b, layers, 0 if b in self.given_up else self.pool.pages(n))

    def _missing(self, layers: range, rows: np.ndarray) -> np.ndarray:
        """int64 [layers, B], pages that each sequence needs more for so many rows."""
        wanted = -(-rows // self.pool.page_size)
        wanted[:, list(self.given_up)] = 0
        return (wanted - self._held[layers.start : layers.stop, : wanted.shape[1]]).clip(0)

    def reserve_next(self) -> None:
        """Room for one more row everywhere; touches the device only when a page is full."""
        if self._room == 0:
            held, size = self._held[:, : self.count], self.pool.page_size
            room = held * size - self.host_lens[:, : self.count]
            full = room == 0
            if full.any():
                self._take(range(len(full)), full.astype(np.int64))
            self._room = int(np.where(full, size, room).min(initial=size))
        self._room -= 1

    def _take(self, layers: range, missing: np.ndarray) -> None:
        """missing: int64 [layers, B], pages that each of the first B sequences takes in these layers."""
        table, most = self._host_table[layers.start : layers.stop], self._host_table.shape[2]
        held = self._held[layers.start : layers.stop, : missing.shape[1]]
        after = held + missing
        if after.max(initial=0) > most:
            raise CacheError(f"a sequence has more than the {most * self.pool.page_size} rows of its {most} pages")
        counts, own = missing.sum(axis=0), (self._held - self._shared).sum(axis=0)
        for b in counts.nonzero()[0].tolist():
            if own[b] + counts[b] > self.claims[b]:
                self.claim(b, int(own[b] + counts[b]))
        places = np.arange(most)
        new = (places >= held[..., None]) & (places < after[..., None])
        table[:, : len(counts)][new] = self.pool.allocator.alloc(int(counts.sum()))
        held[:] = after
        copy_into(self.block_table[layers.start : layers.stop], torch.from_numpy(table))

    def set_lens(self, rows: Sequence[Sequence[int]], next_positions: Tensor) -> None:
        """Layer l now holds `rows[l][b]` rows of sequence b. next_positions: int32 [L, B]."""
        self._room = 0
        self.host_lens[:] = rows
        copy_into(self.lens, torch.from_numpy(self.host_lens.astype(np.int32)))
        self.positions.copy_(next_positions)

    def compact(self, layers: int, keep: Tensor, keep_cu: Tensor, kept: Sequence[int]) -> None:
        """Keep the listed rows of layers 0..layers-1 (arguments as `ops.kv_compact_`), `kept[b]` of each sequence.

        Emptied pages go back.
        """
        ops.kv_compact_(self.pool.k, self.pool.v, self.block_table[:layers], self.lens[:layers], keep, keep_cu)
        self.host_lens[:layers] = kept
        self.trim(range(layers), kept)

    def _free(self, sequence: int, layers: range, keep: int = 0) -> None:
        """These layers give back all but `keep` pages of the sequence."""
        self._room = 0
        these = slice(layers.start, layers.stop), sequence
        held, shared, pages = self._held[these], self._shared[these], self._host_table[these]
        places = np.arange(pages.shape[1])
        own = (places >= np.maximum(shared, keep)[:, None]) & (places < held[:, None])
        self.pool.allocator.free(pages[own].tolist())
        np.minimum(held, keep, out=held)
        np.minimum(shared, keep, out=shared)

    def _leave(self, sequence: int) -> None:
        """It gives back all it has."""
        self._free(sequence, range(len(self._held)))
        self.claim(sequence, 0)
        lease, self.leases[sequence] = self.leases[sequence], None
        if lease is not None:
            lease.release()

    def give_up(self, sequence: int) -> None:
        """Free a sequence of a prefill that is under way: its rows are still computed, into the spare page."""
        self._leave(sequence)
        self.given_up.add(sequence)
        self._host_table[:, sequence] = self.pool.spare
        self.block_table[:, sequence].fill_(self.pool.spare)

    def join(self, other: KVCache) -> None:
        """Take over the sequences of `other`, which is empty afterwards. There must be slots for them."""
        self._count_rows()
        self._room = 0
        new, theirs = slice(self.count, self.count + other.count), slice(other.count)
        for name in ("_host_table", "_held", "_shared", "host_lens"):
            getattr(self, name)[:, new] = getattr(other, name)[:, theirs]
        for name in ("block_table", "lens", "positions"):
            getattr(self, name)[:, new].copy_(getattr(other, name)[:, theirs])
        self.claims += other.claims
        self.leases += other.leases
        self.count = new.stop
        other.claims, other.leases, other.count = [], [], 0
        other._held[:] = other._shared[:] = 0

    def select(self, keep: Sequence[int]) -> None:
        """Continue with the sequences listed, each once, in that order; the others give their pages back."""
        left = set(range(self.count)) - set(keep)
        for b in left:
            self._leave(b)
        if left:
            self.pool.released()
        self._count_rows()
        before, order = self.count, list(keep)
        self.count = now = len(order)
        self.claims = [self.claims[b] for b in order]
        self.leases = [self.leases[b] for b in order]
        self.given_up = {new for new, b in enumerate(order) if b in self.given_up}
        first = next((new for new, b in enumerate(order) if new != b), now)  # the others are in their places
        moved, index = order[first:], None
        if moved:
            index = to_device(moved, self.lens.device, torch.int64)
        for name, empty in (("_host_table", self.pool.spare), ("_held", 0), ("_shared", 0), ("host_lens", 0)):
            state = getattr(self, name)
            state[:, first:now] = state[:, moved]
            state[:, now:before] = empty
        for name, empty in (("block_table", self.pool.spare), ("lens", 0), ("positions", 0)):
            state = getattr(self, name)
            if index is not None:
                state[:, first:now] = state.index_select(1, index)
            if now < before:
                state[:, now:before].fill_(empty)

    @property
    def longest(self) -> int:
        """Rows of the longest sequence in any layer."""
        return int(self.host_lens.max(initial=0))

    def held(self, sequence: int) -> int:
        """Pages of its own that one sequence holds over all layers."""
        return int(self._held[:, sequence].sum()) - self.shared(sequence)

    def shared(self, sequence: int) -> int:
        """Pages over all layers that it reads and others may read."""
        return int(self._shared[:, sequence].sum())

    @property
    def bytes_held(self) -> int:
        """Bytes of the pages that are these sequences' own."""
        return int((self._held - self._shared).sum()) * self.pool.page_bytes

    def bytes_of(self, sequence: int) -> int:
        """Bytes of the pages one sequence reads over all layers, its own and shared ones."""
        return int(self._held[:, sequence].sum()) * self.pool.page_bytes

    def pages_held(self) -> list[int]:
        """The numbers of those that are their own, each as often as it is held."""
        if not self._held.any():
            return []
        places = np.arange(self._host_table.shape[2])
        return self._host_table[(places >= self._shared[..., None]) & (places < self._held[..., None])].tolist()

    def close(self) -> None:
        """Give every page back."""
        self.select([])

    def forget(self) -> None:
        """Be empty without giving anything back: whoever calls this counts anew (`Runner.forget`)."""
        self.count, self.claims, self.leases, self._room, self._grown = 0, [], [], 0, 0
        self.given_up.clear()
        self._held[:] = self._shared[:] = 0

    def __del__(self) -> None:
        for b in range(len(getattr(self, "leases", ()))):
            self._leave(b)
