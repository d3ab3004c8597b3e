"""The tasks in multiple choice: ScienceQA with a context, MMBench in circular shift, SEED over categories."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from ..training.nano.scenes import WORDS
from .draw import Draw, absent, attribute, labels_of, number, pair, told_apart
from .metrics import NUMBERS
from .task import ATTRIBUTE, CHOICE, COUNTING, IDENTITY, LOCATION, READING, RELATION, Sample
from .worlds import View, World, relation

LETTERS = "ABCD"
DIRECTLY = "Answer with the option's letter from the given choices directly."
CHILDREN = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo")
Options = tuple[str, str, list[str]]  # question, right option, three wrong ones


def prompt_of(text: str, options: list[str]) -> str:
    return "\n".join([text, *(f"{mark}. {option}" for mark, option in zip(LETTERS, options)), DIRECTLY])


def _shuffled(rng: random.Random, right: str, wrong: list[str]) -> tuple[list[str], int]:
    options = [right, *wrong]
    rng.shuffle(options)
    return options, options.index(right)


def sqa(draw: Draw) -> Iterator[Sample]:
    """ScienceQA in kind: only context and picture together give the answer."""
    for index, _ in draw.turns():
        view, rng = draw.view(index)
        if not view.things:
            continue
        found = rng.choice(sorted(labels_of(draw.world, view)))
        labels = [found, *_absent_labels(rng, draw.world, view, 3)]
        owners = dict(zip(rng.sample(CHILDREN, 4), labels))
        losses = [f"{child} lost the {label}." for child, label in owners.items()]
        rng.shuffle(losses)
        right = next(child for child, label in owners.items() if label == found)
        options, place = _shuffled(rng, right, [c for c in owners if c != right])
        text = f"Context: {' '.join(losses)}\nQuestion: Whose thing is in the picture?"
        yield draw.sample(index, view, prompt_of(text, options), place, CHOICE, IDENTITY, "context", options=options)


def mmb(draw: Draw) -> Iterator[Sample]:
    """Each question four times, its options rotated; four samples share `meta["question"]`."""
    kinds = (IDENTITY, ATTRIBUTE, COUNTING, RELATION)
    for index, turn in draw.turns():
        kind = kinds[turn % len(kinds)]
        view, rng = draw.view(index)
        asked = ASK[kind](rng, draw.world, view)
        if not asked:
            continue
        text, right, wrong = asked
        options, _ = _shuffled(rng, right, wrong)
        for rotation in range(len(options)):
            turned = options[rotation:] + options[:rotation]
            meta = {"options": turned, "question": str(index), "part": LETTERS[rotation]}
            prompt, place = prompt_of(text, turned), turned.index(right)
            yield draw.sample(index, view, prompt, place, CHOICE, kind, kind, **meta)


def seed(draw: Draw) -> Iterator[Sample]:
    """SEED's categories, in turn."""
    kinds = (IDENTITY, ATTRIBUTE, LOCATION, COUNTING, RELATION, READING)
    for index, turn in draw.turns():
        kind = kinds[turn % len(kinds)]
        view, rng = draw.view(index, printed=kind is READING)
        asked = ASK[kind](rng, draw.world, view)
        if asked:
            options, place = _shuffled(rng, asked[1], asked[2])
            prompt = prompt_of(asked[0], options)
            split = "text" if kind is READING else kind
            yield draw.sample(index, view, prompt, place, CHOICE, kind, split, options=options)


def _absent_labels(rng: random.Random, world: World, view: View, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        label = absent(rng, world, view)
        if label not in found:
            found.append(label)
    return found


def _identity(rng: random.Random, world: World, view: View) -> Options | None:
    if not view.things:
        return None
    right = rng.choice(sorted(labels_of(world, view)))
    return "Which of these is in the picture?", right, _absent_labels(rng, world, view, 3)


def _attribute(rng: random.Random, world: World, view: View) -> Options | None:
    asked = attribute(rng, world, view, ask_color=True)
    if not asked:
        return None
    return asked[0], asked[1], rng.sample([c for c in world.colors if c != asked[1]], 3)


def _counting(rng: random.Random, world: World, view: View) -> Options | None:
    if not view.things:
        return None
    noun, right = number(rng, world, view)
    near = sorted((n for n in range(8) if n != right), key=lambda n: (abs(n - right), n))[:4]
    return world.ask_count(noun), NUMBERS[right], [NUMBERS[n] for n in rng.sample(near, 3)]


def _location(rng: random.Random, world: World, view: View) -> Options | None:
    things = [t for t in told_apart(world, view) if min(abs(c - 0.5) for c in t.center) > 0.08]
    if not things:
        return None
    thing = rng.choice(things)
    x, y = thing.center
    right = f"{'bottom' if y > 0.5 else 'top'} {'right' if x > 0.5 else 'left'}"
    quarters = ("top left", "top right", "bottom left", "bottom right")
    return f"Where in the picture is the {world.label(thing)}?", right, [q for q in quarters if q != right]


def _relation(rng: random.Random, world: World, view: View) -> Options | None:
    found = pair(rng, world, view)
    if not found:
        return None
    one, two, axis, true = found
    there = [
        world.label(t) for t in told_apart(world, view) if t is not two and relation(t, two, axis) not in (None, true)
    ]
    wrong = rng.sample(there, min(len(there), 3))
    wrong += _absent_labels(rng, world, view, 3 - len(wrong))
    return f"Which of these is {true} the {world.label(two)}?", world.label(one), wrong


def _text(rng: random.Random, world: World, view: View) -> Options | None:
    assert view.word is not None
    near = sorted((w for w in WORDS if w != view.word), key=lambda w: (abs(len(w) - len(view.word or "")), w))[:24]
    return "What does the text in the picture say?", view.word, rng.sample(near, 3)


ASK: dict[str, Callable[[random.Random, World, View], Options | None]] = {
    IDENTITY: _identity,
    ATTRIBUTE: _attribute,
    LOCATION: _location,
    COUNTING: _counting,
    RELATION: _relation,
    READING: _text,
}
