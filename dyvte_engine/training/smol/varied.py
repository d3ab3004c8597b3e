"""Pictures for training whose every sprite is another: drawn in any set, turned, mirrored, recoloured, blurred.

Two drawings of a dog do not show what dogs have in common; these come nearer to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.eval import emoji_sets as sets
from dyvte_engine.eval.compose import Layout, Painter, Placed
from dyvte_engine.models import smol as parts

PLAIN = 0.3  # of the sprites stay as they were drawn
TURN = 0.4  # radians each way
SCALE = (0.95, 1.3)  # how much smaller
MIXED, GAIN, OFFSET = 0.15, 0.3, 0.12  # of colours
BLURRED = 0.3


class VariedPainter(Painter):
    """Paints layouts with other sprites of the same kinds; the same ones whenever the same layouts are given."""

    def __init__(self) -> None:
        styles = (*sets.TRAINING_STYLES, *sets.MORE_STYLES)
        super().__init__({style: torch.from_numpy(sets.atlas(style)) for style in styles}, parts.SIDE)
        self.there = self.atlas[:, :, 3].amax((-1, -2)) > 0  # bool [styles, sprites]: not every set has every thing
        self.generator = torch.Generator()

    def __call__(self, layouts: Sequence[Layout]) -> Tensor:
        self.generator.manual_seed(layouts[0].seed)
        return super().__call__(layouts)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def _sprites(self, chosen: Sequence[tuple[str, Placed]]) -> Tensor:
        number, n = [p.sprite for _, p in chosen], len(chosen)
        style = torch.multinomial(self.there[:, number].T.float(), 1, generator=self.generator)[:, 0]
        plain = self._uniform(0, 1, n) < PLAIN
        sprites = self.atlas[style, number]
        angle, (low, high) = self._uniform(-TURN, TURN, n), SCALE
        mirror = self._uniform(-1, 1, n).sign()
        x, y = self._uniform(low, high, n), self._uniform(low, high, n)
        turned = torch.zeros(n, 2, 3)
        turned[:, 0, 0], turned[:, 0, 1] = angle.cos() * x * mirror, -angle.sin() * y
        turned[:, 1, 0], turned[:, 1, 1] = angle.sin() * x * mirror, angle.cos() * y
        turned[plain] = torch.eye(2, 3)
        grid = F.affine_grid(turned, list(sprites.shape), align_corners=False)
        sprites = F.grid_sample(sprites, grid, align_corners=False)
        blurred = (self._uniform(0, 1, n) < BLURRED) & ~plain
        sprites[blurred] = F.avg_pool2d(sprites[blurred], 3, 1, 1)
        color, alpha = sprites[:, :3], sprites[:, 3:]
        mixed = torch.eye(3) + MIXED * torch.randn(n, 3, 3, generator=self.generator)
        mixed = mixed / mixed.sum(2, keepdim=True).clamp(min=0.5) * self._uniform(1 - GAIN, 1 + GAIN, n, 1, 1)
        offset = self._uniform(-OFFSET, OFFSET, n, 1, 1, 1)
        mixed[plain], offset[plain] = torch.eye(3), 0.0
        color = (torch.einsum("nij,njhw->nihw", mixed, color) + offset * alpha).clamp(min=0).minimum(alpha)
        return torch.cat([color, alpha], 1)
