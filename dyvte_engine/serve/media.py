"""Pictures and videos of a request: counted, weighed and measured before anything is decoded."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image

from ..errors import ImageError
from ..inputs.images import FORMATS, load_image, load_video
from .errors import ApiError
from .fetch import Fetcher
from .options import MediaLimits
from .protocol import ImagePart, Message, TextPart

_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.IGNORECASE)

_ANIMATED = ("GIF", "PNG", "WEBP")


@dataclass
class Media:
    """The media of one request: where each is, what it is ("image" or "video"), its URL, and later its bytes."""

    limits: MediaLimits
    urls: list[tuple[str, str, str]]
    data: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, messages: list[Message], limits: MediaLimits, fetcher: Fetcher) -> Media:
        """Raises ApiError: too many of them, a URL that is not accepted, or one that is too long."""
        urls = []
        for i, message in enumerate(messages):
            for j, part in enumerate(() if isinstance(message.content, str) else message.content):
                if isinstance(part, TextPart):
                    continue
                image = isinstance(part, ImagePart)
                url = part.image_url.url if isinstance(part, ImagePart) else part.video_url.url
                urls.append((f"messages.{i}.content.{j}", "image" if image else "video", url))
        for kind, most in (("image", limits.images), ("video", limits.videos)):
            count = sum(one == kind for _, one, _ in urls)
            if count > most:
                raise ApiError(400, f"messages hold {count} {kind}s; accepted: {most}", "messages")
        for place, _, url in urls:
            if url[:5].lower() != "data:":
                fetcher.check(url, place)
            elif not _DATA_URL.match(url):
                raise ApiError(400, f"{place} is a data: URL; accepted: data:image/...;base64,...", place)
        made = cls(limits, urls)
        made._check_bytes(sum(3 * len(url) // 4 for *_, url in urls if url[:5].lower() == "data:"))
        return made

    async def fetch(self, fetcher: Fetcher) -> None:
        """Get what is remote, one after the other."""
        used = sum(3 * len(url) // 4 for *_, url in self.urls if url[:5].lower() == "data:")
        for place, _, url in self.urls:
            remote = url[:5].lower() != "data:"
            self.data.append(await fetcher.fetch(url, place, self.limits.bytes - used) if remote else b"")
            used += len(self.data[-1])

    def decode(self) -> list[Any]:
        """PIL pictures and uint8 [T, H, W, 3] videos, in their order. For a thread; takes time.

        Raises:
            ImageError, ApiError: unreadable, or more pixels or frames than accepted.
        """
        files = [self.data[i] or _from_base64(url, place) for i, (place, _, url) in enumerate(self.urls)]
        pixels = frames = 0
        for (place, kind, _), data in zip(self.urls, files, strict=True):
            width, height, count = _measure(data, place, kind, self.limits)
            pixels += width * height * count
            frames += count if kind == "video" else 0
            if pixels > self.limits.pixels or frames > self.limits.frames:
                given = f"{pixels:,} pixels and {frames:,} frames up to {place}"
                accepted = f"{self.limits.pixels:,} and {self.limits.frames:,} in all"
                raise ApiError(413, f"messages hold {given}; accepted: {accepted}", place)
        return [
            load_image(data, place) if kind == "image" else load_video(data, place)
            for (place, kind, _), data in zip(self.urls, files, strict=True)
        ]

    def _check_bytes(self, given: int) -> None:
        if given > self.limits.bytes:
            raise ApiError(413, f"messages hold {given:,} bytes of media; accepted: {self.limits.bytes:,}", "messages")


def _from_base64(url: str, place: str) -> bytes:
    try:
        return base64.b64decode(url[url.index(",") + 1 :], validate=True)
    except ValueError:
        raise ApiError(400, f"{place} is a data: URL that is no base64", place) from None


def _measure(data: bytes, place: str, kind: str, limits: MediaLimits) -> tuple[int, int, int]:
    """Width, height and frames by the file's headers; nothing is decoded."""
    accepted = FORMATS if kind == "image" else _ANIMATED
    try:
        with Image.open(BytesIO(data), formats=accepted) as image:
            return *image.size, getattr(image, "n_frames", 1) if kind == "video" else 1
    except Image.DecompressionBombError:  # PIL's own bound, from which on it says no sizes
        raise ApiError(413, f"{place} has too many pixels; accepted: {limits.pixels:,} in all", place) from None
    except Exception:  # whatever PIL's readers raise on damaged headers
        raise ImageError(f"{place} is not a readable {kind}; accepted: {', '.join(accepted)}") from None
