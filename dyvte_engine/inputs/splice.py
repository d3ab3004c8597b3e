"""The step before layer 0: a policy may hand over fewer rows for every picture than the projector gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..models import PreparedPrompt
from ..policies import VisualTokenPolicy


def reduce_pictures(policy: VisualTokenPolicy, prompts: Sequence[PreparedPrompt]) -> Sequence[PreparedPrompt]:
    """Put what `policy.reduce` makes of each picture (an unbroken stretch of rows) in its place.

    Prompts with pictures are then shorter, and numbered without gaps from their first position.

    Raises:
        InvalidArgumentError: it made more rows, rows of another kind, or nothing is left of a prompt.
    """
    places = [_places(p) for p in prompts]
    features = [p.inputs_embeds[start:end] for p, spans in zip(prompts, places, strict=True) for start, end in spans]
    reduced = policy.reduce(features) if features else features
    if reduced is features:
        return prompts
    if len(reduced) != len(features) or not all(map(_is_shorter, reduced, features)):
        accepted = f"[V' <= V, d] for each of {len(features)} pictures [V, d]"
        raise InvalidArgumentError(f"{type(policy).__name__}.reduce gave something else; accepted: {accepted}")
    rows = iter(reduced)
    out = [
        _replaced(p, spans, [next(rows) for _ in spans]) if spans else p
        for p, spans in zip(prompts, places, strict=True)
    ]
    if not all(len(p.inputs_embeds) for p in out):
        raise InvalidArgumentError(f"{type(policy).__name__} leaves nothing of a prompt; accepted: at least one row")
    return out


def _is_shorter(new: Tensor, old: Tensor) -> bool:
    return new.dim() == 2 and new.shape[1] == old.shape[1] and len(new) <= len(old)


def _replaced(prompt: PreparedPrompt, spans: Sequence[tuple[int, int]], rows: Sequence[Tensor]) -> PreparedPrompt:
    embeds, visual, first = prompt.inputs_embeds, prompt.visual, prompt.positions[:1]
    parts, marks, done = [], [], 0
    for (start, end), new in zip(spans, rows, strict=True):
        parts += [embeds[done:start], new.to(embeds.dtype)]
        marks += [visual[done:start], torch.ones(len(new), dtype=torch.bool, device="cpu")]
        done = end
    mark = torch.cat([*marks, visual[done:]])
    return replace(
        prompt,
        inputs_embeds=torch.cat([*parts, embeds[done:]]),
        visual=mark,
        positions=first + torch.arange(len(mark), dtype=first.dtype, device=first.device),
        pictures=[len(new) for new in rows],
    )


def _places(prompt: PreparedPrompt) -> list[tuple[int, int]]:
    """First row and end of each picture."""
    rows, spans, done = prompt.visual.nonzero()[:, 0].tolist(), [], 0
    for size in prompt.pictures:
        spans.append((rows[done], rows[done] + size))
        done += size
    return spans
