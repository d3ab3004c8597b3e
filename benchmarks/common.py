"""What every benchmark shares: the machine in words, interleaved timing, physical limits, a table and a JSON file."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import dyvte_engine

Timings = dict[str, list[float]]


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    about = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dyvte_engine": dyvte_engine.__version__,
        "commit": commit.stdout.strip(),
        "device": str(device),
    }
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return about


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleave(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warmup: int = 2) -> Timings:
    """Every call once a round, so that what else the machine does hits all of them alike."""
    times: Timings = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name, call in calls.items():
            seconds = timed(call, device)
            if i >= warmup:
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and the quartiles beside it."""
    low, mid, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": mid, "q1": low, "q3": high, "n": len(values)}


def paired_ratio(base: list[float], other: list[float]) -> dict[str, float]:
    """How many times faster `other` is than `base`: the ratio of each round, then its median and quartiles."""
    return spread([b / o for b, o in zip(base, other, strict=True)])


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes per second, read plus written, of a large torch copy: the limit of anything bound by memory."""
    a = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    for _ in range(2):
        timed(lambda: a.copy_(b), device)
    return 2 * a.nbytes / min(timed(lambda: a.copy_(b), device) for _ in range(7))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square product: the limit of anything bound by arithmetic."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        timed(lambda: a @ b, device)
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def save_and_show(name: str, columns: list[str], rows: list[list[str]], data: dict[str, Any], out: Path) -> None:
    """Print the table, write `<out>/<name>.json`."""
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(path)
