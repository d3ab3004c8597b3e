"""The model's own greedy answers, in full or under an exit at every layer, decoded as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dyvte_engine.engine import Engine
from dyvte_engine.models import PreparedPrompt
from dyvte_engine.policies import Decision, KeepAll, LayerState, VisualTokenPolicy
from dyvte_engine.runtime.token_loop import drain


@dataclass(frozen=True)
class OneExitEach(VisualTokenPolicy):
    """Of every L sequences in the batch, the i-th loses its visual tokens after layer i; the last never does."""

    def layers(self, num_layers: int) -> set[int]:
        return set(range(num_layers - 1))

    def decide(self, state: LayerState) -> Decision:
        nothing = state.rows.source[:0]
        counts = enumerate(state.rows.n_visual)
        return [nothing if n and b % state.num_layers == state.layer else None for b, n in counts]


def own_answers(engine: Engine, prompts: Sequence[PreparedPrompt], max_new_tokens: int) -> list[list[int]]:
    """Greedy token ids of every prompt, the end token included when it came."""
    return _greedy(engine, prompts, KeepAll(), max_new_tokens)


def branch_answers(engine: Engine, prompts: Sequence[PreparedPrompt], max_new_tokens: int) -> list[list[list[int]]]:
    """For every prompt L lists of token ids, its greedy answer with an exit after each layer; the last is the full one.

    The engine's `max_batch` must hold L sequences for each prompt.
    """
    branches = engine.model.shape.num_layers
    answers = _greedy(engine, [p for p in prompts for _ in range(branches)], OneExitEach(), max_new_tokens)
    return [answers[first : first + branches] for first in range(0, len(answers), branches)]


def end_tokens(engine: Engine) -> set[int]:
    """Ids that end an answer."""
    ids = engine.model.hf.generation_config.eos_token_id
    ids = engine.model.processor.tokenizer.eos_token_id if ids is None else ids
    return set(ids) if isinstance(ids, (list, tuple)) else {ids}


def _greedy(
    engine: Engine, prompts: Sequence[PreparedPrompt], policy: VisualTokenPolicy, max_new_tokens: int
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    ends = end_tokens(engine)

    def choose(logits: Tensor, active: Sequence[int]) -> tuple[Tensor, list[int]]:
        tokens = logits.argmax(-1)
        for s, token in zip(active, tokens.tolist(), strict=True):
            answers[s].append(token)
        unfinished = [len(answers[s]) < max_new_tokens and answers[s][-1] not in ends for s in active]
        return tokens, [i for i, stays in enumerate(unfinished) if stays]

    with engine.prefill_prepared(prompts, policy) as running:
        drain(running, choose)
    return answers
