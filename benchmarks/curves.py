"""Accuracy against FLOPs and against measured time, for every method over its own knob, on held-out questions.

Answers come in batches, as the evaluation suite gives them; times at batch 1, every setting in turn on one question
after the other. `python -m benchmarks.curves --help`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.common import Z95, Data, header, options, rounds_within
from benchmarks.report import COLORS, Sheet, finish, new_figure, number
from dyvte_engine import (
    NANO_HEADS,
    DivPrune,
    Downsample,
    DynamicExit,
    Engine,
    FastV,
    FixedExit,
    KeepAll,
    PyramidDrop,
    Random,
    ToMe,
    VisionZip,
    VisualTokenPolicy,
    compose,
)
from dyvte_engine.eval.metrics import credit
from dyvte_engine.eval.run import answer_all, known_forms
from dyvte_engine.eval.suite import TASKS, load_tasks

Sweep = dict[str, VisualTokenPolicy]
SHOWN = ("DyVTE", "DyVTE+FastV", "FastV", "VTW", "Random", "Downsample")  # lines in color; the others in grey
THRESHOLDS = (0.05, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.997, 0.999)
CEILINGS = (0.35, 0.4, 0.5, 0.6, 0.75, 0.9)
KEEP_ALL = "KeepAll"
NEW_TOKENS = 3


def sweeps(engine: Engine, heads: Path) -> dict[str, Sweep]:
    """{method: {setting: policy}}, each over the knob it has."""
    exits = {f"p > {t:g}": DynamicExit.from_file(heads, t) for t in THRESHOLDS}
    ratios = (0.25, 0.5, 0.75, 0.9, 0.97)
    tokens = engine.model.vision.tokens
    kept = {f"{n} of {tokens}": n for n in (tokens // 2, tokens // 4, tokens // 9, tokens // 18)}
    return {
        KEEP_ALL: {"": KeepAll()},
        "DyVTE": dict(exits),
        "DyVTE+FastV": {t: compose(FastV(2, 0.5), policy) for t, policy in exits.items()},
        "FastV": {f"K 2, R {r:g}": FastV(2, r) for r in ratios},
        "VTW": {f"after {n}": FixedExit(n) for n in range(engine.model.shape.num_layers - 1)},
        "Random": {f"entering 2, R {r:g}": Random(2, r) for r in ratios},
        "Downsample": {f"{f} x {f}": Downsample(f) for f in (2, 3, 4, 6)},
        "PyramidDrop": {f"keep {k:g}": PyramidDrop((k, k * k, k**3)) for k in (0.75, 0.5, 0.25)},
        "DivPrune": {text: DivPrune(n / tokens) for text, n in kept.items()},
        "VisionZip": {text: VisionZip(n - n // 6, n // 6) for text, n in kept.items()},
        "ToMe": {f"keep {k:g}": ToMe(k) for k in (0.75, 0.5, 0.3)},
    }


def task_mean(values: np.ndarray, tasks: np.ndarray) -> tuple[float, float]:
    """Mean over tasks of the task's mean, and half of its 95 % interval (samples drawn within each task)."""
    groups = [values[tasks == t] for t in np.unique(tasks)]
    variance = sum(g.var(ddof=1) / len(g) for g in groups) / len(groups) ** 2
    return float(np.mean([g.mean() for g in groups])), Z95 * math.sqrt(variance)


def answers_of(
    engine: Engine, samples: Sequence[Any], tasks: np.ndarray, points: dict[tuple[str, str], VisualTokenPolicy]
) -> dict[tuple[str, str], Data]:
    """Accuracy, FLOPs and exit layer of every point."""
    out: dict[tuple[str, str], Data] = {}
    for key, policy in points.items():
        given = answer_all(engine, samples, policy, " ".join(key))
        right = np.array([credit(s, a.text) for s, a in zip(samples, given, strict=True)])
        flops = np.array([a.flops_true for a in given])
        value, half = task_mean(right, tasks)
        exits = [a.exit_layer for a in given if a.exit_layer is not None]
        out[key] = {
            "accuracy": value,
            "half": half,
            "by_task": {str(t): float(right[tasks == t].mean()) for t in dict.fromkeys(tasks)},
            "gflops": task_mean(flops, tasks)[0] / 1e9,
            "exit_layer": statistics.fmean(exits) if exits else None,
        }
    return out


def times_of(
    engine: Engine, samples: Sequence[Any], points: dict[tuple[str, str], VisualTokenPolicy], seconds: float
) -> dict[tuple[str, str], Data]:
    """Time to the third token at batch 1 relative to KeepAll on the same question: geometric mean, 95 % interval."""
    bound = {key: engine.bind(policy) for key, policy in points.items()}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in points}
    with workload.endless(engine):
        for number_ in rounds_within(seconds, least=4, most=len(samples)):
            sample = samples[number_ * 7919 % len(samples)]  # a prime: questions of all tasks in turn
            request = workload.Request(engine, [sample.prompt], [[sample.picture]])
            for key, policy in bound.items():
                if number_ == 0:
                    request.run(policy, NEW_TOKENS)
                taken[key].append(request.run(policy, NEW_TOKENS)[0].until(NEW_TOKENS))
    base = np.log(taken[KEEP_ALL, ""])
    out = {}
    for key, values in taken.items():
        logs = np.log(values) - base
        half = Z95 * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        middle = float(logs.mean())
        low, mid, high = (math.exp(x) for x in (middle - half, middle, middle + half))
        out[key] = {"time": mid, "time_low": low, "time_high": high, "ms": 1e3 * statistics.median(values)}
        out[key]["questions"] = len(values)
    return out


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("curves", args, argv)
    engine = Engine.from_pretrained(
        args.model, dtype=args.dtype, device=args.device, max_batch=args.batch, picture_cache=0, prefix_cache=0
    )
    forms = known_forms(engine.model)
    chosen = {t.name: t.within(forms)[0].samples for t in load_tasks(args.tasks, args.seed, args.n)}
    data["samples"] = {name: len(samples) for name, samples in chosen.items()}
    chosen = {name: samples for name, samples in chosen.items() if len(samples) > 1}
    samples = [s for part in chosen.values() for s in part]
    tasks = np.array([name for name, part in chosen.items() for _ in part])
    found = sweeps(engine, args.heads)
    points = {
        (method, setting): policy
        for method, sweep in found.items()
        if method == KEEP_ALL or not args.methods or method in args.methods
        for setting, policy in sweep.items()
    }
    answered = answers_of(engine, samples, tasks, points)
    timed = times_of(engine, samples, points, args.seconds)
    full = answered[KEEP_ALL, ""]["gflops"]
    data["points"] = [
        {"method": method, "setting": setting, **answered[method, setting], **timed[method, setting]}
        for method, setting in points
    ]
    for point in data["points"]:
        point["flops"] = point["gflops"] / full
    return data


def best_below(points: Sequence[Data], cost: str, ceiling: float) -> Data | None:
    """The most accurate of a method's points that cost at most the ceiling."""
    affordable = [p for p in points if p[cost] <= ceiling]
    return max(affordable, key=lambda p: p["accuracy"], default=None)


def by_method(data: Data) -> dict[str, list[Data]]:
    names = dict.fromkeys(p["method"] for p in data["points"])
    return {name: [p for p in data["points"] if p["method"] == name] for name in names}


def tables(data: Data) -> list[Sheet]:
    found = by_method(data)
    full = found.pop(KEEP_ALL)[0]
    sheets = [_winners(found, full, "flops", "FLOPs of vision and prefill")]
    sheets.append(_winners(found, full, "time", f"measured time to token {NEW_TOKENS}, batch 1"))
    columns = ["method", "setting", "accuracy, %", "± (95 %)", "FLOPs", "time", "time, 95 %", "ms", "exit after"]
    rows = [
        [
            p["method"],
            p["setting"],
            number(100 * p["accuracy"]),
            number(100 * p["half"]),
            number(p["flops"], 2),
            number(p["time"], 2),
            f"{p['time_low']:.2f}-{p['time_high']:.2f}",
            number(p["ms"]),
            number(p["exit_layer"]),
        ]
        for p in data["points"]
    ]
    counts = ", ".join(f"{name} {n}" for name, n in data["samples"].items())
    note = (
        f"mean over tasks; samples: {counts}; FLOPs and time relative to KeepAll; {full['questions']} questions timed"
    )
    sheets.append(Sheet(f"All points, {data['args']['model']}, {data['args']['dtype']}", columns, rows, note))
    return sheets


def _winners(found: dict[str, list[Data]], full: Data, cost: str, what: str) -> Sheet:
    columns = ["at most", *found]
    rows = []
    for ceiling in CEILINGS:
        cells = {name: best_below(points, cost, ceiling) for name, points in found.items()}
        there = [p for p in cells.values() if p]
        top = max(there, key=lambda p: p["accuracy"], default=None)
        rows.append([f"{100 * ceiling:.0f} %", *(_cell(p, top) for p in cells.values())])
    note = f"best accuracy in % a method reaches; ** best of the row, * within its interval; KeepAll: {_accuracy(full)}"
    return Sheet(f"Who wins at a given share of KeepAll's {what}", columns, rows, note)


def _accuracy(p: Data) -> str:
    return f"{100 * p['accuracy']:.1f} ± {100 * p['half']:.1f}"


def _cell(p: Data | None, top: Data | None) -> str:
    if p is None or top is None:
        return "-"
    mark = " **" if p is top else " *" if p["accuracy"] >= top["accuracy"] - top["half"] else ""
    return f"{100 * p['accuracy']:.1f}{mark}"


def figure(data: Data) -> Figure:
    fig, axes = new_figure(11, 4.4, columns=2)
    found = by_method(data)
    full = found.pop(KEEP_ALL)[0]
    titles = {"flops": "FLOPs (vision + prefill)", "time": f"measured time to token {NEW_TOKENS}, batch 1"}
    for axis, (cost, what) in zip(axes[0], titles.items(), strict=True):
        for name, points in found.items():
            shown = name in SHOWN
            line = sorted(points, key=lambda p: p["flops"])  # the knob's order
            x, y, half = (100 * np.array([p[k] for p in line]) for k in (cost, "accuracy", "half"))
            color = COLORS[SHOWN.index(name)] if shown else "#cccccc"
            label = name if shown else None
            axis.plot(x, y, "o-" if shown else ".-", color=color, label=label, markersize=4, linewidth=1.2)
            if not shown:
                axis.annotate(name, (x[0], y[0]), fontsize=6, color="#888888")
            elif cost == "flops":
                axis.fill_between(x, y - half, y + half, color=color, alpha=0.12, linewidth=0)
            else:
                sides = [
                    [100 * (p["time"] - p["time_low"]) for p in line],
                    [100 * (p["time_high"] - p["time"]) for p in line],
                ]
                axis.errorbar(x, y, yerr=half, xerr=sides, fmt="none", ecolor=color, alpha=0.3, linewidth=0.8)
        axis.plot(100, 100 * full["accuracy"], "k*", label=KEEP_ALL, markersize=9)
        axis.set_xlabel(f"% of KeepAll's {what}", fontsize=8)
        axis.set_ylabel("accuracy, % (mean over tasks)", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][1].legend(fontsize=7, loc="lower right")
    fig.suptitle(f"{data['args']['model']}: accuracy over cost; bands and bars: 95 %", fontsize=9)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "curves")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--heads", type=Path, default=NANO_HEADS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--n", type=int, default=100, help="samples of each task, before those of untaught forms leave")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the times")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
