"""All figures of one model in a folder: PNG, SVG and JSON each, and a report in Markdown and HTML."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..checks import check_seed
from ..eval.lines import LineFile
from ..eval.run import AnswerFile
from ..eval.task import Task
from ..files import write_bytes, write_text
from ..policies import DynamicExit
from .attention import WEIGHTS
from .boundaries import check_layers
from .entropy import AttentionEntropy, attention_entropy, checked_exits
from .exits import MARGIN, ExitHistogram, ManualExit, exit_histogram, manual_exit
from .page import Page
from .stages import STAGES, AttentionStages, attention_stages
from .timeline import Timelines, timelines

if TYPE_CHECKING:
    from ..engine import Engine

Progress = Callable[[str, int], None]  # what is being done, and how many units of it are finished


@dataclass(frozen=True, eq=False)
class Analysis:
    """What `analyse` found; `histogram` and `timelines` are None without exit heads."""

    stages: AttentionStages
    entropy: AttentionEntropy
    manual: ManualExit
    histogram: ExitHistogram | None
    timelines: Timelines | None


def units(
    num_layers: int, tasks: Sequence[Task], exits: Sequence[int] | None, heads: bool, attention: int | None = None
) -> int:
    """Prompts that `analyse` runs, for a progress bar."""
    watched = sum(len(task.samples[:attention]) for task in tasks)
    answered = sum(len(task.samples) for task in tasks)
    return watched * (2 + len(checked_exits(num_layers, exits))) + answered * (num_layers + 1 + heads)


def analyse(
    engine: Engine,
    tasks: Sequence[Task],
    heads: tuple[DynamicExit, str] | None,
    folder: Path,
    exits: Sequence[int] | None = None,
    examples: int = 5,
    seed: int = 0,
    progress: Progress = lambda what, done: None,
    attention: int | None = None,
) -> Analysis:
    """Runs everything; what was computed is kept in `folder`, and a killed run continues from it.

    heads: a policy and what tells it apart in the answers file. examples: prompts shown one by one, of the tasks in
    turn. exits: layers of the entropy figure. attention: prompts of each task for stages and entropy, default all.

    Raises:
        InvalidArgumentError: a seed, exits or a model of too few layers, before anything is written.
    """
    check_layers(engine.model.shape.num_layers, STAGES)
    check_seed(seed)
    checked_exits(engine.model.shape.num_layers, exits)
    samples = [s for task in tasks for s in task.samples[:attention]]
    names = [task.name for task in tasks for _ in task.samples[:attention]]
    dtype = str(engine.config.dtype).removeprefix("torch.")
    header = {"model_fingerprint": engine.model.fingerprint, "dtype": dtype}
    answers = AnswerFile(folder / "answers.jsonl", engine.model.fingerprint)
    kinds = {"exit": str, "key": str, "values": list}
    lines = LineFile(folder / "attention.jsonl", header, "attention", kinds)

    def step(what: str) -> Callable[[int], None]:
        progress(what, 0)
        return lambda done: progress(what, done)

    stages = attention_stages(engine, samples, names, seed=seed, file=lines, progress=step("attention"))
    entropy = attention_entropy(engine, samples, exits, lines, step("entropy"))
    manual = manual_exit(engine, tasks, answers, step("manual exit"))
    histogram = shown = None
    if heads is not None:
        policy, identity = heads
        histogram = exit_histogram(engine, tasks, policy, identity, answers, step("exit layers"), manual)
        shown = timelines(engine, in_turn(tasks, examples), policy) if examples else None
    return Analysis(stages, entropy, manual, histogram, shown)


def in_turn(tasks: Sequence[Task], count: int) -> list[Any]:
    """The first samples of all tasks, then the second ones, and so on."""
    longest = max(len(task.samples) for task in tasks)
    order = [task.samples[i] for i in range(longest) for task in tasks if i < len(task.samples)]
    return order[:count]


def write(analysis: Analysis, folder: Path, about: dict[str, Any], command: str) -> Page:
    """All files of the report into `folder`; `about` is the model's identity and goes into each JSON."""
    figures: dict[str, tuple[Any, Callable[[], Any]]] = {
        "stages": (analysis.stages, lambda: analysis.stages.plot().figure),
        "entropy": (analysis.entropy, analysis.entropy.plot_all),
        "manual_exit": (analysis.manual, analysis.manual.plot),
    }
    if analysis.histogram is not None:
        figures["exit_layers"] = (analysis.histogram, analysis.histogram.plot)
    if analysis.timelines is not None:
        figures["timelines"] = (analysis.timelines, analysis.timelines.plot)
    for name, (result, plot) in figures.items():
        record = {"model": about, "command": command, **result.record()}
        write_text(folder / f"{name}.json", json.dumps(rounded(record), indent=1) + "\n")
        figure, svg, drawn, png = plot(), io.BytesIO(), io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg")
        figure.savefig(drawn, format="png", dpi=100)
        Image.open(drawn).convert("RGB").quantize(256).save(png, "png", optimize=True)  # a third of the size
        write_bytes(folder / f"{name}.svg", svg.getvalue())
        write_bytes(folder / f"{name}.png", png.getvalue())
    page = page_of(analysis, about, command)
    page.write(folder, "report")
    return page


def rounded(value: Any) -> Any:
    """Floats to six digits, NaN to null: JSON that any reader takes."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def page_of(analysis: Analysis, about: dict[str, Any], command: str) -> Page:
    page = Page(f"Inside {about['name']}")
    counts = ", ".join(f"{t.name} {len(t.same)}" for t in analysis.manual.tasks)
    page.paragraph(
        f"Written by `{command}`; model fingerprint `{about['fingerprint']}`, {about['dtype']}, "
        f"{about['layers']} layers. Prompts: {counts}. Intervals are 95 %."
    )
    _stages_part(page, analysis.stages)
    _entropy_part(page, analysis.entropy)
    _manual_part(page, analysis.manual)
    if analysis.histogram is None:
        page.heading("Exit layers")
        page.paragraph("No exit heads were given (`--heads FILE`), so there are no exit layers to show.")
    else:
        _histogram_part(page, analysis.histogram)
    if analysis.timelines is not None:
        page.heading("Single prompts (the paper's Fig 6)")
        page.picture("timelines.png", "picture, question, answer, tokens in each layer and what the heads say")
        page.paragraph("Bars: prompt tokens that each layer computed. Line: what the head after each layer says.")
    return page


def _stages_part(page: Page, stages: AttentionStages) -> None:
    b = stages.boundaries
    page.heading("Attention stages (the paper's Fig 2)")
    page.picture("stages.png", "attention weights by layer")
    page.paragraph(
        f"Of {len(stages.weights)} prompts. "
        "A is the maximum over heads of the attention map; the weights are its row sums over the keys named, averaged "
        "over the query rows: visual tokens, or the text after the last picture. The system prompt is left out. The "
        "boundaries are the two cuts that minimise the squared error within three segments of the logarithms of the "
        "three curves, each of mean 0 and variance 1 over layers; 1,000 resamples of the prompts say how firm they are."
    )
    cuts = [
        f"stage {i + 2} begins at layer {first} in {100 * same:.1f} % of the resamples (95 %: layers {low} to {high})"
        for i, (first, same, (low, high)) in enumerate(zip(b.first, b.same, b.ci95))
    ]
    best = int(np.argmin(b.bic)) + 1
    page.points(
        [
            *cuts,
            f"three segments explain {100 * b.explained:.0f} % of the variance over layers; as much or more is "
            f"found in {100 * b.by_chance:.1f} % of random orders of the same layers",
            f"by the Bayesian information criterion {best} {'segment fits' if best == 1 else 'segments fit'} best of 1 "
            f"to {len(b.bic)}: " + ", ".join(f"{x:.1f}" for x in b.bic),
            *(f"{text}: in {100 * share:.1f} % of the resamples" for text, share in stages.pattern.items()),
        ]
    )
    page.table(["layer", "stage", *WEIGHTS], [[str(r["layer"]), str(r["stage"]), *_weights(r)] for r in stages.rows()])
    if stages.by_task:
        page.paragraph("Each task alone:")
        body = [
            [name, *(f"{f} ({100 * s:.0f} %)" for f, s in zip(b.first, b.same)), f"{100 * b.by_chance:.1f} %"]
            for name, b in stages.by_task.items()
        ]
        page.table(["task", "stage 2 from (resamples)", "stage 3 from", "as good by chance"], body)


def _weights(row: dict[str, Any]) -> list[str]:
    return [f"{row[w]:.2f} ({row[f'{w}_ci95'][0]:.2f}-{row[f'{w}_ci95'][1]:.2f})" for w in WEIGHTS]


def _entropy_part(page: Page, entropy: AttentionEntropy) -> None:
    page.heading("Entropy of the text's attention (the paper's Fig 4 and 5)")
    page.picture("entropy.png", "entropy by layer, with and without exits")
    page.paragraph(
        f"Of {entropy.tables.shape[1]} prompts. In nats, averaged over text rows. The paper's reading: of the "
        "head-maximum map as it is, which is no distribution; normalised: of each head's own attention over the keys "
        "named, averaged over heads. After an exit the keys are the text alone, so that attention moves from visual "
        "tokens to text."
    )
    changes = [entropy.later_change(reading) for reading in ("paper", "head")]
    body = [
        [f"layer {layer}" if layer is not None and layer >= 0 else "before layer 0", _signed(paper), _signed(head)]
        for layer, paper, head in zip(entropy.exits[1:], *changes)
    ]
    head_row = ["exit after", "paper's reading: change in later layers", "normalised: the same"]
    page.paragraph("Text self-attention, change against no exit in the mean of all layers after the exit:")
    page.table(head_row, body)


def _signed(change: tuple[float, float, float]) -> str:
    mean, low, high = change
    return f"{mean:+.3f} ({low:+.3f}, {high:+.3f})"


def _manual_part(page: Page, manual: ManualExit) -> None:
    page.heading("Accuracy after k layers (the paper's Fig 3)")
    page.picture("manual_exit.png", "score and agreement against the layers that see the picture")
    page.paragraph(
        "All visual tokens leave after the first k layers; k = 0 is the model that never sees the picture. The plateau "
        f"begins at the smallest k from which on the score of single answers is nowhere more than {100 * MARGIN:g} "
        "points below that without an exit. Differences are paired."
    )
    body = []
    for task in manual.tasks:
        k = task.plateau()
        mean, low, high = (100 * x for x in task.difference(k))
        scale = 100 / task.scores[0].get("of", 1)
        ends = [f"{scale * task.scores[i]['value']:.1f}" for i in (0, k, -1)]
        same = f"{100 * task.same[:, k].mean():.1f} %"
        body.append([task.name, *ends, f"{k} of {manual.num_layers}", f"{mean:+.1f} ({low:+.1f}, {high:+.1f})", same])
    head = ["task", "score, k = 0", "at plateau", "no exit", "plateau from k", "difference there", "same answers there"]
    page.table(head, body)


def _histogram_part(page: Page, histogram: ExitHistogram) -> None:
    page.heading("Exit layers by task (the paper's Fig 7)")
    page.picture("exit_layers.png", "share of prompts by exit layer")
    page.paragraph(
        f"Policy: `{histogram.policy}`. Tokens that never leave count as leaving after the last layer. Earliest: the "
        "first layer after which an exit already gives the full model's answer."
    )
    body = [
        [
            r["task"],
            str(r["n"]),
            f"{r['mean']:.1f} ({r['ci95'][0]:.1f}-{r['ci95'][1]:.1f})",
            f"{r['earliest_mean']:.1f}" if "earliest_mean" in r else "-",
        ]
        for r in histogram.rows()
    ]
    page.table(["task", "n", "mean exit layer", "mean earliest layer"], body)
