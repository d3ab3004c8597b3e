"""The same server as a deployment of Ray Serve: `serve run dyvte_engine.serve.ray:build_app model=nano`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from .options import MediaLimits, ServeOptions

_BODY_OF_MEDIA = 1.5  # base64 is a third longer, and there is text


class Arguments(BaseModel):
    """What the application's `args` may hold; the options of `dyvte-engine serve`, most under the same names.

    engine: further arguments of `Engine.from_pretrained`. How many replicas there are and what they hold (GPUs, memory)
    is said by Ray's own deployment options.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "nano"
    policy: str = "auto"
    allow_policy: list[str] = []
    served_model_name: str | None = None
    api_keys: list[str] = []
    allow_domain: list[str] = []
    max_batch: int = 8
    max_len: int | None = None
    max_queue: int = ServeOptions.max_queue
    max_media_bytes: int = MediaLimits.bytes
    engine: dict[str, Any] = {}


def build_app(args: Arguments) -> Any:
    """An application of one deployment named "dyvte". Each replica has an engine, warmed up before it takes requests.

    A replica takes as many requests as it has places, so Ray sends others elsewhere and 429 means that all are full.
    """

    def app() -> FastAPI:
        from .build import build

        given: dict[str, Any] = dict(max_queue=args.max_queue, api_keys=tuple(args.api_keys))
        given["body_bytes"] = int(args.max_media_bytes * _BODY_OF_MEDIA)
        if args.served_model_name is not None:
            given["model_name"] = args.served_model_name
        media = dict(domains=tuple(args.allow_domain), bytes=args.max_media_bytes)
        size = dict(args.engine, max_batch=args.max_batch, max_len=args.max_len)
        built = build(args.model, args.policy, args.allow_policy, size, media, given)
        built.state.service.warm_up_here()
        return built

    places = args.max_batch + args.max_queue
    deployment = serve.deployment(name="dyvte", max_ongoing_requests=places)(serve.ingress(app)())
    return deployment.bind()
