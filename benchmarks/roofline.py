"""How much arithmetic and memory traffic one request is at least: vision, prefill, one decoding step.

FLOPs are counted truly (`dyvte_engine.flops`), two for a multiply-add. Bytes: every weight once per pass, K/V rows
written once in the prefill and read once per step; activations are left out, since a fused pass keeps them in caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.common import Limits
from dyvte_engine import Engine
from dyvte_engine.config import DecoderShape
from dyvte_engine.flops import true_flops, true_layer, vision_flops

Rows = Sequence[Sequence[int]]  # [sequence][layer]


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one pass."""

    flops: float
    bytes: float

    def seconds(self, limits: Limits) -> float:
        return limits.seconds(self.flops, self.bytes)


def weight_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def vision_work(engine: Engine, pictures: int, merges: Sequence[int] = ()) -> Work:
    """The tower (ToMe's `merges` a block) and the projector, over all pictures of a batch."""
    model, vision = engine.model.hf.model, engine.model.hf.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 - sum(merges)
    projector = 2.0 * tokens * sum(p.numel() for p in model.multi_modal_projector.parameters() if p.dim() == 2)
    moved = weight_bytes(model.vision_tower) + weight_bytes(model.multi_modal_projector)
    return Work(pictures * (vision_flops(vision, merges) + projector), moved)


def layer_bytes(engine: Engine) -> int:
    """Weights that every pass of the language model reads: all layers, final norm, LM head (not the embedding)."""
    lm = engine.model.language_model
    return weight_bytes(lm.layers) + weight_bytes(lm.norm) + weight_bytes(engine.model.hf.lm_head)


def prefill_work(engine: Engine, rows: Rows) -> Work:
    """The prompt through the layers; `rows` each sequence has in each layer."""
    shape, item = engine.model.shape, engine.config.dtype.itemsize
    flops = sum(true_flops(shape, r) for r in rows)
    written = shape.kv_bytes_per_row * item * sum(map(sum, rows))
    return Work(flops, layer_bytes(engine) + written)


def decode_work(engine: Engine, rows: Rows) -> Work:
    """One token of every sequence, `rows` of K/V already in each layer."""
    shape, item = engine.model.shape, engine.config.dtype.itemsize
    flops = sum(_token_flops(shape, r) for r in rows)
    return Work(flops, layer_bytes(engine) + shape.kv_bytes_per_row * item * sum(map(sum, rows)))


def _token_flops(shape: DecoderShape, rows: Sequence[int]) -> float:
    weights = shape.num_layers * (true_layer(shape, 1) - 4.0 * shape.num_heads * shape.head_dim)
    attention = 4.0 * shape.num_heads * shape.head_dim * sum(n + 1 for n in rows)
    return weights + attention + 2.0 * shape.hidden_size * shape.vocab_size


def share(limit_seconds: float, measured: float | None) -> Any:
    """How much of the machine a pass used: 1 is the roofline; None where nothing was measured."""
    return None if not measured else limit_seconds / measured
