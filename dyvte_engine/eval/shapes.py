"""nano's own world as a source of pictures: coloured shapes and printed words, from the split it never saw."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..lazy import optional
from ..training.nano import scenes
from .metrics import NUMBERS
from .worlds import Thing, View

FIRST_SCENE = 2_000_000  # beyond every scene that nano's training, its report and its exit heads use
UNSEEN_FONTS = ("DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneralBol.ttf", "cmtt10.ttf")


class Shapes:
    """96 x 96 pictures of `dyvte_engine.training.nano.scenes`, questions in the words nano was taught."""

    name = "shapes"
    nouns: tuple[str, ...] = scenes.SHAPES
    words: tuple[str, ...] = scenes.WORDS
    colors: tuple[str, ...] = tuple(scenes.COLORS)
    styles: tuple[str, ...] = ("",)

    def view(self, seed: int, index: int, printed: bool = False, style: str = "") -> View:
        scene = scenes.sample_scene(seed, "heldout", FIRST_SCENE + index, "word" if printed else "shapes")
        if not printed:
            return _view(scene)
        rng = random.Random(f"{scene.seed}/font")
        assert scene.word is not None
        word = replace(scene.word, text=rng.choice(scenes.UNSEEN_WORDS))
        if index % 2:
            return _printed(rng, scene, word.text, scenes.COLORS[word.color])
        size = word.size
        while (width := scenes.letter_edges(word.text, size)[-1]) > scenes.SIZE - 4:
            size -= 1
        left = rng.uniform(2, scenes.SIZE - width - 2)
        word = replace(word, size=size, box=(left, word.box[1], left + width, word.box[3]))
        return _view(replace(scene, shapes=[], word=word))

    def label(self, thing: Thing) -> str:
        return f"{thing.color} {thing.noun}"

    def labels(self) -> tuple[str, ...]:
        return tuple(f"{color} {noun}" for noun in self.nouns for color in self.colors)

    def alike(self, rng: random.Random, view: View) -> str:
        """Colour and shape are both in the picture, though not on one thing; else one of them is."""
        there = {self.label(t) for t in view.things}
        both = [f"{a.color} {b.noun}" for a in view.things for b in view.things]
        one = [f"{c} {t.noun}" for t in view.things for c in self.colors]
        options = [sorted(set(found) - there) for found in (both, one)]
        return rng.choice(options[0] or options[1])

    def ask_color(self, noun: str) -> str:
        return f"What color is the {noun}?"

    def ask_noun(self, color: str) -> str:
        return f"Which shape is {color}?"

    def ask_count(self, noun: str) -> str:
        return f"How many {_plural(noun)} are there?"

    def ask_if_color(self, noun: str, color: str) -> str:
        return f"Is there a {color} {noun} in the picture?"

    def ask_if_count(self, noun: str, number: int) -> str:
        if number == 1:
            return f"Is there exactly one {noun} in the picture?"
        return f"Are there exactly {NUMBERS[number]} {_plural(noun)} in the picture?"

    def ask_all(self) -> str:
        return "Describe the picture: say how many shapes there are, and name each one with its color."

    def fact(self, thing: Thing) -> tuple[str, ...]:
        return f"{thing.color} {thing.noun}", f"{thing.noun} is {thing.color}"

    def wordings(self, answer: str) -> dict[str, int]:
        """Ten alike, but where people differ over what a thing is called."""
        differing = {"teal": {"teal": 6, "green": 2, "blue": 2}, "gray": {"gray": 7, "grey": 3}}
        return differing.get(answer, {answer: 10})


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _view(scene: scenes.Scene) -> View:
    things = [Thing(s.kind, s.color, (s.center[0] / scenes.SIZE, s.center[1] / scenes.SIZE)) for s in scene.shapes]
    word = scene.word.text if scene.word else None
    return View(scene.seed, tuple(things), lambda: scenes.render(scene), word, "known font" if word else None)


def _printed(rng: random.Random, scene: scenes.Scene, word: str, ink: tuple[int, ...]) -> View:
    """The scene's background with a word in a font that matplotlib carries and nano never saw."""
    name = rng.choice(UNSEEN_FONTS)
    size, place = rng.randint(17, 24), (rng.random(), rng.random())

    def draw() -> Image.Image:
        picture = scenes.render(replace(scene, shapes=[], word=None))
        return print_word(picture, word, name, size, place, ink)

    return View(scene.seed + "/font", (), draw, word, "unseen font")


def print_word(
    picture: Image.Image, word: str, font: str, size: int, place: tuple[float, float], ink: tuple[int, ...]
) -> Image.Image:
    """Print a word into a picture, its box at `place` (0 to 1) of the room there is; made smaller until it fits."""
    while True:
        typeface = ImageFont.truetype(font_file(font), size)
        left, top, right, bottom = typeface.getbbox(word)
        room = picture.width - (right - left) - 4, picture.height - (bottom - top) - 4
        if min(room) >= 0 or size <= 6:
            break
        size -= 1
    at = (2 + place[0] * max(room[0], 0) - left, 2 + place[1] * max(room[1], 0) - top)
    ImageDraw.Draw(picture).text(at, word, font=typeface, fill=ink)
    return picture


def font_file(name: str) -> str:
    """Path of a font that comes with matplotlib."""
    return str(Path(optional("matplotlib", "eval").get_data_path()) / "fonts" / "ttf" / name)
