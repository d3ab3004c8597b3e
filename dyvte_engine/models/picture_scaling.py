"""PIL's way of scaling a picture, on whatever device its bytes are: the same bytes.

PIL scales one axis after the other. Each byte that it makes is a sum of bytes times whole numbers of 2**-22, rounded
and clipped to 0..255; float64 holds all such sums exactly, in any order. The numbers come from PIL itself: of a picture
of 32-bit integers, scaled alike, it makes them of single pixels of 2**22.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..kernels.transfer import to_device_together

MAX_PIXELS = 2**21
"""Of a picture that is left to the device: 6 MB that a waiting request holds, 50 MB on the device for a moment."""
_ONE = 2**22
_REACH = 3  # of PIL's widest filter (Lanczos), in pixels of the smaller picture
_TALL = 100  # times its width: beyond that PIL may scale the height first


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a picture: each byte of the part that stays is a weighted sum of `taps` others.

    Attributes:
        key: says all of it: pixels, scaled to, the first that stays, how many, PIL's filter.
        looked_at: the pixels that have a weight.
        index: int64 [count * taps] into those.
        weights: f64 [count * taps]; all 0 where what stays is outside of the picture.
        begins: int64 [count], where in `index`.
    """

    key: tuple[int, int, int, int, int | None]
    looked_at: slice
    index: Tensor
    weights: Tensor
    begins: Tensor

    @property
    def count(self) -> int:
        return len(self.begins)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.index, self.weights, self.begins


@lru_cache(maxsize=32)
def axis(size: int, scaled: int, first: int, count: int, resample: int | None) -> Axis:
    """Of `size` pixels scaled to `scaled`, `count` around their middle from `first` on.

    Kept, since most pictures are of few sizes.
    """
    reach = math.ceil(_REACH * max(size / scaled, 1)) + 1
    period, each = 2 * reach + 1, np.arange(size)
    points = np.zeros((period, size), dtype=np.int32)
    points[each % period, each] = _ONE
    made = np.asarray(Image.fromarray(points).resize((scaled, period), resample))
    stays = np.arange(first, first + count)[:, None]
    there = stays.clip(0, scaled - 1)
    near = np.floor((there + 0.5) * (size / scaled)).astype(np.int64) + np.arange(-reach, reach + 1)
    inside = (near >= 0) & (near < size) & (stays == there)
    weights = np.where(inside, made[near % period, there], 0)
    used = np.flatnonzero(weights.any(axis=0))
    near, weights = near[:, used], weights[:, used]
    looked_at = near[weights != 0]
    low, high = int(looked_at.min()), int(looked_at.max())
    index = torch.from_numpy((near.clip(low, high) - low).flatten())
    whole = torch.from_numpy(weights.flatten() / _ONE)
    begins = torch.arange(0, len(index), near.shape[1], device="cpu")
    return Axis((size, scaled, first, count, resample), slice(low, high + 1), index, whole, begins)


@dataclass(frozen=True, eq=False)
class UnscaledPicture:
    """A picture as it came, uint8 [H, W, 3] on the host, and what is to be done with its axes."""

    pixels: Tensor
    down: Axis
    across: Axis

    @cached_property
    def digest(self) -> bytes:
        """Equal for what is scaled to equal bytes in the same way; 0.4 ms for 640 x 480."""
        digest = hashlib.sha256(repr((self.down.key, self.across.key)).encode())
        digest.update(self.pixels.numpy().data)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Unscaled:
    """The pictures of a prompt, a sequence as a tensor [P, 3, H, W] is one: it has a length and slices."""

    pictures: tuple[UnscaledPicture, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, part: slice) -> Unscaled:
        return Unscaled(self.pictures[part])


def scales_as_pil(width: int, height: int) -> bool:
    """Whether a picture of this size may be left to `scaled`."""
    return width * height <= MAX_PIXELS and height <= _TALL * width


def scaled(given: Sequence[Unscaled], device: torch.device) -> Tensor:
    """All pictures in the size that they are cut to, int64 [P, 3, h, w] of 0 to 255 on the device; copied in one go."""
    pictures = [picture for one in given for picture in one.pictures]
    axes = {one.key: one for picture in pictures for one in (picture.down, picture.across)}
    parts = [t for one in axes.values() for t in one.tensors] + [picture.pixels for picture in pictures]
    there = iter(to_device_together([(t, t.dtype) for t in parts], device))
    moved = {key: (next(there), next(there), next(there)) for key in axes}
    height, width = pictures[0].down.count, pictures[0].across.count
    out = torch.empty((len(pictures), 3, height, width), dtype=torch.int64, device=device)
    for made, picture, pixels in zip(out, pictures, there, strict=True):
        part = pixels[picture.down.looked_at, picture.across.looked_at].permute(1, 2, 0)  # [W, 3, H]
        numbers = torch.empty(part.shape, dtype=torch.float64, device=device).copy_(part)
        columns = _summed(numbers.flatten(1), *moved[picture.across.key]).trunc_()  # [w, 3 * H]
        rows = _summed(columns.view(width * 3, -1).t(), *moved[picture.down.key])  # [h, w * 3]
        made.copy_(rows.view(height, width, 3).permute(2, 0, 1))
    return out


def _summed(rows: Tensor, index: Tensor, weights: Tensor, begins: Tensor) -> Tensor:
    """f64 [n, m] -> [count, m], weighted, half a unit added and clipped: bytes, but for what is behind the point."""
    return embedding_bag(index, rows, begins, per_sample_weights=weights, mode="sum").add_(0.5).clamp_(0, 255)
