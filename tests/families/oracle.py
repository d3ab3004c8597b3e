"""What transformers makes of a prompt: its generate, and its own layers on whole sequences under 4-D masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(hf: Any, inputs: Any, new_tokens: int) -> list[int]:
    out = hf.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@dataclass
class Entry:
    """One prompt where the decoder begins.

    embeds [n, d], visual bool [n], positions [n] or [3, n], next_position, and what is added to the visual rows [V, d]
    after each of the first layers.
    """

    embeds: Tensor
    visual: Tensor
    positions: Tensor
    next_position: int
    deepstack: list[Tensor]


@torch.no_grad()
def enter(hf: Any, inputs: Any) -> Entry:
    """The prompt's forward, read where the first layer begins; visual rows are those that follow the pictures."""
    decoder, seen = _decoder(hf), {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs, hidden=args[0] if args else kwargs["hidden_states"])

    deep: list[Tensor] = []
    handles = [decoder.layers[0].register_forward_pre_hook(look, with_kwargs=True)]
    if hasattr(decoder, "_deepstack_process"):
        handles.append(decoder.register_forward_pre_hook(_keep_deepstack(deep), with_kwargs=True))
    positions: list[Tensor] = []
    rotary = decoder.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    try:
        if hasattr(hf.model, "rope_deltas"):
            hf.model.rope_deltas = None
        hf(**inputs)
    finally:
        for handle in [*handles, rotary]:
            handle.remove()
    at = positions[0][:, 0] if positions[0].dim() == 3 else positions[0][0]
    visual = _visual(hf, inputs["input_ids"][0])
    return Entry(seen["hidden"][0], visual, at, int(at.max()) + 1, deep)


def _decoder(hf: Any) -> Any:
    return hf.model.text_model if hasattr(hf.model, "text_model") else hf.model.language_model


def _visual(hf: Any, ids: Tensor) -> Tensor:
    config = hf.config
    image = getattr(config, "image_token_id", None)
    ids_of = {config.image_token_index if image is None else image}
    return torch.isin(ids, torch.tensor(sorted(ids_of)))


def _keep_deepstack(into: list[Tensor]) -> Any:
    def keep(module: Any, args: Any, kwargs: Any) -> None:
        into.extend(kwargs.get("deepstack_visual_embeds") or [])

    return keep


@torch.no_grad()
def masked_logits(hf: Any, entry: Entry, exit_layer: int, generated: list[int]) -> Tensor:
    """Logits after the prompt and `generated`: layers past `exit_layer` do not let text rows see visual columns."""
    decoder, n_prompt = _decoder(hf), len(entry.embeds)
    embeds = torch.cat((entry.embeds, hf.get_input_embeddings()(torch.tensor(generated, dtype=torch.long))))
    n, new = len(embeds), torch.arange(len(generated)) + entry.next_position
    positions = torch.cat((entry.positions, new.expand(*entry.positions.shape[:-1], -1)), dim=-1)
    rotation = decoder.rotary_emb(embeds[None], positions[:, None] if positions.dim() == 2 else positions[None])
    causal = torch.ones(n, n, dtype=torch.bool).triu(1)
    visual = torch.cat((entry.visual, torch.zeros(n - n_prompt, dtype=torch.bool)))
    hidden = embeds[None]
    for number, layer in enumerate(decoder.layers):
        blocked = causal | (visual & (number > exit_layer))[None] & ~visual[:, None]
        mask = torch.zeros(1, 1, n, n).masked_fill_(blocked, torch.finfo(torch.float32).min)
        out = layer(hidden, attention_mask=mask, position_embeddings=rotation, position_ids=None)
        hidden = out[0] if isinstance(out, tuple) else out
        if number < len(entry.deepstack):
            hidden[:, visual] = hidden[:, visual] + entry.deepstack[number]
    return hf.lm_head(decoder.norm(hidden))[0, -1]


def masked_greedy(hf: Any, entry: Entry, exit_layer: int, new_tokens: int, eos: int = 2) -> list[int]:
    """Greedy tokens, everything computed anew for every token."""
    tokens: list[int] = []
    while len(tokens) < new_tokens and eos not in tokens:
        tokens.append(int(masked_logits(hf, entry, exit_layer, tokens).argmax()))
    return tokens
