"""How much arithmetic a prefill is, in the paper's accounting (spec section 4) and as really done here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import DecoderShape


def paper_flops(shape: DecoderShape, rows: Sequence[int], vision: float = 0.0) -> float:
    """FLOPs of a prefill in the paper's count: 2(4 n d^2 + 3 n d m) + 4 n^2 d a layer, `rows` n of each layer.

    Every projection counted d x d, full n^2 attention, LM head left out; `vision` is added as it is.
    """
    d, m = shape.hidden_size, shape.intermediate_size
    return vision + sum(2.0 * (4 * n * d * d + 3 * n * d * m) + 4.0 * n * n * d for n in rows)


def true_flops(shape: DecoderShape, rows: Sequence[int], vision: float = 0.0) -> float:
    """The same with grouped-query projections at their own width, causal attention and the LM head of one row."""
    d, m = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layers = sum(2.0 * n * (2 * d * q + 2 * d * kv + 3 * d * m) + 4.0 * q * n * (n + 1) / 2 for n in rows)
    return vision + layers + 2.0 * d * shape.vocab_size


def vision_flops(config: Any, merges: Sequence[int] = ()) -> float:
    """FLOPs of one picture through a ViT tower (HF vision config), with its two-matrix MLP and its class token.

    `merges`: rows that each block merges away between its attention and its MLP (ToMe).
    """
    if getattr(config, "image_size", None) is None or not isinstance(getattr(config, "patch_size", None), int):
        return 0.0
    n = (config.image_size // config.patch_size) ** 2 + (config.model_type == "clip_vision_model")
    d, m = config.hidden_size, config.intermediate_size
    total = 0.0
    for merged in [*merges, *[0] * (config.num_hidden_layers - len(merges))]:
        total += 8.0 * n * d * d + 4.0 * n * n * d
        n -= merged
        total += 4.0 * n * d * m
    return total
