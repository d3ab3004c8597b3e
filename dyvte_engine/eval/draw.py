"""The pictures of a task and what can be asked about one: common to the open and the multiple-choice tasks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any

from .task import Sample
from .worlds import Thing, View, World, relation

NAMES = ("pope", "gqa", "vqav2", "textvqa", "sqa", "mmb", "seed", "mme", "mmvet")
PER_TASK = 10_000_000  # picture numbers between the first of one task and of the next
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {v: k for k, v in OPPOSITE.items()}
Question = tuple[str, str]


class Draw:
    """The pictures of one task: number i of (task, seed), the same whenever asked for, drawing styles in turn.

    `popular_from`: so many pictures tell which things are frequent.
    """

    def __init__(self, world: World, task: str, seed: int, popular_from: int = 300):
        self.world, self.task, self.seed, self.popular_from = world, task, seed, popular_from

    def style(self, index: int) -> str:
        return self.world.styles[index % len(self.world.styles)]

    def turns(self) -> Iterator[tuple[int, int]]:
        """(index, turn) without end: turn counts the pictures of one style, so that every style sees every kind."""
        return ((index, index // len(self.world.styles)) for index in count())

    def view(self, index: int, printed: bool = False) -> tuple[View, random.Random]:
        """The picture and a generator for its question."""
        number = NAMES.index(self.task) * PER_TASK + index
        view = self.world.view(self.seed, number, printed, self.style(index))
        return view, random.Random(f"{self.task}/{self.world.name}/{self.seed}/{index}")

    def sample(
        self, index: int, view: View, prompt: str, reference: Any, form: str, kind: str, split: str, **meta: Any
    ) -> Sample:
        key = f"{self.task}/{self.world.name}/{self.seed}/{index}{meta.get('part', '')}"
        meta = {"split": split, "style": self.style(index), "kind": kind, **meta}
        return Sample(key, view.draw, prompt, reference, form, meta)


def labels_of(world: World, view: View) -> set[str]:
    return {world.label(t) for t in view.things}


def absent(rng: random.Random, world: World, view: View) -> str:
    """A label that is not in the picture."""
    there = labels_of(world, view)
    return rng.choice([label for label in world.labels() if label not in there])


def told_apart(world: World, view: View) -> list[Thing]:
    """Things whose label no other thing of the picture shares."""
    counts = Counter(world.label(t) for t in view.things)
    return [t for t in view.things if counts[world.label(t)] == 1]


def pair(rng: random.Random, world: World, view: View) -> tuple[Thing, Thing, int, str] | None:
    """Two things that look different, an axis, and where the first is from the second along it."""
    things = told_apart(world, view)
    ordered = [(a, b) for a in things for b in things if a is not b]
    pairs = [(a, b, axis, true) for a, b in ordered for axis in (0, 1) if (true := relation(a, b, axis))]
    return rng.choice(pairs) if pairs else None


def attribute(rng: random.Random, world: World, view: View, ask_color: bool) -> Question | None:
    """The colour of a thing, or what has a colour; with the answer."""
    things = [t for t in view.with_unique("noun" if ask_color else "color") if t.color is not None]
    if not things:
        return None
    thing = rng.choice(things)
    assert thing.color is not None
    return (world.ask_color(thing.noun), thing.color) if ask_color else (world.ask_noun(thing.color), thing.noun)


def number(rng: random.Random, world: World, view: View) -> tuple[str, int]:
    """A noun and how often it is there, the numbers found in the picture and zero alike likely."""
    counts = Counter(t.noun for t in view.things)
    chosen = rng.choice([0, *sorted(set(counts.values()))])
    return rng.choice([n for n in world.nouns if counts[n] == chosen]), chosen
