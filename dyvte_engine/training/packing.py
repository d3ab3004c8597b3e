"""Several questions behind one picture in one row of tokens, none of which can see another.

A packed row is a prefix, which ends with the picture, and then, one after another, questions with their answers; every
question starts again at the position after the prefix and attends to the prefix and to itself only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from transformers import AttentionInterface, LlavaForConditionalGeneration


class Encoded(NamedTuple):
    """Token ids of one question and its answer, where the answer begins, and a number for the question's kind."""

    ids: np.ndarray
    answer: int
    kind: int


@dataclass
class Packed:
    """The text part of a batch, B rows of R tokens; only tokens of one block of K can belong together."""

    ids: torch.Tensor  # int64 [B, R]
    positions: torch.Tensor  # int64 [B, P + R]
    mask: torch.Tensor  # bool [B, R / K, K, K], True = may look; the prefix is seen by all
    targets: torch.Tensor  # int64 [B, R]: the next token where it belongs to an answer, else -100
    owner: torch.Tensor  # int64 [B, R]: index of the token's question among `kinds`
    kinds: torch.Tensor  # int64 [questions]: kinds of the packed questions

    def to(self, device: str) -> Packed:
        return Packed(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(batch: list[list[Encoded]], rows: int, prefix: int, block: int) -> Packed:
    """Packs each picture's questions into `rows` tokens (a multiple of `block`), leaving out what does not fit.

    No question goes over the border of a block, so that attention among questions costs `block` scores a token.
    prefix: P, the length of what comes before them.
    """
    ids = np.zeros((len(batch), rows), np.int64)
    segment, offset, owner = np.zeros_like(ids), np.zeros_like(ids), np.zeros_like(ids)
    targets = np.full_like(ids, -100)
    kinds: list[int] = []
    for b, questions in enumerate(batch):
        used = np.zeros(rows // block, np.int64)
        for number, (tokens, answer, kind) in enumerate(questions, 1):
            place = int(np.argmax(used + len(tokens) <= block))
            at = place * block + used[place]
            end = at + len(tokens)
            if used[place] + len(tokens) > block:
                continue
            ids[b, at:end], segment[b, at:end], offset[b, at:end] = tokens, number, np.arange(len(tokens))
            targets[b, at + answer - 1 : end - 1] = tokens[answer:]
            owner[b, at:end] = len(kinds)
            kinds.append(int(kind))
            used[place] += len(tokens)
    before = np.broadcast_to(np.arange(prefix), (len(batch), prefix))
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(np.concatenate([before, offset + prefix], 1)),
        _mask(torch.from_numpy(segment).view(len(batch), -1, block)),
        torch.from_numpy(targets),
        torch.from_numpy(owner),
        torch.tensor(kinds),
    )


def _mask(segment: torch.Tensor) -> torch.Tensor:
    same = segment[..., :, None] == segment[..., None, :]
    return same & torch.ones(segment.shape[-1], segment.shape[-1], dtype=torch.bool).tril()


def _split_attention(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float = 1.0,
    prefix: int = 0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention of a packed batch: no scores are computed that the packing rules out anyway.

    The first `prefix` rows are causal among themselves; the R others see all of those and, by `mask`, their own block.
    q [B, Hq, S, D], k and v [B, Hkv, S, D]; mask [B, 1, R / K, K, K] is added; returns [B, S, Hq, D].
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    (q_first, q_text), (k_first, k_text), (v_first, v_text) = (
        (x[:, :, :prefix], x[:, :, prefix:].unflatten(2, (-1, mask.shape[-1]))) for x in (q, k, v)
    )
    causal = torch.ones(prefix, prefix, dtype=torch.bool, device=q.device).tril()
    scores = (q_first @ k_first.transpose(-1, -2)).float() * scaling
    first = scores.masked_fill(~causal, -torch.inf).softmax(-1).to(q.dtype) @ v_first
    own = (q_text @ k_text.transpose(-1, -2)).float() * scaling + mask
    shown = (q_text.flatten(2, 3) @ k_first.transpose(-1, -2)).float() * scaling
    weights = torch.cat([shown.view(*own.shape[:-1], prefix), own], -1).softmax(-1).to(q.dtype)
    text = (weights[..., prefix:] @ v_text).flatten(2, 3) + weights[..., :prefix].flatten(2, 3) @ v_first
    return torch.cat([first, text], 2).transpose(1, 2), None


AttentionInterface.register("prefix_split", _split_attention)


def layer_runner(decoder: Any, compile_model: bool) -> Callable:
    """Runs any layer of the decoder through one (compiled) forward: `run(layer, hidden, mask, cos, sin, prefix)`."""
    decoder.config._attn_implementation = "prefix_split"
    template = decoder.layers[0]

    def forward(
        weights: dict, hidden: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prefix: int
    ) -> torch.Tensor:
        extra = {"attention_mask": mask, "position_embeddings": (cos, sin), "prefix": prefix}
        output = functional_call(template, weights, (hidden,), extra)
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

    visual: [B, V, d] projected features; prefix_ids: int64 [P - V], before them; exit_layer: the last layer that sees
    the visual rows.
    """
    decoder = model.model.language_model
    batch = visual.shape[0]
    hidden = torch.cat(
        [decoder.embed_tokens(prefix_ids).expand(batch, -1, -1), visual, decoder.embed_tokens(packed.ids)], 1
    )
    cos, sin = decoder.rotary_emb(hidden, packed.positions)
    mask = torch.zeros(packed.mask.shape, device=hidden.device).masked_fill_(~packed.mask, -torch.inf)[:, None]
    first, prefix = len(prefix_ids), hidden.shape[1] - packed.ids.shape[1]
    text = torch.cat([torch.arange(first), torch.arange(prefix, hidden.shape[1])]).to(hidden.device)
    for index, layer in enumerate(decoder.layers):
        hidden = run_layer(layer, hidden, mask, cos, sin, hidden.shape[1] - packed.ids.shape[1])
        if index == exit_layer:
            hidden, cos, sin = hidden[:, text], cos[:, text], sin[:, text]
    rows = hidden[:, -packed.ids.shape[1] :][packed.targets >= 0]
    return model.lm_head(decoder.norm(rows))


def right_questions(logits: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Which questions' answers are the likeliest in every token, so that greedy decoding gives them: bool [questions].

    logits: [answer tokens, vocabulary], as `answer_logits` gives them.
    """
    answers = packed.targets >= 0
    wrong = (logits.argmax(-1) != packed.targets[answers]).float()
    return torch.zeros_like(packed.kinds, dtype=torch.float32).index_add(0, packed.owner[answers], wrong) == 0
