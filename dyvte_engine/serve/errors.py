"""Errors as OpenAI's error objects. What a client reads names its own arguments, never a path or an address of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ..errors import CacheError, DyvteError, ImageError, InvalidArgumentError, PromptError, RequestCancelledError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
# What the engine calls by another name than the client.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "request.stop_text": "stop",
    "sequence_bias": "logit_bias",
    "prompts": "messages",
    "request.logprobs": "logprobs",
}
_NAME = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, _NAMES)) + r")\b")
_ARGUMENT = re.compile(r"([\w.]+(?:\[\w+\])*) is ")  # how an error about one begins
_ADDRESS = re.compile(r"\s*\b(at )?0x[0-9a-fA-F]{5,}")
_PATH = re.compile(r"(?<![\w./])(?:~|[A-Za-z]:)?(?:[/\\][\w.+@~-]+){2,}")
_LONGEST = 500


class ApiError(HTTPException):
    """A refusal, as the client will read it: `param` names the argument, `code` the reason."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "service_unavailable"
        )
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JsonResponse(self.body(), self.status_code, self.headers)


class JsonResponse(Response):
    """JSON in ASCII: text with halves of surrogate pairs, which clients may send, can be sent back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


def dumps(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def as_api_error(error: BaseException) -> ApiError:
    """What the client is to know of any error. Whatever is not on purpose is a 500 without a detail."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, ImageError):
        return ApiError(422, public_text(error), "messages", "invalid_media")
    if isinstance(error, (InvalidArgumentError, PromptError)):
        text = public_text(error)
        named = _ARGUMENT.match(text)
        return ApiError(400, text, named and named[1])
    if isinstance(error, (CacheError, MemoryError, torch.OutOfMemoryError)) or _out_of_memory(error):
        return ApiError(503, "not enough memory for this request now; try again", code="out_of_memory", headers=_RETRY)
    if isinstance(error, RequestCancelledError):
        return ApiError(503, "the request was cancelled", code="cancelled")
    return ApiError(500, "internal error; the server's log has the details under this request's id")


_RETRY = {"retry-after": "1"}


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def public_text(error: DyvteError) -> str:
    """An engine's message with the client's names for arguments, without paths and addresses."""
    text = _NAME.sub(lambda found: _NAMES[found[1]], str(error))
    return _PATH.sub("a file", _ADDRESS.sub("", text))[:_LONGEST]


def from_validation(errors: list[Any]) -> ApiError:
    """Of pydantic's list: each place and reason once, none of the values."""
    seen: dict[str, str] = {}
    for error in errors[:8]:
        place = ".".join(str(part)[:64] for part in error["loc"] if part != "body" and "[" not in str(part)) or "body"
        reason = "not supported" if error["type"] == "extra_forbidden" else error["msg"]
        if error["type"] == "json_invalid":
            place, reason = "body", "no JSON"
        elif error["type"] == "value_error":  # of this project's own checks, which begin with the argument
            reason = reason.removeprefix("Value error, ")
            if place == "body":
                place, reason = reason.split(" ", 1)
        seen.setdefault(place, reason)
    text = "; ".join(f"{place}: {reason}" for place, reason in seen.items())
    return ApiError(400, text[:_LONGEST], next(iter(seen), None))
