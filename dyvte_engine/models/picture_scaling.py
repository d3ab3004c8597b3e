"""PIL's way of scaling a picture, on whatever device its bytes are: the same bytes.

PIL scales one axis after the other. Each byte that it makes is a sum of bytes times whole numbers of 2**-22, rounded
and clipped to 0..255; float64 holds all such sums exactly, in any order. The numbers come from PIL itself: of a picture
of 32-bit integers, scaled alike, it makes them of single pixels of 2**22. Which axis is first depends on its release,
and is found out by trying.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..kernels.transfer import to_device_together

MAX_PIXELS = 2**21
"""Of a picture that is left to the device: 6 MB that a waiting request holds, 50 MB on the device for a moment."""
MAX_SIDE = 4096
"""Its weights are found in memory that grows with the square of a side: 20 MB for this one scaled to 336."""
_ONE = 2**22
_REACH = 5  # of PIL's widest filter, in pixels of the smaller picture
_TALL = 100  # times its width: beyond that PIL may scale the height first


Weights = tuple[Tensor, Tensor, Tensor]


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
    def tensors(self) -> Weights:
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


def _never(width: int, height: int, to_width: int, to_height: int) -> bool:
    return False


def _where_it_shrinks_more(width: int, height: int, to_width: int, to_height: int) -> bool:
    """From release 13 on."""
    return height - to_height > max(0, 2 * (width - to_width))


@cache
def _order() -> Callable[[int, int, int, int], bool] | None:
    """Whether the PIL that is here begins with the height; None: nothing known says when."""
    rng = np.random.default_rng(0)
    sizes = [(40, 90, 30, 60), (40, 90, 30, 70), (90, 40, 60, 30), (30, 60, 50, 40), (60, 30, 40, 50), (20, 50, 40, 90)]
    given = [(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), (x, y)) for w, h, x, y in sizes]
    pictures = [Image.fromarray(pixels) for pixels, _ in given]
    by_height = [p.resize((p.width, size[1])).resize(size) for p, (_, size) in zip(pictures, given, strict=True)]
    by_width = [p.resize((size[0], p.height)).resize(size) for p, (_, size) in zip(pictures, given, strict=True)]
    whole = [p.resize(size) for p, (_, size) in zip(pictures, given, strict=True)]
    for rule in (_never, _where_it_shrinks_more):
        firsts = [h if rule(*size) else w for size, h, w in zip(sizes, by_height, by_width, strict=True)]
        if firsts == whole:
            return rule
    return None


def _begins_with_height(width: int, height: int, to_width: int, to_height: int) -> bool:
    rule = _order()
    assert rule is not None  # asked for in `knows_pil`
    return rule(width, height, to_width, to_height)


def knows_pil() -> bool:
    """Whether `scaled` may do the work of the PIL that is here."""
    return _order() is not None


def scales_as_pil(width: int, height: int) -> bool:
    """Whether a picture of this size may be left to `scaled`."""
    return width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE and height <= _TALL * width


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
        down, across, part = picture.down, picture.across, pixels[picture.down.looked_at, picture.across.looked_at]
        if _begins_with_height(across.key[0], down.key[0], across.key[1], down.key[1]):
            made.copy_(_passes(part, moved[down.key], moved[across.key]).permute(2, 1, 0))
        else:
            made.copy_(_passes(part.transpose(0, 1), moved[across.key], moved[down.key]).permute(2, 0, 1))
    return out


def _passes(part: Tensor, first: Weights, second: Weights) -> Tensor:
    """uint8 [n, m, 3] -> f64 [m', n', 3], to be cut off behind the point: the first axis, then the second one."""
    numbers = torch.empty(part.shape, dtype=torch.float64, device=part.device).copy_(part)
    once = _summed(numbers.flatten(1), *first).trunc_()  # [h, W * 3]
    turned = once.view(len(once), -1, 3).transpose(0, 1)  # [m, n', 3]
    return _summed(turned.flatten(1), *second).view(-1, len(once), 3)


def _summed(rows: Tensor, index: Tensor, weights: Tensor, begins: Tensor) -> Tensor:
    """f64 [n, m] -> [count, m], weighted, half a unit added and clipped: bytes, but for what is behind the point."""
    return embedding_bag(index, rows, begins, per_sample_weights=weights, mode="sum").add_(0.5).clamp_(0, 255)
