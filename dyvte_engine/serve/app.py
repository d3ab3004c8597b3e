"""`create_app`: OpenAI's interface over one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from .. import __version__
from ..engine import Engine
from ..errors import DyvteError
from .chat import check_length, check_text, conversation, texts_of
from .errors import ApiError, JsonResponse, as_api_error, from_validation
from .front import Front, log
from .generate import respond
from .media import Media
from .options import ServeOptions
from .protocol import ChatRequest, CompletionRequest, TokenizeRequest
from .service import Service


def create_app(engine: Engine, options: ServeOptions | None = None) -> FastAPI:
    """An ASGI app. Its lifespan warms the engine up; until then /health is 503. `app.state.service` is its Service.

    Raises:
        DyvteError: a policy among the options that cannot run on this model.
    """
    options = options or ServeOptions()
    service = Service(engine, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        yield
        warming.cancel()
        service.close()

    off: Any = dict(docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY)  # the last is new; older ones have none
    app = FastAPI(title="dyvte-engine", version=__version__, lifespan=lifespan, **off)
    app.state.service = service
    app.add_middleware(Front, options=options, failed=service.metrics.error)
    for kind in (HTTPException, DyvteError, RequestValidationError):
        app.add_exception_handler(kind, _refusal)
    for path, endpoint, method in _ROUTES:
        app.add_api_route(path, endpoint, methods=[method], response_model=None, responses=_RESPONSES)
    return app


async def _refusal(request: Request, error: Exception) -> Response:
    refused = (
        from_validation(list(error.errors())) if isinstance(error, RequestValidationError) else as_api_error(error)
    )
    if refused.status_code == 500:
        log.error("request %s", request.state.request_id, exc_info=error)
    return refused.response()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, with pictures in it."""
    return await respond(_service(request), body, request)


async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue a text."""
    return await respond(_service(request), body, request)


async def models(request: Request) -> Response:
    """The model, and the policies that requests may name."""
    return JsonResponse({"object": "list", "data": [_model(_service(request))]})


async def one_model(name: str, request: Request) -> Response:
    """The same, for one name."""
    service = _service(request)
    service.check_model(name)
    return JsonResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return dict(
        id=service.options.model_name,
        object="model",
        created=_STARTED,
        owned_by="dyvte-engine",
        max_model_len=service.engine.max_len,
        policies=service.policy_names,
    )


async def health(request: Request) -> Response:
    """200 when requests are taken: after the warm-up, until the server is asked to stop."""
    service = _service(request)
    if service.draining or not service.ready:
        raise ApiError(503, "not ready", code="unavailable")
    return Response(status_code=200)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def version(request: Request) -> Response:
    """Of the package."""
    return JsonResponse({"version": __version__})


async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text, or of a conversation as the model reads it, those of its pictures included."""
    service = _service(request)
    service.check_model(body.model)
    check_length([body.prompt or "", *texts_of(body.messages or [])], service.options.max_text_characters)
    media = Media.of(body.messages or [], service.options.media, service.fetcher)
    service.enter(1)
    try:
        await media.fetch(service.fetcher)
        tokens = await service.in_thread(_tokens, service, body, media)
    finally:
        service.leave(1)
    return JsonResponse({"count": len(tokens), "max_model_len": service.engine.max_len, "tokens": tokens})


def _tokens(service: Service, body: TokenizeRequest, media: Media) -> list[int]:
    if body.messages is None:
        ids: list[int] = service.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens).input_ids
        return ids
    model = service.engine.model
    check_text(model.processor, body.messages)
    return service.engine.tokenize(conversation(body.messages, media.decode()))[0]


_NO_TELEMETRY = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
_STARTED = int(time.time())
_ROUTES: list[tuple[str, Any, str]] = [
    ("/v1/chat/completions", chat_completions, "POST"),
    ("/v1/completions", completions, "POST"),
    ("/v1/models", models, "GET"),
    ("/v1/models/{name:path}", one_model, "GET"),
    ("/tokenize", tokenize, "POST"),
    ("/health", health, "GET"),
    ("/metrics", metrics, "GET"),
    ("/version", version, "GET"),
]
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "an argument that is not accepted",
        401: "no valid API key",
        404: "another model",
        408: "the body came too slowly",
        413: "more bytes or pixels than accepted",
        422: "a picture that cannot be read",
        429: "the queue is full",
        500: "an internal error",
        503: "not ready, or out of memory",
    }.items()
}
