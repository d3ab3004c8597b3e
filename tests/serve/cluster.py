"""Ray Serve on this machine under load, a replica killed every so often: `python -m tests.serve.cluster`.

A finding is: an answer other than the engine's alone, an error that a client may not retry, a request without an end
within 60 s or without an answer after 20 tries, a session whose replica changes though it lives, a full deployment that
says something else than 429 with retry-after, an answer that a redeployment cuts off.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from typing import Any

import httpx
import ray
import torch
from ray import serve

from benchmarks.common import machine
from benchmarks.report import Sheet
from dyvte_engine import Engine
from dyvte_engine.serve.ray import Arguments, build_app
from tools import serve_page

from .common import PICTURE, SHIPPED, chat_body, free_port, until
from .faults import Good, answered, ask

RETRYABLE = ("status 429", "status 500", "status 503", "a stream ends with")
TRIES = 20


def deploy(replicas: int, **arguments: Any) -> None:
    """(Re)deploy nano; returns when all replicas are ready."""
    given = {"max_batch": 4, "max_queue": 16, "allow_policy": ["dynamic:auto,0.5"], "engine": {"device": "cpu"}}
    app = build_app(Arguments(**given | arguments))
    serve.run(app._bound_deployment.options(num_replicas=replicas, graceful_shutdown_timeout_s=60).bind())


def replicas() -> list[str]:
    """Names of their actors; the replica's id is the last part."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if one["namespace"] == "serve" and "SERVE_REPLICA" in one["name"]]


def kill(name: str) -> None:
    with contextlib.suppress(ValueError):  # it is gone
        ray.kill(ray.get_actor(name, namespace="serve"))


async def where(client: httpx.AsyncClient, session: str, text: str = "what is it?") -> str:
    """The replica that answers a session."""
    body = chat_body(messages=[{"role": "user", "content": text}], max_tokens=1)
    for _ in range(TRIES):
        answer = await client.post("/v1/chat/completions", json=body, headers={"x-session-id": session})
        if answer.status_code == 200:
            return answer.headers["x-replica"]
        await asyncio.sleep(0.5)
    raise AssertionError(answer.text)


async def sticky(address: str) -> dict[str, Any]:
    """Sessions by their ids, and questions by their picture's hash, before and after one replica is killed."""
    pictures = [hashlib.sha256((PICTURE.parent / s["file"]).read_bytes()).hexdigest() for s in SHIPPED]
    sessions = [f"session-{i}" for i in range(30)] + pictures
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        first = {s: await where(client, s) for s in sessions}
        again = {s: await where(client, s, "and now?") for s in sessions}
        victim = first[sessions[0]]
        before = set(replicas())
        kill(next(name for name in before if name.endswith(victim)))
        after = {s: await where(client, s) for s in sessions}
    moved = [s for s in sessions if after[s] != first[s]]
    wrong = [s for s in moved if first[s] != victim and after[s] in first.values()]
    return {
        "sessions": len(sessions),
        "on_each_replica": sorted(Counter(first.values()).values()),
        "changed_without_reason": sum(first[s] != again[s] for s in sessions) + len(wrong),
        "of_the_killed_replica": sum(one == victim for one in first.values()),
        "moved_after_the_kill": len(moved),
    }


async def killing(seconds: float, every: float) -> int:
    """Kill a replica each so many seconds."""
    end, killed = time.monotonic() + seconds, 0
    while time.monotonic() + every < end:
        await asyncio.sleep(every)
        kill(random.choice(replicas()))
        killed += 1
    return killed


async def under_load(address: str, pool: list[Good], seconds: float, every: float, clients: int) -> dict[str, Any]:
    """Clients that ask one thing after the other and try again where they may."""
    met: Counter[str] = Counter()
    findings: list[str] = []
    took: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        headers = {"x-session-id": f"client-{number}"} if number % 2 else {}
        async with httpx.AsyncClient(base_url=address, timeout=60, headers=headers) as http:
            while time.monotonic() < end:
                started = time.monotonic()
                await persist(http, rng.choice(pool), rng)
                took.append(time.monotonic() - started)

    async def persist(http: httpx.AsyncClient, good: Good, rng: random.Random) -> None:
        for _ in range(TRIES):
            try:
                got = await ask(http, good, rng)
            except httpx.TimeoutException:
                findings.append("no end within 60 s")
                return
            except httpx.TransportError as error:
                met[f"tried again: {type(error).__name__}"] += 1
            else:
                if got == good.wanted:
                    met["right"] += 1
                    return
                if not (isinstance(got, str) and got.startswith(RETRYABLE)):
                    findings.append(f"{got}, wanted {good.wanted}"[:400])
                    return
                met[f"tried again: {next(r for r in RETRYABLE if got.startswith(r))}"] += 1
            await asyncio.sleep(0.5)
        findings.append(f"no answer after {TRIES} tries")

    killed, *_ = await asyncio.gather(killing(seconds, every), *map(client, range(clients)))
    return {
        "seconds": seconds,
        "clients": clients,
        "killed": killed,
        "requests": len(took),
        "longest_s": round(max(took), 1),
        "median_s": round(statistics.median(took), 3),
        "met": dict(sorted(met.items())),
        "findings": findings,
    }


async def full(address: str) -> dict[str, Any]:
    """More at once than a deployment with few places takes."""
    body = {"model": "nano", "prompt": "what is", "max_tokens": 300, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(12)))
    statuses = Counter(str(a.status_code) for a in answers)
    refused = [a for a in answers if a.status_code == 429]
    return {"statuses": dict(statuses), "with_retry_after": sum("retry-after" in a.headers for a in refused)}


async def drained(address: str, fewer: int) -> dict[str, Any]:
    """Long streams under way while the deployment becomes smaller."""
    body = {"model": "nano", "prompt": "what is", "max_tokens": 400, "ignore_eos": True, "stream": True}

    async def stream(client: httpx.AsyncClient) -> bool:
        answer = await client.post("/v1/completions", json=body)
        return answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")

    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        streams = [asyncio.create_task(stream(client)) for _ in range(8)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(deploy, fewer)
        whole = await asyncio.gather(*streams)
    return {"streams": len(whole), "whole": sum(whole)}


def cluster(sizes: list[int], seconds: float, every: float, clients: int, pool: int) -> dict[str, Any]:
    """The record."""
    about = machine(torch.device("cpu"))
    engine = Engine.from_pretrained("nano", "keep-all", device="cpu", max_batch=2)
    rng = random.Random(0)
    made = [answered(engine, rng) for _ in range(pool)]
    port, found = free_port(), {}
    address = f"http://127.0.0.1:{port}"
    ray.init(num_cpus=2 * max(sizes), include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for size in sizes:
            deploy(size)
            found[str(size)] = asyncio.run(_one_size(address, size, made, seconds, every, clients))
            print(size, json.dumps(found[str(size)]), flush=True)
        deploy(1, max_batch=1, max_queue=1)
        return {"machine": about, "ray": ray.__version__, "replicas": found, "full": asyncio.run(full(address))}
    finally:
        serve.shutdown()
        ray.shutdown()


async def _one_size(
    address: str, size: int, pool: list[Good], seconds: float, every: float, clients: int
) -> dict[str, Any]:
    found = {"sticky": await sticky(address)}
    await asyncio.to_thread(until, lambda: len(replicas()) >= size, 120)
    found["load"] = await under_load(address, pool, seconds, every, clients)
    await asyncio.to_thread(deploy, size)
    found["drain"] = await drained(address, max(size // 2, 1))
    return found


def findings(record: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    wrong = []
    for size, found in record["replicas"].items():
        wrong += [f"{size} replicas: {one}" for one in found["load"]["findings"]]
        if found["sticky"]["changed_without_reason"]:
            wrong.append(f"{size} replicas: sessions changed their replica: {found['sticky']}")
        if found["drain"]["whole"] < found["drain"]["streams"]:
            wrong.append(f"{size} replicas: streams cut by a redeployment: {found['drain']}")
    refused = record["full"]
    if set(refused["statuses"]) != {"200", "429"} or refused["with_retry_after"] != refused["statuses"]["429"]:
        wrong.append(f"full: {refused}")
    return wrong


def sheets(record: dict[str, Any]) -> list[Sheet]:
    """The record as a table."""
    rows = []
    for size, found in record["replicas"].items():
        load, sticky, drain = found["load"], found["sticky"], found["drain"]
        met = ", ".join(f"{what}: {count:,}" for what, count in load["met"].items())
        moved = (
            f"{sticky['moved_after_the_kill']} of {sticky['sessions']} ({sticky['of_the_killed_replica']} were there)"
        )
        cells = [f"{load['killed']} in {load['seconds']:g} s", met, f"{load['longest_s']:g} s", moved]
        rows.append([size, *cells, f"{drain['whole']} of {drain['streams']}"])
    full = ", ".join(f"{status}: {count}" for status, count in sorted(record["full"]["statuses"].items()))
    about = record["machine"]
    note = f"{about['cpu']}, load {about['load']} at the start; Ray {record['ray']}; "
    note += f"a deployment with 2 places, asked 12 times at once: {full}"
    note += "".join(f"; {one}" for one in record["findings"])
    columns = ["replicas", "killed", "requests", "longest", "sessions that moved after one kill", "streams whole after"]
    columns[-1] += " a redeployment"
    return [Sheet(f"Ray, {len(record['findings'])} findings", columns, rows, note)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=120.0, help="of load, for each number of replicas")
    parser.add_argument("--kill-every", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pool", type=int, default=60, help="different requests")
    parser.add_argument("--record", action="store_true", help="in docs/serving.md")
    args = parser.parse_args(argv)
    found = cluster(args.replicas, args.seconds, args.kill_every, args.clients, args.pool)
    found["findings"] = findings(found)
    print(json.dumps(found, indent=1))
    if args.record:
        serve_page.write("ray", found, sheets(found))
    return 1 if found["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
