"""What every benchmark shares: the machine in words, interleaved timing, physical limits, spread, fits."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import dyvte_engine
from dyvte_engine.kernels import ops

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr

Data = dict[str, Any]
Timings = dict[str, list[float]]
Z95 = 1.96


def machine(device: torch.device) -> Data:
    """What a figure depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.processor())
    about = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dyvte_engine": dyvte_engine.__version__,
        "commit": _commit(),
        "device": str(device),
    }
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "driver": _driver(), "cuda": torch.version.cuda}
    return about


def _driver() -> str:
    """Version of the GPU's driver. Raises FileNotFoundError or CalledProcessError where nvidia-smi does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _commit() -> str:
    """What git says of these files, or, for a copy without git, the environment's DYVTE_COMMIT; "" without either."""
    if "DYVTE_COMMIT" in os.environ:
        return os.environ["DYVTE_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def options(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the JSON and the plot")
    parser.add_argument("--name", default=name, help="their file name")
    return parser


def header(benchmark: str, args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    """The head of every JSON: the command, the machine, and its physical limits, measured now."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shown = {k: _from_here(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(device),
        "args": shown,
        "limits": vars(Limits.measured(device, dtype)),
    }


def _from_here(path: Path) -> str:
    """As a user of this repository would write it."""
    root = Path(__file__).resolve().parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def wait_for(device: torch.device) -> None:
    """Until all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def rounds_within(seconds: float, least: int = 3, most: int = 50) -> Iterator[int]:
    """Yield round numbers until `seconds` have passed, but at least `least` and at most `most` of them."""
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start >= seconds:
            return
        yield number


def interleave(
    calls: dict[str, Callable[[], Any]], rounds: int | Iterable[int], device: torch.device, warmup: int = 2
) -> Timings:
    """Every call once a round (their number, or as `rounds_within`): what else the machine does hits all of them."""
    times: Timings = {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            timed(call, device)
    for _ in range(rounds) if isinstance(rounds, int) else rounds:
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return times


def spread(values: Sequence[float]) -> Data:
    """Median and quartiles."""
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {"median": mid, "q1": low, "q3": high, "n": len(values)}


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> Data:
    """How many times faster `other` is than `base`: the ratio of each round, then its median and quartiles."""
    return spread([b / o for b, o in zip(base, other, strict=True)])


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    p, z2 = right / n, Z95**2 / n
    middle = (p + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return middle - half, middle + half


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Data:
    """Least squares of log y = exponent log x + c: the exponent and its standard error (0 with two points)."""
    a, b = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    slope, offset = np.polyfit(a, b, 1)
    left, free = b - slope * a - offset, len(a) - 2
    error = math.sqrt(left @ left / free / ((a - a.mean()) ** 2).sum()) if free > 0 else 0.0
    return {"exponent": float(slope), "error": error, "points": len(a)}


@dataclass(frozen=True)
class Limits:
    """What the machine does at best, measured with a matmul and torch's copy.

    Attributes:
        flops: per second, of a large square product in the dtype used (`matmul_rate`).
        bytes: per second, read plus written, of a copy too large for the caches.
    """

    flops: float
    bytes: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Limits:
        return cls(matmul_rate(device, dtype), copy_bandwidth(device))

    def seconds(self, flops: float, moved: float) -> float:
        """Roofline: no machine with these limits computes `flops` and moves `moved` bytes in less."""
        return max(flops / self.flops, moved / self.bytes)


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes per second, read plus written, of a large torch copy."""
    a = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * a.nbytes / min(timed(lambda: a.copy_(b), device) for _ in range(9))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square product: torch's, or on a CPU where that is slower, this project's."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    forms = [lambda: a @ b]
    if device.type == "cpu" and ops.few_rows(dtype, n) >= n:
        forms.append(lambda: ops.linear(a, b))
    return 2 * n**3 / min(timed(form, device) for form in forms for _ in range(9))


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors held at one time during a call, above those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed(call, device)
        return torch.cuda.max_memory_allocated(device) - before
    on_cpu: Any = dict(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with torch.profiler.profile(**on_cpu, acc_events=True) as profiler:  # without it, torch 2.11 warns
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(max(held, default=0))
