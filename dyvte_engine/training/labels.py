"""Exit labels of spec section 3, for all layers of a teacher-forced batch in one pass (spec section 5).

Works on the live Hugging Face language model of any LLaVA-type checkpoint; it knows decoder layers, not families.
After each layer a branch forks off that holds only the text rows, at their original positions; all live branches go
through the later layers as one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.errors import InvalidArgumentError

Rule = Literal["paper", "free-running"]
AGREEMENT, CE_SCALE = 0.99, 1.03  # spec section 3: tau and scale as the paper's code reads them


@dataclass
class Sample:
    """One prompt with its answer at the decoder's entry.

    inputs_embeds: [n, d]; visual: bool [n]; positions: int [n]; answer: int64 [A], the last A of the n tokens.
    """

    inputs_embeds: Tensor
    visual: Tensor
    positions: Tensor
    answer: Tensor

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
    whose argmax stays; ce_exit: float [B, L] and ce_full: float [B], mean cross-entropy against the answer.
    """

    pooled: dict[str, Tensor]
    agreement: Tensor
    ce_exit: Tensor
    ce_full: Tensor

    def labels(self, rule: Rule = "paper") -> Tensor:
        """bool [B, L], whether to exit. `free-running` leaves out the cross-entropy condition."""
        same = self.agreement > AGREEMENT
        return same & (self.ce_exit < CE_SCALE * self.ce_full[:, None]) if rule == "paper" else same


def exit_outcomes(language_model: Any, lm_head: Any, samples: list[Sample]) -> ExitOutcomes:
    """Runs the samples once, with a text-only branch from every layer on, and compares each branch with the full run.

    language_model: a live HF decoder with `sdpa` or `eager` attention; lm_head: d -> vocabulary.
    """
    lengths = [len(s.visual) for s in samples]
    main, main_run = (
        _pad([s.inputs_embeds for s in samples]),
        _Run(language_model, _pad([s.positions for s in samples])),
    )
    text = [(~s.visual).nonzero()[:, 0].to(main.device) for s in samples]
    text_run = _Run(language_model, _pad([s.positions[rows] for s, rows in zip(samples, text, strict=True)]))
    layers, pooled = language_model.layers, []
    branches = main.new_empty(0, len(samples), text_run.positions.shape[1], main.shape[2])  # [E, B, t, d]
    for index, layer in enumerate(layers):
        if len(branches):
            branches = text_run(layer, branches.flatten(0, 1)).view_as(branches)
        main = main_run(layer, main)
        pooled.append(_pool(main, samples))
        if index + 1 < len(layers):
            fork = _pad([rows[chosen] for rows, chosen in zip(main, text, strict=True)])
            branches = torch.cat([branches, fork[None]])
    answers = [s.answer for s in samples]
    head = lambda rows: lm_head(language_model.norm(rows)).float()  # noqa: E731
    full_tokens, ce_full = _judge(head, main[None], lengths, answers)
    exit_tokens, ce_exit = _judge(head, branches, [len(rows) for rows in text], answers)
    same = [(e == f).float().mean(1) for e, f in zip(exit_tokens, full_tokens, strict=True)]  # B tensors [L-1]
    # Leaving after the last layer changes nothing: its column is the full run itself.
    agreement = F.pad(torch.stack(same), (0, 1), value=1.0)
    return ExitOutcomes(
        {name: torch.stack([p[name] for p in pooled], 1) for name in pooled[0]},
        agreement,
        torch.cat([ce_exit, ce_full]).T,
        ce_full[0],
    )


class _Run:
    """Carries right-padded rows at positions int64 [B, m] through decoder layers; no true row sees padding."""

    def __init__(self, language_model: Any, positions: Tensor):
        self.language_model, self.positions = language_model, positions.long()

    def __call__(self, layer: Any, hidden: Tensor) -> Tensor:
        """hidden [k * B, m, d] -> the same, one layer on."""
        m, copies = hidden.shape[1], len(hidden) // len(self.positions)
        positions = self.positions.repeat(copies, 1)
        mask = torch.full((m, m), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device).triu(1)
        output = layer(
            hidden,
            attention_mask=mask.expand(len(hidden), 1, m, m),
            position_ids=positions,
            position_embeddings=self.language_model.rotary_emb(hidden, positions),
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


def _judge(head: Any, hidden: Tensor, ends: list[int], answers: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Argmax tokens, for each sample int64 [X, A], and mean cross-entropies [X, B].

    hidden: [X, B, m, d], the last layer's rows of X variants; ends: true rows of each sample, its answer last.
    """
    tokens, losses = [], []
    for b, (end, answer) in enumerate(zip(ends, answers, strict=True)):
        logits = head(hidden[:, b, end - len(answer) - 1 : end - 1])  # [X, A, vocabulary]
        target = answer.to(logits.device).repeat(len(logits))
        loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
        losses.append(loss.view(len(logits), -1).mean(1))
        tokens.append(logits.argmax(-1))
    return tokens, torch.stack(losses, 1)
