"""What heads do on labelled samples: one set of heads, the ablation of their inputs, and heads of another model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from dyvte_engine.errors import HeadsError
from dyvte_engine.heads.exit_head import STATE_BITS, ExitHeads
from dyvte_engine.heads.rule import ExitRule
from dyvte_engine.training.label_store import HeadData, LabelInfo, load_labels
from dyvte_engine.training.metrics import share
from dyvte_engine.training.train_heads import HeadSettings, Parts, exit_probabilities, train_heads

SHORT = {"mean_visual": "MV", "last_visual": "LV", "mean_text": "MT", "last_text": "LT"}  # the paper's table 4


def describe(heads: ExitHeads, data: HeadData, rule: ExitRule) -> dict:
    """Agreement with the full model, accuracy where it is known, exit layers and FLOPs, with every fixed exit's."""
    layers = rule.first_exits(exit_probabilities(heads, data.pooled))[:, None]
    count, last = data.agree.shape[0], data.agree.shape[1] - 1
    report = {
        "agreement": share(int(data.agree.gather(1, layers).sum()), count),
        "mean_exit_layer": round(float(layers.double().mean()), 3),
        "flops": round(float((data.flops.gather(1, layers)[:, 0] / data.flops[:, -1]).mean()), 4),
        "exited_before_the_last_layer": round(float((layers < last).double().mean()), 4),
        "exit_histogram": torch.bincount(layers[:, 0], minlength=last + 1).tolist(),
        "fixed_exit_agreement": [round(v, 4) for v in data.agree.double().mean(0).tolist()],
        "fixed_exit_flops": [round(v, 4) for v in (data.flops / data.flops[:, -1:]).mean(0).tolist()],
        "exit_label_share": [round(v, 4) for v in data.label.double().mean(0).tolist()],
    }
    if data.right is not None:
        report["accuracy"] = share(int(data.right.gather(1, layers).sum()), count)
        report["accuracy_without_exit"] = share(int(data.right[:, -1].sum()), count)
    return report


def evaluate_heads(labels: str | Path, files: Sequence[str | Path], threshold: float | None = None) -> dict[str, dict]:
    """Each heads file on a folder of labels, all samples of it (`describe`); heads of another model with a warning.

    threshold: instead of the one stored with each file.

    Raises:
        HeadsError: heads of another shape.
    """
    reports = {}
    for file in files:
        heads = ExitHeads.load(file)
        data, info = load_labels(labels, heads.config.states)
        _check_owner(heads, info, str(file))
        rule = ExitRule.of_metadata(heads.metadata, threshold)
        of = {"model": info.model_name, "heads_of": heads.metadata.get("model_name", ""), "threshold": rule.threshold}
        reports[str(file)] = of | describe(heads.float(), data, rule)
    return reports


def _check_owner(heads: ExitHeads, info: LabelInfo, file: str) -> None:
    shape = (heads.config.hidden_size, heads.config.num_layers)
    if shape != (info.hidden_size, info.num_layers):
        given = f"{file} is for hidden_size {shape[0]}, {shape[1]} layers"
        raise HeadsError(f"{given}; the labels are of hidden_size {info.hidden_size}, {info.num_layers} layers")
    trained_on = heads.metadata.get("model_fingerprint")
    if trained_on and trained_on != info.model_fingerprint:
        name = heads.metadata.get("model_name", "another model")
        warnings.warn(
            f"exit heads of {name} ({trained_on}) on labels of {info.model_name} ({info.model_fingerprint})",
            stacklevel=3,
        )


def combinations_of_states() -> list[tuple[str, ...]]:
    """The 15 subsets of the token states, in the order of the paper's table 4."""
    return [subset for size in range(1, 5) for subset in combinations(STATE_BITS, size)]


def ablate(labels: str | Path, folder: str | Path, settings: HeadSettings, seen: Callable[[str], Any] = print) -> dict:
    """Heads for each of the 15 combinations, trained alike into `folder`, and what each does on the samples held out.

    The held-out samples are those that calibrate the threshold; a combination whose file is there is not trained again.
    """
    rows = {}
    for states in combinations_of_states():
        name = "+".join(SHORT[s] for s in states)
        chosen = replace(settings, states=states)
        file = Path(folder) / f"{name}.safetensors"
        if file.exists() and ExitHeads.load(file).metadata.get("settings") == _as_stored(chosen):
            heads = ExitHeads.load(file)
        else:
            heads = train_heads(labels, file, chosen)
        data, info = load_labels(labels, states, settings.rule)
        held = data.rows(Parts.of(info.samples, settings.seed).calibrate)
        rows[name] = describe(heads, held, ExitRule.of_metadata(heads.metadata))
        seen(table({name: rows[name]}, header=len(rows) == 1))
    return rows


def _as_stored(settings: HeadSettings) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(settings).items()}


def table(rows: dict[str, dict], header: bool = True) -> str:
    """Rows of reports in the form of the paper's table 4: mean exit layer, agreement, accuracy and FLOPs."""
    lines = (
        [f"{'heads':<40} {'agreement %':>12} {'accuracy %':>11} {'exit layer':>11} {'FLOPs %':>8}"] if header else []
    )
    for name, row in rows.items():
        accuracy = f"{100 * row['accuracy']['share']:.1f}" if "accuracy" in row else "-"
        agreement, flops = 100 * row["agreement"]["share"], 100 * row["flops"]
        lines.append(f"{name:<40} {agreement:>12.1f} {accuracy:>11} {row['mean_exit_layer']:>11.2f} {flops:>8.1f}")
    return "\n".join(lines)
