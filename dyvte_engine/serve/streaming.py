"""Server-sent events, and what happens when the client goes away or does not read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, as_api_error, dumps

log = logging.getLogger("dyvte_engine.serve")
T = TypeVar("T")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away. Raises ApiError 499 then."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the request")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: objects for `data:` lines; an error among them becomes an error object, then the stream ends.
        close: awaited at the end, however it comes.
        stall_seconds: so long may the client take nothing.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], close: Callable[[], Awaitable[None]], stall_seconds: float
    ):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._stall_seconds = events, close, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, gone = asyncio.create_task(self._send_all(send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._close()

    async def _send_all(self, send: Send) -> None:
        async def put(**message: Any) -> None:
            sent = asyncio.ensure_future(send(message))
            try:  # not wait_for: before Python 3.12 it may swallow a cancellation
                done, _ = await asyncio.wait({sent}, timeout=self._stall_seconds)
                if not done:
                    raise TimeoutError("the client takes nothing")
                sent.result()
            finally:
                sent.cancel()

        await put(type="http.response.start", status=200, headers=self.raw_headers)
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for body in _lines(events):
                await put(type="http.response.body", body=body, more_body=True)
        await put(type="http.response.body", body=b"data: [DONE]\n\n")


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield f"data: {dumps(event)}\n\n".encode()
    except Exception as error:
        refused = as_api_error(error)
        if refused.status_code >= 500:
            log.error("a stream ends: %s", refused.detail, exc_info=error)
        yield f"data: {dumps(refused.body())}\n\n".encode()
