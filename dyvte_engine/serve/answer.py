"""One answer on its way to the client: its text up to a stop string, its log-probabilities, its end."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..requests import GenerationStats, StreamChunk, TokenLogprobs

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ENDS = {"stop": "stop", "stop_string": "stop", "length": "length", "time": "length"}


@dataclass(frozen=True)
class Delta:
    """What one token adds: text (held back while it may begin a stop string), and the token with log-probabilities."""

    text: str
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


@dataclass
class Answer:
    """Takes the engine's chunks, gives deltas. `times`: when each token came, by time.perf_counter."""

    stops: list[str]
    text: str = ""
    deltas: list[Delta] = field(default_factory=list)
    stats: GenerationStats | None = None
    finish_reason: str | None = None
    times: list[float] = field(default_factory=list)
    _held: str = ""
    _found: bool = False

    def take(self, chunk: StreamChunk) -> Delta:
        self.times.append(time.perf_counter())
        text = self._cut(chunk.text, last=chunk.result is not None)
        self.text += text
        if chunk.result is not None:
            self.stats = chunk.result.stats
            self.finish_reason = "stop" if self._found else _ENDS[chunk.result.finish_reason]
        delta = Delta(text, chunk.token_id, chunk.logprobs, self.finish_reason)
        self.deltas.append(delta)
        return delta

    def _cut(self, text: str, last: bool) -> str:
        """What can be shown of the text so far: nothing of a stop string nor behind it."""
        if self._found:
            return ""
        self._held += text
        places = [at for at in map(self._held.find, self.stops) if at >= 0]
        if places:
            self._found = True
            return self._held[: min(places)]
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self.stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def chat_logprobs(deltas: list[Delta], tokenizer: Any) -> dict[str, Any] | None:
    """OpenAI's `logprobs` of a chat choice; None without any."""
    rows = []
    for delta in deltas:
        if delta.logprobs is not None:
            row = _entry(delta.token_id, delta.logprobs.logprob, tokenizer)
            row["top_logprobs"] = [_entry(token, value, tokenizer) for token, value in delta.logprobs.top]
            rows.append(row)
    return {"content": rows} if rows else None


def _entry(token: int, logprob: float, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(_bytes(token, text, tokenizer))}


def _bytes(token: int, text: str, tokenizer: Any) -> bytes:
    """Of a token that may be a part of a character only: then its name says which bytes."""
    name = tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" not in text or name is None:
        return text.encode()
    if _BYTE.fullmatch(name):  # SentencePiece's
        return bytes.fromhex(name[3:5])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(letters[c] for c in name) if letters.keys() >= set(name) else text.encode()


def completion_logprobs(deltas: list[Delta], tokenizer: Any, offset: int = 0) -> dict[str, Any] | None:
    """OpenAI's `logprobs` of a completion; `offset`: characters of the answer before the first of these."""
    rows = [(delta, delta.logprobs) for delta in deltas if delta.logprobs is not None]
    if not rows:
        return None
    tokens = [tokenizer.decode([delta.token_id]) for delta, _ in rows]
    offsets = [offset + sum(len(d.text) for d, _ in rows[:i]) for i in range(len(rows))]
    tops = [{tokenizer.decode([t]): max(v, -9999.0) for t, v in given.top} for _, given in rows]
    return {
        "tokens": tokens,
        "token_logprobs": [max(given.logprob, -9999.0) for _, given in rows],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def usage(answers: list[Answer], prompts: int) -> dict[str, Any]:
    """OpenAI's usage object with this engine's figures. `prompts`: different prompts, each with equally many answers.

    A prompt counts once. exit_layer is that of the first prompt; shares and bytes are of the prompts together.
    """
    given = [a.stats for a in answers if a.stats is not None]
    first = given[:: max(len(given) // prompts, 1)]
    prompt = sum(s.visual_tokens + s.text_tokens for s in first)
    new = sum(s.new_tokens for s in given)
    whole = sum(s.prefill_tflops_true_keep_all for s in first)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "visual_tokens": sum(s.visual_tokens for s in first),
        "exit_layer": first[0].exit_layer if first else None,
        "prefill_share": sum(s.prefill_tflops_true for s in first) / whole if whole else 1.0,
        "kv_bytes": sum(s.kv_bytes for s in first),
        "kv_bytes_keep_all": sum(s.kv_bytes_keep_all for s in first),
    }
