"""A decoding step, captured: the usual kernels, and on CUDA five kernels a layer (`fused_decode`), each with its floor.

Sequences begin with random rows of text, as many as --rows; the steps of both ways take turns. "share" is the time that
the measured copy bandwidth needs for the weights and the cached rows, over the time taken.
`python -m benchmarks.decoding --help`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.common import Data, Limits, header, interleave, options, paired_ratio, rounds_within, spread
from benchmarks.report import COLORS, Sheet, finish, milliseconds, new_figure, number, percent, scaled
from dyvte_engine import Engine
from dyvte_engine.models.fused import FusedLayers, fused_layers, why_not
from dyvte_engine.runtime.running import Running

USUAL, FUSED = "usual", "fused"
STEPS = 8  # of one way before it is the other's turn
MOST_ROUNDS = 12


def begin(engine: Engine, batch: int, rows: int, fused: FusedLayers | None) -> Running:
    """Prefilled sequences that decode this way."""
    shape, config = engine.model.shape, engine.config
    torch.manual_seed(0)
    embeds = [torch.randn(rows, shape.hidden_size, dtype=config.dtype, device=config.device) for _ in range(batch)]
    runner = engine.runner
    before = runner.fused, runner.graphs
    try:
        runner.fused = fused
        runner.graphs = runner.decode_graphs(batch)
        return engine.prefill(embeds, [torch.zeros(rows, dtype=torch.bool)] * batch)
    finally:
        runner.fused, runner.graphs = before


def steps(running: Running) -> None:
    tokens = torch.full((len(running),), 5, device=running.logits.device)
    for _ in range(STEPS):
        running.step(tokens)


def moved(engine: Engine, batch: int, rows: int) -> int:
    """Bytes that a step must read: all weights, all cached rows."""
    shape, itemsize = engine.model.shape, engine.config.dtype.itemsize
    cached = batch * rows * shape.num_layers * shape.kv_bytes_per_row * itemsize
    return cached + sum(p.weight.nbytes for p in engine.model.decoder.linears)


@torch.inference_mode()
def measure_batch(engine: Engine, batch: int, args: argparse.Namespace, limits: Limits) -> list[Data]:
    layers = None if why_not(engine.model.decoder) else fused_layers(engine.model.decoder, True)
    ways = {USUAL: None} | ({} if layers is None or batch > layers.most else {FUSED: layers})
    running = {name: begin(engine, batch, args.rows, layers) for name, layers in ways.items()}
    calls = {name: functools.partial(steps, r) for name, r in running.items()}
    times = interleave(calls, rounds_within(args.seconds, most=MOST_ROUNDS), engine.config.device)
    bytes_moved, entries = moved(engine, batch, args.rows + STEPS * (2 + MOST_ROUNDS) // 2), []
    for name, values in times.items():
        step = [t / STEPS for t in values]
        share = limits.seconds(0.0, bytes_moved) / spread(step)["median"]
        ratio = paired_ratio(times[USUAL], values)
        entries.append(
            {"batch": batch, "way": name, "step": spread(step), "bytes": bytes_moved, "share": share, "speedup": ratio}
        )
    for r in running.values():
        r.close()
    return entries


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("decoding", args, argv)
    room = args.rows + STEPS * (3 + MOST_ROUNDS)
    engine = workload.load(args.model, args.dtype, args.device, 2 * max(args.batch), room, warm_up=False)
    data["why_not"] = why_not(engine.model.decoder)
    limits = Limits(**data["limits"])
    data["cases"] = [entry for batch in args.batch for entry in measure_batch(engine, batch, args, limits)]
    return data


def tables(data: Data) -> list[Sheet]:
    rows = [
        [
            str(c["batch"]),
            c["way"],
            milliseconds(c["step"]),
            number(c["bytes"] / c["step"]["median"] / 1e9),
            percent(c["share"]),
            "" if c["way"] == USUAL else scaled(c["speedup"], digits=2),
        ]
        for c in data["cases"]
    ]
    title = f"A decoding step behind {data['args']['rows']} rows, {data['args']['model']}, {data['args']['dtype']}"
    columns = ["batch", "kernels", "ms (quartiles)", "GB/s", "share of copy bandwidth", "times usual"]
    why = data["why_not"]
    return [Sheet(title, columns, rows, f"No fused kernels: {why}" if why else "")]


def figure(data: Data) -> Figure:
    """Share of the copy bandwidth, a bar for each batch size and way."""
    batches = list(dict.fromkeys(c["batch"] for c in data["cases"]))
    fig, axes = new_figure(5, 2.8)
    for i, way in enumerate((USUAL, FUSED)):
        share = {c["batch"]: 100 * c["share"] for c in data["cases"] if c["way"] == way}
        axes[0][0].bar(
            [batches.index(b) + 0.4 * i for b in share], list(share.values()), 0.4, label=way, color=COLORS[i]
        )
    axes[0][0].set_xticks([i + 0.2 for i in range(len(batches))], [f"batch {b}" for b in batches])
    axes[0][0].set_ylabel("% of copy bandwidth")
    axes[0][0].legend(fontsize=7)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "decoding")
    parser.add_argument("--model", default="nano", help="nano, a preset (random weights) or a checkpoint")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rows", type=int, default=640, help="rows of each sequence before the first step")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each batch size")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
