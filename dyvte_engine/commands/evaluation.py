"""`dyvte-engine eval`: accuracy, exit layers and FLOPs of policies on the nine tasks."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..engine import Engine
    from ..eval.run import AnswerFile
    from ..eval.task import Task

_err = Console(stderr=True)
EVERY = "all"


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or 'nano'.")] = "nano",
    tasks: Annotated[
        str, typer.Option(help="Task names joined by ',': pope, gqa, ..., easy-vqa; see docs/tasks.md.")
    ] = EVERY,
    policy: Annotated[
        list[str] | None, typer.Option(help="As in generate, [NAME=]POLICY; repeat it. Default: keep-all and auto.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Samples of each task.")] = 300,
    source: Annotated[str, typer.Option(help="Pictures: shapes or emoji.")] = "shapes",
    styles: Annotated[str | None, typer.Option(help="Emoji drawing styles joined by ','; default all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    all_forms: Annotated[bool, typer.Option(help="Also prompt forms the model was never taught.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON report to write.")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown page to write.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Answers file (JSONL): kept, and a killed run goes on from it.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts run together.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    max_len: Annotated[int | None, typer.Option(help="Prompt and answer tokens of one sequence.")] = None,
) -> None:
    """Accuracy with 95 % intervals, mean exit layer and FLOPs on the nine tasks, for one policy or several."""
    import transformers

    from ..engine import Engine
    from ..eval import TASKS, load_tasks
    from ..eval.report import left_out_lines, markdown
    from ..eval.run import AnswerFile

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = list(TASKS) if tasks == EVERY else [name.strip() for name in tasks.split(",")]
    chosen = load_tasks(names, seed, limit, source, styles.split(",") if styles else ())
    policies = [named(text, model) for text in policy or ["keep-all", "auto"]]
    with _err.status(f"loading {model}"):
        engine = Engine.from_pretrained(model, dtype=dtype, device=device, max_batch=batch, max_len=max_len)
    file = AnswerFile(answers, engine.model.fingerprint) if answers else None
    report: dict[str, Any] = {
        "model": identity_of(engine),
        "settings": {"seed": seed, "samples": limit, "source": source, "styles": styles, "decoding": "greedy"},
        "tasks": _run(engine, chosen, policies, file, all_forms),
    }
    _print(report)
    for line in left_out_lines(report):
        _err.print(line, highlight=False)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    if page:
        page.write_text(markdown(report, " ".join(["dyvte-engine", *sys.argv[1:]])))


def identity_of(engine: Engine) -> dict[str, Any]:
    return {
        "name": Path(engine.model.name).name,
        "fingerprint": engine.model.fingerprint,
        "dtype": str(engine.config.dtype).removeprefix("torch."),
        "layers": engine.model.shape.num_layers,
    }


class Named(NamedTuple):
    """A policy with its name in the table and what tells it apart in the answers file."""

    name: str
    policy: Any
    identity: str


def named(text: str, model: str) -> Named:
    """ "light=dynamic:light.safetensors"; without a name the notation is the name."""
    from ..assets import resolve_model
    from .main import policy_for

    name, sign, rest = text.partition("=")
    if not (sign and name.strip()) or ":" in name:
        name = rest = text
    files = [part.partition(":")[2].partition(",")[0] for part in rest.split("+")]
    files += [str(Path(resolve_model(model)) / "exit_heads.safetensors")] if rest == "auto" else []
    digests = [hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files if f and Path(f).is_file()]
    return Named(name.strip(), policy_for(rest, model), " ".join([rest, *digests]))


def _run(
    engine: Engine, tasks: list[Task], policies: list[Named], file: AnswerFile | None, all_forms: bool
) -> dict[str, Any]:
    from ..eval.report import summarise
    from ..eval.run import answer_all, known_forms
    from ..eval.task import FORMS

    kept = [(task, *task.within(FORMS if all_forms else known_forms(engine.model))) for task in tasks]
    total = len(policies) * sum(len(part.samples) for _, part, _ in kept)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    results: dict[str, Any] = {}
    with Progress(*columns, console=_err) as progress:
        bar = progress.add_task("", total=total)
        advance = partial(progress.advance, bar)
        for task, part, left_out in kept:
            entry: dict[str, Any] = {"original": task.original, "source": task.source, "chance": task.chance}
            results[task.name] = entry | {"left_out": left_out, "policies": {}}
            given: dict[str, Any] = {}
            for p in policies if part.samples else ():
                progress.update(bar, description=f"{task.name}, {p.name}")
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
    Console(width=max(120, Console().width)).print(table)


def sweep(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or 'nano'.")] = "nano",
    heads: Annotated[
        list[str] | None, typer.Option(help="[NAME=]HEADS_FILE; repeat it. Default: the heads beside the model.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Task names joined by ','; see docs/tasks.md.")] = EVERY,
    limit: Annotated[int, typer.Option(help="Samples of each task.")] = 100,
    source: Annotated[str, typer.Option(help="Pictures: shapes or emoji.")] = "shapes",
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown page to write.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Answers file (JSONL): kept, and a killed run goes on from it.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts run together.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
) -> None:
    """The accuracy/FLOPs curve: DyVTE at every threshold, an exit after every layer, Random at equal FLOPs."""
    import transformers

    from ..assets import resolve_model
    from ..engine import Engine
    from ..eval import TASKS, load_tasks
    from ..eval.curve_report import draw
    from ..eval.curve_report import page as written
    from ..eval.run import AnswerFile, known_forms
    from ..eval.sweep import record, sweep_report
    from ..policies import DynamicExit

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = list(TASKS) if tasks == EVERY else [name.strip() for name in tasks.split(",")]
    files = [
        entry.rpartition("=") for entry in heads or [f"own={Path(resolve_model(model)) / 'exit_heads.safetensors'}"]
    ]
    sets = {name or Path(file).stem: DynamicExit.from_file(file, threshold=0.5) for name, _, file in files}
    chosen = load_tasks(names, seed, limit, source)
    with _err.status(f"loading {model}"):
        engine = Engine.from_pretrained(model, dtype=dtype, device=device, max_batch=batch)
    kept = {task.name: task.within(known_forms(engine.model))[0].samples for task in chosen}
    kept = {name: samples for name, samples in kept.items() if samples}
    file = AnswerFile(answers, engine.model.fingerprint) if answers else None
    layers = engine.model.shape.num_layers
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=_err) as progress:
        bar = progress.add_task("answers", total=(layers + (layers - 1) // 2) * sum(map(len, kept.values())))
        outcomes = record(engine, kept, sets, file, partial(progress.advance, bar))
        report = sweep_report(engine, outcomes, range(1, layers - 1, 2), file, partial(progress.advance, bar))
    report["model"] = identity_of(engine)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report) + "\n")
    if plot:
        draw(report, plot)
    text = written(report, plot.name if plot else "", " ".join(["dyvte-engine", *sys.argv[1:]]))
    if page:
        page.write_text(text)
    else:
        print(text)
