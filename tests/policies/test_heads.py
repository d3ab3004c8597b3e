"""The heads' input and equations: training's forward and the kernel against the plain statement, state by state."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch

from dyvte_engine import ExitHeadConfig, ExitHeads
from dyvte_engine.kernels import ops
from tests.policies import reference as ref

LAYERS, WIDTH = 3, 24
SUBSETS = [subset for size in range(1, 5) for subset in combinations(ref.STATES, size)]


def a_sequence() -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, d] of very different states, and which rows are visual."""
    hidden = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 10)[:, None]
    visual = torch.zeros(9, dtype=torch.bool)
    visual[2:5] = True
    return hidden, visual


@pytest.mark.parametrize("states", SUBSETS, ids="+".join)
@pytest.mark.parametrize(("rms_eps", "shared"), [(None, False), (30.0, False), (30.0, True)])  # eps as large as states
@torch.no_grad()
def test_training_and_inference_compute_the_plain_head(states, rms_eps, shared) -> None:
    hidden, visual = a_sequence()
    heads = ExitHeads(ExitHeadConfig(WIDTH, LAYERS, 16, states, rms_eps, shared), seed=1)
    found = ref.token_states(hidden, visual)
    pooled = torch.cat([found[name] for name in ref.STATES if name in states])
    want = torch.tensor([ref.head(heads, found, layer) for layer in range(LAYERS)])
    assert want.std() > 1e-3
    one_layer = torch.stack([heads(pooled, layer) for layer in range(LAYERS)])
    together = heads.all_layers(pooled.expand(2, LAYERS, -1))[1]
    for logits in (one_layer, together):
        torch.testing.assert_close(logits.softmax(-1)[:, 1], want, rtol=1e-4, atol=1e-5)
    rows = (visual.nonzero()[:, 0].int(), torch.tensor([0, 3]).int()) if heads.config.state_mask & 3 else (None, None)
    for layer in range(LAYERS):
        w1, w2, b1 = heads.of_layer(layer)
        ranges = torch.tensor([[5, 9]], dtype=torch.int32)
        p, _ = ops.exit_head(hidden, ranges, *rows, w1, w2, heads.config.state_mask, rms_eps=rms_eps, b1=b1)
        torch.testing.assert_close(p[0], want[layer], rtol=1e-4, atol=1e-5)


def test_states_have_one_order_however_they_are_named() -> None:
    for subset in SUBSETS:
        for named in permutations(subset):
            assert ExitHeadConfig(WIDTH, LAYERS, 16, named).states == subset
