"""How much arithmetic a prefill is: in the paper's accounting (docs/method.md section 4), and counted truly.

All figures are FLOPs, two for a multiply-add. Nothing here runs a model: shapes and token counts go in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .config import DecoderShape
from .errors import InvalidArgumentError

LayerFlops = Callable[[DecoderShape, float], float]


def paper_layer(shape: DecoderShape, n: float) -> float:
    """One decoder layer over n rows in the paper's count: 2(4 n d^2 + 3 n d m) + 4 n^2 d.

    Every projection counted d x d, full n^2 attention.
    """
    d, m = shape.hidden_size, shape.intermediate_size
    return 2.0 * (4 * n * d * d + 3 * n * d * m) + 4.0 * n * n * d


def true_layer(shape: DecoderShape, n: float) -> float:
    """One decoder layer over n rows with grouped-query projections at their own width and causal attention."""
    d, m = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return 2.0 * n * (2 * d * q + 2 * d * kv + 3 * d * m) + 4.0 * q * n * (n + 1) / 2


def paper_flops(shape: DecoderShape, rows: Sequence[int], vision: float = 0.0) -> float:
    """A prefill in the paper's count, `rows` n of each layer; LM head left out, `vision` added as it is."""
    return vision + sum(paper_layer(shape, n) for n in rows)


def true_flops(shape: DecoderShape, rows: Sequence[int], vision: float = 0.0) -> float:
    """The same counted truly (`true_layer`), with the LM head of one row."""
    return vision + sum(true_layer(shape, n) for n in rows) + 2.0 * shape.hidden_size * shape.vocab_size


def leaving_flops(
    shape: DecoderShape,
    n: float,
    leave: float,
    layer: float,
    vision: float = 0.0,
    count: LayerFlops = paper_layer,
) -> float:
    """All layers when layers 0..layer compute n tokens and the others n - leave (an exit: leave = visual tokens).

    `layer` may be the mean of several prompts of one length: the sum is linear in it. -1: gone before the first layer.
    With `count=true_layer` the LM head is still left out.

    Raises:
        InvalidArgumentError: a layer outside -1 to num_layers - 1, or more tokens leaving than there are.
    """
    if not -1 <= layer <= shape.num_layers - 1:
        raise InvalidArgumentError(f"layer is {layer}; accepted: -1 to {shape.num_layers - 1}")
    if not 0 <= leave <= n:
        raise InvalidArgumentError(f"leave is {leave}; accepted: 0 to n, {n}")
    with_them, after = layer + 1, shape.num_layers - 1 - layer
    return vision + with_them * count(shape, n) + after * count(shape, n - leave)


def prompt_length(flops: float, shape: DecoderShape, vision: float = 0.0) -> float:
    """Tokens n at which a prefill that keeps all of them takes `flops` in the paper's count.

    Solves L (2(4 d^2 + 3 d m) n + 4 d n^2) = flops - vision; a table's baseline cell so gives its mean prompt.

    Raises:
        InvalidArgumentError: `flops` is not above `vision`.
    """
    if flops <= vision:
        raise InvalidArgumentError(f"flops is {flops:.4g}; accepted: above vision, {vision:.4g}")
    d, m = shape.hidden_size, shape.intermediate_size
    a, b, c = 4.0 * d, 8.0 * d * d + 6.0 * d * m, (flops - vision) / shape.num_layers
    return 2 * c / (b + (b * b + 4 * a * c) ** 0.5)


def tower_flops(
    tokens: int, hidden_size: int, intermediate_size: int, num_layers: int, merges: Sequence[int] = ()
) -> float:
    """One picture through a ViT of two-matrix MLPs: a layer is 2(4 n d^2 + 2 n d m) + 4 n^2 d.

    `merges`: rows that each block merges away between its attention and its MLP (ToMe).
    """
    n, d, total = tokens, hidden_size, 0.0
    for merged in [*merges, *[0] * (num_layers - len(merges))]:
        total += 8.0 * n * d * d + 4.0 * n * n * d
        n -= merged
        total += 4.0 * n * d * intermediate_size
    return total


def vision_flops(config: Any, merges: Sequence[int] = ()) -> float:
    """FLOPs of one picture through the tower of a HF vision config, its class token included; 0 if it is no plain ViT.

    `merges` as in `tower_flops`.
    """
    image, patch = _side(getattr(config, "image_size", None)), _side(getattr(config, "patch_size", None))
    if image is None or patch is None:
        return 0.0
    tokens = (image // patch) ** 2 + (config.model_type in ("clip_vision_model", "dinov2", "internvl_vision"))
    width = getattr(config, "intermediate_size", None) or int(config.mlp_ratio * config.hidden_size)  # DINOv2: a ratio
    return tower_flops(tokens, config.hidden_size, width, config.num_hidden_layers, merges)


def _side(size: Any) -> int | None:
    """Of a square, given as one number or two; None for anything else."""
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None
