"""Many clients at once: requests and tokens in a second, the wait for the first token and between tokens, memory held.

Closed loop: so many clients, each sends a request when its last one is answered. Open loop: requests arrive at a rate,
whatever becomes of the others. Prompts with and without a picture, answers of mixed length. Engines run in processes of
their own, in turn, on the same requests: this one under several policies and in static batches, which run to their
longest answer; the release before it had requests, which knew no other ones (`--release`, a checkout of it with its
libraries); transformers' generate in such batches; and on a CPU in continuous batches OpenVINO GenAI and llama.cpp's
server, which are made on the first call in `build/versus` (they need a package index, llama.cpp a C++ compiler and half
an hour of one core). The record is written anew after every run. `python -m benchmarks.serving --help`.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoConfig

from benchmarks import versus, workload
from benchmarks.common import Data, header, options, paired_ratio, rounds_within, spread
from benchmarks.report import COLORS, Sheet, finish, new_figure, percent, scaled, write
from benchmarks.versus import ROOT, Side, Unavailable, Worker
from dyvte_engine import NANO_HEADS
from dyvte_engine.assets import resolve_model
from dyvte_engine.models.presets import PRESETS, preset

BASE = "KeepAll"
COMPARED = ("static", "release", "transformers", "openvino", "llama.cpp")
STATIC, RELEASE = "this engine, static batches", "last release, static batches"
TRANSFORMERS = "transformers, static batches"
OPENVINO, LLAMA = "OpenVINO GenAI, continuous batching", "llama.cpp's server"
PERCENTILES = (50, 95, 99)
WARM_UP_TOKENS = 8  # on a GPU, whose graphs are captured before; a CPU makes its tapes while it answers
DEFAULTS: dict[str, Data] = {
    "cpu": {
        "clients": [1, 2, 4, 8, 16, 32],
        "rates": [],
        "requests": 32,
        "new_tokens": [4, 48],
        "kv_memory": 12,
        "engines": ["release", "transformers", "openvino", "llama.cpp"],
        "seconds": 60.0,
        "least": 3,
    },
    "cuda": {  # of 7e9 weights: two minutes and a half
        "clients": [1, 8, 16, 32],
        "rates": [16.0],
        "requests": 8,
        "new_tokens": [4, 128],
        "kv_memory": 4096,
        "engines": ["static", "transformers"],
        "transformers_clients": [8],
        "seconds": 0.0,
        "least": 1,
    },
}


@dataclass(frozen=True)
class Load:
    """`clients` in a closed loop, or arrivals at a `rate` (requests a second) in an open one."""

    clients: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.clients} clients" if self.rate is None else f"{self.rate:g}/s"

    def requests(self, least: int) -> int:
        """At least three for each client, so that most of a run has all of them at work; or two seconds of arrivals."""
        return max(least, 3 * (self.clients or 0), round(2 * (self.rate or 0)))


def policies(model: str) -> dict[str, str]:
    """What this engine is run with, as the worker reads it; exits by nano's heads, else forced as `workload` does."""
    if model == "nano":
        dynamic = f"dynamic:{NANO_HEADS}"
        return {BASE: "keep-all", "VTW (5)": "fixed:5", "DyVTE": dynamic, "DyVTE+FastV": f"fastv:2,0.5+{dynamic}"}
    config = preset(model) if model in PRESETS else AutoConfig.from_pretrained(resolve_model(model))
    half = config.get_text_config().num_hidden_layers // 2 - 1
    forced = f"forced:{workload.PAPER_EXITS.get(model, half)}"
    return {BASE: "keep-all", "DyVTE": forced, "DyVTE+FastV": f"fastv:2,0.5+{forced}"}


def trace(questions: Sequence[Data], n: int, seed: int, args: argparse.Namespace, rate: float | None) -> list[Data]:
    """n requests as the worker takes them: a question each, with its picture or without, and the answer's length.

    With a rate they arrive as a Poisson process: the times between them are exponential.
    """
    draw, at, jobs = random.Random(seed), 0.0, []
    for question in draw.choices(questions, k=n):
        at += draw.expovariate(rate) if rate else 0.0
        picture = question["picture"] if draw.random() < args.pictures else None
        jobs.append({**question, "picture": picture, "new_tokens": draw.randint(*args.new_tokens), "at": at})
    return jobs


def percentiles(values: Sequence[float]) -> Data:
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """How many spans overlap at most; one that ends where another begins does not."""
    edges = sorted((at, change) for span in spans for at, change in zip(span, (1, -1), strict=True))
    most = running = 0
    for _, change in edges:
        running += change
        most = max(most, running)
    return most


def mean_over_time(samples: Sequence[tuple[float, float]], end: float) -> float:
    """Of a value that stays what it was sampled to be until the next sample, or the end; 0 before the first."""
    ends = [at for at, _ in samples[1:]] + [end]
    return sum(value * (stop - at) for (at, value), stop in zip(samples, ends, strict=True)) / end


@dataclass(frozen=True)
class Run:
    """A worker's answer to a trace: when requests were sent and when their tokens came, from the start."""

    found: Data
    new_tokens: int

    @property
    def seconds(self) -> float:
        return max(job["tokens"][-1] for job in self.found["jobs"])

    @property
    def per_second(self) -> float:
        return len(self.found["jobs"]) / self.seconds

    @property
    def first(self) -> list[float]:
        return [job["tokens"][0] - job["asked"] for job in self.found["jobs"]]

    @property
    def between(self) -> list[float]:
        return [b - a for j in self.found["jobs"] for a, b in zip(j["tokens"], j["tokens"][1:], strict=False)]

    def texts_with(self, other: Run) -> Iterable[tuple[str, str]]:
        both = zip(self.found["jobs"], other.found["jobs"], strict=True)
        return ((a["text"].strip(), b["text"].strip()) for a, b in both)

    def at_once(self, since: Callable[[Data], float]) -> Data:
        """Requests between a moment and their last token: mean over the run, and most."""
        spans = [(since(job), job["tokens"][-1]) for job in self.found["jobs"]]
        return {"mean": sum(b - a for a, b in spans) / self.seconds, "most": most_at_once(spans)}


def figures(runs: Sequence[Run], base: Sequence[Run]) -> Data:
    """Of one engine under one load, round by round; waits are those of all rounds together."""
    decoding = [run.at_once(lambda job: job["tokens"][0]) for run in runs]
    entry: Data = {
        "requests": len(runs[0].found["jobs"]),
        "requests_per_s": spread([run.per_second for run in runs]),
        "tokens_per_s": spread([run.new_tokens / run.seconds for run in runs]),
        "same_text": statistics.fmean(a == b for r, s in zip(runs, base, strict=True) for a, b in r.texts_with(s)),
        "speedup": paired_ratio([1 / run.per_second for run in base], [1 / run.per_second for run in runs]),
        "first": percentiles([t for run in runs for t in run.first]),
        "between": percentiles([t for run in runs for t in run.between]),
        "decoding": spread([d["mean"] for d in decoding]),
        "most_decoding": max(d["most"] for d in decoding),
    }
    if "held" in runs[0].found:
        admitted = [run.at_once(lambda job: job["asked"] + job["queued"]) for run in runs]
        entry |= {
            "admitted": spread([a["mean"] for a in admitted]),
            "most_admitted": max(a["most"] for a in admitted),
            "kv_bytes": spread([mean_over_time(run.found["held"], run.seconds) for run in runs]),
            "most_kv_bytes": max(held for run in runs for _, held in run.found["held"]),
        }
    return entry


def llama_server(build: Path) -> Path:
    """The server's binary, built from the sources in the package that `versus` installs, if it is not there."""
    folder = build / "llama-server"
    binary = folder / "build" / "bin" / "llama-server"
    if binary.is_file():
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    download = ("-m", "pip", "download", "-q", "--no-deps", "--no-binary", versus.LLAMA_PACKAGE.partition("==")[0])
    versus.command(sys.executable, *download, "-d", folder, versus.LLAMA_PACKAGE, seconds=3600)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("*/vendor/llama.cpp"))
    wanted = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_UI=OFF")
    unwanted = ("LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF")
    versus.command("cmake", "-S", source, "-B", folder / "build", *(f"-D{o}" for o in (*wanted, *unwanted)))
    versus.command("cmake", "--build", folder / "build", "--target", "llama-server", "-j", "2", seconds=7200)
    return binary


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def settings(args: argparse.Namespace) -> Data:
    """What every engine is made with."""
    random_weights = args.model in PRESETS
    return {"slots": args.slots, "dtype": args.dtype, "max_len": args.max_len, "random": random_weights}


@dataclass(frozen=True)
class Compared:
    """A side, and what its worker is asked along with every trace; `only`: in the closed loops of so many clients."""

    side: Side
    run: Data = field(default_factory=dict)
    only: Sequence[int] | None = None


def ours(args: argparse.Namespace) -> dict[str, Compared]:
    """This engine, in one process: under its policies, in static batches, with other bounds of its waits."""
    made = settings(args) | {"device": args.device}
    side = Side(Path(sys.executable), "dyvte", args.model, json.dumps(made), ROOT)
    found = {name: Compared(side, {"policy": policy}) for name, policy in policies(args.model).items()}
    if "static" in args.engines:
        found[STATIC] = Compared(side, {"policy": "keep-all", "static": True})
    for stall in args.max_stall:
        run = {"policy": "keep-all", "max_stall": stall}
        found[f"{BASE}, max_stall {stall}"] = Compared(side, run, only=[max(args.clients)])
    return found


def others(args: argparse.Namespace) -> tuple[dict[str, Compared], dict[str, str]]:
    """The engines compared with, and why the others cannot be had."""
    here, shared = Path(sys.executable), settings(args)
    folder = Path(args.model if args.model in PRESETS else resolve_model(args.model))

    def release() -> Side:
        if args.release is None:
            raise Unavailable("--release is not given")
        return Side(here, "release", folder, json.dumps(shared | {"policy": "keep-all"}), args.release.resolve())

    def transformers() -> Side:
        source = ROOT if args.model in PRESETS else None  # which has the sizes
        return Side(here, "transformers", folder, json.dumps(shared | {"device": args.device}), source)

    def openvino() -> Side:
        side = next(iter(versus.openvino(folder, args.build).values()))
        return Side(side.python, side.engine, side.folder, json.dumps(shared))

    def llama() -> Side:
        server = llama_server(args.build)
        exported = versus.gguf(folder, args.build)
        return Side(here, "llama.cpp", exported, json.dumps(shared | {"server": str(server), "port": free_port()}))

    makers: dict[str, tuple[str, Callable[[], Side]]] = {
        "release": (RELEASE, release),
        "transformers": (TRANSFORMERS, transformers),
        "openvino": (OPENVINO, openvino),
        "llama.cpp": (LLAMA, llama),
    }
    found, missing = {}, {}
    for key in (key for key in args.engines if key in makers):
        name, make = makers[key]
        only = args.transformers_clients if key == "transformers" else None
        try:
            if key != "transformers" and (args.device != "cpu" or args.model in PRESETS):
                raise Unavailable("compared on a CPU, with a checkpoint")
            if only is not None and not set(only) & set(args.clients):
                raise Unavailable("none of its loads is measured")
            found[name] = Compared(make(), only=only)
        except Unavailable as e:
            missing[name] = str(e)
    return found, missing


@dataclass
class Workers:
    """A process for each side, started and warm when it is first asked, and anew after one that has ended."""

    threads: int
    logs: Path
    warm_up: Data
    running: dict[Side, Worker] = field(default_factory=dict)
    started: int = 0

    def ask(self, side: Side, request: Data) -> Data:
        """Raises Unavailable where it cannot run, or ends."""
        try:
            if side not in self.running:
                self.started += 1
                self.running[side] = Worker(side, self.threads, self.logs / f"{self.started}.log", "serving_worker")
                self.running[side].ask(self.warm_up)
            return self.running[side].ask(request)
        except Unavailable:
            if side in self.running:
                self.running.pop(side).close()
            raise

    def close(self) -> None:
        for worker in self.running.values():
            worker.close()


@dataclass
class Runner:
    """Sends traces to the workers of what is compared; `missing`: why some of it is not measured."""

    compared: dict[str, Compared]
    questions: Sequence[Data]
    args: argparse.Namespace
    workers: Workers
    missing: dict[str, str]
    limited: bool = False  # to `--kv-memory`
    runs: dict[tuple[Load, str], list[Run]] = field(default_factory=dict)

    def run(self, name: str, load: Load, seed: int) -> Run:
        jobs = trace(self.questions, load.requests(self.args.requests), seed, self.args, load.rate)
        compared = self.compared[name]
        limit = self.args.kv_memory << 20 if self.limited else None
        asked = {"jobs": jobs, "clients": load.clients, "kv_memory": limit, **compared.run}
        return Run(self.workers.ask(compared.side, asked), sum(job["new_tokens"] for job in jobs))

    def rounds(
        self, seeds: Iterable[int], loads: Sequence[Load], names: Sequence[str], done: Callable[[], object]
    ) -> None:
        """Everything once a round, in turn, on the same requests; others in the next one. `done` after every run."""
        for seed in seeds:
            for load in loads:
                for name in names:
                    only = self.compared[name].only
                    if name in self.missing or (only is not None and load.clients not in only):
                        continue
                    try:
                        found = self.run(name, load, seed)
                    except Unavailable as e:
                        if name == BASE:
                            raise
                        self.missing[name] = str(e)
                        continue
                    self.runs.setdefault((load, name), []).append(found)
                    done()

    def cases(self) -> list[Data]:
        """Figures of what has run so far; the base runs first in every round."""
        return [
            {"engine": name, "load": load.name, **vars(load), **figures(found, self.runs[load, BASE][: len(found)])}
            for (load, name), found in self.runs.items()
        ]


def _questions(args: argparse.Namespace, folder: Path) -> list[Data]:
    texts, pictures = workload.questions(args.model, 32)
    out = []
    for index, (text, (picture, *_)) in enumerate(zip(texts, pictures, strict=True)):
        picture.save(folder / f"{index}.png")
        out.append({"text": text, "picture": str(folder / f"{index}.png")})
    return out


def _warm_up(questions: Sequence[Data], args: argparse.Namespace) -> Data:
    low, high = args.new_tokens
    short = argparse.Namespace(pictures=args.pictures, new_tokens=[min(low, WARM_UP_TOKENS), min(high, WARM_UP_TOKENS)])
    jobs = trace(questions, args.slots, -1, args if args.device == "cpu" else short, None)
    return {"jobs": jobs, "clients": args.slots, "policy": "keep-all"}


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("serving", args, argv)
    found, missing = others(args)
    compared = ours(args) | found
    with tempfile.TemporaryDirectory() as folder:
        questions = _questions(args, Path(folder))
        workers = Workers(data["machine"]["threads"], Path(folder), _warm_up(questions, args))
        whole, limited = (Runner(compared, questions, args, workers, missing, limit) for limit in (False, True))

        def done() -> None:
            data.update(cases=whole.cases(), equal_memory=limited.cases(), missing=missing)
            write(data, args.out, args.name)

        loads = [*(Load(clients=n) for n in args.clients), *(Load(rate=r) for r in args.rates)]
        always = [name for name, c in compared.items() if c.only is None]
        whole.rounds(rounds_within(args.seconds, args.least), loads, always, done)
        within = rounds_within(args.seconds, args.least)
        limited.rounds(within, [Load(clients=args.slots)], list(policies(args.model)), done)
        rest = [name for name in compared if name not in always]
        whole.rounds(range(args.least), loads, rest, done)  # slow ones last: a run that is stopped has the others
        workers.close()
    return data


def _row(c: Data) -> list[str]:
    return [
        c["engine"],
        scaled(c["requests_per_s"]),
        scaled(c["tokens_per_s"], digits=0),
        scaled(c["speedup"], digits=2),
        percent(c["same_text"]),
        _waits(c["first"]),
        _waits(c["between"]),
    ]


def _waits(found: Data) -> str:
    return " / ".join(f"{1e3 * v:.0f}" if v >= 0.0995 else f"{1e3 * v:.1f}" for v in found.values())


def _memory(c: Data) -> str:
    if "kv_bytes" not in c:
        return ""
    return f"{c['kv_bytes']['median'] / 2**20:.1f} ({c['most_kv_bytes'] / 2**20:.1f})"


def _at_once(c: Data, what: str) -> str:
    return f"{c[what]['median']:.1f} ({c[f'most_{what}']})" if what in c else ""


def tables(data: Data) -> list[Sheet]:
    args = data["args"]
    where = f"{args['model']}, {args['dtype']}, {args['slots']} slots"
    waits = [f"{what} {'/'.join(map(str, PERCENTILES))} %, ms" for what in ("first token", "between tokens")]
    columns = ["engine", "requests/s", "tokens/s", f"x {BASE}", "same answer", *waits]
    sheets = []
    low, high = args["new_tokens"]
    about = f"{100 * args['pictures']:.0f} % of the prompts have a picture, answers {low} to {high} tokens; "
    about += f"which do not end by themselves (same answer: as {BASE} gave); percentiles of all rounds; "
    about += "decoding: requests with a first token and not the last, mean (most)"
    if any(c["engine"] == LLAMA for c in data["cases"]):
        about += "; llama.cpp loses the picture's first row (its issue 25814), and its tokens may come in twos"
    for load in dict.fromkeys(c["load"] for c in data["cases"]):
        cases = [c for c in data["cases"] if c["load"] == load]
        rows = [[*_row(c), _at_once(c, "decoding"), _memory(c)] for c in cases]
        here = {c["engine"] for c in cases}
        rows += [[name, f"not measured: {why}", *[""] * 7] for name, why in data["missing"].items() if name not in here]
        kind = "closed loop" if cases[0]["rate"] is None else "open loop, Poisson arrivals"
        note = f"{cases[0]['requests']} requests a round; {about}"
        columns_here = [*columns, "decoding", "K/V MiB, mean (most)"]
        sheets.append(Sheet(f"{load}, {kind}: {where}", columns_here, rows, note))
    if not data["equal_memory"]:  # a run that was stopped
        return sheets
    rows = [[*_row(c), _at_once(c, "admitted"), _at_once(c, "decoding"), _memory(c)] for c in data["equal_memory"]]
    note = "admitted: from its turn to its last token; a request's turn comes when the pool can promise what it needs"
    title = f"{data['equal_memory'][0]['load']} within {args['kv_memory']} MiB of K/V: {where}"
    return [*sheets, Sheet(title, [*columns, "admitted", "decoding", "K/V MiB, mean (most)"], rows, note)]


def figure(data: Data) -> Figure:
    """Requests a second, and the waits, over the number of clients."""
    fig, axes = new_figure(12, 3.4, columns=3)
    cases = [c for c in data["cases"] if c["rate"] is None]
    panels: tuple[tuple[str, Callable[[Data], float]], ...] = (
        ("requests/s", lambda c: c["requests_per_s"]["median"]),
        ("first token, 95 %, ms", lambda c: 1e3 * c["first"]["p95"]),
        ("between tokens, 99 %, ms", lambda c: 1e3 * c["between"]["p99"]),
    )
    for axis, (label, value) in zip(axes[0], panels, strict=True):
        for color, name in zip(COLORS, dict.fromkeys(c["engine"] for c in cases), strict=False):
            mine = [c for c in cases if c["engine"] == name]
            axis.plot([c["clients"] for c in mine], [value(c) for c in mine], "o-", color=color, label=name, ms=4)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("clients", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
        if "ms" in label:
            axis.set_yscale("log")
    axes[0][0].legend(fontsize=6)
    return fig


def _parser() -> argparse.ArgumentParser:
    """What is None by default is then as `DEFAULTS` say for the device."""
    parser = options(__doc__, "serving")
    parser.set_defaults(device="cpu")
    parser.add_argument("--model", default="nano", help="nano, a checkpoint, or a preset (random weights)")
    parser.add_argument("--clients", type=int, nargs="*", help="of the closed loops")
    parser.add_argument("--rates", type=float, nargs="*", help="requests a second, of the open loops")
    parser.add_argument("--requests", type=int, help="of a run, at least; and three for each client")
    parser.add_argument("--pictures", type=float, default=0.75, help="share of the prompts that have one")
    parser.add_argument("--new-tokens", type=int, nargs=2, help="shortest and longest answer")
    parser.add_argument("--slots", type=int, default=32, help="requests decoded at once, in every engine")
    parser.add_argument("--max-len", type=int, help="prompt and answer tokens of a request, at most")
    parser.add_argument("--kv-memory", type=int, help="MiB of K/V where memory is what limits")
    parser.add_argument("--engines", nargs="*", choices=COMPARED, help="to compare with")
    parser.add_argument(
        "--transformers-clients", type=int, nargs="*", help="compare transformers at the end, in these closed loops"
    )
    parser.add_argument(
        "--max-stall", type=int, nargs="*", default=[], help=f"{BASE} with these too, in the largest closed loop"
    )
    parser.add_argument("--release", type=Path, help="checkout of the last release that ran static batches")
    parser.add_argument("--seconds", type=float, help="for the rounds, and again at equal memory")
    parser.add_argument("--least", type=int, help="rounds, however long they take")
    parser.add_argument("--build", type=Path, default=ROOT / "build/versus")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    defaults = DEFAULTS[torch.device(args.device).type]
    if args.max_len is None:
        rows = preset(args.model).image_seq_length + 128 if args.model in PRESETS else 208
        args.max_len = rows + (args.new_tokens or defaults["new_tokens"])[1]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
