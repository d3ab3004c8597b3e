"""Many questions about one picture: the time to the first token of question n, with what is kept of those before it.

Every round forgets everything, then asks all questions of every engine in turn. `python -m benchmarks.again --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks import workload
from benchmarks.common import Data, header, options, rounds_within, spread
from benchmarks.report import COLORS, Sheet, finish, milliseconds, new_figure, scaled
from dyvte_engine import Engine, FixedExit, KeepAll, VisualTokenPolicy

NOTHING, PICTURES, ALL, TEXT = "nothing kept", "pictures kept", "pictures and prefixes kept", "the text alone"
KEPT = {
    NOTHING: dict(picture_cache=0, prefix_cache=0),
    PICTURES: dict(prefix_cache=0),
    ALL: dict(prefix_cache=1 << 31),
}


def engines(args: argparse.Namespace) -> dict[str, Engine]:
    """One model in three engines."""
    loaded = workload.load(args.model, args.dtype, args.device, 1, 1)
    own = dict(picture_cache=1 << 28)
    return {
        name: Engine(loaded.model, dataclasses.replace(loaded.config, **{**own, **kept})) for name, kept in KEPT.items()
    }


def policies(engine: Engine, model: str) -> dict[str, VisualTokenPolicy]:
    half = engine.model.shape.num_layers // 2 - 1
    layer = workload.PAPER_EXITS.get(model, half)
    return {"all stay": KeepAll(), f"exit after {layer}": FixedExit(layer)}


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("again", args, argv)
    kept = engines(args)
    texts, images = workload.questions(args.model, args.questions)
    data |= {"visual_tokens": 0, "kept_bytes": {}, "cases": []}
    for policy_name, policy in policies(kept[ALL], args.model).items():
        times: dict[tuple[str, int], list[float]] = {}
        for number in rounds_within(args.seconds, least=3, most=100):
            for engine in kept.values():
                engine.runner.pictures.clear()
                engine.runner.prefixes.clear()
            for n, text in enumerate(texts):
                for name in (*KEPT, TEXT):
                    picture: Any = None if name == TEXT else images[0]
                    engine = kept[NOTHING if name == TEXT else name]
                    stats = engine.generate(text, picture, max_new_tokens=1, policy=policy).stats
                    if number > 0:  # the first round sets libraries up
                        times.setdefault((name, n), []).append(stats.ttft_s)
                    data["visual_tokens"] = max(data["visual_tokens"], stats.visual_tokens)
        data["kept_bytes"][policy_name] = kept[ALL].runner.prefixes.bytes_held
        data["cases"] += [
            {"policy": policy_name, "kept": name, "question": n + 1, "ttft": spread(seconds)}
            for (name, n), seconds in times.items()
        ]
    return data


def _of(data: Data, policy: str, kept: str) -> list[Data]:
    return [c for c in data["cases"] if c["policy"] == policy and c["kept"] == kept]


def tables(data: Data) -> list[Sheet]:
    sheets = []
    for policy in dict.fromkeys(c["policy"] for c in data["cases"]):
        columns = {name: _of(data, policy, name) for name in (*KEPT, TEXT)}
        rows = []
        for n in range(len(columns[NOTHING])):
            cells = [milliseconds(own[n]["ttft"]) for own in columns.values()]
            ratio = columns[NOTHING][n]["ttft"]["median"] / columns[ALL][n]["ttft"]["median"]
            rows.append([str(n + 1), *cells, f"{ratio:.1f}"])
        size = scaled({"median": data["kept_bytes"][policy], "q1": 0, "q3": 0} | {"n": 1}, 1e-6).split(" ")[0]
        title = f"First token, ms, {policy}: {data['args']['model']}, {data['args']['dtype']}"
        note = f"median (quartiles); {data['visual_tokens']} visual tokens; the prefix takes {size} MB"
        sheets.append(Sheet(title, ["question", *columns, "times faster than with nothing kept"], rows, note))
    return sheets


def figure(data: Data) -> Figure:
    """Time to the first token by the number of the question."""
    names = list(dict.fromkeys(c["policy"] for c in data["cases"]))
    fig, axes = new_figure(3.5 * len(names), 2.8, columns=len(names))
    for axis, policy in zip(axes[0], names, strict=True):
        for color, name in zip(COLORS, (*KEPT, TEXT), strict=False):
            own = _of(data, policy, name)
            axis.plot([c["question"] for c in own], [1e3 * c["ttft"]["median"] for c in own], color=color, label=name)
        axis.set_title(policy, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("question about the picture", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0][0].set_ylabel("first token, ms", fontsize=8)
    axes[0][-1].legend(fontsize=6)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "again")
    parser.add_argument("--model", default="nano", help="nano, a preset (random weights) or a checkpoint")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each policy")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
