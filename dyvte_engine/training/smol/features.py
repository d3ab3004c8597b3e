"""What the frozen part of the tower makes of every picture, computed once and kept on disk.

A file holds a chunk of pictures; each is complete or not there, so a killed run continues with the missing ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dyvte_engine.eval import emoji_sets as sets
from dyvte_engine.eval.compose import Painter
from dyvte_engine.files import write_bytes
from dyvte_engine.kernels.transfer import to_device
from dyvte_engine.models import smol as parts
from dyvte_engine.training.smol.data import Scenes

CHUNK = 32


def normalised(pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] -> what the processor makes of them."""
    mean, std = (to_device(v, pictures.device, torch.float32).view(3, 1, 1) for v in (parts.MEAN, parts.STD))
    return ((pictures.float().div(255) - mean) / std).to(dtype)


def run_blocks(tower: nn.Module, hidden: Tensor, first: int, last: int) -> Tensor:
    """The tower's blocks `first` to `last` - 1: [B, 1 + patches, d] each way."""
    for layer in tower.encoder.layer[first:last]:
        output = layer(hidden)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


class _Paintings(Dataset):
    """Chunks of pictures, painted in worker processes: (number of the chunk, uint8 [n, 3, H, W])."""

    def __init__(self, scenes: Scenes, printed: bool, count: int):
        self.scenes, self.printed, self.count = scenes, printed, count
        self.painter: Painter | None = None

    def __getitem__(self, chunk: int) -> tuple[int, Tensor]:
        if self.painter is None:
            self.painter = Painter({s: torch.from_numpy(sets.atlas(s)) for s in sets.STYLES}, parts.SIDE)
        numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.count))
        return chunk, self.painter([self.scenes.layout(n, self.printed) for n in numbers])


class Features:
    """[1 + patches, d] of pictures by number, after the first `blocks` blocks of a tower; 197 KB of bfloat16 a picture.

    Files are named after all that they depend on: split, styles, seed, blocks, dtype.
    """

    def __init__(self, root: Path, scenes: Scenes, printed: bool, count: int, tower: Any, blocks: int):
        world = scenes.world
        kind = "words" if printed else "scenes"
        name = f"{world.split}-{'-'.join(world.styles)}-{scenes.seed}-{kind}-{blocks}"
        self.folder = root / str(tower.dtype).removeprefix("torch.") / name
        self.count, self.tower, self.blocks = count, tower, blocks
        self.paintings = _Paintings(scenes, printed, count)

    def fill(self, numbers: Iterable[int], workers: int = 0) -> None:
        """Computes what is missing of these pictures, painted by so many worker processes."""
        missing = [c for c in sorted({number // CHUNK for number in numbers}) if not self._complete(c)]
        for chunk, pictures in DataLoader(self.paintings, sampler=missing, batch_size=None, num_workers=workers):
            write_bytes(self._path(chunk), save({"hidden": self.of(pictures.to(self.tower.device)).cpu().contiguous()}))

    @torch.no_grad()
    def of(self, pictures: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] on the tower's device -> [B, 1 + patches, d]."""
        pixels = normalised(pictures, self.tower.dtype)
        return run_blocks(self.tower, self.tower.embeddings(pixels), 0, self.blocks).to(self.tower.dtype)

    def take(self, numbers: list[int]) -> Tensor:
        """[len(numbers), 1 + patches, d]."""
        self.fill(numbers)
        rows = []
        for number in numbers:
            with safe_open(self._path(number // CHUNK), "pt") as file:
                rows.append(file.get_slice("hidden")[number % CHUNK])
        return torch.stack(rows)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.safetensors"

    def _complete(self, chunk: int) -> bool:
        """The last chunk of a smaller run may hold fewer pictures than are wanted now."""
        if not self._path(chunk).exists():
            return False
        with safe_open(self._path(chunk), "pt") as file:
            return file.get_slice("hidden").get_shape()[0] >= min(CHUNK, self.count - chunk * CHUNK)
