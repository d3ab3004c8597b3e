"""VTW (AAAI 2025): one layer for all prompts, found on samples, where all visual tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..policies.base import VisualTokenPolicy
from ..policies.fixed import FixedExit, KeepAll

if TYPE_CHECKING:
    from ..engine import Engine
    from ..models import PreparedPrompt


def search_vtw(
    engine: Engine,
    prompts: Sequence[Any],
    images: Sequence[Any],
    *,
    eta: float = 0.003,
    first: int = 5,
    chat: bool = True,
) -> FixedExit:
    """The first layer K >= `first` where withdrawing the pictures changes the next token's distribution by at most eta.

    The change is KL(withdrawn || full) in nats of the last prompt token's distribution, averaged over the samples.
    Arguments as in `Engine.generate`; about 20 samples will do. The engine's policy is put back afterwards.

    Settled from the authors' code: that direction of KL (it is what their KLDivLoss call computes), the mean over
    samples before the comparison, eta 0.003 for LLaVA-7B and 0.0005 for 13B. Different: the scan stops at the first K
    that fits instead of running all of them, and where none fits K = L, at which nothing is withdrawn, is the answer
    (theirs fails).

    Returns:
        `FixedExit(K - 1)`: layers below K see the pictures.
    """
    layers = engine.model.shape.num_layers
    if not 1 <= first <= layers or eta < 0:
        raise InvalidArgumentError(f"first is {first}, eta {eta}; accepted: first 1 to {layers}, eta >= 0")
    before = engine.policy
    try:
        engine.policy = KeepAll()  # the pictures pass the tower once, as they are
        inputs = engine.prepare(prompts, images, chat)
        full = _log_probabilities(engine, inputs, KeepAll())
        for k in range(first, layers):
            withdrawn = _log_probabilities(engine, inputs, FixedExit(k - 1))
            kl = (withdrawn.exp() * (withdrawn - full)).sum(-1)
            if kl.mean() <= eta:
                return FixedExit(k - 1)
        return FixedExit(layers - 1)
    finally:
        engine.policy = before


def _log_probabilities(engine: Engine, inputs: Sequence[PreparedPrompt], policy: VisualTokenPolicy) -> Tensor:
    """f32 [samples, vocab], of the token after each prompt."""
    engine.policy = policy
    out = []
    for start in range(0, len(inputs), engine.config.max_batch):
        with engine.prefill_prepared(inputs[start : start + engine.config.max_batch]) as running:
            out.append(running.logits.log_softmax(-1))
    return torch.cat(out)
