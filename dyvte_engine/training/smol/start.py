"""A start for the projector, without the decoder: each patch says in words what it shows, and where.

A patch on a dog on a red tile in the upper left becomes the sum of the embeddings of " dog", " red", " left", " top".
The decoder then reads the picture as such words from the first step on; all is learnt further.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyvte_engine.eval.emoji import COLORS
from dyvte_engine.eval.emoji_sets import NOUNS

AXES = (("left", "right"), ("top", "bottom"))
PLACE = 0.5  # of an axis' words, against 1 for what is there
RATE, BATCH = 2e-3, 2048


def _words(tokenizer: Any, embeddings: Tensor, words: tuple[str, ...] | list[str]) -> Tensor:
    """[len(words), d]: the mean of each word's token embeddings, without what all tokens share, at length 1."""
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    rows = torch.stack([embeddings[i].mean(0) for i in ids]) - embeddings.mean(0)
    return F.normalize(rows, dim=-1)


def patch_words(tokenizer: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    """What each patch should say: float32 [..., patches, d], as far from the mean embedding as words are.

    labels: int64 [..., patches, 2], as `patch_labels` gives them.
    """
    nothing = torch.zeros(1, embeddings.shape[1])
    noun, color = (
        torch.cat([_words(tokenizer, embeddings, words), nothing])[labels[..., i]]
        for i, words in enumerate((list(NOUNS), list(COLORS)))
    )
    grid = round(labels.shape[-2] ** 0.5)
    ramp = torch.linspace(0, 1, grid)
    y, x = torch.meshgrid(ramp, ramp, indexing="ij")
    places = 0.0
    for words, at in zip(AXES, (x, y)):
        low, high = _words(tokenizer, embeddings, words)
        along = at.flatten()[:, None]
        places = places + low * (1 - along) + high * along
    usual = embeddings.mean(0)
    return usual + (noun + color + PLACE * places) * (embeddings - usual).norm(dim=1).median()


def start_projector(projector: nn.Module, features: Tensor, words: Tensor, steps: int) -> float:
    """Fits a LLaVA projector to say `words` [patches, d] for `features` [patches, e]; the share of variance reached.

    Half of each batch shows something. The first layer reads standardised features; that is folded into its weights.
    """
    wide = features.float()
    mean, std = wide.mean(0), wide.std(0).clamp(min=1e-4)
    width = words.shape[1]
    first, second = nn.Linear(features.shape[1], width), nn.Linear(width, width)
    adam = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=RATE, weight_decay=1e-3)
    pace = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps)
    apart = (words - words.mean(0)).norm(dim=1)
    shown = (apart > apart.median()).nonzero().flatten()  # tiles and sprites add words
    generator = torch.Generator().manual_seed(0)
    spread, error = (words - words.mean(0)).square().mean(), torch.tensor(0.0)
    for _ in range(steps):
        some = torch.randint(len(features), (BATCH // 2,), generator=generator)
        more = shown[torch.randint(len(shown), (BATCH // 2,), generator=generator)]
        chosen = torch.cat([some, more])
        with torch.autocast("cpu", torch.bfloat16):
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
