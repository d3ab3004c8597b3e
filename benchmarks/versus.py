"""The same checkpoint and questions on transformers, OpenVINO GenAI and llama.cpp, on CPU, each in its own process.

OpenVINO and llama.cpp get environments of their own, made on the first call in `build/versus` (they need a package
index; llama.cpp also a C++ compiler, and a quarter of an hour of one core); the model is exported there. Every request
has another picture, so prefix caches do not help. The first token's time is that of a request for one token.
`python -m benchmarks.versus --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.common import Data, header, options, paired_ratio, rounds_within, spread
from benchmarks.report import COLORS, Sheet, finish, milliseconds, new_figure, scaled
from dyvte_engine import NANO_HEADS
from dyvte_engine.assets import resolve_model

ROOT = Path(__file__).parent.parent
BASE = "transformers, float32"
LLAMA_PACKAGE = "llama-cpp-python==0.3.36"  # the files are for the order of rows in it: see `benchmarks.gguf_export`
GGUF = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Side:
    """One engine: its Python, the worker's name for it, its model folder and option, what it is imported from."""

    python: Path
    engine: str
    folder: Path | str
    option: str
    source: Path | None = None


class Unavailable(Exception):
    """An engine cannot run here; the message says why."""


def command(*words: Any, seconds: float = 1800) -> None:
    """Run to the end. Raises Unavailable with the last lines it printed when it fails."""
    call = [str(w) for w in words]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(call[-4:])}: not done after {seconds:.0f} s") from None
    if done.returncode:
        said = [x for x in (done.stderr + done.stdout).strip().splitlines() if x.strip()]
        raise Unavailable(f"{' '.join(call[-4:])}: {' / '.join(said[-2:])}"[:400])


def environment(folder: Path, *packages: str) -> Path:
    """The Python of a virtual environment with these packages; made if it is not there."""
    if not (folder / "complete").is_file():
        command(sys.executable, "-m", "venv", "--clear", folder)
        install = ("-m", "pip", "install", "-q", *packages)
        command(folder / "bin/python", *install, seconds=7200)  # llama.cpp is compiled, for this processor
        (folder / "complete").touch()
    return folder / "bin/python"


def stale(exported: Path, folder: Path) -> bool:
    """Whether the export is missing or unfinished, or the checkpoint was written since."""
    done = exported / "complete"
    return not done.is_file() or done.stat().st_mtime < max(p.stat().st_mtime for p in folder.iterdir())


def openvino(folder: Path, build: Path) -> dict[str, Side]:
    """OpenVINO GenAI computing in float32 and in what it chooses; the model exported if it is not."""
    python = environment(build / "env", "optimum-intel[openvino]", "openvino-genai")
    exported = build / f"{folder.name}-openvino"
    if stale(exported, folder):
        # It comes as a dependency, built for another torch than the one installed, and breaks importing transformers.
        command(python, "-m", "pip", "uninstall", "-q", "-y", "torchvision")
        task = ("--task", "image-text-to-text", "--weight-format", "fp32")
        command(build / "env/bin/optimum-cli", "export", "openvino", "--model", folder, *task, exported)
        # Its export writes what transformers 5 reads; GenAI looks for the size of a picture in the older file.
        shutil.copy(folder / "preprocessor_config.json", exported)
        (exported / "complete").touch()
    options = {"float32": "f32", "its default": "default"}
    return {f"OpenVINO GenAI, {name}": Side(python, "openvino", exported, o) for name, o in options.items()}


def gguf(folder: Path, build: Path) -> Path:
    """The model's files for llama.cpp, written if they are not."""
    exported = build / f"{folder.name}-gguf"
    if stale(exported, folder):
        command(sys.executable, "-m", "benchmarks.gguf_export", folder, exported, "--weights", *GGUF.values())
        (exported / "complete").touch()
    return exported


def llama_cpp(folder: Path, build: Path) -> dict[str, Side]:
    """llama.cpp with float32 and bfloat16 weights."""
    python = environment(build / "llama-env", LLAMA_PACKAGE, "pillow")
    exported = gguf(folder, build)
    return {f"llama.cpp, {name}": Side(python, "llama.cpp", exported, o) for name, o in GGUF.items()}


def sides(model: str, build: Path) -> tuple[dict[str, Side], dict[str, str]]:
    """All engines that run here, and why the others do not."""
    folder, here = Path(resolve_model(model)), Path(sys.executable)
    found = {BASE: Side(here, "transformers", folder, "")}
    policies = {"KeepAll": "keep-all"} | ({"DyVTE": f"dynamic:{NANO_HEADS}"} if model == "nano" else {})
    for dtype in ("float32", "bfloat16"):
        for name, policy in policies.items():
            found[f"this engine, {name}, {dtype}"] = Side(here, "dyvte", folder, f"{dtype} {policy}", ROOT)
    missing = {}
    for name, engine in {"OpenVINO GenAI": openvino, "llama.cpp": llama_cpp}.items():
        try:
            found |= engine(folder, build)
        except Unavailable as e:
            missing[name] = str(e)
    return found, missing


class Worker:
    """A process that answers what it is asked, one thing at a time."""

    def __init__(self, side: Side, threads: int, log: Path, script: str = "versus_worker"):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if side.source is not None:
            environment["PYTHONPATH"] = str(side.source)
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [side.python, ROOT / f"benchmarks/{script}.py", side.engine, side.folder, side.option],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self._read()

    def ask(self, request: Data) -> Data:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # reading says why it has ended
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> Data:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable(" / ".join(self.log.read_text().strip().splitlines()[-2:])[:400])
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def started(
    found: dict[str, Side], missing: dict[str, str], threads: int, first: Sequence[Data], logs: Path
) -> dict[str, Worker]:
    """A worker for each engine that starts and answers the `first` requests; the others are noted in `missing`."""
    workers = {}
    for number, (name, side) in enumerate(found.items()):
        try:
            worker = Worker(side, threads, logs / f"{number}.log")
            for request in first:
                worker.ask(request)
            workers[name] = worker
        except Unavailable as e:
            missing[name] = str(e)
    if BASE not in workers:
        raise Unavailable(f"{BASE}, which all are compared with: {missing[BASE]}")
    return workers


def _requests(args: argparse.Namespace, folder: Path) -> list[list[Data]]:
    """For each round (and two to warm up) requests for one token, for many, and for an answer that ends by itself."""
    out = []
    texts, pictures = workload.questions("nano", 3 * (args.rounds + 2))
    for index, (text, (picture,)) in enumerate(zip(texts, pictures, strict=True)):
        path = folder / f"{index}.png"
        picture.save(path)
        tokens = (1, args.new_tokens, 24)[index % 3]
        out.append({"picture": str(path), "text": text, "new_tokens": tokens, "ends": index % 3 == 2})
    return [out[i : i + 3] for i in range(0, len(out), 3)]


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("versus", args, argv)
    found, missing = sides(args.model, args.build)
    taken: dict[str, list[Data]] = {name: [] for name in found}
    with tempfile.TemporaryDirectory() as folder:
        requests = _requests(args, Path(folder))
        workers = started(found, missing, data["machine"]["threads"], requests[0] + requests[1], Path(folder))
        for number in rounds_within(args.seconds, least=3, most=args.rounds):
            for name, worker in workers.items():
                first, whole, ended = (worker.ask(request) for request in requests[number + 2])
                taken[name].append({"first": first, "whole": whole, "ended": ended})
        for worker in workers.values():
            worker.close()
    data["missing"] = missing
    data["engines"] = {name: figures(taken[name], taken[BASE], args.new_tokens) for name in workers}
    return data


def figures(answers: Sequence[Data], base: Sequence[Data], new_tokens: int) -> Data:
    """Spread of first token, whole answer and each token between, and the ratios to transformers."""

    def values(found: Sequence[Data]) -> dict[str, list[float]]:
        first, whole = ([a[part]["seconds"] for a in found] for part in ("first", "whole"))
        steps = [(w - f) / (new_tokens - 1) for f, w in zip(first, whole, strict=True)]
        return {"first": first, "per_token": steps, "whole": whole}

    mine, theirs = values(answers), values(base)
    same = sum(a["ended"]["text"].strip() == b["ended"]["text"].strip() for a, b in zip(answers, base, strict=True))
    return {
        **{part: spread(v) for part, v in mine.items()},
        "speedup": {part: paired_ratio(theirs[part], v) for part, v in mine.items()},
        "same_text": same / len(answers),
    }


def tables(data: Data) -> list[Sheet]:
    parts = {"first": "first token", "per_token": "per token", "whole": "whole answer"}
    columns = ["engine", *(f"{p}, ms" for p in parts.values()), *(f"{p} x" for p in parts.values()), "same answer"]
    rows = []
    for name, e in data["engines"].items():
        ratios = [scaled(e["speedup"][p], digits=2) for p in parts]
        rows.append([name, *(milliseconds(e[p]) for p in parts), *ratios, f"{100 * e['same_text']:.0f} %"])
    rows += [[name, f"not measured: {why}", *[""] * 6] for name, why in data["missing"].items()]
    n = data["args"]["new_tokens"]
    note = (
        f"{n} tokens; x: times faster than {BASE}, question by question; same answer: as {BASE} gave, let end by itself"
    )
    if any(name.startswith("llama.cpp") for name in data["engines"]):
        note += "; llama.cpp loses the picture's first row and takes one more from the tower (its issue 25814)"
    return [Sheet(f"{data['args']['model']} on other engines, batch 1, CPU", columns, rows, note)]


def figure(data: Data) -> Figure:
    fig, axes = new_figure(7.5, 2.6)
    axis, names = axes[0][0], list(data["engines"])[::-1]
    first = [1e3 * data["engines"][n]["first"]["median"] for n in names]
    whole = [1e3 * data["engines"][n]["whole"]["median"] for n in names]
    axis.barh(names, first, label="first token", color=COLORS[0])
    axis.barh(names, [w - f for w, f in zip(whole, first, strict=True)], left=first, label="the rest", color=COLORS[3])
    axis.set_xlabel(f"ms for {data['args']['new_tokens']} tokens", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "versus")
    parser.set_defaults(device="cpu")
    parser.add_argument("--model", default="nano", help="nano or a checkpoint folder")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40, help="at most so many questions")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--build", type=Path, default=ROOT / "build/versus")
    args = parser.parse_args(argv)
    if (args.device, args.dtype) != ("cpu", "float32"):
        parser.error(
            "all engines run on the CPU, this one in float32 and bfloat16: --device and --dtype are not for here"
        )
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
