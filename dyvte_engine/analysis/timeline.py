"""A prompt's way through the layers (the paper's Fig 6): tokens in each layer, and what the heads say."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..eval.run import BUDGETS
from ..eval.sweep import probe
from ..eval.task import Sample
from ..heads.rule import ExitRule
from ..policies import DynamicExit, KeepAll
from .plotting import COLORS, layer_axis, new_figure

if TYPE_CHECKING:
    from ..engine import Engine

SHOWN = (0.003, 0.9997)  # of p_exit; values beyond are drawn there
TICKS = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Timeline:
    """One prompt. `p_exit` has L - 1 entries: what each head says of the prompt with all its tokens; an exit ends the
    asking, so those after `exit_layer` were not looked at. tokens_per_layer: with the exit; tokens: without.
    """

    key: str
    picture: Image.Image
    prompt: str
    reference: str
    answer: str
    answer_full: str
    exit_layer: int | None
    tokens: int
    tokens_per_layer: tuple[int, ...]
    p_exit: tuple[float, ...]


@dataclass(frozen=True)
class Timelines:
    """Several prompts, and the rule by which what the heads say becomes an exit."""

    prompts: tuple[Timeline, ...]
    rule: ExitRule

    @property
    def asked(self) -> list[int]:
        """The layers whose heads are asked."""
        return list(self.rule.layers(len(self.prompts[0].tokens_per_layer)))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each prompt, without its picture."""
        return [{k: v for k, v in asdict(p).items() if k != "picture"} for p in self.prompts]

    def record(self) -> dict[str, Any]:
        return {"threshold": self.rule.threshold, "asked": self.asked, "rows": self.rows()}

    def plot(self) -> Any:
        """A line for each prompt: picture, words, layers; returns the figure."""
        figure = new_figure(11, 2.1 * len(self.prompts) + 0.4)
        panels = figure.subplots(len(self.prompts), 3, squeeze=False, width_ratios=(1, 1.7, 3))
        for (left, middle, right), p in zip(panels, self.prompts):
            left.imshow(p.picture, interpolation="nearest")
            leave = "never leave" if p.exit_layer is None else f"leave after layer {p.exit_layer}"
            words = (
                textwrap.fill(p.prompt, 34, max_lines=5),
                f"answer: {textwrap.shorten(p.answer, 60)}\nwithout exit: {textwrap.shorten(p.answer_full, 60)}\n"
                f"reference: {textwrap.shorten(p.reference, 60)}\nvisual tokens {leave}",
            )
            middle.text(0, 0.98, "\n\n".join(words), va="top", fontsize=8.5, transform=middle.transAxes)
            for axes in (left, middle):
                axes.axis("off")
            self._layers(right, p)
        handles, labels = zip(*(pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())))
        unique = dict(zip(labels, handles))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), fontsize=8)
        return figure

    def _layers(self, axes: Any, p: Timeline) -> None:
        count = len(p.tokens_per_layer)
        axes.bar(range(count), [p.tokens] * count, color="#e2e8f0", label="tokens without exit")
        axes.bar(range(count), p.tokens_per_layer, color="#90b4d8", label="tokens with exit")
        layer_axis(axes, count)
        axes.set_ylabel("prompt tokens")
        said, asked = np.clip(p.p_exit, *SHOWN), np.array(self.asked, dtype=int)
        end = count if p.exit_layer is None else p.exit_layer
        other = axes.twinx()
        other.set_yscale("logit")
        before, later = asked[asked <= end], asked[asked >= end]
        other.plot(before, said[before], "o-", ms=3.5, color=COLORS["exit"], label="$p_{exit}$")
        other.plot(later, said[later], ":", color=COLORS["exit"], label="$p_{exit}$, not asked any more")
        bounds = np.array([self.rule.threshold_at(layer) for layer in range(count)])
        other.plot(range(count), bounds.clip(*SHOWN), color="0.3", lw=0.8, ls="--", label="threshold")
        other.set_ylim(SHOWN[0] / 2, 1 - (1 - SHOWN[1]) / 2)
        other.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        other.minorticks_off()
        other.set_ylabel("$p_{exit}$ (logit scale)")


def timelines(engine: Engine, samples: Sequence[Sample], policy: DynamicExit) -> Timelines:
    """Answers the samples with and without the exit and reads every head on the way."""
    found = []
    said = probe(engine, samples, [policy])[0]  # [N, L - 1]
    for sample, p_exit in zip(samples, said, strict=True):
        options: dict[str, Any] = dict(max_new_tokens=BUDGETS[sample.form], do_sample=False)
        early, full = (engine.generate(sample.prompt, sample.picture, policy=p, **options) for p in (policy, KeepAll()))
        assert not isinstance(early, list) and not isinstance(full, list)
        found.append(
            Timeline(
                sample.key,
                sample.picture,
                sample.prompt,
                reference_text(sample),
                early.text.strip(),
                full.text.strip(),
                early.stats.exit_layer,
                full.stats.visual_tokens + full.stats.text_tokens,
                tuple(early.stats.tokens_per_layer),
                tuple(float(p) for p in p_exit),
            )
        )
    return Timelines(tuple(found), policy.rule)


def reference_text(sample: Sample) -> str:
    """What the task expects, in words; empty where it is not known."""
    reference = sample.reference
    if "options" in sample.meta:
        return str(sample.meta["options"][reference])
    if isinstance(reference, dict):
        return str(max(reference, key=lambda answer: reference[answer]))
    if isinstance(reference, tuple):
        return ", ".join(wordings[0] for wordings in reference)
    return "" if reference is None else str(reference)
