"""What the page draws: HTML and SVG of a run. Colours and sizes are in style.css; x is in percent, so charts reflow.

All words of users and models are escaped here.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np
from PIL import Image

from ..heads.rule import ExitRule
from .run import Look, Run

SHOWN = (0.003, 0.9997)  # of p_exit; values beyond are drawn there
_P_TICKS = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
_HEIGHT = 136  # pixels of a plot
_VEIL = 0.86  # how dark a patch becomes that nobody looks at


def logit(p: float) -> float:
    """Of p, drawn within SHOWN."""
    p = min(max(p, SHOWN[0]), SHOWN[1])
    return math.log(p / (1 - p))


def leaves(layer: int | None) -> str:
    """Where the picture left, in words."""
    if layer is None:
        return "the picture stays to the end"
    return "the picture leaves before layer 0" if layer < 0 else f"the picture leaves after layer {layer}"


def layers(run: Run | None) -> str:
    """Rows in each layer, and below them what the heads say."""
    if run is None or run.look is None:
        return '<div class="dy-empty">Ask a question: here you see which layers still look at the picture.</div>'
    heads = "" if run.look.p_exit is None else _heads(run.look, run.exit_layer)
    return _rows(run.look, run.exit_layer) + heads


def _rows(look: Look, exit_layer: int | None) -> str:
    before = look.attention.shape[1]  # visual rows of the prompt
    most = max(t + max(v, before) for t, v in zip(look.text, look.visual))
    bars = _bars((("dy-text", look.text), ("dy-picture", look.visual)), most, _HEIGHT)
    gone = [before - v if v < before else 0 for v in look.visual]
    ghosts = _bars((("", look.text), ("", look.visual), ("dy-gone", gone)), most, _HEIGHT)
    sums = [t + v for t, v in zip(look.text, look.visual)]
    changes = [i for i, n in enumerate(sums) if i == 0 or n != sums[i - 1]]
    labels = "".join(_number(i, len(sums), sums[i] / most, sums[i]) for i in changes)
    legend = _legend(("dy-text", "text"), ("dy-picture", "picture"), ("dy-gone", "left: neither computed nor stored"))
    spoken = f"Rows in each of {len(sums)} layers: {leaves(exit_layer)}. " + ", ".join(map(str, sums))
    ticks = [(0.0, str(most)), (0.5, str(round(most / 2))), (1.0, "0")]
    content = ghosts + bars + labels + _exit_mark(exit_layer, len(sums))
    return _plot("Rows in each layer", legend, ticks, content, spoken, len(sums))


def _number(layer: int, count: int, share: float, value: int) -> str:
    """A value at the top of its bar, inside where there is room."""
    kind, below = ("dy-value", 13) if share > 0.2 else ("dy-label", -5)
    y = _HEIGHT * (1 - share) + below
    return f'<text class="{kind}" x="{_middle(layer, count)}" y="{y:.1f}">{value}</text>'


def _heads(look: Look, exit_layer: int | None) -> str:
    assert look.p_exit is not None and look.rule is not None
    count, asked, said = len(look.text), set(look.rule.layers(len(look.text))), look.p_exit
    end = count if exit_layer is None else exit_layer
    places = [(_middle(i, count), f"{_y(p):.1f}") for i, p in enumerate(said)]
    lines = "".join(
        f'<line class="dy-way" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>' for (x1, y1), (x2, y2) in pairwise(places)
    )
    dots = "".join(
        f'<circle class="dy-dot{" dy-fires" if p > look.rule.threshold_at(i) else ""}{" dy-later" if i > end else ""}" '
        f'cx="{_middle(i, count)}" cy="{_y(p):.1f}" r="5"><title>layer {i}: p_exit {p:.4f}</title></circle>'
        for i, p in enumerate(said)
        if i in asked
    )
    ticks = [(_y(p) / _HEIGHT, f"{p:g}") for p in _P_TICKS]
    spoken = "What the head after each layer says: " + ", ".join(f"{p:.3f}" for p in said)
    legend = _legend(("dy-dot", "below"), ("dy-dot dy-fires", "above the threshold: let it go"))
    content = lines + _threshold(look.rule, count) + dots + _exit_mark(exit_layer, count)
    return _plot(
        "When each question lets go: p_exit after each layer", legend, ticks, content, spoken, count, "dy-heads"
    )


def _threshold(rule: ExitRule, count: int) -> str:
    """A line that can be dragged, or a step for each layer where each has its own."""
    if isinstance(rule.threshold, tuple):
        steps = [(100 * i / count, 100 * (i + 1) / count, _y(p)) for i, p in enumerate(rule.threshold)]
        return "".join(
            f'<line class="dy-bound" x1="{a:.3f}%" x2="{b:.3f}%" y1="{y:.1f}" y2="{y:.1f}"/>' for a, b, y in steps
        )
    return (
        f'<g class="dy-threshold" transform="translate(0 {_y(rule.threshold):.1f})">'
        '<line class="dy-bound" x1="0" x2="100%"/><line class="dy-grip" x1="0" x2="100%"/>'
        '<circle class="dy-knob" cx="100%" r="6"/></g>'
    )


def attention(run: Run | None, chosen: int) -> str:
    """How much of the text's attention the picture has in each layer; the chosen one is marked."""
    if run is None or run.look is None:
        return ""
    look, exit_layer = run.look, run.exit_layer
    shares, height = [float(x) for x in look.attention.sum(1)], 0.5 * _HEIGHT
    count = len(shares)
    end = count if exit_layer is None else exit_layer + 1
    shown = [s if i < end else 0.0 for i, s in enumerate(shares)]
    hidden = [0.0 if i < end else s for i, s in enumerate(shares)]
    bars = _bars((("dy-look", shown), ("dy-gone", hidden)), 1.0, height, "{:.0%}")
    spoken = "Share of the text's attention on the picture: " + ", ".join(f"{s:.0%}" for s in shares)
    legend = _legend(("dy-look", "as it is"), ("dy-gone", "if the picture stayed"))
    ticks = [(0.0, "100 %"), (1.0, "0")]
    here = f'<rect class="dy-here" x="{100 * chosen / count:.3f}%" width="{100 / count:.3f}%" height="100%"/>'
    content = here + bars + _exit_mark(exit_layer, count, height)
    return _plot("The text's attention on the picture", legend, ticks, content, spoken, count, "", height)


def _plot(
    title: str,
    legend: str,
    ticks: Sequence[tuple[float, str]],
    content: str,
    spoken: str,
    count: int,
    kind: str = "",
    height: float = _HEIGHT,
) -> str:
    """A titled plot over `count` layers; ticks: (share of the height from the top, label); `spoken`: in words."""
    labels = "".join(f'<span style="top:{100 * at:.2f}%">{text}</span>' for at, text in ticks)
    grid = "".join(
        f'<line class="dy-grid" x1="0" x2="100%" y1="{at * height:.1f}" y2="{at * height:.1f}"/>' for at, _ in ticks
    )
    step = max(1, -(-count // 16))
    names = "".join(f'<span style="left:{_middle(i, count)}">{i}</span>' for i in range(0, count, step))
    return (
        f'<section class="dy-plot {kind}"><h3>{title}</h3>{legend}<div class="dy-frame">'
        f'<div class="dy-y" style="height:{height:g}px">{labels}</div>'
        f'<svg height="{height:g}" width="100%" role="img" aria-label="{escape(spoken)}" data-height="{height:g}">'
        f"{grid}{content}</svg><div></div><div class='dy-x'>{names}</div></div></section>"
    )


def _bars(stacks: Sequence[tuple[str, Sequence[float]]], most: float, height: float, shown: str = "{:.0f}") -> str:
    """Bars over layers, stacked from the bottom: (class, value of every layer); without a class only room is left."""
    count, out = len(stacks[0][1]), []
    for layer in range(count):
        base = 0.0
        for kind, values in stacks:
            tall, base = height * values[layer] / most, base + height * values[layer] / most
            if kind and tall:
                out.append(
                    f'<rect class="{kind} dy-bar" style="--i:{layer}" x="{100 * (layer + 0.1) / count:.3f}%" '
                    f'width="{80 / count:.3f}%" y="{height - base:.2f}" height="{tall:.2f}">'
                    f"<title>layer {layer}: {shown.format(values[layer])}</title></rect>"
                )
    return "".join(out)


def _exit_mark(exit_layer: int | None, count: int, height: float = _HEIGHT) -> str:
    if exit_layer is None:
        return ""
    at = f"{100 * (exit_layer + 1) / count:.3f}%"
    return f'<line class="dy-exit" x1="{at}" x2="{at}" y1="0" y2="{height:g}"/>'


def _legend(*entries: tuple[str, str]) -> str:
    return '<div class="dy-legend">' + "".join(f'<span><i class="{k}"></i>{t}</span>' for k, t in entries) + "</div>"


def _middle(layer: int, count: int) -> str:
    return f"{100 * (layer + 0.5) / count:.3f}%"


def _y(p: float) -> float:
    low, high = map(logit, SHOWN)
    return _HEIGHT * (1 - (logit(p) - low) / (high - low))


def heat(run: Run | None, layer: int) -> str:
    """The picture as the model gets it; patches are the darker the less the text of this layer looks at them."""
    if run is None or run.look is None:
        return '<div class="dy-empty">Here you see where the text looks.</div>'
    look = run.look
    weights, layer = look.attention[min(layer, len(look.attention) - 1)], min(layer, len(look.attention) - 1)
    share = f"{weights.sum():.0%} of the text's attention is on the picture"
    if look.grid is None:
        picture = f'<div class="dy-heat"><img src="{png(look.seen)}" alt="the picture"></div>'
        return f"{picture}<p>{share}. This model's visual tokens form no single grid: nothing can be laid over.</p>"
    words = _state(look, layer, run.exit_layer)
    scale = f"<div class='dy-scale'><span>0</span><i></i><span>{weights.max():.1%} on a patch</span></div>"
    spoken = escape(f"The picture with the attention of layer {layer}: {share}")
    over = f'<img class="dy-veil" src="{png(veil(look, layer))}" alt="">{_crossed(look, layer)}'
    picture = f'<div class="dy-heat"><img src="{png(look.seen)}" alt="{spoken}">{over}</div>'
    return f"{picture}{scale}<p><b>Layer {layer}.</b> {share}. {words}</p>"


def _state(look: Look, layer: int, exit_layer: int | None) -> str:
    if exit_layer is not None and layer > exit_layer:
        return "The picture is no longer here: this is how it would be if it had stayed."
    there, entered = look.visual[layer], look.attention.shape[1]
    if there == entered:
        return "All of it is here."
    how = "crossed out are the others" if look.kept is not None else "the policy made them of all patches"
    return f"{there} of {entered} visual tokens are here; {how}. The attention is that with all of them."


def veil(look: Look, layer: int) -> Image.Image:
    """RGBA, a pixel for each patch (the look has a grid): clear at the most attention, half dark at a quarter of it."""
    assert look.grid is not None
    weights = look.attention[layer].reshape(look.grid)
    shares = np.sqrt(weights / max(float(weights.max()), 1e-12))
    out = np.zeros((*look.grid, 4), np.uint8)
    out[..., :3] = (8, 14, 34)
    out[..., 3] = np.round(255 * _VEIL * (1 - shares))
    return Image.fromarray(out, "RGBA")


def _crossed(look: Look, layer: int) -> str:
    """Strokes through patches that a policy took out, while others stay."""
    if look.kept is None or look.grid is None or not 0 < look.kept[layer].sum() < len(look.kept[layer]):
        return ""
    down, across = look.grid
    gone = np.argwhere(~look.kept[layer].reshape(look.grid))
    path = "".join(f"M{x + 0.15} {y + 0.15}l.7 .7m0 -.7l-.7 .7" for y, x in gone)
    return f'<svg class="dy-crossed" viewBox="0 0 {across} {down}" preserveAspectRatio="none"><path d="{path}"/></svg>'


def small_rows(run: Run, reuse: bool = False) -> str:
    """Rows in each layer of a finished run as a small chart; `reuse`: which of them were known from before."""
    stats = run.stats
    if stats is None:
        return ""
    most = max(stats.visual_tokens + stats.text_tokens, 1)
    known = stats.rows_reused if reuse else [0] * len(stats.rows_reused)
    computed = [rows - old for rows, old in zip(stats.tokens_per_layer, known)]
    gone = [most - rows for rows in stats.tokens_per_layer]
    stacks: tuple[tuple[str, Sequence[float]], ...] = (
        ("dy-picture", computed),
        ("dy-reused", known),
        ("dy-gone", gone),
    )
    spoken = f"{leaves(stats.exit_layer)}; rows: {', '.join(map(str, stats.tokens_per_layer))}"
    spoken += f"; {sum(known)} rows known from before" if reuse else ""
    bars = _bars(stacks, most, 44)
    return f'<svg class="dy-small" height="44" width="100%" role="img" aria-label="{escape(spoken)}">{bars}</svg>'


def png(picture: Image.Image, longest: int = 640) -> str:
    """A `data:` URL of the picture, made smaller where it is larger."""
    if max(picture.size) > longest:
        picture = picture.copy()
        picture.thumbnail((longest, longest))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
