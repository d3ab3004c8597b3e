"""Every metric against numbers worked out by hand or against its definition, word for word."""

import itertools

import numpy as np
import pytest

from dyvte_engine.eval import metrics
from dyvte_engine.eval.task import Sample


def sample(reference, split="all", **meta):
    return Sample("k", lambda: None, "?", reference, "one word", {"split": split, "style": "", **meta})


@pytest.mark.parametrize(
    ("text", "normal"),
    [(" The  Red-Circle. ", "red circle"), ("Three!", "3"), ("a none", "0"), ("It's an apple", "it s apple")],
)
def test_normalise(text, normal):
    assert metrics.normalise(text) == normal


@pytest.mark.parametrize(
    ("text", "number"),
    [("B", 1), (" b.", None), ("(C) cat", 2), ("D: dog", 3), ("Answer: B", 1), ("The answer is C.", 2), ("E", None),
     ("A red circle", None), ("dog", 3), ("Dog.", 3), ("Because", None), ("", None)],
)  # fmt: skip
def test_letter(text, number):
    assert metrics.letter(text, ["ant", "bee", "cat", "dog"]) == number


@pytest.mark.parametrize(("text", "said"), [("No, not yes", "no"), ("Yes.", "yes"), ("nothing", None), ("eyes", None)])
def test_yes_or_no(text, said):
    assert metrics.yes_or_no(text) == said


def test_soft_accuracy_leaves_out_every_voter():
    votes = {"teal": 6, "green": 2, "The Blue": 1, "blue": 1}
    people = [metrics.normalise(v) for v, count in votes.items() for _ in range(count)]
    for answer in ("teal", "green", "blue", "red"):
        by_definition = np.mean(
            [min(others.count(answer) / 3, 1) for others in itertools.combinations(people, len(people) - 1)]
        )
        assert metrics.soft_accuracy([sample(votes)], [answer])["value"] == pytest.approx(by_definition)


def test_pope():
    #            truth, answers: 2 hits, 1 miss, 1 false alarm, 1 true no, 1 neither
    samples = [sample(r, "random") for r in ("yes", "yes", "yes", "no", "no", "no")]
    answers = ["Yes", "yes, there is", "no", "Yes", "No.", "perhaps"]
    result = metrics.pope([*samples, sample("yes", "popular")], [*answers, "yes"])
    random = result["splits"]["random"]
    assert random["f1"] == pytest.approx(2 / 3)
    assert random["precision"] == random["recall"] == pytest.approx(2 / 3)
    assert random["value"] == pytest.approx(0.5) and random["yes_ratio"] == pytest.approx(0.5)
    assert result["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["accuracy"]["value"] == pytest.approx(4 / 7)


def test_mme():
    samples = [sample(r, "count", pair=str(i // 2)) for i, r in enumerate(("yes", "no") * 3)]
    samples += [sample(r, "word", pair="0") for r in ("yes", "no")]
    answers = ["yes", "no", "yes", "yes", "no", "yes", "yes", "no"]
    result = metrics.mme(samples, answers)
    # count: pictures with 2, 1 and 0 right: accuracy 1/2, accuracy+ 1/3
    assert result["splits"]["count"]["value"] == pytest.approx(100 * (1 / 2 + 1 / 3))
    assert result["splits"]["word"]["value"] == 200
    assert result["value"] == pytest.approx(100 * (1 / 2 + 1 / 3) + 200) and result["of"] == 400


def test_circular():
    options = list("wxyz")
    samples = [sample(i % 4, question=str(i // 4), options=options) for i in range(8)]
    answers = ["A", "B", "C", "D", "A", "B", "C", "C"]
    result = metrics.circular_choice(samples, answers)
    assert result["value"] == 0.5 and result["n"] == 2
    assert result["plain"]["value"] == pytest.approx(7 / 8)


def test_facts():
    reference = (("no",), ("star is above", "cross is below"), ("three", "many"))
    answers = ["No, the cross is below the star.", "There are 3, no less.", "nothing above"]
    result = metrics.facts([sample(reference)] * 3, answers)
    assert result["value"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_exact_takes_relations_both_ways():
    assert metrics.accuracy([sample("left")] * 4, ["to the left", "Left of", "left.", "right"])["value"] == 0.75


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).random(400)
    low, high = metrics.bootstrap(400, lambda rows: values[rows].mean())
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_shares_have_wilson_intervals():
    result = metrics.accuracy([sample("x")] * 10, ["x"] * 10)
    assert result["ci95"] == pytest.approx([0.7225, 1.0], abs=1e-4)
