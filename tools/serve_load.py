"""Load by guidellm on this server and on others, nano on all: `python -m tools.serve_load`.

guidellm and each server have environments of their own, in build/serve-load and, shared with the benchmarks, in
build/versus. Writes docs/serving/load.json and the table in docs/serving.md.

Every request has another generated picture and a question, and an answer of just so many tokens. The servers are
measured one after the other, each after requests that are not counted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import serving, versus, workload
from benchmarks.common import machine
from benchmarks.report import Sheet
from dyvte_engine.assets import resolve_model
from tools import serve_page

ROOT = Path(__file__).resolve().parent.parent
GUIDELLM = "guidellm==0.8.1"  # whose report is read here
SLOTS, MAX_LEN = 32, 512
COLUMNS = ("p50", "p95", "p99")


@dataclass(frozen=True)
class Server:
    """How one is started: its command with PORT for the port, what it calls nano, its further request fields."""

    command: list[str | Path]
    model: str
    variables: dict[str, str]


def dyvte(policy: str) -> Callable[[Path], Server]:
    def make(build: Path) -> Server:
        words = ["-m", "dyvte_engine.commands.main", "serve", "nano", "--port", "PORT", "--device", "cpu"]
        words += ["--policy", policy, "--max-batch", str(SLOTS), "--max-len", str(MAX_LEN), "--max-queue", "256"]
        return Server([sys.executable, *words], "nano", {"PYTHONPATH": str(ROOT)})

    return make


def llama_cpp(build: Path) -> Server:
    server, folder = serving.llama_server(build), versus.gguf(Path(resolve_model("nano")), build)
    model, eyes = next(folder.glob("model-f32*.gguf")), next(folder.glob("mmproj-f32*.gguf"))
    size = ["--parallel", SLOTS, "--ctx-size", SLOTS * MAX_LEN, "--threads", torch.get_num_threads()]
    words = ["-m", model, "--mmproj", eyes, "--host", "127.0.0.1", "--port", "PORT", "--alias", "nano", *size]
    return Server([server, *map(str, words)], "nano", {})


def transformers_serve(build: Path) -> Server:
    packages = ("transformers[serving]", f"torch=={torch.__version__.partition('+')[0]}", "pillow")
    python = versus.environment(build.parent / "serve-load" / "transformers", *packages)
    folder = resolve_model("nano")
    words = ["serve", folder, "--host", "127.0.0.1", "--port", "PORT", "--device", "cpu", "--dtype", "float32"]
    return Server([python.parent / "transformers", *words], str(folder), {"HF_HUB_OFFLINE": "1"})


def openvino(build: Path) -> Server:
    raise versus.Unavailable("OpenVINO Model Server is no package of the index")


SERVERS: dict[str, tuple[str, Callable[[Path], Server]]] = {
    "keep-all": ("this engine, KeepAll", dyvte("keep-all")),
    "auto": ("this engine, DyVTE", dyvte("auto")),
    "llama.cpp": ("llama.cpp server", llama_cpp),
    "transformers": ("transformers serve", transformers_serve),
    "openvino": ("OpenVINO Model Server", openvino),
}


@contextlib.contextmanager
def running(server: Server, log: Path, seconds: float) -> Iterator[str]:
    """Its address, once it answers a request. Raises versus.Unavailable."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(port) if word == "PORT" else str(word) for word in server.command]
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, **server.variables})
    try:
        _until_it_answers(f"http://127.0.0.1:{port}", server.model, process, log, seconds)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_it_answers(address: str, model: str, process: Any, log: Path, seconds: float) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > end:
                said = " / ".join(log.read_text().strip().splitlines()[-2:])
                raise versus.Unavailable(f"it does not answer ({error}): {said}"[:300]) from None
        time.sleep(0.2)


def questions(folder: Path, count: int, tokens: int) -> Path:
    """A file of requests as guidellm reads it."""
    texts, pictures = workload.questions("nano", count)
    lines = []
    for text, (picture, *_) in zip(texts, pictures, strict=True):
        data = io.BytesIO()
        picture.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        image = {"type": "image_base64", "image": url, "image_pixels": picture.width * picture.height}
        line = {"prompt": text, "image": image | {"image_bytes": len(data.getvalue())}, "output_tokens_count": tokens}
        lines.append(json.dumps(line))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines))
    return path


def measured(guidellm: Path, address: str, model: str, data: Path, streams: list[int], seconds: float) -> list[Any]:
    """Figures of each number of streams. Raises versus.Unavailable."""
    out = data.parent / "report.json"
    scenario = {
        "backend": {"kind": "openai_http", "target": address, "model": model, "http2": False, "timeout": 120},
        "profile": {"kind": "concurrent", "streams": streams},
        "constraints": [{"kind": "max_duration", "seconds": seconds}],
        "tokenizer": {"kind": "huggingface_auto", "load_kwargs": {}},
        "data": [{"kind": "json_file", "path": str(data)}],
        "outputs": [{"kind": "json", "path": str(out)}],
        "metrics": {"kind": "generative", "sample_size": 0},
    }
    config = data.parent / "scenario.yaml"
    config.write_text(yaml.safe_dump({"spec": scenario}))
    words = [guidellm.parent / "guidellm", "run", "--config", config, "--disable-console"]
    out.unlink(missing_ok=True)
    versus.command(*words, seconds=len(streams) * (seconds + 60) + 120)
    return [_figures(one) for one in json.loads(out.read_text())["benchmarks"]]


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    metrics = report["metrics"]

    def spread(name: str) -> dict[str, float]:
        return {p: metrics[name]["successful"]["percentiles"][p] for p in COLUMNS}

    return {
        "streams": report["config"]["strategy"]["streams"],
        "requests_per_s": metrics["requests_per_second"]["successful"]["mean"],
        "tokens_per_s": metrics["output_tokens_per_second"]["successful"]["mean"],
        "first_token_ms": spread("time_to_first_token_ms"),
        "between_tokens_ms": spread("inter_token_latency_ms"),
        "requests": {kind: metrics["request_totals"][kind] for kind in ("successful", "incomplete", "errored")},
    }


def prepared(args: argparse.Namespace) -> tuple[Path, dict[str, Server | str]]:
    """guidellm's Python, and each server by its name, or why it cannot be had. Makes what is missing: up to an hour."""
    guidellm = versus.environment(
        args.build.parent / "serve-load" / "guidellm", GUIDELLM, f"torch=={torch.__version__.partition('+')[0]}"
    )
    found: dict[str, Server | str] = {}
    for title, make in (SERVERS[key] for key in args.servers):
        try:
            found[title] = make(args.build)
        except versus.Unavailable as error:
            found[title] = str(error)
    return guidellm, found


def load(args: argparse.Namespace) -> dict[str, Any]:
    """The record. What does not start or does not fit into the time is in it with the reason."""
    guidellm, servers = prepared(args)
    end = time.monotonic() + args.most
    found: dict[str, Any] = {"machine": machine(torch.device("cpu")), "tokens": args.tokens, "seconds": args.seconds}
    found |= {"slots": SLOTS, "guidellm": GUIDELLM, "servers": {}, "missing": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = questions(folder, args.questions, args.tokens)

        def ask(server: Server, streams: list[int], seconds: float) -> list[Any]:
            with running(server, folder / "log", args.start) as address:
                (first,) = measured(guidellm, address, server.model, data, [4], min(seconds, 3))
                if not first["requests"]["successful"]:
                    said = (folder / "log").read_text().strip().splitlines()[-1:]
                    raise versus.Unavailable(f"it refuses guidellm's requests: {' '.join(said)}"[:300])
                return measured(guidellm, address, server.model, data, streams, seconds)

        for title, server in servers.items():
            try:
                if isinstance(server, str):
                    raise versus.Unavailable(server)
                if time.monotonic() + len(args.streams) * args.seconds > end:
                    raise versus.Unavailable(f"no time was left of {args.most:g} s")
                found["servers"][title] = ask(server, args.streams, args.seconds)
            except versus.Unavailable as error:
                found["missing"][title] = str(error)
            print(title, json.dumps(found["servers"].get(title, found["missing"].get(title))), flush=True)
    return found


def sheets(found: dict[str, Any]) -> list[Sheet]:
    def waits(given: dict[str, float]) -> str:
        return " / ".join(f"{given[p]:.1f}" if given[p] < 100 else f"{given[p]:.0f}" for p in COLUMNS)

    rows = [
        [
            title,
            str(one["streams"]),
            f"{one['requests_per_s']:.1f}",
            f"{one['tokens_per_s']:.0f}",
            waits(one["first_token_ms"]),
            waits(one["between_tokens_ms"]),
            str(one["requests"]["errored"]),
        ]
        for title, of_one in found["servers"].items()
        for one in of_one
    ]
    rows += [[title, f"not measured: {why}", *[""] * 5] for title, why in found["missing"].items()]
    about = found["machine"]
    note = f"{about['cpu']}, {about['threads']} threads, load {about['load']} at the start; {found['guidellm']}, "
    note += f"{found['seconds']:g} s each, {found['slots']} places, float32, a picture each, {found['tokens']} tokens"
    waits_of = [f"{what} {'/'.join(COLUMNS)}, ms" for what in ("first token", "between tokens")]
    return [Sheet("Load", ["server", "clients", "requests/s", "tokens/s", *waits_of, "errors"], rows, note)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64], help="clients at once")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of clients")
    parser.add_argument("--most", type=float, default=660.0, help="seconds; what would take longer is left out")
    parser.add_argument("--start", type=float, default=60.0, help="seconds until a server must answer")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "versus")
    parser.add_argument("--dry", action="store_true", help="print, but keep the record and the page as they are")
    parser.add_argument("--prepare", action="store_true", help="make the environments, and measure nothing")
    args = parser.parse_args(argv)
    if args.prepare:
        print(prepared(args))
        return 0
    found = load(args)
    if not args.dry:
        serve_page.write("load", found, sheets(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
