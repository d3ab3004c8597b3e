"""Exit labels (docs/method.md section 3), for all layers of a teacher-forced batch in one pass (section 5 there).

Works on the live Hugging Face language model of any family that the engine runs; it knows decoder layers, not families.
After each layer a branch forks off that holds only the text rows, at their original positions; all live branches go
through the later layers as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.models.rotary import layer_rotations

LOGITS_AT_ONCE = 1 << 26  # of all branches of a sample; bounds the memory of the vocabulary


@dataclass
class Sample:
    """One prompt with its answer at the decoder's entry.

    inputs_embeds: [n, d]; visual: bool [n]; positions: int [n]; answer: int64 [A], the last A of the n tokens.
    rotations: f32 [n, rot_dim] where positions have several axes; additions: [n, d] each, what is added to the visual
    rows leaving the first layers (deepstack), zero in text rows. All samples of a batch have these, or none has.
    """

    inputs_embeds: Tensor
    visual: Tensor
    positions: Tensor
    answer: Tensor
    rotations: Tensor | None = None
    additions: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        n = len(self.visual)
        if not len(self.inputs_embeds) == len(self.positions) == n:
            raise InvalidArgumentError("inputs_embeds, visual and positions differ in length")
        if not self.visual.any():
            raise InvalidArgumentError("visual marks no token; exit labels need a picture")
        if not 0 < len(self.answer) < n - self.tail_start:
            raise InvalidArgumentError(
                f"answer has {len(self.answer)} tokens; accepted: at least 1, and a prompt token after the picture"
            )

    @property
    def tail_start(self) -> int:
        """First row after the last visual token."""
        return int(self.visual.nonzero()[-1]) + 1


@dataclass
class ExitOutcomes:
    """What an exit at each layer does to each of B samples.

    pooled: {state: [B, L, d]}, the heads' inputs leaving each layer; agreement: float [B, L], share of answer positions
    whose argmax stays; ce_exit: float [B, L] and ce_full: float [B], mean cross-entropy against the answer;
    kl: float [B, L], KL(full || exit) of the next-token distributions, mean over the answer positions, in nats.
    """

    pooled: dict[str, Tensor]
    agreement: Tensor
    ce_exit: Tensor
    ce_full: Tensor
    kl: Tensor


def exit_outcomes(language_model: Any, lm_head: Any, samples: list[Sample]) -> ExitOutcomes:
    """Runs the samples once, with a text-only branch from every layer on, and compares each branch with the full run.

    language_model: a live HF decoder with `sdpa` or `eager` attention; lm_head: d -> vocabulary.
    """
    lengths = [len(s.visual) for s in samples]
    main = _pad([s.inputs_embeds for s in samples])
    text = [(~s.visual).nonzero()[:, 0].to(main.device) for s in samples]
    main_run = _Run(language_model, samples, [torch.arange(n, device=main.device) for n in lengths])
    text_run = _Run(language_model, samples, text)
    additions = [_pad(list(added)) for added in zip(*(s.additions for s in samples), strict=True)]
    layers, pooled = language_model.layers, []
    branches = main.new_empty(0, len(samples), text_run.positions.shape[1], main.shape[2])  # [E, B, t, d]
    for index, layer in enumerate(layers):
        if len(branches):
            branches = text_run(layer, branches.flatten(0, 1)).view_as(branches)
        main = main_run(layer, main)
        if index < len(additions):
            main = main + additions[index]
        pooled.append(_pool(main, samples))
        if index + 1 < len(layers):
            fork = _pad([rows[chosen] for rows, chosen in zip(main, text, strict=True)])
            branches = torch.cat([branches, fork[None]])
    head = lambda rows: lm_head(language_model.norm(rows)).float()  # noqa: E731
    judged = [
        _judge(head, _answer_rows(main[b], lengths[b], s), _answer_rows(branches[:, b], len(text[b]), s), s.answer)
        for b, s in enumerate(samples)
    ]
    agreement, ce_exit, kl, ce_full = (torch.stack(column) for column in zip(*judged, strict=True))
    # Leaving after the last layer changes nothing: its column is the full run itself.
    return ExitOutcomes(
        {name: torch.stack([p[name] for p in pooled], 1) for name in pooled[0]},
        F.pad(agreement, (0, 1), value=1.0),
        torch.cat([ce_exit, ce_full[:, None]], 1),
        ce_full,
        F.pad(kl, (0, 1)),
    )


class _Run:
    """Carries the `rows` of every sample, padded on the right, through decoder layers; no true row sees padding."""

    def __init__(self, language_model: Any, samples: list[Sample], rows: list[Tensor]):
        self.language_model, self.turned = language_model, None
        self.positions = _pad([s.positions[r] for s, r in zip(samples, rows, strict=True)]).long()  # [B, m]
        turned = [s.rotations[r] for s, r in zip(samples, rows, strict=True) if s.rotations is not None]
        if turned:
            self.turned = layer_rotations(language_model, _pad(turned))

    def __call__(self, layer: Any, hidden: Tensor) -> Tensor:
        """hidden [k * B, m, d] -> the same, one layer on."""
        m, copies = hidden.shape[1], len(hidden) // len(self.positions)
        positions = self.positions.repeat(copies, 1)
        if self.turned is None:
            rotation = self.language_model.rotary_emb(hidden, positions)
        else:
            cos, sin = (t.to(hidden.dtype) for t in self.turned)
            rotation = torch.cat([cos] * copies, dim=-3), torch.cat([sin] * copies, dim=-3)
        mask = torch.full((m, m), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device).triu(1)
        output = layer(
            hidden,
            attention_mask=mask.expand(len(hidden), 1, m, m),
            position_ids=positions,
            position_embeddings=rotation,
        )
        return output[0] if isinstance(output, tuple) else output


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _pool(hidden: Tensor, samples: list[Sample]) -> dict[str, Tensor]:
    """The four token states of section 1, float32 [B, d] each."""
    states: dict[str, list[Tensor]] = {"mean_visual": [], "last_visual": [], "mean_text": [], "last_text": []}
    for rows, s in zip(hidden.float(), samples, strict=True):
        visual = rows[: len(s.visual)][s.visual]
        text = rows[s.tail_start : len(s.visual) - len(s.answer)]
        states["mean_visual"].append(visual.mean(0))
        states["last_visual"].append(visual[-1])
        states["mean_text"].append(text[: max(1, len(text) - 1)].mean(0))
        states["last_text"].append(text[-1])
    return {name: torch.stack(values) for name, values in states.items()}


def _answer_rows(hidden: Tensor, end: int, sample: Sample) -> Tensor:
    """hidden [..., m, d] with `end` true rows, the answer last -> [..., A, d], the rows that predict it."""
    return hidden[..., end - len(sample.answer) - 1 : end - 1, :]


def _judge(head: Any, full: Tensor, exits: Tensor, answer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """full [A, d], exits [E, A, d], answer int64 [A] -> agreement, ce_exit and kl [E], and ce_full, a scalar."""
    answer = answer.to(full.device)
    reference = head(full).log_softmax(-1)  # [A, vocabulary]
    at_once = max(1, LOGITS_AT_ONCE // reference.numel())
    columns: list[tuple[Tensor, Tensor, Tensor]] = [(full.new_empty(0, dtype=torch.float32),) * 3]
    for part in exits.split(at_once):
        own = head(part).log_softmax(-1)  # [e, A, vocabulary]
        same = (own.argmax(-1) == reference.argmax(-1)).float().mean(1)
        ce = -own.gather(-1, answer.expand(len(own), -1)[..., None])[..., 0].mean(1)
        kl = (reference.exp() * (reference - own)).sum(-1).mean(1)
        columns.append((same, ce, kl))
    agreement, ce_exit, kl = (torch.cat(column) for column in zip(*columns, strict=True))
    return agreement, ce_exit, kl, F.nll_loss(reference, answer)
