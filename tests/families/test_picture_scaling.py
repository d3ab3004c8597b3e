"""Pictures scaled by torch, against PIL: the same bytes, on whatever device."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import center_crop

from dyvte_engine.models import picture_scaling
from dyvte_engine.models.picture_scaling import Unscaled, UnscaledPicture, axis, scaled, scales_as_pil
from dyvte_engine.runtime.picture_cache import digest_of

FILTERS = list(Image.Resampling)
SIZES = [
    (96, 96, 336, 336),
    (400, 1000, 336, 840),
    (640, 480, 448, 336),
    (1280, 720, 597, 336),
    (37, 500, 336, 4540),
    (224, 224, 224, 224),
]


def noise(width: int, height: int, seed: int) -> np.ndarray:
    """Bytes of all values, or black and white, which a filter with negative weights goes beyond."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return made if seed % 2 else (made > 127) * np.uint8(255)


def left(pixels: np.ndarray, size: tuple[int, int], crop: tuple[int, int], resample: int) -> Unscaled:
    """size, crop: width and height"""
    (width, height), (columns, rows) = size, crop
    down = axis(pixels.shape[0], height, (height - rows) // 2, rows, resample)
    across = axis(pixels.shape[1], width, (width - columns) // 2, columns, resample)
    return Unscaled((UnscaledPicture(torch.from_numpy(pixels), down, across),))


def by_pil(pixels: np.ndarray, size: tuple[int, int], crop: tuple[int, int], resample: int) -> torch.Tensor:
    """int64 [3, h, w], cut out as transformers does it."""
    made = np.asarray(Image.fromarray(pixels).resize(size, resample)).transpose(2, 0, 1)
    return torch.tensor(center_crop(made, crop[::-1], "channels_first", "channels_first")).long()


def near(rng: random.Random, size: int, most: int) -> int:
    return rng.choice([size, rng.randint(1, 12), rng.randint(1, most)])


def cases(n: int, seed: int):
    """Up and down, one axis alone, cut out, cut out of what is smaller, single pixels."""
    rng = random.Random(seed)
    for i in range(n):
        width, height = (rng.choice([rng.randint(1, 12), rng.randint(1, 260)]) for _ in range(2))
        if not scales_as_pil(width, height):  # by which PIL scales the height first
            continue
        size = near(rng, width, 300), near(rng, height, 300)
        yield noise(width, height, i), size, (near(rng, size[0], 80), near(rng, size[1], 80)), FILTERS[i % len(FILTERS)]


def test_the_bytes_that_pil_makes():
    for pixels, size, crop, resample in cases(600, 0):
        made = scaled([left(pixels, size, crop, resample)], torch.device("cpu"))
        assert torch.equal(made[0], by_pil(pixels, size, crop, resample)), (pixels.shape, size, crop, resample)


def test_height_first_where_it_shrinks_more(monkeypatch):
    """As PIL does it from release 13 on; here in two calls, whatever release this is."""
    monkeypatch.setattr(picture_scaling, "_order", lambda: picture_scaling._where_it_shrinks_more)
    differ = set()
    for i, (w, h, *size) in enumerate([(40, 90, 30, 60), (40, 90, 30, 70), (90, 40, 60, 30), (30, 60, 50, 40)]):
        pixels, (width, height) = noise(w, h, i), size
        first, second = [(w, height), (width, height)], [(width, h), (width, height)]
        down_first = h - height > max(0, 2 * (w - width))
        ways = []
        for steps in (first, second):
            picture = Image.fromarray(pixels)
            for step in steps:
                picture = picture.resize(step, 3)
            ways.append(torch.tensor(np.asarray(picture).transpose(2, 0, 1)).long())
        made = scaled([left(pixels, tuple(size), tuple(size), 3)], torch.device("cpu"))[0]
        assert torch.equal(made, ways[0] if down_first else ways[1])
        differ.add((down_first, torch.equal(*ways)))
    assert {(True, False), (False, False)} <= differ


def test_pil_that_scales_in_an_order_of_its_own_is_left_alone(monkeypatch):
    own = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a, **o: own(own(self, (9, 9)), size, *a, **o))
    picture_scaling._order.cache_clear()
    try:
        assert not picture_scaling.knows_pil()
    finally:
        picture_scaling._order.cache_clear()


@pytest.mark.parametrize("resample", FILTERS)
def test_the_sizes_of_photos(resample):
    given = [(noise(w, h, i), size, (336, 336)) for i, (w, h, *size) in enumerate(SIZES)]
    made = scaled([left(*one, resample) for one in given], torch.device("cpu"))
    for got, one in zip(made, given, strict=True):
        assert torch.equal(got, by_pil(*one, resample))


def test_digests_tell_ways_of_scaling_apart():
    pixels = noise(9, 9, 1)
    ways = [left(pixels, (6, 6), (4, 4), 3), left(pixels, (7, 6), (4, 4), 3), left(pixels, (6, 6), (4, 4), 2)]
    ways.append(left(pixels.reshape(3, 27, 3), (6, 6), (4, 4), 3))
    digests = {digest_of(dict(pixel_values=way)) for way in ways}
    assert len(digests) == 4 and digest_of(dict(pixel_values=left(pixels.copy(), (6, 6), (4, 4), 3))) in digests


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_the_bytes_that_pil_makes_on_a_gpu(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    for pixels, size, crop, resample in cases(200, 1):
        made = scaled([left(pixels, size, crop, resample)], torch.device("cuda"))
        assert torch.equal(made[0].cpu(), by_pil(pixels, size, crop, resample))
