"""Every method on one request: vision, prefill, first token, each further token, whole answers, memory, and the limit.

transformers' generate (eager and SDPA attention) and all policies of this engine use the same weights and the same
prompts in one process, in turn. `python -m benchmarks.policies --help`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import roofline, workload
from benchmarks.common import Data, Limits, header, options, paired_ratio, peak_bytes, rounds_within, spread
from benchmarks.report import COLORS, Sheet, finish, milliseconds, new_figure, number, percent, scaled
from dyvte_engine import Engine, VisualTokenPolicy

Runs = dict[str, list[tuple[workload.Timeline, Any]]]
SHORT = 16  # tokens up to which a run belongs to the many short ones
POOL = 12  # batches of questions, one a round: where an exit comes depends on the question


def run_rounds(
    calls: dict[str, workload.Call], pool: Sequence[workload.Request], new_tokens: int, seconds: float, least: int
) -> Runs:
    """What every call gave, one each a round."""
    runs: Runs = {name: [] for name in calls}
    for number_ in rounds_within(seconds, least):
        for name, call in calls.items():
            runs[name].append(call(pool[number_ % len(pool)], new_tokens))
    return runs


def warm_up(calls: dict[str, workload.Call], request: workload.Request) -> dict[str, int]:
    """The memory that every call takes for one token; calls that do not fit are taken out."""
    peaks: dict[str, int] = {}
    for name in list(calls):
        try:
            calls[name](request, 2)
            outputs: list[Any] = []
            run = functools.partial(lambda call, found: found.append(call(request, 1)[1]), calls[name], outputs)
            peaks[name] = peak_bytes(run, request.engine.config.device)
            # The engine's K/V pages come from a pool that was there before the request.
            peaks[name] += sum(r.stats.kv_bytes for r in outputs[0]) if isinstance(outputs[0], list) else 0
        except torch.cuda.OutOfMemoryError:
            del calls[name]
        gc.collect()
    return peaks


def measure_batch(engine: Engine, args: argparse.Namespace, model: str, batch: int, limits: Limits) -> list[Data]:
    """One entry a method, for one batch size."""
    pool = workload.requests(engine, model, batch, POOL)
    bound = {name: engine.bind(p) for name, p in _wanted(workload.methods(engine, model), args.methods).items()}
    calls = workload.runners(bound)
    wanted = list(calls)
    peaks = warm_up(calls, pool[0])
    most = max(args.new_tokens)
    short = min(most, SHORT)
    runs = run_rounds(calls, pool, short, args.seconds, args.least)
    if most > short:
        for name, found in run_rounds(calls, pool, most, args.seconds, args.least).items():
            runs[name] += found
    pictures = sum(map(len, pool[0].pictures))
    entries = []
    for name in wanted:
        entry: Data = {"model": model, "batch": batch, "method": name}
        if name in calls:
            # transformers does the work of KeepAll; its cache is padded to the longest prompt
            results = [r for _, r in runs[name if name in bound else "KeepAll"]]
            merges = bound[name].tower_merges if name in bound else ()
            work = mean_work([request_work(engine, r, pictures, merges, most) for r in results])
            entry |= _times([line for line, _ in runs[name]], [line for line, _ in runs[workload.HF]], args.new_tokens)
            entry |= _against_limits(entry, work, limits)
            held = [sum(s.stats.kv_bytes for s in r) if name in bound else padded_cache(engine, r) for r in results]
            entry |= {"kv_bytes": statistics.fmean(held), "peak_bytes": peaks[name]}
            exits = [s.stats.exit_layer for r in results for s in r if s.stats.exit_layer is not None]
            entry["exit_layer"] = statistics.fmean(exits) if exits and name in bound else None
            entry["exited"] = len(exits) / sum(map(len, results)) if name in bound else None
            entry["prefill_gflops"] = work["prefill"].flops / 1e9 / batch
        entries.append(entry)
    return entries


def _wanted(methods: dict[str, VisualTokenPolicy], names: Sequence[str] | None) -> dict[str, VisualTokenPolicy]:
    """Those asked for, with KeepAll, whose lengths are transformers' too; all without names."""
    if not names:
        return methods
    unknown = [name for name in names if name not in methods]
    if unknown:
        raise SystemExit(f"--methods names {unknown[0]!r}; accepted: {', '.join(methods)}")
    return {name: policy for name, policy in methods.items() if name in ("KeepAll", *names)}


def padded_cache(engine: Engine, results: Sequence[Any]) -> int:
    """Bytes of transformers' K/V cache after the prompts: every one as long as the longest."""
    longest = max(max(r.stats.tokens_per_layer) for r in results)
    shape = engine.model.shape
    return len(results) * longest * shape.num_layers * shape.kv_bytes_per_row * engine.config.dtype.itemsize


def _times(lines: Sequence[workload.Timeline], base: Sequence[workload.Timeline], new_tokens: Sequence[int]) -> Data:
    reached = {n: [x for x in lines if len(x.tokens) >= n] for n in new_tokens}
    base_reached = {n: [x for x in base if len(x.tokens) >= n] for n in new_tokens}
    whole = {n: [x.until(n) for x in found] for n, found in reached.items() if found}
    paired = {n: paired_ratio([x.until(n) for x in base_reached[n]], whole[n]) for n in whole if base_reached[n]}
    steps = [x.per_token for x in lines if x.per_token]
    base_steps = [x.per_token for x in base if x.per_token]
    return {
        "processor": spread([x.processor for x in lines]),
        "vision": spread([x.vision_seconds for x in lines]),
        "prefill": spread([x.prefill for x in lines]),
        "per_token": spread(steps) if steps else None,
        "until": {str(n): spread(values) for n, values in whole.items()},
        "speedup": {str(n): ratio for n, ratio in paired.items()},
        "prefill_speedup": paired_ratio([x.prefill for x in base], [x.prefill for x in lines]),
        "per_token_speedup": paired_ratio(base_steps, steps) if steps else None,
    }


def request_work(
    engine: Engine, results: Sequence[Any], pictures: int, merges: Sequence[int], new_tokens: int
) -> dict[str, roofline.Work]:
    """What one batch's passes are at least, by the rows each layer saw."""
    rows = [r.stats.tokens_per_layer for r in results]
    middle = [[n + new_tokens // 2 for n in row] for row in rows]  # the mean length while decoding
    return {
        "vision": roofline.vision_work(engine, pictures, merges),
        "prefill": roofline.prefill_work(engine, rows),
        "per_token": roofline.decode_work(engine, middle),
    }


def mean_work(works: Sequence[dict[str, roofline.Work]]) -> dict[str, roofline.Work]:
    def mean(part: str) -> roofline.Work:
        found = [w[part] for w in works]
        return roofline.Work(statistics.fmean(w.flops for w in found), statistics.fmean(w.bytes for w in found))

    return {part: mean(part) for part in works[0]}


def _against_limits(entry: Data, work: dict[str, roofline.Work], limits: Limits) -> Data:
    least = {part: w.seconds(limits) for part, w in work.items()}
    measured = {part: entry[part]["median"] if entry[part] else None for part in least}
    return {
        "roofline": least,
        "share": {part: roofline.share(seconds, measured[part]) for part, seconds in least.items()},
    }


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("policies", args, argv)
    limits = Limits(**data["limits"])
    data["cases"] = []
    engine = workload.load(args.model, args.dtype, args.device, max(args.batch), max(args.new_tokens))
    for batch in args.batch:
        data["cases"] += measure_batch(engine, args, args.model, batch, limits)
    data["weights_bytes"] = roofline.weight_bytes(engine.model.hf)
    return data


def tables(data: Data) -> list[Sheet]:
    model, dtype, counts = data["args"]["model"], data["args"]["dtype"], data["args"]["new_tokens"]
    sheets = []
    for batch in dict.fromkeys(c["batch"] for c in data["cases"]):
        cases = [c for c in data["cases"] if c["batch"] == batch]
        where = f"{model}, {dtype}, batch {batch}"
        parts = ["processor", "vision", "prefill", "per_token"]
        columns = ["method", *(p.replace("_", " ") for p in parts), *(f"{n} new" for n in counts), "exit after"]
        rows = [_times_row(c, parts, counts) for c in cases]
        sheets.append(
            Sheet(
                f"Time in ms, {where}",
                columns,
                rows,
                "median (quartiles); `n new`: call to nth token; exit: mean layer (share of the answers)",
            )
        )
        columns = ["method", "prefill x", "per token x", *(f"{n} new x" for n in counts)]
        rows = [_ratios_row(c, counts) for c in cases]
        note = f"how many times faster than {workload.HF}, round by round"
        sheets.append(Sheet(f"Ratios, {where}", columns, rows, note))
        columns = ["method", "GFLOPs", "vision roof", "share", "prefill roof", "share", "token roof", "share"]
        columns += ["K/V MiB", "peak MiB"]
        note = "roof: least ms by the limits measured; share: roof / measured; peak: tensors besides the weights"
        sheets.append(Sheet(f"Limits and memory, {where}", columns, [_limits_row(c) for c in cases], note))
    return sheets


def _times_row(c: Data, parts: Sequence[str], counts: Sequence[int]) -> list[str]:
    if "prefill" not in c:
        return [c["method"], "out of memory", *[""] * (len(parts) + len(counts))]
    until = [milliseconds(c["until"].get(str(n))) for n in counts]
    return [c["method"], *(milliseconds(c[p]) for p in parts), *until, exits(c)]


def exits(c: Data) -> str:
    """Mean layer of those that left, and how many did where not all."""
    if c["exit_layer"] is None:
        return ""
    return number(c["exit_layer"]) + ("" if c["exited"] == 1 else f" ({percent(c['exited'])})")


def _ratios_row(c: Data, counts: Sequence[int]) -> list[str]:
    if "prefill" not in c:
        return [c["method"], "out of memory", *[""] * (1 + len(counts))]
    ratios = [c["prefill_speedup"], c["per_token_speedup"], *(c["speedup"].get(str(n)) for n in counts)]
    return [c["method"], *(scaled(r, digits=2) for r in ratios)]


def _limits_row(c: Data) -> list[str]:
    if "prefill" not in c:
        return [c["method"], "out of memory", *[""] * 8]
    pairs = [(number(1e3 * c["roofline"][p], 2), percent(c["share"][p])) for p in ("vision", "prefill", "per_token")]
    memory = [number(c[key] / 2**20, 2) for key in ("kv_bytes", "peak_bytes")]
    return [c["method"], number(c["prefill_gflops"], 2), *(x for pair in pairs for x in pair), *memory]


def figure(data: Data) -> Figure:
    """Stacked time to the last short token, a panel for each batch size; ticks at the roofline of vision + prefill."""
    batches = list(dict.fromkeys(c["batch"] for c in data["cases"]))
    last = str(max(n for n in data["args"]["new_tokens"] if n <= SHORT))
    fig, axes = new_figure(4.3 * len(batches) + 1, 4.2, columns=len(batches))
    for axis, batch in zip(axes[0], batches, strict=True):
        cases = [c for c in data["cases"] if c["batch"] == batch and "prefill" in c][::-1]
        names, start = [c["method"] for c in cases], [0.0] * len(cases)
        parts: list[tuple[str, Callable[[Data], float]]] = [
            ("processor", functools.partial(_median_ms, "processor")),
            ("vision", functools.partial(_median_ms, "vision")),
            ("prefill", functools.partial(_median_ms, "prefill")),
            (f"tokens 2 to {last}", lambda c: 1e3 * (c["until"][last]["median"] - c["until"]["1"]["median"])),
        ]
        for (label, value), color in zip(parts, COLORS, strict=False):
            width = [value(c) for c in cases]
            axis.barh(names, width, left=start, label=label, color=color)
            start = [s + w for s, w in zip(start, width, strict=True)]
        roof = [1e3 * (c["roofline"]["vision"] + c["roofline"]["prefill"]) for c in cases]
        axis.plot(roof, names, "k|", label="least for vision + prefill")
        axis.set_title(f"{data['args']['model']}, batch {batch}", fontsize=9)
        axis.set_xlabel(f"ms from the call to token {last}", fontsize=8)
        axis.tick_params(labelsize=7)
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    axes[0][0].legend(fontsize=6, loc="lower right")
    return fig


def _median_ms(part: str, c: Data) -> float:
    return 1e3 * c[part]["median"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "policies")
    parser.add_argument("--model", default="nano", help="nano, a preset (random weights, exits forced), a checkpoint")
    parser.add_argument("--methods", nargs="+", help="only these (and KeepAll) next to transformers; default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[1, 3, 16, 128])
    parser.add_argument("--seconds", type=float, default=20.0, help="for the short and for the long runs of a batch")
    parser.add_argument("--least", type=int, default=3, help="rounds of either, however long they take")
    args = parser.parse_args(argv)
    args.new_tokens = sorted({1, *args.new_tokens})
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
