"""Pictures and videos from the user: opened, checked, RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from ..errors import ImageError

MAX_PIXELS = 100_000_000


def load_image(source: Any) -> Image.Image:
    """A path or a PIL picture -> a decoded RGB picture.

    Raises:
        ImageError: not found, not a picture, truncated, empty, or of more than MAX_PIXELS pixels.
    """
    if isinstance(source, Image.Image):
        name, image = "picture", source
    elif isinstance(source, (str, Path)):
        name = str(source)
        image = _open(name)
    else:
        raise ImageError(f"images holds a {type(source).__name__}; accepted: a path or a PIL image")
    width, height = image.size
    if width * height > MAX_PIXELS or min(width, height) < 1:
        raise ImageError(f"{name} is {width} x {height}; accepted: 1 to {MAX_PIXELS:,} pixels")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:  # PIL decodes here; SyntaxError is its word for a broken PNG
        raise ImageError(f"{name} cannot be decoded: {e}") from e


def is_video(source: Any) -> bool:
    """Whether this is one video as `load_video` takes it, and not a list of them."""
    if isinstance(source, (list, tuple)):
        return len(source) > 0 and all(isinstance(frame, Image.Image) for frame in source)
    return isinstance(source, (str, Path)) or (isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4)


def load_video(source: Any) -> np.ndarray:
    """One video -> its frames, uint8 [T, H, W, 3].

    source: a list of PIL pictures of one size, an array or tensor uint8 [T, H, W, 3], or the path of an animated
        picture (GIF, WebP, APNG) or of a folder of frames, in the order of their names. Nothing else is decoded.

    Raises:
        ImageError: not found, not one of these, no frames, or frames of several sizes.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        frames = np.asarray(source.cpu() if isinstance(source, torch.Tensor) else source)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            given = f"an array {frames.dtype} {list(frames.shape)}"
            raise ImageError(f"videos holds {given}; accepted: uint8 [T, H, W, 3]")
        return frames
    if not is_video(source):
        accepted = "a list of PIL images, an array uint8 [T, H, W, 3], or the path of an animated picture or a folder"
        raise ImageError(f"videos holds a {type(source).__name__}; accepted: {accepted}")
    pictures = [load_image(f) for f in (_frames(Path(source)) if isinstance(source, (str, Path)) else source)]
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        given = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)) or "none"
        raise ImageError(f"videos holds frames of the sizes {given}; accepted: frames of one size")
    return np.stack([np.asarray(picture) for picture in pictures])


def _frames(path: Path) -> list[Any]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in Image.registered_extensions())
    return [frame.copy() for frame in ImageSequence.Iterator(_open(str(path)))]


def _open(name: str) -> Image.Image:
    try:
        return Image.open(name)
    except FileNotFoundError:
        raise ImageError(f"image file not found: {name}") from None
    except Image.DecompressionBombError as e:
        raise ImageError(f"{name} is too large: {e}") from e
    except (UnidentifiedImageError, OSError, SyntaxError) as e:
        raise ImageError(f"{name} is not a readable picture: {e}") from e
