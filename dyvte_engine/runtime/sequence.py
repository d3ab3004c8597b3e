"""One request on its way through the engine: its tokens so far, what chooses and ends them, and where they go."""

from __future__ import annotations

import time
from collections import abc
from functools import partial
from typing import Any

import transformers

from ..config import DecoderShape
from ..flops import paper_flops, true_flops
from ..models import Decoder, TokenizedPrompt
from ..policies import VisualTokenPolicy
from ..requests import GenerationResult, GenerationStats, Handle, StreamChunk, TokenLogprobs
from .kv_cache import KVCache
from .prefill import Prefilled
from .sampling import Sampler, StopRules


class Sequence:
    """A prompt, its answer so far, and the handle that its tokens go to.

    `index` is its number in the call; `policy` is bound to the model; `picture_flops` are those of the vision tower,
    under the policy and without one. `logprobs`: how many most likely tokens to name at every place, if any.
    `may_leave`: of its visual tokens all but the last row of a prompt that ends in a picture, which stays.
    `worst_pages`: what it needs at most, sharing none.
    """

    def __init__(
        self,
        index: int,
        prompt: TokenizedPrompt,
        policy: VisualTokenPolicy,
        sampler: Sampler,
        stops: StopRules,
        max_new_tokens: int,
        tokenizer: Any,
        visual_tokens: int,
        may_leave: int,
        worst_pages: int,
        picture_flops: tuple[float, float],
        priority: int = 0,
        stop_text: abc.Sequence[str] = (),
        logprobs: int | None = None,
    ):
        self.index, self.prompt, self.policy, self.priority = index, prompt, policy, priority
        self.max_new_tokens, self.visual_tokens, self.may_leave = max_new_tokens, visual_tokens, may_leave
        self.worst_pages = worst_pages
        self.sampler, self._stops, self._picture_flops = sampler, stops, picture_flops
        self._growing = GrowingText(tokenizer)
        self.logprobs, self.newest_logprobs = logprobs, None if logprobs is None else TokenLogprobs(0.0)
        self.handle: Handle | None = None
        self.streams = True  # else only its last chunk is made: nobody reads the others
        self.ids, self.new = list(prompt.input_ids), list[int]()
        self.finish_reason: str | None = None
        self._stop_text, self._decoded = stop_text, ""  # the text of all of `new`
        self._text = ""
        self._asked_at = time.perf_counter() - prompt.seconds
        self._begun_at = self._first_at = self._last_at = 0.0
        self._vision_s = 0.0
        self._pictures_reused: int | None = None
        self._figures: dict[str, Any] = {}
        self._flops: abc.Callable[[], dict[str, Any]] = dict  # figures that the first token need not wait for

    @property
    def rows(self) -> int:
        """K/V rows that a layer holds in the end if no visual token leaves; the last token is not fed."""
        return len(self.prompt.input_ids) + self.max_new_tokens - 1

    @property
    def done(self) -> bool:
        """Whether its handle has its result or an error."""
        assert self.handle is not None
        return self.handle.done

    def fail(self, error: BaseException) -> None:
        """It ends without a result, unless it has one."""
        if not self.done:
            assert self.handle is not None
            self.handle.fail(error)

    def begin(self) -> None:
        """Its turn has come."""
        self._begun_at = time.perf_counter()

    def saw_vision(self, seconds: float, reused: int | None) -> None:
        """So long took vision tower and projector, of all prompts prepared together; `reused` of its pictures."""
        self._vision_s, self._pictures_reused = self.prompt.seconds + seconds, reused

    def prefilled(self, decoder: Decoder, cache: KVCache, done: Prefilled, b: int, unshared: str | None) -> None:
        """Figures of its prefill, sequence b of `done`, read before any sequence leaves that batch.

        unshared: why its prefix was not shared.
        """
        pool, rows = cache.pool, [layer[b] for layer in done.rows]
        n = len(self.prompt.input_ids)
        self._flops = partial(_flops, decoder.shape, rows, n, *self._picture_flops)
        frontier = done.frontiers[b]
        known = "no picture" if frontier is None else "miss" if frontier[0] < 0 else "hit"
        self._figures = dict(
            prefix=unshared or known,
            prefix_frontier=frontier,
            rows_reused=[layer[b] for layer in done.reused],
            exit_layer=done.exit_layers[b],
            tokens_per_layer=rows,
            kv_bytes=cache.bytes_of(b),
            kv_bytes_shared=cache.shared(b) * pool.page_bytes,
            kv_bytes_keep_all=len(rows) * pool.pages(n) * pool.page_bytes,
        )

    def accept(self, token: int) -> None:
        """Its next token; sets `finish_reason` with the last one."""
        self._last_at = time.perf_counter()
        self._first_at = self._first_at or self._last_at
        self.ids.append(token)
        self.new.append(token)
        self._decoded = ""
        self.finish_reason = self._stops.reason(self.ids, self.new)
        if self._stop_text and self.finish_reason is None and any(stop in self._decode() for stop in self._stop_text):
            self.finish_reason, self._decoded = "stop_string", ""

    def emit(self) -> None:
        """Hand the newest token on, with the text it adds and, if it is the last, the result."""
        assert self.handle is not None
        if self.finish_reason is None and not self.streams:
            return
        text = self._new_text()
        result = None if self.finish_reason is None else self._result(self.finish_reason)
        self.handle.put(StreamChunk(self.index, self.new[-1], text, result, self.newest_logprobs))

    def _new_text(self) -> str:
        """What the newest token adds; an unfinished multi-byte character waits for its rest."""
        text = self._decode()
        if text.endswith(_UNFINISHED) and self.finish_reason is None:
            return ""
        added, self._text = text[len(self._text) :], text
        return added

    def _decode(self) -> str:
        self._decoded = self._decoded or self._growing.text(self.new, self.finish_reason is not None)
        return self._decoded

    def _result(self, finish_reason: str) -> GenerationResult:
        decode_s = self._last_at - self._first_at
        stats = GenerationStats(
            visual_tokens=self.visual_tokens,
            text_tokens=len(self.prompt.input_ids) - self.visual_tokens,
            new_tokens=len(self.new),
            ttft_s=self._first_at - self._asked_at,
            queued_s=self._begun_at - self._asked_at - self.prompt.seconds,
            vision_s=self._vision_s,
            pictures_reused=self._pictures_reused,
            decode_tokens_per_s=(len(self.new) - 1) / decode_s if decode_s > 0 else 0.0,
            **self._figures,
            **self._flops(),
        )
        return GenerationResult(self._text, list(self.new), finish_reason, stats)


class GrowingText:
    """The text of tokens that become more, by what the last few of them decode to: the way there does not get longer.

    What a token adds depends on those before it: characters may be several tokens, and decoders leave out the space
    that a text begins with. So known text ends with a whole character, and those asked for begin with some of it.
    """

    def __init__(self, tokenizer: Any):
        decode = tokenizer.backend_tokenizer.decode if _adds_nothing(tokenizer) else tokenizer.decode
        self._decode = partial(decode, skip_special_tokens=True)
        self._first = self._known = 0  # tokens are asked for from the one on; up to the other their text is known
        self._before = self._again = ""  # the text of those known, and of those of them that are asked for again

    def text(self, ids: list[int], whole: bool = False) -> str:
        """Of all ids, which begin with those of the last call. `whole`: by one look at all of them.

        What is between known text and the end of one that ends with "\\ufffd" may be left out.
        """
        asked = "" if whole else self._decode(ids[self._first :])
        if whole or not asked.startswith(self._again):  # a decoder that changes what is known
            if asked.endswith(_UNFINISHED):  # as some do, bytes and all, until the last character is whole
                return self._before + _UNFINISHED
            self._first, self._known, self._before, self._again = 0, 0, "", ""
            asked = self._decode(ids)
        text = self._before + asked[len(self._again) :]
        if len(ids) - self._known >= _ASKED and not text.endswith(_UNFINISHED):
            again = self._decode(ids[self._known :])
            if again:  # else a decoder might strip what follows, too
                self._first, self._known, self._before, self._again = self._known, len(ids), text, again
        return text


def _adds_nothing(tokenizer: Any) -> bool:
    """Whether its `decode` is that of the library it is from."""
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast) or tokenizer.clean_up_tokenization_spaces:
        return False
    homes = (getattr(tokenizer, name).__module__ or "" for name in ("decode", "_decode"))
    return all(home.startswith("transformers.tokenization_utils") for home in homes)


_ASKED = 8  # tokens at least whose text is asked for again
_UNFINISHED = "\ufffd"


def _flops(shape: DecoderShape, rows: list[int], n: int, under: float, without: float) -> dict[str, Any]:
    """Of a prompt of n rows; under, without: of its pictures, under the policy and without one."""
    full = [n] * len(rows)
    return dict(
        prefill_tflops=paper_flops(shape, rows, under) / 1e12,
        prefill_tflops_keep_all=paper_flops(shape, full, without) / 1e12,
        prefill_tflops_true=true_flops(shape, rows, under) / 1e12,
        prefill_tflops_true_keep_all=true_flops(shape, full, without) / 1e12,
    )
