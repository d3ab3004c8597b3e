"""The clients, traces and figures of `benchmarks.serving`, by hand-made answers; and the command at its smallest."""

import argparse
import asyncio
import itertools
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.serving_worker import Batches, Job, offer
from benchmarks.versus import Side, Unavailable, Worker
from tests import tiny
from tests.benchmarks.test_commands import check_spread

QUESTIONS = [{"text": f"question {i}", "picture": f"{i}.png"} for i in range(5)]
ARGS = argparse.Namespace(pictures=0.75, new_tokens=[4, 48])


def jobs(*lengths, at=()):
    return [Job("", None, n, at=when) for n, when in itertools.zip_longest(lengths, at, fillvalue=0.0)]


def test_percentiles_interpolate_between_ranks():
    assert serving.percentiles([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx({"p50": 3.0, "p95": 4.8, "p99": 4.96})
    values = [float(i * i % 101) for i in range(300)]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert list(serving.percentiles(values).values()) == pytest.approx([cuts[p - 1] for p in (50, 95, 99)])


def test_arrivals_are_a_poisson_process():
    found = serving.trace(QUESTIONS, 4000, 1, ARGS, rate=5.0)
    gaps = [b["at"] - a["at"] for a, b in itertools.pairwise([{"at": 0.0}, *found])]
    assert min(gaps) > 0
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    for times in (0.5, 1.0, 2.0):  # exponential: P(gap > t) = exp(-rate t)
        assert sum(g > times / 5 for g in gaps) / 4000 == pytest.approx(math.exp(-times), abs=0.03)
    counts = [0] * int(found[-1]["at"])
    for job in found:
        if job["at"] < len(counts):
            counts[int(job["at"])] += 1
    assert statistics.variance(counts) / statistics.fmean(counts) == pytest.approx(1, abs=0.2)


def test_a_trace_is_mixed_and_the_same_for_everybody():
    found = serving.trace(QUESTIONS, 2000, 3, ARGS, rate=None)
    assert found == serving.trace(QUESTIONS, 2000, 3, ARGS, rate=None)
    assert found != serving.trace(QUESTIONS, 2000, 4, ARGS, rate=None)
    assert all(job["at"] == 0.0 for job in found)
    assert sum(job["picture"] is not None for job in found) / 2000 == pytest.approx(0.75, abs=0.04)
    assert {job["new_tokens"] for job in found} == set(range(4, 49))
    assert all(job["picture"] in (None, f"{job['text'].split()[1]}.png") for job in found)


def test_a_closed_loop_keeps_every_client_at_work():
    at_work, seen, order = set(), [], []

    async def answer(job):
        at_work.add(job)
        order.append(job)
        seen.append(len(at_work))
        await asyncio.sleep(0.001 * job.new_tokens)
        job.token("")
        at_work.remove(job)

    sent = jobs(*(1 + i % 4 for i in range(20)))
    start = asyncio.run(offer(answer, sent, clients=3))
    assert max(seen) == 3 and seen[2:] == [3] * 18  # the next is sent when one is answered, and never earlier
    assert order == sent
    assert all(start <= job.asked < job.tokens[0] for job in sent)
    ends = sorted(job.tokens[0] for job in sent)
    for number, job in enumerate(sent[3:]):
        assert sum(end <= job.asked for end in ends) > number


def test_an_open_loop_sends_on_time_whatever_becomes_of_the_others():
    async def answer(job):
        job.token("")
        await asyncio.sleep(0.05)  # longer than all arrivals

    sent = jobs(1, 1, 1, at=(0.0, 0.01, 0.02))
    start = asyncio.run(offer(answer, sent))
    assert [job.asked - start for job in sent] == pytest.approx([0.0, 0.01, 0.02])  # as planned, delays count as waits
    assert all(0 <= job.tokens[0] - job.asked < 0.03 for job in sent)


def test_a_static_batch_lasts_until_its_longest_answer():
    sizes, ends = [], []

    class Steps(Batches):
        def batch(self, batch, tells):
            sizes.append([job.new_tokens for job in batch])
            for _ in range(max(sizes[-1])):
                self.step(batch, tells, range(len(batch)))
                time.sleep(0.002)
            ends.append(time.perf_counter())

    engine = Steps(slots=2)
    sent = jobs(1, 5, 2)
    asyncio.run(offer(engine.answer, sent, clients=3))
    assert sizes == [[1, 5], [2]]
    assert [job.said for job in sent] == [[0], [1] * 5, [0] * 2]  # and no token that nobody asked for
    assert sent[2].tokens[0] > ends[0] > sent[0].tokens[-1]


def run_of(*spans, held=None):
    """Requests (asked, tokens...)."""
    found = [{"asked": a, "tokens": list(tokens), "queued": 0.5, "text": f"{tokens[0]}"} for a, *tokens in spans]
    data = {"jobs": found} | ({"held": held} if held else {})
    return serving.Run(data, sum(len(tokens) for _, *tokens in spans))


def test_figures_of_a_run():
    run = run_of((0.0, 1.0, 2.0, 4.0), (0.0, 3.0, 5.0), held=[(1.0, 10), (3.0, 30), (4.0, 20)])
    slow = run_of((0.0, 2.0, 4.0, 8.0), (0.0, 6.0, 10.0), held=[(2.0, 40)])
    found = serving.figures([run, slow], [run, run])
    assert found["requests_per_s"] == pytest.approx({"median": 0.3, "q1": 0.25, "q3": 0.35, "n": 2})
    assert found["tokens_per_s"]["median"] == pytest.approx((5 / 5 + 5 / 10) / 2)
    assert found["speedup"]["median"] == pytest.approx((1 + 0.5) / 2)
    assert found["same_text"] == 0.5
    assert found["first"]["p50"] == statistics.median([1, 3, 2, 6])
    assert found["between"]["p50"] == statistics.median([1, 2, 2, 2, 4, 4])
    assert found["decoding"]["median"] == pytest.approx((3 + 2) / 5) and found["most_decoding"] == 2
    assert found["admitted"]["median"] == pytest.approx(((3.5 + 4.5) / 5 + (7.5 + 9.5) / 10) / 2)
    assert found["kv_bytes"]["median"] == pytest.approx(((2 * 10 + 1 * 30 + 1 * 20) / 5 + 8 * 40 / 10) / 2)
    assert found["most_kv_bytes"] == 40
    assert "kv_bytes" not in serving.figures([run_of((0.0, 1.0, 2.0))], [run_of((0.0, 1.0, 2.0))])


def test_spans_that_touch_do_not_overlap():
    assert serving.most_at_once([(0, 1), (1, 2), (2, 3)]) == 1
    assert serving.most_at_once([(0, 3), (1, 2), (1, 4), (3, 5)]) == 3
    assert serving.most_at_once([]) == 0


def runner(answers):
    """Of two sides; `answers`: what the workers give, one run after the other."""

    class Workers:
        def ask(self, side, request):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    args = argparse.Namespace(requests=2, pictures=0.5, new_tokens=[2, 2], kv_memory=1)
    compared = {
        serving.BASE: serving.Compared("here"),
        "slow": serving.Compared("there"),
        "one load": serving.Compared("here", {"max_stall": 5}, only=[2]),
    }
    return serving.Runner(compared, QUESTIONS, args, Workers(), {})


def test_what_ran_is_kept_and_what_breaks_is_left_out():
    found = run_of((0.0, 1.0, 2.0)).found
    run, saved = runner(iter([*[found] * 3, Unavailable("it has ended"), *[found] * 4, Unavailable("all over")])), []
    loads = [serving.Load(clients=1), serving.Load(clients=2)]
    run.rounds(range(2), loads, list(run.compared), lambda: saved.append(len(run.cases())))
    assert run.missing == {"slow": "it has ended"}
    assert {(load.clients, name): len(found) for (load, name), found in run.runs.items()} == {
        (1, serving.BASE): 2,
        (1, "slow"): 1,
        (2, serving.BASE): 2,
        (2, "one load"): 2,
    }
    assert saved == [1, 2, 3, 4, 4, 4, 4]
    assert [c["requests_per_s"]["n"] for c in run.cases()] == [2, 1, 2, 2]
    with pytest.raises(Unavailable, match="all over"):  # nothing can be compared with what all are compared with
        run.rounds([2], loads, [serving.BASE], lambda: None)


def test_a_process_that_has_ended_is_started_anew(monkeypatch, tmp_path):
    """One policy's end leaves the others of its process measured, and says what it was itself."""
    started, closed = [], []

    class Process:
        def __init__(self, side, threads, log, script):
            started.append(log)
            self.ended = False

        def ask(self, request):
            self.ended |= request == "too much"
            if self.ended:
                raise Unavailable("out of memory" if request == "too much" else "it has ended")
            return request

        def close(self):
            closed.append(self)

    monkeypatch.setattr(serving, "Worker", Process)
    workers = serving.Workers(1, tmp_path, "warm up")
    assert [workers.ask("side", request) for request in ("one", "two")] == ["one", "two"]
    with pytest.raises(Unavailable, match="out of memory"):
        workers.ask("side", "too much")
    assert workers.ask("side", "three") == "three"
    assert len(set(started)) == 2 and len(closed) == 1
    workers.close()
    assert len(closed) == 2


def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    """However that ends, an error too: it would take its share of what is measured next."""
    server, port = tmp_path / "server", serving.free_port()
    server.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, sys\n"
        "from http.server import BaseHTTPRequestHandler, HTTPServer\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "class Healthy(BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])), Healthy).serve_forever()\n"
    )
    server.chmod(0o755)
    options = json.dumps({"server": str(server), "port": port, "slots": 1, "max_len": 8})
    worker = Worker(Side(Path(sys.executable), "llama.cpp", tmp_path, options), 1, tmp_path / "log", "serving_worker")
    with pytest.raises(Unavailable):
        worker.ask({"jobs": "none"})
    worker.close()
    for _ in range(100):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    pytest.fail("the server is still there")


def test_an_error_in_a_batch_ends_the_process():
    """Its clients wait for an answer that nobody is at work on."""
    script = """
import sys
from benchmarks import serving_worker

class Broken(serving_worker.Batches):
    def __init__(self, folder, options):
        super().__init__(4)

    def batch(self, jobs, tells):
        raise MemoryError("too many at once")

serving_worker.ENGINES["broken"] = Broken
sys.argv[1:] = ["broken", "", "{}"]
sys.path.insert(0, "")
serving_worker.main()
"""
    run = json.dumps({"jobs": [{"text": "", "picture": None, "new_tokens": 1}], "clients": 1}) + "\n"
    done = subprocess.run([sys.executable, "-c", script], input=run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().endswith("MemoryError: too many at once")


def test_serving_measures_what_it_can_and_says_what_it_cannot(tmp_path):
    checkpoint = tiny.save(tmp_path / "tiny")
    sizes = ["--clients", "1", "3", "--rates", "50", "--requests", "4", "--new-tokens", "2", "5", "--slots", "3"]
    more = ["--max-len", "128", "--kv-memory", "1", "--seconds", "0", "--least", "1", "--max-stall", "64"]
    more += ["--engines", "release", "static", "transformers", "--transformers-clients", "3"]
    serving.main(["--model", checkpoint, *sizes, *more, "--out", str(tmp_path)])
    data = json.loads((tmp_path / "serving.json").read_text())
    assert data["missing"] == {serving.RELEASE: "--release is not given"}
    ours, always = ["KeepAll", "DyVTE", "DyVTE+FastV"], [*["KeepAll", "DyVTE", "DyVTE+FastV"], serving.STATIC]
    cases = {(c["load"], c["engine"]): c for c in data["cases"]}
    loads = ("1 clients", "3 clients", "50/s")
    late = {("3 clients", serving.TRANSFORMERS), ("3 clients", "KeepAll, max_stall 64")}
    assert set(cases) == {(load, name) for load in loads for name in always} | late
    for (load, name), c in cases.items():
        assert c["requests"] == (9 if load == "3 clients" else 100 if load == "50/s" else 4)
        for part in ("requests_per_s", "tokens_per_s", "speedup", "decoding"):
            check_spread(c[part])
        assert 0 < c["first"]["p50"] <= c["first"]["p95"] <= c["first"]["p99"]
        assert c["clients"] is None or c["most_decoding"] <= c["clients"]
        assert ("kv_bytes" in c) == (name not in (serving.STATIC, serving.TRANSFORMERS))
        if name not in ("DyVTE", "DyVTE+FastV"):
            assert c["same_text"] == 1.0
    assert cases["1 clients", "DyVTE"]["most_kv_bytes"] < cases["1 clients", "KeepAll"]["most_kv_bytes"]
    assert [c["engine"] for c in data["equal_memory"]] == ours
    assert "not measured" in serving.tables(data)[0].rows[-1][1]
    assert (tmp_path / "serving.png").stat().st_size > 2000


def test_a_stopped_run_has_tables_and_a_plot(tmp_path):
    case = {"engine": "KeepAll", "load": "1 clients", "clients": 1, "rate": None}
    run = [run_of((0.0, 1.0, 2.0, 4.0), held=[(1.0, 10)])]
    args = dict(model="nano", dtype="float32", slots=3, new_tokens=[2, 5], pictures=0.5, kv_memory=1)
    data = {"args": args, "cases": [case | serving.figures(run, run)], "equal_memory": [], "missing": {}}
    assert [sheet.rows[0][0] for sheet in serving.tables(data)] == ["KeepAll"]
    serving.figure(data).savefig(tmp_path / "plot.png")


@pytest.mark.parametrize("model", ["llava-1.5-7b", "nano"])
def test_defaults_on_a_gpu(model, monkeypatch):
    asked = []
    monkeypatch.setattr(serving, "measure", lambda args, argv: asked.append(args))
    monkeypatch.setattr(serving, "finish", lambda *_: None)
    serving.main(["--device", "cuda", "--model", model, "--rates", "--engines", "openvino", "static"])
    assert asked[0].clients == [1, 8, 16, 32] and asked[0].rates == [] and asked[0].least == 1
    assert asked[0].max_len == (576 + 128 if model == "llava-1.5-7b" else 208) + 128
    found, missing = serving.others(asked[0])
    assert found == {} and missing == {serving.OPENVINO: "compared on a CPU, with a checkpoint"}
    assert serving.STATIC in serving.ours(asked[0])
