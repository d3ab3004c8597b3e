"""Prefixes of prompts, up to the last visual token, each as deep as somebody has needed (docs/again.md).

Visual tokens come before the question, so what they are in layer k does not depend on it, nor on the exit: an exit only
says how deep they are computed. Their K and V are pages of the pool, which those who ask again read.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..policies import Composed, VisualTokenPolicy
from .kv_cache import PagePool, SharedPages

HEAD, REST = 0, 1
"""The parts of a prefix: its text before the first visual token, which no exit touches, and all that follows."""


def acts_after(policy: VisualTokenPolicy, layers: int) -> int | None:
    """Up to this layer visual tokens are the same under the policy as without it; -1: before the first.

    None: until all of a sequence leave at once, by a decision that reads no more of them than their pooled states.
    """
    first = min(policy.layers(layers) - {layers - 1}, default=None)
    together = policy.all_or_none
    if isinstance(policy, Composed):
        together = all(acts_after(part, layers) is None for part in policy.parts)
    return None if together and first != -1 else first


@dataclass(frozen=True, eq=False)
class Mark:
    """For policies that look at it: all rows of a prefix behind a layer, [n, d], and the queries there, [n, Hq, D]."""

    hidden: Tensor
    queries: Tensor


class Prefix:
    """What is known of one prefix of n rows.

    Attributes:
        visual, between: int64, the numbers of its visual and its text rows among those of the second part.
        ends: of each part, the rows up to its end.
        depth: of each part, the last layer it has passed; -1 before the first.
        hidden: of each part the residual stream [rows, d] after that layer; None before the first and after the last.
        pages: of K and V, those that are full. tails: [2, L, m, Hkv, D], K and V of the rows behind them, for the
            first part and for both; valid in the layers that have been passed.
        texts: [rows, d], the residual stream of `between`, if there are some, after each layer that the second part has
            passed.
        pooled: [2, d] there, two rows that have the mean and the last row of its visual rows.
        marks: by layers.
    """

    def __init__(self, visual: Tensor, pool: PagePool):
        """visual: bool [n], on the host, its last true."""
        first, device = int(visual.nonzero()[0]), pool.k.device
        self.ends = first, len(visual)
        self.visual, self.between = (mask.nonzero()[:, 0].to(device) for mask in (visual[first:], ~visual[first:]))
        self.depth = [-1, -1] if first else [pool.num_layers - 1, -1]
        self.hidden: list[Tensor | None] = [None, None]
        self.pages, self._pool = SharedPages(pool), pool
        self.tails = [
            pool.k.new_empty(2, pool.num_layers, end % pool.page_size, *pool.k.shape[2:]) for end in self.ends
        ]
        self.texts: list[Tensor] = []
        self.pooled: list[Tensor] = []
        self.marks: dict[int, Mark] = {}
        self.counted = 0  # its bytes as the store counts them

    def __len__(self) -> int:
        return self.ends[REST]

    @property
    def nbytes(self) -> int:
        tensors = [*self.tails, *self.texts, *self.pooled, *(t for t in self.hidden if t is not None)]
        tensors += [t for mark in self.marks.values() for t in (mark.hidden, mark.queries)]
        return self.pages.count * self._pool.page_bytes + sum(t.nbytes for t in tensors)

    def known(self, part: int, layer: int) -> int:
        """How many of the rows up to the end of this part have K and V in the layer."""
        if self.depth[HEAD] < layer:
            return 0
        return self.ends[REST if part == REST and self.depth[REST] >= layer else HEAD]

    def full_pages(self, layers: range, rows: int) -> np.ndarray:
        """int [layers, n], those of its first rows."""
        n = rows // self._pool.page_size
        return np.array([self.pages.numbers[layer][:n] for layer in layers], dtype=np.int32).reshape(len(layers), n)

    def own_pages(self, rows: int, stop: int | None) -> int:
        """Pages that a sequence of so many rows in all, which begins with this, holds at most, without the shared ones.

        stop: behind this layer all its rows are its own.
        """
        pages, page, layers = self._pool.pages, self._pool.page_size, self._pool.num_layers
        head, both = (min(depth, layers - 1 if stop is None else stop) + 1 for depth in self.depth)
        seen = pages(rows) - len(self) // page
        gone = pages(rows - len(self.visual)) - self.ends[HEAD] // page  # at times one more: its rows fill other pages
        behind_head = pages(rows) - self.ends[HEAD] // page
        return both * max(seen, gone) + (head - both) * behind_head + (layers - head) * pages(rows)

    def own_rows(self, rows: int, stop: int | None) -> int:
        """Of a prompt of so many rows, those that a layer computes at most; `stop` as there."""
        whole = stop is None and self.depth[REST] == self._pool.num_layers - 1
        return rows - len(self) + len(self.between) if whole else rows

    def marked(self, layer: int) -> bool:
        """Whether it has a mark there, or is going to have one when it has been computed so far."""
        return layer in self.marks or all(depth < layer for depth, n in zip(self.depth, self.ends, strict=True) if n)

    def passed(self, layer: int, part: int, hidden: Tensor | None) -> None:
        """A part has passed this layer. hidden: [rows, d] of the second leaving it, to be read, not kept; None: nobody
        will ask for them."""
        self.depth[part] = layer
        if hidden is None:
            return
        visual = hidden[self.visual] if len(self.between) else hidden
        last = visual[-1].float()
        mean = visual.mean(0, dtype=torch.float32)
        self.pooled.append(torch.stack((torch.lerp(last, mean, 2.0), last)).to(hidden.dtype))
        if len(self.between):
            self.texts.append(hidden[self.between])


class PrefixStore:
    """Prefixes by what they hold, at most `budget` bytes of them apart from those in use; the latest used stay.

    A prefix is in use while a sequence reads its pages (`KVCache.lease`). The caller holds the device's lock.
    """

    def __init__(self, budget: int, pool: PagePool):
        self.budget, self._pool = budget, pool
        self.bytes_held = 0
        self.busy: dict[Prefix, None] = {}  # those that are being changed, and may be half done
        self._entries: OrderedDict[Hashable, Prefix] = OrderedDict()
        pool.reclaim, pool.released = _weakly(self._make_room), _weakly(self.trim)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._entries.values())

    def get(self, key: bytes, stop: int | None) -> Prefix | None:
        """The prefix of this key, if there is one.

        stop: a layer where somebody wants a mark; one that has gone further without is left to others.
        """
        for name in (key, (key, stop)):
            prefix = self._entries.get(name)
            if prefix is not None and (stop is None or prefix.marked(stop)):
                self._entries.move_to_end(name)
                return prefix
        return None

    def find(self, key: bytes, visual: Tensor, stop: int | None) -> Prefix:
        """As `get`, or a new one."""
        known = self.get(key, stop)
        if known is not None:
            return known
        new = self._entries[(key, stop) if key in self._entries else key] = Prefix(visual, self._pool)
        return new

    def settle(self, prefixes: Sequence[Prefix], whole: bool) -> None:
        """They were changed (see `busy`). Not `whole`: a layer failed half-way, so nobody finds them again."""
        for prefix in dict.fromkeys(prefixes):
            self.busy.pop(prefix, None)
            if not whole:
                self.forget(prefix)
            elif prefix.pages.kept:
                self.bytes_held -= prefix.counted
                prefix.counted = prefix.nbytes
                self.bytes_held += prefix.counted
        self.trim()

    def trim(self) -> None:
        """As many leave as are too much: the least recently used, and none in use."""
        if self.bytes_held > self.budget:
            self._drop_idle(lambda: self.bytes_held <= self.budget)

    def forget(self, *prefixes: Prefix) -> None:
        """Nobody finds these again."""
        for key in [k for k, p in self._entries.items() if p in prefixes]:
            self._drop(key)

    def clear(self) -> None:
        """Nobody finds any of these again; those in use leave with whoever uses them."""
        self.forget(*self)

    @property
    def pages(self) -> list[SharedPages]:
        """Of all of them."""
        return [prefix.pages for prefix in self]

    def _make_room(self, pages: int) -> None:
        """So many pages at least leave, of those that nobody uses."""
        idle = self._pool.idle - pages
        self._drop_idle(lambda: self._pool.idle <= idle)

    def _drop_idle(self, enough: Callable[[], bool]) -> None:
        for key in [k for k, p in self._entries.items() if not p.pages.users]:
            if enough():
                break
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        prefix = self._entries.pop(key)
        self.bytes_held -= prefix.counted
        prefix.pages.discard()


def key_of(ids: Sequence[int], pictures: bytes) -> bytes:
    """Of a prefix: its token ids and what its pictures are known by (`picture_cache`)."""
    return hashlib.sha256(f"{len(ids)} ".encode() + np.asarray(ids, dtype=np.int64).tobytes() + pictures).digest()


def _weakly(method: Callable[..., object]) -> Callable[..., object]:
    """Calls it while its object lives: in a circle the pool would stay until Python collects its garbage."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> object:
        alive = reference()
        return None if alive is None else alive(*args)

    return call
