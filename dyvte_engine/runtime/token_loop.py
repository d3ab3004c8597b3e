"""Decoding a batch until nobody is left: the one loop over running sequences, whoever chooses their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..kernels.transfer import to_device
from .running import Running

# (logits f32 [B, vocab], the B sequences that are left, by their first numbers) -> their int64 [B] tokens, and the
# places among the B of those that continue
Choose = Callable[[Tensor, Sequence[int]], tuple[Tensor, Sequence[int]]]


def advance(running: Running, tokens: Tensor, stay: Sequence[int]) -> None:
    """The next step, with these int64 [B] tokens, of the sequences that stay; none, if none does."""
    if len(stay) < len(running):
        running.select(stay)
        tokens = tokens[to_device(stay, tokens.device, tokens.dtype)]
    if stay:
        running.step(tokens)


def drain(running: Running, choose: Choose) -> None:
    """Choose and step until no sequence continues."""
    active = list(range(len(running)))
    while active:
        tokens, stay = choose(running.logits, active)
        active = [active[i] for i in stay]
        advance(running, tokens, stay)
