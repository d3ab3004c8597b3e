"""What the nine tasks may know of a picture, whatever it is made of: things with names, colours and places, and a word.

A world makes such views from a seed and words its questions; `shapes.py` and `emoji.py` are the two there are.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

MIN_OFFSET = 0.12  # of the picture's side, between two centres before one is called left of or above the other


@dataclass(frozen=True)
class Thing:
    """One thing: its noun ("circle"), colour name (None: has none) and centre, x and y from 0 to 1."""

    noun: str
    color: str | None
    center: tuple[float, float]


@dataclass(frozen=True)
class View:
    """One picture. `word` is printed text, `font` says whether its font was in training ("known font") or not."""

    key: str
    things: tuple[Thing, ...]
    draw: Callable[[], Image.Image]
    word: str | None = None
    font: str | None = None

    def with_unique(self, part: str) -> list[Thing]:
        """Things whose `part` ("noun" or "color") no other thing of the picture shares."""
        counts = Counter(getattr(t, part) for t in self.things)
        return [t for t in self.things if counts[getattr(t, part)] == 1 and getattr(t, part) is not None]


class World(Protocol):
    """A source of pictures. Everything it returns depends on its arguments alone."""

    name: str
    nouns: tuple[str, ...]
    colors: tuple[str, ...]
    styles: tuple[str, ...]  # ways of drawing; a task takes them in turn
    words: tuple[str, ...]  # that a question may deny to be printed

    def view(self, seed: int, index: int, printed: bool = False, style: str = "") -> View:
        """Picture `index`, none of which was trained on; `printed` ones carry a word never seen in training."""
        ...

    def label(self, thing: Thing) -> str:
        """What POPE's questions and relations call a thing: "red circle" or "dog"."""
        ...

    def labels(self) -> tuple[str, ...]:
        """All there can be, like ones near each other."""
        ...

    def alike(self, rng: random.Random, view: View) -> str:
        """A label that is not in the picture, as like as possible to one that is."""
        ...

    def ask_color(self, noun: str) -> str: ...

    def ask_noun(self, color: str) -> str: ...

    def ask_count(self, noun: str) -> str: ...

    def ask_if_color(self, noun: str, color: str) -> str: ...

    def ask_if_count(self, noun: str, number: int) -> str: ...

    def ask_all(self) -> str: ...

    def fact(self, thing: Thing) -> tuple[str, ...]:
        """Wordings of "this is there", of which a description must have one."""
        ...

    def wordings(self, answer: str) -> dict[str, int]:
        """Votes of ten for each wording of an answer (VQAv2)."""
        ...


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def relation(one: Thing, two: Thing, axis: int) -> str | None:
    """Where one is from two along x (0) or y (1); None when too close to say."""
    offset = two.center[axis] - one.center[axis]
    if abs(offset) < MIN_OFFSET:
        return None
    return (("to the left of", "to the right of"), ("above", "below"))[axis][offset < 0]
