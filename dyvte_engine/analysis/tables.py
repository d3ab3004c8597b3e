"""The paper's tables with a model's own figures next to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import flops
from ..assets import PAPER_RESULTS
from ..config import DecoderShape
from ..errors import InvalidArgumentError
from .benchmarks import EXIT_LAYER, FLOPS, Measured

# The paper's name of each benchmark
BENCHMARKS = {
    "gqa": "GQA",
    "vqav2": "VQAv2",
    "textvqa": "TextVQA",
    "sqa": "SQA-I",
    "pope": "POPE",
    "mme": "MME",
    "mmb": "MMB",
    "seed": "SEED",
    "mmvet": "MM-Vet",
}
PAPER_LAYERS = {"7B": 32, "13B": 40}  # decoder layers of the paper's models, by the end of their names
ABLATED = ("gqa", "textvqa", "mmvet", "sqa")
PEERS = {"ToMe": "tome", "FastV": "fastv:2,0.5"}  # notation
NONE = "-"

# What the published FLOPs are of: Vicuna-7B with 576 visual tokens, and the towers of its models
_VICUNA = DecoderShape(4096, 32, 32, 32, 128, 11008, 32000, 4096)
_CLIP: dict[str, Any] = dict(tokens=577, hidden_size=1024, intermediate_size=4096, num_layers=24)
_INTERN: dict[str, Any] = dict(tokens=577, hidden_size=3200, intermediate_size=12800, num_layers=48)
_TOWERS = {"LLaVA-1.5-7B": _CLIP, "VILA-7B": _CLIP, "InternVL-7B": _INTERN}
_VISUAL = 576


@dataclass(frozen=True)
class Table:
    """One table of the paper: `note` says what is where, `head` and `rows` are text."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)


class Figures:
    """Measured figures of several methods, to be looked up by method, task and metric."""

    def __init__(self, measured: Mapping[str, Iterable[Measured]]):
        self.methods = {name: list(figures) for name, figures in measured.items()}

    def of(self, method: str, task: str, metric: str | None = None) -> Measured | None:
        """The figure of a metric, or the task's score."""
        for m in self.methods.get(method, []):
            if m.task == task and (m.metric == metric if metric else m.metric not in (EXIT_LAYER, FLOPS)):
                return m
        return None

    def shown(self, method: str, task: str, metric: str | None = None) -> str:
        m = self.of(method, task, metric)
        if m is None:
            return NONE
        if m.metric == FLOPS:
            return f"{m.value:.0f} %"
        digits = 0 if " of " in m.metric else 1
        return f"{m.value:.{digits}f} ({m.interval[0]:.{digits}f}-{m.interval[1]:.{digits}f})"

    def records(self) -> list[dict[str, Any]]:
        return [{"method": name, **m._asdict()} for name, figures in self.methods.items() for m in figures]


def paper() -> dict[str, Any]:
    """The published tables, as the package holds them."""
    return json.loads(PAPER_RESULTS.read_text())


def check_paper_model(name: str) -> str:
    accepted = paper()["accuracy"]["models"]
    if name not in accepted:
        raise InvalidArgumentError(f"paper-model is {name!r}; accepted: {', '.join(accepted)}")
    return name


def accuracy(figures: Figures, paper_model: str, layers: int) -> Table:
    """Tables 1 and 2 with the exit layers of tables 4 and 6: methods "without" and "with"."""
    published = paper()
    without, given = (published["accuracy"]["models"][paper_model][key] for key in ("without", "with"))
    exits = published["exit_layers"]["models"].get(paper_model, {})
    depth = PAPER_LAYERS[paper_model.rsplit("-", 1)[1]]
    head = ["benchmark", "paper: score", "with DyVTE", "FLOPs", f"exit of 0-{depth - 1}"]
    head += ["ours: measured", "score", "with DyVTE", "FLOPs", f"exit of 0-{layers - 1}"]
    rows = []
    for task, name in BENCHMARKS.items():
        score = figures.of("without", task)
        rows.append(
            [
                name,
                f"{without[name][0]:.1f}",
                f"{given[name][0]:.1f}",
                f"{100 * given[name][1] / without[name][1]:.0f} %",
                f"{exits[name]:.1f}" if name in exits else NONE,
                f"{task}: {score.metric}, n {score.n}" if score else "out of the model's range",
                figures.shown("without", task),
                figures.shown("with", task),
                figures.shown("with", task, FLOPS),
                figures.shown("with", task, EXIT_LAYER),
            ]
        )
    note = (
        f"Paper: {paper_model}, the benchmark itself. Ours: the generated task after it. FLOPs: of those without exit."
    )
    if "with" not in figures.methods:
        note += " Ours with DyVTE: not measured; give `--heads FILE`."
    return Table("Accuracy with and without DyVTE, FLOPs and exit layers (tables 1, 2, 4, 6)", note, head, rows)


def published_flops() -> Table:
    """The TFLOPs of every cell with a published exit layer, computed by `dyvte_engine.flops` from shapes alone."""
    published, rows = paper(), []
    for model, exits in published["exit_layers"]["models"].items():
        cells, vision = published["accuracy"]["models"][model], flops.tower_flops(**_TOWERS[model])
        for name, layer in exits.items():
            full, early = cells["without"][name][1], cells["with"][name][1]
            n = flops.prompt_length(full * 1e12, _VICUNA, vision)
            computed = flops.leaving_flops(_VICUNA, n, _VISUAL, layer, vision) / 1e12
            row = [model, name, f"{full:.1f}", f"{n:.0f}", f"{layer:.1f}", f"{early:.1f}", f"{computed:.2f}"]
            rows.append([*row, f"{100 * (computed / early - 1):+.1f} %"])
    head = ["model", "benchmark", "TFLOPs, no exit", "prompt tokens", "exit layer", "published", "computed", "off by"]
    note = "Each prompt length is solved from the cell without exit; the exit layer then gives the other cell."
    return Table("FLOPs: published and computed", note, head, rows)


def token_states(figures: Figures | None) -> Table:
    """Table 4; methods are named as its rows. None: not measured."""
    head = ["states"]
    for task in ABLATED:
        head += [f"{BENCHMARKS[task]}: paper", "ours"]
    rows = []
    for states, cells in paper()["token_states"]["rows"].items():
        row = [states]
        for task in ABLATED:
            score, layer = cells[BENCHMARKS[task]]
            row += [f"{score:.1f} / {layer:.1f}", NONE]
            mine, at = (figures.of(states, task, m) for m in (None, EXIT_LAYER)) if figures else (None, None)
            if mine and at:
                row[-1] = f"{mine.value:.1f} / {at.value:.1f}"
        rows.append(row)
    note = "Score / mean exit layer. MV mean visual, LV last visual, MT mean text, LT last text. Paper: LLaVA-1.5-7B."
    if figures is None:
        note += " Ours: not measured; train the 15 sets with `dyvte-engine ablate-heads` and give `--ablation FOLDER`."
    return Table("Token states that the heads see (table 4)", note, head, rows)


def peers(figures: Figures) -> Table:
    """Table 5: methods "without", "ToMe", "FastV", "with" (DyVTE) and "DyVTE+FastV"."""
    published = paper()["peers"]["methods"]
    names = {"without": "LLaVA-1.5-7B", "ToMe": "ToMe", "FastV": "FastV", "with": "DyVTE", "DyVTE+FastV": "DyVTE+FastV"}
    rows = []
    for task, name in BENCHMARKS.items():
        for method, row_name in names.items():
            cell, full = published[row_name].get(name), published["LLaVA-1.5-7B"].get(name)
            if cell is None and figures.of(method, task) is None:
                continue
            given = [f"{cell[0]:.1f}", f"{100 * cell[1] / full[1]:.0f} %"] if cell and full else [NONE, NONE]
            mine = [figures.shown(method, task), figures.shown(method, task, FLOPS)]
            rows.append([name, "no policy" if method == "without" else row_name, *given, *mine])
    head = ["benchmark", "method", "paper: score", "FLOPs", "ours: score", "FLOPs"]
    return Table("Peers (table 5)", "Paper: LLaVA-1.5-7B. FLOPs: of those without a policy.", head, rows)


def transfer(figures: Figures, own: str, others: Sequence[str]) -> Table:
    """Table 6: methods "without", "with" (own heads) and one for each of `others`, heads of other models."""
    rows = []
    for model, by in paper()["transfer"]["models"].items():
        for heads, cells in by.items():
            shown = [_cell(cells.get(name)) for name in BENCHMARKS.values()]
            rows.append([f"paper: {model}", heads, *shown])
    labels = {"without": "none", "with": f"{own} (its own)"} | {name: name for name in others}
    for method, label in labels.items():
        if method not in figures.methods:
            continue
        shown = [_pair(figures, method, task) for task in BENCHMARKS]
        rows.append([f"ours: {own}", label, *shown])
    note = "Score, or score / mean exit layer."
    if not others:
        note += " Ours with heads of another model: not measured; give `--transfer NAME=HEADS_FILE`."
    return Table("Heads of another model (table 6)", note, ["model", "heads from", *BENCHMARKS.values()], rows)


def _cell(cell: Any) -> str:
    if cell is None:
        return NONE
    return f"{cell[0]:.1f} / {cell[1]:.1f}" if isinstance(cell, list) else f"{cell:.1f}"


def _pair(figures: Figures, method: str, task: str) -> str:
    score, layer = figures.of(method, task), figures.of(method, task, EXIT_LAYER)
    if score is None or layer is None:
        return NONE
    return f"{score.value:.1f}" if method == "without" else f"{score.value:.1f} / {layer.value:.1f}"


def manual_exit(figures: Figures, paper_model: str, layers: int) -> Table:
    """Fig 3 at equal shares of the depth; methods are named as `exit_depths` says. The last is the full model."""
    published = _manual(paper_model)
    head = ["layers that see the picture"]
    for task in ABLATED:
        head += [f"{BENCHMARKS[task]}: paper", "ours"]
    rows = []
    for place, (method, k) in enumerate(exit_depths(paper_model, layers).items()):
        row = [f"{published['k'][place]} of {published['k'][-1]}, ours {k} of {layers}"]
        for task in ABLATED:
            row += [f"{published[BENCHMARKS[task]][place]:.1f}", figures.shown(method, task)]
        rows.append(row)
    return Table("Accuracy after k layers (figure 3)", f"Paper: {_manual_name(paper_model)}.", head, rows)


def exit_depths(paper_model: str, layers: int) -> dict[str, int]:
    """{method: k} at the published k's shares of the depth; "without" is the one that keeps the picture."""
    ks = _manual(paper_model)["k"]
    return {("without" if k == ks[-1] else f"{k} of {ks[-1]}"): round(k / ks[-1] * layers) for k in ks}


def _manual_name(paper_model: str) -> str:
    """Where the paper has no curve of this model, LLaVA-1.5-7B's."""
    return paper_model if paper_model in paper()["manual_exit"]["models"] else "LLaVA-1.5-7B"


def _manual(paper_model: str) -> dict[str, list[float]]:
    return paper()["manual_exit"]["models"][_manual_name(paper_model)]


def latency() -> Table:
    """Table 3, which this command does not measure."""
    rows = [
        [method, *(f"{seconds:g} s, {score:.1f}" for seconds, score in cells.values())]
        for method, cells in paper()["latency"]["methods"].items()
    ]
    note = "Seconds of a whole answer, score; batch 1, GPU not stated. Not measured here; see docs/benchmarks.md."
    return Table("Latency of LLaVA-1.5-13B (table 3)", note, ["method", "SQA-I: paper", "MMB: paper"], rows)
