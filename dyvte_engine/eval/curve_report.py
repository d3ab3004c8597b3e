"""The accuracy/FLOPs curve as a picture and as a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError
from ..files import write_bytes
from ..lazy import optional
from .report import unit

PANELS = {"credit": "score, mean over tasks (%)", "same": "answers equal to the full model's (%)"}


def check_plot(path: Path) -> None:
    """Raises InvalidArgumentError for a name that says of a picture that it is no PNG."""
    if path.suffix.lower() not in ("", ".png"):
        raise InvalidArgumentError(f"plot is {path}; accepted: a name that ends in .png")


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Writes a PNG: score and agreement against the mean FLOPs of a prefill (paper's count)."""
    divisor, letter = unit(report["fixed"][-1]["flops"])
    figure = optional("matplotlib.figure", "eval").Figure(figsize=(11, 4.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), PANELS.items()):

        def line(points: list[dict[str, Any]], style: str, key: str = key, axes: Any = axes, **options: Any) -> None:
            axes.plot([p["flops"] / divisor for p in points], [100 * p[key] for p in points], style, **options)

        line(report["fixed"], "o-", color="0.35", ms=4, lw=1, label="fixed layer")
        for number, point in enumerate(report["fixed"]):
            at = point["flops"] / divisor, 100 * point[key]
            axes.annotate(str(number), at, xytext=(0, 5), textcoords="offset points", fontsize=7, ha="center")
        for number, (name, heads) in enumerate(report["heads"].items()):
            line(heads["curve"], "-", color=f"C{number}", lw=1.8, label=f"DyVTE, {name}")
            control = [p["dealt"] for p in heads["curve"]]
            line(control, ":", color=f"C{number}", lw=1.2, label="its layers dealt at random")
        if report["random"]:
            line(report["random"], "x--", color="C3", lw=1, label="random tokens left out")
        line([report["oracle"]], "*", color="C2", ms=11, label="earliest layer with the same answer")
        axes.set(xlabel=f"{letter}FLOPs of a prefill (paper's count)", ylabel=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_bytes(path, drawn.getvalue())


def page(report: dict[str, Any], picture: str, command: str) -> str:
    """The curve as Markdown: fixed layers, Random and DyVTE at no more FLOPs, and where DyVTE is not better."""
    best, full, model = report["oracle"], report["fixed"][-1], report["model"]
    divisor, letter = unit(full["flops"])
    lines = [
        f"# When to let go: {model['name']}",
        "",
        f"Written by `{command}`; model fingerprint `{model['fingerprint']}`, {model['dtype']}.",
        f"{report['samples']} questions of {', '.join(report['tasks'])}, each task counting alike.",
        "",
        f"![accuracy against FLOPs]({picture})" if picture else "",
        "",
        "Earliest layer with the full model's answer, for each question by itself: "
        f"mean {best['exit_layer']:.1f}, {best['flops'] / divisor:.2f} of {full['flops'] / divisor:.2f} {letter}FLOPs.",
        "",
        *_fixed_table(report, divisor, letter),
    ]
    for name, heads in report["heads"].items():
        lines += ["", f"## {name}", "", *_heads_table(heads, divisor, letter), "", *_verdict(heads)]
        lines += ["", *_middle(heads), "", *_by_task(heads, len(report["fixed"]))]
    return "\n".join(lines).rstrip() + "\n"


def _fixed_table(report: dict[str, Any], divisor: float, letter: str) -> list[str]:
    random = {p["as_layer"]: p for p in report["random"]}
    lines = [
        f"| exit after | {letter}FLOPs | score | same answers | Random at equal FLOPs: score | same |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for layer, p in enumerate(report["fixed"]):
        r = random.get(layer)
        other = f"{100 * r['credit']:.1f} | {100 * r['same']:.1f} %" if r else " | "
        name = "never" if layer == len(report["fixed"]) - 1 else str(layer)
        lines.append(
            f"| {name} | {p['flops'] / divisor:.2f} | {100 * p['credit']:.1f} | {100 * p['same']:.1f} % | {other} |"
        )
    return lines


def _heads_table(heads: dict[str, Any], divisor: float, letter: str) -> list[str]:
    lines = [
        f"| fixed layer | its {letter}FLOPs | DyVTE's | threshold | score: DyVTE less fixed | same answers: the same "
        "| ROC area |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in heads["against_fixed"]:
        differences = [_difference(c[key]) for key in PANELS]
        area = heads["separation"][c["layer"]]
        threshold = "by layer" if isinstance(c["threshold"], (tuple, list)) else f"{c['threshold']:.3g}"
        lines.append(
            f"| {c['layer']} | {c['flops_fixed'] / divisor:.2f} | {c['flops'] / divisor:.2f} | {threshold} | "
            + " | ".join(differences)
            + f" | {'-' if area is None else f'{area:.2f}'} |"
        )
    return lines


def _middle(heads: dict[str, Any]) -> list[str]:
    """Each task alone, over the middle of the curve."""
    layers = heads["middle"]["all"]["layers"]
    if not layers:
        return []
    lines = [
        f"Mean over layers {layers[0]} to {layers[-1]} of DyVTE less the fixed layer, each task alone at no more FLOPs "
        "than the fixed layer takes there (95 % interval of paired differences):",
        "",
        "| task | questions | same answers | score |",
        "| --- | --- | --- | --- |",
    ]
    for task, of in heads["middle"].items():
        cells = [_difference(of[key]) if key in of else "-" for key in ("same", "credit")]
        lines.append(f"| {task} | {of['samples']} | {' | '.join(cells)} |")
    return lines


def _difference(of: dict[str, Any]) -> str:
    return f"{_signed(of['difference'])} ({', '.join(map(_signed, of['ci95']))})"


def _by_task(heads: dict[str, Any], num_layers: int) -> list[str]:
    """Where the same FLOPs go: some fixed layers, and DyVTE at no more FLOPs, task by task."""
    shown = range(num_layers // 4, num_layers - 1, max(num_layers // 6, 1))
    chosen = [c for c in heads["against_fixed"] if c["layer"] in shown]
    if not chosen:
        return []
    lines = [
        "Task by task, same answers and score (DyVTE / fixed), and DyVTE's mean exit layer there:",
        "",
        "| task | " + " | ".join(f"layer {c['layer']}: same | score | exit" for c in chosen) + " |",
        "| --- " * (1 + 3 * len(chosen)) + "|",
    ]
    for task in chosen[0]["by_task"]:
        cells = []
        for c in chosen:
            t = c["by_task"][task]
            cells += [f"{100 * t[key]:.0f} / {100 * t[f'{key}_fixed']:.0f}" for key in ("same", "credit")]
            cells.append(f"{t['exit_layer']:.1f}")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return lines


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _verdict(heads: dict[str, Any]) -> list[str]:
    """Which layers the learned exit beats, which it does not, in words."""
    sentences = []
    for key, what in (("credit", "score"), ("same", "agreement")):
        groups: dict[str, list[int]] = {"above": [], "below": [], "neither": []}
        for c in heads["against_fixed"]:
            low, high = c[key]["ci95"]
            groups["above" if low > 0 else "below" if high < 0 else "neither"].append(c["layer"])
        found = [
            f"{words} layers {', '.join(map(str, groups[group]))}"
            for group, words in (("above", "above"), ("below", "below"), ("neither", "not clearly either at"))
            if groups[group]
        ]
        sentences.append(f"- {what}, at no more FLOPs (95 % interval of paired differences): {'; '.join(found)}.")
    gain = np.mean([p["same"] - p["dealt"]["same"] for p in heads["curve"]])
    sentences.append(
        "- Choosing for each question by itself keeps so many more answers than the same exit layers dealt to the "
        f"questions of a task at random: {100 * gain:+.1f} % (mean over the curve)."
    )
    return sentences
