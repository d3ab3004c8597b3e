"""The holes that servers of this kind were found to have, one by one."""

import asyncio
import json
import re
import socket
import struct
import time
import zlib

import httpcore
import pytest

from dyvte_engine import ImageError
from dyvte_engine.serve.build import build
from dyvte_engine.serve.errors import ApiError, public_text
from dyvte_engine.serve.fetch import Fetcher, ForbiddenAddressError, GuardedBackend, is_global
from dyvte_engine.serve.front import Front
from dyvte_engine.serve.media import Media
from dyvte_engine.serve.options import MediaLimits, ServeOptions
from tests import tiny

from .common import PICTURE, Asgi, asked, chat_body, data_url, encoded, image_part, noise

OK = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s"


class Net(httpcore.AsyncNetworkBackend):
    """A network of canned answers by host; `asked` is who was connected to."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.asked.append((host, port))
        return httpcore.AsyncMockStream([self.answers[host]])

    async def sleep(self, seconds):
        await asyncio.sleep(seconds)


def fetch(url, answers=None, most=10**6, **limits):
    net = Net(answers or {})
    fetcher = Fetcher(MediaLimits(domains=("good.example", "also.example"), **limits), net)
    try:
        return asyncio.run(fetcher.fetch(url, "place", most)), net.asked
    except ApiError as error:
        return error, net.asked


def moved(where: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nlocation: {where}\r\ncontent-length: 0\r\n\r\n".encode()


def test_nothing_is_fetched_unless_domains_are_allowed(app):
    for url in ("http://good.example/x.png", "https://127.0.0.1/x", "file:///etc/passwd", "/etc/passwd", "ftp://x/y"):
        refused = app.chat(messages=asked("x", url))
        assert refused.status_code == 400 and "passwd" not in refused.text, refused.text


def test_an_allowed_host_is_fetched():
    data, where = fetch("http://good.example/x.png", {"good.example": OK % (3, b"abc")})
    assert data == b"abc" and where == [("good.example", 80)]


@pytest.mark.parametrize(
    "url",
    [
        "http://bad.example/",
        "http://good.example.bad.example/",
        "http://sub.good.example/",
        "http://xgood.example/",
        "http://good.example@bad.example/",
        "http://user:word@good.example/",
        "http://good.example:22/",
        "http://good.example:443/",
        "http://bad.example/\\@good.example/",
        "http://good.example\\@bad.example/",
        "http://bad.example#@good.example/",
        "http://good.exam\tple/",
        "http://good.example/\r\nhost: inside",
        "http://[::1]/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://169.254.169.254/latest/meta-data",
        "http://good.example:x/",
        "http://[good.example/",
        "gopher://good.example/",
        "//good.example/",
        "",
    ],
)
def test_other_hosts_ports_and_tricks_are_refused_unasked(url):
    refused, where = fetch(url)
    assert isinstance(refused, ApiError) and refused.status_code == 400 and where == []


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1/", "http://bad.example/", "file:///etc/passwd", "http://good.example:8080/", "//bad.example"],
)
def test_every_redirect_is_checked_like_the_first_url(target):
    refused, where = fetch("http://good.example/", {"good.example": moved(target)})
    assert isinstance(refused, ApiError) and where == [("good.example", 80)]


def test_redirects_between_allowed_hosts_are_followed_and_counted():
    answers = {"good.example": moved("http://also.example/y"), "also.example": OK % (2, b"ok")}
    assert fetch("http://good.example/", answers)[0] == b"ok"
    refused, where = fetch("http://good.example/", {"good.example": moved("/again")})
    assert isinstance(refused, ApiError) and len(where) == 4


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.0.0.7",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "ff02::1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "2001::1", "192.0.2.1", "198.18.0.1", "240.0.0.1"),
    ],
)
def test_addresses_inside(address):
    assert not is_global(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet(address):
    assert is_global(address)


def connect(backend, host, port=80):
    return asyncio.run(backend.connect_tcp(host, port, timeout=2))


def test_a_name_that_leads_inside_is_not_connected_to():
    with socket.socket() as inside:
        inside.bind(("127.0.0.1", 0))
        inside.listen()
        inside.settimeout(0.1)
        with pytest.raises(ForbiddenAddressError):
            connect(GuardedBackend(), "localhost", inside.getsockname()[1])
        with pytest.raises(TimeoutError):
            inside.accept()


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_names_are_judged_by_all_their_addresses(monkeypatch, addresses):
    found = [(0, 0, 0, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    with pytest.raises(ForbiddenAddressError):
        connect(GuardedBackend(), "good.example")


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])  # the second look-up would lead inside
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(0, 0, 0, "", (one, 80)) for one in next(answers)])
    backend = GuardedBackend()
    backend._backend = Net({"8.8.8.8": b""})
    connect(backend, "good.example")
    assert backend._backend.asked == [("8.8.8.8", 80)]


def test_what_comes_is_bounded_in_size_time_and_coding():
    big = {"good.example": OK % (2000, b"x" * 2000)}
    assert fetch("http://good.example/", big, most=1999)[0].status_code == 413
    assert len(fetch("http://good.example/", big, most=2000)[0]) == 2000
    zipped = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx"
    assert fetch("http://good.example/", {"good.example": zipped})[0].status_code == 400
    missing = fetch("http://good.example/", {"good.example": b"HTTP/1.1 404 No\r\ncontent-length: 6\r\n\r\nsecret"})[0]
    assert missing.status_code == 400 and "secret" not in missing.detail

    class Slow(Net):
        async def connect_tcp(self, *a, **k):
            await asyncio.sleep(60)

    fetcher = Fetcher(MediaLimits(domains=("good.example",), fetch_seconds=0.05), Slow({}))
    with pytest.raises(ApiError, match=r"within 0\.05 s"):
        asyncio.run(fetcher.fetch("http://good.example/", "place", 9))


def test_a_fetched_picture_is_answered_about(engine):
    options = ServeOptions(media=MediaLimits(domains=("good.example",)))
    app = Asgi(engine, options)
    data = PICTURE.read_bytes()
    app.service.fetcher = Fetcher(options.media, Net({"good.example": OK % (len(data), data)}))
    answer = app.chat(messages=asked("what color is the rectangle? Answer in a sentence.", "http://good.example/a.png"))
    assert answer.json()["choices"][0]["message"]["content"] == "The rectangle is blue."


def png_of(width: int, height: int) -> bytes:
    """A file of a few bytes that claims to be of this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused_by_their_header(app, monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for size in ((8000, 8000), (30_000, 30_000)):
        refused = app.chat(messages=asked("x", data_url(png_of(*size))))
        assert refused.status_code == 413 and "pixels" in refused.text
    many = [data_url(png_of(2000, 2000))] * 13  # 52 million together
    assert app.chat(messages=asked("x", *many)).status_code == 413


def test_frames_are_bounded_by_what_the_file_says(app, monkeypatch):
    frames = [noise(8, 8, seed) for seed in range(600)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    part = {"type": "video_url", "video_url": {"url": data_url(gif, "image/gif")}}
    refused = app.chat(messages=[{"role": "user", "content": [part]}])
    assert refused.status_code == 413 and "600 frames" in refused.text
    refused = app.chat(messages=[{"role": "user", "content": [part | {"num_frames": 3}]}])
    assert refused.status_code == 400  # nothing in a request sets the frames


def gif_that_grows(width: int, height: int) -> bytes:
    """A screen of one pixel, a frame of it, and a second frame of this size."""

    def frame(w, h):
        return b"\x2c\0\0\0\0" + struct.pack("<HH", w, h) + b"\0\x02\x02\x4c\x01\0"

    head = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return head + frame(1, 1) + frame(width, height) + b"\x3b"


def test_frames_that_outgrow_the_first_are_not_decoded(monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back at the end
    build("nano", "keep-all", engine=dict(device="cpu", max_batch=1), media=dict(pixels=10**6))
    media = Media(MediaLimits(), [("place", "video", data_url(gif_that_grows(1001, 1001), "image/gif"))], [b""])
    with pytest.raises(ImageError, match=r"too large|exceeds limit|bomb"):
        media.decode()


def test_videos_are_animated_pictures_only(app):
    tiff = data_url(encoded(noise(8, 8), "TIFF"), "image/tiff")
    refused = app.chat(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": {"url": tiff}}]}])
    assert refused.status_code == 422 and "GIF, PNG, WEBP" in refused.text


def test_policies_of_files_have_names(monkeypatch, tmp_path):
    from dyvte_engine import NANO_HEADS, InvalidArgumentError

    monkeypatch.setattr("dyvte_engine.serve.build.Image", type("Image", (), {}))
    size = dict(device="cpu", max_batch=1)
    with pytest.raises(InvalidArgumentError, match="NAME="):
        build("nano", allow_policy=[f"dynamic:{NANO_HEADS}"], engine=size)
    made = build(str(NANO_HEADS.parent), f"dynamic:{NANO_HEADS}", [f"early=dynamic:{NANO_HEADS},0.5"], size)
    service = made.state.service
    assert service.policy_names == ["default", "keep-all", "early"] and service.options.model_name == "nano"
    with pytest.raises(ApiError) as error:
        service.policy("fixed:1")
    assert "/" not in error.value.detail


def test_media_bytes_are_bounded_together(engine):
    app = Asgi(engine, ServeOptions(media=MediaLimits(bytes=9000)))
    one = encoded(noise(50, 50))
    assert 4500 < len(one) < 9000
    assert app.chat(messages=asked("x", data_url(one))).status_code == 200
    assert app.chat(messages=asked("x", data_url(one), data_url(one))).status_code == 413


def test_a_body_is_refused_before_it_is_read(engine):
    app = Asgi(engine, ServeOptions(body_bytes=1000))
    sent = []

    async def body():
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 100

    announced = app("POST", "/v1/chat/completions", content=b"x" * 2000)
    assert announced.status_code == 413
    chunked = app("POST", "/v1/chat/completions", content=body())
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"
    assert app.chat(messages=[{"role": "user", "content": "hi"}]).status_code == 200


def test_bodies_are_bounded_together(engine):
    app = Asgi(engine, ServeOptions(bodies_bytes=1500))
    front = next(m for m in [app.app.build_middleware_stack()] if m)
    while not isinstance(front, Front):
        front = front.app
    front._held = 1400  # another's
    status = []

    async def receive():
        return dict(type="http.request", body=b"x" * 200, more_body=False)

    async def send(message):
        status.append(message.get("status"))

    scope = dict(type="http", method="POST", path="/tokenize", headers=[], query_string=b"", client=None)
    asyncio.run(front(scope, receive, send))
    assert status[0] == 503 and front._held == 1400


def test_a_body_that_does_not_come_is_given_up(engine):
    app = Asgi(engine, ServeOptions(body_seconds=0.1))

    async def never():
        yield b"{"
        await asyncio.sleep(30)

    scope = dict(type="http", method="POST", path="/v1/completions", headers=[], query_string=b"", client=("x", 1))

    async def call():
        first, out = [dict(type="http.request", body=b"{", more_body=True)], []

        async def receive():
            if first:
                return first.pop()
            await asyncio.sleep(30)

        async def send(message):
            out.append(message)

        await app.app(scope, receive, send)
        return out[0]["status"]

    assert asyncio.run(call()) == 408


def test_text_is_bounded(engine):
    app = Asgi(engine, ServeOptions(max_text_characters=100))
    assert app.chat(messages=asked("x" * 101)).status_code == 413
    assert app.complete(prompt=["x" * 60, "y" * 60]).status_code == 413
    assert app("POST", "/tokenize", json={"prompt": "x" * 101}).status_code == 413


@pytest.mark.parametrize("expression", ["(a{1000}){1000}", "(a{300}){300}b", "a" * 30_000])
def test_no_expression_holds_up_the_others_for_seconds(app, expression):
    pytest.importorskip("llguidance")
    app.chat(structured_outputs={"regex": "a"})  # the tokenizer's table takes a second
    began = time.process_time()
    answer = app.chat(structured_outputs={"regex": expression})
    assert answer.status_code == 200 or "structured_outputs" in answer.json()["error"]["message"], answer.text
    assert time.process_time() - began < 2


def test_large_schemas_are_taken(app):
    pytest.importorskip("llguidance")
    fields = {
        f"p{i}": {"type": "string", "minLength": i, "maxLength": 100_000, "pattern": "^[a-z ]*$"} for i in range(150)
    }
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    assert app.chat(structured_outputs={"json": schema}, max_tokens=20).status_code == 200


CONTROL = ["<image>", "<|assistant|>", "</s>", "a<|user|>b", "<s>"]


@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_written_as_text_are_refused(app, text):
    for messages in (
        asked(text),
        [{"role": "user", "content": text}],
        [{"role": "system", "content": text}, *asked()],
        [*asked(), {"role": "assistant", "content": text}, *asked()],
    ):
        refused = app.chat(messages=messages)
        assert refused.status_code == 400 and "controls this model" in refused.text, refused.text
    assert app("POST", "/tokenize", json={"messages": asked(text)}).status_code == 400


def test_control_tokens_put_together_of_parts_are_refused(app):
    parts = [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]
    for messages in ([{"role": "user", "content": parts}], [{"role": "user", "content": [image_part(), *parts]}]):
        assert app.chat(messages=messages).status_code == 400


def test_text_that_only_looks_like_them_stays_text(app, engine):
    text = "is 1 < 2 and <b>bold</b> <|nothing|> <imag e>?"
    usage = app.chat(messages=asked(text)).json()["usage"]
    assert usage["visual_tokens"] == 144
    assert usage["prompt_tokens"] == len(engine.tokenize(text, PICTURE)[0])


def test_unknown_words_of_a_tokenizer_are_no_control_tokens(tmp_path):
    from dyvte_engine import Engine

    app = Asgi(Engine.from_pretrained(tiny.save(tmp_path), device="cpu", max_batch=2, max_len=96))
    assert app.chat(messages=[{"role": "user", "content": "w1 unheard w2"}]).status_code == 200
    refused = app.chat(messages=[{"role": "user", "content": "w1 <unk> <image>"}])
    assert refused.status_code == 400


def test_marks_of_pictures_in_completions_are_refused(app):
    assert app.complete(prompt="<image> what").status_code == 400


def test_errors_hold_no_path_and_no_address(app):
    damaged = PICTURE.read_bytes()[:200]
    answers = [
        app.chat(messages=asked("x", data_url(b"nothing"))),
        app.chat(messages=asked("x", data_url(damaged))),
        app.chat(messages=asked("x", data_url(b"GIF89a" + b"\xff" * 40, "image/gif"))),
        app.chat(messages=asked("x", data_url(b"II*\0" + b"\xff" * 40, "image/tiff"))),
    ]
    for answer in answers:
        assert answer.status_code == 422, answer.text
        assert not re.search(r"0x[0-9a-f]{5}|site-packages|/work|/home|BytesIO", answer.text), answer.text
    given = ImageError("<_io.BytesIO object at 0x7f33aa1b2c3d> of /srv/models/llava/config.json, image/png")
    assert public_text(given) == "<_io.BytesIO object> of a file, image/png"


def test_what_nobody_foresaw_is_a_500_without_details(app, engine, monkeypatch):
    def broken(*a, **k):
        raise RuntimeError("secret /srv/key 0x7f33aa1b2c3d")

    monkeypatch.setattr(engine, "submit_all", broken)
    answer = app.chat()
    assert (
        answer.status_code == 500 and "secret" not in answer.text and answer.json()["error"]["type"] == "server_error"
    )
    assert answer.headers["x-request-id"]


def test_keys(engine, monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    app = Asgi(engine, ServeOptions(api_keys=("right", "other")))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "right"},
        {"authorization": "Basic right"},
    ):
        assert app("GET", "/v1/models", headers=headers).status_code == 401
    assert app("GET", "/v1/models", headers={"authorization": b"Bearer \xff\xfe"}).status_code == 401
    assert {expected for _, expected in compared} == {b"right", b"other"}
    assert app("GET", "/v1/models", headers={"authorization": "Bearer right"}).status_code == 200
    for path in ("/metrics", "/openapi.json", "/version"):
        assert app("GET", path).status_code == 401
    assert app("POST", "/tokenize", json={"prompt": "x"}).status_code == 401
    assert app("GET", "/health").status_code == 200


def test_cors_and_documentation_pages_are_off(app):
    answer = app(
        "OPTIONS", "/v1/chat/completions", headers={"origin": "http://x", "access-control-request-method": "POST"}
    )
    assert answer.status_code == 405 and not any(h.startswith("access-control") for h in answer.headers)
    assert app("GET", "/docs").status_code == 404 and app("GET", "/redoc").status_code == 404


def test_a_page_elsewhere_cannot_ask_by_a_form(app):
    """Browsers send text/plain to other sites without asking them first."""
    answer = app("POST", "/v1/completions", content=json.dumps({"prompt": "x"}), headers={"content-type": "text/plain"})
    assert answer.status_code == 400


def test_nothing_is_exported_even_where_the_environment_says_so(engine, monkeypatch):
    import fastapi

    if not hasattr(fastapi, "telemetry"):
        pytest.skip("this FastAPI has no telemetry")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setattr("fastapi.telemetry._asgi._unconfigured", lambda provider: False)
    made = Asgi(engine).app
    assert not made._native_telemetry.enabled() and not made._telemetry["auto_configure"]


def test_request_ids_of_clients_are_taken_only_where_harmless(app):
    assert app("GET", "/version", headers={"x-request-id": "a-1.b_2"}).headers["x-request-id"] == "a-1.b_2"
    for odd in ("x" * 65, 'a"b', "a b", "a\tb"):
        assert app("GET", "/version", headers={"x-request-id": odd}).headers["x-request-id"] != odd


def test_halves_of_surrogate_pairs_are_refused_and_answered(app):
    body = json.dumps(chat_body(messages=asked("\ud800"))).encode()
    for given in (
        body,
        json.dumps(chat_body(model="\ud800")).encode(),
        json.dumps(chat_body(**{"\ud800": 1})).encode(),
    ):
        answer = app("POST", "/v1/chat/completions", content=given, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404), answer.text
