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
from benchmarks.report import COLORS, Sheet, finish, milliseconds, new_figure, number
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
        for round_number in rounds_within(args.seconds, least=3, most=100):
            for engine in kept.values():
                engine.runner.pictures.clear()
                engine.runner.prefixes.clear()
            for n, text in enumerate(texts):
                for name in (*KEPT, TEXT):
                    picture: Any = None if name == TEXT else images[0]
                    engine = kept[NOTHING if name == TEXT else name]
                    stats = engine.generate(text, picture, max_new_tokens=1, policy=policy).stats
                    if round_number > 0:  # the first round sets libraries up
                        times.setdefault((name, n), []).append(stats.ttft_s)
                    data["visual_tokens"] = max(data["visual_tokens"], stats.visual_tokens)
        data["kept_bytes"][policy_name] = kept[ALL].runner.prefixes.bytes_held
        for name in (*KEPT, TEXT):
            each = [times[name, n] for n in range(len(texts))]
            later = [seconds for own in each[1:] for seconds in own]
            about = {
                "first": spread(each[0]),
                "later": spread(later),
                "medians": [spread(own)["median"] for own in each],
            }
            data["cases"].append({"policy": policy_name, "kept": name, **about})
    return data


def tables(data: Data) -> list[Sheet]:
    sheets = []
    for policy in dict.fromkeys(c["policy"] for c in data["cases"]):
        cases = {c["kept"]: c for c in data["cases"] if c["policy"] == policy}
        rows = []
        for name, case in cases.items():
            ratios = [cases[NOTHING][part]["median"] / case[part]["median"] for part in ("first", "later")]
            rows.append([name, milliseconds(case["first"]), milliseconds(case["later"]), *map(number, ratios)])
        title = f"First token, ms, {policy}: {data['args']['model']}, {data['args']['dtype']}"
        size = number(data["kept_bytes"][policy] / 1e6)
        note = f"median (quartiles); {data['visual_tokens']} visual tokens; the prefix takes {size} MB"
        columns = ["", "question 1", f"questions 2 to {data['args']['questions']}", "times as fast, 1", "later"]
        sheets.append(Sheet(title, columns, rows, note))
    return sheets


def figure(data: Data) -> Figure:
    """Time to the first token by the number of the question."""
    names = list(dict.fromkeys(c["policy"] for c in data["cases"]))
    fig, axes = new_figure(3.5 * len(names), 2.8, columns=len(names))
    for axis, policy in zip(axes[0], names, strict=True):
        for color, name in zip(COLORS, (*KEPT, TEXT), strict=False):
            own = next(c["medians"] for c in data["cases"] if (c["policy"], c["kept"]) == (policy, name))
            axis.plot(range(1, len(own) + 1), [1e3 * seconds for seconds in own], color=color, label=name)
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
    parser.add_argument("--questions", type=int, default=16, help="at least 2")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each policy")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
