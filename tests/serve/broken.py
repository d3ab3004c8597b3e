"""Requests that are broken in one way each, over bare sockets.

Every kind takes the random numbers, the server's port and a request that would be answered; it returns the status of
the answer (0: the connection was closed without one), and says which statuses are right.
"""

import asyncio
import contextlib
import json
import re
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from .common import asked, data_url, encoded, noise

PATIENCE = 120.0
REFUSED = frozenset({400, 404, 413, 422, 429})
READ = REFUSED | {200}  # what is broken may still have a meaning


class NoAnswer(Exception):
    """Neither an answer nor the end of the connection came."""


def request(path: str, body: bytes, *headers: str, method: str = "POST", length: int | None = None) -> bytes:
    size = [] if length == -1 else [f"content-length: {len(body) if length is None else length}"]
    lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", "content-type: application/json"]
    return "\r\n".join([*lines, *size, *headers, "", ""]).encode("latin-1") + body


async def exchange(port: int, pieces: Iterable[bytes | float], take: int = -1, pause: float = 0.0) -> int:
    """Send the pieces (a number is a pause), read `take` bytes (-1: all), a few at a time with pauses, and leave."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    came = bytearray()

    async def send() -> None:
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)

    async def read() -> None:
        while take < 0 or len(came) < take:
            data = await reader.read(64 if pause else 65536)
            if not data:
                return
            came.extend(data)
            await asyncio.sleep(pause)

    try:
        for part in (send, read):
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(part(), PATIENCE)
    except asyncio.TimeoutError:
        raise NoAnswer(f"nothing for {PATIENCE:g} s after {bytes(came[:80])!r}") from None
    finally:
        writer.transport.abort()
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", came)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Target:
    """What a kind breaks: `body` would be answered at `path`."""

    rng: Random
    port: int
    path: str
    body: dict[str, Any]

    @property
    def data(self) -> bytes:
        return json.dumps(self.body).encode()

    async def ask(self, body: Any, **arguments: Any) -> int:
        return await exchange(self.port, [request(self.path, json.dumps(body).encode())], **arguments)

    async def ask_about(self, *urls: str) -> int:
        body = {"model": "nano", "max_tokens": 2, "messages": asked("what is it?", *urls)}
        return await exchange(self.port, [request("/v1/chat/completions", json.dumps(body).encode())])


async def cut_json(t: Target) -> int:
    return await exchange(t.port, [request(t.path, t.data[: t.rng.randrange(len(t.data))])])


async def flipped_json(t: Target) -> int:
    data = bytearray(t.data)
    for _ in range(t.rng.randint(1, 4)):
        data[t.rng.randrange(len(data))] = t.rng.randrange(256)
    return await exchange(t.port, [request(t.path, bytes(data))])


ODD: list[Any] = [None, True, 0, -1, 2**70, 1e308, float("nan"), "", "x" * 3000, [], {}, [[]], "\ud800", "\0", "nan"]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inside for place in _places(one, (*path, key)))]


async def wrong_type(t: Target) -> int:
    body = json.loads(t.data)
    *parents, last = t.rng.choice(_places(body)[1:])
    place = body
    for key in parents:
        place = place[key]
    place[last] = t.rng.choice(ODD)
    return await t.ask(body)


async def unknown_field(t: Target) -> int:
    return await t.ask(t.body | {t.rng.choice(("functions", "best", "\0", "x" * 500)): t.rng.choice(ODD[1:])})


async def damaged_picture(t: Target) -> int:
    kind = t.rng.choice(("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"))
    data = bytearray(encoded(noise(t.rng.randint(1, 64), t.rng.randint(1, 64), t.rng.randrange(99)), kind))
    if t.rng.random() < 0.5:
        data = data[: t.rng.randrange(len(data))]
    for at in t.rng.sample(range(len(data)), min(t.rng.randint(0, 6), len(data))):
        data[at] = t.rng.randrange(256)
    return await t.ask_about(data_url(bytes(data), f"image/{kind.lower()}"))


def png_of(width: int, height: int) -> bytes:
    """A file of a few bytes that claims to be of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")


async def bomb(t: Target) -> int:
    return await t.ask_about(data_url(png_of(t.rng.choice((8000, 60_000, 2**31 - 1)), t.rng.choice((8000, 60_000)))))


async def too_large(t: Target) -> int:
    """Announced, or only sent."""
    piece = b" " * 2**16
    if t.rng.random() < 0.5:
        return await exchange(t.port, [request(t.path, piece, length=t.rng.choice((10**8, 10**30)))])
    head = request(t.path, b"", "transfer-encoding: chunked", length=-1)
    return await exchange(t.port, [head, *[b"10000\r\n" + piece + b"\r\n"] * 640])  # 40 MiB


async def leaves_uploading(t: Target) -> int:
    whole = request(t.path, t.data)
    cut = t.rng.randrange(len(whole))
    return await exchange(t.port, [whole[: cut // 2], t.rng.random() * 0.05, whole[cut // 2 : cut]], take=0)


def _long(t: Target) -> bytes:
    stream = t.rng.random() < 0.7
    return request(t.path, json.dumps(t.body | {"max_tokens": 80, "ignore_eos": True, "stream": stream}).encode())


async def leaves_waiting(t: Target) -> int:
    return await exchange(t.port, [_long(t), t.rng.random() ** 2 * 0.5], take=0)


async def leaves_reading(t: Target) -> int:
    return await exchange(t.port, [_long(t)], take=t.rng.randint(1, 4000))


async def reads_slowly_and_leaves(t: Target) -> int:
    return await exchange(t.port, [_long(t)], take=t.rng.randint(200, 2000), pause=0.02)


async def noise_for_http(t: Target) -> int:
    return await exchange(t.port, [t.rng.randbytes(t.rng.randint(1, 400)) + b"\r\n\r\n"])


async def broken_framing(t: Target) -> int:
    chunked, data = "transfer-encoding: chunked", t.data
    odd = [
        request(t.path, b"zz\r\n" + data, chunked, length=-1),
        request(t.path, b"-5\r\n" + data + b"\r\n0\r\n\r\n", chunked, length=-1),
        request(t.path, b"0\r\n\r\n", chunked),  # and a length
        request(t.path, data, "content-length: 3"),
        request(t.path, data, length=-7),
        request(t.path, data, "x-long: " + "x" * 100_000),
        request(t.path, data, *[f"x-{i}: y" for i in range(3000)]),
        request(t.path, data, "expect: 200-maybe"),
        request(t.path, data).replace(b"HTTP/1.1", t.rng.choice((b"HTTP/9.9", b"http/1.1", b""))),
        request(t.path, data).replace(b"\r\n", b"\n", 1),
    ]
    return await exchange(t.port, [t.rng.choice(odd)])


async def elsewhere(t: Target) -> int:
    method = t.rng.choice(("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "PATCH", "BREW"))
    path = t.rng.choice((t.path, "/", "/v1", "/v1/models/../x", "//", "/%00", "/v1/models/%ff", "/health?" + "x" * 999))
    return await exchange(t.port, [request(path, b"", method=method)])


ANY = READ | {0, 405, 431}
KINDS: dict[Callable[[Target], Awaitable[int]], frozenset[int]] = {
    cut_json: frozenset({400}),
    flipped_json: READ,
    wrong_type: READ,
    unknown_field: frozenset({400}),
    damaged_picture: READ,
    bomb: frozenset({413}),
    too_large: frozenset({400, 413, 0}),  # 400: a length of more digits than HTTP has
    leaves_uploading: ANY,
    leaves_waiting: ANY,
    leaves_reading: ANY,
    reads_slowly_and_leaves: ANY,
    noise_for_http: frozenset({0, 400}),
    broken_framing: ANY,
    elsewhere: ANY,
}
