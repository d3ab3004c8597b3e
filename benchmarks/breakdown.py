"""Where the time of one request goes, part by part, with all visual tokens kept and with them leaving.

The parts are ranges around the engine's own functions, put there by this module and gone afterwards. On CUDA the device
is waited for at every end of a range, so the parts add up. The torch profiler gives a chrome trace of each method
(`<name>-<method>.trace.json.gz`). `python -m benchmarks.breakdown --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.common import Data, header, options, rounds_within, spread, wait_for
from benchmarks.report import COLORS, Sheet, finish, milliseconds, new_figure, percent
from dyvte_engine import Engine, KeepAll, VisualTokenPolicy
from dyvte_engine.models.rows import Rows
from dyvte_engine.runtime import scheduler
from dyvte_engine.runtime.kv_cache import KVCache
from dyvte_engine.runtime.prefill import Prefill
from dyvte_engine.runtime.runner import Runner
from dyvte_engine.runtime.running import Running
from dyvte_engine.runtime.sequence import Sequence as Answer

PREFILL = ("layers before the exit", "layers after the exit")
PARTS = (
    "processor",
    "vision",
    *PREFILL,
    "exit decisions",
    "rows leave",
    "K/V compaction",
    "decode",
    "sampling",
    "text",
    "host",
)


class Ranges:
    """Seconds by part; a range inside another is taken out of the outer one, so that parts add up."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list[Any]] = []  # [name, start]

    def enter(self, name: str) -> None:
        now = self._now()
        if self._open:
            self._charge(now)
        self._open.append([name, now])

    def leave(self) -> None:
        now = self._now()
        self._charge(now)
        self._open.pop()
        if self._open:
            self._open[-1][1] = now

    def rename(self, name: str) -> None:
        """The range open now is another part from here on."""
        self._charge(self._now())
        self._open[-1][0] = name

    def _charge(self, now: float) -> None:
        name, start = self._open[-1]
        self.seconds[name] += now - start
        self._open[-1][1] = now

    def _now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(name):
                self.enter(name)
                try:
                    return function(*args, **kwargs)
                finally:
                    self.leave()

        return inside


@dataclasses.dataclass(frozen=True, eq=False)
class _Watched(VisualTokenPolicy):
    """A policy that acts between layers, its decisions a range of their own."""

    inner: VisualTokenPolicy
    ranges: Ranges

    def layers(self, num_layers: int) -> set[int]:
        return self.inner.layers(num_layers)

    def decide(self, state: Any) -> Any:
        return self.ranges.around("exit decisions", self.inner.decide)(state)


@contextmanager
def ranges_in(device: torch.device) -> Iterator[Ranges]:
    """While this runs, the engine's functions report to the ranges, as long as one batch is prefilled."""
    ranges, stage = Ranges(device), [PREFILL[0]]
    drop = ranges.around("rows leave", Rows.drop)

    def drop_and_look(rows: Rows, decision: Any) -> Any:
        """From the decision on that empties the batch, layers count as after the exit."""
        dropped = drop(rows, decision)
        if dropped is not None and not any(dropped[0].n_visual):
            stage[0] = PREFILL[1]
            ranges.rename(stage[0])
        return dropped

    def layers(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: ranges.around(stage[0], function)(*args, **kwargs)

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (Runner, "prefill", layers(Runner.prefill)),
        (Prefill, "advance", layers(Prefill.advance)),
        (scheduler._Group, "finish", layers(scheduler._Group.finish)),
        (Rows, "drop", drop_and_look),
        (KVCache, "compact", ranges.around("K/V compaction", KVCache.compact)),
        (Running, "feed", ranges.around("decode", Running.feed)),
        (scheduler.Scheduler, "_sample", ranges.around("sampling", scheduler.Scheduler._sample)),
        (Answer, "emit", ranges.around("text", Answer.emit)),
    ]
    with ExitStack() as stack:
        for owner, name, function in places:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield ranges


def run_once(request: workload.Request, policy: VisualTokenPolicy, new_tokens: int) -> tuple[dict[str, float], Any]:
    """Seconds of every part of one request; "host" is what is in none of them."""
    model = request.engine.model
    with ranges_in(request.engine.config.device) as ranges, ExitStack() as stack:
        for name, part in (("tokenize", "processor"), ("prepare", "vision")):
            stack.enter_context(mock.patch.object(model, name, ranges.around(part, getattr(model, name))))
        line, results = request.run(_Watched(policy, ranges), new_tokens)
    seconds = {part: ranges.seconds.get(part, 0.0) for part in PARTS}
    seconds["host"] = line.until(new_tokens) - sum(seconds.values())
    return seconds, results


def trace(request: workload.Request, policy: VisualTokenPolicy, new_tokens: int, path: Path) -> float | None:
    """Write a chrome trace; on CUDA also the share of the wall time in which the device computed."""
    on_gpu = request.engine.config.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        run_once(request, policy, new_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if not on_gpu:
        return None
    events = profiler.profiler.kineto_results.events()
    kernels = sorted((e.start_ns(), e.end_ns()) for e in events if e.device_type() == torch.autograd.DeviceType.CUDA)
    return covered(kernels) / (kernels[-1][1] - kernels[0][0])


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans, sorted by start."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("breakdown", args, argv)
    loaded = workload.load(args.model, args.dtype, args.device, args.batch, args.new_tokens)
    request = workload.Request(loaded, *workload.questions(args.model, args.batch))
    layer = loaded.model.shape.num_layers // 2 - 1 if args.exit is None else args.exit
    policies = {"all stay": KeepAll(), "exit": loaded.bind(workload.forced_exit(loaded, layer))}
    compacting = Engine(loaded.model, dataclasses.replace(loaded.config, drop_early_kv=True))
    runs = {name: functools.partial(run_once, request, policy) for name, policy in policies.items()}
    dropping = workload.Request(compacting, request.texts, request.pictures)
    runs["exit, early K/V dropped"] = functools.partial(run_once, dropping, policies["exit"])
    for run in runs.values():
        run(args.new_tokens)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in rounds_within(args.seconds):
        for name, run in runs.items():
            parts, results[name] = run(args.new_tokens)
            seconds[name].append(parts)
    data["exit_layer"] = layer
    data["methods"] = {
        name: {
            "parts": {part: spread([r[part] for r in rounds]) for part in PARTS},
            "total": spread([sum(r.values()) for r in rounds]),
            "prefill_gflops": 1e3 * sum(r.stats.prefill_tflops_true for r in results[name]) / args.batch,
        }
        for name, rounds in seconds.items()
    }
    for name, policy in policies.items():
        path = args.out / f"{args.name}-{name.replace(' ', '-')}.trace.json.gz"
        data["methods"][name]["device_busy"] = trace(request, policy, args.new_tokens, path)
    return data


def tables(data: Data) -> list[Sheet]:
    args, found = data["args"], data["methods"]
    columns = ["part", *(f"{name}, ms (quartiles)" for name in found), *(f"share, {name}" for name in found)]
    rows = []
    for part in (*PARTS, "total"):
        values = [m["total"] if part == "total" else m["parts"][part] for m in found.values()]
        whole = [m["total"]["median"] for m in found.values()]
        shares = [percent(v["median"] / w) for v, w in zip(values, whole, strict=True)]
        rows.append([part, *(milliseconds(v) for v in values), *shares])
    title = f"{args['model']}, {args['dtype']}, batch {args['batch']}, {args['new_tokens']} new tokens"
    return [Sheet(f"Where the time goes: {title}, exit after layer {data['exit_layer']}", columns, rows, _saved(data))]


def _saved(data: Data) -> str:
    """What of the FLOPs saved is seen in time."""
    full, early = data["methods"]["all stay"], data["methods"]["exit"]

    def less(value: Callable[[Data], float]) -> str:
        return f"{100 * (value(early) / value(full) - 1):+.0f} %"

    def layers(m: Data) -> float:
        return sum(m["parts"][p]["median"] for p in (*PREFILL, "exit decisions", "rows leave"))

    flops = less(lambda m: m["prefill_gflops"])
    text = f"FLOPs of vision and prefill {flops}; time of the layers with all decisions {less(layers)}"
    text += f"; time of the request {less(lambda m: m['total']['median'])}"
    busy = [f"{name} {percent(m['device_busy'])}" for name, m in data["methods"].items() if m.get("device_busy")]
    return text + (f"; device busy (profiled): {', '.join(busy)}" if busy else "")


def figure(data: Data) -> Figure:
    fig, axes = new_figure(8, 2.8)
    axis, names = axes[0][0], list(data["methods"])[::-1]
    start = [0.0] * len(names)
    for i, part in enumerate(PARTS):
        width = [1e3 * data["methods"][n]["parts"][part]["median"] for n in names]
        hatch = "//" if i >= len(COLORS) else None
        axis.barh(names, width, left=start, label=part, color=COLORS[i % len(COLORS)], hatch=hatch)
        start = [s + w for s, w in zip(start, width, strict=True)]
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(f"One request of {data['args']['model']}, {data['args']['new_tokens']} new tokens", fontsize=9)
    axis.legend(fontsize=6, ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.2))
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "breakdown")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--exit", type=int, help="layer of the forced exit; default: half depth")
    parser.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
