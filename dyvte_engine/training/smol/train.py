"""Trains smol: `python -m dyvte_engine.training.smol.train --stage align|joint --out FOLDER --minutes 9.5`.

"align" trains the projector alone; "joint" projector, tower and LoRA on every linear layer of the decoder (peft). The
folder holds `trained.safetensors`, what was trained in bfloat16, at most 50 MB and all that a later stage or a release
needs, and `state.safetensors`, weights and moments in full, for going on after a kill; both are replaced every two
minutes. A stage ends with its steps or its minutes. `--stage assemble` then writes the checkpoint folder `model`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.eval import emoji_sets as sets
from dyvte_engine.eval.compose import Painter
from dyvte_engine.files import write_bytes
from dyvte_engine.training.smol import parts
from dyvte_engine.training.smol.data import Step, stream

RANK, ALPHA = 16, 32
SAVE_EVERY = 120.0  # seconds
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATES = {"align": {"projector": 1e-3}, "joint": {"projector": 5e-4, "tower": 1e-4, "lora": 5e-4}}


@dataclass(frozen=True)
class Settings:
    """One stage: AdamW, 3 % warm-up, cosine to a tenth over `steps`."""

    stage: str
    steps: int
    batch: int = 128
    seed: int = 0
    minutes: float = 9.5
    workers: int = 0


def prepare(model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Adds LoRA to the decoder and returns every parameter that any stage trains, by a name that tells its part."""
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR)
    inject_adapter_in_model(lora, model.model.language_model)
    model.requires_grad_(False)
    trained = {f"projector.{n}": p for n, p in model.model.multi_modal_projector.named_parameters()}
    trained |= {f"tower.{n}": p for n, p in model.model.vision_tower.named_parameters() if "mask_token" not in n}
    adapters = model.model.language_model.named_parameters()
    return trained | {f"lora.{n.replace('.default', '')}": p for n, p in adapters if "lora_" in n}


class Trainer:
    """One stage of training in a folder. A stage begun before continues; a new one starts from what came last."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: Any, out: str | Path, settings: Settings):
        if settings.stage not in RATES:
            raise InvalidArgumentError(f"stage is {settings.stage!r}; accepted: {', '.join(RATES)}")
        self.model, self.processor, self.settings = model, processor, settings
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.parameters = prepare(model)
        rates = RATES[settings.stage]
        self.active = {n: p for n, p in self.parameters.items() if n.partition(".")[0] in rates}
        for p in self.active.values():
            p.requires_grad_(True)
        groups = [
            {"params": [p for n, p in self.active.items() if n.startswith(part)], "rate": rate}
            for part, rate in rates.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.step = 0
        self._resume()
        self.device = model.device
        atlases = {s: torch.from_numpy(sets.atlas(s)).to(self.device) for s in sets.TRAINING_STYLES}
        self.painter = Painter(atlases, parts.SIDE, exact=False)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (parts.MEAN, parts.STD))

    def run(self, say: Callable[[str], None] = print) -> None:
        """Trains until the stage's steps or minutes are over, and saves."""
        s, started = self.settings, time.monotonic()
        saved, mean_loss = started, 0.0
        for batch in stream(self.processor, s.seed, s.batch, self.step, s.steps, s.workers):
            loss = self.train_step(batch)
            mean_loss = loss if not mean_loss else 0.95 * mean_loss + 0.05 * loss
            now = time.monotonic()
            if self.step % 20 == 0 or self.step == s.steps:
                rate = self.step * s.batch / (now - started)
                say(json.dumps({"step": self.step, "of": s.steps, "loss": round(mean_loss, 4), "rate": round(rate, 1)}))
            if now - saved > SAVE_EVERY:
                self.save()
                saved = now
            if now - started > 60 * s.minutes:
                break
        self.save()

    def train_step(self, batch: Step) -> float:
        """One step of the optimiser; the mean loss of the answers' tokens."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self._pace()
        pictures = self.painter(batch.layouts).float().div(255)
        pixels = (pictures - self.mean) / self.std
        ids, mask, labels = (t.to(self.device) for t in (batch.ids, batch.mask, batch.labels))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = self.model.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).last_hidden_state
            answers = labels[:, 1:] != -100  # only before an answer's token: a vocabulary of logits a row is much
            logits = self.model.lm_head(hidden[:, :-1][answers])
        loss = nn.functional.cross_entropy(logits.float(), labels[:, 1:][answers])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.active.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def _pace(self) -> float:
        warm = max(1, round(0.03 * self.settings.steps))
        if self.step < warm:
            return (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.settings.steps - warm)
        return 0.55 + 0.45 * math.cos(math.pi * min(done, 1.0))

    def save(self) -> None:
        """Both files, each complete at any moment."""
        half = {n: p.detach().to(torch.bfloat16).contiguous().cpu() for n, p in self.parameters.items()}
        _write(half, self.out / "trained.safetensors", {"stage": self.settings.stage, "step": str(self.step)})
        full = {n: p.detach().contiguous().cpu() for n, p in self.parameters.items()}
        for name, p in self.active.items():
            moments = self.optimizer.state.get(p, {})
            full |= {f"{k}/{name}": moments[k].cpu() for k in ("exp_avg", "exp_avg_sq") if k in moments}
        _write(full, self.out / "state.safetensors", {"stage": self.settings.stage, "step": str(self.step)})

    def _resume(self) -> None:
        state, trained = self.out / "state.safetensors", self.out / "trained.safetensors"
        if state.exists() and _header(state).get("stage") == self.settings.stage:
            tensors = load_file(state)
            self._load(tensors)
            self.step = int(_header(state)["step"])
            for name, p in self.active.items():
                if f"exp_avg/{name}" in tensors:
                    moments = {k: tensors[f"{k}/{name}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}
        elif trained.exists():
            self._load(load_file(trained))

    def _load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[name])


def _write(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    write_bytes(path, save(tensors, metadata=header))


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def assemble(model: LlavaForConditionalGeneration, trained: dict[str, Tensor]) -> None:
    """Puts what was trained into an untrained model: tower and projector replaced, W += alpha / r * B A for LoRA."""
    with torch.no_grad():
        for part, module in (("projector", model.model.multi_modal_projector), ("tower", model.model.vision_tower)):
            for name, p in module.named_parameters():
                if f"{part}.{name}" in trained:
                    p.copy_(trained[f"{part}.{name}"])
        for name, p in model.model.language_model.named_parameters():
            a, b = (trained.get(f"lora.{name.replace('weight', f'lora_{side}.weight')}") for side in "AB")
            if a is not None and b is not None:
                p += ALPHA / RANK * (b.float() @ a.float()).to(p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*RATES, "assemble"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; assemble writes its `model` there")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    folder = parts.base()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(args.device)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if args.stage == "assemble":
        assemble(model, load_file(args.out / "trained.safetensors"))
        parts.save(model, processor, args.out / "model")
        return
    settings = Settings(args.stage, args.steps, args.batch, args.seed, args.minutes, args.workers)
    model.train()
    Trainer(model, processor, args.out, settings).run()


if __name__ == "__main__":
    main()
