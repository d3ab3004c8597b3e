"""How time and memory grow with visual tokens, layers, batch and answer length, on models with random weights.

One thing varies at a time; every point and both methods (all tokens stay; exit at half depth) run in turn. Exponents
are fits of log time against log size. `python -m benchmarks.growth --help`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.common import Data, fit_exponent, header, options, peak_bytes, rounds_within, spread, wait_for
from benchmarks.report import COLORS, Sheet, finish, new_figure, number, scaled
from dyvte_engine import Engine, FixedExit, KeepAll
from dyvte_engine.models.presets import PRESETS, preset

TEXT = 64  # tokens besides the picture: 16 before it, 48 after
AXES = {
    "visual tokens": ("prefill", "per_token", "kv_bytes", "peak_bytes"),
    "layers": ("prefill", "per_token", "kv_bytes", "peak_bytes"),
    "batch": ("prefill", "per_token", "kv_bytes", "peak_bytes"),
    "answer tokens": ("answer", "kv_bytes"),
}
TIMES = ("prefill", "per_token", "answer")


@dataclass(frozen=True)
class Point:
    """One size of everything."""

    visual: int
    layers: int
    batch: int
    answer: int

    def at(self, axis: str) -> int:
        return dict(zip(AXES, (self.visual, self.layers, self.batch, self.answer), strict=True))[axis]


def small_config(hidden: int) -> Any:
    """A LLaVA config of this width with a tower that is never run."""
    import transformers

    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=28,
            patch_size=14,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_attention_heads=max(1, hidden // 64),
            vocab_size=2048,
            max_position_embeddings=8192,
        ),
        image_token_index=2000,
        image_seq_length=4,
    )


def engine_for(model: str, points: Sequence[Point], dtype: str, device: str) -> Engine:
    """A model of the points' depth, with room for the largest of them."""
    config = preset(model) if model in PRESETS else small_config(int(model))
    config.get_text_config().num_hidden_layers = points[0].layers
    longest = TEXT + max(p.visual + p.answer for p in points)
    return Engine.from_config(
        config, dtype=dtype, device=device, max_batch=max(p.batch for p in points), max_len=longest
    )


class Job:
    """A batch of random prompts of one point's sizes, on one engine."""

    def __init__(self, engine: Engine, point: Point, policy: Any):
        self.engine, self.point, self.policy = engine, point, policy
        rows, generator = TEXT + point.visual, torch.Generator().manual_seed(0)
        embeds = torch.randn(rows, engine.model.shape.hidden_size, generator=generator)
        self.embeds = [embeds.to(engine.config.device, engine.config.dtype)] * point.batch
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[16 : 16 + point.visual] = True
        self.masks = [mask] * point.batch
        self.kv_bytes = 0

    def run(self) -> dict[str, float]:
        """Seconds of the prefill, of a further token, and of the whole answer."""
        device = self.engine.config.device
        wait_for(device)
        start = time.perf_counter()
        with self.engine.prefill(self.embeds, self.masks, policy=self.policy) as running:
            token = running.logits.argmax(-1).tolist()
            first = time.perf_counter()
            for _ in range(self.point.answer - 1):
                token = running.step(token).argmax(-1).tolist()
            end = time.perf_counter()
            self.kv_bytes = running.cache.bytes_held
        steps = max(self.point.answer - 1, 1)
        return {"prefill": first - start, "per_token": (end - first) / steps, "answer": end - start}


def measure_axis(axis: str, points: Sequence[Point], args: argparse.Namespace) -> list[Data]:
    """One entry for each point and method."""
    by_depth = {p.layers: [q for q in points if q.layers == p.layers] for p in points}
    engines = {depth: engine_for(args.model, group, args.dtype, args.device) for depth, group in by_depth.items()}
    jobs = {
        (name, p): Job(engines[p.layers], p, policy)
        for p in points
        for name, policy in (("all stay", KeepAll()), ("exit at half depth", FixedExit(p.layers // 2 - 1)))
    }
    peaks = {key: peak_bytes(job.run, torch.device(args.device)) for key, job in jobs.items()}  # warms up, too
    seconds: dict[Any, list[dict[str, float]]] = {key: [] for key in jobs}
    for _ in rounds_within(args.seconds):
        for key, job in jobs.items():
            seconds[key].append(job.run())
    entries = []
    for (name, p), job in jobs.items():
        entry: Data = {"axis": axis, "method": name, "x": p.at(axis), "point": vars(p)}
        entry |= {part: spread([s[part] for s in seconds[name, p]]) for part in TIMES}
        entries.append(entry | {"kv_bytes": job.kv_bytes, "peak_bytes": peaks[name, p] + job.kv_bytes})
    return entries


def fits(entries: Sequence[Data]) -> list[Data]:
    """An exponent for each method and quantity of one axis."""
    out = []
    for name in dict.fromkeys(e["method"] for e in entries):
        mine = [e for e in entries if e["method"] == name]
        for part in AXES[mine[0]["axis"]]:
            values = [e[part]["median"] if part in TIMES else e[part] for e in mine]
            out.append({"method": name, "part": part, **fit_exponent([e["x"] for e in mine], values)})
    return out


def measure(args: argparse.Namespace, argv: Sequence[str] | None) -> Data:
    data = header("growth", args, argv)
    base = Point(args.base[0], args.base[1], args.base[2], args.base[3])
    sizes = dict(zip(AXES, (args.visual, args.layers, args.batch, args.answer), strict=True))
    data["axes"] = {}
    for axis, values in sizes.items():
        field = {"visual tokens": "visual", "answer tokens": "answer"}.get(axis, axis)
        points = [Point(**{**vars(base), field: value}) for value in values]
        entries = measure_axis(axis, points, args)
        data["axes"][axis] = {"points": entries, "fits": fits(entries)}
    return data


def tables(data: Data) -> list[Sheet]:
    where = f"width {data['args']['model']}, {data['args']['dtype']}"
    sheets = []
    for axis, found in data["axes"].items():
        parts = AXES[axis]
        columns = [axis, "method", *(p.replace("_", " ") + (", ms" if p in TIMES else ", MiB") for p in parts)]
        rows = [
            [str(e["x"]), e["method"], *(scaled(e[p], 1e3) if p in TIMES else number(e[p] / 2**20, 2) for p in parts)]
            for e in found["points"]
        ]
        for name in dict.fromkeys(f["method"] for f in found["fits"]):
            fitted = {
                f["part"]: f"{f['exponent']:.2f} ± {f['error']:.2f}" for f in found["fits"] if f["method"] == name
            }
            rows.append(["exponent", name, *(fitted[p] for p in parts)])
        base = dict(zip(AXES, data["args"]["base"], strict=True))
        fixed = ", ".join(f"{v} {k}" for k, v in base.items() if k != axis)
        sheets.append(Sheet(f"Growth with {axis} ({where})", columns, rows, f"else {fixed}"))
    return sheets


def figure(data: Data) -> Figure:
    """Time above, memory below, a column for each thing that varies."""
    fig, axes = new_figure(12, 5.6, columns=len(data["axes"]), rows=2)
    for column, (axis, found) in enumerate(data["axes"].items()):
        for panel, of_time in zip(axes[:, column], (True, False), strict=True):
            _panel(panel, found, [p for p in AXES[axis] if (p in TIMES) == of_time])
            panel.set_xticks(sorted({e["x"] for e in found["points"]}))
            panel.xaxis.set_major_formatter(ScalarFormatter())
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylabel("ms" if of_time else "MiB", fontsize=8)
            panel.tick_params(labelsize=7, which="both")
            panel.legend(fontsize=5.5)
        axes[1][column].set_xlabel(axis, fontsize=8)
    return fig


def _panel(panel: Any, found: Data, parts: Sequence[str]) -> None:
    for i, name in enumerate(dict.fromkeys(e["method"] for e in found["points"])):
        mine = [e for e in found["points"] if e["method"] == name]
        for part, style in zip(parts, ("o-", "s--"), strict=False):
            fit = next(f for f in found["fits"] if f["method"] == name and f["part"] == part)
            label = f"{part.replace('_', ' ')}, {name}: x^{fit['exponent']:.2f}"
            y = [1e3 * e[part]["median"] if part in TIMES else e[part] / 2**20 for e in mine]
            panel.loglog([e["x"] for e in mine], y, style, color=COLORS[i], label=label, markersize=4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "growth")
    parser.add_argument("--model", default="512", help="width of a small decoder, or a preset")
    parser.add_argument(
        "--base", type=int, nargs=4, default=[576, 8, 1, 16], help="visual tokens, layers, batch, answer"
    )
    parser.add_argument("--visual", type=int, nargs="+", default=[144, 288, 576, 1152, 2880])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--answer", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seconds", type=float, default=15.0, help="for each of the four")
    args = parser.parse_args(argv)
    finish(measure(args, argv), args.out, args.name, tables, figure)


if __name__ == "__main__":
    main()
