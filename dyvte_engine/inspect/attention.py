"""Where the text looks: its attention to every visual token in each layer, and which patch of the picture that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..analysis.attention import attention_rows
from ..models.rows import Rows

if TYPE_CHECKING:
    from ..models import VisionLanguageModel


def text_attention(q: Tensor, k: Tensor, visual: Tensor, n_tail: int, scale: float) -> Tensor:
    """f32 [n_visual]: what each visual row gets of the attention of the last `n_tail` rows, mean over heads and rows.

    q [n, Hq, D], k [n, Hkv, D], rotated; visual bool [n]. The sum is the share of the text's attention that goes to
    pictures.
    """
    n = len(k)
    total = torch.zeros(n, device=k.device)
    for p in attention_rows(q, k, torch.arange(n - n_tail, n, device=k.device), scale):  # [Hkv, b, Hq / Hkv, m]
        total[: p.shape[-1]] += p.mean((0, 2)).sum(0)
    return total[visual] / n_tail


@dataclass
class AttentionWatch:
    """Sees every layer of the prefill of one prompt; `table` f32 [L, n_visual] afterwards."""

    scale: float
    layers: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, rows: Rows) -> None:
        self.layers.append(text_attention(q, k, rows.visual, rows.n_tail[0], self.scale).cpu())

    @property
    def table(self) -> np.ndarray:
        return torch.stack(self.layers).numpy()


@dataclass
class RowsWatch:
    """Sees which rows of one prompt every layer has; of visual ones their numbers at the entry, int64 [n] each."""

    text: list[int] = field(default_factory=list)
    visual: list[np.ndarray] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, rows: Rows) -> None:
        self.text.append(rows.lengths.host[0] - rows.n_visual[0])
        self.visual.append(rows.source[rows.visual].cpu().numpy())


def grid_of(model: VisionLanguageModel, picture: Image.Image, pictures: list[int]) -> tuple[int, int] | None:
    """Rows and columns of the patches that a picture's visual tokens stand for, one after the other.

    pictures: lengths of the prompt's unbroken stretches of visual rows. None where they form no single grid: families
    that cut a picture into tiles, or put rows of other kinds between.
    """
    inputs, count = _processed(model, picture), sum(pictures)
    if "image_grid_thw" in inputs:
        frames, height, width = inputs["image_grid_thw"][0].tolist()
        merged = math.isqrt(frames * height * width // count)
        return (height // merged, width // merged) if frames == 1 and len(pictures) == 1 else None
    if inputs["pixel_values"].shape[:-3].numel() != 1:  # tiles
        return None
    if len(pictures) > 1:  # each row of patches is a stretch
        return (len(pictures), pictures[0]) if len(set(pictures)) == 1 else None
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def as_seen(model: VisionLanguageModel, picture: Image.Image) -> Image.Image:
    """The picture as the vision tower gets it: cut and scaled by the processor, its colours as they were.

    The picture itself where the processor keeps its shape (pictures of any size).
    """
    pixels = _processed(model, picture)["pixel_values"]
    if pixels.dim() != 4 or len(pixels) != 1 or not model.family.tiles:
        return picture
    processor = model.processor.image_processor
    mean, std = (torch.tensor(getattr(processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    if not processor.do_normalize:
        mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    shown = ((pixels[0].float() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(shown.permute(1, 2, 0).numpy())


def _processed(model: VisionLanguageModel, picture: Image.Image) -> Any:
    return model.processor.image_processor(images=[picture], return_tensors="pt")
