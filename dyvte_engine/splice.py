"""The step before layer 0: a policy may hand over fewer rows for every picture than the projector gave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .policies import VisualTokenPolicy

Sequences = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def runs(visual: Tensor) -> list[int]:
    """bool [n], on the host -> lengths of the unbroken stretches of visual rows."""
    edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]


def reduce_pictures(
    policy: VisualTokenPolicy,
    embeds: Sequence[Tensor],
    visual: Sequence[Tensor],
    positions: Sequence[Tensor],
    pictures: Sequence[Sequence[int]],
) -> Sequences:
    """Put what `policy.reduce` makes of each picture in its place.

    For each sequence embeds [n, d], visual bool [n] on the host, positions int32 [n] and the rows of each of its
    pictures (each an unbroken stretch). Returns the three, shorter; sequences with pictures are then numbered without
    gaps from their first position.
    """
    places = [_places(v, sizes) for v, sizes in zip(visual, pictures, strict=True)]
    features = [e[start:end] for e, spans in zip(embeds, places, strict=True) for start, end in spans]
    reduced = policy.reduce(features) if features else features
    if reduced is features:
        return embeds, visual, positions
    rows = iter(reduced)
    out: list[tuple[Tensor, Tensor, Tensor]] = []
    for e, v, p, spans in zip(embeds, visual, positions, places, strict=True):
        parts, marks, done = [], [], 0
        for start, end in spans:
            new = next(rows)
            parts += [e[done:start], new.to(e.dtype)]
            marks += [v[done:start], torch.ones(len(new), dtype=torch.bool)]
            done = end
        mark = torch.cat([*marks, v[done:]])
        numbers = p[:1] + torch.arange(len(mark), dtype=p.dtype, device=p.device) if spans else p
        out.append((torch.cat([*parts, e[done:]]), mark, numbers))
    short = tuple(zip(*out, strict=True))
    return short[0], short[1], short[2]


def _places(visual: Tensor, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """First row and end of each picture."""
    rows, spans, done = visual.nonzero()[:, 0].tolist(), [], 0
    for size in sizes:
        spans.append((rows[done], rows[done] + size))
        done += size
    return spans
