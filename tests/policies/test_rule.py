"""The rule of exits: its two forms against a loop and each other, in the engine, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from dyvte_engine import DynamicExit, ExitHeadConfig, ExitHeads, FastV, compose
from dyvte_engine.errors import HeadsError, InvalidArgumentError
from dyvte_engine.heads.rule import ExitRule
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_exit import LAYERS, oracle_layers, random_heads
from tests.policies import shared
from tests.policies.shared import always_exit


def drawn_rule(rng: random.Random, layers: int) -> ExitRule:
    grid = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    threshold = rng.choice(grid) if rng.random() < 0.5 else [rng.choice(grid) for _ in range(layers)]
    return ExitRule(threshold, rng.randint(0, layers + 1), rng.randint(1, 3), rng.randint(1, 3))


def plain_exit(row: list[float], rule: ExitRule) -> int:
    """The definition: the first asked layer such that it and the asked layers just before all fired."""
    last = len(row) - 1
    asked = [layer for layer in range(last) if layer >= rule.min_layer and (layer - rule.min_layer) % rule.every_k == 0]
    above = [row[n] > (rule.threshold[n] if isinstance(rule.threshold, tuple) else rule.threshold) for n in asked]
    ends = [n for i, n in enumerate(asked) if i + 1 >= rule.hysteresis and all(above[i + 1 - rule.hysteresis : i + 1])]
    return ends[0] if ends else last


def stepped_exit(row: list[float], rule: ExitRule) -> int:
    run = 0
    for layer in rule.layers(len(row)):
        run, exits = rule.step(run, row[layer], layer)
        if exits:
            return layer
    return len(row) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_are_the_definition(dtype: torch.dtype) -> None:
    """On values that tie with thresholds, too; 0.1 is not the float32 nearest to it."""
    rng, seen = random.Random(0), set()
    for _ in range(300):
        layers = rng.randint(1, 9)
        rule = drawn_rule(rng, layers)
        rows = [[rng.choice((0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.0)) for _ in range(layers)] for _ in range(20)]
        p_exit = torch.tensor(rows, dtype=dtype)
        want = [plain_exit(row, rule) for row in p_exit.tolist()]
        assert rule.first_exits(p_exit).tolist() == want
        assert [stepped_exit(row, rule) for row in p_exit.tolist()] == want
        seen |= {(rule.hysteresis, type(rule.threshold), layer < layers - 1) for layer in want}
    assert len(seen) == 3 * 2 * 2


def test_a_run_ends_where_a_head_does_not_fire() -> None:
    rule = ExitRule(0.5, hysteresis=2)
    rows = torch.tensor([[0.9, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9], [0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1]])
    assert [stepped_exit(row, rule) for row in rows.tolist()] == rule.first_exits(rows).tolist() == [5, 1]


@pytest.mark.parametrize(
    ("threshold", "hysteresis", "every_k"), [((0.9, 0.2, 0.6, 0.0), 1, 1), ([0.3, 0.7, 0.3, 1.0], 2, 1), (0.4, 2, 2)]
)
def test_the_engine_exits_by_the_rule(threshold: float | list[float], hysteresis: int, every_k: int) -> None:
    """Thresholds of each layer, runs of several heads: the layer comes from transformers' states and a plain head."""
    engine, hf = build()
    texts, images = tiny.prompts(seed=33, n=12, images=(1, 2))
    entries = [tiny.embed(hf, engine.model.processor, *prompt)[:2] for prompt in zip(texts, images)]
    rule = ExitRule(threshold, every_k=every_k, hysteresis=hysteresis)
    for seed in range(40):  # releases of torch draw other weights from a seed
        heads = random_heads(seed)
        said = [[*oracle_layers(hf, heads, *entry), 0.0] for entry in entries]
        want = [plain_exit(row, rule) for row in said]
        if len(set(want)) >= min(3, len(rule.layers(LAYERS)) - hysteresis + 2):
            break
    else:
        pytest.fail("no seed mixes exits")
    engine.policy = DynamicExit(heads, threshold, every_k=every_k, hysteresis=hysteresis)
    got = engine.generate(texts, images, chat=False, max_new_tokens=1)
    assert [LAYERS - 1 if r.stats.exit_layer is None else r.stats.exit_layer for r in got] == want


def test_a_run_ends_in_the_engine_too() -> None:
    """Heads that always say 0.5 fire at a threshold of 0, not at 1: two in a row come first after layer 5."""
    policy = replace(always_exit(0), threshold=[0, 1, 0, 1, 0, 0, 0, 0], hysteresis=2)
    policy.heads.w2.zero_()
    engine, _ = shared.build(policy=policy)
    texts, images = tiny.prompts(seed=34, n=3, images=(1, 2))
    results = engine.generate(texts, images, chat=False, max_new_tokens=1)
    assert [r.stats.exit_layer for r in results] == [5, 5, 5]


def test_one_visual_token_that_is_left_exits_too() -> None:
    engine, _ = shared.build(policy=compose(FastV(2, 1 - 1 / tiny.VISUAL_TOKENS), always_exit(4)))
    texts, images = tiny.prompts(seed=35, n=2, images=(1,))
    for result in engine.generate(texts, images, chat=False, max_new_tokens=1):
        text = result.stats.text_tokens
        assert result.stats.tokens_per_layer[2:] == [text + 1] * 3 + [text] * 3
        assert result.stats.exit_layer == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": float("nan")}, "threshold is nan; accepted: 0 to 1, or such a value for each layer"),
        ({"threshold": 1.1}, "threshold is 1.1; accepted"),
        ({"threshold": [0.5, float("nan")]}, r"threshold is \(0.5, nan\); accepted"),
        ({"threshold": ()}, r"threshold is \(\); accepted"),
        ({"threshold": "0.5"}, "threshold is 0.5; accepted"),
        ({"threshold": 0.5, "min_layer": -1}, "min_layer is -1; accepted: whole numbers, at least 0"),
        ({"threshold": 0.5, "every_k": 0}, "every_k is 0; accepted: whole numbers, at least 1"),
        ({"threshold": 0.5, "hysteresis": 1.5}, "hysteresis is 1.5; accepted: whole numbers, at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(given: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ExitRule(**given)
    with pytest.raises(InvalidArgumentError, match=message):
        DynamicExit(random_heads(0), **given)


def test_numbers_of_numpy_are_numbers() -> None:
    rule = ExitRule(np.float32(0.5), np.int64(1), hysteresis=np.int64(2))
    assert rule.first_exits(torch.full((1, 6), 0.75)).tolist() == [2]


def test_a_threshold_for_each_layer_of_the_model(tmp_path) -> None:
    engine, _ = build()
    with pytest.raises(InvalidArgumentError, match="min_layer is 4; accepted: 0 to 3"):
        engine.policy = DynamicExit(random_heads(0), 0.5, min_layer=4)  # as fixed:4 is
    with pytest.raises(InvalidArgumentError, match="threshold has 3 values; accepted: one, or 4, a value for each"):
        engine.policy = DynamicExit(random_heads(0), [0.5] * 3)
    with pytest.raises(InvalidArgumentError, match="threshold has 3 values; accepted: one, or 5"):
        ExitRule((0.5,) * 3).first_exits(torch.zeros(2, 5))
    values = [0.5, 0.25, 0.75, 1.0]
    random_heads(0).save(tmp_path / "h", threshold=values)
    assert DynamicExit.from_file(tmp_path / "h").threshold == tuple(values)
    ExitHeads(ExitHeadConfig(64, LAYERS, 8), seed=0).save(tmp_path / "h", threshold=values[:2])
    with pytest.raises(HeadsError, match="threshold has 2 values; accepted: one, or 4"):
        DynamicExit.from_file(tmp_path / "h")


@pytest.mark.parametrize("name", ["min_layer", "every_k", "hysteresis"])
def test_a_truth_value_is_no_number(name):
    with pytest.raises(InvalidArgumentError, match=f"{name} is True; accepted: whole numbers"):
        ExitRule(0.5, **{name: True})


@pytest.mark.parametrize("threshold", [True, (0.5, True)])
def test_a_truth_value_is_no_threshold(threshold):
    with pytest.raises(InvalidArgumentError, match=r"threshold is .*True.*; accepted: 0 to 1"):
        ExitRule(threshold)
