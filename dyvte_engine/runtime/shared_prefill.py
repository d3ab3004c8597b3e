"""The prompt's way through the layers where its beginning has been there before, or will be asked for again.

As `prefill.Prefill`. What a sequence computes itself are the rows behind its prefix; the prefix is computed by the
first that needs it deeper than it is, in pages that are everybody's afterwards. A policy that looks at single visual
tokens gets them all behind the first layer that it is asked about, and from there on a plain prefill goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.attention import AttentionFn, Lengths, Paged, attend_pages, gather
from ..kernels.transfer import to_device
from ..models.decoder import Decoder
from ..models.rows import Rows
from ..policies import LayerState, VisualTokenPolicy
from .kv_cache import KVCache
from .prefill import Prefill, Prefilled
from .prefix import HEAD, REST, Mark, Prefix, PrefixStore


@dataclass(eq=False)
class _Stream:
    """Rows that pass through the layers together: a part of a prefix, or what sequence b computes for itself.

    rows: int64, their numbers among those that entered layer 0; hidden [n, d] enters the next layer, unless it is in
    the pack.
    """

    b: int
    rows: Tensor
    hidden: Tensor
    prefix: Prefix | None
    part: int | None = None


@dataclass(eq=False)
class _Segment:
    """Packed rows `start` to `end`, which follow one another in sequence b behind its first `sees` rows, known ones.

    Those up to `middle` belong to the prefix, the others to the sequence alone.
    """

    b: int
    prefix: Prefix | None
    sees: int
    start: int
    middle: int
    end: int

    @property
    def computes(self) -> range:
        """Rows of its prefix that are among the packed ones, by their numbers in it."""
        return range(self.sees, self.sees + self.middle - self.start)


@dataclass(eq=False)
class _Layout:
    """How a pack lies.

    rows: int64 [N], their numbers among those that entered layer 0; turns: int32 [N], in the table of rotations.
    spans: packed rows of each stream. segments: one for each sequence that is left, and for them lengths of what is
    packed, order: int64, the sequences, before: int32, what they see, and seen: lengths with that.
    counts: of each sequence, rows in its pages; ends: int64 [B], its last packed row.
    """

    rows: Tensor
    turns: Tensor
    spans: list[tuple[int, int]]
    segments: list[_Segment]
    lengths: Lengths
    order: Tensor
    before: Tensor
    seen: Lengths
    counts: list[int]
    row_counts: Tensor
    ends: Tensor


class SharedPrefill:
    """As `Prefill`. `prefixes[b]` is the prefix of sequence b, of `store`; None: it has no visual token.

    stop: layer behind which the prefill that `plain` gives goes on; None: there is none.
    """

    def __init__(
        self,
        decoder: Decoder,
        attend: AttentionFn,
        cache: KVCache,
        inputs_embeds: Tensor,
        rows: Rows,
        policy: VisualTokenPolicy,
        prefixes: Sequence[Prefix | None],
        store: PrefixStore,
        stop: int | None,
        plain: Callable[[], Prefill],
    ):
        self.decoder, self.cache, self.rows = decoder, cache, rows
        self.next = 0  # layer
        self._attention, self._policy, self._store = attend, policy, store
        self._layers, self._embeds, self._page = decoder.shape.num_layers, inputs_embeds, cache.pool.page_size
        self._stop, self._plain = stop if any(prefixes) else None, plain
        self._rest: Prefill | None = None
        self._ask = policy.layers(self._layers) - {self._layers - 1}  # nothing follows the last layer
        self._memory: dict[VisualTokenPolicy, Any] = {}
        self._prefixes: list[Prefix | None] = list(prefixes)
        self._left: list[int | None] = [None] * len(prefixes)  # layer after which its visual tokens did
        self._frontiers = [-1 if p is None else p.depth[REST] for p in prefixes]
        self._reserved, self._whole, self._closed = 0, True, False
        self._counts: list[list[int]] = []  # [L][B] rows in the pages
        self._reused: list[list[int]] = []
        self._own = [self._stream(b, None) for b in range(len(prefixes))]
        self._parts: dict[tuple[Prefix, int], _Stream] = {}
        self._pack: list[_Stream] = []
        self._hidden = self._x = inputs_embeds[:0]
        self._queries = inputs_embeds[:0]
        self._cos_sin, self._turns = rows.rotation_table(decoder.cos_sin)
        self._layout = self._lay_out([])
        self._laid_out: tuple[list[_Stream], list[int | None]] = [], []
        self.workspace: Tensor | None = None
        store.busy |= dict.fromkeys(p for p in prefixes if p is not None)
        for b, prefix in enumerate(prefixes):
            if prefix is not None:
                cache.lease(b, prefix.pages)

    def _stream(self, b: int, part: int | None) -> _Stream:
        """A part of the prefix of sequence b, or the rows behind it, as they enter the next layer."""
        prefix = self._prefixes[b]
        first, n = sum(self.rows.lengths.host[:b]), self.rows.lengths.host[b]
        head, all_of = (0, 0) if prefix is None else prefix.ends
        start, end = (all_of, n) if part is None else ((0, head), (head, all_of))[part]
        rows = torch.arange(first + start, first + end, device=self._embeds.device)
        known = None if part is None or prefix is None else prefix.hidden[part]
        return _Stream(b, rows, self._embeds[rows] if known is None else known, prefix, part)

    @property
    def done(self) -> bool:
        return self.next == self._layers if self._rest is None else self._rest.done

    def advance(self, row_layers: float = float("inf")) -> bool:
        """See `Prefill.advance`."""
        used = 0
        while self._rest is None and not self.done:
            self._arrange()
            if used and used + len(self._hidden) > row_layers:
                return False
            used += len(self._hidden)
            self._run_layer()
        if self._rest is not None and (used == 0 or row_layers == float("inf")):
            self._rest.advance(row_layers)
        return self.done

    def _run_layer(self) -> None:
        layer, self._whole = self.next, False
        self._hidden, self._x = self.decoder.layer(layer, self._hidden, self._x, self)
        self.next += 1
        for segment in self._layout.segments:
            if segment.prefix is not None and segment.computes:
                self.cache.donate(layer, segment.b, segment.computes.stop // self._page)
                if layer == self._stop:
                    new = slice(segment.start, segment.middle)
                    segment.prefix.marks[layer] = Mark(self._hidden[new].clone(), self._queries[new].clone())
        for stream, (start, end) in zip(self._pack, self._layout.spans, strict=True):
            if stream.prefix is not None and stream.part is not None:
                if self.done:
                    stream.prefix.depth[stream.part] = layer
                else:
                    stream.prefix.passed(layer, stream.part, self._hidden[start:end])
        self._whole = True
        if layer == self._stop:
            self._hand_over(layer)
        elif layer in self._ask:
            self._decide(layer)

    # --- which rows the next layer computes ---------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Pack the streams of the next layer, unless they are packed already."""
        streams = self._streams()
        if streams != self._pack:
            self._unpack()
            self._pack = streams
            self._hidden = torch.cat([s.hidden for s in streams])
            self._x = self.decoder.reenter(self.next, self._hidden)
            self.workspace = self.decoder.workspace(len(self._hidden))
        if (streams, self._left) != self._laid_out:
            self._layout, self._laid_out = self._lay_out(streams), (streams, list(self._left))

    def _streams(self) -> list[_Stream]:
        """Of each prefix: what of it is needed and has not passed the next layer, then its sequences.

        The parts come right before the first sequence, in whose pages they are.
        """
        out = []
        for members in self._members():
            prefix, b = self._prefixes[members[0]], members[0]
            if prefix is not None:
                seen = (HEAD,) if self._left[b] is not None else (HEAD, REST)
                out += [self._part(prefix, b, part) for part in seen if prefix.depth[part] < self.next]
            out += [self._own[b] for b in members]
        return out

    def _members(self) -> list[list[int]]:
        """Sequences by their prefix, without those that were given up; first those that still see it all."""
        groups: dict[object, list[int]] = {}
        for b, prefix in enumerate(self._prefixes):
            if b not in self.cache.given_up:
                groups.setdefault(b if prefix is None else prefix, []).append(b)
        return [sorted(members, key=lambda b: self._left[b] is not None) for members in groups.values()]

    def _part(self, prefix: Prefix, b: int, part: int) -> _Stream:
        if (prefix, part) not in self._parts:
            self._parts[prefix, part] = self._stream(b, part)
        return self._parts[prefix, part]

    def _unpack(self) -> None:
        """Every stream gets its rows back."""
        for stream, (start, end) in zip(self._pack, self._layout.spans, strict=True):
            stream.hidden = self._hidden[start:end].clone()
            if stream.prefix is not None and stream.part is not None:
                stream.prefix.hidden[stream.part] = stream.hidden
        self._pack = []

    def _sees(self, b: int) -> int:
        """Rows of its prefix in the pages of sequence b."""
        prefix = self._prefixes[b]
        return 0 if prefix is None else prefix.ends[self._last_part(b)]

    def _last_part(self, b: int) -> int:
        """Of its prefix, that sequence b still sees."""
        return REST if self._left[b] is None else HEAD

    def _lay_out(self, streams: list[_Stream]) -> _Layout:
        device, count = self._embeds.device, len(self._own)
        spans, segments, start, end = list[tuple[int, int]](), list[_Segment](), 0, 0
        for stream in streams:
            spans.append((end, end + len(stream.rows)))
            middle, end = end, end + len(stream.rows)
            if stream.part is None:  # the parts before it, and what it computes itself
                sees = self._sees(stream.b) - (middle - start)
                segments.append(_Segment(stream.b, stream.prefix, sees, start, middle, end))
                start = end
        counts, ends = [0] * count, [0] * count
        for segment in segments:
            counts[segment.b], ends[segment.b] = segment.sees + segment.end - segment.start, segment.end - 1
        rows = torch.cat([s.rows for s in streams]) if streams else torch.arange(0, device=device)
        return _Layout(
            rows,
            self._turns[rows],
            spans,
            segments,
            Lengths.of([s.end - s.start for s in segments], device),
            to_device([s.b for s in segments], device, torch.int64),
            to_device([s.sees for s in segments], device, torch.int32),
            Lengths.of([counts[s.b] for s in segments], device),
            counts,
            to_device(counts, device, torch.int32),
            to_device(ends, device, torch.int64),
        )

    # --- a layer ------------------------------------------------------------------------------------------------------

    def _only_last(self, layer: int) -> bool:
        """The other rows of the last layer would feed nothing but the cache."""
        return layer == self._layers - 1 and layer >= len(self.rows.additions)

    def attend(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerRows`."""
        layout, pool, scale = self._layout, self.cache.pool, self.decoder.scale
        late = self._enter(layer)
        table = self.cache.block_table[layer]
        own = table if len(layout.segments) == len(table) == 1 else table[layout.order]
        ops.rope_append_(q, k, v, self._cos_sin, layout.turns, layout.lengths.cu, pool.k, pool.v, own, layout.before)
        for segment in layout.segments:
            self._keep_tails(layer, segment)
        for b in late:
            self._restore_tail(range(layer, layer + 1), b, self._sees(b))
        self._queries = q
        if self._only_last(layer):
            last = layout.ends
            read = ops.decode_attention(q[last], pool.k, pool.v, table, layout.row_counts, scale)
            return hidden[last], read
        if not any(s.sees for s in layout.segments):
            return hidden, self._attention(q, k, v, layout.lengths, scale)
        cached = Paged(pool.k, pool.v, own, layout.before, layout.seen)
        return hidden, attend_pages(self._attention, q, layout.lengths, scale, cached)

    def added(self, layer: int) -> Tensor | None:
        """See `LayerRows`."""
        additions = self.rows.additions
        return additions[layer][self._layout.rows] if layer < len(additions) else None

    def _enter(self, layer: int) -> list[int]:
        """Count what this layer sees, and take pages. Returns sequences that read what another one computes here."""
        layout = self._layout
        self._counts.append(layout.counts)
        computed = [0] * len(layout.counts)
        for stream in self._pack:
            computed[stream.b] += len(stream.rows)
        self._reused.append([max(n - own, 0) for n, own in zip(layout.counts, computed, strict=True)])
        return self._reserve(layer) if layer >= self._reserved else []

    def _reserve(self, layer: int) -> list[int]:
        """Pages for this layer and all up to the next that may be different."""
        late: dict[int, int] = {}
        edges = {later for later in (*self._ask, self._layers - 1) if later >= layer}
        for first, *others in self._members():
            prefix = self._prefixes[first]
            if prefix is not None:
                edges |= {depth for depth in prefix.depth if depth >= layer}
                late |= {b: first for b in others if prefix.known(self._last_part(b), layer) < self._sees(b)}
        self._reserved = layer + 1 if late else 1 + min(edges)
        layers, counts = range(layer, self._reserved), self._layout.counts
        known = {}
        for b, prefix in enumerate(self._prefixes):
            if prefix is not None and b not in late and b not in self.cache.given_up:
                known[b] = prefix.known(self._last_part(b), layer)
                self.cache.share(layers, b, prefix.full_pages(layers, known[b]))
        if late:
            self.cache.reserve(layers, [0 if b in late else n for b, n in enumerate(counts)])
            for b, first in late.items():
                self.cache.share(layers, b, self.cache.pages_of(layers, first, 0, self._sees(b) // self._page))
        self.cache.reserve(layers, counts)
        for b, rows in known.items():
            self._restore_tail(layers, b, rows)
        return list(late)

    def _restore_tail(self, layers: range, b: int, rows: int) -> None:
        """Sequence b begins with so many rows of its prefix: those that fill no page are copied into its own."""
        prefix, place, n = self._prefixes[b], *divmod(rows, self._page)
        if prefix is None or n == 0:
            return
        tails = prefix.tails[prefix.ends.index(rows)][:, layers.start : layers.stop]
        numbers = torch.from_numpy(self.cache.pages_of(layers, b, place, place + 1)[:, 0].astype("int64"))
        pages, pool = to_device(numbers, tails.device, torch.int64), self.cache.pool
        for into, tail in zip((pool.k, pool.v), tails, strict=True):
            into[:, :n].index_copy_(0, pages, tail)

    def _keep_tails(self, layer: int, segment: _Segment) -> None:
        """The rows of a part computed here that fill no page, for those who come later."""
        prefix, pool = segment.prefix, self.cache.pool
        for end, tails in zip(prefix.ends, prefix.tails, strict=True) if prefix is not None else ():
            place, n = divmod(end, self._page)
            if n and end - 1 in segment.computes:
                page = int(self.cache.pages_of(range(layer, layer + 1), segment.b, place, place + 1)[0, 0])
                tails[0, layer], tails[1, layer] = pool.k[page, :n], pool.v[page, :n]

    # --- decisions ----------------------------------------------------------------------------------------------------

    def _decide(self, layer: int) -> None:
        """Ask the policy about every sequence that still sees its visual tokens, of which two pooled rows are shown."""
        gone = self.cache.given_up
        watching = [p is not None and self._left[b] is None and b not in gone for b, p in enumerate(self._prefixes)]
        if not any(watching):
            return
        own, shown = self._own_rows(self._hidden), list[Tensor]()
        for b, prefix in enumerate(self._prefixes):
            shown += [prefix.pooled[layer]] if prefix is not None and watching[b] else []
            shown.append(own.get(b, self._hidden[:1]))  # of one who is gone, any row
        decision = self._policy.decide(self._state(layer, shown, watching))
        for b, keep in enumerate(decision() if callable(decision) else decision):
            if watching[b] and keep is not None:
                self._leave(b, layer, own[b])

    def _own_rows(self, packed: Tensor) -> dict[int, Tensor]:
        """[N, ...] -> of each sequence those it computes for itself."""
        spans = zip(self._pack, self._layout.spans, strict=True)
        return {s.b: packed[start:end] for s, (start, end) in spans if s.part is None}

    def _state(self, layer: int, shown: list[Tensor], watching: list[bool]) -> LayerState:
        """shown: of each sequence that is watched two visual rows, and of every sequence its own."""
        hidden, visual, sizes, parts = torch.cat(shown), list[bool](), list[int](), map(len, shown)
        for watched in watching:
            two, own = next(parts) if watched else 0, next(parts)
            visual += [True] * two + [False] * own
            sizes.append(two + own)
        every = torch.arange(len(hidden), device=hidden.device)
        n_visual = [2 * watched for watched in watching]
        rows = Rows(
            positions=every.to(torch.int32),
            visual=to_device(visual, hidden.device, torch.bool),
            source=every,
            lengths=Lengths.of(sizes, hidden.device),
            n_visual=n_visual,
            n_entered=n_visual,
            n_tail=[min(tail, n) for tail, n in zip(self.rows.n_tail, sizes, strict=True)],
        )
        none = hidden.new_empty(0, 0, 0)
        return LayerState(layer, self.decoder, hidden, none, none, rows, self._memory)

    def _leave(self, b: int, layer: int, own: Tensor) -> None:
        """From here on the sequence computes its text between visual tokens itself: it no longer sees them."""
        self._left[b] = layer
        prefix = self._prefixes[b]
        assert prefix is not None
        if len(prefix.between):
            first = sum(self.rows.lengths.host[:b]) + prefix.ends[HEAD]
            rows = torch.cat((first + prefix.between, self._own[b].rows))
            self._own[b] = _Stream(b, rows, torch.cat((prefix.texts[layer], own)), prefix)

    def _hand_over(self, layer: int) -> None:
        """A plain prefill goes on with all rows, known ones too: the policy is going to look at them."""
        own = [self._own_rows(packed) for packed in (self._hidden, self._queries)]
        hidden, queries = list[Tensor](), list[Tensor]()
        for b, (prefix, n) in enumerate(zip(self._prefixes, self.rows.lengths.host, strict=True)):
            if b not in own[0]:  # its rows are computed for nothing
                hidden.append(self._hidden[:1].expand(n, -1))
                queries.append(self._queries[:1].expand(n, -1, -1))
                continue
            if prefix is not None:
                hidden.append(prefix.marks[layer].hidden)
                queries.append(prefix.marks[layer].queries)
            hidden.append(own[0][b])
            queries.append(own[1][b])
        pool, table = self.cache.pool, self.cache.block_table[layer]
        k, _ = gather(Paged(pool.k, pool.v, table, self.cache.lens[layer], self.rows.lengths))
        rest = self._plain()
        rest.resume(layer, torch.cat(hidden), torch.cat(queries), k)
        self.close()
        self._rest = rest

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Prefilled:
        """When it is done: the cache gets its lengths."""
        frontiers = [
            None if p is None else (before, p.depth[REST])
            for before, p in zip(self._frontiers, self._prefixes, strict=True)
        ]
        if self._rest is not None:
            computed = [[0] * len(frontiers)] * (self._layers - len(self._reused))
            return replace(self._rest.finish(), reused=self._reused + computed, frontiers=frontiers)
        last = self._x if self._only_last(self._layers - 1) else self._x[self._layout.ends]
        device = self._embeds.device
        rows = [to_device(counts, device, torch.int32) for counts in self._counts]
        positions = self.rows.next_positions.expand(self._layers, -1)
        self.cache.set_lens(rows, self._counts, positions)
        self.close()
        return Prefilled(last, self._left, self._counts, self._reused, frontiers)

    def close(self) -> None:
        """Leave the prefixes as deep as they are; where a layer failed half-way, nobody finds them again."""
        if self._closed:
            return
        self._closed = True
        if self.done:
            for stream in self._pack:
                if stream.prefix is not None and stream.part is not None:
                    stream.prefix.hidden[stream.part] = None  # nothing follows
            self._pack = []
        elif self._whole:
            self._unpack()
        self._store.settle([p for p in self._prefixes if p is not None], self._whole)
