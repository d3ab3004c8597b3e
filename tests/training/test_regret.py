"""Regret against a plain loop, and what heads that learn it know: whom no later layer answers for its price."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch

from dyvte_engine.heads.exit_head import STATE_BITS
from dyvte_engine.training.files import write_tensors
from dyvte_engine.training.label_store import LabelInfo, load_labels
from dyvte_engine.training.regret import BOUNDS, PRICES, SHARPNESS, later_exits, regret_loss, regrets
from dyvte_engine.training.train_heads import HeadSettings, exit_probabilities, train_heads

COSTS = [40.0, 60.0, 80.0, 100.0]
SAFE_FROM = {"at once": 0, "late": 2, "never": 3}


def test_regret_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    said = 3 * torch.randn(20, 5, generator=generator)
    stays, share = torch.rand(20, 6, generator=generator) > 0.4, torch.rand(20, 6, generator=generator)
    found = regrets(said, stays, share)
    for n in range(20):
        for layer in range(5):
            for k, price in enumerate(PRICES.tolist()):
                later = [m for m in range(layer + 1, 5) if said[n, m] > -math.log(price)]
                exit_at = later[0] if later else 5
                assert later_exits(said, float(BOUNDS[k]))[n, layer] == exit_at
                now, then = (float(stays[n, m]) - price * float(share[n, m]) for m in (layer, exit_at))
                assert math.isclose(found[n, layer, k], (now - then) / math.sqrt(price), abs_tol=1e-5)


def test_the_loss_weighs_each_price_by_what_an_error_costs() -> None:
    logit, regret = torch.tensor([[0.5]]), torch.zeros(1, 1, len(PRICES))
    assert regret_loss(logit, regret).tolist() == [0.0]
    regret[0, 0, 3] = -2.0
    want = 2.0 * math.log1p(math.exp(SHARPNESS * (0.5 - float(BOUNDS[3])))) / SHARPNESS / len(PRICES)
    assert math.isclose(regret_loss(logit, regret), want, rel_tol=1e-5)


def write_labels(folder: Path, count: int) -> list[str]:
    """Questions of three sorts, known by one number of the text's state at every layer."""
    names = [list(SAFE_FROM)[i % 3] for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    columns = {f"pooled.{s}": torch.randn(count, 4, 8, generator=generator) for s in STATE_BITS}
    columns["pooled.mean_text"][..., :3] = 4 * torch.eye(3)[torch.arange(count) % 3][:, None]
    safe = torch.arange(4) >= torch.tensor([SAFE_FROM[name] for name in names])[:, None]
    columns |= {"agreement": safe.float(), "ce_exit": torch.ones(count, 4), "ce_full": torch.ones(count)}
    columns |= {"kl": torch.zeros(count, 4), "flops": torch.tensor(COSTS, dtype=torch.float64).repeat(count, 1)}
    info = LabelInfo("self", count, "data", "made-up", "made-up", "float32", 8, 4, 1, count, 1)
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(asdict(info)))
    write_tensors(folder / info.shards[0], columns, info.header(0))
    return names


def test_heads_know_the_price_at_which_a_question_is_let_go(tmp_path: Path) -> None:
    """After layer 0 an answer costs 0.4 of the FLOPs where layer 2 has it, 0.6 where only the last has it.

    To labels both are questions not to be let go.
    """
    names = write_labels(tmp_path / "labels", 900)
    given = {"hidden": 16, "lr": 1e-2, "epochs": 24, "batch": 32, "target_agreement": 0.9}
    settings = HeadSettings.of("default", targets="regret", **given)
    heads = train_heads(tmp_path / "labels", tmp_path / "h", settings)
    data, _ = load_labels(tmp_path / "labels", settings.states)
    said = exit_probabilities(heads, data.pooled).logit()
    of = {name: said[[n == name for n in names]].mean(0) for name in SAFE_FROM}
    assert of["at once"][0] > 2 and of["late"][2] > 2
    step = float(BOUNDS[0] - BOUNDS[1])
    for name, layer, price in (
        ("late", 0, 1 / 0.4),
        ("never", 0, 1 / 0.6),
        ("late", 1, 1 / 0.2),
        ("never", 2, 1 / 0.2),
    ):
        assert abs(float(of[name][layer]) + math.log(price)) < step
    assert of["late"][0] < of["never"][0] - 0.2
