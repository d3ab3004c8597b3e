"""The tasks against their pictures (truth is read off the pixels), and the reproducibility of the suite."""

import random
import re

import numpy as np
import pytest

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.eval import TASKS, load_tasks, task
from dyvte_engine.eval.shapes import Shapes
from dyvte_engine.training.nano import scenes

N = 60


@pytest.fixture(scope="module")
def suite():
    return {t.name: t for t in load_tasks(seed=1, limit=N)}


def perfect(sample: task.Sample) -> str:
    """What a reader of the reference would answer."""
    if "options" in sample.meta:
        return f"{'ABCD'[sample.reference]}."
    if isinstance(sample.reference, dict):
        return max(sample.reference, key=sample.reference.get)
    return sample.reference if isinstance(sample.reference, str) else "; ".join(f[0] for f in sample.reference)


def wrong(sample: task.Sample) -> str:
    if "options" in sample.meta:
        return f"({'ABCD'[(sample.reference + 1) % 4]})"
    return {"yes": "no", "no": "yes"}.get(perfect(sample), "nothing of the kind")


def test_every_task_is_complete(suite):
    assert tuple(suite) == TASKS and len(TASKS) == 10
    for t in suite.values():
        assert len(t.samples) == N
        assert len({s.key for s in t.samples}) == N
        assert {s.form for s in t.samples} <= set(task.FORMS)


@pytest.mark.parametrize("name", TASKS)
def test_right_and_wrong_answers(suite, name):
    t = suite[name]
    best, worst = (t.score([answer(s) for s in t.samples]) for answer in (perfect, wrong))
    assert best["value"] == (best["of"] if name == "mme" else 1)
    assert worst["value"] == 0
    assert best["n"] == (N // 4 if name == "mmb" else N)
    assert worst["ci95"][0] <= worst["value"] <= worst["ci95"][1] < best["ci95"][0] <= best["value"]


def test_score_refuses_other_lengths(suite):
    with pytest.raises(InvalidArgumentError, match="answers"):
        suite["gqa"].score(["yes"])


def test_same_again_and_a_longer_suite_begins_alike(suite):
    for again in load_tasks(seed=1, limit=N + 20):
        first = suite[again.name]
        for a, b in zip(first.samples, again.samples):
            assert (a.key, a.prompt, a.reference, a.meta) == (b.key, b.prompt, b.reference, b.meta)
        assert np.array_equal(first.samples[-1].picture, again.samples[N - 1].picture)
    other = load_tasks(["gqa"], seed=2, limit=N)[0]
    assert [s.prompt for s in other.samples] != [s.prompt for s in suite["gqa"].samples]


def test_pictures_are_not_those_of_training():
    """Neither the split nor the numbers of a view's scene occur in nano's training or in its heads' examples."""
    from dyvte_engine.training.nano import examples, head_examples

    _, split, index = Shapes().view(0, 0).key.split("/")
    assert split == "heldout" and int(index) > max(examples.FIRST_SCENE, head_examples.FIRST_SCENE)


def has_color(picture: np.ndarray, color: str) -> bool:
    """Whether at least 40 pixels are the colour, give or take the renderer's jitter of 14."""
    near = np.abs(picture.astype(int) - scenes.COLORS[color]).max(-1) <= 16
    return near.sum() >= 40


def test_answers_about_colors_hold_in_the_pixels(suite):
    asked = 0
    for s in suite["gqa"].samples + suite["vqav2"].samples:
        if s.prompt.startswith("What color"):
            assert has_color(np.asarray(s.picture), perfect(s))
            asked += 1
    for s in suite["pope"].samples:
        color = re.match(r"Is there an? (\w+) ", s.prompt)[1]
        if s.reference == "yes":
            assert has_color(np.asarray(s.picture), color)
            asked += 1
    assert asked > 30


def test_relations_hold_in_the_pixels():
    """The centres of mass of the two colours lie as the reference says (colours of the pair differ)."""
    asked = 0
    for s in load_tasks(["gqa"], seed=3, limit=200)[0].samples:
        found = re.match(r"Is the (\w+) \w+ (?:to the )?(left|right|above|below).* the (\w+) \w+\?", s.prompt)
        if s.meta["split"] != "spatial" or not found or found[1] == found[3] or " or " in s.prompt:
            continue
        picture = np.asarray(s.picture).astype(int)
        places = [np.argwhere(np.abs(picture - scenes.COLORS[c]).max(-1) <= 16) for c in (found[1], found[3])]
        if any(np.ptp(p, axis=0).max() > 36 for p in places):
            continue  # several things of the colour
        one, two = (p.mean(0) for p in places)
        truth = {"left": one[1] < two[1], "right": one[1] > two[1], "above": one[0] < two[0], "below": one[0] > two[0]}
        assert truth[found[2]] == (s.reference == "yes"), s.key
        asked += 1
    assert asked >= 15


def test_pope_is_balanced(suite):
    samples = suite["pope"].samples
    assert {s.meta["split"] for s in samples} == {"random", "popular", "adversarial"}
    for setting in ("random", "popular", "adversarial"):
        answers = [s.reference for s in samples if s.meta["split"] == setting]
        assert abs(answers.count("yes") - answers.count("no")) <= 4


def test_adversarial_absence_is_near_what_is_there():
    world = Shapes()
    for index in range(40):
        view = world.view(5, index)
        color, noun = world.alike(random.Random(index), view).split()
        assert f"{color} {noun}" not in {world.label(t) for t in view.things}
        assert noun in {t.noun for t in view.things}
        if len({t.color for t in view.things}) > 1 and len({t.noun for t in view.things}) > 1:
            combinations = {(a.color, b.noun) for a in view.things for b in view.things}
            if len(combinations) > len({(t.color, t.noun) for t in view.things}):
                assert color in {t.color for t in view.things}


def test_printed_words_are_unseen_and_printed(suite):
    words = [perfect(s) for s in suite["textvqa"].samples]
    assert set(words) <= set(scenes.UNSEEN_WORDS)
    assert {s.meta["split"] for s in suite["textvqa"].samples} == {"known font", "unseen font"}
    for s in suite["textvqa"].samples[:20]:
        picture = np.asarray(s.picture.convert("L"), int)
        assert (picture < 160).sum() > 15 * len(perfect(s))  # ink on a light ground


def test_circular_shift_shows_every_option_in_every_place(suite):
    groups = {}
    for s in suite["mmb"].samples:
        groups.setdefault(s.meta["question"], []).append(s)
    for samples in groups.values():
        assert sorted(s.reference for s in samples) == [0, 1, 2, 3]
        assert len({s.prompt for s in samples}) == 4


def test_mme_pairs_share_a_picture_and_differ_in_the_answer(suite):
    for a, b in zip(suite["mme"].samples[::2], suite["mme"].samples[1::2]):
        assert (a.reference, b.reference) == ("yes", "no") and a.prompt != b.prompt
        assert np.array_equal(a.picture, b.picture)


def test_one_right_option(suite):
    for s in suite["seed"].samples + suite["sqa"].samples + suite["mmb"].samples:
        assert len(set(s.meta["options"])) == 4
        assert f"{'ABCD'[s.reference]}. {s.meta['options'][s.reference]}\n" in s.prompt


def test_arguments():
    with pytest.raises(InvalidArgumentError, match="tasks is"):
        load_tasks(["pope", "coco"])
    with pytest.raises(InvalidArgumentError, match="limit is 3"):
        load_tasks(["pope"], limit=3)
    with pytest.raises(InvalidArgumentError, match="source"):
        load_tasks(["pope"], source="photos")


def test_forms_can_be_left_out(suite):
    kept, left_out = suite["mme"].within({task.YES_NO})
    assert len(kept.samples) + sum(left_out.values()) == N and set(left_out) == {task.STATEMENT}
    assert set(kept.score([perfect(s) for s in kept.samples])["splits"]) == {"existence", "color", "position"}
