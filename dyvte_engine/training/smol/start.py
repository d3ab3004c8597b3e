"""A start for the projector, without the decoder: each patch says in words what it shows, and where.

A patch on a dog on a red tile in the upper left becomes the sum of the embeddings of " dog", " red", " left", " top";
one on a printed A says " A".
The decoder then reads the picture as such words from the first step on; all is learnt further.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyvte_engine.eval.emoji import COLORS
from dyvte_engine.training.smol.data import NAMED

AXES = (("left", "right"), ("top", "bottom"))
SHARP = 10.0  # of a word's likeness to a patch, from 0 to 1, in the choice among all
PLACE = 0.5  # of an axis' words, against 1 for what is there
RATE, BATCH = 2e-3, 2048


def _words(tokenizer: Any, embeddings: Tensor, words: tuple[str, ...] | list[str]) -> Tensor:
    """[len(words), d]: the mean of each word's token embeddings, without what all tokens share, at length 1."""
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    rows = torch.stack([embeddings[i].mean(0) for i in ids]) - embeddings.mean(0)
    return F.normalize(rows, dim=-1)


class PatchWords:
    """What patches should say, in a decoder's embeddings [vocabulary, d], float32, on their device."""

    def __init__(self, tokenizer: Any, embeddings: Tensor):
        nothing = torch.zeros(1, embeddings.shape[1], device=embeddings.device)
        self.nouns, self.colors = (
            torch.cat([_words(tokenizer, embeddings, list(words)), nothing]) for words in (NAMED, COLORS)
        )
        self.axes = [_words(tokenizer, embeddings, words) for words in AXES]
        self.usual = embeddings.mean(0)
        self.length = (embeddings - self.usual).norm(dim=1).median()

    def __call__(self, labels: Tensor) -> Tensor:
        """float32 [..., patches, d], as far from the mean embedding as words are.

        labels: int64 [..., patches, 2], as `patch_labels` gives them.
        """
        grid = round(labels.shape[-2] ** 0.5)
        ramp = torch.linspace(0, 1, grid, device=labels.device)
        y, x = torch.meshgrid(ramp, ramp, indexing="ij")
        places = 0.0
        for (low, high), at in zip(self.axes, (x, y)):
            along = at.flatten()[:, None]
            places = places + low * (1 - along) + high * along
        said = self.nouns[labels[..., 0]] + self.colors[labels[..., 1]] + PLACE * places
        return self.usual + said * self.length

    def loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """How far visual tokens [B, patches, d] are from saying this, and from naming the thing of all things."""
        words, said = self(labels), visual.float()
        far = (said - words).square().mean() / (words - words.mean((0, 1))).square().mean()
        likeness = SHARP * (said - self.usual) / self.length @ self.nouns[:-1].T
        named = F.cross_entropy(likeness.flatten(0, 1), labels[..., 0].flatten(), ignore_index=-1, reduction="sum")
        return far + named / (labels[..., 0] >= 0).sum().clamp(min=1)


def start_projector(projector: nn.Module, features: Tensor, words: Tensor, steps: int) -> float:
    """Fits a LLaVA projector to say `words` [patches, d] for `features` [patches, e]; the share of variance reached.

    Half of each batch shows something. The first layer reads standardised features; that is folded into its weights.
    """
    device = next(projector.parameters()).device
    wide, words = features.to(device).float(), words.to(device)
    mean, std = wide.mean(0), wide.std(0).clamp(min=1e-4)
    width = words.shape[1]
    first, second = nn.Linear(features.shape[1], width).to(device), nn.Linear(width, width).to(device)
    adam = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=RATE, weight_decay=1e-3)
    pace = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps)
    apart = (words - words.mean(0)).norm(dim=1)
    shown = (apart > apart.median()).nonzero().flatten().cpu()  # tiles and sprites add words
    generator = torch.Generator().manual_seed(0)
    spread, error = (words - words.mean(0)).square().mean(), torch.zeros((), device=device)
    for _ in range(steps):
        some = torch.randint(len(features), (BATCH // 2,), generator=generator)
        more = shown[torch.randint(len(shown), (BATCH // 2,), generator=generator)]
        chosen = torch.cat([some, more]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            said = second(F.gelu(first((wide[chosen] - mean) / std)))
        error = F.mse_loss(said.float(), words[chosen])
        (error / spread).backward()
        adam.step()
        adam.zero_grad()
        pace.step()
    with torch.no_grad():
        first.bias.sub_((first.weight / std) @ mean)
        first.weight.div_(std)
        for part, fitted in ((projector.linear_1, first), (projector.linear_2, second)):
            part.load_state_dict(fitted.state_dict())
    return 1 - float(error.detach() / spread)
