"""Stage 2: tower, projector and decoder together, several questions behind each picture, loss on the answers.

The tower keeps learning the patch labels meanwhile; the answers' loss reaches it only later, because the gradients of
a decoder that has just begun disturb it.

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
from transformers import LlavaForConditionalGeneration

from dyvte_engine.training.nano.model import normalise
from dyvte_engine.training.nano.packing import BLOCK, PREFIX, EncodedQuestions
from dyvte_engine.training.nano.questions import KINDS
from dyvte_engine.training.nano.tower import DenseTower, dense_loss
from dyvte_engine.training.optim import MasterAdamW, Progress
from dyvte_engine.training.packing import Packed, answer_logits, layer_runner, pack, right_questions


@dataclass
class JointSettings:
    """Lengths and rates of stage 2; `shares` are those of the sources, in any unit."""

    seed: int
    steps: int
    batch: int
    lr: float
    device: str
    rows: int = 144
    shares: tuple[float, ...] = (0.8, 0.2)
    exit_share: float = 0.7
    exit_range: tuple[int, int] = (3, 10)
    label_pictures: int = 16  # pictures a step that only the tower sees, for their patch labels
    tower_joins: float = 0.6  # share of the steps after which the answers' loss reaches the tower
    compile_model: bool = True
    save_every: int = 200
    worker: int = 0  # of several that average their gradients; the first one saves and prints


@dataclass
class Source:
    """Pictures uint8 [P, 96, 96, 3], patch labels uint8 [P, 144, len(LABELS)] (IGNORE if unknown), questions.

    Only the pictures with an index in `members` are drawn.
    """

    pictures: np.ndarray
    labels: np.ndarray
    questions: EncodedQuestions
    members: np.ndarray

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, list]:
        chosen = np.sort(rng.choice(self.members, count, replace=False))
        asked = []
        for picture in chosen:
            order = rng.permutation(np.arange(*self.questions.picture_start[picture : picture + 2]))
            asked.append([self.questions.question(i) for i in order])
        return self.pictures[chosen], self.labels[chosen], asked


@dataclass
class Batch:
    """One step: pictures and their patch labels, questions packed behind the first of them, and the last layer that
    sees the pictures (None: all layers do)."""

    pictures: torch.Tensor
    labels: torch.Tensor
    packed: Packed
    exit_layer: int | None


def draw_batch(sources: list[Source], settings: JointSettings, step: int) -> Batch:
    """The batch of one step; depends on the seed, the step and the worker alone."""
    rng = np.random.default_rng([settings.seed, 2, step, *([settings.worker] if settings.worker else [])])
    shares = np.array(settings.shares) / sum(settings.shares)
    drawn = [source.draw(rng, count) for source, count in zip(sources, rng.multinomial(settings.batch, shares))]
    labelled = rng.multinomial(settings.label_pictures, shares)
    drawn += [(*source.draw(rng, count)[:2], []) for source, count in zip(sources, labelled)]
    pictures, labels, asked = zip(*drawn)
    exit_layer = None
    if rng.random() < settings.exit_share:
        exit_layer = int(rng.integers(settings.exit_range[0], settings.exit_range[1] + 1))
    packed = pack([questions for part in asked for questions in part], settings.rows, PREFIX, BLOCK)
    device = settings.device
    return Batch(
        torch.from_numpy(np.concatenate(pictures)).to(device),
        torch.from_numpy(np.concatenate(labels)).to(device),
        packed.to(device),
        exit_layer,
    )


def right_answers(logits: torch.Tensor, packed: Packed) -> dict[str, torch.Tensor]:
    """Share of each kind's answers of which every token is the likeliest; kinds that were not asked are left out."""
    right = right_questions(logits, packed)
    return {KINDS[kind]: right[packed.kinds == kind].float().mean() for kind in packed.kinds.unique().tolist()}


def train_joint(
    model: LlavaForConditionalGeneration,
    dense: DenseTower,
    sources: list[Source],
    prefix_ids: torch.Tensor,
    settings: JointSettings,
    folder: Path,
    on_save: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains `model` and `dense` (around its tower) in place; resumes from `folder/joint.safetensors`."""
    parameters = dict(model.named_parameters())
    parameters |= {f"labels.{name}": p for name, p in dense.labels.named_parameters()}
    optimiser = MasterAdamW(
        parameters, settings.lr, settings.steps, min(300, settings.steps // 10 + 1), scales={"model.vision_tower": 0.3}
    )
    checkpoint = folder / "joint.safetensors"
    if checkpoint.exists():
        optimiser.load(checkpoint)
    run_layer = layer_runner(model.model.language_model, settings.compile_model)
    look = torch.compile(dense, dynamic=False) if settings.compile_model else dense
    prefix_ids = prefix_ids.to(settings.device)
    progress = Progress(settings.steps, optimiser.steps_done, 50, settings.batch)
    for step in range(optimiser.steps_done, settings.steps):
        batch = draw_batch(sources, settings, step)
        features, label_logits = look(normalise(batch.pictures, model.dtype))
        features = features[: len(batch.packed.ids)]
        if step < settings.tower_joins * settings.steps:
            features = features.detach()
        visual = model.model.multi_modal_projector(features)
        logits = answer_logits(model, visual, prefix_ids, batch.packed, batch.exit_layer, run_layer).float()
        targets = batch.packed.targets[batch.packed.targets >= 0]
        # For each question, not for each token: the one token that decides would drown among those of sentences.
        loss = F.cross_entropy(logits, targets, reduction="sum") / len(batch.packed.kinds)
        label_loss, accuracy = dense_loss(label_logits, batch.labels)
        (loss + label_loss).backward()
        optimiser.step()
        shown = {"labels": label_loss.detach(), "letters": accuracy["letter"]} if settings.label_pictures else {}
        if settings.worker:
            continue
        progress(step + 1, loss=loss.detach(), **shown, **right_answers(logits, batch.packed))
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            optimiser.save(checkpoint)
            on_save(step + 1)
