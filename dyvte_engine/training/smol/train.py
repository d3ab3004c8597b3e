"""Trains smol: `python -m dyvte_engine.training.smol.train --stage align|lora|tower --out FOLDER`.

"align" trains the projector alone, "lora" projector and LoRA on every linear layer of the decoder (peft), "tower" both
and the tower's last blocks. Weights are bfloat16, with float32 masters of what is trained; several questions are packed
behind each picture. The folder holds `trained.safetensors`, all that was trained, in bfloat16: what the next stage
starts from and a release needs; `STAGE.safetensors`, masters and moments, from which a killed stage continues; and
`progress.jsonl`. `--stage report` answers held-out questions, `--stage assemble` writes the checkpoint folder `model`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dyvte_engine.errors import DyvteError, InvalidArgumentError
from dyvte_engine.files import write_bytes
from dyvte_engine.kernels.transfer import to_device
from dyvte_engine.models import smol as parts
from dyvte_engine.training.optim import MasterAdamW
from dyvte_engine.training.packing import Packed, answer_logits, layer_runner
from dyvte_engine.training.smol.data import BLOCK, Scenes, Step, Steps, known_words, patch_labels, stream
from dyvte_engine.training.smol.features import Features, run_blocks
from dyvte_engine.training.smol.judge import Blind, Judge, by_kind, by_task
from dyvte_engine.training.smol.start import PatchWords, start_projector
from dyvte_engine.training.smol.varied import VariedPainter

RANK, ALPHA = 16, 32
BLIND = 1000  # pictures of training whose answers the blind baseline knows
STARTING = 1000  # pictures that the projector's start sees
LAST = 4  # blocks of the tower that learn
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
RATES = {  # of each part, in each stage
    "align": {"projector": 3e-4},
    "lora": {"projector": 2e-4, "lora": 6e-4},
    "tower": {"projector": 1e-4, "lora": 3e-4, "tower": 5e-5},
}


@dataclass(frozen=True)
class Settings:
    """One stage: AdamW, 3 % warm-up, cosine over `steps` of `batch` pictures, `rows` tokens of questions behind each.

    pictures: how many there are, their features kept on disk (197 KB each); checked: held-out ones, every `check_every`
    steps; start: steps of the projector's start, where nothing was trained before.

    fresh: varied pictures painted for each step, instead of `pictures` plain ones. naming: share of the run in which
    patches learn only what they show, which keeps a falling weight until the end. fit: the cosine ends with `minutes`,
    whatever `steps` says. rate: times the rates of the stage.
    """

    stage: str
    steps: int
    batch: int = 4
    rows: int = 768
    pictures: int = 4000
    checked: int = 48
    seed: int = 0
    minutes: float = float("inf")
    workers: int = 0
    start: int = 1000
    save_every: float = 120.0  # seconds
    say_every: int = 10  # steps
    check_every: int = 200
    compile_model: bool = False
    block: int = BLOCK  # tokens; a question with its answer has at most so many
    fresh: bool = False
    naming: float = 0.0
    fit: bool = False
    rate: float = 1.0


def _stored(name: str) -> str:
    """What checkpoints call a parameter of the tower; newer releases of transformers call some otherwise."""
    for newer, older in NAMES.items():
        name = name.replace(newer, older)
    return name


def prepare(model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Adds LoRA to the decoder and returns every parameter that any stage trains, by part and name in checkpoints."""
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR)
    inject_adapter_in_model(lora, model.model.language_model)
    model.requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(model.dtype)  # peft adds float32; `model.to` would round the rotary frequencies as well
    tower = model.model.vision_tower
    learning = {f"encoder.layer.{i}." for i in range(len(tower.encoder.layer))[-LAST:]}
    trained = {f"projector.{n}": p for n, p in model.model.multi_modal_projector.named_parameters()}
    trained |= {f"tower.{_stored(n)}": p for n, p in tower.named_parameters() if n.startswith(tuple(learning))}
    adapters = model.model.language_model.named_parameters()
    return trained | {f"lora.{n.replace('.default', '')}": p for n, p in adapters if "lora_" in n}


class Trainer:
    """One stage of training in a folder. A stage begun before continues; a new one starts from what came last.

    features: where pictures' features are kept, by default in the folder.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: Any,
        out: str | Path,
        settings: Settings,
        features: Path | None = None,
    ):
        if settings.seed < 0:
            raise InvalidArgumentError(
                f"seed is {settings.seed}; accepted: 0 or more, below are the exit heads' pictures"
            )
        if settings.stage not in RATES:
            raise InvalidArgumentError(f"stage is {settings.stage!r}; accepted: {', '.join(RATES)}")
        self.model, self.processor, self.settings, self.out = model, processor, settings, Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.parameters = prepare(model)
        begun = self.out / "trained.safetensors"
        stored = load_file(begun) if begun.exists() else {}
        rates = RATES[settings.stage]
        if "tower" not in rates and any(n.startswith("tower.") for n in stored):
            given = f"stage is {settings.stage!r}, but {begun} holds a trained tower"
            raise InvalidArgumentError(f"{given}; accepted: 'tower'")
        load(self.parameters, stored)
        self.active = {n: p for n, p in self.parameters.items() if n.partition(".")[0] in rates}
        self.leaving = sorted({*self.active, *stored})
        scenes = Scenes("train", settings.seed, words=known_words(processor.tokenizer))
        sizes = settings.pictures, settings.batch, settings.rows, settings.block
        if settings.naming and not settings.fresh:
            raise InvalidArgumentError(
                f"naming is {settings.naming}, fresh is False; accepted: 0 without fresh pictures"
            )
        if settings.fit and settings.minutes == float("inf"):
            raise InvalidArgumentError("fit is True, minutes is inf; accepted: a number of minutes to fit into")
        self.steps = Steps(processor, scenes, *sizes, VariedPainter() if settings.fresh else None)
        self.before = self.steps.before.to(model.device)
        self.blocks = len(model.model.vision_tower.encoder.layer)
        kept = self.blocks - (LAST if "tower" in rates else 0)
        tower, root = model.model.vision_tower, features or self.out / "features"
        self.features = [Features(root, scenes, printed, n, tower, kept) for printed, n in self.steps.sizes]
        asked = Steps(processor, Scenes("heldout", 1), settings.checked, 4, settings.rows, settings.block)
        self.judge = Judge(asked)
        self.held_out = [Features(root, asked.scenes, printed, n, tower, kept) for printed, n in asked.sizes]
        self.run_layer = layer_runner(model.model.language_model, settings.compile_model)
        self._begin(bool(stored))

    def _begin(self, trained_before: bool) -> None:
        """The projector started where nothing was trained, masters made or continued."""
        s = self.settings
        path = self.out / f"{s.stage}.safetensors"
        if not trained_before and not path.exists() and s.start:
            self._start()
        for p in self.active.values():
            p.requires_grad_(True)
        rates = {part: rate * s.rate for part, rate in RATES[s.stage].items()}
        high = max(rates.values())
        scales = {part: rate / high for part, rate in rates.items()}
        self.adam = MasterAdamW(self.active, high, s.steps, max(1, s.steps * 3 // 100), 0.0, scales)
        if path.exists():
            self.adam.load(path)

    def _start(self) -> None:
        numbers = list(range(min(self.settings.pictures, STARTING)))
        layouts = [self.steps.scenes.layout(n, False) for n in numbers]
        labels = torch.stack([torch.from_numpy(patch_labels(one, parts.SIDE // parts.PATCH)) for one in layouts])
        words = self.words(labels.to(self.model.device)).flatten(0, 1)
        self.features[0].fill(numbers, self.settings.workers)
        shown = self.features[0].take(numbers)[:, 1:].flatten(0, 1)
        reached = start_projector(self.model.model.multi_modal_projector, shown, words, self.settings.start)
        self._record({"start": self.settings.start, "words' variance": round(reached, 3)}, print)

    @cached_property
    def words(self) -> PatchWords:
        return PatchWords(self.processor.tokenizer, self.model.get_input_embeddings().weight.detach().float())

    @property
    def step(self) -> int:
        return self.adam.steps_done

    @property
    def share(self) -> float:
        """Of the run, that is over."""
        return self.step / self.adam.total_steps

    def run(self, say: Callable[[str], None] = print) -> None:
        """Trains until the stage's steps or minutes are over, and saves."""
        s, first = self.settings, self.step
        if not s.fresh:
            for part, count in zip(self.features, self.steps.reached(s.steps)):
                part.fill(range(count), s.workers)
        began = saved = time.monotonic()
        losses, questions = [], 0
        for batch in stream(self.steps, first, sys.maxsize if s.fit else s.steps, s.workers):
            losses.append(self.train_step(batch))
            questions += len(batch.packed.kinds)
            now = time.monotonic()
            over = (self.step == s.steps and not s.fit) or now - began > 60 * s.minutes
            if s.fit:  # the schedule is one of time
                self.adam.total_steps = max(self.step, round(self.step * 60 * s.minutes / (now - began)))
            if self.step % s.say_every == 0 or over:
                rate = (self.step - first) / (now - began)
                loss = round(float(torch.stack(losses).mean()), 4)
                line = {"stage": s.stage, "step": self.step, "of": self.adam.total_steps, "loss": loss}
                line |= {"questions/s": round(questions / (now - began), 2), "pictures/s": round(rate * s.batch, 2)}
                self._record(line | {"minutes left": round((self.adam.total_steps - self.step) / rate / 60, 1)}, say)
                losses = []
            if over or now - saved > s.save_every:
                self.save()
                saved = now
            if self.step % s.check_every == 0 or over:
                self._record({"step": self.step, "held out": self.check()}, say)
            if over:
                break

    def train_step(self, batch: Step) -> Tensor:
        """One step of the optimiser; the mean loss of a question's answer, summed over its tokens, on the device."""
        features, device = self.features[batch.printed], self.model.device
        painted = batch.pictures
        kept = (
            features.take(batch.numbers) if painted is None else features.of(to_device(painted, device, painted.dtype))
        )
        visual = self.visual(kept, features.blocks)
        loss = torch.zeros((), device=device)
        if self.settings.naming and batch.labels is not None:
            loss = loss + (1 - self.share) * self.words.loss(visual, to_device(batch.labels, device, torch.int64))
        if self.share >= self.settings.naming:
            logits, packed = self.logits(visual, batch.packed)
            loss = loss + F.cross_entropy(logits.float(), packed.said, reduction="sum") / len(packed.kinds)
        loss.backward()
        self.adam.step()
        return loss.detach()

    def visual(self, kept: Tensor, blocks: int) -> Tensor:
        """[B, patches, d], projected, from features after so many blocks."""
        hidden = run_blocks(
            self.model.model.vision_tower, to_device(kept, self.model.device, kept.dtype), blocks, self.blocks
        )
        return self.model.model.multi_modal_projector(hidden[:, 1:])

    def logits(self, visual: Tensor, packed: Packed) -> tuple[Tensor, Packed]:
        """Logits [answer tokens, vocabulary] of packed questions; packed, moved."""
        there = packed.to(self.model.device)
        return answer_logits(self.model, visual, self.before, there, None, self.run_layer), there

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Share of right answers to held-out questions, by task."""
        for batch in self.judge.batches():
            kept = self.held_out[batch.printed].take(batch.numbers)
            self.judge.count(*self.logits(self.visual(kept, self.held_out[0].blocks), batch.packed))
        return self.judge.shares()

    def report(self) -> dict[str, Any]:
        """Held-out questions by task and by kind, with intervals and the blind baseline; in `report.json`, with the
        SHA-256.
        """
        self.check()
        digest = hashlib.sha256((self.out / "trained.safetensors").read_bytes()).hexdigest()
        made: dict[str, Any] = {"stage": self.settings.stage, "trained": digest}
        blind = Blind(self.steps.scenes, BLIND)
        made |= {"held out": self.judge.report(blind, by_task), "kinds": self.judge.report(blind, by_kind)}
        write_bytes(self.out / "report.json", (json.dumps(made, indent=1) + "\n").encode())
        return made

    def _record(self, line: dict[str, Any], say: Callable[[str], None]) -> None:
        text = json.dumps(line)
        say(text)
        with (self.out / "progress.jsonl").open("a") as file:
            file.write(text + "\n")

    def save(self) -> None:
        """Both files, each complete at any moment."""
        self.adam.save(self.out / f"{self.settings.stage}.safetensors")
        half = {n: self.parameters[n].detach().to(torch.bfloat16).contiguous().cpu() for n in self.leaving}
        header = {"stage": self.settings.stage, "step": str(self.step), "scale": str(ALPHA / RANK)}
        write_bytes(self.out / "trained.safetensors", save(half, metadata=header))


def finished(out: Path, stage: str, steps: int) -> bool:
    """Whether a stage has run to its end, so that a recipe run again goes to the next one."""
    path = out / f"{stage}.safetensors"
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return int(file.get_tensor("steps_done")) >= steps


def begin(out: Path, weights: Path) -> None:
    """Puts another run's weights into a folder that has none: its first stage starts from them.

    Raises:
        ModelError: as `scale_of`.
    """
    parts.scale_of(weights)
    there = out / "trained.safetensors"
    if not there.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(there, weights.read_bytes())


def load(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=(*RATES, "report", "assemble"), required=True)
    add("--out", type=Path, required=True, help="folder of the run; assemble writes its `model` there")
    add("--from", type=Path, dest="start_from", help="a `trained.safetensors` that a new run starts from")
    add("--steps", type=int, default=1500)
    add("--batch", type=int, default=4, help="pictures a step")
    add("--rows", type=int, default=768, help="tokens of questions behind each picture")
    add("--pictures", type=int, default=4000, help="pictures, whose features take 197 KB of disk each")
    add("--checked", type=int, default=48, help="held-out pictures of each check; report: of the report")
    add("--check-every", type=int, default=200, help="steps between two checks")
    add("--minutes", type=float, default=float("inf"), help="end there, to be continued")
    add("--seed", type=int, default=0, help="0 or more; another one shows other pictures")
    add("--workers", type=int, default=0, help="processes that draw pictures and questions")
    add(
        "--fresh",
        action="store_true",
        help="varied pictures, painted for each step, instead of the --pictures plain ones",
    )
    add("--naming", type=float, default=0.0, help="share of the run in which only patches are named; needs --fresh")
    add("--fit", action="store_true", help="the schedule ends with --minutes")
    add("--rate", type=float, default=1.0, help="times the learning rates, for larger batches")
    add("--start", type=int, default=1000, help="steps of the projector's start")
    add("--compile", action="store_true", help="torch.compile: a sixth less time on a CPU, once it is compiled")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    return parser.parse_args()


def main() -> None:
    args = _options()
    if args.stage == "assemble":
        shutil.copytree(parts.assembled(args.out / "trained.safetensors"), args.out / "model", dirs_exist_ok=True)
        return
    if args.start_from:
        begin(args.out, args.start_from)
    if finished(args.out, args.stage, args.steps):
        print(f"stage {args.stage} has its {args.steps} steps")
        return
    folder = parts.base()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    stage = args.stage
    if stage == "report":
        with safe_open(args.out / "trained.safetensors", "pt") as file:
            stage = file.metadata()["stage"]
    settings = Settings(
        stage,
        args.steps,
        args.batch,
        args.rows,
        args.pictures,
        args.checked,
        args.seed,
        args.minutes,
        args.workers,
        args.start,
        check_every=args.check_every,
        compile_model=args.compile,
        fresh=args.fresh,
        naming=args.naming,
        fit=args.fit,
        rate=args.rate,
    )
    trainer = Trainer(model, processor, args.out, settings)
    if args.stage == "report":
        print(json.dumps(trainer.report(), indent=1))
    else:
        trainer.run()


if __name__ == "__main__":
    try:
        main()
    except DyvteError as e:
        sys.exit(f"error: {e}")
