"""A run as one picture for a talk or a paper, drawn by matplotlib."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from ..analysis.plotting import layer_axis, new_figure
from .charts import SHOWN, leaves, veil
from .run import Look, Run
from .tables import change, size

# Okabe and Ito's colours, which the colour-blind can tell apart; style.css has the same.
_PICTURE, _TEXT, _EXIT, _HEADS, _GONE = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#d9dde3"
_TICKS = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


def draw(run: Run, layer: int) -> Any:
    """The figure of a run that has its look: picture with the attention of `layer`, words, rows, heads."""
    look = run.look
    assert look is not None
    figure = new_figure(11, 6)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    picture, words = left.subplots(2, 1, height_ratios=(3, 1))
    _picture(picture, look, layer)
    _words(words, run)
    panels = np.atleast_1d(right.subplots(1 if look.p_exit is None else 2, 1, sharex=True))
    _rows(panels[0], look, run.exit_layer)
    if look.p_exit is not None:
        _heads(panels[1], look)
    layer_axis(panels[-1], len(look.text))
    for axes in panels:
        if run.exit_layer is not None:
            axes.axvline(run.exit_layer + 0.5, color=_EXIT, lw=1.5, ls="--")
    return figure


def _picture(axes: Any, look: Look, layer: int) -> None:
    width, height = look.seen.size
    axes.imshow(look.seen, extent=(0, width, height, 0))
    if look.grid is not None:
        axes.imshow(veil(look, layer), extent=(0, width, height, 0), interpolation="nearest")
    axes.set_title(f"layer {layer}: {look.attention[layer].sum():.0%} of the text's attention", fontsize=9)
    axes.axis("off")


def _words(axes: Any, run: Run) -> None:
    said = textwrap.fill(run.text.strip(), 40)
    figures = [f"{run.settings.policy}: {leaves(run.exit_layer)}"]
    if run.stats is not None:
        s = run.stats
        figures.append(f"K/V {size(s.kv_bytes)} ({change(s.kv_bytes, s.kv_bytes_keep_all)})")
        figures[-1] += f", prefill FLOPs {change(s.prefill_tflops_true, s.prefill_tflops_true_keep_all)}"
    plain: dict[str, Any] = dict(xycoords="axes fraction", va="top", annotation_clip=False, parse_math=False)
    asked = axes.annotate(textwrap.fill(run.question, 52), (0, 1), fontsize=9.5, color="0.35", **plain)
    below: dict[str, Any] = dict(xytext=(0, -6), textcoords="offset points", **{**plain, "xycoords": asked})
    answer = axes.annotate(said, (0, 0), fontsize=14, weight="bold", **below)
    axes.annotate("\n".join(figures), (0, 0), fontsize=9.5, **{**below, "xycoords": answer})
    axes.axis("off")


def _rows(axes: Any, look: Look, exit_layer: int | None) -> None:
    text, visual, x = np.array(look.text), np.array(look.visual), range(len(look.text))
    axes.bar(x, look.attention.shape[1] + text, color=_GONE, label="left")
    axes.bar(x, text + visual, color=_PICTURE, label="picture")
    axes.bar(x, text, color=_TEXT, label="text")
    axes.set_ylabel("rows in the layer")
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def _heads(axes: Any, look: Look) -> None:
    assert look.p_exit is not None and look.rule is not None
    count, said = len(look.text), np.clip(look.p_exit, *SHOWN)
    axes.set_yscale("logit")
    axes.plot(range(count - 1), said, "o-", ms=5, color=_HEADS)
    bounds = np.array([look.rule.threshold_at(layer) for layer in range(count)])
    axes.plot(range(count), bounds.clip(*SHOWN), color=_EXIT, lw=1.5, label="threshold")
    axes.set_ylim(SHOWN[0] / 2, 1 - (1 - SHOWN[1]) / 2)
    axes.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
    axes.set_ylabel("$p_{exit}$")
    axes.legend(fontsize=8, loc="lower right")
