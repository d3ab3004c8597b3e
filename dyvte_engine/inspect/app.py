"""The page as an ASGI app that loads nothing from elsewhere, and its process."""

from __future__ import annotations

from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..assets import EXAMPLES
from ..inputs.images import MAX_DATA_URL
from ..serve.run import listen
from .page import HEAD, build
from .run import Inspector

# The browser itself refuses whatever would come from another host; gradio's own code needs the unsafe ones.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; media-src 'self' blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def create_app(inspector: Inspector, webcam: bool = False) -> FastAPI:
    """The page over one engine. `webcam`: pictures may come from a camera too."""
    off: Any = dict(docs_url=None, redoc_url=None, openapi_url=None)
    app = FastAPI(title="dyvte inspect", **off)
    app.add_middleware(_OnlyFromHere)
    return gr.mount_gradio_app(
        app,
        build(inspector, webcam).queue(default_concurrency_limit=8),
        path="/",
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        allowed_paths=[str(EXAMPLES)],
        max_file_size=MAX_DATA_URL,
        theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=_SANS, font_mono=_MONO),
        head=HEAD,
    )


class _OnlyFromHere:
    """Adds the header by which the browser loads nothing from another host."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = _POLICY
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


def serve(app: FastAPI, host: str, port: int) -> None:
    """Listen until a signal; port 0 is any free one.

    Raises:
        SourceError: the address is not free, or not of this machine.
    """
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listen(host, port)])
