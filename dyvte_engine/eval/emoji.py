"""Composed scenes of emoji as a source of pictures: up to six things on coloured tiles, or a printed word."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from PIL import Image

from ..checks import check_names
from ..errors import InvalidArgumentError
from ..training.nano.scenes import SEEN_WORDS, UNSEEN_WORDS, WORDS
from . import emoji_sets as sets
from .metrics import NUMBERS
from .worlds import Thing, View, article

if TYPE_CHECKING:
    from .compose import Layout, Painter, Placed

COLORS = {
    "red": (222, 45, 38),
    "green": (49, 163, 84),
    "blue": (49, 110, 220),
    "yellow": (250, 220, 60),
    "orange": (245, 140, 30),
    "purple": (130, 60, 180),
    "pink": (250, 150, 190),
    "black": (25, 25, 25),
}
INK = ((20, 20, 20), (160, 20, 20), (20, 60, 160), (15, 100, 50), (90, 20, 120))
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf", "cmss10.ttf")
UNSEEN_FONTS = ("DejaVuSerif-Bold.ttf", "STIXGeneralBol.ttf", "cmtt10.ttf", "cmb10.ttf")
SPLITS = ("heldout", "train")
MAX_THINGS = 6


@cache
def _painter() -> Painter:
    import torch

    from .compose import Painter

    return Painter({style: torch.from_numpy(sets.atlas(style)) for style in sets.STYLES})


def _tone(rng: random.Random, dark: bool) -> tuple[int, int, int]:
    low, high = (15, 70) if dark else (170, 255)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


@dataclass(frozen=True)
class Picture:
    """Paints its layout when called."""

    layout: Layout

    def __call__(self) -> Image.Image:
        return Image.fromarray(_painter()([self.layout])[0].permute(1, 2, 0).numpy())


class Emoji:
    """224 x 224 scenes. The "train" split has other scenes, other words and fonts, and never the style twemoji.

    words: what the training split prints, without those that are held out; by default a few, and random letters.
    """

    name = "emoji"
    nouns: tuple[str, ...] = sets.NOUNS
    colors: tuple[str, ...] = tuple(COLORS)

    def __init__(self, styles: Sequence[str] = (), split: str = "heldout", words: Sequence[str] = ()):
        accepted = sets.STYLES if split == "heldout" else sets.TRAINING_STYLES
        if split not in SPLITS or set(styles) - set(accepted):
            given = f"split is {split!r}, styles {list(styles)!r}"
            raise InvalidArgumentError(f"{given}; accepted: {', '.join(SPLITS)}, and for it {', '.join(accepted)}")
        check_names("styles", styles)
        self.styles: tuple[str, ...] = tuple(styles) or accepted
        self.split = split
        self.printed = tuple(w for w in words if w not in UNSEEN_WORDS)
        self.words = self.printed or WORDS

    def view(self, seed: int, index: int, printed: bool = False, style: str = "") -> View:
        key = f"emoji/{seed}/{self.split}/{index}"
        rng = random.Random(key)
        from .compose import Layout, Printed

        dark = rng.random() < 0.15
        one, two = _tone(rng, dark), _tone(rng, dark)
        empty = Layout(
            style or self.styles[index % len(self.styles)],
            (one, two if rng.random() < 0.7 else one),
            angle=rng.uniform(0, 2 * math.pi),
            waves=rng.randint(3, 14) if rng.random() < 0.35 else 0,
            noise=rng.uniform(2, 9) if rng.random() < 0.5 else 0.0,
            seed=rng.getrandbits(32),
            placed=(),
        )
        if printed:
            text, font = self._word(rng, index)
            red, green, blue = rng.choice(INK)
            ink = (255 - red // 3, 255 - green // 3, 255 - blue // 3) if dark else (red, green, blue)
            word = Printed(text, font, rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.9), rng.uniform(0.09, 0.16), ink)
            known = "unseen font" if font in UNSEEN_FONTS else "known font"
            return View(key, (), Picture(replace(empty, printed=word)), text, known)
        placed, things = self._things(rng)
        return View(key, things, Picture(replace(empty, placed=placed)))

    def _word(self, rng: random.Random, index: int) -> tuple[str, str]:
        """Held out: a word never printed in training, every other time in a font never seen either."""
        if self.split == "heldout":
            return rng.choice(UNSEEN_WORDS), rng.choice(UNSEEN_FONTS if index // len(self.styles) % 2 else FONTS)
        if self.printed:
            return rng.choice(self.printed), rng.choice(FONTS)
        letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 5)))
        text = rng.choice(SEEN_WORDS) if rng.random() < 0.5 or letters in UNSEEN_WORDS else letters
        return text, rng.choice(FONTS)

    def _things(self, rng: random.Random) -> tuple[tuple[Placed, ...], tuple[Thing, ...]]:
        from .compose import TILE, Placed

        wanted, tiled = rng.randint(1, MAX_THINGS), rng.random() < 0.75
        category = rng.choice(list(sets.CATEGORY.values()))
        # half of the kinds come from one category, so that similar things come together
        close = [n for n in self.nouns if sets.CATEGORY[n] == category]
        kinds = {rng.choice(close if rng.random() < 0.5 else self.nouns) for _ in range(rng.randint(1, 4))}
        palette = rng.sample(self.colors, rng.randint(2, 5))
        placed: list[Placed] = []
        things: list[Thing] = []
        for _ in range(wanted):
            noun, color = rng.choice(sorted(kinds)), rng.choice(palette) if tiled else None
            side = rng.uniform(0.17, 0.3 if wanted < 4 else 0.24)
            reach = side * (TILE if tiled else 1.0) / 2
            for _ in range(30):
                x, y = rng.uniform(reach, 1 - reach), rng.uniform(reach, 1 - reach)
                if all(max(abs(x - p.x), abs(y - p.y)) > reach + p.side * TILE / 2 + 0.01 for p in placed):
                    placed.append(Placed(self.nouns.index(noun), x, y, side, COLORS[color] if color else None))
                    things.append(Thing(noun, color, (x, y)))
                    break
        return tuple(placed), tuple(things)

    def label(self, thing: Thing) -> str:
        return thing.noun

    def labels(self) -> tuple[str, ...]:
        return self.nouns

    def alike(self, rng: random.Random, view: View) -> str:
        """Something of the same category as a thing that is there."""
        there = {t.noun for t in view.things}
        categories = {sets.CATEGORY[noun] for noun in there}
        like = [n for n in self.nouns if sets.CATEGORY[n] in categories and n not in there]
        return rng.choice(like or [n for n in self.nouns if n not in there])

    def ask_color(self, noun: str) -> str:
        return f"What color is the tile under the {noun}?"

    def ask_noun(self, color: str) -> str:
        return f"What is on the {color} tile?"

    def ask_count(self, noun: str) -> str:
        return f"How many pictures of {article(noun)} are there?"

    def ask_if_color(self, noun: str, color: str) -> str:
        return f"Is the tile under the {noun} {color}?"

    def ask_if_count(self, noun: str, number: int) -> str:
        verb, what = ("Is", "picture") if number == 1 else ("Are", "pictures")
        return f"{verb} there exactly {NUMBERS[number]} {what} of {article(noun)}?"

    def ask_all(self) -> str:
        return "Describe the picture: say how many things there are, and name each one."

    def fact(self, thing: Thing) -> tuple[str, ...]:
        return (thing.noun,)

    def wordings(self, answer: str) -> dict[str, int]:
        """Ten alike, but where a name is long or has a common other one."""
        other = {"automobile": "car", "locomotive": "train", "doughnut": "donut", "honeybee": "bee", "television": "tv"}
        return {answer: 6, other[answer]: 4} if answer in other else {answer: 10}
