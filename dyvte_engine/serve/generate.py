"""The two endpoints that answer: from a checked body to requests of the engine, and their answers as JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import fastapi
from fastapi import Response

from ..requests import Request
from . import sampling
from .answer import Delta, usage
from .chat import check_length, check_text, conversation, mark_ids, texts_of
from .errors import ApiError, JsonResponse
from .media import Media
from .protocol import ChatRequest, CompletionRequest
from .service import Call, Service
from .shapes import ChatShape, CompletionShape
from .streaming import EventStream, unless_gone

Body = ChatRequest | CompletionRequest


async def respond(service: Service, body: Body, request: fastapi.Request) -> Response:
    """The whole answer, or a stream once its first token is there: errors before that have their status.

    Raises:
        ApiError, DyvteError: refused, or failed before the first token.
    """
    service.check_model(body.model)
    prompts = _prompts(body)
    choices = body.n * len(prompts)
    sampling.check_bounds(body, choices, service.options)
    service.policy(body.policy)
    media = None
    texts = texts_of(body.messages) if isinstance(body, ChatRequest) else prompts
    check_length(texts, service.options.max_text_characters)
    if isinstance(body, ChatRequest):
        media = Media.of(body.messages, service.options.media, service.fetcher)
    call = Call(service, choices, sampling.stops_of(body))
    shape = _shape(service, body, request)
    try:
        deltas = await unless_gone(request, _begin(service, body, media, call))
        if body.stream:
            events = _events(body, call, shape, deltas, len(prompts), request)
            return EventStream(events, call.close, service.options.stall_seconds)
        await unless_gone(request, _drain(deltas))
        figures = usage(call.answers, len(prompts))
        _note(request, body, figures)
        content = await service.in_thread(shape.whole, call.answers, figures)
    except BaseException:
        await call.close()
        raise
    await call.close()
    return JsonResponse(content)


def _prompts(body: Body) -> list[Any]:
    if isinstance(body, ChatRequest):
        return [None]
    return [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)


def _shape(service: Service, body: Body, request: fastapi.Request) -> ChatShape:
    kind = ChatShape if isinstance(body, ChatRequest) else CompletionShape
    asked = body.stream_options is not None and body.stream_options.include_usage
    return kind(request.state.request_id, service.options.model_name, service.tokenizer, asked)


async def _begin(service: Service, body: Body, media: Media | None, call: Call) -> AsyncIterator[tuple[int, Delta]]:
    """Everything up to the first token; then what comes, that one included."""
    if media is not None:
        await media.fetch(service.fetcher)
    await call.submit(partial(_requests, service, body, media))
    deltas = call.deltas()
    return _chained(await anext(deltas), deltas)


async def _chained(
    first: tuple[int, Delta], rest: AsyncIterator[tuple[int, Delta]]
) -> AsyncIterator[tuple[int, Delta]]:
    yield first
    async for one in rest:
        yield one


async def _drain(deltas: AsyncIterator[tuple[int, Delta]]) -> None:
    async for _ in deltas:
        pass


def _requests(service: Service, body: Body, media: Media | None) -> list[Request]:
    """All answers' requests. Takes time: pictures are decoded here, grammars compiled."""
    engine = service.engine
    base = engine.model.hf.generation_config
    options = sampling.options_of(body, base, engine.max_len)
    prompts = _chat_prompt(service, body, media) if isinstance(body, ChatRequest) else _texts(service, body)
    count, seed = body.n * len(prompts), sampling.seed_of(body)
    grammars = service.grammars.processors(body, count)
    return [
        Request(
            prompts[i // body.n],
            chat=isinstance(body, ChatRequest),
            video_fps=body.video_fps if isinstance(body, ChatRequest) else 2.0,
            policy=service.policy(body.policy),
            seed=seed + i,
            options=options,
            processors=[*sampling.penalties(body), *grammars[i : i + 1]],
            stop_text=sampling.stops_of(body),
            logprobs=sampling.top_logprobs(body),
        )
        for i in range(count)
    ]


def _chat_prompt(service: Service, body: ChatRequest, media: Media | None) -> list[Any]:
    check_text(service.engine.model.processor, body.messages)
    return [conversation(body.messages, [] if media is None else media.decode())]


def _texts(service: Service, body: CompletionRequest) -> list[str]:
    """Finished texts, in which control tokens are meant; marks of pictures are not, since there are none."""
    prompts, marks = _prompts(body), mark_ids(service.engine.model.processor)
    for prompt in prompts:
        if marks & set(service.tokenizer(prompt, add_special_tokens=False).input_ids):
            raise ApiError(400, "prompt holds a mark of a picture; pictures go into /v1/chat/completions", "prompt")
    return prompts


async def _events(
    body: Body,
    call: Call,
    shape: ChatShape,
    deltas: AsyncIterator[tuple[int, Delta]],
    prompts: int,
    request: fastapi.Request,
) -> AsyncIterator[dict[str, Any]]:
    lengths: dict[int, int] = {}
    asked = body.stream_options
    async for index, delta in deltas:
        events = shape.deltas(index, delta, lengths.get(index, 0))
        opening = None if index in lengths else shape.opening(index)
        counts = {"usage": call.counts(prompts)} if asked is not None and asked.continuous_usage_stats else {}
        for event in [*filter(None, [opening]), *events]:
            yield event | counts
        lengths[index] = lengths.get(index, 0) + len(delta.text)
    figures = usage(call.answers, prompts)
    _note(request, body, figures)
    if asked is not None and asked.include_usage:
        yield shape.usage(figures)


def _note(request: fastapi.Request, body: Body, figures: dict[str, Any]) -> None:
    """For the access log."""
    names = ("prompt_tokens", "completion_tokens", "visual_tokens", "exit_layer")
    request.state.figures = {name: figures[name] for name in names} | {"policy": body.policy}
