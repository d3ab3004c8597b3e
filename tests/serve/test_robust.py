"""Clients that go away, do not read or come in crowds; failures; the way up and down."""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
import uvicorn

from dyvte_engine import CacheError
from dyvte_engine.serve.options import ServeOptions
from dyvte_engine.serve.streaming import EventStream

from . import broken
from .common import Asgi, asked, chat_body, free_port, listening, until

LONG = dict(model="nano", prompt="what is", max_tokens=1500, ignore_eos=True)


def idle(engine) -> bool:
    load = engine.load
    return not (load["running"] or load["waiting"] or load["prefilling"] or load["pages_promised"])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_what_it_held(engine, stream):
    with listening(engine) as (address, app):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(LONG | {"stream": stream, "n": 2}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: engine.load["running"] == 2)
        gone = time.monotonic()
        until(lambda: idle(engine))
        assert time.monotonic() - gone < 2
        until(lambda: app.state.service._pending == 0)
        aborted = 'request_success_total{finished_reason="abort",model_name="nano"} 2.0'
        assert aborted in httpx.get(f"{address}/metrics").text
    engine.check_integrity()


def test_a_reader_that_stalls_holds_nobody_up_and_is_closed(engine):
    """Its answer is computed to the end meanwhile, another one's too."""
    app = Asgi(engine, ServeOptions(stall_seconds=0.5))
    body = json.dumps(LONG | {"stream": True, "max_tokens": 200}).encode()
    closed = asyncio.Event

    async def stalled():
        sent, done = [], closed()

        async def receive():
            if not sent:
                sent.append("body")
                return dict(type="http.request", body=body, more_body=False)
            await done.wait()

        async def send(message):
            await asyncio.sleep(60 if message["type"] == "http.response.body" else 0)

        headers = [(b"content-type", b"application/json")]
        scope = dict(type="http", method="POST", path="/v1/completions", headers=headers, query_string=b"", client=None)
        call = asyncio.create_task(app.app(scope, receive, send))
        other = await app.send("POST", "/v1/completions", json=LONG | {"max_tokens": 20})
        await asyncio.wait_for(call, 10)
        return other

    assert asyncio.run(stalled()).status_code == 200
    assert app.service._pending == 0 and idle(engine)


def test_the_queue_is_bounded(engine):
    app = Asgi(engine, ServeOptions(max_queue=1))  # and four that run

    async def crowd():
        many = [app.send("POST", "/v1/completions", json=LONG | {"max_tokens": 40}) for _ in range(9)]
        return await asyncio.gather(*many)

    answers = asyncio.run(crowd())
    assert sorted(a.status_code for a in answers) == [200] * 5 + [429] * 4
    refused = next(a for a in answers if a.status_code == 429)
    assert refused.headers["retry-after"] and refused.json()["error"]["type"] == "rate_limit_error"
    assert app.complete().status_code == 200
    assert app.complete(prompt=["x"] * 6).status_code == 429
    app.service._pending = 5
    assert app("POST", "/tokenize", json={"prompt": "x"}).status_code == 429


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CacheError("pages"), MemoryError()])
@pytest.mark.parametrize("stream", [True, False])
def test_out_of_memory_is_a_503_of_that_request(app, engine, monkeypatch, error, stream):
    prepare = engine.model.prepare
    engine.forget()  # or a picture that was asked about before would not be prepared

    def short(prompts, *options):
        if any(p.inputs for p in prompts):
            raise error
        return prepare(prompts, *options)

    monkeypatch.setattr(engine.model, "prepare", short)

    async def both():
        bad = app.send("POST", "/v1/chat/completions", json=chat_body(stream=stream))
        return await asyncio.gather(bad, app.send("POST", "/v1/completions", json=LONG | {"max_tokens": 30}))

    bad, good = asyncio.run(both())
    assert bad.status_code == 503 and bad.json()["error"]["code"] == "out_of_memory" and bad.headers["retry-after"]
    assert good.status_code == 200 and good.json()["usage"]["completion_tokens"] == 30
    engine.check_integrity()


def test_what_fails_in_a_stream_is_an_event_of_it(app, engine, monkeypatch):
    class Breaks:
        def __init__(self, *penalty):
            self.calls = 0

        def __call__(self, ids, scores):
            self.calls += 1
            if self.calls == 3:
                raise MemoryError
            return scores

    monkeypatch.setattr("dyvte_engine.serve.sampling.Penalty", Breaks)
    events = app.events("/v1/completions", **LONG | {"presence_penalty": 1})
    assert events[-1] == "[DONE]" and events[-2]["error"]["code"] == "out_of_memory"
    assert len(events) == 4


def test_pictures_do_not_hold_up_the_event_loop(app, monkeypatch):
    from dyvte_engine.serve.media import Media

    decode, began = Media.decode, threading.Event()

    def slow(self):
        began.set()
        time.sleep(0.5)
        return decode(self)

    monkeypatch.setattr(Media, "decode", slow)

    async def health_meanwhile():
        chat = asyncio.create_task(app.send("POST", "/v1/chat/completions", json=chat_body()))
        while not began.is_set():
            await asyncio.sleep(0.005)
        started = time.monotonic()
        assert (await app.send("GET", "/health")).status_code == 200
        took = time.monotonic() - started
        assert not chat.done()
        return took, await chat

    took, chat = asyncio.run(health_meanwhile())
    assert took < 0.3 and chat.status_code == 200


def test_nothing_is_taken_before_the_warm_up_nor_while_draining(engine):
    app = Asgi(engine)
    app.service.ready = False
    assert app("GET", "/health").status_code == 503 and app.chat().status_code == 503
    asyncio.run(app.service.warm_up())
    assert app("GET", "/health").status_code == 200 and app.chat().status_code == 200
    app.service.draining = True
    assert app("GET", "/health").status_code == 503
    assert app.chat().json()["error"]["message"] == "the server is stopping"


def test_a_warm_up_that_fails_takes_no_requests(engine, monkeypatch):
    app = Asgi(engine)
    app.service.ready = False
    monkeypatch.setattr(engine, "warm_up", lambda: 1 / 0)
    asyncio.run(app.service.warm_up())
    assert app("GET", "/health").status_code == 503


def test_a_second_signal_ends_it(engine):
    from dyvte_engine.serve.run import Server

    app = Asgi(engine)
    server = Server(uvicorn.Config(app.app))
    server.handle_exit(signal.SIGTERM, None)
    assert app.service.draining and server.should_exit and not server.force_exit
    server.handle_exit(signal.SIGTERM, None)
    assert server.force_exit


def test_a_process_that_still_holds_pages_says_so(app, engine, monkeypatch):
    from dyvte_engine.serve import run

    monkeypatch.setattr(run, "_log_to_stderr", lambda: None)
    monkeypatch.setattr(run.Server, "run", lambda self, sockets: [one.close() for one in sockets])
    run.serve(app.app, "127.0.0.1", 0, 1, 9)
    page = engine.pool.allocator.alloc(1)
    with pytest.raises(CacheError, match="add up"):
        run.serve(app.app, "127.0.0.1", 0, 1, 9)
    engine.pool.allocator.free(page)


@pytest.mark.parametrize("announced", [True, False])
def test_who_sends_too_much_can_read_so(engine, announced):
    piece = b" " * 2**16
    if announced:
        pieces = [broken.request("/tokenize", b"", length=8 * 2**20), *[piece] * 128]
    else:
        chunk = b"10000\r\n" + piece + b"\r\n"
        head = broken.request("/tokenize", b"", "transfer-encoding: chunked", length=-1)
        pieces = [head, *[chunk] * 128, b"0\r\n\r\n"]
    with listening(engine, ServeOptions(body_bytes=1000)) as (address, _):
        port = int(address.rpartition(":")[2])
        assert [asyncio.run(broken.exchange(port, pieces)) for _ in range(3)] == [413] * 3


def test_who_sends_too_much_for_ever_is_cut_off(engine):
    with listening(engine, ServeOptions(body_bytes=1000, linger_seconds=0.3)) as (address, _):
        port = int(address.rpartition(":")[2])
        endless = itertools.chain([broken.request("/tokenize", b"", length=10**12)], itertools.repeat(b" " * 2**16))
        began = time.monotonic()
        assert asyncio.run(broken.exchange(port, endless)) in (0, 413)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("stream", [True, False])
def test_answers_of_one_request_ask_the_processor_once(app, engine, monkeypatch, stream):
    calls, tokenize = [], engine.model.tokenize
    monkeypatch.setattr(engine.model, "tokenize", lambda *a: calls.append(a) or tokenize(*a))
    assert app.chat(n=4, stream=stream, temperature=1.0, max_tokens=2).status_code == 200
    assert len(calls) == 1


@pytest.fixture
def process():
    """The command itself, with its address."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "dyvte_engine.commands.main",
        "serve",
        "nano",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "DYVTE_API_KEY": "word", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"

    def healthy():
        assert started.poll() is None, started.stderr.read()
        try:
            return httpx.get(f"{address}/health").status_code == 200
        except httpx.TransportError:
            return False

    until(healthy, 60)
    yield started, address
    started.kill()
    started.wait()


def test_sigterm_drains(process):
    started, address = process
    headers = {"authorization": "Bearer word"}
    assert httpx.post(f"{address}/v1/completions", json=LONG).status_code == 401
    body = LONG | {"stream": True, "max_tokens": 300}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and len(rest) > 50
    assert started.wait(20) == 0
    records = [json.loads(line) for line in started.stderr.read().splitlines() if line.startswith("{")]
    assert records[-1]["status"] == 200 and records[-1]["completion_tokens"] == 300
    assert all(asked()[0]["content"][1]["text"] not in json.dumps(record) for record in records)


@pytest.mark.parametrize("ticks", range(6))
def test_a_stream_ends_whenever_the_client_goes_away(ticks):
    """At the very moment that something was sent, too."""
    closed, sent = [], []

    async def run():
        gone = asyncio.Event()

        async def endless():
            while True:
                await asyncio.sleep(0)
                yield {"event": len(sent)}

        async def close():
            closed.append(True)

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if len(sent) == 5:
                asyncio.create_task(leave()).add_done_callback(lambda _: None)

        async def leave():
            for _ in range(ticks):
                await asyncio.sleep(0)
            gone.set()

        await asyncio.wait_for(EventStream(endless(), close, 9.0)({"type": "http"}, receive, send), 2)

    asyncio.run(run())
    assert closed == [True] and len(sent) < 30


@pytest.mark.parametrize(
    "asked, variable, now, want", [(3, None, 8, 3), (None, None, 8, 7), (None, None, 1, 1), (None, "4", 8, None)]
)
def test_a_core_is_left_to_http(asked, variable, now, want, monkeypatch):
    from dyvte_engine.commands import serve

    limits = []
    monkeypatch.setattr("torch.get_num_threads", lambda: now)
    monkeypatch.setattr("torch.set_num_threads", limits.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    serve._limit(asked)
    assert limits == ([] if want is None else [want])
