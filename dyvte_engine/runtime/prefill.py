"""The prompt's way through the layers: at every layer boundary a policy may take visual tokens out (spec section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.attention import AttentionFn
from ..models.decoder import Decoder
from ..models.rows import Rows
from ..policies import Decision, LayerState, VisualTokenPolicy
from .kv_cache import KVCache
from .text_graphs import TextGraphs

# Called in every layer with its number, the rotated q [N, Hq, D] and k [N, Hkv, D] of all its rows, and their rows.
Watch = Callable[[int, Tensor, Tensor, Rows], None]


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What a prefill leaves behind beside the cache.

    Attributes:
        hidden: [B, d], the last row of each sequence after the final norm.
        exit_layers: layer after which the last visual token left (-1: before the first), None if some stayed or there
            were none.
        rows: [L][B], rows each layer computed.
    """

    hidden: Tensor
    exit_layers: list[int | None]
    rows: list[list[int]]


def prefill(
    decoder: Decoder,
    attend: AttentionFn,
    cache: KVCache,
    inputs_embeds: Tensor,
    rows: Rows,
    policy: VisualTokenPolicy,
    drop_early_kv: bool = False,
    watch: Watch | None = None,
    graphs: TextGraphs | None = None,
) -> Prefilled:
    """Run packed prompts through all layers and fill an empty cache.

    inputs_embeds [N, d] with its `rows`. With `drop_early_kv` the rows that left are afterwards compacted out of the
    earlier layers' K/V too, so that decoding no longer attends to them anywhere. `watch` sees every layer's attention.
    `graphs` run the layers that see text only, unless they are watched.
    """
    num_layers = decoder.shape.num_layers
    ask = policy.layers(num_layers) if any(rows.n_visual) else set()
    if not drop_early_kv:
        ask = ask - {num_layers - 1}  # nothing follows the last layer
    seen: list[Rows] = []
    exit_layers: list[int | None] = [None] * len(rows.n_visual)
    memory: dict[VisualTokenPolicy, Any] = {}
    only_last, reserved = False, 0
    pending = None  # a decision still to be read, and what it was asked about
    hidden = inputs_embeds.clone()
    if -1 in ask:
        none = hidden.new_empty(0, 0, 0)
        state = LayerState(-1, decoder, hidden, none, none, rows, memory)
        rows, stay = _leave(policy, state, policy.decide(state), exit_layers)
        hidden = hidden[stay]
    x = ops.rms_norm(hidden, decoder.layers[0].input_norm, decoder.eps)
    space = decoder.space(len(hidden))
    for number, layer in enumerate(decoder.layers):
        if graphs is not None and watch is None and graphs.take(number, rows):
            if number >= reserved:
                cache.reserve(range(number, num_layers), rows.lengths.host)
            seen += [rows] * (num_layers - number)
            x, only_last = graphs.run(number, cache, rows, hidden, x), True
            break
        q, k, v = layer.project_qkv(x)
        if pending is not None:
            rows, stay = _leave(policy, *pending, exit_layers)
            hidden, q, k, v = (rows[stay] for rows in (hidden, q, k, v))
            pending = None
        seen.append(rows)
        may_leave = any(rows.n_visual)
        if number >= reserved:  # up to where tokens may leave again, layers see these rows: they take pages together
            reserved = 1 + min((later for later in ask if later >= number and may_leave), default=num_layers - 1)
            cache.reserve(range(number, reserved), rows.lengths.host)
        asked = may_leave and number in ask
        # The other rows of the last layer would feed nothing but the cache.
        only_last = number == num_layers - 1 and not asked and number >= len(rows.additions)
        attended = _attention(decoder, number, attend, cache, q, k, v, rows, only_last)
        if watch is not None:
            watch(number, q, k, rows)
        if only_last:
            hidden = hidden[rows.last_rows]
        added = rows.additions[number][rows.source] if number < len(rows.additions) else None
        x = decoder.after_attention(number, hidden, attended, space, added)
        if asked:
            state = LayerState(number, decoder, hidden, q, k, rows, memory)
            decision = policy.decide(state)
            if callable(decision):
                pending = state, decision
            else:
                rows, stay = _leave(policy, state, decision, exit_layers)
                hidden, x = hidden[stay], x[stay]
    if pending is not None:
        rows, stay = _leave(policy, *pending, exit_layers)
        x = x[stay]
    last = x if only_last else x[rows.last_rows]
    counts = [p.lengths.host for p in seen]
    cache.set_lens([p.row_counts for p in seen], counts)
    torch.stack([p.next_positions for p in seen], out=cache.positions)
    if drop_early_kv:
        _compact_early_layers(cache, seen, rows)
    return Prefilled(last, exit_layers, counts)


def _leave(
    policy: VisualTokenPolicy,
    state: LayerState,
    decision: Decision | Callable[[], Decision],
    exit_layers: list[int | None],
) -> tuple[Rows, Tensor | slice]:
    """The rows and an index of the rows that stay. Writes into `exit_layers` whose last visual token left."""
    before, layer = state.rows, state.layer
    dropped = before.drop(decision() if callable(decision) else decision)
    if dropped is None:
        return before, slice(None)
    rows, stay = dropped
    for b, (old, new) in enumerate(zip(before.n_visual, rows.n_visual, strict=True)):
        exit_layers[b] = layer if old and not new else exit_layers[b]
    if policy.renumbers(layer, state.num_layers):
        rows = rows.renumbered([o != n for o, n in zip(before.n_visual, rows.n_visual, strict=True)])
    return rows, stay


def _attention(
    decoder: Decoder,
    number: int,
    attend: AttentionFn,
    cache: KVCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    only_last: bool,
) -> Tensor:
    """q [N, Hq, D], k and v [N, Hkv, D] of a layer -> attended rows, like q, or [B, Hq, D] if `only_last`.

    q and k are rotated in place; k and v enter the cache.
    """
    pool, lengths = cache.pool, rows.lengths
    table, empty = cache.block_table[number], cache.lens[number]
    cos_sin, positions = rows.rotation_table(decoder.cos_sin)
    ops.rope_append_(q, k, v, cos_sin, positions, lengths.cu, pool.k, pool.v, table, empty)
    if only_last:
        return ops.decode_attention(q[rows.last_rows], pool.k, pool.v, table, rows.row_counts, decoder.scale)
    return attend(q, k, v, lengths, decoder.scale)


def _compact_early_layers(cache: KVCache, seen: Sequence[Rows], final: Rows) -> None:
    """Every layer keeps the rows that were left at the end of the prefill."""
    early = [p for p in seen if p is not final]  # seen only shrink, so these are the first layers
    if not early:
        return
    alive = torch.zeros(len(seen[0].source), dtype=torch.bool, device=final.source.device)
    alive[final.source] = True
    total = sum(final.lengths.host)
    keep, cu = [], [final.lengths.cu[:1]]
    for number, p in enumerate(early):
        rows = torch.nonzero_static(alive[p.source], size=total)[:, 0]
        first = torch.repeat_interleave(p.lengths.cu[:-1], final.row_counts.long(), output_size=total)
        keep.append((rows - first).to(torch.int32))
        cu.append(final.lengths.cu[1:] + number * total)
    cache.compact(len(early), torch.cat(keep), torch.cat(cu), [list(final.lengths.host)] * len(early))
