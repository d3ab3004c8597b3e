"""The K/V cache: one pool of pages for all layers, and a length for every (layer, sequence).

After a visual-token exit the layers hold different numbers of rows, so nothing here assumes one length
per sequence. A layer takes pages when the prompt reaches it and not before; what `bytes_held` reports is
what sequences hold of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import DecoderShape
from ..errors import CacheError
from ..kernels import ops
from ..kernels.transfer import to_device, upload


class PagePool:
    """K and V pages `[n_pages + 1, page_size, Hkv, D]`, shared by all layers and sequences of one engine.

    The last one, `spare`, is never given to anybody: rows that fill up a batch of fixed size write there.
    """

    def __init__(self, shape: DecoderShape, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        size = (n_pages + 1, page_size, shape.num_kv_heads, shape.head_dim)
        self.k = torch.empty(size, dtype=dtype, device=device)
        self.v = torch.empty(size, dtype=dtype, device=device)
        self.page_size = page_size
        self.page_bytes = 2 * self.k[0].nbytes
        self.allocator = ops.PageAllocator(n_pages)
        self.spare = n_pages

    def take(self, n: int) -> list[int]:
        """n page numbers, all or none. Raises CacheError when fewer are free."""
        free = self.allocator.free_count
        if n > free:
            raise CacheError(f"the K/V pool is out of pages: {n} asked, {free} free; raise max_batch or max_len")
        return self.allocator.alloc(n)

    @property
    def bytes_held(self) -> int:
        """Bytes of the pages that sequences hold now."""
        return self.allocator.used_count * self.page_bytes


class KVCache:
    """Pages, lengths and next positions of one running batch.

    On the device, and replaced as a whole by `select` or by whoever moves them (`decode.DecodeGraphs`):
        block_table: int32 [L, B, M], the pages of each layer's sequences.
        lens: int32 [L, B], rows in use; `host_lens`, a numpy array, mirrors it.
        positions: int32 [L, B], where the next token stands in each layer: alike, unless a policy renumbered.
    """

    def __init__(self, pool: PagePool, num_layers: int, batch: int, max_len: int):
        self.pool = pool
        device = pool.k.device
        self._host_table = np.zeros((num_layers, batch, -(-max_len // pool.page_size)), dtype=np.int32)
        self.block_table = torch.zeros(self._host_table.shape, dtype=torch.int32, device=device)
        self.lens = torch.zeros(num_layers, batch, dtype=torch.int32, device=device)
        self.positions = torch.zeros_like(self.lens)
        self.host_lens = np.zeros((num_layers, batch), dtype=np.int64)
        self._pages: list[list[list[int]]] = [[[] for _ in range(batch)] for _ in range(num_layers)]

    def reserve(self, layers: range, rows: Sequence[int]) -> None:
        """Take pages so that sequence b of these layers can hold `rows[b]` rows; one small copy to the device.

        Raises:
            CacheError: the pool is out of pages.
        """
        for layer in layers:
            self._take(layer, rows)
        part = slice(layers.start, layers.stop)
        upload(self.block_table[part], torch.from_numpy(self._host_table[part]))

    def _take(self, layer: int, rows: Sequence[int]) -> None:
        for held, table, n in zip(self._pages[layer], self._host_table[layer], rows, strict=True):
            missing = -(-n // self.pool.page_size) - len(held)
            if missing > 0:
                new = self.pool.take(missing)
                table[len(held) : len(held) + missing] = new
                held += new

    def set_lens(self, rows: Sequence[Tensor], host_rows: Sequence[Sequence[int]]) -> None:
        """Every layer now holds as many rows as its int32 [B] in `rows` says (the same numbers in `host_rows`)."""
        torch.stack(list(rows), out=self.lens)
        self.host_lens[:] = host_rows

    def reserve_next(self) -> None:
        """Room for one more row everywhere; touches the device only when a page is full."""
        full = (self.host_lens % self.pool.page_size == 0).any(axis=1).nonzero()[0].tolist()
        for layer in full:
            self._take(layer, (self.host_lens[layer] + 1).tolist())
        if full:
            upload(self.block_table, torch.from_numpy(self._host_table))

    def compact(self, layers: int, keep: Tensor, keep_cu: Tensor, kept: list[list[int]]) -> None:
        """Keep the listed rows of layers 0..layers-1 (arguments as `ops.kv_compact_`), give emptied pages back."""
        ops.kv_compact_(self.pool.k, self.pool.v, self.block_table[:layers], self.lens[:layers], keep, keep_cu)
        for layer, row in enumerate(kept):
            self.host_lens[layer] = row
            for b, n in enumerate(row):
                held = self._pages[layer][b]
                used = -(-n // self.pool.page_size)
                self.pool.allocator.free(held[used:])
                del held[used:]

    def select(self, keep: Sequence[int]) -> None:
        """Go on with the sequences listed, in that order; the others give their pages back."""
        gone = set(range(self.lens.shape[1])) - set(keep)
        for layer, pages in enumerate(self._pages):
            for b in gone:
                self.pool.allocator.free(pages[b])
            self._pages[layer] = [pages[b] for b in keep]
        index = to_device(list(keep), self.lens.device, torch.int64)
        self.host_lens = self.host_lens[:, list(keep)]
        self._host_table = self._host_table[:, list(keep)]
        self.block_table = self.block_table.index_select(1, index)
        self.lens = self.lens.index_select(1, index)
        self.positions = self.positions.index_select(1, index)

    @property
    def longest(self) -> int:
        """Rows of the longest sequence in any layer."""
        return int(self.host_lens.max(initial=0))

    @property
    def bytes_held(self) -> int:
        """Bytes of the pages this batch holds."""
        return sum(len(p) for layer in self._pages for p in layer) * self.pool.page_bytes

    def bytes_of(self, sequence: int) -> int:
        """Bytes of the pages one sequence holds over all layers."""
        return sum(len(layer[sequence]) for layer in self._pages) * self.pool.page_bytes

    def close(self) -> None:
        """Give every page back."""
        self.select([])
