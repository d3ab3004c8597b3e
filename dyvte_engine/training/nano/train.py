"""Trains nano: `python -m dyvte_engine.training.nano.train --stage tower|joint`.

The joint stage can also be run by `torchrun`; its workers then average their gradients.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

from dyvte_engine.training.nano.easy import load_easy_vqa, load_pictures
from dyvte_engine.training.nano.joint import JointSettings, Source, train_joint
from dyvte_engine.training.nano.model import (
    BOS,
    USER,
    build_config,
    build_model,
    build_processor,
    build_tokenizer,
    normalise,
    save,
)
from dyvte_engine.training.nano.packing import encode
from dyvte_engine.training.nano.pool import load_pool, pool_questions
from dyvte_engine.training.nano.projector import add_places, start_projector
from dyvte_engine.training.nano.questions import ASKED, WEIGHTS
from dyvte_engine.training.nano.scenes import IGNORE, MAX_SHAPES, STYLES, sample_scene
from dyvte_engine.training.nano.tower import DenseTower, train_tower

MASTER, LABEL_HEAD, TOWER = "master/", "labels.", "model.vision_tower."  # prefixes of names in a checkpoint


def begin_from(checkpoint: Path, model: torch.nn.Module, dense: DenseTower) -> None:
    """Loads the weights of an earlier joint checkpoint; a tower that was frozen there, and not stored, stays."""
    with safe_open(checkpoint, "pt") as file:
        names = [name for name in file.keys() if name.startswith(MASTER)]  # noqa: SIM118
        weights = {name[len(MASTER) :]: file.get_tensor(name) for name in names}
    labels = {name[len(LABEL_HEAD) :]: weights.pop(name) for name in list(weights) if name.startswith(LABEL_HEAD)}
    if labels:
        dense.labels.load_state_dict(labels)
    left_out = model.load_state_dict(weights, strict=False)
    missing = [n for n in left_out.missing_keys if n != "lm_head.weight" and not (n.startswith(TOWER) and not labels)]
    if missing or left_out.unexpected_keys:
        raise ValueError(f"{checkpoint} is no joint checkpoint of nano: {missing + left_out.unexpected_keys}")


def run_tower(args: argparse.Namespace) -> None:
    config = build_config(build_tokenizer())
    dtype = getattr(torch, args.dtype)
    model = build_model(config, args.seed)
    dense = DenseTower(model.model.vision_tower, config.vision_config.hidden_size)
    for checkpoint in args.begin:
        begin_from(checkpoint, model, dense)
    dense.to(args.device, dtype)
    pictures, labels = load_pool(args.data, args.seed, "train", args.pictures)
    train_tower(
        dense,
        pictures,
        labels,
        args.out,
        args.seed,
        args.steps,
        args.batch,
        args.lr,
        args.device,
        not args.no_compile,
        word_share=args.word_share,
    )


def run_joint(args: argparse.Namespace) -> None:
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    model = build_model(config, args.seed)
    dense = DenseTower(model.model.vision_tower, config.vision_config.hidden_size)
    paths, asked = load_easy_vqa("train")
    pictures, labels = load_pool(args.data, args.seed, "train", args.pictures)
    asked_of = min(args.asked, args.pictures)
    drawn_up = pool_questions(
        args.seed, "train", asked_of, args.questions, args.weights, args.threads, tuple(args.shapes)
    )
    questions = encode(tokenizer, drawn_up)
    styles = np.array([sample_scene(args.seed, "train", i).style if q else "" for i, q in enumerate(drawn_up)])
    sources = [Source(pictures, labels, questions, np.flatnonzero(styles == style)) for style in STYLES]
    unknown = np.full((len(paths), *labels.shape[1:]), IGNORE, np.uint8)
    sources.append(Source(load_pictures(paths), unknown, encode(tokenizer, asked), np.arange(len(paths))))
    with safe_open(args.tower or args.out / "tower.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(MASTER)]  # noqa: SIM118
        dense.load_state_dict({name[len(MASTER) :]: file.get_tensor(name) for name in names})
    if args.decoder:
        with safe_open(args.decoder, "pt") as file:
            names = [name for name in file.keys() if name.startswith(MASTER + "model.language_model")]  # noqa: SIM118
            model.load_state_dict({name[len(MASTER) :]: file.get_tensor(name) for name in names}, strict=False)
    shown = normalise(torch.from_numpy(np.array(pictures[:512])), torch.float32)
    embeddings = model.get_input_embeddings().weight
    start_projector(model.model.multi_modal_projector, dense, shown, tokenizer, embeddings)
    for checkpoint in args.begin:
        begin_from(checkpoint, model, dense)
    if args.places:
        add_places(model.model.multi_modal_projector, dense, shown, torch.from_numpy(np.array(labels[:512])))
    dense.requires_grad_(not args.freeze_tower)
    for module in (model, dense):
        module.to(args.device, getattr(torch, args.dtype))
    settings = JointSettings(
        args.seed,
        args.steps,
        args.batch,
        args.lr,
        args.device,
        rows=args.rows,
        shares=tuple(args.shares),
        exit_share=args.exit_share,
        exit_range=tuple(args.exit_range),
        label_pictures=0 if args.freeze_tower else 16,
        compile_model=not args.no_compile,
        save_every=args.save_every,
        worker=dist.get_rank() if dist.is_initialized() else 0,
    )
    processor = build_processor(tokenizer)
    prefix_ids = torch.tensor(tokenizer.convert_tokens_to_ids([BOS, USER]))

    def export(step: int) -> None:
        save(model, processor, args.out / "checkpoint")

    train_joint(model, dense, sources, prefix_ids, settings, args.out, export)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("tower", "joint"), required=True)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nano"), help="checkpoints; an interrupted run continues from here"
    )
    parser.add_argument("--data", type=Path, default=Path("runs/nano-data"), help="where generated pictures are kept")
    parser.add_argument("--pictures", type=int, default=80000, help="generated training pictures")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=16, help="questions drawn up for each picture (joint)")
    parser.add_argument("--asked", type=int, default=80000, help="pictures about which questions are asked (joint)")
    parser.add_argument(
        "--weights",
        type=float,
        nargs=len(ASKED),
        default=WEIGHTS,
        help=f"how often each sort of question is asked: {', '.join(ASKED)} (joint)",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs=len(STYLES) + 1,
        default=(0.12, 0.4, 0.28, 0.2),
        help=f"how often each sort of picture is shown: {', '.join(STYLES)}, easy-VQA (joint)",
    )
    parser.add_argument(
        "--shapes",
        type=int,
        nargs=2,
        default=(0, MAX_SHAPES),
        help=f"least and most shapes in pictures of sort {STYLES[1]} (joint)",
    )
    parser.add_argument("--rows", type=int, default=144, help="tokens of questions behind each picture (joint)")
    parser.add_argument("--exit-share", type=float, default=0.7, help="share of steps with a random exit (joint)")
    parser.add_argument("--exit-range", type=int, nargs=2, default=(3, 10), help="first and last layer of those exits")
    parser.add_argument("--freeze-tower", action="store_true", help="train projector and decoder only (joint)")
    parser.add_argument(
        "--begin", type=Path, nargs="+", default=(), help="joint checkpoints whose weights to begin from, in this order"
    )
    parser.add_argument("--word-share", type=float, help="share of pictures with a printed word (tower)")
    parser.add_argument("--places", action="store_true", help="give the projector each object's place first (joint)")
    parser.add_argument("--decoder", type=Path, help="an earlier joint checkpoint whose decoder to begin from (joint)")
    parser.add_argument(
        "--tower", type=Path, help="tower checkpoint to begin from (joint); default OUT/tower.safetensors"
    )
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints (joint)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = _options()
    torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:  # started by torchrun: every worker draws its own batches
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        {"tower": run_tower, "joint": run_joint}[args.stage](args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # else its threads may abort the process at the end


if __name__ == "__main__":
    main()
