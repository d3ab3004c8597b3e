"""Figures of a task under a policy, and the tables made of them (after the paper's tables 1 and 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .run import Answer
from .task import Task

FLOPS = ("flops", "flops_keep_all", "flops_true", "flops_true_keep_all")


def summarise(task: Task, answers: Sequence[Answer], num_layers: int, first: Sequence[Answer]) -> dict[str, Any]:
    """Score, exit layers and mean FLOPs of one task under one policy.

    "exit_layer": mean, a prompt whose tokens never leave counted as the last layer; None if no prompt's ever left.
    "same_as_first": share of answers equal to those of the first policy of the table.
    """
    layers = [a.exit_layer for a in answers]
    left = [layer for layer in layers if layer is not None]
    histogram = Counter(left)
    return {
        **task.score([a.text for a in answers]),
        "exit_layer": float(np.mean([num_layers - 1 if x is None else x for x in layers])) if left else None,
        "exit_histogram": {str(layer): histogram[layer] for layer in sorted(histogram)},
        "never_left": len(layers) - len(left),
        "same_as_first": float(np.mean([a.text == b.text for a, b in zip(answers, first, strict=True)])),
        **{name: float(np.mean([getattr(a, name) for a in answers])) for name in FLOPS},
    }


def unit(flops: float) -> tuple[float, str]:
    """A divisor and its letter: T as in the paper, G where that would be 0.0."""
    return (1e12, "T") if flops >= 1e11 else (1e9, "G")


def shown(result: dict[str, Any]) -> str:
    """ "93.4 (89.9-95.8)" in percent; an MME score out of what it could be."""
    scale, of = (1, f"/{result['of']}") if "of" in result else (100, "")
    low, high = (scale * x for x in result["ci95"])
    digits = 0 if of else 1
    return f"{scale * result['value']:.{digits}f}{of} ({low:.{digits}f}-{high:.{digits}f})"


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table: a row for each task and policy."""
    entries = [r for t in report["tasks"].values() for r in t["policies"].values()]
    divisor, letter = unit(max((r["flops_keep_all"] for r in entries), default=0.0))
    head = ["task", "policy", "score", "exit layer", f"{letter}FLOPs", f"{letter}FLOPs true", "same answers"]
    body = []
    for name, task in report["tasks"].items():
        for policy, r in task["policies"].items():
            exit_layer = "-" if r["exit_layer"] is None else f"{r['exit_layer']:.1f}"
            cost = [f"{r[key] / divisor:.2f}" for key in ("flops", "flops_true")]
            same = f"{100 * r['same_as_first']:.1f} %"
            body.append([f"{name}: {r['metric']}, n {r['n']}", policy, shown(r), exit_layer, *cost, same])
        if not task["policies"]:
            body.append([name, "", "out of range", "", "", "", ""])
    return head, body


def left_out_lines(report: dict[str, Any]) -> list[str]:
    """One sentence for each task of which samples were left out."""
    lines = []
    for name, task in report["tasks"].items():
        if task["left_out"]:
            parts = ", ".join(f'{n} in the form "{form}"' for form, n in task["left_out"].items())
            lines.append(f"{name}: {parts} left out, this model was never asked so in training")
    return lines


def markdown(report: dict[str, Any], command: str) -> str:
    """The whole report as a page."""
    head, body = rows(report)
    lines = [
        f"# {report['model']['name']} on the nine tasks",
        "",
        f"Written by `{command}`; model fingerprint `{report['model']['fingerprint']}`, {report['model']['dtype']}.",
        "Scores in percent with 95 % intervals (MME: points). FLOPs: mean prefill of a prompt, vision tower included,",
        "in the paper's count and truly (grouped-query projections, causal attention, LM head). Same answers: letter",
        "for letter those of the first policy. Exit layer: tokens that never leave count as leaving after the last.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in body),
        "",
        *(f"- {line}" for line in left_out_lines(report)),
    ]
    return "\n".join(lines).rstrip() + "\n"
