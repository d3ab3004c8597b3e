"""nano's exit heads, from its own pictures: `python -m dyvte_engine.training.nano.heads --out FOLDER`.

Labels, training and a report on held-out questions, all in FOLDER; a killed run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dyvte_engine.assets import NANO
from dyvte_engine.engine import Engine
from dyvte_engine.training.heads_report import evaluate_heads, table
from dyvte_engine.training.label_store import label
from dyvte_engine.training.nano.head_examples import held_out_examples, training_examples
from dyvte_engine.training.train_heads import HeadSettings, train_heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(NANO), help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for labels, exit_heads.safetensors and report")
    parser.add_argument("--kind", choices=("paper", "default", "light"), default="light")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--report-samples", type=int, default=1000, help="of each held-out set")
    parser.add_argument("--target-agreement", type=float)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = Engine.from_pretrained(args.model, None, args.dtype, args.device, max_batch=1).model
    label(model, training_examples(args.seed, args.samples), args.out / "labels", "self", batch=32)
    settings = HeadSettings.of(args.kind, seed=args.seed, target_agreement=args.target_agreement)
    file = args.out / "exit_heads.safetensors"
    heads = train_heads(args.out / "labels", file, settings)
    report = {name: heads.metadata[name] for name in ("labels", "settings", "threshold", "calibration")}
    for name, examples in held_out_examples(args.seed, args.report_samples).items():
        label(model, examples, args.out / name, "self", batch=32)
        report[name] = evaluate_heads(args.out / name, [file])[str(file)]
        print(table({name: report[name]}))
    (args.out / "exit_heads_report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
