"""Requests to an app, in this process or over a real socket."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time

import httpx
import numpy as np
import uvicorn
from PIL import Image

from dyvte_engine import EXAMPLES
from dyvte_engine.serve.app import create_app
from dyvte_engine.serve.options import ServeOptions

SHIPPED = json.loads((EXAMPLES / "examples.json").read_text())
QUESTION = SHIPPED[0]["prompt"]
PICTURE = EXAMPLES / SHIPPED[0]["file"]


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def image_part(url: str | None = None) -> dict:
    return {"type": "image_url", "image_url": {"url": url or data_url(PICTURE.read_bytes())}}


def asked(text: str = QUESTION, *urls: str | None) -> list:
    """One user turn; by default about the first example."""
    parts = [image_part(url) for url in urls or (None,)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat_body(**fields) -> dict:
    return {"model": "nano", "messages": asked(), "max_tokens": 8} | fields


class Asgi:
    """An app called in this process, warmed up."""

    def __init__(self, engine, options: ServeOptions | None = None):
        self.app = create_app(engine, options)
        self.service = self.app.state.service
        self.service.ready = True

    def __call__(self, method: str, path: str, **arguments) -> httpx.Response:
        return asyncio.run(self.send(method, path, **arguments))

    async def send(self, method: str, path: str, **arguments) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await client.request(method, path, **arguments)

    def chat(self, **fields) -> httpx.Response:
        return self("POST", "/v1/chat/completions", json=chat_body(**fields))

    def complete(self, **fields) -> httpx.Response:
        return self("POST", "/v1/completions", json={"model": "nano", "prompt": "what is", "max_tokens": 4} | fields)

    def events(self, path: str = "/v1/chat/completions", **fields) -> list:
        """Of a stream, decoded; the last is "[DONE]"."""
        answer = self("POST", path, json=fields | {"stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextlib.contextmanager
def listening(engine, options: ServeOptions | None = None):
    """A real server on a free port of 127.0.0.1; its address and its app."""
    app = create_app(engine, options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started and app.state.service.ready)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
