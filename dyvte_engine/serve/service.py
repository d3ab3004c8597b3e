"""Between HTTP and the engine: who may come in, work that must not hold up the event loop, and answers under way."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ..engine import Engine
from ..policies import VisualTokenPolicy
from ..requests import Handle, Request
from ..runtime.sampling import end_tokens
from .answer import Answer, Delta
from .errors import ApiError
from .fetch import Fetcher
from .grammar import Grammars
from .metrics import Metrics
from .options import ServeOptions

log = logging.getLogger("dyvte_engine.serve")
T = TypeVar("T")


class Service:
    """One engine behind one app.

    Attributes:
        ready: whether the warm-up is over; draining: whether the server takes nothing new.
    """

    def __init__(self, engine: Engine, options: ServeOptions):
        self.engine, self.options = engine, options
        self.ready = self.draining = False
        self.fetcher = Fetcher(options.media)
        self.metrics = Metrics(options.model_name, engine.model.shape.num_layers, lambda: engine.load)
        self.tokenizer = engine.model.processor.tokenizer
        self.grammars = Grammars(
            self.tokenizer,
            engine.model.shape.vocab_size,
            end_tokens(engine.model.hf.generation_config, self.tokenizer),
            options.max_schema_characters,
        )
        self._policies = {_spaceless(text): engine.bind(policy) for text, policy in options.policies.items()}
        self._pool = ThreadPoolExecutor(options.threads, "dyvte-serve")
        self._cancels = ThreadPoolExecutor(1, "dyvte-cancel")  # never behind pictures
        self._pending = 0

    async def warm_up(self) -> None:
        """`warm_up_here` in a thread; an error is logged, and no request is taken."""
        try:
            await self.in_thread(self.warm_up_here)
        except Exception:
            log.exception("the warm-up failed; no request is taken")

    def warm_up_here(self) -> None:
        """From here on requests are taken. Nothing to do the second time."""
        if not self.ready:
            self.engine.warm_up()
            self.engine.generate("a", chat=False, max_new_tokens=2)
            self.ready = True

    def close(self) -> None:
        """Its threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._cancels.shutdown(wait=False)

    async def in_thread(self, call: Callable[..., T], *args: Any) -> T:
        """For decoding, tokenizing, compiling: what may take longer than a millisecond."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *args)

    async def cancel(self, handles: Iterable[Handle]) -> None:
        """A cancellation waits for the step under way, so it has a thread."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._cancels, handle.cancel) for handle in handles))

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any name but the model's."""
        if name not in (None, self.options.model_name):
            text = f"the model {name[:80]!r} is not here; accepted: {self.options.model_name!r}"
            raise ApiError(404, text, "model", "model_not_found")

    def policy(self, text: str | None) -> VisualTokenPolicy:
        """What a request's `policy` means. Raises ApiError for what the operator does not allow."""
        if text is None:
            return self.engine.policy
        found = self._policies.get(_spaceless(text))
        if found is None:
            accepted = ", ".join(map(repr, self._policies))
            raise ApiError(400, f"policy is not one that this server allows; accepted: {accepted}", "policy")
        return found

    @property
    def policy_names(self) -> list[str]:
        return list(self._policies)

    def enter(self, choices: int) -> None:
        """Take so many places. Raises ApiError: 503 before the warm-up and while draining, 429 when all are taken."""
        if not self.ready or self.draining:
            why = "the server is stopping" if self.draining else "the server is warming up"
            raise ApiError(503, why, code="unavailable", headers={"retry-after": "1"})
        most = self.engine.config.max_batch + self.options.max_queue
        if self._pending + choices > most:
            raise ApiError(429, "too many requests wait; try again", code="queue_full", headers={"retry-after": "1"})
        self._pending += choices

    def leave(self, choices: int) -> None:
        """Give the places back."""
        self._pending -= choices


def _spaceless(text: str) -> str:
    return "".join(text.split())


class Call:
    """The answers of one HTTP request, from a place in the queue to their end. `close` it, however it ends.

    Raises:
        ApiError: there is no place.
    """

    def __init__(self, service: Service, choices: int, stops: list[str]):
        service.enter(choices)
        self._service, self._choices, self._began = service, choices, time.perf_counter()
        self.answers = [Answer(stops) for _ in range(choices)]
        self._handles: list[Handle] = []
        self._closed = False
        self._mutex = threading.Lock()  # of the two above

    async def submit(self, make: Callable[[], list[Request]]) -> None:
        """Submit what `make` gives, in a thread."""
        await self._service.in_thread(partial(self._submit, make))

    def _submit(self, make: Callable[[], list[Request]]) -> None:
        requests = make()
        if self._closed:
            return
        handles = self._service.engine.submit_all(requests)
        with self._mutex:
            self._handles += handles
            late = self._closed
        if late:  # the client went away meanwhile
            for handle in handles:
                handle.cancel()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What comes, with the number of its answer; at most a whole answer each waits for a slow reader."""
        came: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(i, handle, came)) for i, handle in enumerate(self._handles)]
        left = len(tasks)
        try:
            while left:
                index, delta = await came.get()
                if isinstance(delta, Exception):
                    raise delta
                yield index, delta
                left -= delta.finish_reason is not None
        finally:
            for task in tasks:
                task.cancel()

    async def _pump(self, index: int, handle: Handle, came: asyncio.Queue[tuple[int, Delta | Exception]]) -> None:
        try:
            async for chunk in handle:
                delta = self.answers[index].take(chunk)
                if delta.finish_reason is not None:
                    self._service.metrics.answered(self.answers[index], time.perf_counter() - self._began)
                came.put_nowait((index, delta))
        except Exception as error:
            came.put_nowait((index, error))

    def counts(self, prompts: int) -> dict[str, int]:
        """OpenAI's token counts so far; `prompts`: different ones, each with equally many answers."""
        prompt = sum(handle.prompt_tokens for handle in self._handles[:: self._choices // prompts])
        new = sum(len(answer.times) for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def close(self) -> None:
        """Cancel what is under way and leave the queue; only the first time counts."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            open_handles = [handle for handle in self._handles if not handle.done]
        self._service.leave(self._choices)
        self._service.metrics.aborted(len(open_handles))
        await self._service.cancel(open_handles)
