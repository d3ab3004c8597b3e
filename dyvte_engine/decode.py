"""One token step for a running batch: every layer reads the K/V it has, which after an exit differs per layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .kv_cache import KVCache
from .models.decoder import Decoder


def decode_step(decoder: Decoder, cache: KVCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens int64 [B] at positions int32 [L, B] -> f32 logits [B, vocab]; appends one row to every layer's cache."""
    cache.reserve_next()
    pool, layers = cache.pool, decoder.layers
    cu = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
    tables, lens, kv_lens = cache.block_table.unbind(), cache.lens.unbind(), (cache.lens + 1).unbind()
    norms = [layer.input_norm for layer in layers[1:]] + [decoder.norm]
    hidden = F.embedding(tokens, decoder.embed.weight)  # [B, d]
    x = ops.rms_norm(hidden, layers[0].input_norm, decoder.eps)
    for number, layer in enumerate(layers):
        q, k, v = layer.project_qkv(x)
        ops.rope_append_(q, k, v, decoder.cos_sin, positions[number], cu, pool.k, pool.v, tables[number], lens[number])
        attended = ops.decode_attention(q, pool.k, pool.v, tables[number], kv_lens[number], decoder.scale)
        x = ops.add_rms_norm_(hidden, layer.project_out(attended), layer.post_norm, layer.eps)
        x = ops.add_rms_norm_(hidden, layer.mlp(x), norms[number], decoder.eps)
    cache.advance()
    return decoder.logits(x)
