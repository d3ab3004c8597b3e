"""Stage 2: tower, projector and decoder together, several questions behind each picture, loss on the answers.

In a random share of the steps the text rows lose the visual rows after a random layer, so that what a question needs
from the picture moves into the text early enough for an exit in mid-depth to be possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import LlavaForConditionalGeneration

from dyvte_engine.training.nano.model import normalise
from dyvte_engine.training.nano.optim import MasterAdamW, Progress
from dyvte_engine.training.nano.packing import PREFIX, VISUAL, EncodedQuestions, Packed, pack


def layer_runner(template: nn.Module, compile_model: bool) -> Callable:
    """Runs any decoder layer through one (compiled) forward: `run(layer, hidden, mask, cos, sin)`."""

    def forward(weights: dict, hidden: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        output = functional_call(template, weights, (hidden,), {"attention_mask": mask, "position_embeddings": (cos, sin)})
        return output[0] if isinstance(output, tuple) else output

    compiled = torch.compile(forward, dynamic=False) if compile_model else forward
    return lambda layer, *inputs: compiled(dict(layer.named_parameters()), *inputs)


def answer_logits(
    model: LlavaForConditionalGeneration,
    visual: torch.Tensor,
    prefix_ids: torch.Tensor,
    packed: Packed,
    exit_layer: int | None,
    run_layer: Callable,
) -> torch.Tensor:
    """Logits [answer tokens, vocabulary] of a packed batch.

    visual: [B, 144, d] projected features; prefix_ids: int64 [2]; exit_layer: the last layer that sees the visual rows.
    """
    decoder = model.model.language_model
    batch = visual.shape[0]
    hidden = torch.cat(
        [decoder.embed_tokens(prefix_ids).expand(batch, -1, -1), visual, decoder.embed_tokens(packed.ids)], 1
    )
    cos, sin = decoder.rotary_emb(hidden, packed.positions)
    mask = torch.zeros(packed.mask.shape, dtype=hidden.dtype, device=hidden.device)
    mask.masked_fill_(~packed.mask, torch.finfo(hidden.dtype).min)
    text = torch.cat([torch.arange(2), torch.arange(PREFIX, hidden.shape[1])]).to(hidden.device)
    for index, layer in enumerate(decoder.layers):
        hidden = run_layer(layer, hidden, mask, cos, sin)
        if index == exit_layer:
            hidden, cos, sin = hidden[:, text], cos[:, text], sin[:, text]
            mask = mask[:, :, text][..., text]
    rows = hidden[:, -packed.ids.shape[1] :][packed.targets >= 0]
    return model.lm_head(decoder.norm(rows))


@dataclass
class JointSettings:
    """Lengths and rates of stage 2; `shares` says how often each source is drawn."""

    seed: int
    steps: int
    batch: int
    lr: float
    device: str
    rows: int = 144
    shares: tuple[float, ...] = (0.8, 0.2)
    exit_share: float = 0.5
    exit_range: tuple[int, int] = (3, 10)
    tower_from: float = 1.1  # share of the steps after which the tower learns as well; above 1: never
    compile_model: bool = True
    save_every: int = 200


@dataclass
class Source:
    """Pictures uint8 [P, 96, 96, 3] and their questions."""

    pictures: np.ndarray
    questions: EncodedQuestions

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, list]:
        chosen = np.sort(rng.choice(len(self.pictures), count, replace=False))
        asked = []
        for picture in chosen:
            order = rng.permutation(np.arange(*self.questions.picture_start[picture : picture + 2]))
            asked.append([self.questions.question(i) for i in order])
        return self.pictures[chosen], asked


def draw_batch(sources: list[Source], settings: JointSettings, step: int) -> tuple[torch.Tensor, Packed, int | None]:
    """Pictures, packed questions and the exit layer of one step; depends on the seed and the step alone."""
    rng = np.random.default_rng([settings.seed, 2, step])
    counts = rng.multinomial(settings.batch, settings.shares)
    drawn = [source.draw(rng, count) for source, count in zip(sources, counts)]
    pictures = torch.from_numpy(np.concatenate([part[0] for part in drawn]))
    exit_layer = None
    if rng.random() < settings.exit_share:
        exit_layer = int(rng.integers(settings.exit_range[0], settings.exit_range[1] + 1))
    return pictures, pack([questions for part in drawn for questions in part[1]], settings.rows), exit_layer


def train_joint(
    model: LlavaForConditionalGeneration,
    sources: list[Source],
    prefix_ids: torch.Tensor,
    settings: JointSettings,
    folder: Path,
    on_save: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains in place and leaves `folder/joint.safetensors`; continues from that file where it exists."""
    device, dtype = settings.device, model.dtype
    optimiser = MasterAdamW(dict(model.named_parameters()), settings.lr, settings.steps, min(300, settings.steps // 10 + 1))
    checkpoint = folder / "joint.safetensors"
    if checkpoint.exists():
        optimiser.load(checkpoint)
    run_layer = layer_runner(model.model.language_model.layers[0], settings.compile_model)
    tower = torch.compile(model.model.vision_tower, dynamic=False) if settings.compile_model else model.model.vision_tower
    prefix_ids = prefix_ids.to(device)
    progress = Progress(settings.steps, optimiser.steps_done, 50, settings.batch)
    for step in range(optimiser.steps_done, settings.steps):
        pictures, packed, exit_layer = draw_batch(sources, settings, step)
        packed = packed.to(device)
        with torch.set_grad_enabled(step >= settings.tower_from * settings.steps):
            features = tower(normalise(pictures.to(device), dtype)).last_hidden_state[:, 1:]
        visual = model.model.multi_modal_projector(features)
        logits = answer_logits(model, visual, prefix_ids, packed, exit_layer, run_layer).float()
        targets = packed.targets[packed.targets >= 0]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        optimiser.step()
        right = (logits.argmax(-1) == targets).float().mean()
        progress(step + 1, loss=loss.detach(), token_accuracy=right)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            optimiser.save(checkpoint)
            on_save(step + 1)
