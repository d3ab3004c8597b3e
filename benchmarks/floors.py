"""The least time of each phase of one request, from sizes alone: what limits of a machine allow at best.

Nothing is measured and no weights are made. A phase takes as long as its arithmetic or its memory traffic, whichever is
more (`benchmarks.roofline`); the defaults are the paper's ScienceQA case (arXiv 2411.19628, table 2) on one H100 SXM by
its data sheet. `python -m benchmarks.floors --page docs/performance.md` writes the tables into that page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import Limits
from benchmarks.report import Sheet, into_page, markdown, number, percent
from benchmarks.roofline import Work, weight_bytes
from dyvte_engine.config import DecoderShape
from dyvte_engine.flops import true_layer, vision_flops
from dyvte_engine.models.presets import PRESETS, preset

PHASES = ("vision", "layers with the picture", "layers after the exit", "LM head", "decoding")
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Model:
    """Sizes of a checkpoint: `tower` and `layer` are the bytes of their weights."""

    shape: DecoderShape
    vision_flops: float
    tower: int
    layer: int

    @classmethod
    def of(cls, name: str) -> Model:
        import transformers

        config = preset(name)
        with torch.device("meta"):
            hf = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).model
        tower = weight_bytes(hf.vision_tower) + weight_bytes(hf.multi_modal_projector)
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        projector = 2.0 * patches * sum(p.numel() for p in _matrices(hf.multi_modal_projector))
        flops = vision_flops(config.vision_config) + projector
        layer = weight_bytes(hf.language_model.layers[0])
        return cls(DecoderShape.from_hf(config.text_config), flops, tower, layer)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.dim() == 2]


def phases(model: Model, rows: Sequence[int], text: int, new_tokens: int) -> dict[str, list[Work]]:
    """Work of every phase as passes that follow each other; `rows` of one prompt in each layer, `text` of them stay."""
    shape = model.shape
    kv_row = shape.kv_bytes_per_row * ITEM
    layers = [Work(true_layer(shape, n), model.layer + n * kv_row) for n in rows]
    head = Work(2.0 * shape.hidden_size * shape.vocab_size, shape.hidden_size * shape.vocab_size * ITEM)
    cached = sum(rows)
    weights = Work(shape.num_layers * true_layer(shape, 1) + head.flops, shape.num_layers * model.layer + head.bytes)
    steps = [
        Work(weights.flops, weights.bytes + kv_row * (cached + i * shape.num_layers)) for i in range(new_tokens - 1)
    ]
    with_picture = [work for work, n in zip(layers, rows, strict=True) if n > text]
    return dict(
        zip(PHASES, [[Work(model.vision_flops, model.tower)], with_picture, layers[len(with_picture) :], [head], steps])
    )


def row_plans(args: argparse.Namespace, num_layers: int) -> dict[str, list[int]]:
    """Rows of each layer under the methods of the paper's table, FastV at its K = 2, R = 0.5."""
    text, seen, after = args.rows - args.visual, args.exit + 1, num_layers - args.exit - 1
    half = args.rows - args.visual // 2
    return {
        "KeepAll": [args.rows] * num_layers,
        "FastV": [args.rows] * 2 + [half] * (num_layers - 2),
        f"DyVTE, exit after layer {args.exit}": [args.rows] * seen + [text] * after,
        "DyVTE+FastV": [args.rows] * 2 + [half] * (seen - 2) + [text] * after,
    }


def table(args: argparse.Namespace, limits: Limits, shares: tuple[float, float]) -> Sheet:
    """Milliseconds of every phase where `shares` of the limits (arithmetic, memory) are reached."""
    model, reached = Model.of(args.model), Limits(limits.flops * shares[0], limits.bytes * shares[1])
    lines, base = [], 0.0
    for name, rows in row_plans(args, model.shape.num_layers).items():
        found = phases(model, rows, args.rows - args.visual, args.new_tokens)
        times = [1e3 * sum(work.seconds(reached) for work in found[phase]) for phase in PHASES]
        base = base or sum(times)
        lines.append([name, *(number(t, 2) for t in times), number(sum(times), 2), percent(1 - sum(times) / base)])
    title = f"Least ms at {percent(shares[0])} of {limits.flops / 1e12:.0f} TFLOP/s and {percent(shares[1])} of "
    return Sheet(
        f"{title}{limits.bytes / 1e12:.2f} TB/s, {args.model}, {args.rows} rows ({args.visual} visual), batch 1",
        ["method", *PHASES, "sum", "saved"],
        lines,
        f"{args.new_tokens} new tokens: one from the prefill, the others decoded; heads not counted",
    )


def work_table(args: argparse.Namespace) -> Sheet:
    """The two numbers behind every time: GFLOP and MB."""
    model, lines = Model.of(args.model), []
    for name, rows in row_plans(args, model.shape.num_layers).items():
        found = phases(model, rows, args.rows - args.visual, args.new_tokens)
        for unit, of in (("GFLOP", lambda w: w.flops / 1e9), ("MB", lambda w: w.bytes / 1e6)):
            lines.append([name, unit, *(f"{sum(map(of, found[phase])):,.0f}" for phase in PHASES)])
    return Sheet(f"Work, {args.model}", ["method", "", *PHASES], lines, "bf16; weights once a pass, K/V rows")


def sheets(args: argparse.Namespace) -> list[Sheet]:
    limits = Limits(args.flops, args.bytes)
    return [
        work_table(args),
        table(args, limits, (1.0, 1.0)),
        table(args, limits, (args.share_flops, args.share_bytes)),
    ]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="llava-1.5-13b", choices=list(PRESETS))
    p.add_argument("--rows", type=int, default=702, help="tokens of the prompt")
    p.add_argument("--visual", type=int, default=576, help="visual tokens among them")
    p.add_argument("--exit", type=int, default=11, help="layer after which they leave")
    p.add_argument("--new-tokens", type=int, default=2)
    p.add_argument("--flops", type=float, default=989.4e12, help="bf16 FLOP/s without sparsity")
    p.add_argument("--bytes", type=float, default=3.35e12, help="bytes/s of the memory")
    p.add_argument("--share-flops", type=float, default=0.7, help="share reached in the second table")
    p.add_argument("--share-bytes", type=float, default=0.85)
    p.add_argument("--page", type=Path, help="write the tables into this page, between its marks")
    return p


def main(argv: Sequence[str] | None = None) -> Any:
    args = parser().parse_args(argv)
    text = "\n\n".join(markdown(sheet) for sheet in sheets(args))
    if args.page is None:
        print(text)
    else:
        args.page.write_text(into_page(args.page.read_text(), "floors", text))


if __name__ == "__main__":
    main()
