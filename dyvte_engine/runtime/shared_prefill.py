"""The prompt's way through the layers where its beginning has been there before, or will be asked for again.

As `prefill.Prefill`, for policies that take all visual tokens of a sequence out at once. What a sequence computes
itself are the rows behind its prefix; the prefix is computed by the first that needs it deeper than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.attention import AttentionFn, Lengths
from ..kernels.transfer import to_device
from ..models.decoder import Decoder
from ..models.rows import Rows
from ..policies import LayerState, VisualTokenPolicy
from .kv_cache import KVCache
from .prefill import Prefilled
from .prefix import HEAD, REST, Prefix, PrefixStore


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


@dataclass(eq=False)
class _Layout:
    """How a pack lies.

    rows: int64 [N], their numbers among those that entered layer 0; turns: int32 [N], in the table of rotations.
    spans: packed rows of each stream. segments: one for each sequence, and for them cu: int32 [B+1], order: int64 [B],
    the sequences, and before: int32 [B], what they see.
    counts: of each sequence, rows in its pages; ends: int64 [B], its last packed row.
    """

    rows: Tensor
    turns: Tensor
    spans: list[tuple[int, int]]
    segments: list[_Segment]
    cu: Tensor
    order: Tensor
    before: Tensor
    counts: list[int]
    row_counts: Tensor
    ends: Tensor


class SharedPrefill:
    """As `Prefill`. `prefixes[b]` is the prefix of sequence b, taken from `store`; None: it has no visual token."""

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
    ):
        self.decoder, self.cache, self.rows = decoder, cache, rows
        self.next = 0  # layer
        self._attention, self._policy, self._store = attend, policy, store
        self._layers, self._embeds = decoder.shape.num_layers, inputs_embeds
        self._ask = policy.layers(self._layers) - {self._layers - 1}  # nothing follows the last layer
        self._memory: dict[VisualTokenPolicy, Any] = {}
        self._prefixes: list[Prefix | None] = list(prefixes)
        self._left: list[int | None] = [None] * len(prefixes)  # layer after which its visual tokens did
        self._frontiers = [-1 if p is None else p.depth[REST] for p in prefixes]
        self._reserved, self._whole, self._closed = 0, True, False
        self._counts: list[list[int]] = []  # [L][B] rows in the pages
        self._reused: list[list[int]] = []
        self._own = [self._stream(b, None) for b in range(len(prefixes))]
        self._parts: dict[tuple[int, int], _Stream] = {}
        self._pack: list[_Stream] = []
        self._hidden = self._x = inputs_embeds[:0]
        self._cos_sin, self._turns = rows.rotation_table(decoder.cos_sin)
        self._layout = self._lay_out([])
        self._laid_out: tuple[list[_Stream], list[int | None]] = [], []
        self.workspace: Tensor | None = None

    def _stream(self, b: int, part: int | None) -> _Stream:
        """A part of the prefix of sequence b, or the rows behind it, as they enter the next layer."""
        prefix = self._prefixes[b]
        first, n = sum(self.rows.lengths.host[:b]), self.rows.lengths.host[b]
        head, all_of = (0, 0) if prefix is None else (prefix.sizes[HEAD], len(prefix))
        start, end = (all_of, n) if part is None else ((0, head), (head, all_of))[part]
        rows = torch.arange(first + start, first + end, device=self._embeds.device)
        known = None if part is None or prefix is None else prefix.hidden[part]
        return _Stream(b, rows, self._embeds[rows] if known is None else known, prefix, part)

    @property
    def done(self) -> bool:
        return self.next == self._layers

    def advance(self, row_layers: float = float("inf")) -> bool:
        """See `Prefill.advance`."""
        used = 0
        while not self.done:
            self._arrange()
            if used and used + len(self._hidden) > row_layers:
                break
            used += len(self._hidden)
            self._run_layer()
        return self.done

    def _run_layer(self) -> None:
        layer, self._whole = self.next, False
        self._hidden, self._x = self.decoder.layer(layer, self._hidden, self._x, self)
        self.next += 1
        for stream, (start, end) in zip(self._pack, self._layout.spans, strict=True):
            if stream.prefix is not None and stream.part is not None:
                if self.done:
                    stream.prefix.depth[stream.part] = layer
                else:
                    stream.prefix.passed(layer, stream.part, self._hidden[start:end])
        if layer in self._ask:
            self._decide(layer)
        self._whole = True

    # --- which rows the next layer computes ---------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Pack the streams of the next layer, unless they are packed already."""
        streams = self._streams()
        if streams != self._pack:
            self._unpack()
            self._pack = streams
            self._hidden = torch.cat([s.hidden for s in streams])
            self._x = self._normalised()
            self.workspace = self.decoder.workspace(len(self._hidden))
        if (streams, self._left) != self._laid_out:
            self._layout, self._laid_out = self._lay_out(streams), (streams, list(self._left))

    def _normalised(self) -> Tensor:
        """The pack for the next layer, rounded as if it had not been interrupted: there the norm comes with a sum."""
        if self.next == 0:
            return self.decoder.enter(self._hidden)
        norm = self.decoder.layers[self.next].input_norm
        return ops.add_rms_norm_(self._hidden, torch.zeros_like(self._hidden), norm, self.decoder.eps)

    def _streams(self) -> list[_Stream]:
        """Of each prefix: what of it is needed and has not passed the next layer, then its sequences.

        First those that still see it all: the parts come right before a sequence that sees them.
        """
        out = []
        for members in self._members():
            prefix, b = self._prefixes[members[0]], members[0]
            members.sort(key=lambda b: self._left[b] is not None)
            if prefix is not None:
                seen = self._left[members[0]] is None
                needed = [part for part in (HEAD, REST) if prefix.depth[part] < self.next and (seen or part == HEAD)]
                out += [self._part(b, part) for part in needed]
            out += [self._own[b] for b in members]
        return out

    def _members(self) -> list[list[int]]:
        """Sequences by their prefix."""
        groups: dict[object, list[int]] = {}
        for b, prefix in enumerate(self._prefixes):
            groups.setdefault(b if prefix is None else prefix, []).append(b)
        return list(groups.values())

    def _part(self, b: int, part: int) -> _Stream:
        if (b, part) not in self._parts:
            self._parts[b, part] = self._stream(b, part)
        return self._parts[b, part]

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
        return 0 if prefix is None else len(prefix) if self._left[b] is None else prefix.sizes[HEAD]

    def _lay_out(self, streams: list[_Stream]) -> _Layout:
        device, none = self._embeds.device, len(self._own)
        spans, segments, start, end = list[tuple[int, int]](), list[_Segment](), 0, 0
        for stream in streams:
            spans.append((end, end + len(stream.rows)))
            middle, end = end, end + len(stream.rows)
            if stream.part is None:  # the parts before it, and what it computes itself
                sees = self._sees(stream.b) - (middle - start)
                segments.append(_Segment(stream.b, stream.prefix, sees, start, middle, end))
                start = end
        counts, ends = [0] * none, [0] * none
        for segment in segments:
            counts[segment.b], ends[segment.b] = segment.sees + segment.end - segment.start, segment.end - 1
        rows = torch.cat([s.rows for s in streams]) if streams else torch.arange(0, device=device)
        return _Layout(
            rows,
            self._turns[rows],
            spans,
            segments,
            to_device([0, *(s.end for s in segments)], device, torch.int32),
            to_device([s.b for s in segments], device, torch.int64),
            to_device([s.sees for s in segments], device, torch.int32),
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
        layout, pool = self._layout, self.cache.pool
        self._enter(layer)
        table = self.cache.block_table[layer]
        pages = table[layout.order]
        ops.rope_append_(q, k, v, self._cos_sin, layout.turns, layout.cu, pool.k, pool.v, pages, layout.before)
        for segment in layout.segments:
            if segment.prefix is not None:
                own = slice(segment.start, segment.middle)
                segment.prefix.append(layer, segment.sees, k[own], v[own])
                self._fill_pages(layer, segment, table)
        if not self._only_last(layer):
            return hidden, self._attend_segments(layer, q, k, v)
        last = layout.ends
        read = ops.decode_attention(q[last], pool.k, pool.v, table, layout.row_counts, self.decoder.scale)
        return hidden[last], read

    def added(self, layer: int) -> Tensor | None:
        """See `LayerRows`."""
        additions = self.rows.additions
        return additions[layer][self._layout.rows] if layer < len(additions) else None

    def _enter(self, layer: int) -> None:
        """Pages for what this layer sees, and for all up to the next one after which tokens may leave."""
        layout = self._layout
        self._counts.append(layout.counts)
        computed = [0] * len(layout.counts)
        for stream in self._pack:
            computed[stream.b] += len(stream.rows)
        self._reused.append([max(n - own, 0) for n, own in zip(layout.counts, computed, strict=True)])
        if layer >= self._reserved:
            may_leave = [later for later in self._ask if later >= layer]
            self._reserved = 1 + min(may_leave, default=self._layers - 1)
            self.cache.reserve(range(layer, self._reserved), layout.counts)

    def _fill_pages(self, layer: int, segment: _Segment, table: Tensor) -> None:
        """Copy what the segment sees of its prefix into the sequence's own pages."""
        pool, prefix = self.cache.pool, segment.prefix
        if prefix is None or segment.sees == 0:
            return
        at = torch.arange(segment.sees, device=table.device)
        slots = table[segment.b, at // pool.page_size].long() * pool.page_size + at % pool.page_size
        for pages, rows in zip((pool.k, pool.v), prefix.keys_values(layer, segment.sees), strict=True):
            pages.flatten(0, 1).index_copy_(0, slots, rows)

    def _attend_segments(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout, scale = self._layout, self.decoder.scale
        if not any(s.sees for s in layout.segments):
            return self._attention(q, k, v, Lengths(layout.cu, [s.end - s.start for s in layout.segments]), scale)
        out = torch.empty_like(q)
        for segment in layout.segments:
            own = slice(segment.start, segment.end)
            if segment.prefix is None or segment.sees == 0:
                n = segment.end - segment.start
                cu = to_device([0, n], q.device, torch.int32)
                out[own] = self._attention(q[own], k[own], v[own], Lengths(cu, [n]), scale)
            else:
                before_k, before_v = segment.prefix.keys_values(layer, segment.sees)
                out[own] = _attend_behind(q[own], torch.cat((before_k, k[own])), torch.cat((before_v, v[own])), scale)
        return out

    # --- decisions ----------------------------------------------------------------------------------------------------

    def _decide(self, layer: int) -> None:
        """Ask the policy about every sequence that still sees its visual tokens, of which two pooled rows are shown."""
        watching = [p is not None and left is None for p, left in zip(self._prefixes, self._left, strict=True)]
        if not any(watching):
            return
        place = {s.b: span for s, span in zip(self._pack, self._layout.spans, strict=True) if s.part is None}
        shown, visual, tails = [], [], []
        for b, prefix in enumerate(self._prefixes):
            own = self._hidden[slice(*place[b])]
            tails.append(self.rows.n_tail[b])
            if prefix is not None and watching[b]:
                shown.append(prefix.pooled[layer])
                visual += [True, True]
            shown.append(own)
            visual += [False] * len(own)
        decision = self._policy.decide(self._state(layer, shown, visual, [2 * w for w in watching], tails, place))
        for b, keep in enumerate(decision() if callable(decision) else decision):
            if watching[b] and keep is not None:
                self._leave(b, layer, self._hidden[slice(*place[b])])

    def _state(
        self,
        layer: int,
        shown: list[Tensor],
        visual: list[bool],
        n_visual: list[int],
        tails: list[int],
        place: dict[int, tuple[int, int]],
    ) -> LayerState:
        hidden, device = torch.cat(shown), self._embeds.device
        host = [place[b][1] - place[b][0] + n for b, n in enumerate(n_visual)]
        cu = [sum(host[:b]) for b in range(len(host) + 1)]
        every = torch.arange(len(hidden), device=device)
        rows = Rows(
            positions=every.to(torch.int32),
            visual=to_device(visual, device, torch.bool),
            source=every,
            lengths=Lengths(to_device(cu, device, torch.int32), host),
            n_visual=n_visual,
            n_entered=n_visual,
            n_tail=tails,
        )
        none = hidden.new_empty(0, 0, 0)
        return LayerState(layer, self.decoder, hidden, none, none, rows, self._memory)

    def _leave(self, b: int, layer: int, own: Tensor) -> None:
        """From here on the sequence computes its text between visual tokens itself: it no longer sees them."""
        self._left[b] = layer
        prefix = self._prefixes[b]
        assert prefix is not None
        if len(prefix.between):
            first = sum(self.rows.lengths.host[:b]) + prefix.sizes[HEAD]
            rows = torch.cat((first + prefix.between, self._own[b].rows))
            self._own[b] = _Stream(b, rows, torch.cat((prefix.texts[layer], own)), prefix)

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Prefilled:
        """When it is done: the cache gets its lengths."""
        last = self._x if self._only_last(self._layers - 1) else self._x[self._layout.ends]
        device = self._embeds.device
        rows = [to_device(counts, device, torch.int32) for counts in self._counts]
        positions = self.rows.next_positions.expand(self._layers, -1)
        self.cache.set_lens(rows, self._counts, positions)
        frontiers = [
            None if p is None else (before, p.depth[REST])
            for before, p in zip(self._frontiers, self._prefixes, strict=True)
        ]
        self.close()
        return Prefilled(last, self._left, self._counts, self._reused, frontiers)

    def close(self) -> None:
        """Give the prefixes back, at whatever layer they are."""
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
        self._store.give_back([p for p in self._prefixes if p is not None], self._whole)


def _attend_behind(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [n, Hq, D] of the last n rows; k and v [m, Hkv, D] of all: [n, Hq, D]."""
    n, m = len(q), len(k)
    mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    q, k, v = (t[None].transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)
