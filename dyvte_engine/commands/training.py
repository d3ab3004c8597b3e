"""`dyvte-engine label | train-heads | ablate-heads | test-heads`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import write_text
from .output import apart, out_file, out_folder, quiet

Labels = Annotated[Path, typer.Argument(help="A folder that `label` wrote.")]
Kind = Annotated[str, typer.Option(help="paper, default (paper's heads, all labels), light (shared trunk).")]
RuleOption = Annotated[str, typer.Option(help="auto, paper, argmax, text: when the label says exit.")]


def label(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, 'nano' or 'smol'.")],
    data: Annotated[
        str, typer.Option(help="FILE.jsonl, LLaVA-style FILE.json; nano[:SET] or smol[:SET] draw their own.")
    ],
    out: Annotated[Path, out_folder("Folder for the labels; a killed run continues there.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures; default that of FILE.")] = None,
    mode: Annotated[str, typer.Option(help="reference, self, free-running")] = "reference",
    samples: Annotated[int | None, typer.Option(help="At most so many, the first ones.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples computed at once.")] = 16,
    shard: Annotated[int, typer.Option(min=1, help="Samples of one file.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer generated.")] = 32,
    max_len: Annotated[int | None, typer.Option(help="Prompt and answer tokens; default what the model has.")] = None,
    seed: Annotated[int, typer.Option(help="Of the pictures of nano and smol.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Label what an exit after each layer would change.

    Exit heads learn from these labels (docs/training.md).
    """
    from ..engine import Engine
    from ..training import label_store
    from ..training.named_examples import examples_named

    quiet()
    examples = examples_named(data, images, samples, seed)
    label_store.check_mode(mode, examples)
    options = {"max_batch": 1, "max_len": max_len, "trust_remote_code": trust_remote_code}
    loaded = Engine.from_pretrained(model, None, dtype, device, **options).model  # type: ignore[arg-type]
    info = label_store.label(loaded, examples, out, mode, batch, shard, max_new_tokens)  # type: ignore[arg-type]
    print(f"{info.samples} samples of {info.model_name} labelled in {out}")


def train_heads(
    labels: Labels,
    out: Annotated[Path, out_file("The heads' file; a killed run continues from OUT.state.")],
    kind: Kind = "default",
    rule: RuleOption = "auto",
    states: Annotated[str, typer.Option(help="Token states, joined by commas.")] = "mean_text,last_text",
    target_agreement: Annotated[float | None, typer.Option(help="Share of answers that must stay; 0.99.")] = None,
    target_flops: Annotated[float | None, typer.Option(help="Instead: mean FLOPs over those without exit.")] = None,
    delta: Annotated[float, typer.Option(help="Risk that the promise fails.")] = 0.05,
    min_layer: Annotated[int, typer.Option(help="First layer asked.")] = 0,
    every_k: Annotated[int, typer.Option(help="Ask every so many layers.")] = 1,
    hysteresis: Annotated[int, typer.Option(help="So many asked layers in a row must fire.")] = 1,
    targets: Annotated[str, typer.Option(help="label, or regret: what leaving is worth more than staying.")] = "label",
    by_layer: Annotated[bool, typer.Option(help="A threshold for each layer, not one for all.")] = False,
    hidden: Annotated[int | None, typer.Option(help="Hidden units; 2048, light 256.")] = None,
    rms_eps: Annotated[float | None, typer.Option(help="Divide each token state by its RMS; light 1e-6.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 1e-3, paper 4e-5.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the labels; 20, paper 1.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of a step; 128.")] = None,
    class_weights: Annotated[bool, typer.Option(help="Weigh both verdicts alike.")] = False,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order.")] = 0,
    tensorboard: Annotated[Path | None, out_folder("Folder for TensorBoard.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between two states on disk.")] = 100,
) -> None:
    """Train exit heads and calibrate their threshold.

    On several GPUs run it under `accelerate launch`.
    """
    from ..training import train_heads as module

    given = {"rule": rule, "states": tuple(states.split(",")), "seed": seed, "lr": lr, "epochs": epochs, "batch": batch}
    given |= {"target_agreement": target_agreement, "target_flops": target_flops, "delta": delta}
    given |= {"min_layer": min_layer, "every_k": every_k, "hysteresis": hysteresis}
    given |= {"targets": targets, "by_layer": by_layer}
    given |= {"hidden": hidden, "rms_eps": rms_eps, "class_weights": class_weights}
    settings = module.HeadSettings.of(kind, **given)  # type: ignore[arg-type]
    heads = module.train_heads(labels, out, settings, tensorboard, save_every)
    _say_promise(heads.metadata, settings.target_agreement)
    chosen = heads.metadata["threshold"]
    values = chosen if isinstance(chosen, tuple) else (chosen,)
    print(f"{out}: threshold {', '.join(f'{value:.6g}' for value in values)}")


def _say_promise(metadata: dict[str, Any], target: float | None) -> None:
    from ..heads.calibration import Calibration

    if metadata["threshold"] not in metadata["calibration"]["thresholds"]:
        return
    at = Calibration(**metadata["calibration"]).at(metadata["threshold"])
    print(
        f"{at['changed']} of {at['samples']} held-out answers changed, mean exit layer {at['mean_layer']:.2f}, "
        f"FLOPs {100 * at['flops']:.1f} %"
    )
    if target is not None:
        print(f"at most {100 * (1 - target):g} % of answers change, at a confidence of {100 * (1 - at['delta']):g} %")


def ablate_heads(
    labels: Labels,
    out: Annotated[Path, out_folder("Folder for 15 heads files and table.json.")],
    kind: Kind = "default",
    rule: RuleOption = "auto",
    target_agreement: Annotated[float | None, typer.Option(help="Share of answers that must stay; 0.99.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden units; 2048, light 256.")] = None,
    rms_eps: Annotated[float | None, typer.Option(help="Divide each token state by its RMS; light 1e-6.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; 1e-3, paper 4e-5.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the labels; 20, paper 1.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order.")] = 0,
) -> None:
    """Train heads on each combination of token states.

    There are 15 of them: the paper's table 4.
    """
    from ..training.heads_report import ablate
    from ..training.train_heads import HeadSettings

    given = {"rule": rule, "target_agreement": target_agreement, "hidden": hidden, "rms_eps": rms_eps}
    settings = HeadSettings.of(kind, lr=lr, epochs=epochs, seed=seed, **given)  # type: ignore[arg-type]
    rows = ablate(labels, out, settings)
    write_text(out / "table.json", json.dumps(rows, indent=1) + "\n")


def test_heads(
    labels: Labels,
    heads: Annotated[list[Path], typer.Argument(help="Heads files, of this model or another of its shape.")],
    threshold: Annotated[float | None, typer.Option(help="Instead of the one in each file.")] = None,
    out: Annotated[Path | None, out_file("The same as JSON.")] = None,
) -> None:
    """Measure heads on labels, also heads of another model.

    Agreement with the full model, accuracy and exit layer (the paper's table 6).
    """
    from ..training.heads_report import evaluate_heads, table

    apart({"out": out}, heads)
    rows = evaluate_heads(labels, heads, threshold)
    print(table(rows))
    if out is not None:
        write_text(out, json.dumps(rows, indent=1) + "\n")
