"""What leaving now costs against staying, as the target of exit heads, instead of whether the answer stays.

At a price for FLOPs an exit after layer l is worth u_l = (1 if the answer stays) - price * FLOPs_l / FLOPs of no exit.
Staying is worth what the exit is worth that the heads themselves take later. With g = -log(price), and z the head's
logit of "exit", the rule "leave where z > g" is best at that price if z exceeds g exactly where leaving is worth more.
Each price is a classification whose errors cost the difference, its regret; one z serves all prices, since whoever
leaves at a low price leaves at any higher one. So a single threshold draws the whole curve: a question that no later
layer will answer for its price is let go as well as one that is answered already, which 0/1 labels never ask for.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.heads.rule import ExitRule

PRICES = torch.logspace(-1.7, 1, 12, dtype=torch.float32)  # answers for all FLOPs of a prefill
BOUNDS = -PRICES.log()
SHARPNESS = 3.0  # of the logistic loss: the flatter, the more a price pulls at the choices of the others


def later_exits(said: Tensor, bound: float) -> Tensor:
    """said [N, L - 1], logits of "exit" -> int64 [N, L - 1]: the first layer after each at which they exceed `bound`.

    L - 1 where none does.
    """
    later = torch.full_like(said[:, 0], said.shape[1], dtype=torch.int64)
    columns = []
    for layer in reversed(range(said.shape[1])):
        columns.append(later)
        later = torch.where(said[:, layer] > bound, layer, later)
    return torch.stack(columns[::-1], 1)


def regrets(said: Tensor, stays: Tensor, share: Tensor) -> Tensor:
    """What leaving after each layer is worth more than staying, at each of K prices: f32 [N, L - 1, K].

    said [N, L - 1]: the logits by which the heads would leave later; stays bool [N, L]; share f32 [N, L] of the full
    FLOPs. Divided by the root of the price, so that no price outweighs the others.
    """
    at_each = []
    for price, bound in zip(PRICES.tolist(), BOUNDS.tolist(), strict=True):
        worth = stays.float() - price * share
        at_each.append((worth[:, :-1] - worth.gather(1, later_exits(said, bound))) / price**0.5)
    return torch.stack(at_each, -1)


def loss_of_exits(p_exit: Tensor, stays: Tensor, share: Tensor) -> float:
    """What the exits miss of the full model's answers, plus their FLOPs' price: mean over samples and prices.

    p_exit [N, L], stays bool [N, L], share [N, L]; each price weighted as in `regrets`.
    """
    total = 0.0
    for price, bound in zip(PRICES.tolist(), BOUNDS.tolist(), strict=True):
        at = ExitRule(1 / (1 + math.exp(-bound))).first_exits(p_exit)[:, None]
        lost = 1 - stays.gather(1, at).double() + price * share.gather(1, at)
        total += float(lost.mean()) / price**0.5
    return total / len(PRICES)


def regret_loss(logit: Tensor, regret: Tensor) -> Tensor:
    """Mean of the logistic loss over layers and prices, each weighted by what an error costs: f32 [N].

    logit [N, L - 1] of "exit"; regret [N, L - 1, K].
    """
    margin = SHARPNESS * regret.sign() * (logit[..., None] - BOUNDS.to(logit.device))
    return (regret.abs() * F.softplus(-margin)).mean((1, 2)) / SHARPNESS
