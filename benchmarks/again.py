"""Many questions about one picture, and a chat about it: the time to the first token, by what is kept of those before.

Every round forgets everything, then asks all questions of every engine in turn, then holds a chat. Then a set of
questions, several about each picture, as `dyvte-engine eval` asks them. `--engines` adds OpenVINO GenAI and llama.cpp
with their prefix caches, in the environments of `benchmarks.versus`. `python -m benchmarks.again --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import versus, workload
from benchmarks.common import Data, header, options, rounds_within, spread
from benchmarks.report import COLORS, Sheet, finish, markdown, milliseconds, new_figure, number
from dyvte_engine import Engine, FastV, FixedExit, KeepAll, VisualTokenPolicy
from dyvte_engine.models.presets import PRESETS
from dyvte_engine.runtime.prefix import HEAD, REST, Prefix
from dyvte_engine.training.nano.evaluate import scene_items

NOTHING, PICTURES, ALL, TEXT = "nothing kept", "pictures kept", "pictures and prefixes kept", "the text alone"
KEPT = {
    NOTHING: dict(picture_cache=0, prefix_cache=0),
    PICTURES: dict(prefix_cache=0),
    ALL: dict(prefix_cache=1 << 31),
}
ANSWER = 8  # tokens of a turn's answer
LEAST = (*KEPT, TEXT)


def engines(args: argparse.Namespace) -> dict[str, Engine]:
    """One model in three engines."""
    common: dict[str, Any] = dict(dtype=args.dtype, device=args.device, max_batch=args.batch)
    if args.model in PRESETS:
        common["max_len"] = 1024 + 128 * args.turns  # a token for every letter
        loaded = Engine.from_config(args.model, **common, **KEPT[NOTHING])
    else:
        loaded = Engine.from_pretrained(args.model, **common, **KEPT[NOTHING])
    own = dict(picture_cache=1 << 28)
    kept = {name: Engine(loaded.model, dataclasses.replace(loaded.config, **own | of)) for name, of in KEPT.items()}
    loaded.model.hf.generation_config.eos_token_id = loaded.model.shape.vocab_size  # answers have the length asked for
    return kept


def policies(engine: Engine, args: argparse.Namespace) -> dict[str, VisualTokenPolicy]:
    layer = workload.PAPER_EXITS.get(args.model, engine.model.shape.num_layers // 2 - 1)
    every = {"all stay": KeepAll(), f"exit after {layer}": FixedExit(layer), "FastV": FastV()}
    return dict(list(every.items())[: args.policies])


def prefix_bytes(engine: Engine, prefix: Prefix) -> int:
    """What it takes, by how deep its two parts are: full pages, the rows behind them, and residual streams."""
    shape, page, size = engine.model.shape, engine.config.page_size, engine.config.dtype.itemsize
    (head, rows), layers = prefix.ends, shape.num_layers
    first, both = (prefix.depth[part] + 1 for part in (HEAD, REST))  # layers that each has passed
    pages = both * (rows // page) + (first - both) * (head // page)
    kv = pages * page + layers * (head % page + rows % page)
    residual = head * (first < layers) + (rows - head) * (both < layers)  # nothing follows the last layer
    residual += (both - (both == layers)) * (len(prefix.between) + 2) + len(prefix.marks) * rows
    queries = len(prefix.marks) * rows * shape.num_heads * shape.head_dim
    return size * (kv * shape.kv_bytes_per_row + residual * shape.hidden_size + queries)


class Times:
    """Seconds to the first token by (who, number of the question), of all rounds."""

    def __init__(self) -> None:
        self._all: dict[str, list[list[float]]] = {}

    def add(self, who: str, n: int, seconds: float) -> None:
        of = self._all.setdefault(who, [])
        while len(of) <= n:
            of.append([])
        of[n].append(seconds)

    def cases(self) -> Iterator[Data]:
        for who, each in self._all.items():
            later = [seconds for own in each[1:] for seconds in own]
            medians = [spread(own)["median"] for own in each]
            totals = {str(n): sum(medians[:n]) for n in (1, 2, 4, 8, 16, 32) if n <= len(medians)}
            about = {"first": spread(each[0]), "later": spread(later) if later else None}
            yield {"kept": who, **about, "medians": medians, "totals": totals}


def forget(kept: dict[str, Engine]) -> None:
    for engine in kept.values():
        engine.forget()


def ask(kept: dict[str, Engine], args: argparse.Namespace, policy: VisualTokenPolicy, times: Times) -> Data:
    """All questions of every engine in turn. Returns figures of the last one that finds its prefix."""
    texts, images = workload.questions(args.model, args.questions)
    found: Data = {}
    for n, text in enumerate(texts):
        for who in LEAST:
            if who in (NOTHING, PICTURES) and n >= args.fresh:
                continue
            engine, picture = kept[NOTHING if who == TEXT else who], None if who == TEXT else images[0]
            stats = engine.generate(text, picture, max_new_tokens=1, policy=policy).stats
            times.add(who, n, stats.ttft_s)
            if who == ALL:
                found = {
                    "visual_tokens": stats.visual_tokens,
                    "rows": sum(stats.tokens_per_layer),
                    "rows_reused": sum(stats.rows_reused),
                }
    return found


def talk(kept: dict[str, Engine], args: argparse.Namespace, policy: VisualTokenPolicy, times: Times) -> None:
    """A chat of so many turns: the picture in the first, all of what was said before in each."""
    texts, images = workload.questions(args.model, args.turns)
    for who in LEAST if args.turns else ():
        engine = kept[NOTHING if who == TEXT else who]
        chat = engine.chat(policy=policy, max_new_tokens=ANSWER)
        for n, text in enumerate(texts[: args.fresh if who in (NOTHING, PICTURES) else None]):
            picture = images[0] if n == 0 and who != TEXT else None
            times.add(who, n, chat.ask(text, picture).stats.ttft_s)


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("again", args, argv)
    kept = engines(args)
    text = workload.questions(args.model, 1)[0][0]
    for engine in kept.values():  # sets libraries up
        engine.generate(text, max_new_tokens=2)
    data |= {"cases": [], "chat": [], "store": []}
    for name, policy in policies(kept[ALL], args).items():
        questions, chat, found = Times(), Times(), {}
        for _ in rounds_within(args.seconds, least=args.rounds, most=100):
            forget(kept)
            found = ask(kept, args, policy, questions)
            (prefix,) = kept[ALL].runner.prefixes
            held = kept[ALL].runner.prefixes.bytes_held
            found |= {"bytes": held, "formula": prefix_bytes(kept[ALL], prefix)}
            forget(kept)
            talk(kept, args, policy, chat)
        data["cases"] += [{"policy": name, **case} for case in questions.cases()]
        data["chat"] += [{"policy": name, **case} for case in chat.cases()]
        data["store"].append({"policy": name, **found})
    data["set"] = [answered(kept, args, name, policy) for name, policy in policies(kept[ALL], args).items()]
    data["others"], data["missing"] = others(args, data["machine"]["threads"]) if args.engines else ({}, {})
    return data


def answered(kept: dict[str, Engine], args: argparse.Namespace, name: str, policy: VisualTokenPolicy) -> Data:
    """Seconds for a set of questions, four about each of its pictures, `batch` at a time, in the order of the set."""
    items = scene_items(0, "heldout", 0, args.pictures, number=4)
    out: Data = {"policy": name, "pictures": args.pictures, "questions": len(items), "seconds": {}}
    for who in (NOTHING, ALL) if items else ():
        forget(kept)
        start = time.perf_counter()
        for first in range(0, len(items), args.batch):
            some = items[first : first + args.batch]
            asked = [i.question.text for i in some], [i.picture for i in some]
            kept[who].generate(*asked, policy=policy, max_new_tokens=ANSWER)
        out["seconds"][who] = time.perf_counter() - start
    return out


def others(args: argparse.Namespace, threads: int) -> tuple[Data, dict[str, str]]:
    """Other engines with their prefix caches, and this one, each in a process: seconds for one token of each question.

    Every round takes another picture, which none of them has seen.
    """
    found, missing = versus.sides(args.model, args.build)
    wanted = ("this engine, KeepAll", "OpenVINO", "llama.cpp")
    workers, times = {}, Times()
    texts, pictures = workload.questions("nano", args.questions + args.rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, side) in enumerate(found.items()):
            try:
                if name.startswith(wanted):
                    log = Path(folder) / f"{place}.log"
                    workers[name] = versus.Worker(side, threads, log, script="again_worker")
            except versus.Unavailable as e:
                missing[name] = str(e)
        for round_number in range(args.rounds + 1):
            path = Path(folder) / f"{round_number}.png"
            pictures[args.questions + round_number][0].save(path)
            for n in range(args.questions):
                request = {"picture": str(path), "text": texts[n], "new_tokens": 1, "ends": False}
                for name, worker in workers.items():
                    seconds = worker.ask(request)["seconds"]
                    if round_number:  # the first sets libraries up
                        times.add(name, n, seconds)
        for worker in workers.values():
            worker.close()
    return {case["kept"]: case for case in times.cases()}, missing


# --- what people read -------------------------------------------------------------------------------------------------


def tables(data: Data) -> list[Sheet]:
    title = f"{data['args']['model']}, {data['args']['dtype']}"
    sheets = [_questions(data, title, policy) for policy in dict.fromkeys(c["policy"] for c in data["cases"])]
    sheets += [_chat(data, title), _store(data, title), _set(data, title)]
    return [sheet for sheet in (*sheets, _others(data, title)) if sheet.rows]


def _questions(data: Data, title: str, policy: str) -> Sheet:
    cases = {c["kept"]: c for c in data["cases"] if c["policy"] == policy}
    counts, rows = list(cases[ALL]["totals"])[1:], []
    for name, case in cases.items():
        ratios = [cases[NOTHING][part]["median"] / case[part]["median"] for part in ("first", "later") if case[part]]
        totals = [number(1e3 * case["totals"][n], 0) if n in case["totals"] else "" for n in counts]
        rows.append([name, milliseconds(case["first"]), milliseconds(case["later"]), *map(number, ratios), *totals])
    visual = next(s["visual_tokens"] for s in data["store"] if s["policy"] == policy)
    note = f"median (quartiles); {visual} visual tokens; x: times as fast as with nothing kept; n: sum of the first n"
    columns = ["", "question 1", "later ones", "1, x", "later, x", *(f"n = {n}" for n in counts)]
    return Sheet(f"First token, ms, {policy}: {title}", columns, rows, note)


def _chat(data: Data, title: str) -> Sheet:
    rows, places = [], [1, 2, 5, 10, 20]
    for case in data["chat"]:
        turns = [number(1e3 * case["medians"][n - 1]) if n <= len(case["medians"]) else "" for n in places]
        rows.append([case["policy"], case["kept"], *turns])
    columns = ["", "", *(f"turn {n}" for n in places)]
    return Sheet(f"First token of a chat's turns, ms: {title}", columns, rows, f"medians; answers of {ANSWER} tokens")


def _store(data: Data, title: str) -> Sheet:
    rows = []
    for s in data["store"]:
        size = [number(s[name] / 1e6, 2) for name in ("bytes", "formula")]
        rows.append([s["policy"], f"{s['rows_reused']:,} of {s['rows']:,}", *size])
    columns = ["", "rows x layers that a later question reads", "prefix, MB", "by the formula"]
    return Sheet(f"What is kept: {title}", columns, rows)


def _set(data: Data, title: str) -> Sheet:
    rows = []
    for s in data["set"]:
        if s["seconds"]:
            without, kept = (s["seconds"][who] for who in (NOTHING, ALL))
            rows.append([s["policy"], number(without), number(kept), number(without / kept, 2)])
    some = data["set"][0]
    note = f"{some['questions']} questions about {some['pictures']} pictures, answers of {ANSWER} tokens, one run"
    return Sheet(f"A set of questions, s: {title}", ["", NOTHING, ALL, "times as fast"], rows, note)


def _others(data: Data, title: str) -> Sheet:
    rows = [[name, milliseconds(c["first"]), milliseconds(c["later"])] for name, c in data["others"].items()]
    rows += [[name, f"not measured: {why}", ""] for name, why in data["missing"].items()]
    note = "each in a process, its prefix cache on; whole calls for one token"
    return Sheet(f"Other engines, ms: {title}", ["engine", "question 1", "later ones"], rows, note)


def figure(data: Data) -> Figure:
    """Time to the first token by the number of the question, and of the turn."""
    names = list(dict.fromkeys(c["policy"] for c in data["cases"]))
    fig, axes = new_figure(3.2 * len(names), 4.6, columns=len(names), rows=2)
    for row, (part, what) in enumerate((("cases", "question"), ("chat", "turn of a chat"))):
        for axis, policy in zip(axes[row], names, strict=True):
            for color, name in zip(COLORS, LEAST, strict=False):
                for case in (c for c in data[part] if (c["policy"], c["kept"]) == (policy, name)):
                    values = [1e3 * seconds for seconds in case["medians"]]
                    axis.plot(range(1, len(values) + 1), values, color=color, label=name, marker=".", markersize=3)
            axis.set_title(policy, fontsize=8)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(what, fontsize=8)
            axis.tick_params(labelsize=8)
        axes[row][0].set_ylabel("first token, ms", fontsize=8)
    axes[0][-1].legend(fontsize=6)
    return fig


def section(name: str, data: Data) -> str:
    """What docs/again.md says of a record."""
    return "\n\n".join([f"```sh\n{data['command']}\n```", *(markdown(sheet) for sheet in tables(data))])


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "again")
    parser.add_argument("--model", default="nano", help="nano, a preset (random weights) or a checkpoint")
    parser.add_argument("--questions", type=int, default=32, help="at least 2")
    parser.add_argument("--turns", type=int, default=20, help="of the chat; 0: none")
    parser.add_argument("--fresh", type=int, default=32, help="so many questions and turns without the store")
    parser.add_argument("--pictures", type=int, default=16, help="of the set of questions; 0: none")
    parser.add_argument("--policies", type=int, default=3, help="1: all stay; 2: and an exit; 3: and FastV")
    parser.add_argument("--batch", type=int, default=8, help="of the set of questions")
    parser.add_argument("--rounds", type=int, default=3, help="at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each policy")
    parser.add_argument("--engines", action="store_true", help="other engines too")
    parser.add_argument("--build", type=Path, default=versus.ROOT / "build/versus", help="their environments")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
