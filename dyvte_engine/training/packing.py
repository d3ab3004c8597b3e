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
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import AttentionInterface, LlavaForConditionalGeneration

from ..kernels.transfer import to_device


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
    answers: torch.Tensor  # int64 [answer tokens]: where `targets` are, in B * R

    @property
    def said(self) -> torch.Tensor:
        """int64 [answer tokens]: the targets that are."""
        return self.targets.flatten()[self.answers]

    def to(self, device: torch.device | str) -> Packed:
        there, tensors = torch.device(device), [getattr(self, field.name) for field in fields(self)]
        return Packed(*(to_device(tensor, there, tensor.dtype) for tensor in tensors))


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
        torch.from_numpy(np.flatnonzero(targets >= 0)),
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
    if q.is_cuda:
        return _fused_attention(q, k, v, mask, scaling, prefix), None
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


def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, prefix: int
) -> torch.Tensor:
    """The same in torch's fused kernels, which write no scores: each block of questions is a sequence of its own.

    Query heads that share a key are rows of one head, so that keys and values are not repeated for them.
    """
    batch, heads, _, width = q.shape
    shared, block = k.shape[1], mask.shape[-1]
    blocks = mask.shape[2]
    group = heads // shared
    first_keys, first_values = (x[:, :, :prefix].repeat_interleave(group, 1) for x in (k, v))
    first = F.scaled_dot_product_attention(q[:, :, :prefix], first_keys, first_values, is_causal=True, scale=scaling)
    rows = q[:, :, prefix:].reshape(batch, shared, group, blocks, block, width).permute(0, 3, 1, 2, 4, 5)
    keys, values = (
        torch.cat([x[:, None, :, :prefix].expand(-1, blocks, -1, -1, -1), own.transpose(1, 2)], 3).flatten(0, 1)
        for x in (k, v)
        for own in (x[:, :, prefix:].unflatten(2, (blocks, block)),)
    )
    wide = -(-(prefix + block) // 8) * 8  # the kernel asks for rows that begin at multiples of 8
    bias = F.pad(mask.to(q.dtype).view(-1, 1, 1, block, block), (prefix, wide - prefix - block))
    bias = bias.expand(-1, -1, group, -1, -1).flatten(2, 3)[..., : prefix + block]
    text = F.scaled_dot_product_attention(
        rows.reshape(batch * blocks, shared, group * block, width), keys, values, attn_mask=bias, scale=scaling
    )
    text = text.view(batch, blocks, shared, group, block, width).permute(0, 1, 4, 2, 3, 5)
    return torch.cat([first.transpose(1, 2), text.reshape(batch, blocks * block, heads, width)], 1)


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer [.., in] -> [.., out], with what peft's LoRA adds in one pass over the result."""
    plain: Any = getattr(module, "base_layer", module)
    result = F.linear(x, plain.weight, plain.bias)
    if plain is module:
        return result
    down, up = (getattr(module, f"lora_{side}").default.weight for side in "AB")
    low = F.linear(x, down).flatten(0, -2)
    return torch.addmm(result.flatten(0, -2), low, up.T, alpha=module.scaling["default"]).view_as(result)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def llama_layer(
    layer: Any, hidden: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prefix: int
) -> torch.Tensor:
    """What a layer of transformers' Llama computes, in half of its passes over memory, which a GPU's time goes into."""
    attention, mlp = layer.self_attn, layer.mlp
    x = _norm(layer.input_layernorm, hidden)
    q, k, v = (
        _linear(part, x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (_turned(x, cos[:, None], sin[:, None]) for x in (q, k))
    mixed, _ = _split_attention(attention, q, k, v, mask, attention.scaling, prefix)
    hidden = hidden + _linear(attention.o_proj, mixed.flatten(2))
    x = _norm(layer.post_attention_layernorm, hidden)
    return hidden + _linear(mlp.down_proj, mlp.act_fn(_linear(mlp.gate_proj, x)) * _linear(mlp.up_proj, x))


def layer_runner(decoder: Any, compile_model: bool) -> Callable:
    """Runs any layer of the decoder: `run(layer, hidden, mask, cos, sin, prefix)`, on a GPU by `llama_layer`.

    Compiled, all layers go through one forward.
    """
    decoder.config._attn_implementation = "prefix_split"
    template = decoder.layers[0]
    if not compile_model and decoder.embed_tokens.weight.is_cuda:
        return llama_layer

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
    for index, layer in enumerate(decoder.layers):
        hidden = run_layer(layer, hidden, mask, cos, sin, hidden.shape[1] - packed.ids.shape[1])
        if index == exit_layer:
            hidden, cos, sin = (torch.cat([x[:, :first], x[:, prefix:]], 1) for x in (hidden, cos, sin))
    rows = hidden[:, -packed.ids.shape[1] :].flatten(0, 1).index_select(0, packed.answers)
    return model.lm_head(decoder.norm(rows))


def right_questions(logits: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Which questions' answers are the likeliest in every token, so that greedy decoding gives them: bool [questions].

    logits: [answer tokens, vocabulary], as `answer_logits` gives them.
    """
    wrong = (logits.argmax(-1) != packed.said).float()
    owner = packed.owner.flatten()[packed.answers]
    return torch.zeros_like(packed.kinds, dtype=torch.float32).index_add(0, owner, wrong) == 0
