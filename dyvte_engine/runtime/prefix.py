"""Prefixes of prompts, up to the last visual token, each as deep as somebody has needed (docs/again.md).

Visual tokens come before the question, so what they are in layer k does not depend on it, nor on the exit: an exit only
says how deep they are computed. Entries have memory of their own, apart from the K/V pool.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..policies import DynamicExit, FixedExit, KeepAll, VisualTokenPolicy

HEAD, REST = 0, 1
"""The parts of a prefix: its text before the first visual token, which no exit touches, and all that follows."""


def shares(policy: VisualTokenPolicy) -> bool:
    """Whether visual tokens are the same under it as without it until all of a sequence leave at once."""
    if type(policy) is DynamicExit:
        return policy.keep == 0
    return type(policy) is KeepAll or (type(policy) is FixedExit and policy.layer >= 0)


class Prefix:
    """What is known of one prefix of n rows.

    Attributes:
        visual, between: int64, the numbers of its visual and its text rows among those of the second part.
        depth: of each part, the last layer it has passed; -1 before the first.
        hidden: of each part the residual stream [rows, d] after that layer; None before the first and after the last.
        kv: K and V [m, Hkv, D] in each layer, m the rows of the parts that have passed it; None where none has.
        texts: [rows, d], the residual stream of `between` after each layer that the second part has passed.
        pooled: [2, d] there, two rows that have the mean and the last row of its visual rows.
    """

    def __init__(self, visual: Tensor, layers: int, device: torch.device):
        """visual: bool [n], on the host, its last true."""
        first = int(visual.nonzero()[0])
        self.sizes = first, len(visual) - first
        self.visual, self.between = (mask.nonzero()[:, 0].to(device) for mask in (visual[first:], ~visual[first:]))
        self.depth = [-1, -1] if first else [layers - 1, -1]
        self.hidden: list[Tensor | None] = [None, None]
        self.kv: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.texts: list[Tensor] = []
        self.pooled: list[Tensor] = []
        self.users = self.counted = 0  # who uses it, and its bytes as the store counts them

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        tensors = [t for pair in self.kv if pair is not None for t in pair]
        tensors += [t for t in self.hidden if t is not None]
        return sum(t.nbytes for t in (*tensors, *self.texts, *self.pooled))

    def keys_values(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """[rows, Hkv, D] each, of its first rows."""
        pair = self.kv[layer]
        assert pair is not None and len(pair[0]) >= rows
        return pair[0][:rows], pair[1][:rows]

    def append(self, layer: int, known: int, k: Tensor, v: Tensor) -> None:
        """Copy K and V [n, Hkv, D] of this layer, of the rows behind the first `known`."""
        if len(k) == 0:
            return
        if known == 0:
            self.kv[layer] = k.clone(), v.clone()
        else:
            before_k, before_v = self.keys_values(layer, known)
            self.kv[layer] = torch.cat((before_k, k)), torch.cat((before_v, v))

    def passed(self, layer: int, part: int, hidden: Tensor) -> None:
        """A part has passed this layer; hidden [rows, d] leaves it, and is read, not kept."""
        self.depth[part] = layer
        if part == HEAD:
            return
        visual = hidden[self.visual]
        last = visual[-1:].float()
        self.pooled.append(torch.cat((2 * visual.float().mean(0, keepdim=True) - last, last)).to(hidden.dtype))
        self.texts.append(hidden[self.between])


class PrefixStore:
    """Prefixes by what they hold, at most `budget` bytes of them apart from those in use; the latest used stay.

    The caller holds the device's lock.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.bytes_held = 0  # of what was given back at least once, as it was then
        self._entries: OrderedDict[Hashable, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: Hashable, visual: Tensor, layers: int, device: torch.device) -> Prefix:
        """The prefix of this key, or a new one, for somebody who gives it back."""
        if key not in self._entries:
            self._entries[key] = Prefix(visual, layers, device)
        self._entries.move_to_end(key)
        prefix = self._entries[key]
        prefix.users += 1
        return prefix

    def give_back(self, prefixes: Iterable[Prefix], whole: bool) -> None:
        """They are not used any more by who took them. Not `whole`: a layer failed half-way, so they are forgotten."""
        for prefix in prefixes:
            prefix.users -= 1
            if whole:
                self.bytes_held += prefix.nbytes - prefix.counted
                prefix.counted = prefix.nbytes
            else:
                self._drop([key for key, entry in self._entries.items() if entry is prefix])
        if self.bytes_held > self.budget:
            self._drop(self._too_much())

    def clear(self) -> None:
        """Forget all that nobody uses."""
        self._drop([key for key, prefix in self._entries.items() if not prefix.users])

    def _too_much(self) -> list[Hashable]:
        """The least recently used that must leave; never one in use."""
        out, over = list[Hashable](), self.bytes_held - self.budget
        for key, prefix in self._entries.items():
            if over <= 0:
                break
            if not prefix.users:
                out.append(key)
                over -= prefix.counted
        return out

    def _drop(self, keys: list[Hashable]) -> None:
        for key in keys:
            self.bytes_held -= self._entries.pop(key).counted


def key_of(ids: Sequence[int], pictures: bytes) -> bytes:
    """Of a prefix: its token ids and what its pictures are known by (`picture_cache`)."""
    return hashlib.sha256(f"{len(ids)} ".encode() + np.asarray(ids, dtype=np.int64).tobytes() + pictures).digest()
