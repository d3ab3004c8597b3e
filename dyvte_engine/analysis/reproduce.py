"""Measures a model for the paper's tables, and writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import check_names
from ..errors import HeadsError, InvalidArgumentError, ModelError
from ..eval.named import named
from ..eval.task import Task
from ..files import write_text
from ..policies import DynamicExit, FixedExit, KeepAll, VisualTokenPolicy
from . import tables
from .benchmarks import Benchmarks, heads_policy
from .exits import KEEP_ALL
from .page import Page
from .report import rounded
from .tables import ABLATED, BENCHMARKS, PEERS, Figures, Table


class Method(NamedTuple):
    """A policy under the name it has in the tables; `group` says in which: main, depths, peers, states, transfer."""

    name: str
    policy: VisualTokenPolicy
    identity: str
    group: str

    @property
    def tasks(self) -> tuple[str, ...]:
        return ABLATED if self.group in ("states", "depths") else tuple(BENCHMARKS)


def methods(heads: str | None, model: str, ablation: Path | None, transfer: Sequence[str]) -> list[Method]:
    """All that is to be measured.

    heads: in the notation of policies, without "dynamic:"; None: the model has none of its own. ablation: a folder with
    the 15 sets of heads. transfer: NAME=HEADS_FILE each.

    Raises:
        HeadsError: a file of the 15 is missing; InvalidArgumentError: an entry of transfer is not understood, or has
            the name of another method.
    """
    chosen = [Method("without", KeepAll(), KEEP_ALL, "main")]
    chosen += [_method(name, notation, model, "peers") for name, notation in PEERS.items()]
    if heads is not None:
        chosen.insert(1, Method("with", *heads_policy(heads, model), "main"))
        chosen.append(_method("DyVTE+FastV", f"{PEERS['FastV']}+dynamic:{heads}", model, "peers"))
    if ablation is not None:
        for states in tables.paper()["token_states"]["rows"]:
            file = ablation / f"{states}.safetensors"
            if not file.is_file():
                raise HeadsError(f"ablation: {file} is missing; accepted: a folder that `ablate-heads` wrote")
            chosen.append(_of_file(states, file, "states"))
    for entry in transfer:
        name, _, other = entry.partition("=")
        if not (name and other):
            raise InvalidArgumentError(f"transfer is {entry!r}; accepted: NAME=HEADS_FILE")
        chosen.append(_of_file(name, Path(other), "transfer"))
    check_names("transfer", [method.name for method in chosen])
    return chosen


def exits_by_hand(paper_model: str, layers: int) -> list[Method]:
    """An exit at each depth of the paper's figure 3 but the last, which is the model without one."""
    depths = tables.exit_depths(paper_model, layers)
    return [Method(n, FixedExit(k - 1), f"fixed:{k - 1}", "depths") for n, k in depths.items() if n != "without"]


def _of_file(name: str, file: Path, group: str) -> Method:
    """A file's name may hold what the notation of policies reserves ("MT+LT")."""
    policy = DynamicExit.from_file(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return Method(name, policy, f"dynamic:{file.name} {digest}", group)


def _method(name: str, notation: str, model: str, group: str) -> Method:
    chosen = named(notation, model)
    return Method(name, chosen.policy, chosen.identity, group)


def units(chosen: Sequence[Method], tasks: Sequence[Task]) -> int:
    """Questions to be answered, for a progress bar."""
    return sum(len(task.samples) for method in chosen for task in tasks if task.name in method.tasks)


class Reproduction(NamedTuple):
    """The figures of all methods, which there were, and why a peer could not run on this model."""

    figures: Figures
    methods: list[Method]
    refused: dict[str, str]


def measure(benchmarks: Benchmarks, chosen: Sequence[Method]) -> Reproduction:
    """Every method on every benchmark that is there; a peer that the model does not allow is left out with a reason."""
    found, refused = {}, {}
    for method in chosen:
        try:
            found[method.name] = list(benchmarks.measure(method.policy, method.identity, method.tasks))
        except (ModelError, InvalidArgumentError) as error:
            if method.group != "peers":
                raise
            refused[method.name] = str(error)
    return Reproduction(Figures(found), list(chosen), refused)


def all_tables(found: Reproduction, own: str, layers: int, paper_model: str) -> list[Table]:
    """In the paper's order of subjects."""
    groups = {m.group for m in found.methods}
    others = [m.name for m in found.methods if m.group == "transfer"]
    peers = tables.peers(found.figures)
    if found.refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.refused.items())
        peers = Table(peers.title, f"{peers.note} Not measured: {reasons}.", peers.head, peers.rows)
    return [
        tables.accuracy(found.figures, paper_model, layers),
        tables.manual_exit(found.figures, paper_model, layers),
        tables.published_flops(),
        tables.latency(),
        tables.token_states(found.figures if "states" in groups else None),
        peers,
        tables.transfer(found.figures, own, others),
    ]


def write(found: Reproduction, about: dict[str, Any], paper_model: str, folder: Path, command: str) -> list[Table]:
    """tables.md, tables.html and tables.json into `folder`; returns the tables."""
    made = all_tables(found, about["name"], about["layers"], paper_model)
    page = Page(f"The paper's tables and {about['name']}")
    page.paragraph(
        f"Written by `{command}`; model fingerprint `{about['fingerprint']}`, {about['dtype']}. Published figures: "
        f"{tables.paper()['source']}. Ours: scores in percent (MME: points) with 95 % intervals, on generated tasks "
        "after the paper's benchmarks (docs/tasks.md), so that not the levels compare but what a policy does to them."
    )
    for table in made:
        page.heading(table.title)
        page.paragraph(table.note)
        page.table(table.head, table.rows)
    page.write(folder, "tables")
    record = {"model": about, "command": command, "paper_model": paper_model, "refused": found.refused}
    measured = record | {"measured": found.figures.records()}
    write_text(folder / "tables.json", json.dumps(rounded(measured), indent=1) + "\n")
    return made
