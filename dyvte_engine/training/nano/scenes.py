"""Deterministic generated pictures: coloured shapes and short printed words, with what every patch shows.

A scene is a list of objects; `sample_scene` draws one from a seed, `render` paints it, `patch_labels` says what each
patch of the picture holds. Questions about a scene are in `questions.py`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 96  # picture side in pixels
PATCH = 8
GRID = SIZE // PATCH
SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
EASY_SHAPES = SHAPES[:3]
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
    "orange": (255, 150, 0),
    "purple": (160, 32, 220),
}
EASY_COLORS = tuple(COLORS)[:8]
ON_DARK = ("red", "green", "yellow", "orange")
INK = ("red", "blue", "black", "teal", "brown", "purple")
MAX_SHAPES = 6
MAX_LETTERS = 5
_WORD_LIST = (
    "ACE ADD AGE AIR ANT APE APPLE ARM ART ASK BAG BALL BANK BAR BAT BEACH BEAN BEAR BED BEE BELL BIG BIRD BOAT BONE "
    "BOOK BOX BOY BREAD BUS CAKE CALL CAMP CAN CAP CAR CARD CAT CHAIR CITY CLOCK CLOUD COAT COLD CORN COW CUP DANCE "
    "DAY DEER DESK DOG DOLL DOOR DOWN DREAM DRUM DUCK EAGLE EAR EARTH EAST EGG EXIT EYE FACE FAN FARM FISH FIVE FLAG "
    "FLY FOOD FORK FOX FROG FRUIT GAME GATE GIFT GIRL GLASS GO GOAT GOLD GRAPE GRASS GREEN HAND HAT HEART HEN HILL "
    "HOME HORSE HOT HOUSE ICE INK JAM JAR JEEP JOY JUICE JUMP KEY KING KITE KNIFE LAKE LAMP LEAF LEFT LEMON LIGHT "
    "LION LOCK MAP MILK MOON MOUSE MUSIC NAIL NECK NEST NET NIGHT NINE NO NORTH NOSE OCEAN OIL ONION OPEN OVEN OWL "
    "PARK PEN PIANO PIG PIZZA PLANE PLANT POND QUEEN QUIZ RADIO RAIN RED RICE RING RIVER ROAD ROBOT ROCK ROSE SALT "
    "SAND SEA SHEEP SHIP SHOE SIX SNAKE SNOW SOAP SOCK SOUP SPOON STAR STOP SUGAR SUN TABLE TAXI TEA TEN TENT TIGER "
    "TOY TRAIN TREE TRUCK UP VAN VASE VIEW VOTE WALL WATER WAVE WEST WHALE WIND WOLF WOOD YARD YES ZEBRA ZERO ZOO"
)
WORDS = tuple(_WORD_LIST.split())
UNSEEN_WORDS = WORDS[3::8]  # never printed in a training picture
SEEN_WORDS = tuple(w for w in WORDS if w not in UNSEEN_WORDS)
LABELS = ("shape", "color", "column", "row", "same_shape", "same_color", "letter", "letter_index")
LABEL_SIZES = (
    len(SHAPES) + 2,
    len(COLORS) + 1,
    GRID + 1,
    GRID + 1,
    MAX_SHAPES + 1,
    MAX_SHAPES + 1,
    27,
    MAX_LETTERS + 1,
)
IGNORE = 255
STYLES = ("single", "shapes", "word")


@dataclass(frozen=True)
class Shape:
    """One shape: kind, colour name, and its box in pixels (left, top, right, bottom)."""

    kind: str
    color: str
    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Word:
    """A printed word: text, colour name, font size and the left, top corner of its box in pixels."""

    text: str
    color: str
    size: int
    box: tuple[float, float, float, float]


@dataclass
class Scene:
    """Objects over a background; `style` is "single" (drawn as easy-VQA draws), "shapes" or "word"."""

    style: str
    background: str
    shapes: list[Shape] = field(default_factory=list)
    word: Word | None = None
    seed: str = ""


def _overlaps(a: tuple[float, ...], b: tuple[float, ...], gap: float = 3) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _place(rng: random.Random, width: float, height: float, taken: list[tuple[float, ...]]) -> tuple | None:
    for _ in range(30):
        left, top = rng.uniform(0, SIZE - width), rng.uniform(0, SIZE - height)
        box = (left, top, left + width, top + height)
        if not any(_overlaps(box, other) for other in taken):
            return box
    return None


def _extent(rng: random.Random, kind: str, low: float, high: float) -> tuple[float, float]:
    if kind == "rectangle":
        return rng.uniform(low, high), rng.uniform(low, high)
    side = rng.uniform(low, high)
    return (side, side * 0.87) if kind == "triangle" else (side, side)


def _random_letters(rng: random.Random) -> str:
    while True:
        text = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, MAX_LETTERS)))
        if text not in UNSEEN_WORDS:
            return text


def _sample_word(rng: random.Random, split: str) -> Word:
    if split == "train":
        text = rng.choice(SEEN_WORDS) if rng.random() < 0.4 else _random_letters(rng)
    else:
        text = rng.choice(UNSEEN_WORDS if rng.random() < 0.5 else SEEN_WORDS)
    size = rng.randint(16, 24)
    while letter_edges(text, size)[-1] > SIZE - 4:
        size -= 1
    width, height = letter_edges(text, size)[-1], size * 1.0
    left, top = rng.uniform(2, SIZE - width - 2), rng.uniform(1, SIZE - height - 1)
    return Word(text, rng.choice(INK), size, (left, top, left + width, top + height))


def sample_scene(seed: int, split: str, index: int, style: str | None = None) -> Scene:
    """Draws scene `index` of `split` ("train" or "heldout"); equal arguments give equal scenes on any machine."""
    name = f"{seed}/{split}/{index}"
    rng = random.Random(name)
    style = style or rng.choices(STYLES, (0.15, 0.5, 0.35))[0]
    if style == "single":
        kind = rng.choice(EASY_SHAPES)
        width, height = _extent(rng, kind, 12, 48)
        left, top = rng.uniform(0, SIZE - width), rng.uniform(0, SIZE - height)
        shape = Shape(kind, rng.choice(EASY_COLORS), (left, top, left + width, top + height))
        return Scene(style, "plain", [shape], seed=name)
    dark = style == "shapes" and rng.random() < 0.12
    scene = Scene(style, "dark" if dark else rng.choice(("plain", "gradient", "noise", "stripes")), seed=name)
    if style == "word":
        scene.word = _sample_word(rng, split)
    wanted = rng.randint(0, 2) if style == "word" else rng.randint(1, MAX_SHAPES)
    palette = rng.sample(ON_DARK if dark else tuple(COLORS), rng.randint(1, 4))
    kinds = rng.sample(SHAPES, rng.randint(1, 4))
    taken: list[tuple[float, ...]] = [scene.word.box] if scene.word else []
    for _ in range(wanted):
        kind = rng.choice(kinds)
        box = _place(rng, *_extent(rng, kind, 15, 34 if wanted < 4 else 27), taken)
        if box:
            taken.append(box)
            scene.shapes.append(Shape(kind, rng.choice(palette), box))
    return scene


def letter_edges(text: str, size: int) -> list[float]:
    """x offsets in pixels of the letters' left edges, and of the word's right edge."""
    font = ImageFont.load_default(size)
    edges = [0.0]
    for letter in text:
        edges.append(edges[-1] + font.getlength(letter) + 1)
    return edges


def _points(kind: str, box: tuple[float, ...]) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if kind == "triangle":
        return [(left + width / 2, top), (right, bottom), (left, bottom)]
    if kind == "cross":
        unit = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
        return [(left + x * width / 3, top + y * height / 3) for x, y in unit]
    tips = []
    for i in range(10):
        angle, radius = math.pi * (i / 5 - 0.5), 0.5 if i % 2 == 0 else 0.21
        tips.append((left + width * (0.5 + radius * math.cos(angle)), top + height * (0.5 + radius * math.sin(angle))))
    return tips


def _paint(draw: ImageDraw.ImageDraw, shape: Shape, scale: float, fill: int | tuple[int, ...]) -> None:
    box = tuple(v * scale for v in shape.box)
    if shape.kind == "circle":
        draw.ellipse(box, fill=fill)
    elif shape.kind == "rectangle":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon(_points(shape.kind, box), fill=fill)


def _background(rng: np.random.Generator, kind: str) -> np.ndarray:
    low, high = (20, 60) if kind == "dark" else (200, 256)
    a, b = rng.integers(low, high, (2, 3)).astype(np.float32)
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)
    if kind == "gradient":
        weight = np.add.outer(ramp, ramp) / 2 if rng.random() < 0.5 else np.broadcast_to(ramp, (SIZE, SIZE))
    elif kind == "stripes":
        weight = np.broadcast_to((np.arange(SIZE) // int(rng.integers(4, 12)) % 2).astype(np.float32), (SIZE, SIZE))
    else:
        weight = np.zeros((SIZE, SIZE), np.float32)
    if rng.random() < 0.5:
        weight = weight.T
    canvas = a + (b - a) * weight[..., None]
    if kind == "noise":
        canvas = canvas + rng.normal(0, 7, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """Paints the scene, RGB, 96 x 96; a "single" one is drawn at 64 x 64 unsmoothed and enlarged, as easy-VQA is."""
    rng = np.random.default_rng(np.frombuffer(scene.seed.encode().ljust(64), np.uint32))
    background = Image.fromarray(_background(rng, scene.background))
    if scene.style == "single":
        canvas = background.crop((0, 0, 64, 64))
        _paint(ImageDraw.Draw(canvas), scene.shapes[0], 64 / SIZE, COLORS[scene.shapes[0].color])
        return canvas.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    canvas = background.resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        jitter = rng.integers(-14, 15, 3)
        _paint(draw, shape, 2, tuple(int(v) for v in np.clip(COLORS[shape.color] + jitter, 0, 255)))
    picture = canvas.reduce(2)
    if scene.word:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(scene.word.size)
        for letter, x in zip(scene.word.text, letter_edges(scene.word.text, scene.word.size)):
            at = (scene.word.box[0] + x, scene.word.box[1])
            draw.text(at, letter, font=font, fill=COLORS[scene.word.color], anchor="la")
    return picture


def patch_labels(scene: Scene) -> np.ndarray:
    """What each patch shows: uint8 [144, len(LABELS)]; 0 = nothing, IGNORE where an object only grazes the patch."""
    labels = np.zeros((GRID, GRID, len(LABELS)), np.uint8)
    best = np.zeros((GRID, GRID), np.float32)
    for shape in scene.shapes:
        mask = Image.new("L", (2 * SIZE, 2 * SIZE))
        _paint(ImageDraw.Draw(mask), shape, 2, 255)
        covered = np.asarray(mask.reduce(2 * PATCH), np.float32) / 255
        x, y = shape.center
        values = (
            1 + SHAPES.index(shape.kind),
            1 + tuple(COLORS).index(shape.color),
            1 + min(int(x // PATCH), GRID - 1),
            1 + min(int(y // PATCH), GRID - 1),
            sum(other.kind == shape.kind for other in scene.shapes),
            sum(other.color == shape.color for other in scene.shapes),
            0,
            0,
        )
        labels[(covered > best) & (covered >= 0.15)] = values
        labels[(covered > 0.02) & (covered < 0.15) & (best < 0.15)] = IGNORE
        best = np.maximum(best, covered)
    if scene.word:
        _label_word(labels, scene.word)
    return labels.reshape(GRID * GRID, len(LABELS))


def _label_word(labels: np.ndarray, word: Word) -> None:
    left, top, _, bottom = word.box
    edges = [left + x for x in letter_edges(word.text, word.size)]
    color = 1 + tuple(COLORS).index(word.color)
    for row in range(GRID):
        if not top + 1 <= (row + 0.5) * PATCH <= bottom + 1:
            continue
        for column in range(GRID):
            start, end = column * PATCH, (column + 1) * PATCH
            overlap = [min(end, edges[i + 1]) - max(start, edges[i]) for i in range(len(word.text))]
            i = int(np.argmax(overlap))
            if overlap[i] >= PATCH * 0.4:
                letter = ord(word.text[i]) - ord("A") + 1
                labels[row, column] = (len(SHAPES) + 1, color, 0, 0, 0, 0, letter, i + 1)
            elif overlap[i] > 0:
                labels[row, column] = IGNORE
