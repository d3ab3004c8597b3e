"""Pictures and videos from the user: opened, checked, upright, RGB."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, ImageSequence, UnidentifiedImageError

from ..errors import ImageError, first_line

MAX_PIXELS = 100_000_000
"""Of a picture, and of what a processor makes of it on the way to the tower's size: 400 MB as PIL holds it."""
MAX_ASPECT = 200
"""Long side over short side. Qwen's processor has the same limit; a panorama has 10, a line of text 50. Processors that
scale the short side up to the tower's would make gigabytes of a line of single pixels."""
MAX_VIDEO_PIXELS = 250_000_000
"""Of all frames of a video together, 120 of 1920 x 1080: 750 MB as an array."""
MAX_FRAMES = 10_000
"""Of a video, an hour at three a second: files of a few bytes may claim millions."""
MAX_DATA_URL = 64 * 2**20
"""Characters of a `data:` URL; phones' photos have a tenth of that."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What files may hold, whatever their names say (APNG counts as PNG). PIL's other readers, some of which start
programs, are never asked."""

_DATA_URL = re.compile(r"data:(image/[\w.+-]+);base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=-]+")
_ACCEPTED = "accepted: a path or a PIL image, a data:image/...;base64, URL, or a file's bytes"
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: Any, place: str = "picture") -> Image.Image:
    """A path, a `data:` URL, a file's bytes or a PIL picture -> a decoded RGB picture.

    It is turned upright by its EXIF orientation. Transparent pixels become white, as transformers' processors have
    them. `place` names the picture in errors.

    Raises:
        ImageError: not found, no regular file, none of FORMATS, damaged, of more than 8 bits for a channel, or empty,
            larger than MAX_PIXELS, longer than MAX_ASPECT.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, place)
    if isinstance(source, (str, Path, bytes)):
        named = not isinstance(source, bytes) and not _DATA_URL.match(str(source))
        shown = f" ({source!s})" if named else ""
        with _open(source, place) as image:
            return _rgb(image, place + shown)
    raise ImageError(f"{place} is a {type(source).__name__}; {_ACCEPTED}")


def _rgb(image: Image.Image, place: str) -> Image.Image:
    _check_size(image, place)
    if image.mode in _DEEP:  # PIL would clip them to 255, which makes most of them white
        raise ImageError(f"{place} is of mode {image.mode}; accepted: 8 bits for each channel")
    try:
        image.load()  # a PNG's orientation is behind its pixels
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image
        if "A" in upright.getbands() or upright.info.get("transparency") is not None:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright if upright.mode == "RGB" else upright.convert("RGB")  # which copies, always
    except Exception as e:  # PIL decodes here; its readers raise OSError, SyntaxError, struct.error, ...
        raise ImageError(f"{place} cannot be decoded: {first_line(e)}") from e


def _check_size(image: Image.Image, place: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or min(width, height) < 1:
        raise ImageError(f"{place} is {width} x {height}; accepted: 1 to {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{place} is {width} x {height}; accepted: sides of 1 to {MAX_ASPECT}")


def check_processed(pictures: Sequence[Image.Image], image_processor: Any) -> None:
    """Raises ImageError where `image_processor` would make more than MAX_PIXELS of a picture before it cuts or shrinks.

    Some fill a picture up to a square (`do_pad` of LLaVA's), some scale its short side to `size["shortest_edge"]`.
    """
    size = getattr(image_processor, "size", None) or {}
    edge = size["shortest_edge"] if "shortest_edge" in size and "longest_edge" not in size else None
    square = hasattr(image_processor, "pad_to_square") and getattr(image_processor, "do_pad", False)
    for picture in pictures:
        short, long = sorted(picture.size)
        made = long * long if square else int(edge * edge * long / short) if edge else 0
        if made > MAX_PIXELS:
            given = f"a picture of {picture.size[0]} x {picture.size[1]} becomes {made:,} pixels in this processor"
            raise ImageError(f"{given}; accepted: {MAX_PIXELS:,}")


def is_video(source: Any) -> bool:
    """Whether this is one video as `load_video` takes it, and not a list of them."""
    if isinstance(source, (list, tuple)):
        return len(source) > 0 and all(isinstance(frame, Image.Image) for frame in source)
    return isinstance(source, (str, Path, bytes)) or (
        isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4
    )


def load_video(source: Any, place: str = "video") -> np.ndarray:
    """One video -> its frames, uint8 [T, H, W, 3].

    source: a list of PIL pictures of one size, an array or tensor uint8 [T, H, W, 3], or the path, `data:` URL
        or bytes of an animated picture (GIF, WebP, APNG), or the path of a folder of frames, in the order of their
        names. Nothing else is decoded. `place` names the video in errors.

    Raises:
        ImageError: not found, not one of these, no frames, frames of several sizes, or more than MAX_FRAMES or
            MAX_VIDEO_PIXELS.
    """
    if isinstance(source, torch.Tensor) and (source.is_meta or source.is_quantized or source.layout != torch.strided):
        raise ImageError(f"{place} is a tensor without numbers ({source.dtype}, {source.layout}, {source.device})")
    if isinstance(source, torch.Tensor):
        if source.dtype is not torch.uint8:  # NumPy does not have all of torch's
            raise _not_frames(source.dtype, source.shape, place)
        source = source.cpu().numpy()
    if isinstance(source, np.ndarray):
        return _checked_array(source, place)
    if not is_video(source):
        accepted = "a list of PIL images, an array uint8 [T, H, W, 3], or the path of an animated picture or a folder"
        raise ImageError(f"{place} is a {type(source).__name__}; accepted: {accepted}")
    frames: list[np.ndarray] = []
    size, total = None, 0
    for i, frame in enumerate(_frames(source, place) if isinstance(source, (str, Path, bytes)) else source):
        total += frame.width * frame.height
        _check_video(i + 1, total, place)
        size = size or frame.size
        if frame.size != size:
            given = " and ".join(f"{width} x {height}" for width, height in sorted((size, frame.size)))
            raise ImageError(f"{place} has frames of the sizes {given}; accepted: frames of one size")
        frames.append(np.asarray(load_image(frame, f"frame {i} of {place}")))
    if not frames:
        raise ImageError(f"{place} has no frames")
    return np.stack(frames)


def _checked_array(frames: np.ndarray, place: str) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise _not_frames(frames.dtype, frames.shape, place)
    _check_video(len(frames), frames.size // 3, place)
    return frames


def _not_frames(dtype: Any, shape: Sequence[int], place: str) -> ImageError:
    return ImageError(f"{place} is an array {dtype} {list(shape)}; accepted: uint8 [T, H, W, 3]")


def _check_video(frames: int, pixels: int, place: str) -> None:
    if frames > MAX_FRAMES:
        raise ImageError(f"{place} has {frames:,} frames or more; accepted: {MAX_FRAMES:,}")
    if pixels > MAX_VIDEO_PIXELS:
        raise ImageError(f"{place} has {pixels:,} pixels or more; accepted: {MAX_VIDEO_PIXELS:,} in all frames")


def _frames(source: str | Path | bytes, place: str) -> Iterator[Image.Image]:
    """Not decoded yet, so that a refusal costs nothing."""
    if not isinstance(source, bytes) and os.path.isdir(source):
        formats = Image.registered_extensions()
        files = sorted(f for f in Path(source).iterdir() if formats.get(f.suffix.lower()) in FORMATS)
        for file in files:
            with _open(file, f"{file.name} of {place}") as image:
                yield image
        return
    with _open(source, place) as image:
        try:
            count = getattr(image, "n_frames", 1)
        except Exception as e:  # as above
            raise ImageError(f"{place} cannot be decoded: {first_line(e)}") from e
        _check_video(count, count * image.width * image.height, place)
        yield from _decoded(ImageSequence.Iterator(image), place)


def _decoded(frames: Iterator[Image.Image], place: str) -> Iterator[Image.Image]:
    """PIL decodes a frame when the next one is looked for."""
    while True:
        try:
            frame = next(frames, None)
        except Exception as e:  # as above
            raise ImageError(f"{place} cannot be decoded: {first_line(e)}") from e
        if frame is None:
            return
        yield frame


def _open(source: str | Path | bytes, place: str) -> Image.Image:
    """The picture with its header read, nothing decoded yet."""
    name = "" if isinstance(source, bytes) else str(source)
    data = BytesIO(source) if isinstance(source, bytes) else None
    if isinstance(source, str):
        data = _from_data_url(name, place)
    if data is None and not os.path.isfile(source):  # a FIFO or a device might never end
        raise ImageError(f"{place}: {_no_file(name)}")
    try:
        return Image.open(source if data is None else data, formats=FORMATS)
    except Exception as e:  # UnidentifiedImageError, DecompressionBombError, and all that damaged headers lead to
        why = "too large" if isinstance(e, Image.DecompressionBombError) else "not a readable picture"
        shown = "it" if data is not None or len(name) > 255 else name
        detail = "" if isinstance(e, UnidentifiedImageError) else f" ({first_line(e)})"
        raise ImageError(f"{place}: {shown} is {why}{detail}; accepted: {', '.join(FORMATS)}") from e


def _from_data_url(name: str, place: str) -> BytesIO | None:
    """The bytes of a `data:` URL; None for other names. Its content is in no error."""
    found = _DATA_URL.match(name)
    if found is None:
        return None
    if len(name) > MAX_DATA_URL:
        raise ImageError(f"{place} is a data: URL of {len(name):,} characters; accepted: {MAX_DATA_URL:,}")
    try:
        return BytesIO(base64.b64decode("".join(name[found.end() :].split()), validate=True))
    except ValueError as e:
        raise ImageError(f"{place} is a data: URL that is no base64: {first_line(e)}") from e


def _no_file(name: str) -> str:
    """Why a string names no picture. One that looks like base64 is not shown."""
    scheme = re.match(r"([a-z][a-z0-9+.-]*):", name, re.IGNORECASE)
    if scheme and scheme[1].lower() in ("http", "https", "ftp", "file", "data"):
        return f"a {scheme[1].lower()}: URL of {len(name):,} characters; nothing is fetched, {_ACCEPTED}"
    if len(name) <= 255 and os.path.exists(name):
        return f"{name} is no regular file; {_ACCEPTED}"
    if len(name) > 255 or (_BASE64.fullmatch(name) and max(map(len, name.split("/"))) >= 40):
        return f"a string of {len(name):,} characters that names no file; {_ACCEPTED}"
    return f"image file not found: {name if name.isprintable() else repr(name)}"
