"""Pictures composed from sprites, a batch at a time, on the sprites' device.

A layout says what is where; painting it is plain tensor arithmetic, so that pictures for training can be made on the
GPU as fast as they are used, and are the same pictures (to rounding) that the evaluation draws one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import ImageFont

TILE = 1.28  # side of the coloured tile under a sprite, in sprites


@dataclass(frozen=True)
class Placed:
    """A sprite's number in its style's atlas, its centre and side (of the picture's side), its tile's colour (RGB)."""

    sprite: int
    x: float
    y: float
    side: float
    tile: tuple[int, int, int] | None


@dataclass(frozen=True)
class Printed:
    """Text in a font file of matplotlib, centre x and y, height of a capital (of the picture's side), ink (RGB)."""

    text: str
    font: str
    x: float
    y: float
    height: float
    ink: tuple[int, int, int]


def typeset(word: Printed, size: int) -> tuple[ImageFont.FreeTypeFont, tuple[int, int]]:
    """The font, made smaller until the word fits into a picture of `size` pixels, and where its text begins there."""
    from PIL import ImageFont

    from .shapes import font_file

    points = max(6, round(word.height * size / 0.72))  # a capital is about 0.72 of the font size
    while True:
        font = ImageFont.truetype(font_file(word.font), points)
        left, top, right, bottom = font.getbbox(word.text)
        if right - left <= size - 4 or points <= 6:
            break
        points -= 1
    at = [
        math.floor(min(max(centre * size - length / 2, 2), max(size - length - 2, 2)) - first)
        for centre, length, first in ((word.x, right - left, left), (word.y, bottom - top, top))
    ]
    return font, (at[0], at[1])


@dataclass(frozen=True)
class Layout:
    """One picture. The background runs from `ground[0]` to `ground[1]` (RGB) along `angle`, with noise on it.

    `waves`: 0 a gradient, else that many stripes; `style` names the atlas; `seed` seeds the noise.
    """

    style: str
    ground: tuple[tuple[int, int, int], tuple[int, int, int]]
    angle: float
    waves: int
    noise: float
    seed: int
    placed: tuple[Placed, ...]
    printed: Printed | None = None


class Painter:
    """Paints layouts. atlases: {style: uint8 [S, 4, s, s]}, all on one device; words are drawn as they come.

    `exact`: noise comes from each layout's seed, drawn on the host, equal everywhere; else from the device's generator.
    """

    def __init__(self, atlases: dict[str, Tensor], size: int = 224, exact: bool = True):
        self.size, self.exact = size, exact
        self.styles = list(atlases)
        self.atlas = torch.stack([a.float().div(255) for a in atlases.values()])  # [Y, S, 4, s, s]
        self.atlas[:, :, :3] *= self.atlas[:, :, 3:]  # premultiplied: edges keep their colour when resampled
        self.device = self.atlas.device
        ramp = (torch.arange(size, device=self.device) + 0.5) / size
        self.y, self.x = torch.meshgrid(ramp, ramp, indexing="ij")  # [H, W]

    def __call__(self, layouts: Sequence[Layout]) -> Tensor:
        """uint8 [B, 3, size, size]."""
        canvas = self._ground(layouts)
        for slot in range(max((len(one.placed) for one in layouts), default=0)):
            rows = [i for i, one in enumerate(layouts) if slot < len(one.placed)]
            canvas[rows] = self._place(canvas[rows], [(layouts[i].style, layouts[i].placed[slot]) for i in rows])
        for i, one in enumerate(layouts):
            if one.printed:
                canvas[i] = self._print(canvas[i], one.printed)
        return canvas.clamp(0, 1).mul(255).round().to(torch.uint8)

    def _tensor(self, rows: Sequence[object]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    def _ground(self, layouts: Sequence[Layout]) -> Tensor:
        """[B, 3, H, W], 0 to 1."""
        angle = self._tensor([one.angle for one in layouts])[:, None, None]
        along = (self.x - 0.5) * angle.cos() + (self.y - 0.5) * angle.sin() + 0.5
        waves = self._tensor([one.waves for one in layouts])[:, None, None]
        weight = torch.where(waves > 0, (along * waves).floor() % 2, along.clamp(0, 1))[:, None]  # [B, 1, H, W]
        ends = self._tensor([one.ground for one in layouts]).div(255)[..., None, None]  # [B, 2, 3, 1, 1]
        canvas = ends[:, 0] + (ends[:, 1] - ends[:, 0]) * weight
        if not self.exact:
            strength = self._tensor([one.noise for one in layouts])[:, None, None, None] / 255
            return canvas + strength * torch.randn_like(canvas[:, :1])
        for i, one in enumerate(layouts):
            if one.noise:
                drawn = torch.randn((self.size, self.size), generator=torch.Generator().manual_seed(one.seed))
                canvas[i] += one.noise / 255 * drawn.to(self.device)
        return canvas

    def _place(self, canvas: Tensor, chosen: Sequence[tuple[str, Placed]]) -> Tensor:
        """canvas [B, 3, H, W] with one sprite, on its tile if it has one, over each picture."""
        box = self._tensor([(p.x, p.y, p.side) for _, p in chosen])
        x, y, side = (c[:, None, None] for c in box.unbind(1))
        tiles = self._tensor([p.tile or (0, 0, 0) for _, p in chosen]).div(255)[..., None, None]
        here = self._tensor([p.tile is not None for _, p in chosen])[:, None, None, None]
        # a square with rounded corners: distance to it, one pixel wide as the edge
        half, corner = side * TILE / 2, 0.2 * side
        dx, dy = ((self.x - x).abs() - half + corner).clamp(min=0), ((self.y - y).abs() - half + corner).clamp(min=0)
        cover = ((corner - (dx * dx + dy * dy).sqrt()) * self.size + 0.5).clamp(0, 1)[:, None] * here
        canvas = canvas + cover * (tiles - canvas)
        sprites = self._sprites(chosen)
        grid = torch.stack(
            ((self.x - x) / side * 2, (self.y - y) / side * 2), -1
        )  # [B, H, W, 2], -1 to 1 in the sprite
        drawn = F.grid_sample(sprites, grid, align_corners=False)
        return canvas * (1 - drawn[:, 3:]) + drawn[:, :3]

    def _sprites(self, chosen: Sequence[tuple[str, Placed]]) -> Tensor:
        """[len(chosen), 4, s, s], premultiplied."""
        return self.atlas[[self.styles.index(style) for style, _ in chosen], [p.sprite for _, p in chosen]]

    def _print(self, canvas: Tensor, word: Printed) -> Tensor:
        """canvas [3, H, W] with text; moved inwards and made smaller until it fits."""
        from PIL import Image, ImageDraw

        font, at = typeset(word, self.size)
        mask = Image.new("L", (self.size, self.size))
        ImageDraw.Draw(mask).text(at, word.text, font=font, fill=255)
        alpha = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(self.size, self.size)
        ink = self._tensor(word.ink).div(255)[:, None, None]
        return canvas + alpha.to(self.device).float().div(255) * (ink - canvas)
