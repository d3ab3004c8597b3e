"""Pictures from the user: opened, checked, RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .errors import ImageError

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


def _open(name: str) -> Image.Image:
    try:
        return Image.open(name)
    except FileNotFoundError:
        raise ImageError(f"image file not found: {name}") from None
    except Image.DecompressionBombError as e:
        raise ImageError(f"{name} is too large: {e}") from e
    except (UnidentifiedImageError, OSError, SyntaxError) as e:
        raise ImageError(f"{name} is not a readable picture: {e}") from e
