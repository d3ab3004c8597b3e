"""The prompt's way through the layers: at every layer boundary a policy may take visual tokens out (docs/method.md, 2).

A prefill advances by layers, so that others can decode in between: an exit is decided after all of the prompt's text
has passed through a layer, which a prompt cut into chunks of tokens would not have done.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..kernels import ops
from ..kernels.attention import AttentionFn, Paged, attend_pages
from ..models.decoder import Decoder
from ..models.rows import Rows
from ..policies import Decision, LayerState, VisualTokenPolicy
from ..policies.base import Awaited, at_most
from .known_rows import KnownRows, Pack
from .kv_cache import KVCache
from .layer_graphs import LayerGraphs

# Called in every layer with its number, the rotated q [N, Hq, D] and k [N, Hkv, D] of all its rows, and these rows.
Watch = Callable[[int, Tensor, Tensor, Rows], None]


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What a prefill leaves behind, apart from the cache.

    Attributes:
        logits: f32 [B, vocab], those of each sequence's next token.
        exit_layers: layer after which the last visual token left (-1: before the first), None if some stayed or there
            were none.
        rows: [L][B], rows that each layer has of a prompt.
        reused: [L][B], how many of them it did not compute.
        frontiers: of each sequence the last layer that its prefix was known to before and after; None without one.
    """

    logits: Tensor
    exit_layers: list[int | None]
    rows: list[list[int]]
    reused: list[list[int]]
    frontiers: list[tuple[int, int] | None]


class Prefill:
    """Packed prompts in the layers of the decoder; fills an empty cache that has a slot for each.

    inputs_embeds [N, d] with its `rows`. With `drop_early_kv` the rows that left are in the end compacted out of the
    earlier layers' K/V too, so that decoding no longer attends to them anywhere. `watch` sees every layer's attention.
    `graphs` run the layers that they cover, unless they are watched. `known`: what need not be computed, or is
    wanted by others too.
    """

    def __init__(
        self,
        decoder: Decoder,
        attend: AttentionFn,
        cache: KVCache,
        inputs_embeds: Tensor,
        rows: Rows,
        policy: VisualTokenPolicy,
        drop_early_kv: bool = False,
        watch: Watch | None = None,
        graphs: LayerGraphs | None = None,
        known: KnownRows | None = None,
    ):
        self.decoder, self.cache, self.rows = decoder, cache, rows
        self.next = 0  # layer
        self._entered = len(inputs_embeds)
        self._attention, self._policy, self._drop_early_kv, self._watch = attend, policy, drop_early_kv, watch
        self._graphs = None if watch is not None else graphs
        self._known, self._reused = known, list[list[int]]()
        self._frontiers: list[tuple[int, int] | None] = [None] * len(rows.n_visual)
        self._layers = decoder.shape.num_layers
        ask = policy.layers(self._layers) if any(rows.n_visual) else set()
        self._ask = ask if drop_early_kv else ask - {self._layers - 1}  # nothing follows the last layer
        self._seen: list[Rows] = []  # of each layer
        self._exit_layers: list[int | None] = [None] * len(rows.n_visual)
        self._memory: dict[VisualTokenPolicy, Any] = {}
        self._pending: tuple[LayerState, Decision | Callable[[], Decision]] | None = None  # still to be carried out
        self._likely: tuple[Decision, tuple[Rows, Tensor]] | None = None  # what a pending decision may come to
        self._reserved: list[list[int]] = []  # of each layer so far, the rows [B] that have pages
        self._queries_keys = (inputs_embeds.new_empty(0, 0, 0),) * 2
        self.workspace = decoder.workspace(len(inputs_embeds))
        if known is not None:
            self._hidden = self._x = inputs_embeds[:0]
            return
        self._hidden = self._x = inputs_embeds.contiguous()  # the caller's still
        if -1 in self._ask:
            self._decide(-1)
        self._x = decoder.enter(self._hidden)

    @property
    def done(self) -> bool:
        return self.next == self._layers

    def advance(
        self, row_layers: float = float("inf"), least: bool = True, ready: Callable[[], bool] = lambda: True
    ) -> int:
        """Run layers while their rows sum to at most `row_layers`; `least`: one, whatever it has. Returns the sum.

        ready: asked before each layer, whether it may run now.
        """
        used = 0
        while not self.done:
            if self._known is not None:
                self._hidden, self._x = self._known.arrange(self.next, self._hidden, self._x)
            if (used + len(self._hidden) > row_layers and (used or not least)) or not ready():
                break
            used += len(self._hidden)
            self._run_layer()
        return used

    @property
    def awaits_decision(self) -> bool:
        """Whether rows may leave before the next layer attends; `move_out` reads what was decided."""
        return self._pending is not None

    def most_rows(self) -> list[list[int]]:
        """[B][L], rows of each prompt that the layers have or will have at most; nothing where prefixes are shared."""
        if self._known is not None:
            return []
        layers = [*self._seen, *[self.rows] * (self._layers - len(self._seen))]
        return list(map(list, zip(*(rows.lengths.host for rows in layers), strict=True)))

    def least_pages(self, more: Sequence[int]) -> list[int]:
        """[B], pages for each prompt and so many rows `more` in every layer, if its visual rows leave where they next
        may. Not less than what the layers hold up to there.
        """
        pages, rows, here = self.cache.pool.pages, self.rows, len(self._alike(self.next))
        behind = self._layers - self.next - here
        return [
            sum(pages(seen.lengths.host[b] + new) for seen in self._seen)
            + here * pages(n + new)
            + behind * pages(n - rows.n_visual[b] + new)
            for b, (n, new) in enumerate(zip(rows.lengths.host, more, strict=True))
        ]

    def _run_layer(self) -> None:
        layer, graphs = self.next, self._graphs if self._known is None else None
        if graphs is not None and not self._asked_last(layer) and graphs.take(self, layer, self.rows):
            self._hidden, self._x = self._captured(layer, graphs)
        else:
            first = layer == 0 and self._known is None
            if first or (graphs is not None and graphs.holds(self)):  # the layer writes into memory that is not its own
                self._hidden = self._hidden.clone()
            self.leave_graphs()
            self._hidden, self._x = self.decoder.layer(layer, self._hidden, self._x, self)
        self.next += 1
        if self._known is None:
            self._give_back(layer)
        else:
            self._known.passed(layer, self._hidden, self._queries_keys[0])
            if layer == self._known.stop:
                self._take_over(layer, self._known)
        if self._asked(layer):
            self._decide(layer)

    def _take_over(self, layer: int, known: KnownRows) -> None:
        """Continue with all rows, known ones too, which the cache has: the policy is going to look at them."""
        hidden, q, k = known.all_rows(layer, self._hidden, self._queries_keys[0])
        self.close()
        self._hidden, self._x = hidden, self.decoder.reenter(layer + 1, hidden)
        self._queries_keys = q, k
        self._reserved = [self.rows.lengths.host] * self.next

    def _captured(self, layer: int, graphs: LayerGraphs) -> tuple[Tensor, Tensor]:
        """As `Decoder.layer`. A pending decision is read when the projections are on their way, as in `attend`."""
        if not graphs.holds(self):
            self._hidden, self._x = graphs.admit(self, self.rows, self._hidden, self._x)
        hidden, qkv = self._hidden, graphs.project(layer, len(self._hidden))
        if self._pending is not None:
            self._prepare(layer)
            stay = self._settle()
            if not isinstance(stay, slice):
                if not graphs.take(self, layer, self.rows):
                    hidden, qkv = hidden[stay], qkv[stay]
                    self.leave_graphs()
                    return self.decoder.behind_projections(layer, hidden, qkv, self)
                hidden, self._x = graphs.keep(layer, self.rows, stay)
        self._enter(layer)
        total = len(hidden)
        graphs.load(range(layer, len(self._reserved)), self.cache.block_table)
        done = graphs.run(layer, len(self.rows.n_visual))
        self._queries_keys = done.q[:total], done.k[:total]
        if done.x is None:
            return hidden, self._x
        self.leave_graphs()
        return hidden, done.x[: len(self.rows.n_visual)].clone()  # the next replay writes over it

    def move_out(self) -> None:
        """The rows stay as they are, in memory of their own; a decision on them is read before.

        Pages that were taken ahead for those that leave go back: the next layer may have to wait.
        """
        stay = slice(None) if self._pending is None else self._settle()
        self._hidden, self._x = self._hidden[stay].clone(), self._x[stay].clone()
        self.leave_graphs()
        self._give_back(self.next)

    def leave_graphs(self) -> None:
        """The rows are no longer those in the graphs' memory."""
        if self._graphs is not None:
            self._graphs.leave(self)

    def _asked(self, layer: int) -> bool:
        return layer in self._ask and any(self.rows.n_visual)

    def _asked_last(self, layer: int) -> bool:
        """Whether the policy wants to see all rows of the last layer."""
        return layer == self._layers - 1 and self._asked(layer)

    def _only_last(self, layer: int) -> bool:
        """The other rows of the last layer would feed nothing but the cache."""
        return layer == self._layers - 1 and not self._asked(layer) and layer >= len(self.rows.additions)

    def attend(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerRows`. A decision is read only here, behind the projections: the device computes them meanwhile."""
        if self._pending is not None:
            self._prepare(layer)
            stay = self._settle()
            hidden, q, k, v = (rows[stay] for rows in (hidden, q, k, v))
        self._enter(layer)
        pack, pool, scale = self._pack, self.cache.pool, self.decoder.scale
        table, lengths = self.cache.block_table[layer], pack.lengths
        table = table if pack.order is None else table[pack.order]
        before = self.cache.lens[layer] if pack.before is None else pack.before
        cos_sin, _ = self.rows.rotation_table(self.decoder.cos_sin)
        ops.rope_append_(q, k, v, cos_sin, pack.turns, lengths.cu, pool.k, pool.v, table, before)
        if self._known is not None:
            self._known.written(layer)
        if self._watch is not None:
            self._watch(layer, q, k, self.rows)
        self._queries_keys = q, k
        if self._only_last(layer):
            counts = (pack.seen or lengths).counts
            return hidden[lengths.last], ops.decode_attention(q[lengths.last], pool.k, pool.v, table, counts, scale)
        if pack.seen is None:
            return hidden, self._attention(q, k, v, lengths, scale)
        cached = Paged(pool.k, pool.v, table, before, pack.seen)
        return hidden, attend_pages(self._attention, q, lengths, scale, cached)

    def added(self, layer: int) -> Tensor | None:
        """See `LayerRows`."""
        additions = self.rows.additions
        return additions[layer][self._pack.rows] if layer < len(additions) else None

    @property
    def _pack(self) -> Pack:
        """What passes through the next layer."""
        if self._known is not None:
            return self._known.pack
        return Pack(self.rows.source, self.rows.rotation_table(self.decoder.cos_sin)[1], self.rows.lengths)

    def _enter(self, layer: int) -> None:
        """These rows are what this layer sees."""
        self._seen.append(self.rows)
        if self._known is not None:
            self._known.enter(layer)
            return
        host = self.rows.lengths.host
        if layer == len(self._reserved) or any(map(operator.gt, host, self._reserved[layer])):
            layers = self._alike(layer)
            self.cache.reserve(layers, host)
            self._have_reserved(layer, [host] * len(layers))

    def _alike(self, layer: int) -> range:
        """From this layer to where tokens may leave again: these see the same rows, and take pages together."""
        may_leave = [later for later in self._ask if later >= layer] if any(self.rows.n_visual) else []
        return range(layer, 1 + min(may_leave, default=self._layers - 1))

    def _reserve_ahead(self, layer: int) -> bool:
        """Unless they have some: pages for all rows that this and the later layers may see, if so many were claimed.

        So no page has to be found, nor its number copied, where the device waits for what follows a decision. Returns
        whether they were taken.
        """
        if layer < len(self._reserved):
            return False
        visual = self.rows.n_visual
        most = np.array([at_most(self._policy, n, self._layers)[layer:] for n in self.rows.n_entered]).T
        rows = np.minimum(most, visual) + np.subtract(self.rows.lengths.host, visual)  # [layers, B]
        taken = self.cache.reserve_claimed(range(layer, self._layers), rows)
        if taken:
            self._have_reserved(layer, rows.tolist())
        return taken

    def _have_reserved(self, layer: int, rows: list[list[int]]) -> None:
        self._reserved[layer : layer + len(rows)] = rows
        if self._graphs is not None:
            self._graphs.unload(self)

    def _give_back(self, layer: int) -> None:
        """What this layer and those behind it have beyond the rows that are left.

        When it is on its way; earlier where nothing waits for it, since claims may fall to what `most_rows` says.
        """
        host, ahead = self.rows.lengths.host, self._reserved[layer:]
        if ahead and ahead[0] != host:
            self.cache.trim(range(layer, len(self._reserved)), host)
            self._reserved[layer:] = [list(map(min, rows, host)) for rows in ahead]

    def _prepare(self, layer: int) -> None:
        """What need not wait for the decision that is under way, nor be made when it is there; one thing at a time."""
        assert self._pending is not None
        graphs = self._graphs if self._graphs is not None and self._graphs.holds(self) else None
        if self._reserve_ahead(layer):
            if graphs is not None:
                graphs.load(range(layer, self._layers), self.cache.block_table)
            return
        rows, decision = self.rows, self._pending[1]
        dropped = None
        if isinstance(decision, Awaited):
            _check(self._policy, decision.likely, rows)
            dropped = rows.drop(decision.likely)
            self._likely = None if dropped is None else (decision.likely, dropped)
        elif sum(map(bool, rows.n_visual)) == 1:  # of one alone most policies take out all, if any
            dropped = rows.text_only
        if graphs is not None and dropped is not None:
            graphs.expect(*dropped)

    def _decide(self, layer: int) -> None:
        if self._known is not None:
            return self._known.decide(layer, self._hidden)
        state = LayerState(layer, self.decoder, self._hidden, *self._queries_keys, self.rows, self._memory)
        self._pending = state, self._policy.decide(state)
        if not callable(self._pending[1]) or layer == -1 or self.done:
            stay = self._settle()
            if not isinstance(stay, slice):
                self.leave_graphs()
                self._hidden, self._x = self._hidden[stay], self._x[stay]
                self._give_back(self.next)

    def _settle(self) -> Tensor | slice:
        """Carry the pending decision out. Returns an index of the rows that stay."""
        assert self._pending is not None
        state, decision = self._pending
        before, layer = state.rows, state.layer
        settled = decision() if callable(decision) else decision
        _check(self._policy, settled, before)
        self._pending = None
        likely, self._likely = self._likely, None
        if likely is not None and all(map(operator.is_, likely[0], settled)):
            dropped: tuple[Rows, Tensor] | None = likely[1]
        else:
            dropped = before.drop(settled)
        if dropped is None:
            return slice(None)
        self.rows, stay = dropped
        lost = [old != new for old, new in zip(before.n_visual, self.rows.n_visual, strict=True)]
        for b, left in enumerate(self.rows.n_visual):
            if lost[b] and not left:
                self._exit_layers[b] = layer
        if self._policy.renumbers(layer, self._layers):
            self.rows = self.rows.renumbered(lost)
        return stay

    def finish(self) -> Prefilled:
        """When it is done: the cache gets its lengths."""
        known, pack, last = self._known, self._pack, self._x
        if len(last) > len(pack.lengths.host):
            last = last[pack.lengths.last]
        if pack.order is not None:
            last = last.new_zeros(len(self._exit_layers), last.shape[1]).index_copy_(0, pack.order, last)
        logits = self.decoder.logits(last)  # before what only the second token needs
        counts = [rows.lengths.host for rows in self._seen] if known is None else known.counts
        exit_layers = self._exit_layers if known is None else known.left
        self.cache.set_lens(counts, torch.stack([rows.next_positions for rows in self._seen]))
        if self._drop_early_kv:
            self._compact_early_layers()
        self.close()
        reused = self._reused + [[0] * len(exit_layers)] * (self._layers - len(self._reused))
        return Prefilled(logits, exit_layers, counts, reused, self._frontiers)

    def give_up(self, sequence: int) -> None:
        """Free one that is under way: if its rows are computed any further, it is for nothing."""
        if self._known is not None:
            self._known.keep()
        self.cache.give_up(sequence)
        if self._graphs is not None:
            self._graphs.unload(self)

    def close(self) -> None:
        """Prefixes stay as deep as they are. It holds nothing else but its cache."""
        self.leave_graphs()
        known, self._known = self._known, None
        if known is not None:
            self._reused, self._frontiers = known.reused, known.frontiers
            known.close(self._hidden, self.done)

    def _compact_early_layers(self) -> None:
        """Every layer keeps the rows that were left at the end."""
        final = self.rows
        early = [rows for rows in self._seen if rows is not final]  # rows only leave, so these are the first layers
        if not early:
            return
        alive = torch.zeros(self._entered, dtype=torch.bool, device=final.source.device)
        alive.index_fill_(0, final.source, True)  # an assignment would wait for the device
        total = sum(final.lengths.host)
        keep, cu = [], [final.lengths.cu[:1]]
        for number, rows in enumerate(early):
            kept = torch.nonzero_static(alive[rows.source], size=total)[:, 0]
            first = torch.repeat_interleave(rows.lengths.cu[:-1], final.row_counts.long(), output_size=total)
            keep.append((kept - first).to(torch.int32))
            cu.append(final.lengths.cu[1:] + number * total)
        self.cache.compact(len(early), torch.cat(keep), torch.cat(cu), final.lengths.host)


def _check(policy: VisualTokenPolicy, decision: Any, rows: Rows) -> None:
    """Raises InvalidArgumentError for what is no decision. Numbers on a CUDA device are trusted: a look would wait."""
    count = len(rows.n_visual)
    right = isinstance(decision, (list, tuple)) and len(decision) == count
    if not (right and all(_stays(keep, n) for keep, n in zip(decision, rows.n_visual, strict=True))):
        accepted = (
            f"for each of {count} sequences None or ascending int64 numbers of visual rows, below {rows.n_visual}"
        )
        raise InvalidArgumentError(f"{type(policy).__name__} decided {str(decision)[:200]}; accepted: {accepted}")


def _stays(keep: Any, n: int) -> bool:
    """Whether `keep` says which of n rows stay."""
    if keep is None:
        return True
    if not (isinstance(keep, Tensor) and keep.dtype == torch.int64 and keep.dim() == 1 and len(keep) <= n):
        return False
    return keep.is_cuda or len(keep) == 0 or bool(keep[0] >= 0 and keep[-1] < n and (keep.diff() > 0).all())
