"""Trains exit heads for a frozen checkpoint: `python -m dyvte_engine.training.train_heads --model FOLDER --data LIST`.

Spec section 3. Default: all exits of every sample supervised at once, and the threshold calibrated on samples the heads
did not see; `--paper` is the paper's recipe (one random layer a step, one epoch, threshold 0.5).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.exit_head import ExitHeadConfig, ExitHeads
from dyvte_engine.models.adapters import load_model
from dyvte_engine.training.head_data import Example, HeadData, collect, read_jsonl
from dyvte_engine.training.metrics import share


@dataclass(frozen=True)
class HeadSettings:
    """The trainer's options; `target` is the agreement the threshold is calibrated for, None leaves 0.5."""

    seed: int = 0
    lr: float = 1e-3
    epochs: int = 20
    batch: int = 128
    warmup: float = 0.03
    one_random_layer: bool = False
    target: float | None = 0.99

    @classmethod
    def paper(cls, seed: int) -> HeadSettings:
        return cls(seed=seed, lr=4e-5, epochs=1, one_random_layer=True, target=None)


def train(heads: ExitHeads, data: HeadData, settings: HeadSettings) -> None:
    """AdamW without weight decay, warm-up, cosine, two-class cross-entropy; in place."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=settings.lr, weight_decay=0.0)
    count, layers = data.label.shape
    steps = settings.epochs * math.ceil(count / settings.batch)
    warmup = max(1, round(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: (
            (s + 1) / warmup if s < warmup else 0.5 * (1 + math.cos(math.pi * (s - warmup) / max(1, steps - warmup)))
        ),
    )
    for epoch in range(settings.epochs):
        total = 0.0
        for rows in torch.randperm(count, generator=generator).split(settings.batch):
            asked = (
                [int(torch.randint(layers, (1,), generator=generator))] if settings.one_random_layer else range(layers)
            )
            pooled, label = data.pooled[rows].to(heads.w1.device), data.label[rows].long().to(heads.w1.device)
            losses = [F.cross_entropy(heads(pooled[:, layer], layer), label[:, layer]) for layer in asked]
            loss = torch.stack(losses).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        print(f"heads: epoch {epoch + 1}/{settings.epochs} loss {total / count:.4f}", flush=True)


@torch.inference_mode()
def exit_probabilities(heads: ExitHeads, pooled: Tensor) -> Tensor:
    """pooled [N, L, S*d] -> p_exit float32 [N, L]."""
    device = heads.w1.device
    chances = [heads(pooled[:, layer].to(device), layer).float().softmax(-1)[:, 1] for layer in range(pooled.shape[1])]
    return torch.stack(chances, 1).cpu()


def first_exits(p_exit: Tensor, threshold: float) -> Tensor:
    """int64 [N]: the first layer with p_exit > threshold; the last layer, which changes nothing, where none fires."""
    fires = p_exit > threshold
    fires[:, -1] = True
    return fires.int().argmax(1)


def agreement(p_exit: Tensor, agree: Tensor, threshold: float) -> tuple[int, float]:
    """How many samples keep all their answer tokens under this threshold, and the mean exit layer."""
    layers = first_exits(p_exit, threshold)
    return int(agree.gather(1, layers[:, None]).sum()), float(layers.float().mean())


def calibrate(p_exit: Tensor, agree: Tensor, target: float) -> float:
    """The threshold with the earliest mean exit whose agreement reaches `target`; 1 (never exit) if none does."""
    best, earliest = 1.0, float("inf")
    for threshold in torch.cat([torch.linspace(0.3, 0.99, 70), 1 - torch.logspace(-2, -4, 21)]).tolist():
        hits, mean_layer = agreement(p_exit, agree, threshold)
        if hits >= target * len(agree) and mean_layer < earliest:
            best, earliest = threshold, mean_layer
    return best


def describe(heads: ExitHeads, data: HeadData, threshold: float) -> dict:
    """Agreement with the full model and exit layers on samples the heads have not seen, beside every fixed exit."""
    p_exit = exit_probabilities(heads, data.pooled)
    hits, mean_layer = agreement(p_exit, data.agree, threshold)
    layers = first_exits(p_exit, threshold)
    count, last = len(data.agree), data.agree.shape[1] - 1
    return {
        "agreement": share(hits, count),
        "mean_exit_layer": round(mean_layer, 3),
        "exited_before_the_last_layer": round(float((layers < last).float().mean()), 4),
        "exit_histogram": torch.bincount(layers, minlength=last + 1).tolist(),
        "fixed_exit_agreement": [round(v, 4) for v in data.agree.float().mean(0).tolist()],
        "exit_label_share": [round(v, 4) for v in data.label.float().mean(0).tolist()],
    }


def _examples(args: argparse.Namespace) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training examples, and named sets to report on."""
    if args.data == "nano":
        from dyvte_engine.training.nano.head_examples import held_out_examples, training_examples

        return training_examples(args.seed, args.samples), held_out_examples(args.seed, args.report_samples)
    return read_jsonl(args.data)[: args.samples], {"report": read_jsonl(args.report)} if args.report else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument(
        "--data", required=True, help="JSON lines {image, prompt, answer?}, or `nano` for its own pictures"
    )
    parser.add_argument("--report", help="JSON lines to report on (`nano` brings its own)")
    parser.add_argument("--out", type=Path, required=True, help="exit_heads.safetensors to write")
    parser.add_argument("--report-out", type=Path, help="JSON report to write")
    parser.add_argument("--samples", type=int, default=6600)
    parser.add_argument("--report-samples", type=int, help="at most so many of each reported set")
    parser.add_argument("--paper", action="store_true", help="the paper's recipe")
    parser.add_argument("--rule", choices=("paper", "free-running"), default="paper")
    parser.add_argument("--head-hidden", type=int, default=2048)
    parser.add_argument("--rms-eps", type=float, help="divide each pooled state by its RMS")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--target", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label-batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    run(parser.parse_args())


def fit(heads: ExitHeads, data: HeadData, settings: HeadSettings) -> tuple[float, HeadData]:
    """Trains on the first three quarters and calibrates on the rest; returns the threshold and the rest.

    Without a calibration target everything trains and the threshold is 0.5.
    """
    if settings.target is None:
        train(heads, data, settings)
        return 0.5, data
    kept = round(0.75 * len(data.label))
    seen, held = (HeadData(data.pooled[s], data.label[s], data.agree[s], []) for s in (slice(kept), slice(kept, None)))
    train(heads, seen, settings)
    return calibrate(exit_probabilities(heads, held.pooled), held.agree, settings.target), held


def run(args: argparse.Namespace) -> None:
    settings = HeadSettings.paper(args.seed) if args.paper else HeadSettings(args.seed)
    given = {name: getattr(args, name) for name in ("lr", "epochs", "target") if getattr(args, name) is not None}
    settings = replace(settings, **given)
    model = load_model(args.model, getattr(torch, args.dtype), torch.device(args.device), None, False)
    training, reported = _examples(args)
    config = ExitHeadConfig(model.shape.hidden_size, model.shape.num_layers, args.head_hidden, rms_eps=args.rms_eps)
    data = collect(model, training, config.states, args.rule, args.label_batch)
    heads = ExitHeads(config, seed=args.seed).to(args.device)
    threshold, held = fit(heads, data, settings)
    report: dict[str, Any] = {"rule": args.rule, "samples": len(data.label), "settings": vars(settings)}
    heads.save(args.out, model.fingerprint, model_name=Path(model.name).name, threshold=threshold, **report)
    report |= {"threshold": threshold, "head_hidden": args.head_hidden, "dtype": args.dtype}
    report["calibration"] = describe(heads, held, threshold)
    for name, examples in reported.items():
        measured = collect(model, examples, config.states, args.rule, args.label_batch)
        report[name] = describe(heads, measured, threshold)
    print(json.dumps(report, indent=1))
    if args.report_out:
        args.report_out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
