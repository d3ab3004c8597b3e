"""Sequences that have been prefilled and are now decoded together; they join and leave at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checks import is_whole
from ..errors import CacheError, InvalidArgumentError
from ..kernels.transfer import DeviceLock, read_later, to_device
from ..models.decoder import Decoder
from ..models.fused import FusedLayers
from .decode import DecodeGraphs, decode_step
from .kv_cache import KVCache
from .prefill import Prefilled


class Running:
    """A prefilled batch that can be stepped; `logits` f32 [B, vocab] are those of the next token.

    A call that is interrupted (Ctrl+C) may have done half of its work: all sequences end with it.

    Attributes:
        exit_layers, rows: of the prompts it began with, in their order, as in `Prefilled`.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        prefilled: Prefilled | None,
        graphs: DecodeGraphs | None = None,
        lock: DeviceLock | None = None,
        fused: FusedLayers | None = None,
        forget: Callable[..., object] = lambda *caches: None,
    ):
        """forget: counts the pages anew without those of some caches, which are empty from then on."""
        self._forget = forget
        self.decoder, self.cache, self._graphs, self._fused = decoder, cache, graphs, fused
        self._lock = lock or DeviceLock(cache.lens.device)
        self.exit_layers = [] if prefilled is None else prefilled.exit_layers
        self.rows = [] if prefilled is None else prefilled.rows
        self._room = 0  # steps that surely fit into the tables of rotations and pages
        if prefilled is None:
            self.logits = torch.empty(0, decoder.shape.vocab_size, device=cache.lens.device)
        else:
            self.logits = prefilled.logits

    def __len__(self) -> int:
        return self.cache.count

    @property
    def positions(self) -> Tensor:
        """int32 [B], the next token's position in the first layer; in all layers, unless a policy renumbered."""
        return self.cache.positions[0, : self.cache.count]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append one token to every sequence; returns (and keeps) the next logits.

        tokens: B numbers, or int64 [B] on the device: then nothing waits for the device.

        Raises:
            InvalidArgumentError: not one token id for each sequence.
            CacheError: the pool is out of pages, or a sequence has reached `max_len`.
        """
        with self._whole():
            checked = self._checked(tokens)
            if self._room == 0:
                self._room = self._measured_room()
            self.feed(checked)
            self._room -= 1
            return self.logits

    def _measured_room(self) -> int:
        """Steps until the first sequence reaches `max_len`, in rows or in positions. Waits, by an event, for them."""
        used, most = max(self.cache.longest, *read_later(self.positions)()), self.decoder.max_len
        if used >= most:
            raise CacheError(f"a sequence has {used} rows or positions; accepted: one more up to max_len {most}")
        return most - used

    def feed(self, tokens: Tensor) -> None:
        """As `step`, of tokens int64 [B] on the device that are known to be right, by who holds the lock."""
        cache = self.cache
        cache.reserve_next()
        logits = None if self._graphs is None else self._graphs.step(cache, tokens)
        if logits is None:
            n = cache.count
            table, lens, positions = cache.block_table[:, :n], cache.lens[:, :n], cache.positions[:, :n]
            logits = decode_step(self.decoder, cache.pool, tokens, positions, table, lens, self._fused)
            lens += 1
            positions += 1
        cache.grew()
        self.logits = logits

    def _checked(self, tokens: Sequence[int] | Tensor) -> Tensor:
        count, vocab, device = self.cache.count, self.decoder.shape.vocab_size, self.cache.lens.device
        if isinstance(tokens, Tensor):
            right = count > 0 and tokens.dtype == torch.int64 and tokens.shape == (count,)
            # What is on the device already is taken as it is: to look at it would be to wait for it.
            if right and (tokens.is_cuda or (int(tokens.min()) >= 0 and int(tokens.max()) < vocab)):
                return to_device(tokens, device, torch.int64)
        elif (numbers := _numbers(tokens, vocab)) and len(numbers) == count:
            return to_device(numbers, device, torch.int64)
        accepted = f"one token id (0 to {vocab - 1}) for each of {count} sequences"
        raise InvalidArgumentError(f"tokens is {tokens!r}; accepted: {accepted}")

    @torch.inference_mode()
    def join(self, cache: KVCache, logits: Tensor) -> None:
        """Prefilled sequences come in at the end: their cache, empty afterwards, and their logits f32 [B, vocab].

        Raises:
            InvalidArgumentError: there are not so many free slots, or they are of another engine, or these here.
        """
        with self._whole(cache):
            if cache is self.cache or cache.pool is not self.cache.pool:
                raise InvalidArgumentError(
                    "cache is of another engine, or this batch's own; accepted: one of this pool"
                )
            if cache.count > self.cache.slots - self.cache.count:
                given = f"{cache.count} sequences join {self.cache.count}"
                raise InvalidArgumentError(f"{given}; accepted: together at most {self.cache.slots}")
            logits = torch.cat((self.logits, logits)) if len(self) else logits
            self.cache.join(cache)
            self.logits, self._room = logits, 0

    @torch.inference_mode()
    def select(self, keep: Sequence[int]) -> None:
        """Continue with the sequences listed, in that order; the others give their memory back.

        Raises:
            InvalidArgumentError: a number that is none of a sequence, or comes twice.
        """
        with self._whole():
            count = self.cache.count
            numbers = _numbers(keep, count)
            if numbers is None or len(set(numbers)) < len(numbers):
                raise InvalidArgumentError(f"keep is {keep!r}; accepted: numbers from 0 to {count - 1}, each once")
            self.cache.select(numbers)
            self.logits = picked(self.logits, numbers)

    @torch.inference_mode()
    def close(self) -> None:
        """Give all memory of the cache back."""
        with self._whole():
            self.cache.close()

    @contextmanager
    def _whole(self, *others: KVCache) -> Iterator[None]:
        """With the lock; after an interrupt nobody is left here or in the others, since nobody knows what was done."""
        with self._lock:
            try:
                yield
            except Exception:
                raise
            except BaseException:
                self._forget(self.cache, *others)
                self.logits = self.logits[:0]
                raise

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def picked(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """A copy of the rows with these numbers; for none of them nothing goes to the device."""
    return rows[to_device(numbers, rows.device, torch.int64)] if numbers else rows[:0].clone()


def _numbers(given: object, end: int) -> list[int] | None:
    """The whole numbers of a sequence, none below 0 or from `end` on; None where it is something else."""
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes, bytearray, memoryview)):
        return None
    return [int(n) for n in given] if all(is_whole(n) and 0 <= n < end for n in given) else None
