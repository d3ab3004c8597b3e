"""The prompt's way through the layers: at every layer boundary a policy may take visual tokens out (spec section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .attention import AttentionFn
from .kv_cache import KVCache
from .models.decoder import Decoder, DecoderLayer
from .policies import LayerState, VisualTokenPolicy
from .segments import Pack

# Called in every layer with its number, the rotated q [N, Hq, D] and k [N, Hkv, D] of all its rows, and their pack.
Watch = Callable[[int, Tensor, Tensor, Pack], None]


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
    pack: Pack,
    policy: VisualTokenPolicy,
    drop_early_kv: bool = False,
    watch: Watch | None = None,
) -> Prefilled:
    """Run packed prompts through all layers and fill an empty cache.

    inputs_embeds [N, d] with its `pack`. With `drop_early_kv` the rows that left are afterwards compacted out of the
    earlier layers' K/V too, so that decoding no longer attends to them anywhere. `watch` sees every layer's attention.
    """
    num_layers = decoder.shape.num_layers
    ask = policy.layers(num_layers) if any(pack.n_visual) else set()
    if not drop_early_kv:
        ask = ask - {num_layers - 1}  # nothing follows the last layer
    norms = [layer.input_norm for layer in decoder.layers[1:]] + [decoder.norm]
    packs: list[Pack] = []
    exit_layers: list[int | None] = [None] * len(pack.n_visual)
    memory: dict[VisualTokenPolicy, Any] = {}
    only_last = False
    hidden = inputs_embeds.clone()
    if -1 in ask:
        none = hidden.new_empty(0, 0, 0)
        pack, hidden = _leave(policy, LayerState(-1, decoder, hidden, none, none, pack, memory), exit_layers)
    x = ops.rms_norm(hidden, decoder.layers[0].input_norm, decoder.eps)
    for number, layer in enumerate(decoder.layers):
        packs.append(pack)
        asked = number in ask and any(pack.n_visual)
        plain = not asked and number >= len(pack.additions)
        only_last = number == num_layers - 1 and plain  # its other rows would feed nothing but the cache
        q, k, attended = _attention(decoder, layer, number, attend, cache, x, pack, only_last)
        if watch is not None:
            watch(number, q, k, pack)
        if only_last:
            hidden = hidden[pack.last_rows]
        x = ops.add_rms_norm_(hidden, layer.project_out(attended), layer.post_norm, layer.eps)
        out = layer.mlp(x)
        if plain:
            x = ops.add_rms_norm_(hidden, out, norms[number], decoder.eps)
            continue
        hidden += out
        if number < len(pack.additions):
            hidden += pack.additions[number][pack.source]
        if asked:
            pack, hidden = _leave(policy, LayerState(number, decoder, hidden, q, k, pack, memory), exit_layers)
        x = ops.rms_norm(hidden, norms[number], decoder.eps)
    last = x if only_last else x[pack.last_rows]
    rows = cache.host_lens.tolist()
    if drop_early_kv:
        _compact_early_layers(cache, packs, pack)
    torch.stack([p.next_positions for p in packs], out=cache.positions)
    return Prefilled(last, exit_layers, rows)


def _leave(policy: VisualTokenPolicy, state: LayerState, exit_layers: list[int | None]) -> tuple[Pack, Tensor]:
    """Ask the policy; the pack and the rows that stay. Writes into `exit_layers` whose last visual token left."""
    before, layer = state.pack, state.layer
    dropped = before.drop(policy.decide(state))
    if dropped is None:
        return before, state.hidden
    pack, index = dropped
    for b, (old, new) in enumerate(zip(before.n_visual, pack.n_visual, strict=True)):
        exit_layers[b] = layer if old and not new else exit_layers[b]
    if policy.renumbers(layer, state.num_layers):
        pack = pack.renumbered([o != n for o, n in zip(before.n_visual, pack.n_visual, strict=True)])
    return pack, state.hidden[index]


def _attention(
    decoder: Decoder,
    layer: DecoderLayer,
    number: int,
    attend: AttentionFn,
    cache: KVCache,
    x: Tensor,
    pack: Pack,
    only_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, d] -> rotated q and k, attended rows ([B, Hq, D] if `only_last`, else [N, Hq, D]); K/V enter the cache."""
    q, k, v = layer.project_qkv(x)
    pool, lengths = cache.pool, pack.lengths
    cache.reserve(number, lengths.host)
    table, lens = cache.block_table[number], cache.lens[number]
    cos_sin, positions = pack.turns(decoder.cos_sin)
    ops.rope_append_(q, k, v, cos_sin, positions, lengths.cu, pool.k, pool.v, table, lens)
    cache.set_lens(number, pack.row_counts, lengths.host)
    if only_last:
        return q, k, ops.decode_attention(q[pack.last_rows], pool.k, pool.v, table, lens, decoder.scale)
    return q, k, attend(q, k, v, lengths, decoder.scale)


def _compact_early_layers(cache: KVCache, packs: Sequence[Pack], final: Pack) -> None:
    """Every layer keeps the rows that were left at the end of the prefill."""
    early = [p for p in packs if p is not final]  # packs only shrink, so these are the first layers
    if not early:
        return
    alive = torch.zeros(len(packs[0].source), dtype=torch.bool, device=final.source.device)
    alive[final.source] = True
    total = sum(final.lengths.host)
    keep, cu = [], [final.lengths.cu[:1]]
    for number, p in enumerate(early):
        rows = torch.nonzero_static(alive[p.source], size=total)[:, 0]
        first = torch.repeat_interleave(p.lengths.cu[:-1], final.row_counts.long(), output_size=total)
        keep.append((rows - first).to(torch.int32))
        cu.append(final.lengths.cu[1:] + number * total)
    cache.compact(len(early), torch.cat(keep), torch.cat(cu), [list(final.lengths.host)] * len(early))
