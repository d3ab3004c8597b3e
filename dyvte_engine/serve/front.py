"""What every request passes first: its id, the key, bounds of its body, the access log, errors that nobody caught."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, as_api_error, dumps
from .options import ServeOptions

access = logging.getLogger("dyvte_engine.serve.access")
log = logging.getLogger("dyvte_engine.serve")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/health",)


class Front:
    """Pure ASGI, so that nothing of a stream is held up here. `failed` gets the status of what is refused or fails."""

    def __init__(self, app: ASGIApp, options: ServeOptions, failed: Callable[[int], None]):
        self._app, self._options, self._failed = app, options, failed
        self._keys = [key.encode() for key in options.api_keys]
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        status, held = [0], [0]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = state["request_id"]
                if self._options.replica is not None:
                    answered["x-replica"] = self._options.replica
            elif status[0] == 413 and not message.get("more_body", False):
                await send(dict(message, more_body=True))
                await _ignore_rest(receive, self._options.linger_seconds)
                message = dict(type="http.response.body")
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, self._bounded(headers, receive, held), answer)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request %s", state["request_id"])
            if not status[0]:
                await as_api_error(error).response()(scope, receive, answer)
        finally:
            self._held -= held[0]
            if status[0] >= 400:
                self._failed(status[0])
            _write(scope, status[0], time.perf_counter() - began)

    def _check_key(self, path: str, headers: Headers) -> None:
        """Every key is compared, each in a time that its content does not change."""
        if not self._keys or path in _OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        equal = [hmac.compare_digest(given.encode("latin-1", "replace"), key) for key in self._keys]
        if kind.lower() != "bearer" or not any(equal):
            refusal = {"www-authenticate": "Bearer"}
            raise ApiError(401, "no valid API key in Authorization: Bearer", None, "invalid_api_key", refusal)

    def _bounded(self, headers: Headers, receive: Receive, held: list[int]) -> Receive:
        """`receive` that ends a body which is too large, by its announcement or by what came, or too slow.

        `held` counts its bytes, which all bodies share a bound on.
        """
        most, seconds = self._options.body_bytes, self._options.body_seconds
        too_large = ApiError(413, f"the body is larger than {most:,} bytes", None, "body_too_large")
        announced = headers.get("content-length", "0")
        complete, end = False, time.monotonic() + seconds

        async def bounded() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            if announced.isdigit() and int(announced[:20]) > most:
                raise too_large
            try:
                message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body did not come within {seconds:g} s") from None
            came = len(message.get("body", b""))
            held[0] += came
            self._held += came
            complete = not message.get("more_body", False)
            if held[0] > most:
                raise too_large
            if self._held > self._options.bodies_bytes:
                raise ApiError(503, "too many bytes are under way; try again", headers={"retry-after": "1"})
            return message

        return bounded


async def _ignore_rest(receive: Receive, seconds: float) -> None:
    """Let the client send what it will: closed before that, its connection may lose the answer."""

    async def ignore() -> None:
        while (await receive()).get("more_body", False):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(ignore(), seconds)


def _write(scope: Scope, status: int, seconds: float) -> None:
    """One line of JSON; nothing of what was asked or answered is in it."""
    record: dict[str, Any] = dict(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        request_id=scope["state"]["request_id"],
        client=(scope.get("client") or ("",))[0],
        method=scope["method"],
        path=scope["path"][:200],
        status=status,
        seconds=round(seconds, 4),
        **scope["state"].get("figures", {}),
    )
    access.info(dumps(record))
