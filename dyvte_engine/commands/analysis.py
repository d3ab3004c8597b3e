"""`dyvte-engine analyze | reproduce`: the paper's figures and tables for any model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..lazy import optional
from .output import err, loading, out_folder, progress, quiet

if TYPE_CHECKING:
    from ..eval.task import Task


Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id, 'nano' or 'smol'.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts run together.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]
MaxLen = Annotated[int | None, typer.Option(help="Prompt and answer tokens of one sequence.")]
TrustCode = Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")]
AllForms = Annotated[bool, typer.Option(help="Also prompt forms the model was never taught.")]


def analyze(
    model: Model = "nano",
    data: Annotated[
        str,
        typer.Option(
            help="Tasks joined by ',' or 'all' (docs/tasks.md), FILE.jsonl, FILE.json, nano[:SET] or smol[:SET]."
        ),
    ] = "all",
    out: Annotated[Path, out_folder("Folder for the report; a killed run continues there.")] = Path("outputs/analysis"),
    heads: Annotated[
        str, typer.Option(help="Exit heads: FILE[,THRESHOLD][,NAME=VALUE] or none; auto: those in the model's folder.")
    ] = "auto",
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 100,
    exits: Annotated[str | None, typer.Option(help="Layers joined by ',' for the exits of the entropy figure.")] = None,
    attention: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each task for stages and entropy; default --limit.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Prompts shown one by one.")] = 5,
    images: Annotated[Path | None, typer.Option(help="Folder of a file's pictures; default its own.")] = None,
    source: Annotated[str, typer.Option(help="Pictures of the tasks: shapes or emoji.")] = "shapes",
    seed: Annotated[int, typer.Option(min=0, help="Of the tasks and of the resampling.")] = 0,
    all_forms: AllForms = False,
    batch: Batch = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_len: MaxLen = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Look inside: attention stages, entropy, exit layers.

    Also accuracy when the picture leaves after k layers, and single prompts one by one (docs/analysis.md).
    """
    from ..analysis import report
    from ..analysis.benchmarks import heads_policy
    from ..analysis.data import load_data
    from ..errors import InvalidArgumentError
    from .evaluation import identity_of

    optional("matplotlib", "eval")
    try:
        layers = None if exits is None else [int(part) for part in exits.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(f"exits is {exits!r}; accepted: layer numbers joined by ','") from error
    notation = _heads(heads, model)
    policy = None if notation is None else heads_policy(notation, model)
    tasks = load_data(data, limit, seed, images, source)
    engine = _engine(model, dtype, device, max_batch=batch, max_len=max_len, trust_remote_code=trust_remote_code)
    tasks = within_range(engine, tasks, all_forms)
    total = report.units(engine.model.shape.num_layers, tasks, layers, policy is not None, attention)
    with progress() as shown:
        bar = shown.add_task("", total=total)

        def advance(what: str, done: int) -> None:
            shown.update(bar, description=what, advance=done)

        found = report.analyse(engine, tasks, policy, out, layers, examples, seed, advance, attention)
    page = report.write(found, out, identity_of(engine), " ".join(["dyvte-engine", *sys.argv[1:]]))
    print(page.markdown())
    err.print(f"written to {out}: report.md, report.html, and each figure as PNG, SVG and JSON")


def _engine(model: str, dtype: str, device: str, **options: Any) -> Any:
    from ..engine import Engine

    quiet()
    with loading(model):
        return Engine.from_pretrained(model, None, dtype, device, **options)


def _heads(text: str, model: str) -> str | None:
    """The notation of heads; None for "none", and for "auto" where the model has none."""
    from ..assets import heads_of

    if text == "auto":
        file = heads_of(model)
        return str(file) if file.is_file() else None
    return None if text == "none" else text


def within_range(engine: Any, tasks: list[Task], all_forms: bool) -> list[Task]:
    """The tasks without the prompt forms that the model was never taught; says what was left out.

    Raises InvalidArgumentError when nothing remains.
    """
    from ..errors import InvalidArgumentError
    from ..eval.run import known_forms
    from ..eval.task import FORMS

    kept = []
    for task in tasks:
        part, left_out = task.within(FORMS if all_forms else known_forms(engine.model))
        for form, count in left_out.items():
            err.print(f'{task.name}: {count} in the form "{form}" left out, this model was never asked so in training')
        kept += [part] if part.samples else []
    if not kept:
        raise InvalidArgumentError("data holds no prompt in a form the model was taught; accepted: also --all-forms")
    return kept


def reproduce(
    model: Model = "nano",
    out: Annotated[Path, out_folder("Folder for the page and the JSON; a killed run continues there.")] = Path(
        "outputs/reproduce"
    ),
    paper_model: Annotated[
        str, typer.Option(help="Whose published figures are shown: LLaVA-1.5-7B, VILA-7B, ...")
    ] = "LLaVA-1.5-7B",
    heads: Annotated[
        str, typer.Option(help="Exit heads: FILE[,THRESHOLD][,NAME=VALUE] or none; auto: those in the model's folder.")
    ] = "auto",
    ablation: Annotated[Path | None, typer.Option(help="Folder that `ablate-heads` wrote.")] = None,
    transfer: Annotated[list[str] | None, typer.Option(help="NAME=HEADS_FILE of another model; repeat it.")] = None,
    limit: Annotated[int, typer.Option(min=4, help="Questions of each task.")] = 100,
    source: Annotated[str, typer.Option(help="Pictures of the tasks: shapes or emoji.")] = "shapes",
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    all_forms: AllForms = False,
    batch: Batch = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_len: MaxLen = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Fill the paper's tables with this model's figures."""
    from ..analysis import reproduce as paper
    from ..analysis.benchmarks import DrawnTasks
    from ..analysis.data import load_data
    from ..analysis.tables import BENCHMARKS, check_paper_model
    from ..eval.run import AnswerFile
    from .evaluation import identity_of

    check_paper_model(paper_model)
    methods = paper.methods(_heads(heads, model), model, ablation, transfer or [])
    tasks = load_data(",".join(BENCHMARKS), limit, seed, None, source)
    engine = _engine(model, dtype, device, max_batch=batch, max_len=max_len, trust_remote_code=trust_remote_code)
    tasks = within_range(engine, tasks, all_forms)
    for method in methods:
        if method.group != "peers":  # those are left out with a reason, others refused before hours of work
            engine.bind(method.policy)
    methods += paper.exits_by_hand(paper_model, engine.model.shape.num_layers)
    file = AnswerFile(out / "answers.jsonl", engine.model.fingerprint)
    with progress() as shown:
        bar = shown.add_task("", total=paper.units(methods, tasks))

        def advance(what: str, done: int) -> None:
            shown.update(bar, description=what, advance=done)

        found = paper.measure(DrawnTasks(engine, tasks, file, advance), methods)
    tables = paper.write(found, identity_of(engine), paper_model, out, " ".join(["dyvte-engine", *sys.argv[1:]]))
    console = Console(width=max(170, Console().width), markup=False)
    for table in tables:
        printed = Table(*table.head, box=None, title=table.title, caption=table.note)
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed, "", highlight=False)
    err.print(f"written to {out}: tables.md, tables.html, tables.json")
