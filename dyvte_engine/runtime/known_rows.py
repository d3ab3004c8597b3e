"""Beginnings of prompts that have been there before, or will be asked for again: a prefill computes what is not known.

What a sequence computes itself are the rows behind its prefix. The prefix is computed by the first that needs it deeper
than it is, in pages that are everybody's afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import Lengths, Paged, gather
from ..kernels.transfer import to_device
from ..models.decoder import Decoder
from ..models.rows import Rows
from ..policies import LayerState, VisualTokenPolicy
from .kv_cache import KVCache
from .prefix import HEAD, REST, Mark, Prefix, PrefixStore


@dataclass(frozen=True, eq=False)
class Pack:
    """Packed rows that pass through a layer.

    Attributes:
        rows: int64 [N], their numbers among those that entered layer 0; turns: int32 [N], in the table of rotations.
        lengths: how many are of each sequence.
        order: int64, the sequences; None: all. before: int32, rows of each that are in its pages already; None: none.
        seen: lengths with these.
    """

    rows: Tensor
    turns: Tensor
    lengths: Lengths
    order: Tensor | None = None
    before: Tensor | None = None
    seen: Lengths | None = None


@dataclass(eq=False)
class _Stream:
    """Rows that pass through the layers together: part of a prefix, or (None) what sequence b computes for itself.

    rows: int64, their numbers among those that entered layer 0; hidden [n, d] enters the next layer, unless it is in
    the pack, where `span` is its place.
    """

    b: int
    rows: Tensor
    hidden: Tensor
    part: int | None = None
    span: slice = field(default_factory=lambda: slice(0))


@dataclass(eq=False)
class _Segment:
    """Packed rows `start` to `end`, which follow one another in sequence b behind its first `sees` rows, known ones.

    Those up to `middle` belong to the prefix, the others to the sequence alone.
    """

    b: int
    sees: int
    start: int
    middle: int
    end: int

    @property
    def computes(self) -> range:
        """Rows of its prefix that are among the packed ones, by their numbers in it."""
        return range(self.sees, self.sees + self.middle - self.start)


class KnownRows:
    """Says which rows of a prefill are still to be computed in a layer, and gives what they become to the prefixes.

    `prefixes[b]` is the prefix of sequence b, of `store`; None: it has no visual token. `rows` enter layer 0, as
    `inputs_embeds`. stop: layer behind which the prefill continues with all rows, which the policy wants to look at.

    Attributes:
        pack: the rows of the layer.
        counts, reused: [L][B], rows in the pages, and how many of these were not computed.
        left: of each sequence, the layer after which its visual tokens did.
        whole: whether no layer is half done.
    """

    pack: Pack

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        inputs_embeds: Tensor,
        rows: Rows,
        policy: VisualTokenPolicy,
        prefixes: Sequence[Prefix | None],
        store: PrefixStore,
        stop: int | None,
    ):
        self.stop, self.whole = stop, True
        self.counts: list[list[int]] = []
        self.reused: list[list[int]] = []
        self.left: list[int | None] = [None] * len(prefixes)
        self._decoder, self._cache, self._rows, self._policy, self._store = decoder, cache, rows, policy, store
        self._layers, self._embeds, self._page = decoder.shape.num_layers, inputs_embeds, cache.pool.page_size
        self._prefixes, self._memory = list(prefixes), dict[VisualTokenPolicy, Any]()
        self._before = [-1 if p is None else p.depth[REST] for p in prefixes]
        edges = {*policy.layers(self._layers), self._layers - 1}
        self._edges, self._reserved, self._late = edges, 0, list[int]()  # late: who reads what another one computes
        self._turns = rows.rotation_table(decoder.cos_sin)[1]
        self._own = [self._stream(b, None) for b in range(len(prefixes))]
        self._parts: dict[tuple[Prefix, int], _Stream] = {}
        self._unkept: dict[tuple[Prefix, int, int], list[int]] = {}  # layers, by whose tails and in whose pages
        self._streams: list[_Stream] = []
        self._segments: list[_Segment] = []
        self._packed_after: list[int | None] = []
        self._shown: tuple[list[tuple[int, int]], Rows | None] = [], None
        store.busy |= dict.fromkeys(p for p in prefixes if p is not None)
        for b, prefix in enumerate(prefixes):
            if prefix is not None and cache.leases[b] is None:
                cache.lease(b, prefix.pages)

    def _stream(self, b: int, part: int | None) -> _Stream:
        """A part of the prefix of sequence b, or the rows behind it, as they enter the next layer."""
        prefix, lengths = self._prefixes[b], self._rows.lengths.host
        first, n = sum(lengths[:b]), lengths[b]
        head, all_of = (0, 0) if prefix is None else prefix.ends
        start, end = (all_of, n) if part is None else ((0, head), (head, all_of))[part]
        known = None if part is None or prefix is None else prefix.hidden[part]
        hidden = self._embeds[first + start : first + end] if known is None else known
        return _Stream(b, torch.arange(first + start, first + end, device=hidden.device), hidden, part)

    @property
    def frontiers(self) -> list[tuple[int, int] | None]:
        """Of each sequence the last layer that its prefix was known to before and is now."""
        return [
            None if p is None else (before, p.depth[REST])
            for before, p in zip(self._before, self._prefixes, strict=True)
        ]

    # --- which rows a layer computes ----------------------------------------------------------------------------------

    def arrange(self, layer: int, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What left the layer before, and the same normalised -> what this one computes."""
        streams = self._needed(layer)
        if streams != self._streams:
            self._unpack(hidden)
            hidden = torch.cat([s.hidden for s in streams])
            x = self._decoder.reenter(layer, hidden)
        if streams != self._streams or self.left != self._packed_after:
            self._streams, self._packed_after = streams, list(self.left)
            self._lay_out()
        return hidden, x

    def _needed(self, layer: int) -> list[_Stream]:
        """Of each prefix: what of it is needed and has not passed the layer, then its sequences.

        The parts come right before the first sequence, in whose pages they are.
        """
        out = list[_Stream]()
        for members in self._members():
            prefix, b = self._prefixes[members[0]], members[0]
            if prefix is not None:
                parts = range(self._last_part(b) + 1)
                out += [self._part(prefix, b, part) for part in parts if prefix.depth[part] < layer]
            out += [self._own[b] for b in members]
        return out

    def _part(self, prefix: Prefix, b: int, part: int) -> _Stream:
        if (prefix, part) not in self._parts:
            self._parts[prefix, part] = self._stream(b, part)
        return self._parts[prefix, part]

    def _members(self) -> list[list[int]]:
        """Sequences by their prefix, without those that were given up; first those that still see it all."""
        groups: dict[object, list[int]] = {}
        for b, prefix in enumerate(self._prefixes):
            if b not in self._cache.given_up:
                groups.setdefault(b if prefix is None else prefix, []).append(b)
        return [sorted(members, key=lambda b: self.left[b] is not None) for members in groups.values()]

    def _unpack(self, hidden: Tensor) -> None:
        """Every stream gets its rows back."""
        for stream in self._streams:
            stream.hidden, prefix = hidden[stream.span].clone(), self._prefixes[stream.b]
            if stream.part is not None and prefix is not None:
                prefix.hidden[stream.part] = stream.hidden

    def _last_part(self, b: int) -> int:
        """Of its prefix, that sequence b still sees."""
        return REST if self.left[b] is None else HEAD

    def _sees(self, b: int) -> int:
        """Rows of its prefix in the pages of sequence b."""
        prefix = self._prefixes[b]
        return 0 if prefix is None else prefix.ends[self._last_part(b)]

    def _lay_out(self) -> None:
        self._segments, start, end = [], 0, 0
        for stream in self._streams:
            middle, end = end, end + len(stream.rows)
            stream.span = slice(middle, end)
            if stream.part is None:  # the parts before it, and what it computes itself
                known = self._sees(stream.b) - (middle - start)
                self._segments.append(_Segment(stream.b, known, start, middle, end))
                start = end
        device, rows = self._embeds.device, torch.cat([s.rows for s in self._streams])
        order, sees = ([getattr(s, name) for s in self._segments] for name in ("b", "sees"))
        sizes = [s.end - s.start for s in self._segments]
        self.pack = Pack(
            rows,
            self._turns[rows],
            Lengths.of(sizes, device),
            None if order == list(range(len(self._own))) else to_device(order, device, torch.int64),
            to_device(sees, device, torch.int32),
            Lengths.of([n + m for n, m in zip(sees, sizes, strict=True)], device) if any(sees) else None,
        )

    # --- a layer ------------------------------------------------------------------------------------------------------

    def enter(self, layer: int) -> None:
        """Count what this layer sees, and take pages."""
        counts, reused = [0] * len(self._own), [0] * len(self._own)
        for s in self._segments:
            counts[s.b], reused[s.b] = s.sees + s.end - s.start, s.sees
        self.counts.append(counts)
        self.reused.append(reused)
        self._late = self._reserve(layer, counts) if layer >= self._reserved else []
        self.whole = False

    def _reserve(self, layer: int, counts: list[int]) -> list[int]:
        """Pages for this layer and all up to the next that may be different. Returns who is late: see there."""
        late: dict[int, int] = {}
        edges = {later for later in self._edges if later >= layer}
        for first, *others in self._members():
            prefix = self._prefixes[first]
            if prefix is not None:
                edges |= {depth for depth in prefix.depth if depth >= layer}
                late |= {b: first for b in others if prefix.known(self._last_part(b), layer) < self._sees(b)}
        self._reserved = layer + 1 if late else 1 + min(edges)
        layers, cache, known = range(layer, self._reserved), self._cache, {}
        for b, prefix in enumerate(self._prefixes):
            if prefix is not None and b not in late and b not in cache.given_up:
                known[b] = prefix.known(self._last_part(b), layer)
                cache.share(layers, b, prefix.full_pages(layers, known[b]))
        if late:
            cache.reserve(layers, [0 if b in late else n for b, n in enumerate(counts)])
            for b, first in late.items():
                cache.share(layers, b, cache.pages_of(layers, first, 0, self._sees(b) // self._page))
        cache.reserve(layers, counts)
        for b, rows in known.items():
            self._restore_tail(layers, b, rows)
        return list(late)

    def written(self, layer: int) -> None:
        """K and V of the packed rows are in their pages."""
        for segment in self._segments:
            prefix = self._prefixes[segment.b]
            if prefix is not None and segment.computes:
                for part, end in enumerate(prefix.ends):
                    if end % self._page and end - 1 in segment.computes:
                        self._unkept.setdefault((prefix, part, segment.b), []).append(layer)
        if self._late:
            self.keep()
        for b in self._late:
            self._restore_tail(range(layer, layer + 1), b, self._sees(b))

    def _restore_tail(self, layers: range, b: int, rows: int) -> None:
        """Sequence b begins with so many rows of its prefix: those that fill no page are copied into its own."""
        prefix, place, n = self._prefixes[b], *divmod(rows, self._page)
        if prefix is None or n == 0:
            return
        tails = prefix.tails[prefix.ends.index(rows)][:, layers.start : layers.stop]
        numbers = torch.from_numpy(self._cache.pages_of(layers, b, place, place + 1)[:, 0].astype("int64"))
        pages, pool = to_device(numbers, tails.device, torch.int64), self._cache.pool
        for into, tail in zip((pool.k, pool.v), tails, strict=True):
            into[:, :n].index_copy_(0, pages, tail)

    def keep(self) -> None:
        """Copy the rows of parts that fill no page, for those who come later: together, while their pages are held."""
        pool, device = self._cache.pool, self._embeds.device
        for (prefix, part, b), layers in self._unkept.items():
            place, n = divmod(prefix.ends[part], self._page)
            pages = self._cache.pages_of(range(self._layers), b, place, place + 1)[layers, 0]
            at, where = (to_device(numbers, device, torch.int64) for numbers in (layers, pages.tolist()))
            for tails, rows in zip(prefix.tails[part], (pool.k, pool.v), strict=True):
                tails.index_copy_(0, at, rows[:, :n].index_select(0, where))
        self._unkept = {}

    def passed(self, layer: int, hidden: Tensor, queries: Tensor) -> None:
        """The packed rows have passed this layer: `hidden` left it, of the last layer perhaps fewer rows."""
        for segment in self._segments:
            prefix = self._prefixes[segment.b]
            if prefix is not None and segment.computes:
                self._cache.donate(layer, segment.b, segment.computes.stop // self._page)
                if layer == self.stop:
                    new = slice(segment.start, segment.middle)
                    prefix.marks[layer] = Mark(hidden[new].clone(), queries[new].clone())
        last = layer == self._layers - 1
        for stream in self._streams:
            prefix = self._prefixes[stream.b]
            if stream.part is not None and prefix is not None:
                prefix.passed(layer, stream.part, None if last or stream.part == HEAD else hidden[stream.span])
                if last:
                    prefix.hidden[stream.part] = None
        self.whole = True

    # --- decisions ----------------------------------------------------------------------------------------------------

    def decide(self, layer: int, hidden: Tensor) -> None:
        """Ask the policy about every sequence that still sees its visual tokens, of which two pooled rows are shown."""
        gone = self._cache.given_up
        watching = [p is not None and self.left[b] is None and b not in gone for b, p in enumerate(self._prefixes)]
        if not any(watching):
            return
        own, shown = self._own_rows(hidden), list[Tensor]()
        for b, prefix in enumerate(self._prefixes):
            shown.append(hidden[:0] if prefix is None or not watching[b] else prefix.pooled[layer])
            shown.append(own.get(b, hidden[:1]))  # of one who is gone, any row
        none, rows = hidden.new_empty(0, 0, 0), self._rows_of(list(map(len, shown)))
        state = LayerState(layer, self._decoder, torch.cat(shown), none, none, rows, self._memory)
        decision = self._policy.decide(state)
        for b, keep in enumerate(decision() if callable(decision) else decision):
            if watching[b] and keep is not None:
                self._leave(b, layer, own[b])

    def _own_rows(self, packed: Tensor) -> dict[int, Tensor]:
        """[N, ...] -> of each sequence those it computes for itself."""
        return {s.b: packed[s.span] for s in self._streams if s.part is None}

    def _rows_of(self, sizes: list[int]) -> Rows:
        """Of each sequence so many visual rows, then so many of text; the same object for the same numbers."""
        pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
        known, rows = self._shown
        if rows is None or known != pairs:
            visual = [torch.arange(two + n, device="cpu") < two for two, n in pairs]
            positions = [torch.arange(two + n, dtype=torch.int32, device=self._embeds.device) for two, n in pairs]
            rows = Rows.from_sequences(visual, positions)
            self._shown = pairs, rows
        return rows

    def _leave(self, b: int, layer: int, own: Tensor) -> None:
        """From here on the sequence computes its text between visual tokens itself: it no longer sees them."""
        self.left[b], prefix = layer, self._prefixes[b]
        if prefix is not None and len(prefix.between):
            first = sum(self._rows.lengths.host[:b]) + prefix.ends[HEAD]
            rows = torch.cat((first + prefix.between, self._own[b].rows))
            self._own[b] = _Stream(b, rows, torch.cat((prefix.texts[layer], own)))

    def all_rows(self, layer: int, hidden: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Behind layer `stop`, where the policy is going to look at them: [N, d], queries [N, Hq, D] and keys there.

        The rows of a sequence that was given up are any; they are computed for nothing.
        """
        parts: tuple[list[Tensor], list[Tensor]] = [], []
        for packed, out, name in zip((hidden, queries), parts, ("hidden", "queries"), strict=True):
            own = self._own_rows(packed)
            for b, (prefix, n) in enumerate(zip(self._prefixes, self._rows.lengths.host, strict=True)):
                if b not in own:
                    out.append(packed[:1].expand(n, *packed.shape[1:]))
                    continue
                out += [own[b]] if prefix is None else [getattr(prefix.marks[layer], name), own[b]]
        pool, cache = self._cache.pool, self._cache
        k, _ = gather(Paged(pool.k, pool.v, cache.block_table[layer], cache.lens[layer], self._rows.lengths))
        return torch.cat(parts[0]), torch.cat(parts[1]), k

    def close(self, hidden: Tensor, done: bool) -> None:
        """Leave the prefixes as deep as they are; where a layer failed half-way, nobody finds them again.

        hidden: the packed rows; done: they have passed all layers.
        """
        if self.whole:
            self.keep()
        if self.whole and not done:
            self._unpack(hidden)
        self._store.settle([p for p in self._prefixes if p is not None], self.whole)
