"""The same server as a deployment of Ray Serve: `serve run dyvte_engine.serve.ray:build_app model=nano`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from .options import MediaLimits, ServeOptions

_BODY_OF_MEDIA = 1.5  # base64 is a third longer, and there is text
_BY_SESSION = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


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

    A replica takes as many requests as it has places. Requests with the same header `x-session-id` come to the same
    replica, whose engine knows their pictures, while it is there and has a place; then to the next one on Ray's ring.
    As many as a replica's queue may wait outside; what comes then is a 429.
    """

    def app() -> FastAPI:
        from .build import build

        given: dict[str, Any] = dict(max_queue=args.max_queue, api_keys=tuple(args.api_keys))
        given.update(body_bytes=int(args.max_media_bytes * _BODY_OF_MEDIA), replica=_replica_id())
        if args.served_model_name is not None:
            given["model_name"] = args.served_model_name
        media = dict(domains=tuple(args.allow_domain), bytes=args.max_media_bytes)
        size = dict(args.engine, max_batch=args.max_batch, max_len=args.max_len)
        built = build(args.model, args.policy, args.allow_policy, size, media, given)
        built.state.service.warm_up_here()
        return built

    deployment = serve.deployment(
        name="dyvte",
        max_ongoing_requests=args.max_batch + args.max_queue,
        max_queued_requests=max(args.max_queue, 1),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        request_router_config=RequestRouterConfig(request_router_class=_BY_SESSION),
    )(serve.ingress(app)())
    return deployment.bind()


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)
