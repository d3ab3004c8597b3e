"""The nine benchmarks' own metrics, with 95 % intervals: Wilson for shares of right answers, bootstrap for the rest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..training.metrics import wilson
from .task import Sample

RESAMPLES = 1000
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(n) for n, word in enumerate(NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_NOT_WORDS = re.compile(r"[^\w\s]|_")


def normalise(text: str) -> str:
    """VQAv2's rules: lower case, no punctuation, no articles, number words as digits."""
    words = _NOT_WORDS.sub(" ", text.casefold()).split()
    return " ".join(_DIGITS.get(w, w) for w in words if w not in _ARTICLES)


def yes_or_no(text: str) -> str | None:
    """The first "yes" or "no" of an answer; None if it says neither."""
    found = re.search(r"\b(yes|no)\b", text.casefold())
    return found[1] if found else None


def letter(text: str, options: Sequence[str]) -> int | None:
    """Number of the option an answer chose: by its full text, else by a letter standing alone ("(B)", "B. ...")."""
    exact = [i for i, option in enumerate(options) if normalise(option) == normalise(text)]
    if exact:
        return exact[0]
    found = re.match(r"(?i:(?:the )?(?:answer|option)(?: is)?)?\W*([A-Z])(?=[.):,]|\s*$)", text.strip())
    number = ord(found[1]) - ord("A") if found else len(options)
    return number if number < len(options) else None


def report(metric: str, values: Sequence[float], splits: Sequence[str], **more: Any) -> dict[str, Any]:
    """Mean of per-unit scores (0 to 1) with its interval, in all and by split."""
    by_split: dict[str, list[float]] = defaultdict(list)
    for value, split in zip(values, splits, strict=True):
        by_split[split].append(value)
    parts = {split: _mean(part) for split, part in sorted(by_split.items())}
    return {"metric": metric, **_mean(values), **more, "splits": parts}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    array = np.asarray(values, float)
    if np.isin(array, (0.0, 1.0)).all():
        interval = wilson(int(array.sum()), len(array))
    else:
        interval = bootstrap(len(array), lambda rows: float(array[rows].mean()))
    return {"value": float(array.mean()), "n": len(array), "ci95": list(interval)}


def bootstrap(units: int, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """95 % percentile interval of `statistic(rows)` over RESAMPLES seeded resamples of the units."""
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(0, units, units)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def credit(sample: Sample, answer: str) -> float:
    """0 to 1 for one answer, by what the reference is: an option's number, votes, facts, "yes" or "no", or a text."""
    if "options" in sample.meta:
        return float(letter(answer, sample.meta["options"]) == sample.reference)
    if isinstance(sample.reference, dict):
        return _soft(normalise(answer), sample.reference)
    if isinstance(sample.reference, tuple):
        return _stated(f" {normalise(answer)} ", sample.reference)
    if sample.reference in ("yes", "no"):
        return float(yes_or_no(answer) == sample.reference)
    given = re.sub(r"^to | of$", "", normalise(answer))  # "to the left of" is "left"
    return float(given == normalise(sample.reference))


def _soft(answer: str, votes: dict[str, int]) -> float:
    """min(votes/3, 1) for the answer, mean over leaving out each voter."""
    agreeing = sum(count for text, count in votes.items() if normalise(text) == answer)
    total = sum(votes.values())
    # without one who agrees, agreeing - 1 are left to count; without one who does not, all of them
    return (agreeing * min((agreeing - 1) / 3, 1.0) + (total - agreeing) * min(agreeing / 3, 1.0)) / total


def _stated(said: str, facts: Sequence[Sequence[str]]) -> float:
    return float(np.mean([any(f" {normalise(w)} " in said for w in fact) for fact in facts]))


def accuracy(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """GQA, ScienceQA, SEED: share of right answers, after `normalise` or by the option chosen."""
    return _mean_credit("accuracy", samples, answers)


def soft_accuracy(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """VQAv2, TextVQA: an answer counts as much as voters gave it; reference {answer: votes}."""
    return _mean_credit("soft accuracy", samples, answers)


def facts(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """MM-Vet in kind: share of the facts an answer states, mean over answers.

    reference: facts, each a tuple of wordings; one is stated when a wording appears in the answer as whole words.
    """
    return _mean_credit("facts found", samples, answers)


def _mean_credit(name: str, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    credits = [credit(s, a) for s, a in zip(samples, answers, strict=True)]
    return report(name, credits, [s.meta["split"] for s in samples])


def pope(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """POPE: F1 of "yes", mean of the three settings, with accuracy, precision, recall and yes-ratio of each."""
    truth = np.array([s.reference == "yes" for s in samples])
    said = [yes_or_no(a) for a in answers]
    yes, right = np.array([a == "yes" for a in said]), np.array([a == s.reference for a, s in zip(said, samples)])
    splits = np.array([s.meta["split"] for s in samples])
    names = sorted(set(splits))

    def mean_f1(rows: np.ndarray) -> float:
        return float(np.mean([_f1(truth[rows], yes[rows], splits[rows] == name) for name in names]))

    everything = np.arange(len(samples))
    parts = {}
    for name in names:
        rows = splits == name
        hits = int((truth & yes & rows).sum())
        parts[name] = _share(right[rows]) | {
            "f1": _f1(truth, yes, rows),
            "precision": hits / max(int((yes & rows).sum()), 1),
            "recall": hits / max(int((truth & rows).sum()), 1),
            "yes_ratio": float(yes[rows].mean()),
        }
    return {
        "metric": "f1",
        "value": mean_f1(everything),
        "n": len(samples),
        "ci95": list(bootstrap(len(samples), mean_f1)),
        "accuracy": _share(right),
        "yes_ratio": float(yes.mean()),
        "splits": parts,
    }


def _share(right: np.ndarray) -> dict[str, Any]:
    return {"value": float(right.mean()), "n": len(right), "ci95": list(wilson(int(right.sum()), len(right)))}


def _f1(truth: np.ndarray, yes: np.ndarray, rows: np.ndarray) -> float:
    both = float((truth & yes & rows).sum())
    return 2 * both / max(float((truth & rows).sum() + (yes & rows).sum()), 1.0)


def circular_choice(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """MMBench: a question counts when it is right in every rotation of its options; `meta["question"]` groups them.

    n counts questions; "plain" is the share of right choices over all rotations.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    splits: dict[str, str] = {}
    for s, a in zip(samples, answers, strict=True):
        groups[s.meta["question"]].append(credit(s, a) == 1.0)
        splits[s.meta["question"]] = s.meta["split"]
    plain = _share(np.array([right for rights in groups.values() for right in rights]))
    every = [float(all(rights)) for rights in groups.values()]
    return report("circular accuracy", every, [splits[q] for q in groups], plain=plain)


def mme(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """MME: for each subtask 100 (accuracy + accuracy+), the latter over pictures with both answers right; their sum.

    `meta["pair"]` joins the two questions of a picture; reference "yes" or "no". n counts questions.
    """
    pairs: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for s, a in zip(samples, answers, strict=True):
        pairs[s.meta["split"], s.meta["pair"]].append(credit(s, a) == 1.0)
    keys = list(pairs)
    subtask = np.array([split for split, _ in keys])
    single = np.array([np.mean(pairs[k]) for k in keys])
    both = np.array([all(pairs[k]) for k in keys], float)

    def score(name: str, rows: np.ndarray) -> float:
        chosen = rows[subtask[rows] == name]
        return 100 * float(single[chosen].mean() + both[chosen].mean()) if len(chosen) else 0.0

    names, everything = sorted(set(subtask)), np.arange(len(keys))
    parts = {
        name: {
            "value": score(name, everything),
            "n": int(sum(len(pairs[k]) for k in keys if k[0] == name)),
            "ci95": list(bootstrap(len(keys), partial(score, name))),
        }
        for name in names
    }
    total = lambda rows: sum(score(name, rows) for name in names)  # noqa: E731
    right = np.array([r for rights in pairs.values() for r in rights])
    return {
        "metric": "MME score",
        "value": total(everything),
        "of": 200 * len(names),
        "n": len(samples),
        "ci95": list(bootstrap(len(keys), total)),
        "accuracy": _share(right),
        "splits": parts,
    }
