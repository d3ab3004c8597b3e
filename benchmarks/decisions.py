"""What asking the exit heads costs: one exit layer, decided by no head, by light heads and by the paper's.

Prompts enter at the decoder (vision runs before the clock). All methods compute the same rows, so what a prefill takes
longer than under a fixed exit is the price of asking. `python -m benchmarks.decisions --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.common import Data, Limits, header, interleave, options, rounds_within, spread
from benchmarks.report import COLORS, Sheet, finish, milliseconds, new_figure, number, percent
from dyvte_engine import DynamicExit, Engine, FixedExit, KeepAll, VisualTokenPolicy

NOBODY = "no head"


class _ReadAtOnce(DynamicExit):
    """Waits for the decision where it is made, before the next layer's projections are queued."""

    def decide(self, state: Any) -> Any:
        return self._decision(state, self.ask(state).tolist())


def askers(engine: Engine, layer: int) -> dict[str, VisualTokenPolicy]:
    """Ways to exit after `layer`."""
    paper = workload.forced_exit(engine, layer)
    return {
        NOBODY: FixedExit(layer),
        "light heads": workload.forced_exit(engine, layer, light=True),
        "paper's heads": paper,
        "paper's heads, every 2nd layer": dataclasses.replace(paper, min_layer=layer % 2, every_k=2),
        "paper's heads, the last three": dataclasses.replace(paper, min_layer=max(0, layer - 2)),
        "paper's heads, waiting": _ReadAtOnce(paper.heads, paper.threshold),
    }


def asking(policy: VisualTokenPolicy, layer: int, num_layers: int) -> Data:
    """How often heads are asked up to the exit, and the bytes of weights that each reads."""
    if not isinstance(policy, DynamicExit):
        return {"asked": 0, "head_bytes": 0}
    w1, w2, b1 = policy.heads.of_layer(layer)
    read = sum(w.nbytes for w in (w1, w2, b1) if w is not None)
    return {"asked": sum(n <= layer for n in policy.layers(num_layers)), "head_bytes": read}


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("decisions", args, argv)
    engine = workload.load(args.model, args.dtype, args.device, max(args.batch), 1)
    limits, layers = Limits(**data["limits"]), engine.model.shape.num_layers
    layer = workload.PAPER_EXITS.get(args.model, layers // 2 - 1) if args.exit is None else args.exit
    if not 0 <= layer < layers - 1:
        raise SystemExit(f"--exit is {layer}; accepted: 0 to {layers - 2}")
    policies = {"KeepAll": KeepAll(), **askers(engine, layer)}
    bound = {name: engine.bind(p) for name, p in policies.items()}
    data |= {"exit": layer, "cases": []}
    for batch in args.batch:
        prompts = engine.prepare(*workload.questions(args.model, batch))

        def run(policy: VisualTokenPolicy, prompts: Any = prompts) -> None:
            with engine.prefill_prepared(prompts, policy) as running:
                running.logits.argmax(-1).tolist()

        calls = {name: functools.partial(run, policy) for name, policy in bound.items()}
        times = interleave(calls, rounds_within(args.seconds, most=400), engine.config.device)
        for name, policy in bound.items():
            extra = [t / base - 1 for t, base in zip(times[name], times[NOBODY], strict=True)]
            entry: Data = {"method": name, "batch": batch, "seconds": spread(times[name]), "extra": spread(extra)}
            about = asking(policy, layer, layers)
            least = about["asked"] * limits.seconds(0.0, about["head_bytes"])
            data["cases"].append({**entry, **about, "least": least / entry["seconds"]["median"]})
    return data


def tables(data: Data) -> list[Sheet]:
    sheets = []
    for batch in dict.fromkeys(c["batch"] for c in data["cases"]):
        rows = [
            [
                c["method"],
                milliseconds(c["seconds"]),
                str(c["asked"]) if c["asked"] else "",
                number(c["head_bytes"] / 1e6, 2) if c["asked"] else "",
                percent(c["least"], 2) if c["asked"] else "",
                "" if c["method"] == NOBODY else _signed(c["extra"]),
            ]
            for c in data["cases"]
            if c["batch"] == batch
        ]
        title = f"Prefill with an exit after layer {data['exit']}, {data['args']['model']}, {data['args']['dtype']}"
        columns = [
            "exit decided by",
            "prefill, ms",
            "asked",
            "MB each",
            "reading them, least",
            "longer than by no head",
        ]
        sheets.append(Sheet(f"{title}, batch {batch}", columns, rows, "median (quartiles), round by round"))
    return sheets


def _signed(extra: Data) -> str:
    mid, low, high = (100 * extra[k] for k in ("median", "q1", "q3"))
    return f"{mid:+.2f} % ({low:+.2f} to {high:+.2f})"


def figure(data: Data) -> Figure:
    """How much longer than without heads, at the first batch size."""
    batch = data["cases"][0]["batch"]
    cases = [c for c in data["cases"] if c["batch"] == batch and c["asked"]][::-1]
    fig, axes = new_figure(7, 2.6)
    axis, names = axes[0][0], [c["method"] for c in cases]
    values = [100 * c["extra"]["median"] for c in cases]
    reach = [[100 * abs(c["extra"][q] - c["extra"]["median"]) for c in cases] for q in ("q1", "q3")]
    axis.barh(names, values, xerr=reach, color=COLORS[0], label="measured")
    axis.plot([100 * c["least"] for c in cases], names, "k|", markersize=12, label="least, reading their weights")
    axis.set_xlabel(f"% longer than an exit without heads, {data['args']['model']}, batch {batch}", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "decisions")
    parser.add_argument("--model", default="nano", help="nano, a preset (random weights) or a checkpoint")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--exit", type=int, help="layer after which visual tokens leave; default: the paper's, else half"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="for each batch size")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
