"""The tables a reader asks for first, from the records: README.md's, nano's page, and the top of docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.common import Data
from benchmarks.policies import exits
from benchmarks.report import Sheet, into_page, markdown, number, percent
from dyvte_engine import NANO

METHODS = ("KeepAll", "DyVTE", "DyVTE+FastV")
OTHER = "transformers, eager"
SHOWN = (OTHER, *METHODS)
NO_GPU = "No result of a GPU is recorded yet."
BLIND = "blind, majority answer of the training questions"
NANO_QUESTIONS = {  # (data, kind) in nano's report.json
    "easy-VQA test half, all": ("easy_vqa", "all"),
    "of these presence (yes/no)": ("easy_vqa", "presence"),
    "generated scenes: presence": ("scenes", "presence"),
    "colour": ("scenes", "color"),
    "shape": ("scenes", "shape"),
    "count": ("scenes", "count"),
    "left, right, above, below": ("scenes", "spatial"),
    "a printed word, seen in training": ("scenes", "word, seen"),
    "a printed word, never seen": ("scenes", "word, unseen"),
}


def readme(page: str, results: Sequence[tuple[str, Data]]) -> str:
    """README.md with its table as the records have it now."""
    measured = [data for _, data in results]
    on_gpu = [data for data in measured if "gpu" in data["machine"]]
    parts = [markdown(_headline(sheet)) for sheet in speed(on_gpu or measured)[:1]]
    parts += [_room(data) for data in measured if data["benchmark"] == "capacity"][:1]
    return into_page(page, "speed", "\n\n".join(parts))


def nano(page: str) -> str:
    """docs/nano.md with its tables as nano's reports have them."""
    return into_page(page, "nano", "\n\n".join(map(markdown, (nano_answers(), nano_exits()))))


def overview(results: Sequence[tuple[str, Data]]) -> str:
    """Times against transformers, sequences in the same memory, other engines: the top of docs/benchmarks.md."""
    measured = [data for _, data in results]
    return "\n\n".join(markdown(sheet) for sheet in (*speed(measured), *capacity(measured), *engines(measured)))


def _headline(sheet: Sheet) -> Sheet:
    """The first model, in 16 bits where it ran so, without the exit at half depth."""
    rows = [row for row in sheet.rows if row[1] in SHOWN]
    rows = [row for row in rows if not row[0].endswith("float32")] or rows
    return Sheet(sheet.title, sheet.columns, [row for row in rows if row[0] == rows[0][0]], sheet.note)


def _room(data: Data) -> str:
    """How many sequences fit into the same K/V memory, in words."""
    more = {c["method"]: number(100 * c["more"], 0) for c in data["cases"]}
    names = (*METHODS[1:], "DyVTE, early K/V dropped")
    held = ", ".join(f"{more[name]} with {name}" for name in names if name in more)
    return f"K/V memory for 100 sequences of {data['args']['model']} with KeepAll holds {held}."


def speed(measured: Sequence[Data]) -> list[Sheet]:
    """A table for each machine, the one measured last first: how many times faster than transformers, one at a time.

    Of several records of a model the one with the most rounds speaks.
    """
    chosen: dict[tuple[str, str, str], Data] = {}
    for data in sorted(filter(_rounds, measured), key=_rounds):
        chosen[_place(data), data["args"]["model"], data["args"]["dtype"]] = data
    at: dict[str, list[Data]] = {}
    for key in sorted(chosen):
        at.setdefault(key[0], []).append(chosen[key])
    columns = ["model", "method", "exit after", "prefill x", "first token x", "per token x", "of the limit"]
    note = "medians; first token: with processor and vision; of the limit: least time of a token over the measured one"
    return [
        Sheet(
            f"{place}, commit {', '.join(sorted({data['machine']['commit'] for data in at[place]}))}",
            columns,
            [_speed_row(data["args"], c) for data in at[place] for c in _shown(data)],
            note,
        )
        for place in sorted(at, key=lambda place: max(data["date"] for data in at[place]), reverse=True)
    ]


def _rounds(data: Data) -> int:
    """Rounds at batch 1; 0 of other benchmarks."""
    cases = data["cases"] if data["benchmark"] == "policies" else []
    return max((c["speedup"]["1"]["n"] for c in cases if c["batch"] == 1 and "speedup" in c), default=0)


def _place(data: Data) -> str:
    about = data["machine"]
    return about.get("gpu") or f"{about['cpu']}, {about['threads']} threads"


def _shown(data: Data) -> list[Data]:
    """The cases shown, at batch 1; an exit at half depth where nothing else left after the same layer."""
    shown: dict[tuple[str, str], Data] = {}
    for c in data["cases"]:
        method = c["method"].split(" at layer ")[0]
        if c["batch"] == 1 and "prefill" in c and method in SHOWN:
            shown.setdefault((method, exits(c)), c)
    return list(shown.values())


def _speed_row(args: Data, c: Data) -> list[str]:
    ratios = (c["prefill_speedup"], c["speedup"]["1"], c["per_token_speedup"])
    medians = [number(r["median"], 2) for r in ratios]
    return [f"{args['model']}, {args['dtype']}", c["method"], exits(c), *medians, percent(c["share"]["per_token"])]


def capacity(measured: Sequence[Data]) -> list[Sheet]:
    """How many more sequences run in the same K/V memory."""
    sheets = []
    for data in measured:
        if data["benchmark"] == "capacity":
            rows = [
                [c["method"], exits(c), str(c["sequences"]), number(c["more"], 2), number(c["speedup"]["median"], 2)]
                for c in data["cases"]
                if c["method"].split(", ")[0] in METHODS
            ]
            args, budget = data["args"], f"{data['budget'] / 2**20:,.0f} MiB of K/V memory"
            columns = ["method", "exit after", "sequences", "more x", "sequences/s x"]
            note = "without processor and vision; early K/V dropped: decoding no longer sees the picture"
            sheets.append(Sheet(f"{args['model']}, {args['dtype']}, in {budget}, {_place(data)}", columns, rows, note))
    return sheets


def engines(measured: Sequence[Data]) -> list[Sheet]:
    """Times on other engines, one request at a time."""
    sheets = []
    for data in measured:
        if data["benchmark"] == "versus":
            rows = [
                [name, *(number(1e3 * e[part]["median"]) for part in ("first", "whole")), percent(e["same_text"])]
                for name, e in data["engines"].items()
            ]
            n, model = data["args"]["new_tokens"], data["args"]["model"]
            columns = ["engine", "first token, ms", f"{n} tokens, ms", "same answer"]
            sheets.append(Sheet(f"{model} on other engines, {_place(data)}", columns, rows, "medians"))
    return sheets


def nano_answers() -> Sheet:
    report = json.loads((NANO / "report.json").read_text())
    rows = []
    for name, (data, kind) in NANO_QUESTIONS.items():
        model, blind = (report[data][who][kind] for who in ("model", BLIND))
        rows.append([name, f"{model['n']:,}", percent(model["share"], 1), _interval(model), percent(blind["share"], 1)])
    note = "blind: the most frequent training answer to the question"
    return Sheet("Answers on held-out data", ["questions", "n", "right", "95 % interval", "blind"], rows, note)


def nano_exits() -> Sheet:
    report = json.loads((NANO / "exit_heads_report.json").read_text())
    rows = []
    for name, data in (("easy-VQA test half", "easy_vqa_test"), ("generated scenes", "heldout_scenes")):
        found = report[data]
        same = found["agreement"]
        fixed = next(layer for layer, share in enumerate(found["fixed_exit_agreement"]) if share >= same["share"])
        figures = [f"{same['n']:,}", percent(same["share"], 1), _interval(same), number(found["mean_exit_layer"])]
        rows.append([name, *figures, str(fixed)])
    columns = ["questions", "n", "answered as without an exit", "95 % interval", "mean exit layer", "fixed exit"]
    note = f"layers 0-{len(report['calibration']['exit_histogram']) - 1}; fixed exit: the first layer that does as well"
    return Sheet("Its exit heads", columns, rows, note)


def _interval(share: Data) -> str:
    low, high = (100 * x for x in share["ci95"])
    return f"{low:.1f} - {high:.1f} %"
