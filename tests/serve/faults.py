"""Thousands of requests at once against a server's process, every fifth broken: `python -m tests.serve.faults`.

A finding is: an answer other than the engine's alone, a status that does not fit, no answer within 120 s, a server that
ended or logged an error, pages, connections or threads that are still held when all clients are gone, memory that
grows. Each is printed with the number that repeats the request: `--only NUMBER`. Numbers depend on the seed.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.common import machine
from benchmarks.report import Sheet
from dyvte_engine import NANO_HEADS, DynamicExit, Engine
from tools import serve_page

from . import broken
from .common import PICTURE, SHIPPED, asked, data_url, encoded, noise, until
from .process import ServerProcess

POLICIES = {None: "auto", "keep-all": "keep-all", "dynamic:auto,0.5": "0.5"}
OPTIONS = ("--device", "cpu", "--max-media-mib", "1", "--allow-policy", "dynamic:auto,0.5")
GROWTH = 150  # MiB; what is kept of pictures is bounded by the engine, and filled in the first fifth
CLIENTS = 16


@dataclass(frozen=True)
class Good:
    """A request, and the text and end of each of its answers."""

    path: str
    body: dict[str, Any]
    wanted: list[tuple[str, str]]


def answered(engine: Engine, rng: random.Random) -> Good:
    """A random request with what the engine alone says to it."""
    name = rng.choice(list(POLICIES))
    policy: Any = "keep-all" if name == "keep-all" else DynamicExit.from_file(NANO_HEADS, *([0.5] if name else []))
    body: dict[str, Any] = {"model": "nano", "max_tokens": rng.randint(1, 12)} | ({"policy": name} if name else {})
    options: dict[str, Any] = {"max_new_tokens": body["max_tokens"], "policy": policy}
    if rng.random() < 0.3:
        body |= {"n": 2, "temperature": 1.5, "seed": rng.randrange(10**6)}
        options |= {"do_sample": True, "temperature": 1.5, "top_k": 0}
    if rng.random() < 0.2:
        stop = rng.choice(("is", "e", "blue.", "never"))
        body["stop"] = stop
    if rng.random() < 0.2:
        prompt: Any = rng.choice(("what is", "how many", "The"))
        path, body["prompt"], media, options["chat"] = "/v1/completions", prompt, None, False
    else:
        shipped = rng.choice(SHIPPED)
        prompt = shipped["prompt"]
        pictures = [(PICTURE.parent / shipped["file"]).read_bytes()]
        if rng.random() < 0.5:  # another picture each time
            pictures = [encoded(noise(rng.randint(1, 90), rng.randint(1, 90), rng.randrange(10**6)))]
        media = [data_url(picture) for picture in pictures]
        path, body["messages"] = "/v1/chat/completions", asked(prompt, *media)
    seeds = [body.get("seed", 0) + i for i in range(body.get("n", 1))]
    found = [engine.generate(prompt, media, seed=seed, **options) for seed in seeds]
    return Good(path, body, [_shown(r.text, r.finish_reason, body.get("stop")) for r in found])


def _shown(text: str, end: str, stop: str | None) -> tuple[str, str]:
    if stop is not None and stop in text:
        return text[: text.index(stop)], "stop"
    return text, "stop" if end == "stop" else "length"


async def ask(client: httpx.AsyncClient, good: Good, rng: random.Random) -> list[tuple[str, str]] | str:
    """The answers, whole or streamed, sent and read at once or piece by piece; what went wrong as a text."""
    stream, pause = rng.random() < 0.5, rng.choice((0.0, 0.0, 0.0, 0.002))
    data = json.dumps(good.body | {"stream": stream}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        step = max(len(data) // 7, 1)
        for i in range(0, len(data), step):
            yield data[i : i + step]
            await asyncio.sleep(pause)

    headers = {"content-type": "application/json"}
    came = bytearray()
    async with client.stream("POST", good.path, content=pieces() if pause else data, headers=headers) as response:
        async for part in response.aiter_bytes(64 if pause else None):
            came += part
            await asyncio.sleep(pause)
    if response.status_code != 200:
        return f"status {response.status_code}: {bytes(came[:200])!r}"
    return _streamed(came.decode()) if stream else _whole(json.loads(came))


def _whole(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(c["message"]["content"] if "message" in c else c["text"], c["finish_reason"]) for c in answer["choices"]]


def _streamed(text: str) -> list[tuple[str, str]] | str:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if lines[-1:] != ["[DONE]"]:
        return f"a stream ends with {lines[-1:]}"
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for event in map(json.loads, lines[:-1]):
        if "error" in event:
            return f"an error in a stream: {event}"
        choice = event["choices"][0]
        new = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + new
        ends[choice["index"]] = choice["finish_reason"]
    return [(texts[i], ends[i]) for i in sorted(texts)]


@dataclass
class Campaign:
    """Requests by their numbers; what each found is counted."""

    server: ServerProcess
    pool: list[Good]
    seed: int
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    async def run(self, numbers: list[int], end: float) -> int:
        """How many were sent until the time was over."""
        left, sent = iter(numbers), itertools.count()
        async with httpx.AsyncClient(base_url=self.server.address, timeout=broken.PATIENCE) as client:

            async def work() -> None:
                for number in left:
                    await self._one(client, number)
                    next(sent)
                    if time.monotonic() > end or self.server.process.poll() is not None:
                        return

            await asyncio.gather(*(work() for _ in range(CLIENTS)))
        return next(sent)

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        good, kind = rng.choice(self.pool), "good"
        try:
            if rng.random() < 0.8:
                got = await ask(client, good, rng)
                right, what = got == good.wanted, "right" if got == good.wanted else f"{got}, wanted {good.wanted}"
            else:
                one = rng.choice(list(broken.KINDS))
                kind = one.__name__
                status = await one(broken.Target(rng, self.server.port, good.path, good.body))
                right, what = status in broken.KINDS[one], str(status or "closed")
        except (httpx.HTTPError, broken.NoAnswer, OSError) as error:
            right, what = False, f"{type(error).__name__}: {error}"
        self.statuses.setdefault(kind, Counter())[what if right else "wrong"] += 1
        if not right:
            self._found(f"request {number} ({kind}): {what}"[:600])
        if number % 50 == 0 and self.server.process.poll() is None:
            self.memory.append(self.server.memory)

    def _found(self, what: str) -> None:
        self.findings.append(what)
        print(what, flush=True)

    def idle_again(self, before: dict[str, int]) -> None:
        """After the last client: nothing is held, and the process ends as it should."""
        server = self.server
        if server.process.poll() is not None:
            self._found(f"the server ended by itself with {server.process.poll()}: {server.log.read_text()[-400:]}")
            return
        held: dict[str, int] = {}

        def let_go() -> bool:
            held.update(descriptors=server.descriptors, threads=server.threads)
            return server.idle and all(held[name] <= before[name] + 2 for name in before)

        try:
            until(let_go, 30)
        except AssertionError:
            self._found(f"still held by an idle server: {held}, at the start {before}; idle: {server.idle}")
        fifth = self.memory[len(self.memory) // 5 :] or [0.0]
        if fifth[-1] - fifth[0] > GROWTH:
            self._found(f"memory grew from {fifth[0]:.0f} to {fifth[-1]:.0f} MiB")
        code = server.stop()
        if code:
            self._found(f"the server ended with {code}: {server.log.read_text()[-400:]}")
        for line in server.log.read_text().splitlines():
            failed = line.startswith("{") and json.loads(line)["status"] >= 500 and '"/health"' not in line
            if failed or line.startswith(("Traceback", "ERROR")):
                self._found(f"the server's log: {line[:300]}")


def campaign(numbers: list[int], seed: int, pool: int, seconds: float, log: Path) -> dict[str, Any]:
    """Run it; the record."""
    about = machine(torch.device("cpu"))
    engine = Engine.from_pretrained("nano", "keep-all", device="cpu", max_batch=2)
    rng = random.Random(seed)
    made = [answered(engine, rng) for _ in range(pool)]
    server = ServerProcess(log, *OPTIONS)
    try:
        before = {"descriptors": server.descriptors, "threads": server.threads + CLIENTS}
        under_way = Campaign(server, made, seed)
        start = time.monotonic()
        sent = asyncio.run(under_way.run(numbers, start + seconds))
        took = time.monotonic() - start
        under_way.idle_again(before)
    finally:
        server.kill()
    memory = under_way.memory or [0.0]
    return {
        "machine": about,
        "seed": seed,
        "requests": sent,
        "clients": CLIENTS,
        "different": pool,
        "seconds": round(took, 1),
        "memory_mib": {
            "after_a_fifth": round(memory[len(memory) // 5]),
            "at_the_end": round(memory[-1]),
            "most": round(max(memory)),
        },
        "statuses": {kind: dict(sorted(found.items())) for kind, found in sorted(under_way.statuses.items())},
        "findings": under_way.findings,
    }


def sheets(found: dict[str, Any]) -> list[Sheet]:
    """The record as a table."""
    rows = []
    for kind, statuses in found["statuses"].items():
        answers = ", ".join(f"{status}: {count:,}" for status, count in statuses.items())
        rows.append([kind.replace("_", " "), f"{sum(statuses.values()):,}", answers])
    memory, about = found["memory_mib"], found["machine"]
    note = (
        f"{about['cpu']}, load {about['load']} at the start; seed {found['seed']}, {found['clients']} clients at once, "
    )
    note += f"{found['seconds']:g} s; memory after a fifth {memory['after_a_fifth']} MiB, at the end "
    note += f"{memory['at_the_end']}; {_in_short(found['findings']) or 'the server ended with 0 and all its pages'}"
    title = f"{found['requests']:,} requests, {len(found['findings'])} findings"
    return [Sheet(title, ["kind", "requests", "answers"], rows, note)]


def _in_short(findings: list[str]) -> str:
    """Their kinds, counted."""
    kinds = Counter(re.sub(r"^request \d+ \((\w+)\): (.{0,20}).*", r"\1: \2", one, flags=re.DOTALL) for one in findings)
    return "; ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=120, help="different good requests")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no request is begun after so long")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of requests to repeat")
    parser.add_argument("--record", action="store_true", help="in docs/serving.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        numbers = list(range(args.requests)) if args.only is None else args.only
        found = campaign(numbers, args.seed, args.pool, args.seconds, Path(folder) / "log")
    print(json.dumps(found, indent=1))
    if args.record:
        serve_page.write("faults", found, sheets(found))
    return 1 if found["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
