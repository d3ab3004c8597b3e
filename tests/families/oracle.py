"""What transformers makes of a prompt: its generate, and its own layers on whole sequences under 4-D masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.policies.reference import head, token_states


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
    last = at if transformers.__version__ < "5" else at[..., -1]  # generate of release 5 goes on from the last row
    return Entry(seen["hidden"][0], visual, at, int(last.max()) + 1, deep)


def _decoder(hf: Any) -> Any:
    return hf.model.text_model if hasattr(hf.model, "text_model") else hf.model.language_model


def _visual(hf: Any, ids: Tensor) -> Tensor:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    known = [getattr(hf.config, name, None) for name in names]
    return torch.isin(ids, torch.tensor([i for i in known if i is not None]))


def _keep_deepstack(into: list[Tensor]) -> Any:
    def keep(module: Any, args: Any, kwargs: Any) -> None:
        into.extend(kwargs.get("deepstack_visual_embeds") or [])

    return keep


Rule = Callable[["At"], "Tensor | None"]


@dataclass
class At:
    """What a rule sees after a layer.

    hidden [n, d] leaving it, `attention` [H, n, n] its own map, `gone` bool [n] before the decision.
    """

    layer: int
    hidden: Tensor
    attention: Tensor
    gone: Tensor
    visual: Tensor
    look_ahead: Callable[[], Tensor]  # the next layer's map

    def lowest(self, score: Tensor, keep: int) -> Tensor:
        """`gone` with all visual rows but the `keep` of the highest score [n]."""
        rows = (self.visual & ~self.gone).nonzero()[:, 0]
        gone = self.gone | self.visual
        gone[rows[score[rows].argsort(descending=True, stable=True)[:keep]]] = False
        return gone


@torch.no_grad()
def run(hf: Any, entry: Entry, generated: list[int], rule: Rule) -> tuple[Tensor, list[Tensor]]:
    """HF's own layers on prompt and `generated` under 4-D masks.

    After each layer `rule` says which columns rows that stay no longer see, or None. Returns the logits [1 + g, vocab]
    of each of the g generated tokens and of the next one, and what was gone in each layer.
    """
    decoder = _decoder(hf)
    hf.set_attn_implementation("eager")
    embeds = torch.cat((entry.embeds, hf.get_input_embeddings()(torch.tensor(generated, dtype=torch.long))))
    new = torch.arange(len(generated)) + entry.next_position
    positions = torch.cat((entry.positions, new.expand(*entry.positions.shape[:-1], -1)), dim=-1)
    rotation = decoder.rotary_emb(embeds[None], positions[:, None] if positions.dim() == 2 else positions[None])
    visual = torch.cat((entry.visual, torch.zeros(len(new), dtype=torch.bool)))
    hidden, gone, history = embeds[None], torch.zeros_like(visual), []
    for number, layer in enumerate(decoder.layers):
        history.append(gone)
        hidden, attention = _layer(layer, hidden, gone, rotation)
        if number < len(entry.deepstack):
            hidden[:, visual] = hidden[:, visual] + entry.deepstack[number]
        if number + 1 < len(decoder.layers):
            ahead = partial(_attention, decoder.layers[number + 1], hidden, gone, rotation)
            decided = rule(At(number, hidden[0], attention, gone.clone(), visual, ahead))
            gone = gone if decided is None else decided
    return hf.lm_head(decoder.norm(hidden[0, -1 - len(generated) :])), history


def _layer(layer: Any, hidden: Tensor, gone: Tensor, rotation: Any) -> tuple[Tensor, Tensor]:
    n = hidden.shape[1]
    blocked = torch.ones(n, n, dtype=torch.bool).triu(1) | gone[None] & ~gone[:, None]
    mask = torch.zeros(1, 1, n, n).masked_fill_(blocked, torch.finfo(torch.float32).min)
    maps: list[Tensor] = []
    handle = layer.self_attn.register_forward_hook(lambda module, args, out: maps.append(out[1][0]))
    out = layer(hidden, attention_mask=mask, position_embeddings=rotation, position_ids=None)
    handle.remove()
    return (out[0] if isinstance(out, tuple) else out), maps[0]


def _attention(layer: Any, hidden: Tensor, gone: Tensor, rotation: Any) -> Tensor:
    return _layer(layer, hidden, gone, rotation)[1]


def greedy(hf: Any, entry: Entry, rule: Rule, new_tokens: int, eos: int = 2) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens, everything computed anew for every token; the rule decides on the prompt alone."""
    logits, gone = run(hf, entry, [], rule)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < new_tokens and eos not in tokens:
        tokens.append(int(run(hf, entry, tokens, _repeat(gone))[0][-1].argmax()))
    return tokens, gone


def assert_greedy(hf: Any, entry: Entry, tokens: list[int], rule: Rule, new_tokens: int, eos: int = 2) -> None:
    """That `tokens` are what `greedy` gives, in one run: every token is the best one after those before it.

    Of two that rounding alone tells apart, either is. For rules that do not look at hidden states or attention, which
    would see the tokens too.
    """
    logits, _ = run(hf, entry, tokens[:-1], rule)
    best, own = logits.amax(-1), logits[range(len(tokens)), tokens]
    assert (own >= best - 1e-5 * best.abs()).all()
    assert eos not in tokens[:-1] and (len(tokens) == new_tokens or tokens[-1] == eos)


def _repeat(history: list[Tensor]) -> Rule:
    def rule(at: At) -> Tensor:
        gone = history[at.layer + 1]
        return torch.cat((gone, torch.zeros(len(at.hidden) - len(gone), dtype=torch.bool)))

    return rule


def fixed(layer: int) -> Rule:
    return lambda at: at.visual if at.layer == layer else None


def fastv(k: int, ratio: float) -> Rule:
    """Entering layer k the columns that the last row attends to least leave, by the map of layer k - 1."""

    def rule(at: At) -> Tensor | None:
        n = int(at.visual.sum())
        return at.lowest(at.attention.mean(0)[-1], n - int(n * ratio)) if at.layer == k - 1 else None

    return rule


def pyramid(keep: tuple[float, float, float]) -> Rule:
    """Entering L/4, L/2 and 3L/4 of 4 layers: by what the last row attends to in the layer about to run."""
    return lambda at: at.lowest(at.look_ahead().mean(0)[-1], int(int(at.visual.sum()) * keep[at.layer]))


def heads(exit_heads: Any, threshold: float) -> Rule:
    """The first layer whose head says exit."""

    def rule(at: At) -> Tensor | None:
        if not at.visual.any() or bool((at.gone == at.visual).all()):
            return None
        return at.visual if head(exit_heads, token_states(at.hidden, at.visual), at.layer) > threshold else None

    return rule


def both(first: Rule, second: Rule) -> Rule:
    def rule(at: At) -> Tensor | None:
        for decided in (first(at), second(at)):
            if decided is not None:
                return decided
        return None

    return rule


def spliced(entry: Entry, sizes: list[int], select: Callable[[Tensor], list[int]]) -> Entry:
    """The prompt with only the rows of each picture that `select` (of its features [V, d]) names, numbered anew."""
    rows, stay, done = entry.visual.nonzero()[:, 0], ~entry.visual, 0
    for size in sizes:
        mine = rows[done : done + size]
        stay[mine[select(entry.embeds[mine])]] = True
        done += size
    n = int(stay.sum())
    return Entry(entry.embeds[stay], entry.visual[stay], torch.arange(n), n, [])
