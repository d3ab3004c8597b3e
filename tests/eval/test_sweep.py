"""The curve computed from one run per layer against real runs of the engine, and its parts against plain loops."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from dyvte_engine import NANO_HEADS, DynamicExit, Engine, FixedExit
from dyvte_engine.eval import load_tasks, run, sweep
from dyvte_engine.eval.curve_report import draw, page
from dyvte_engine.heads.rule import ExitRule


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano", device="cpu", max_batch=16, max_len=256)


@pytest.fixture(scope="module")
def recorded(engine):
    tasks = {t.name: t.within(run.known_forms(engine.model))[0].samples for t in load_tasks(["gqa", "mmvet"], 6, 12)}
    return sweep.record(engine, tasks, {"nano": DynamicExit.from_file(NANO_HEADS)})


@pytest.mark.parametrize("options", [{}, {"min_layer": 3, "every_k": 2}, {"hysteresis": 2}], ids=str)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_curve_is_what_the_engine_does(engine, recorded, share, options):
    """At a threshold halfway between two values said, so that rounding in another batch decides nothing."""
    said = np.unique(recorded.p["nano"])
    threshold = float(said[int(share * len(said)) :][:2].mean())
    policy = DynamicExit.from_file(NANO_HEADS, threshold=threshold, **options)
    answers = run.answer_all(engine, recorded.samples, policy, "real")
    layers = sweep.exit_layers(recorded.p["nano"], policy.rule)
    last = engine.model.shape.num_layers - 1
    assert [last if a.exit_layer is None else a.exit_layer for a in answers] == layers.tolist()
    assert [a.text for a in answers] == [recorded.texts[i][layer] for i, layer in enumerate(layers)]
    derived, w = sweep.point(recorded, layers), recorded.weights
    assert derived["flops"] == pytest.approx(float(w @ [a.flops for a in answers]))
    assert derived["flops_true"] == pytest.approx(float(w @ [a.flops_true for a in answers]))
    if not options:
        assert len(set(layers.tolist())) > 1


def test_heads_are_asked_about_pictures_that_are_known(engine, recorded):
    """What they say is what they say without a store, and no row of the pictures is computed for it."""
    some, heads = recorded.samples[:6], DynamicExit.from_file(NANO_HEADS)
    plain = Engine.from_pretrained("nano", device="cpu", max_batch=16, max_len=256, prefix_cache=0)
    np.testing.assert_allclose(recorded.p["nano"][:6], sweep.probe(plain, some, [heads])[0], atol=1e-4)
    prompts, pictures = [s.prompt for s in some], [s.picture for s in some]
    for result in engine.generate(prompts, pictures, policy=sweep.Probe((heads,)), max_new_tokens=1):
        assert result.stats.prefix == "hit" and min(result.stats.rows_reused) >= result.stats.visual_tokens


def test_every_task_counts_alike(recorded):
    layers = np.full(len(recorded.tasks), 5)
    by_hand = [recorded.credit[recorded.tasks == name, 5].mean() for name in ("gqa", "mmvet")]
    assert len(set(np.unique(recorded.tasks, return_counts=True)[1])) == 2  # of unequal size
    assert sweep.point(recorded, layers)["credit"] == pytest.approx(np.mean(by_hand))


def test_fixed_ends_at_the_full_model(engine, recorded):
    points = sweep.fixed(recorded)
    assert len(points) == engine.model.shape.num_layers
    assert points[-1]["same"] == 1
    assert all(a["flops"] < b["flops"] for a, b in itertools.pairwise(points))
    five = run.answer_all(engine, recorded.samples, FixedExit(5), "five")
    assert [a.text for a in five] == [texts[5] for texts in recorded.texts]


def test_ends_of_the_curve(recorded):
    points = sweep.curve(recorded, "nano")
    assert [points[i]["exit_layer"] for i in (0, -1)] == pytest.approx([0, recorded.credit.shape[1] - 1])
    assert [p["flops"] for p in points] == sorted(p["flops"] for p in points)


def made(p, same, rule=None):
    """Outcomes of given heads and agreements; credit is agreement, an exit after layer l costs l + 1."""
    n, count = np.shape(same)
    cost = np.tile(np.arange(1.0, count + 1), (n, 1))
    same = np.array(same, bool)
    tasks, rules = np.array(["t"] * n), {"h": rule or ExitRule(0.5)}
    return sweep.Outcomes([None] * n, tasks, [[""]] * n, same.astype(float), same, cost, cost, {"h": p}, rules)


def test_oracle_and_dealt_by_hand():
    o = made(np.zeros((3, 2)), [[0, 1, 1], [1, 0, 1], [0, 0, 1]])
    assert sweep.oracle(o) == pytest.approx(
        {"exit_layer": 1.0, "credit": 1, "same": 1, "flops": 2.0, "flops_true": 2.0}
    )
    control = sweep.dealt(o, np.array([1, 0, 2]))
    # each sample gets each of the layers 0, 1, 2 with one third: agreement is the mean of the table
    assert control["same"] == pytest.approx(5 / 9) and control["flops"] == pytest.approx(2.0)


def test_perfect_heads_beat_every_fixed_layer_and_useless_ones_none():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, 300)  # the earliest safe layer of each sample, of 7
    same = np.arange(7) >= first[:, None]
    perfect = made(np.where(same[:, :-1], 0.9, 0.1) + 1e-3 * rng.random((300, 6)), same)
    better = [c for c in sweep.against_fixed(perfect, "h") if c["same"]["ci95"][0] > 0]
    assert {c["layer"] for c in better} >= {2, 3, 4}
    assert sweep.separation(perfect, "h")[2] == 1
    useless = made(rng.random((300, 6)), same)
    assert not [c for c in sweep.against_fixed(useless, "h") if c["same"]["ci95"][0] > 0]
    assert abs(sweep.separation(useless, "h")[2] - 0.5) < 0.1
    for c in sweep.against_fixed(perfect, "h"):
        assert c["flops"] <= c["flops_fixed"] + 1e-6
        alone = c["by_task"]["t"]
        assert alone["same_fixed"] == pytest.approx(same[:, c["layer"]].mean())
        assert alone["same"] - alone["same_fixed"] == pytest.approx(c["same"]["difference"])


def test_a_sweep_keeps_the_options_of_the_heads():
    """Heads that are to fire twice in a row are swept so, and at their layers."""
    p = np.array([[0.9, 0.2, 0.9, 0.9, 0.1]])
    o = made(p, [[0, 0, 0, 1, 1, 1]], ExitRule(0.5, min_layer=1, hysteresis=2))
    for at in sweep.curve(o, "h"):
        assert at["exit_layer"] == (2 if at["threshold"] < 0.2 else 3 if at["threshold"] < 0.9 else 5)
    assert [c["layer"] for c in sweep.against_fixed(o, "h")] == [2, 3, 4]  # never out after layer 0 or 1


def test_intervals_are_of_paired_differences():
    """Resampled sample by sample within each task: what is alike in every sample has no spread."""
    rng = np.random.default_rng(1)
    same = rng.random((400, 3)) < 0.5
    same[:, 2] = True
    o = made(np.tile([0.2, 0.9], (400, 1)), same)  # all leave after layer 0, or all after layer 1
    assert [c["same"]["ci95"] for c in sweep.against_fixed(o, "h")] == [[0, 0], [0, 0]]
    o = made(np.tile([0.9, 0.9], (400, 1)), same)  # all leave after layer 0, compared with layer 1
    difference = same[:, 0].astype(float) - same[:, 1]
    mean, reach = difference.mean(), 1.96 * difference.std() / 20
    assert sweep.against_fixed(o, "h")[1]["same"]["ci95"] == pytest.approx([mean - reach, mean + reach], abs=0.01)
    tasks = np.array(["a"] * 100 + ["b"] * 300)  # +1 in one, -1 in the other: the weights are fixed, not drawn
    same[:, 0], same[:, 1] = tasks == "a", tasks == "b"
    apart = replace(made(np.tile([0.9, 0.9], (400, 1)), same), tasks=tasks)
    assert sweep.against_fixed(apart, "h")[1]["same"]["ci95"] == pytest.approx([0, 0])


def test_separation_by_definition():
    same = [[1, 1], [1, 1], [0, 1], [0, 1]]
    o = made(np.array([[0.9], [0.4], [0.4], [0.1]]), same)
    assert sweep.separation(o, "h") == [pytest.approx((1 + 1 + 0.5 + 1) / 4)]
    assert sweep.separation(made(np.zeros((2, 1)), [[1, 1], [1, 1]]), "h") == [None]


def test_random_costs_what_the_fixed_layer_costs(engine, recorded, tmp_path):
    report = sweep.sweep_report(engine, recorded, [3, 8])
    for p in report["random"]:
        assert p["flops"] == pytest.approx(report["fixed"][p["as_layer"]]["flops"], rel=0.01)
    report["model"] = {"name": "nano", "fingerprint": "f", "dtype": "float32"}
    json.dumps(report)
    draw(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    text = page(report, "plot.png", "command")
    assert f"| never | {report['fixed'][-1]['flops'] / 1e9:.2f} | " in text and "## nano" in text
    assert set(report["by_task"]) == {"gqa", "mmvet"}
