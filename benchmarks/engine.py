"""One request from pixels to tokens: this engine under several policies against transformers' generate.

Same weights, same prompts, one process, interleaved rounds; a checkpoint or a preset with random weights.
`python -m benchmarks.engine --help`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw

from benchmarks.common import copy_bandwidth, interleave, machine, matmul_rate, paired_ratio, save_and_show, spread
from dyvte_engine import NANO_HEADS, DynamicExit, Engine, FastV, FixedExit, KeepAll, VisualTokenPolicy, compose
from dyvte_engine.assets import resolve_model
from dyvte_engine.models.presets import PRESETS, preset
from dyvte_engine.models.random_model import random_model


def questions(n: int, seed: int) -> tuple[list[str], list[Image.Image]]:
    """Prompts of different lengths, each with its own picture."""
    rng = random.Random(seed)
    texts = ["What color is the shape?", "Is there a red circle?", "How many shapes are in the picture?"]
    pictures = []
    for _ in range(n):
        picture = Image.new("RGB", (64, 64), tuple(rng.randrange(200, 256) for _ in range(3)))
        left, top = rng.randrange(30), rng.randrange(30)
        box = (left, top, left + rng.randrange(12, 30), top + rng.randrange(12, 30))
        ImageDraw.Draw(picture).ellipse(box, fill=tuple(rng.randrange(160) for _ in range(3)))
        pictures.append(picture)
    return [texts[i % len(texts)] for i in range(n)], pictures


class HuggingFace:
    """transformers' generate, used as its documentation says: left padding, SDPA attention, dynamic cache."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor
        self.model.set_attn_implementation("sdpa")

    def generate(self, texts: list[str], pictures: list[Image.Image], new_tokens: int) -> list[list[int]]:
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": t}]}] for t in texts]
        rendered = [self.processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        inputs = self.processor(
            text=rendered,
            images=pictures,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        out = self.model.generate(
            **inputs.to(self.model.device), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        return out[:, inputs["input_ids"].shape[1] :].tolist()


def load(name: str, dtype: str, device: torch.device, max_batch: int) -> tuple[Engine, HuggingFace]:
    """The engine, and transformers with a copy of the same weights."""
    if name not in PRESETS:
        engine = Engine.from_pretrained(name, dtype=dtype, device=device, max_batch=max_batch)
        cls = transformers.AutoModelForImageTextToText
        model = cls.from_pretrained(resolve_model(name), dtype=engine.config.dtype).to(device)
    else:
        engine = Engine.from_config(name, dtype=dtype, device=device, max_batch=max_batch, max_len=1024)
        model = random_model(preset(name), 0, engine.config.dtype, device)
    return engine, HuggingFace(model, engine.model.processor)


def policies(engine: Engine, only: list[str] | None) -> dict[str, VisualTokenPolicy]:
    half = engine.model.shape.num_layers // 2 - 1
    out: dict[str, VisualTokenPolicy] = {"KeepAll": KeepAll(), f"FixedExit({half})": FixedExit(half), "FastV": FastV()}
    if NANO_HEADS.is_file() and engine.model.name == resolve_model("nano"):
        dynamic = DynamicExit.from_file(NANO_HEADS)
        out |= {"DyVTE": dynamic, "DyVTE+FastV": compose(FastV(), dynamic)}
    return {name: policy for name, policy in out.items() if not only or name.split("(")[0] in only}


def measure(
    engine: Engine, hf: HuggingFace, chosen: dict[str, VisualTokenPolicy], batch: int, lengths: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Seconds from pictures and text to the last token, for every answer length and everything, in turn.

    From the shortest and the longest answer of a round follows its time per token after the first.
    """
    texts, pictures = questions(batch, seed=0)
    bound = {name: policy.bind(engine.model) for name, policy in chosen.items()}
    stats: dict[str, list[Any]] = {}

    def ours(name: str, new_tokens: int) -> None:
        engine._policy = bound[name]  # bound once: moving heads is not part of a request
        got = engine.generate(texts, pictures, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        stats[name] = [r.stats for r in got]

    calls: dict[str, Any] = {}
    for n in lengths:
        calls[f"transformers {n}"] = lambda n=n: hf.generate(texts, pictures, n)
        calls |= {f"{name} {n}": (lambda name=name, n=n: ours(name, n)) for name in bound}
    times = interleave(calls, rounds, engine.config.device)
    series = {n: {name: times[f"{name} {n}"] for name in ("transformers", *bound)} for n in lengths}
    cases = [{"batch": batch, "new_tokens": n, "results": _compare(by_name, stats)} for n, by_name in series.items()]
    low, high = min(lengths), max(lengths)
    if high > low:
        pairs = {name: zip(series[low][name], series[high][name]) for name in series[low]}
        step = {name: [(long - short) / (high - low) for short, long in both] for name, both in pairs.items()}
        cases.append({"batch": batch, "new_tokens": "each further", "results": _compare(step, stats)})
    return cases


def _compare(times: dict[str, list[float]], stats: dict[str, list[Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, values in times.items():
        result[name] = {"seconds": spread(values), "speedup": paired_ratio(times["transformers"], values)}
        if name in stats:
            s = stats[name]
            result[name] |= {
                "mean_exit_layer": _mean([x.exit_layer for x in s if x.exit_layer is not None]),
                "prefill_gflops": _mean([1e3 * x.prefill_tflops_true for x in s]),
                "kv_bytes": sum(x.kv_bytes for x in s),
            }
    return result


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help=f"checkpoint folder or hub id, nano, {', '.join(PRESETS)}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--policy", nargs="*", help="only these, e.g. KeepAll FixedExit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    device = torch.device(args.device)
    engine, hf = load(args.model, args.dtype, device, max(args.batch))
    limits = {"matmul_flops": matmul_rate(device, engine.config.dtype), "copy_bytes": copy_bandwidth(device)}
    data: dict[str, Any] = {"machine": machine(device), "args": vars(args) | {"out": str(args.out)}, "limits": limits}
    chosen = policies(engine, args.policy)
    data["cases"] = [c for b in args.batch for c in measure(engine, hf, chosen, b, args.new_tokens, args.rounds)]
    rows = [_row(c["batch"], c["new_tokens"], name, r) for c in data["cases"] for name, r in c["results"].items()]
    columns = ["batch", "new", "what", "ms (quartiles)", "times transformers (quartiles)", "exit", "GFLOPs", "K/V KiB"]
    save_and_show("engine", columns, rows, data, args.out)
    print(f"limits here: matmul {limits['matmul_flops'] / 1e9:.0f} GFLOP/s, copy {limits['copy_bytes'] / 1e9:.1f} GB/s")


def _row(batch: int, new_tokens: int | str, name: str, r: dict[str, Any]) -> list[str]:
    ms = {k: 1e3 * v for k, v in r["seconds"].items()}
    x = r["speedup"]
    return [
        str(batch),
        str(new_tokens),
        name,
        f"{ms['median']:.1f} ({ms['q1']:.1f}-{ms['q3']:.1f})",
        f"{x['median']:.2f} ({x['q1']:.2f}-{x['q3']:.2f})",
        "" if r.get("mean_exit_layer") is None else f"{r['mean_exit_layer']:.1f}",
        "" if r.get("prefill_gflops") is None else f"{r['prefill_gflops']:.2f}",
        "" if r.get("kv_bytes") is None else f"{r['kv_bytes'] / 1024:.0f}",
    ]


if __name__ == "__main__":
    main()
