"""`dyvte_engine.commands.demo`: pictures, questions, answers, where the visual tokens left, and what that saved."""

from __future__ import annotations

import argparse
import io
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .. import EXAMPLES, NANO_HEADS, DynamicExit, Engine, GenerationResult, KeepAll, VisualTokenPolicy
from ..files import check_writable, write_bytes
from ..lazy import optional
from .guard import guarded
from .output import quiet

RUNS = 7  # the figures shown are medians, both policies in turn


@dataclass(frozen=True)
class Shown:
    """One example, answered by the plain model and with the exit."""

    file: Path
    question: str
    reference: str
    full: GenerationResult
    early: GenerationResult
    full_ms: float
    early_ms: float


def answer(engine: Engine, policies: tuple[VisualTokenPolicy, VisualTokenPolicy], example: dict[str, str]) -> Shown:
    """Ask one question RUNS times under either policy, alternating; times are to the first token, in ms."""
    times: tuple[list[float], list[float]] = ([], [])
    results: list[GenerationResult | None] = [None, None]
    for _ in range(RUNS):
        for i, policy in enumerate(policies):
            result = engine.generate(example["prompt"], EXAMPLES / example["file"], policy=policy)
            assert isinstance(result, GenerationResult)
            results[i] = result
            times[i].append(1e3 * result.stats.ttft_s)
    full, early = results
    assert full and early
    return Shown(
        EXAMPLES / example["file"],
        example["prompt"],
        example["reference"],
        full,
        early,
        median(times[0]),
        median(times[1]),
    )


def _less(part: float, whole: float) -> str:
    return f"-{100 * (1 - part / whole):.0f} %"


def report(shown: Shown) -> str:
    stats, layers = shown.early.stats, len(shown.early.stats.tokens_per_layer)
    left = "stayed to the end" if stats.exit_layer is None else f"left after layer {stats.exit_layer} (0-{layers - 1})"
    kv, flops = (
        (stats.kv_bytes, stats.kv_bytes_keep_all),
        (stats.prefill_tflops_true, stats.prefill_tflops_true_keep_all),
    )
    return (
        f"{shown.file.name}: {shown.question}\n"
        f"  answer {shown.early.text.strip()!r}   without exit {shown.full.text.strip()!r}   "
        f"reference {shown.reference!r}\n"
        f"  {stats.visual_tokens} visual tokens {left}: K/V {_less(*kv)}, FLOPs {_less(*flops)}, "
        f"first token {shown.early_ms:.1f} ms instead of {shown.full_ms:.1f} ms"
    )


def draw(shown: list[Shown], path: Path) -> None:
    """One row an example: the picture, the words, the tokens each layer saw. No times: it looks the same everywhere."""
    from PIL import Image

    size = (11, 2.5 * len(shown) + 0.3)
    figure = optional("matplotlib.figure", "eval").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(shown), 3, squeeze=False, width_ratios=(1, 1.25, 1.9))
    for (left, middle, right), s in zip(axes, shown, strict=True):
        left.imshow(Image.open(s.file).convert("RGB"), interpolation="nearest")
        full, early = s.full.stats, s.early.stats
        words = (
            f"with exit: {s.early.text.strip()}",
            f"without: {s.full.text.strip()}",
            f"K/V {_less(early.kv_bytes, early.kv_bytes_keep_all)}, "
            f"FLOPs {_less(early.prefill_tflops_true, early.prefill_tflops_true_keep_all)}",
        )
        middle.text(0, 1, textwrap.fill(s.question, 30), weight="bold", fontsize=12, va="top")
        middle.text(0, 0.62, "\n".join(textwrap.fill(w, 36) for w in words), fontsize=11, va="top", linespacing=1.5)
        for panel in (left, middle):
            panel.axis("off")
        layers = range(len(full.tokens_per_layer))
        right.bar(layers, full.tokens_per_layer, color="#e2e8f0", label="without exit")
        right.bar(layers, early.tokens_per_layer, color="#2b6cb0", label="with exit")
        right.set_xticks(list(layers))
        right.set_ylabel("tokens")
        right.spines[["top", "right"]].set_visible(False)
    axes[-1][2].set_xlabel("layer")
    figure.legend(*axes[0][2].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    write_bytes(path, drawn.getvalue())


def main() -> None:
    """Answer the first examples that ship with the package and write the picture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--examples", type=int, default=3, help="how many of the shipped examples")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo.png"))
    args = parser.parse_args()
    check_writable(args.out)
    optional("matplotlib", "eval")
    quiet()
    # The same question again must cost what it costs the first time.
    engine = Engine.from_pretrained("nano", max_batch=1, picture_cache=0, prefix_cache=0)
    policies = (KeepAll(), DynamicExit.from_file(NANO_HEADS))
    examples = json.loads((EXAMPLES / "examples.json").read_text())[: args.examples]
    shown = []
    for example in examples:
        shown.append(answer(engine, policies, example))
        print(report(shown[-1]))
    draw(shown, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    guarded(main)
