"""What is asked of an engine, and what comes back: requests, their tokens as they come, results and figures."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .checks import is_real
from .errors import DyvteError, InvalidArgumentError

if TYPE_CHECKING:
    from .policies import VisualTokenPolicy
    from .runtime.worker import Worker


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt for `Engine.submit`.

    Attributes:
        prompt, images, videos, video_fps, chat, generation_config: as in `Engine.generate`, of one prompt.
        policy: when its visual tokens leave: a policy, its notation ("fastv:2,0.5+fixed:15"), or None for the engine's.
        seed: of its samples.
        priority: requests of a higher one are begun first; among equals the first to come.
        options: sampling and stop options, as the keywords of `Engine.generate`.
        processors: further logits processors, called as transformers' are: (ids int64 [1, n], scores f32 [1, vocab]) ->
            scores. They come after the penalties and before temperature and the like. One with a state must be this
            request's own.
        stop_text: texts that end the answer with the token after which its text holds one of them. Unlike the option
            `stop_strings`, they need no table of the vocabulary (seconds for 150,000 tokens), and never begin in the
            prompt.
        logprobs: every chunk says the log-probability of its token and of so many most likely ones.
    """

    prompt: Any
    images: Any = None
    videos: Any = None
    video_fps: float = 2.0
    chat: bool = True
    policy: VisualTokenPolicy | str | None = None
    seed: int = 0
    priority: int = 0
    generation_config: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    processors: Sequence[Callable[[Any, Any], Any]] = ()
    stop_text: Sequence[str] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one answer. Bytes are those of the pages read right after the prefill, `kv_bytes_shared` of those of
    them that other questions about these pictures may read too.

    Attributes:
        exit_layer: layer after which the last visual token left (-1: before the first); None if some stayed or there
            were none.
        visual_tokens: of the prompt, before any policy.
        tokens_per_layer: prompt rows that each layer has; rows_reused: how many of them it did not compute, because
            another question about these pictures was there before or is computed together with this one.
        prefix: whether what comes before the question was known: "hit", "miss", "no picture", or why it is not looked
            for: "off", "policy" (it takes visual tokens out before the first layer), "drop_early_kv".
        prefix_frontier: last layer that the visual tokens of this prefix were known in before and after; -1: in none.
        ttft_s: seconds from the call to this prompt's first token (waiting, processor, vision, prefill, sampling).
        queued_s: the part of it before its turn came; vision_s: in processor, vision tower and projector.
        pictures_reused: how many pictures and videos the vision tower did not see again; None where they cannot be
            shared (docs/again.md).
        decode_tokens_per_s: this sequence's tokens after the first, over the time they took; 0 for one token.
        prefill_tflops: the paper's count (docs/method.md, 4), vision tower included, as if nothing were reused;
            `_keep_all` without any exit.
        prefill_tflops_true: grouped-query projections and causal attention counted as they are, LM head included.
    """

    exit_layer: int | None
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    tokens_per_layer: list[int]
    rows_reused: list[int]
    prefix: str
    prefix_frontier: tuple[int, int] | None
    ttft_s: float
    queued_s: float
    vision_s: float
    pictures_reused: int | None
    decode_tokens_per_s: float
    prefill_tflops: float
    prefill_tflops_keep_all: float
    prefill_tflops_true: float
    prefill_tflops_true_keep_all: float
    kv_bytes: int
    kv_bytes_shared: int
    kv_bytes_keep_all: int


@dataclass(frozen=True)
class GenerationResult:
    """An answer. `finish_reason` is "stop" (end token, which `token_ids` hold), "stop_string", "length" or "time"."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural) at one place of an answer, by the model's logits as they are: no penalty, no mask.

    Attributes:
        logprob: of the token that was chosen.
        top: token ids and log-probabilities of the most likely ones, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StreamChunk:
    """One token of prompt `index`: the text it adds (may be empty) and, with the last one, the whole `result`."""

    index: int
    token_id: int
    text: str
    result: GenerationResult | None = None
    logprobs: TokenLogprobs | None = None


def _nothing() -> None:
    """Cancels what is done."""


class Handle:
    """A request under way. Iterate over it for `StreamChunk`s, with `for` or `async for`, or wait for its `result`.

    Its chunks are handed out once: two loops over one handle share them. `prompt_tokens`: visual ones included.
    """

    def __init__(
        self,
        worker: Worker,
        cancel: Callable[[], None],
        chunks: deque[StreamChunk] | None = None,
        prompt_tokens: int = 0,
    ):
        self._worker, self._cancel, self.prompt_tokens = worker, cancel, prompt_tokens
        self._chunks: deque[StreamChunk] = deque() if chunks is None else chunks
        self._result: GenerationResult | None = None
        self._error: BaseException | None = None

    def put(self, chunk: StreamChunk) -> None:
        """A token has come."""
        self._chunks.append(chunk)  # before the result: who sees that it is done finds every chunk
        if chunk.result is not None:
            self._result, self._cancel = chunk.result, _nothing

    def fail(self, error: BaseException) -> None:
        """It ends without a result."""
        self._error, self._cancel = error, _nothing  # which held the request, its pictures and this handle

    @property
    def done(self) -> bool:
        """Whether its last token has come, or it failed or was cancelled."""
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        """End it now and free what it holds. Whoever waits for it gets RequestCancelledError; no effect when done."""
        self._cancel()

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the answer, at most `timeout` seconds.

        Raises:
            TimeoutError: it has not come. RequestCancelledError, or whatever error the request met.
        """
        if timeout is not None and not (is_real(timeout) and timeout == timeout):
            raise InvalidArgumentError(f"timeout is {timeout!r}; accepted: seconds, or None")
        if not self._worker.run_until(lambda: self.done, timeout):
            raise TimeoutError(f"no result within {timeout} s")
        self._raise_error()
        assert self._result is not None
        return self._result

    def _raise_error(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, DyvteError):
            raise type(self._error)(*self._error.args) from self._error
        raise self._error

    def __iter__(self) -> Iterator[StreamChunk]:
        while not self._ended():
            self._worker.run_until(lambda: bool(self._chunks) or self.done)
            chunk = self._take()
            if chunk is not None:
                yield chunk

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        while not self._ended():
            await self._until(lambda: bool(self._chunks) or self.done)
            chunk = self._take()
            if chunk is not None:
                yield chunk

    def _take(self) -> StreamChunk | None:
        """The next chunk, unless another loop has it."""
        try:
            return self._chunks.popleft()
        except IndexError:
            return None

    def _ended(self) -> bool:
        """Whether no chunk is left and none will come. Raises what the request met instead of a result."""
        if not self.done or self._chunks:  # in this order: the last chunk comes before the result
            return False
        self._raise_error()
        return True

    async def wait(self) -> GenerationResult:
        """As `result`, for `await`."""
        await self._until(lambda: self.done)
        return self.result()

    async def _until(self, ready: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        came = loop.create_future()

        def wake() -> None:
            if not came.done():
                came.set_result(None)

        with self._worker.waking(ready, wake, loop):
            await came
