"""Questions and answers about generated scenes, in several phrasings, balanced so that blind guessing is poor."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dyvte_engine.training.nano.scenes import COLORS, EASY_COLORS, EASY_SHAPES, SHAPES, SIZE, Scene, Shape

KINDS = ("presence", "color", "shape", "count", "spatial", "word")
# What can be asked: the kinds, and two steps towards spatial questions, without which those are not learnt. "side" are
# the ones that offer both answers: each place alone is a hint to the answer there, which with yes or no it is only
# together with the direction asked for. "place" are the same questions about one shape and the middle of the picture.
ASKED = (*KINDS, "side", "place")
# of ASKED: kinds that few scenes allow are drawn more often
WEIGHTS = (1, 1, 1, 1.2, 4, 2, 0, 0)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
IN_A_SENTENCE = ("Answer in a sentence.", "Use a full sentence.")
ONE_WORD = ("Answer with one word.", "One word, please.")
MIN_OFFSET = 10  # pixels between two centres before one is called left of or above the other
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {v: k for k, v in OPPOSITE.items()}
SHORT = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"}
# easy-VQA's own phrasings of presence; the second group asks for absence
EASY_PRESENT = ("is there a {}?", "is a {} present?", "does the image contain a {}?", "is there a {} in the image?")
EASY_ABSENT = (
    "is there not a {}?",
    "is no {} present?",
    "does the image not contain a {}?",
    "is there not a {} in the image?",
)
PRESENT = ("Is there {} in the picture?", "Is there {}?", "Can you see {}?", "Does the picture show {}?")


@dataclass(frozen=True)
class Question:
    """`text` as a user would type it, the expected `answer`, and its `kind` (one of KINDS)."""

    text: str
    answer: str
    kind: str


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _styled(rng: random.Random, text: str, word: str, sentence: str, kind: str) -> Question:
    style = rng.random()
    if style < 0.35:
        return Question(f"{text} {rng.choice(IN_A_SENTENCE)}", sentence, kind)
    if style < 0.55:
        return Question(f"{text} {rng.choice(ONE_WORD)}", word, kind)
    return Question(text, word, kind)


def _matches(shape: Shape, color: str | None, kind: str | None) -> bool:
    return color in (None, shape.color) and kind in (None, shape.kind)


def _noun(color: str | None, kind: str | None) -> str:
    return f"{color} {kind or 'shape'}" if color else kind or "shape"


def _presence(rng: random.Random, scene: Scene) -> Question | None:
    if not scene.shapes and rng.random() < 0.8:
        return None  # always "no" here: asked often, it would teach to guess
    wanted = rng.random() < 0.5
    easy = scene.style == "single"
    colors, kinds = (EASY_COLORS, EASY_SHAPES) if easy else (tuple(COLORS), SHAPES)
    form = rng.choice(("color", "kind") if easy else ("color", "kind", "both"))
    for _ in range(20):
        color = rng.choice(colors) if form != "kind" else None
        kind = rng.choice(kinds) if form != "color" else None
        if scene.shapes and (wanted or (form == "both" and rng.random() < 0.7)):
            shape = rng.choice(scene.shapes)  # for "no" with both named, change one property of a shape that is there
            if wanted or rng.random() < 0.5:
                color = shape.color if form != "kind" else None
            if wanted or color != shape.color:
                kind = shape.kind if form != "color" else None
        if any(_matches(s, color, kind) for s in scene.shapes) == wanted:
            break
    else:
        return None
    noun = _noun(color, kind)
    truth = "Yes, there is " + _article(noun) + "." if wanted else f"No, there is no {noun}."
    if easy and rng.random() < 0.7:
        absent = rng.random() < 0.5
        text = rng.choice(EASY_ABSENT if absent else EASY_PRESENT).format(noun)
        return Question(text, "yes" if wanted != absent else "no", "presence")
    return _styled(rng, rng.choice(PRESENT).format(_article(noun)), "yes" if wanted else "no", truth, "presence")


def _color(rng: random.Random, scene: Scene) -> Question | None:
    counts = Counter(s.kind for s in scene.shapes)
    unique = [s for s in scene.shapes if counts[s.kind] == 1]
    if not unique:
        return None
    shape = rng.choice(unique)
    noun = "shape" if len(scene.shapes) == 1 and rng.random() < 0.5 else shape.kind
    text = rng.choice(
        (
            "what color is the {}?",
            "what is the color of the {}?",
            "What color is the {}?",
            "Which color does the {} have?",
        )
    )
    return _styled(rng, text.format(noun), shape.color, f"The {noun} is {shape.color}.", "color")


def _shape(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.shapes) == 1 and rng.random() < 0.6:
        text = rng.choice(
            ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")
        )
        return _styled(rng, text, scene.shapes[0].kind, f"It is a {scene.shapes[0].kind}.", "shape")
    counts = Counter(s.color for s in scene.shapes)
    unique = [s for s in scene.shapes if counts[s.color] == 1]
    if not unique:
        return None
    shape = rng.choice(unique)
    text = rng.choice(("what is the {} shape?", "What shape is {}?", "Which shape is {}?")).format(shape.color)
    return _styled(rng, text, shape.kind, f"The {shape.color} shape is a {shape.kind}.", "shape")


def _count(rng: random.Random, scene: Scene) -> Question | None:
    if scene.style == "single":
        return None
    options: dict[int, list[str]] = {}
    for color, kind in [(None, k) for k in SHAPES] + [(c, None) for c in COLORS] + [(None, None)]:
        number = sum(_matches(s, color, kind) for s in scene.shapes)
        options.setdefault(number, []).append(_noun(color, kind))
    # The share of each number falls slowly: large counts exist in few scenes and get all the weight they can.
    number = rng.choices(list(options), [4.0**n if n else 0.7 for n in options])[0]
    noun = rng.choice(options[number])
    nouns = _plural(noun)
    text = rng.choice(("How many {} are there?", "How many {} do you see?", "Count the {}.")).format(nouns)
    few = {0: f"There are no {nouns}.", 1: f"There is one {noun}."}
    sentence = few.get(number, f"There are {NUMBERS[number]} {nouns}.")
    return _styled(rng, text, NUMBERS[number], sentence, "count")


def _description(rng: random.Random, scene: Scene, shape: Shape) -> str | None:
    """A phrase that names this shape and no other one of the scene."""
    options = []
    for color, kind in ((None, shape.kind), (shape.color, None), (shape.color, shape.kind)):
        if sum(_matches(s, color, kind) for s in scene.shapes) == 1:
            options.append(_noun(color, kind))
    return rng.choice(options) if options else None


def _pair(rng: random.Random, scene: Scene) -> tuple[str, str, int, str] | None:
    """Two shapes that can be distinguished, the axis of a clear offset, and where the first is from the second."""
    if len(scene.shapes) < 2:
        return None
    for _ in range(6):
        one, two = rng.sample(scene.shapes, 2)
        axis = rng.randrange(2)
        offset = two.center[axis] - one.center[axis]
        names = _description(rng, scene, one), _description(rng, scene, two)
        if abs(offset) >= MIN_OFFSET and names[0] and names[1]:
            relations = (("to the left of", "to the right of"), ("above", "below"))[axis]
            return names[0], names[1], axis, relations[offset < 0]
    return None


def _spatial(rng: random.Random, scene: Scene, yes_or_no: float = 0.6) -> Question | None:
    pair = _pair(rng, scene)
    if not pair:
        return None
    one, two, axis, true = pair
    statement = f"the {one} is {true} the {two}."
    if rng.random() < yes_or_no:
        wanted = rng.random() < 0.5
        text = f"Is the {one} {true if wanted else OPPOSITE[true]} the {two}?"
        word = "yes" if wanted else "no"
        return _styled(rng, text, word, f"{word.capitalize()}, {statement}", "spatial")
    choice = ("left or right of", "above or below")[axis]
    return _styled(rng, f"Is the {one} {choice} the {two}?", SHORT[true], statement.capitalize(), "spatial")


def _side(rng: random.Random, scene: Scene) -> Question | None:
    return _spatial(rng, scene, yes_or_no=0.0)


def _place(rng: random.Random, scene: Scene) -> Question | None:
    if not scene.shapes:
        return None
    shape, axis = rng.choice(scene.shapes), rng.randrange(2)
    noun, offset = _description(rng, scene, shape), shape.center[axis] - SIZE / 2
    if not noun or abs(offset) < MIN_OFFSET / 2:
        return None
    true = (("to the left of", "to the right of"), ("above", "below"))[axis][offset > 0]
    text = f"Is the {noun} {('left or right of', 'above or below')[axis]} the middle?"
    return _styled(rng, text, SHORT[true], f"The {noun} is {true} the middle.", "spatial")


def _word(rng: random.Random, scene: Scene) -> Question | None:
    if not scene.word:
        return None
    text = rng.choice(
        ("What does the text say?", "Read the word.", "What word is printed?", "Which word is in the picture?")
    )
    return _styled(rng, text, scene.word.text, f"The word is {scene.word.text}.", "word")


_ASK = {
    "presence": _presence,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "spatial": _spatial,
    "word": _word,
    "side": _side,
    "place": _place,
}


def ask(rng: random.Random, scene: Scene, kind: str) -> Question | None:
    """A question of this sort (of ASKED) about the scene, or None where the scene allows none."""
    return _ASK[kind](rng, scene)


def ask_many(scene: Scene, number: int, weights: Sequence[float] = WEIGHTS) -> list[Question]:
    """Up to `number` different questions about one scene, sorts (in the order of ASKED) drawn by weight."""
    rng = random.Random(scene.seed + "/questions")
    asked: list[Question] = []
    for kind in rng.choices(ASKED, weights, k=4 * number):
        question = ask(rng, scene, kind)
        if question and question not in asked and len(asked) < number:
            asked.append(question)
    return asked
