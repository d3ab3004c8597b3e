"""Stage 1: the vision tower alone, taught what every patch of the generated pictures shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dyvte_engine.training.nano.model import normalise
from dyvte_engine.training.nano.scenes import IGNORE, LABEL_SIZES, LABELS
from dyvte_engine.training.optim import MasterAdamW, Progress

EVERY_PATCH = ("shape", "color", "letter")  # also learnt on empty patches; the others only on objects


class DenseTower(nn.Module):
    """A CLIP vision tower with one linear layer that reads all patch labels off its last hidden state."""

    def __init__(self, tower: nn.Module, width: int):
        super().__init__()
        self.tower = tower
        self.labels = nn.Linear(width, sum(LABEL_SIZES))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, 96, 96] -> features [B, 144, width] and label logits [B, 144, sum(LABEL_SIZES)]."""
        features = self.tower(pixels).last_hidden_state[:, 1:]
        return features, self.labels(features)


def dense_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed cross-entropies of the labels [B, 144, len(LABELS)], and each one's accuracy where it is present."""
    total, accuracy = logits.new_zeros((), dtype=torch.float32), {}
    for i, (name, part) in enumerate(zip(LABELS, logits.float().split(LABEL_SIZES, -1))):
        target = labels[..., i].long()
        used = target != IGNORE if name in EVERY_PATCH else (target != IGNORE) & (target != 0)
        losses = F.cross_entropy(part.flatten(0, 1), torch.where(used, target, 0).flatten(), reduction="none")
        # An object's patch counts as much as twelve empty ones; most of a picture is empty.
        weights = (used & (target != 0)).flatten() + (used & (target == 0)).flatten() / 12
        total = total + (losses * weights).sum() / weights.sum().clamp(min=1)
        shown = used & (target != 0)
        accuracy[name] = ((part.argmax(-1) == target) & shown).sum() / shown.sum().clamp(min=1)
    return total, accuracy


def train_tower(
    model: DenseTower,
    pictures: np.ndarray,
    labels: np.ndarray,
    folder: Path,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    device: str,
    compile_model: bool = True,
    save_every: int = 250,
    word_share: float | None = None,
) -> None:
    """Trains in place and leaves `folder/tower.safetensors`; continues from that file where it exists.

    word_share: share of each batch that shows a printed word; None takes pictures as they come.
    """
    optimiser = MasterAdamW(dict(model.named_parameters()), lr, steps, warmup=min(300, steps // 10 + 1))
    checkpoint = folder / "tower.safetensors"
    if checkpoint.exists():
        optimiser.load(checkpoint)
    forward = torch.compile(model, dynamic=False) if compile_model else model
    dtype = next(model.parameters()).dtype
    progress = Progress(steps, optimiser.steps_done, 50, batch)
    groups, sizes = [np.arange(len(pictures))], [batch]
    if word_share is not None:
        printed = (labels[..., LABELS.index("letter_index")] % IGNORE).any(1)
        groups = [np.flatnonzero(printed), np.flatnonzero(~printed)]
        sizes = [round(batch * word_share), batch - round(batch * word_share)]
    for step in range(optimiser.steps_done, steps):
        rng = np.random.default_rng([seed, 1, step])
        chosen = np.sort(np.concatenate([rng.choice(*part, replace=False) for part in zip(groups, sizes)]))
        pixels = normalise(torch.from_numpy(pictures[chosen]).to(device), dtype)
        loss, accuracy = dense_loss(forward(pixels)[1], torch.from_numpy(labels[chosen]).to(device))
        loss.backward()
        optimiser.step()
        progress(step + 1, loss=loss.detach(), **accuracy)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            optimiser.save(checkpoint)
