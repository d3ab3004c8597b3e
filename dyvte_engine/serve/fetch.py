"""Bytes from the network, for hosts that the operator named and addresses that are the internet's.

Names are resolved here and the connection is made to the very address that was checked, so a name that resolves to
something else a moment later changes nothing. No proxy of the environment is used, no coding is undone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from .errors import ApiError
from .options import MediaLimits

_PORTS = {"http": 80, "https": 443}
_HEADERS = [(b"accept", b"image/*"), (b"accept-encoding", b"identity"), (b"user-agent", b"dyvte-engine")]
_REDIRECTS = (301, 302, 303, 307, 308)
_EMBEDDING = [ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


class ForbiddenAddressError(httpcore.ConnectError):
    """A name that leads to an address inside."""


def is_global(address: str) -> bool:
    """Whether an address is one of the internet. IPv6 addresses that hold an IPv4 one are judged by it or refused."""
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_global(str(ip.ipv4_mapped))
        if any(ip in network for network in _EMBEDDING):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to global addresses only; `resolve` is the loop's getaddrinfo."""

    def __init__(self) -> None:
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [entry[4][0] for entry in found]
        if not addresses or not all(map(is_global, map(str, addresses))):
            raise ForbiddenAddressError("not a public address")
        return await self._backend.connect_tcp(str(addresses[0]), port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


class Fetcher:
    """Fetches pictures within `limits`. `backend` makes the connections."""

    def __init__(self, limits: MediaLimits, backend: httpcore.AsyncNetworkBackend | None = None):
        self._limits = limits
        self._domains = {domain.lower().rstrip(".") for domain in limits.domains}
        self._backend = backend or GuardedBackend()

    def check(self, url: str, place: str) -> str:
        """The URL, if it may be asked for. Raises ApiError 400."""
        try:
            parts = urlsplit(url)
            port, host = parts.port, (parts.hostname or "").rstrip(".")
        except ValueError:
            raise ApiError(400, f"{place} is no URL", place) from None
        accepted = "accepted: data: URLs" + (", or http(s) of the domains allowed" if self._domains else "")
        if parts.scheme not in _PORTS or host not in self._domains:
            raise ApiError(400, f"{place} names a host that this server does not fetch from; {accepted}", place)
        if parts.username is not None or parts.password is not None or port not in (None, _PORTS[parts.scheme]):
            raise ApiError(400, f"{place} has a user or a port; accepted: neither", place)
        if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise ApiError(400, f"{place} holds characters that a URL must have encoded", place)
        return url

    async def fetch(self, url: str, place: str, most: int) -> bytes:
        """At most `most` bytes.

        Raises:
            ApiError: 400 for what may not or cannot be fetched, 413 for more bytes.
        """
        try:
            return await asyncio.wait_for(self._follow(url, place, most), self._limits.fetch_seconds)
        except (asyncio.TimeoutError, httpcore.TimeoutException):
            raise ApiError(400, f"{place} did not come within {self._limits.fetch_seconds:g} s", place) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError, UnicodeError):
            raise ApiError(400, f"{place} cannot be fetched", place) from None

    async def _follow(self, url: str, place: str, most: int) -> bytes:
        async with httpcore.AsyncConnectionPool(network_backend=self._backend, retries=0) as pool:
            for _ in range(self._limits.redirects + 1):
                self.check(url, place)
                async with pool.stream("GET", url.split("#", 1)[0], headers=_HEADERS) as response:
                    if response.status not in _REDIRECTS:
                        return await _body(response, place, most)
                    url = _location(response, url)
        raise ApiError(400, f"{place} redirects more than {self._limits.redirects} times", place)


def _header(response: httpcore.Response, name: bytes) -> bytes | None:
    return next((value for key, value in response.headers if key.lower() == name), None)


def _location(response: httpcore.Response, url: str) -> str:
    target = urljoin(url, (_header(response, b"location") or b"").decode("latin-1"))
    return "refused:" if url.startswith("https:") and not target.startswith("https:") else target


async def _body(response: httpcore.Response, place: str, most: int) -> bytes:
    if response.status != 200:
        raise ApiError(400, f"{place} cannot be fetched: status {response.status}", place)
    if (_header(response, b"content-encoding") or b"identity").lower() != b"identity":
        raise ApiError(400, f"{place} comes compressed, which was not asked for", place)
    data = bytearray()
    async for piece in response.aiter_stream():
        data += piece
        if len(data) > most:
            raise ApiError(413, f"{place} is larger than the {most:,} bytes that are left for this request", place)
    return bytes(data)
