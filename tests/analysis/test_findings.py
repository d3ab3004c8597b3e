"""Stages, entropy, exits by hand and by heads, and single prompts: against plain loops and real runs of the engine."""

import itertools
import json

import numpy as np
import pytest

from dyvte_engine import NANO_HEADS, DynamicExit, Engine, FixedExit, InvalidArgumentError, KeepAll
from dyvte_engine.analysis import (
    FIELDS,
    attention_entropy,
    attention_stages,
    exit_histogram,
    load_data,
    manual_exit,
    measure,
    task_of,
    timelines,
)
from dyvte_engine.analysis.boundaries import detect, resampled_means, segment, standardised
from dyvte_engine.analysis.entropy import chosen_exits
from dyvte_engine.analysis.exits import TaskExits
from dyvte_engine.analysis.plotting import mean_band
from dyvte_engine.analysis.timeline import reference_text
from dyvte_engine.eval import run
from dyvte_engine.training.head_data import Example


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano", device="cpu", max_batch=16, max_len=256)


@pytest.fixture(scope="module")
def tasks(engine):
    return [t.within(run.known_forms(engine.model))[0] for t in load_data("gqa,textvqa", limit=8, seed=3)]


@pytest.fixture(scope="module")
def manual(engine, tasks):
    return manual_exit(engine, tasks)


def by_all_cuts(series, count, least):
    """The best cuts by trying every one of them."""
    best = None
    for cuts in itertools.combinations(range(1, len(series)), count - 1):
        parts = np.split(series, cuts)
        if min(map(len, parts)) < least:
            continue
        error = sum(((p - p.mean(0)) ** 2).sum() for p in parts)
        if best is None or error < best[1] - 1e-12:
            best = cuts, error
    return best


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_segments_are_the_best_of_all(count, least):
    series = np.random.default_rng(count).normal(size=(13, 3))
    cuts, error = by_all_cuts(series, count, least)
    got = segment(series, count, least)
    assert got[0] == cuts and got[1] == pytest.approx(error)


def test_segments_of_steps():
    series = np.repeat([[0.0, 1.0], [3.0, 1.0], [0.0, -2.0]], [4, 5, 3], axis=0)
    assert segment(series, 3) == ((4, 9), pytest.approx(0, abs=1e-9))
    with pytest.raises(InvalidArgumentError, match="12 layers; accepted: at least 15"):
        segment(series, 3, 5)


def test_standardised_logs():
    curves = np.exp([[0.0, 2, 5], [1, 2, 5], [2, 2, 8]])
    want = np.array([[-1.2247449, 0, -0.7071068], [0, 0, -0.7071068], [1.2247449, 0, 1.4142136]])
    np.testing.assert_allclose(standardised(curves), want, atol=1e-6)


def stepped(n, noise, seed=0):
    """Weights of n samples with steps at layers 3 and 8 of 12."""
    rng = np.random.default_rng(seed)
    mean = np.repeat([[1.0, 2.0, 1.0], [2.0, 0.5, 1.2], [1.5, 1.5, 0.8]], [3, 5, 4], axis=0)
    return mean * np.exp(noise * rng.normal(size=(n, 12, 3)))


def test_clear_stages_are_found_firmly_and_noise_is_not():
    per_sample = stepped(60, 0.3)
    found, layers = detect(per_sample.mean(0), resampled_means(per_sample, 200, 0), least=2)
    assert found.first == (3, 8) and min(found.same) > 0.9 and found.by_chance < 0.02 and layers.shape == (200, 2)
    assert np.argmin(found.bic) == 2 and found.explained > 0.9
    noise = np.exp(0.3 * np.random.default_rng(1).normal(size=(60, 12, 3)))
    nothing, _ = detect(noise.mean(0), resampled_means(noise, 200, 0), least=2)
    assert min(nothing.same) < 0.9 and nothing.by_chance > 0.05 and np.argmin(nothing.bic) == 0
    again, _ = detect(per_sample.mean(0), resampled_means(per_sample, 200, 0), least=2)
    assert again == found
    low, high = zip(*found.ci95)
    assert all(a <= b <= c for a, b, c in zip(low, found.first, high))


def test_stages_of_nano(engine, tasks):
    samples = [s for t in tasks for s in t.samples]
    names = [t.name for t in tasks for _ in t.samples]
    engine.policy = FixedExit(2)
    stages = attention_stages(engine, samples, names, resamples=50)
    assert engine.policy == FixedExit(2)
    table = measure(engine, samples)
    np.testing.assert_allclose(stages.weights, table[..., :3], atol=1e-5)
    rows = stages.rows()
    assert [r["stage"] for r in rows] == sorted(r["stage"] for r in rows) and {r["stage"] for r in rows} == {1, 2, 3}
    cross = table[:, 4, FIELDS.index("w_cross")]
    assert rows[4]["w_cross"] == pytest.approx(cross.mean(), abs=1e-5)
    half = 1.96 * cross.std(ddof=1) / np.sqrt(len(cross))
    assert rows[4]["w_cross_ci95"] == pytest.approx([cross.mean() - half, cross.mean() + half], abs=1e-4)
    alone = attention_stages(engine, tasks[0].samples, resamples=50)
    assert stages.by_task["gqa"] == alone.boundaries and not alone.by_task
    axes = stages.plot()
    assert axes.get_xlabel() == "layer" and len(axes.get_lines()) == 3 + 2
    np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), table[..., 1].mean(0), atol=1e-5)


def test_pattern_is_read_off_the_stages():
    from dyvte_engine.analysis.stages import PATTERN, _stages

    found, pattern = _stages(stepped(40, 0.1), 50, 0)
    assert found.first == (3, 8) and list(pattern.values()) == [1.0, 1.0, 1.0]  # falls, rises, rises, as it was made
    reverse = _stages(stepped(40, 0.1)[:, ::-1], 50, 0)[1]
    assert list(reverse) == list(PATTERN) and list(reverse.values()) == [1.0, 1.0, 1.0]
    flat = stepped(40, 0.1)
    flat[..., 1] = 1 / flat[..., 1]
    assert list(_stages(flat, 50, 0)[1].values()) == [0.0, 1.0, 0.0]


def test_entropy_of_nano(engine, tasks):
    samples = tasks[0].samples
    entropy = attention_entropy(engine, samples, [3, -1])
    assert entropy.exits == (None, 3, -1)
    full, early = measure(engine, samples), measure(engine, samples, 3)
    np.testing.assert_allclose(entropy.of("paper", "text")[1], early[..., FIELDS.index("paper_text")], atol=1e-5)
    paired = (early - full)[:, 4:, FIELDS.index("paper_text")].mean(1)
    assert entropy.later_change("paper")[0][0] == pytest.approx(paired.mean(), abs=1e-5)
    assert np.isnan(entropy.of("head", "visual")[2]).all()
    rows = entropy.rows()
    assert len(rows) == 2 * 3 * 3 * 12
    row = next(r for r in rows if (r["reading"], r["keys"], r["exit"], r["layer"]) == ("head", "text", 3, 6))
    assert row["difference"] == pytest.approx((early - full)[:, 6, FIELDS.index("head_text")].mean(), abs=1e-5)
    assert len(entropy.plot_all().axes) == 6
    with pytest.raises(InvalidArgumentError, match=r"exits is \[11\]; accepted: whole numbers from -1 to 10"):
        attention_entropy(engine, samples, [11])


def test_chosen_exits():
    assert [chosen_exits(n) for n in (12, 32, 2)] == [(1, 3, 5, 8), (4, 10, 15, 23), (0,)]


def test_manual_exit_is_what_the_engine_does(engine, tasks, manual):
    assert [t.name for t in manual.tasks] == ["gqa", "textvqa"] and manual.num_layers == 12
    samples = tasks[0].samples
    full = run.answer_all(engine, samples, KeepAll(), "full")
    for k, policy in [(0, FixedExit(-1)), (1, FixedExit(0)), (5, FixedExit(4)), (12, KeepAll())]:
        answers = run.answer_all(engine, samples, policy, "again")
        assert manual.tasks[0].scores[k]["value"] == tasks[0].score([a.text for a in answers])["value"]
        assert manual.tasks[0].same[:, k].tolist() == [a.text == b.text for a, b in zip(answers, full)]
    rows = manual.rows()
    assert len(rows) == 2 * 13 and [r["k"] for r in rows[:13]] == list(range(13)) and rows[12]["same"] == 1
    assert json.dumps(manual.record())
    axes = manual.plot().axes[0]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [100 * r["value"] for r in rows[:13]])


def test_plateau_by_hand():
    credit = np.array([[0, 1, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], float)
    task = TaskExits("t", [{}] * 5, credit == credit[:, -1:], credit)
    assert task.plateau() == 3 and task.plateau(0.3) == 1 and task.plateau(1) == 0
    mean, low, high = task.difference(2)
    assert mean == -0.25 and -0.75 <= low < mean < high == 0


def test_histogram_is_where_the_engine_exits(engine, tasks, manual):
    policy = DynamicExit.from_file(NANO_HEADS, threshold=0.98)
    histogram = exit_histogram(engine, tasks, policy, "heads", manual=manual)
    engine.policy = policy
    results = engine.generate([s.prompt for s in tasks[1].samples], [s.picture for s in tasks[1].samples])
    want = [11 if r.stats.exit_layer is None else r.stats.exit_layer for r in results]
    assert histogram.layers["textvqa"].tolist() == want and len(set(want)) > 1
    same = manual.tasks[1].same
    assert histogram.earliest["textvqa"].tolist() == [next(k for k in range(1, 13) if row[k]) - 1 for row in same]
    row = histogram.rows()[1]
    assert sum(row["counts"]) == row["n"] == 8 and row["mean"] == pytest.approx(np.mean(want))
    assert len(histogram.plot().axes) == 2


def test_timelines(engine, tasks):
    policy = DynamicExit.from_file(NANO_HEADS, min_layer=2)
    shown = timelines(engine, [t.samples[0] for t in tasks], policy)
    assert shown.asked == list(range(2, 11)) and shown.record()["threshold"] == policy.threshold
    for p, task in zip(shown.prompts, tasks):
        sample = task.samples[0]
        engine.policy = policy
        early = engine.generate(sample.prompt, sample.picture)
        assert (p.answer, p.exit_layer) == (early.text.strip(), early.stats.exit_layer)
        assert list(p.tokens_per_layer) == early.stats.tokens_per_layer and p.tokens == p.tokens_per_layer[0]
        fired = [layer for layer in shown.asked if p.p_exit[layer] > policy.threshold]
        assert p.exit_layer == (fired[0] if fired else None)
        assert p.reference == reference_text(sample)
    assert "picture" not in shown.rows()[0] and json.dumps(shown.record())
    assert len(shown.plot().axes) == 2 * 4


def test_prompts_of_a_file_become_a_task(engine, tmp_path, tasks):
    """With answers they are scored by them, without by agreement with the full model."""
    lines = []
    for n, s in enumerate(tasks[0].samples[:4]):
        s.picture.save(tmp_path / f"{n}.png")
        lines.append({"image": f"{n}.png", "prompt": s.prompt, "answer": str(s.reference)})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (task,) = load_data(str(path), limit=3)
    assert task.name == "mine" and [s.prompt for s in task.samples] == [e["prompt"] for e in lines[:3]]
    known = manual_exit(engine, [task]).tasks[0]
    assert known.scores[-1]["metric"] == "accuracy" and known.scores[-1]["n"] == 3
    path.write_text("\n".join(json.dumps({k: v for k, v in e.items() if k != "answer"}) for e in lines))
    (task,) = load_data(str(path))
    unknown = manual_exit(engine, [task]).tasks[0]
    assert unknown.scores[0]["metric"] == "same answers" and unknown.scores[-1]["value"] == 1
    assert unknown.scores[0]["value"] == unknown.same[:, 0].mean()
    with pytest.raises(InvalidArgumentError, match="data is 'gpa'; accepted: all, pope"):
        load_data("gpa")
    with pytest.raises(InvalidArgumentError, match="examples is empty"):
        task_of([], "none")
    assert task_of([Example(tasks[0].samples[0].picture, "p")], "one").samples[0].reference is None


def test_band_of_a_mean():
    mean, low, high = mean_band(np.array([[1.0, np.nan, 2.0], [3.0, np.nan, np.nan], [5.0, np.nan, 4.0]]))
    assert mean[0] == 3 and np.isnan(mean[1]) and mean[2] == 3
    assert high[0] - 3 == pytest.approx(1.96 * 2 / np.sqrt(3), rel=1e-3) == 3 - low[0]
    assert high[2] - 3 == pytest.approx(1.96 * np.sqrt(2) / np.sqrt(2), rel=1e-3)
