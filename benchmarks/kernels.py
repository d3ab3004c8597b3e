"""Every kernel against the plain torch form of the same thing, torch.compile's, and this machine's copy bandwidth;
products also against oneDNN's with a weight that was packed before.

`python -m benchmarks.kernels --help`. Interleaved rounds; on CUDA times come from CUDA events after the L2 cache was
overwritten. "share" is the least time that the measured copy bandwidth and matmul rate allow, over the time taken.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.common import (
    Data,
    Limits,
    Timings,
    header,
    interleave,
    options,
    paired_ratio,
    rounds_within,
    spread,
)
from benchmarks.kernel_cases import SIZES, Case, Inputs, TooLarge, cases
from benchmarks.report import COLORS, Sheet, finish, new_figure, number, percent, scaled

Calls = dict[str, Callable[[], Any]]


def cold_times(calls: Calls, rounds: Any, device: torch.device) -> Timings:
    """CUDA-event seconds of each call, the L2 cache overwritten before it."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    times: Timings = {name: [] for name in calls}
    for _ in rounds:
        for name, call in calls.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times[name].append(start.elapsed_time(end) * 1e-3)
    return times


def compiled(case: Case) -> Callable[[], Any] | str:
    """torch.compile's version of the torch form, run once; or why there is none."""
    torch._dynamo.reset()
    call = torch.compile(case.torch_form, dynamic=False)
    try:
        call()
    except Exception as e:  # a missing compiler, an unsupported operation: torch has no common class for them
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"[:200]
    return call


def memory_budget(device: torch.device) -> float:
    """Bytes the inputs of one case may take: results and the torch form's copies need as much again, several times."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 6
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 6


@torch.inference_mode()
def measure_case(make: Callable[[Inputs], Case], inputs: Inputs, seconds: float, with_compile: bool) -> Data:
    """Times of one operation's forms; {"skipped": why} when it does not fit."""
    torch.manual_seed(0)
    entry: Data = {"op": make.__name__, "batch": inputs.batch}
    try:
        case = make(inputs)
    except TooLarge as e:
        return entry | {"skipped": str(e)}
    calls: Calls = {"torch": case.torch_form, "dyvte": case.ours}
    if case.packed is not None:
        calls["packed"] = case.packed
    if with_compile and case.plain:
        made = compiled(case)
        if isinstance(made, str):
            entry["compile_error"] = made
        else:
            calls["compile"] = made
    interleave(calls, range(0), inputs.device, warmup=2)
    rounds = rounds_within(seconds, least=5, most=51)
    on_gpu = inputs.device.type == "cuda"
    times = cold_times(calls, rounds, inputs.device) if on_gpu else interleave(calls, rounds, inputs.device, warmup=0)
    entry |= {
        "bytes": case.bytes,
        "flops": case.flops,
        "seconds": {name: spread(values) for name, values in times.items()},
    }
    entry["speedup"] = {k: paired_ratio(v, times["dyvte"]) for k, v in times.items() if k != "dyvte"}
    return entry


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("kernels", args, argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    data["cases"], limits = [], Limits(**data["limits"])
    for size in args.sizes:
        for batch in args.batch:
            for make in cases(device):
                inputs = Inputs(SIZES[size], batch, dtype, device, memory_budget(device))
                with_compile = size in args.compile and batch == args.batch[0]
                entry = {"size": size, **measure_case(make, inputs, args.seconds, with_compile)}
                if "bytes" in entry:
                    least = limits.seconds(entry["flops"], entry["bytes"])
                    entry["share"] = least / entry["seconds"]["dyvte"]["median"]
                data["cases"].append(entry)
    return data


def tables(data: Data) -> list[Sheet]:
    sheets = []
    for size in dict.fromkeys(c["size"] for c in data["cases"]):
        rows = [_row(c) for c in data["cases"] if c["size"] == size]
        columns = ["op", "batch", "us (quartiles)", "GB/s", "share of limit", "x torch", "x torch.compile", "x packed"]
        sheets.append(Sheet(f"Kernels at {size} shapes, {data['args']['dtype']}", columns, rows))
    return sheets


def _row(c: Data) -> list[str]:
    if "skipped" in c:
        return [c["op"], str(c["batch"]), f"left out: {c['skipped']}", "", "", "", "", ""]
    ours, ratio = c["seconds"]["dyvte"], c["speedup"]
    return [
        c["op"],
        str(c["batch"]),
        scaled(ours, 1e6),
        number(c["bytes"] / ours["median"] / 1e9),
        percent(c["share"]),
        scaled(ratio["torch"], digits=2),
        c.get("compile_error") or scaled(ratio.get("compile"), digits=2),
        scaled(ratio.get("packed"), digits=2),
    ]


def figure(data: Data) -> Figure:
    """Share of the copy bandwidth, a bar for each operation and size at the first batch size."""
    batch = data["args"]["batch"][0]
    cases = [c for c in data["cases"] if c["batch"] == batch and "share" in c]
    sizes, ops = (list(dict.fromkeys(c[key] for c in cases)) for key in ("size", "op"))
    fig, axes = new_figure(9, 3.6)
    axis, width = axes[0][0], 0.8 / len(sizes)
    for i, size in enumerate(sizes):
        share = {c["op"]: 100 * c["share"] for c in cases if c["size"] == size}
        axis.bar([ops.index(op) + i * width for op in share], list(share.values()), width, label=size, color=COLORS[i])
    axis.axhline(100, color="black", linewidth=0.8)
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(ops))], ops, rotation=20, ha="right", fontsize=8)
    axis.set_ylabel("% of the limit")
    axis.set_title(f"Kernels, batch {batch}: least time by copy bandwidth and matmul rate / time taken", fontsize=9)
    axis.legend(fontsize=7)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "kernels")
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--sizes", nargs="+", default=["nano", "llava-1.5-7b"], choices=list(SIZES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--compile", nargs="*", default=["llava-1.5-7b"], choices=list(SIZES), help="sizes torch.compile is run at"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each case, besides compiling")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
