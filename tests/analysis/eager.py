"""The oracle of the statistics: whole attention maps as transformers gives them, reduced in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")


def reduced(maps: Tensor, visual: Tensor, tail: int) -> list[float]:
    """maps [H, n, n] of one layer, visual bool [n], the last `tail` the text -> nine figures (docs/method.md, 7)."""
    top = maps.double().amax(0)
    n = len(top)
    text = torch.arange(n) >= n - tail
    sets = [text, visual, torch.ones(n, dtype=torch.bool)]
    weights = [
        float(top[visual][:, visual].sum(1).mean()) if visual.any() else NAN,
        float(top[text][:, visual].sum(1).mean()),
        float(top[text][:, text].sum(1).mean()),
    ]
    paper, head = [], []
    for keys in sets:
        a, p = top[text][:, keys], maps.double()[:, text][:, :, keys]
        paper.append(float(-(a * a.clamp_min(1e-300).log()).sum(1).mean()) if keys.any() else NAN)
        p = p / p.sum(-1, keepdim=True)
        head.append(float(-(p * p.clamp_min(1e-300).log()).sum(-1).mean()) if keys.any() else NAN)
    return [*weights, *paper, *head]
