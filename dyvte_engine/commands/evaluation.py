"""`dyvte-engine eval`: accuracy, exit layers and FLOPs of policies on the nine tasks."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..files import write_text
from ..lazy import optional
from .analysis import AllForms, within_range
from .output import apart, err, loading, out_file, progress, quiet

if TYPE_CHECKING:
    from ..engine import Engine
    from ..eval.named import Named
    from ..eval.run import AnswerFile
    from ..eval.task import Task

EVERY = "all"


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, 'nano' or 'smol'.")] = "nano",
    tasks: Annotated[
        str, typer.Option(help="Task names joined by ',': pope, gqa, ..., easy-vqa; see docs/tasks.md.")
    ] = EVERY,
    policy: Annotated[
        list[str] | None, typer.Option(help="As in generate, [NAME=]POLICY; repeat it. Default: keep-all and auto.")
    ] = None,
    limit: Annotated[int, typer.Option(min=4, help="Samples of each task.")] = 300,
    source: Annotated[str, typer.Option(help="Pictures: shapes or emoji.")] = "shapes",
    styles: Annotated[str | None, typer.Option(help="Emoji drawing styles joined by ','; default all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    all_forms: AllForms = False,
    out: Annotated[Path | None, out_file("JSON report to write.")] = None,
    page: Annotated[Path | None, out_file("Markdown page to write.")] = None,
    answers: Annotated[Path | None, out_file("Answers file (JSONL): kept, and a killed run continues from it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    max_len: Annotated[int | None, typer.Option(help="Prompt and answer tokens of one sequence.")] = None,
) -> None:
    """Score policies on the nine tasks, with their cost.

    Accuracy with 95 % intervals, mean exit layer and FLOPs, for one policy or several (docs/tasks.md).
    """
    from ..engine import Engine
    from ..eval import TASKS, load_tasks
    from ..eval.named import all_named
    from ..eval.report import left_out_lines, markdown
    from ..eval.run import AnswerFile

    quiet()
    apart({"out": out, "page": page, "answers": answers})
    names = list(TASKS) if tasks == EVERY else [name.strip() for name in tasks.split(",")]
    chosen = load_tasks(names, seed, limit, source, () if styles is None else styles.split(","))
    policies = all_named(policy or ["keep-all", "auto"], model)
    with loading(model):
        engine = Engine.from_pretrained(model, dtype=dtype, device=device, max_batch=batch, max_len=max_len)
    for p in policies:
        engine.bind(p.policy)  # before the first of them has run for an hour
    file = AnswerFile(answers, engine.model.fingerprint) if answers else None
    report: dict[str, Any] = {
        "model": identity_of(engine),
        "settings": {"seed": seed, "samples": limit, "source": source, "styles": styles, "decoding": "greedy"},
        "tasks": _run(engine, chosen, policies, file, all_forms),
    }
    _print(report)
    for line in left_out_lines(report):
        err.print(line)
    if out:
        write_text(out, json.dumps(report, indent=1) + "\n")
    if page:
        write_text(page, markdown(report, " ".join(["dyvte-engine", *sys.argv[1:]])))


def identity_of(engine: Engine) -> dict[str, Any]:
    return {
        "name": Path(engine.model.name).name,
        "fingerprint": engine.model.fingerprint,
        "dtype": str(engine.config.dtype).removeprefix("torch."),
        "layers": engine.model.shape.num_layers,
    }


def _run(
    engine: Engine, tasks: list[Task], policies: list[Named], file: AnswerFile | None, all_forms: bool
) -> dict[str, Any]:
    from ..eval.report import summarise
    from ..eval.run import answer_all, known_forms
    from ..eval.task import FORMS

    kept = [(task, *task.within(FORMS if all_forms else known_forms(engine.model))) for task in tasks]
    total = len(policies) * sum(len(part.samples) for _, part, _ in kept)
    results: dict[str, Any] = {}
    with progress() as shown:
        bar = shown.add_task("", total=total)
        advance = partial(shown.advance, bar)
        for task, part, left_out in kept:
            entry: dict[str, Any] = {"original": task.original, "source": task.source, "chance": task.chance}
            results[task.name] = entry | {"left_out": left_out, "policies": {}}
            given: dict[str, Any] = {}
            for p in policies if part.samples else ():
                shown.update(bar, description=f"{task.name}, {p.name}")
                given[p.name] = answer_all(engine, part.samples, p.policy, p.identity, file, advance)
                first = given[policies[0].name]
                summary = summarise(part, given[p.name], engine.model.shape.num_layers, first)
                results[task.name]["policies"][p.name] = summary
    return results


def _print(report: dict[str, Any]) -> None:
    from ..eval.report import rows

    head, body = rows(report)
    table = Table(box=None)
    for title in head:
        table.add_column(title, no_wrap=True)
    for before, row in zip([[""], *body], body):
        table.add_row(*(["", *row[1:]] if row[0] == before[0] else row))
    Console(width=max(120, Console().width), markup=False).print(table)


def sweep(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, 'nano' or 'smol'.")] = "nano",
    heads: Annotated[
        list[str] | None, typer.Option(help="[NAME=]HEADS_FILE; repeat it. Default: the heads in the model's folder.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Task names joined by ','; see docs/tasks.md.")] = EVERY,
    limit: Annotated[int, typer.Option(min=4, help="Samples of each task.")] = 100,
    source: Annotated[str, typer.Option(help="Pictures: shapes or emoji.")] = "shapes",
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    all_forms: AllForms = False,
    out: Annotated[Path | None, out_file("JSON to write.")] = None,
    plot: Annotated[Path | None, out_file("PNG to write.")] = None,
    page: Annotated[Path | None, out_file("Markdown page to write.")] = None,
    answers: Annotated[Path | None, out_file("Answers file (JSONL): kept, and a killed run continues from it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
) -> None:
    """Draw accuracy against FLOPs.

    DyVTE at every threshold, an exit after every layer, and Random at equal FLOPs (docs/tasks.md).
    """
    from ..assets import heads_of
    from ..engine import Engine
    from ..eval import TASKS, load_tasks
    from ..eval.curve_report import check_plot, draw
    from ..eval.curve_report import page as written
    from ..eval.run import AnswerFile
    from ..eval.sweep import heads_named, record, sweep_report

    quiet()
    if plot:
        check_plot(plot)
        optional("matplotlib", "eval")
    names = list(TASKS) if tasks == EVERY else [name.strip() for name in tasks.split(",")]
    files = heads or [f"own={heads_of(model)}"]
    apart({"out": out, "plot": plot, "page": page, "answers": answers}, [Path(f.rpartition("=")[2]) for f in files])
    sets = heads_named(files)
    chosen = load_tasks(names, seed, limit, source)
    with loading(model):
        engine = Engine.from_pretrained(model, dtype=dtype, device=device, max_batch=batch)
    kept = {task.name: task.samples for task in within_range(engine, chosen, all_forms)}
    for policy in sets.values():
        engine.bind(policy)  # before all that comes ahead of asking them
    file = AnswerFile(answers, engine.model.fingerprint) if answers else None
    layers = engine.model.shape.num_layers
    with progress() as shown:
        bar = shown.add_task("answers", total=(layers + (layers - 1) // 2) * sum(map(len, kept.values())))
        outcomes = record(engine, kept, sets, file, partial(shown.advance, bar))
        report = sweep_report(engine, outcomes, range(1, layers - 1, 2), file, partial(shown.advance, bar))
    report["model"] = identity_of(engine)
    if out:
        write_text(out, json.dumps(report) + "\n")
    if plot:
        draw(report, plot)
    text = written(report, plot.name if plot else "", " ".join(["dyvte-engine", *sys.argv[1:]]))
    if page:
        write_text(page, text)
    else:
        print(text)
