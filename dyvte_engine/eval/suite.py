"""The nine tasks, each after one of the paper's benchmarks, over the pictures of a world; and easy-VQA's test half.

Every sample depends on (task, world, seed, its number) alone, so a longer suite begins with the shorter one. Each task
draws from its own pictures.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image

from ..checks import check_names, is_whole
from ..errors import InvalidArgumentError
from . import choices, metrics
from .draw import OPPOSITE, Draw, Question, absent, attribute, labels_of, number, pair
from .shapes import Shapes
from .task import (
    ATTRIBUTE,
    COUNTING,
    DESCRIBE,
    DESCRIPTION,
    IDENTITY,
    PRESENCE,
    READ,
    READING,
    RELATION,
    SENTENCE,
    SHORT,
    STATEMENT,
    YES_NO,
    Metric,
    Sample,
    Task,
)
from .worlds import View, World, article

POPE_SETTINGS = ("random", "popular", "adversarial")
ONE_WORD = "Answer with one word."
IN_A_SENTENCE = "Answer in a sentence."
Fact = tuple[str, ...]  # wordings of one fact
EASY_VQA = "easy-vqa"
EASY_KINDS = {"presence": PRESENCE, "color": ATTRIBUTE, "shape": IDENTITY}


def pope(draw: Draw) -> Iterator[Sample]:
    """Presence, as often yes as no; absent things at random, the most frequent ones, or like ones that are there."""
    world = draw.world
    counts = Counter(world.label(t) for index in range(draw.popular_from) for t in draw.view(index)[0].things)
    popular = [label for label, _ in counts.most_common()]
    for index, turn in draw.turns():
        view, rng = draw.view(index)
        there = labels_of(world, view)
        setting, wanted = POPE_SETTINGS[turn % 3], turn // 3 % 2 == 0
        if not there:
            continue
        if wanted:
            label = rng.choice(sorted(there))
        elif setting == "random":
            label = rng.choice([x for x in world.labels() if x not in there])
        elif setting == "popular":
            label = rng.choice([x for x in popular if x not in there][:5])
        else:
            label = world.alike(rng, view)
        prompt = f"Is there {article(label)} in the picture? {ONE_WORD}"
        yield draw.sample(index, view, prompt, "yes" if wanted else "no", YES_NO, PRESENCE, setting)


def gqa(draw: Draw) -> Iterator[Sample]:
    """Attributes (what colour, which thing) and relations (yes or no, which of two), in turn."""
    world = draw.world
    for index, turn in draw.turns():
        view, rng = draw.view(index)
        if turn % 2 == 0:
            color = turn % 4 == 0
            asked = attribute(rng, world, view, color)
            if asked:
                kind = ATTRIBUTE if color else IDENTITY
                yield draw.sample(index, view, f"{asked[0]} {ONE_WORD}", asked[1], SHORT, kind, "attribute")
            continue
        found = pair(rng, world, view)
        if not found:
            continue
        one, two, axis, true = found
        if turn % 4 == 1:
            text = f"Is the {world.label(one)} {('left or right of', 'above or below')[axis]} the {world.label(two)}?"
            answer, form = true.removeprefix("to the ").removesuffix(" of"), SHORT
        else:
            wanted = rng.random() < 0.5
            text = f"Is the {world.label(one)} {true if wanted else OPPOSITE[true]} the {world.label(two)}?"
            answer, form = "yes" if wanted else "no", YES_NO
        yield draw.sample(index, view, f"{text} {ONE_WORD}", answer, form, RELATION, "spatial")


def vqav2(draw: Draw) -> Iterator[Sample]:
    """Open questions of VQAv2's three answer types: yes or no, number, other."""
    world = draw.world
    for index, turn in draw.turns():
        view, rng = draw.view(index)
        if not view.things:
            continue
        split = ("yes/no", "number", "other")[turn % 3]
        form = SHORT
        if split == "yes/no":
            kind = PRESENCE
            answer = rng.choice(("yes", "no"))
            label = absent(rng, world, view) if answer == "no" else rng.choice(sorted(labels_of(world, view)))
            text, form = f"Is there {article(label)} in the picture?", YES_NO
        elif split == "number":
            kind = COUNTING
            noun, there = number(rng, world, view)
            text, answer = world.ask_count(noun), metrics.NUMBERS[there]
        else:
            color = rng.random() < 0.5
            asked, kind = attribute(rng, world, view, color), ATTRIBUTE if color else IDENTITY
            if not asked:
                continue
            text, answer = asked
        yield draw.sample(index, view, f"{text} {ONE_WORD}", world.wordings(answer), form, kind, split)


def textvqa(draw: Draw) -> Iterator[Sample]:
    """Reading a printed word never seen in training, half of them in fonts never seen either."""
    for index, _ in draw.turns():
        view, _ = draw.view(index, printed=True)
        prompt = f"What does the text say? {ONE_WORD}"
        yield draw.sample(index, view, prompt, {view.word: 10}, READ, READING, str(view.font))


def mme(draw: Draw) -> Iterator[Sample]:
    """For each picture a question to affirm and its twin to deny; existence, colour, position, count, word in turn."""
    makers: tuple[tuple[Callable[[random.Random, World, View], Question | None], str], ...] = (
        (_mme_existence, PRESENCE),
        (_mme_color, ATTRIBUTE),
        (_mme_position, RELATION),
        (_mme_count, COUNTING),
        (_mme_word, READING),
    )
    for index, turn in draw.turns():
        make, kind = makers[turn % len(makers)]
        view, rng = draw.view(index, printed=kind is READING)
        asked = make(rng, draw.world, view)
        if not asked:
            continue
        form = STATEMENT if kind in (COUNTING, READING) else YES_NO
        for part, (text, answer) in zip("ab", zip(asked, ("yes", "no"))):
            split, pair = make.__name__.removeprefix("_mme_"), f"{index}"
            prompt = f"{text} {ONE_WORD}"
            yield draw.sample(index, view, prompt, answer, form, kind, split, pair=pair, part=part)


def _mme_existence(rng: random.Random, world: World, view: View) -> Question | None:
    nouns = {t.noun for t in view.things}
    absent = [n for n in world.nouns if n not in nouns]
    if not nouns or not absent:
        return None
    texts = [f"Is there {article(n)} in the picture?" for n in (rng.choice(sorted(nouns)), rng.choice(absent))]
    return texts[0], texts[1]


def _mme_color(rng: random.Random, world: World, view: View) -> Question | None:
    things = [t for t in view.with_unique("noun") if t.color is not None]
    if not things:
        return None
    thing = rng.choice(things)
    assert thing.color is not None
    other = rng.choice([c for c in world.colors if c != thing.color])
    return world.ask_if_color(thing.noun, thing.color), world.ask_if_color(thing.noun, other)


def _mme_position(rng: random.Random, world: World, view: View) -> Question | None:
    found = pair(rng, world, view)
    if not found:
        return None
    one, two, _, true = found
    texts = [f"Is the {world.label(one)} {r} the {world.label(two)}?" for r in (true, OPPOSITE[true])]
    return texts[0], texts[1]


def _mme_count(rng: random.Random, world: World, view: View) -> Question | None:
    if not view.things:
        return None
    noun = rng.choice(sorted({t.noun for t in view.things}))
    true = sum(t.noun == noun for t in view.things)
    false = rng.choice([n for n in (true - 1, true + 1) if n >= 1])
    return world.ask_if_count(noun, true), world.ask_if_count(noun, false)


def _mme_word(rng: random.Random, world: World, view: View) -> Question | None:
    assert view.word is not None
    others, long = [w for w in world.words if w != view.word], len(view.word)
    if not others:
        return None
    nearest = min(abs(len(w) - long) for w in others)
    like = [w for w in others if abs(len(w) - long) == nearest]
    texts = [f'Does the text in the picture say "{w}"?' for w in (view.word, rng.choice(like))]
    return texts[0], texts[1]


def mmvet(draw: Draw) -> Iterator[Sample]:
    """Answers of a sentence with one or two facts, and descriptions with a fact for each thing and their number.

    `meta["answer"]` is a full answer in words.
    """
    world = draw.world
    for index, turn in draw.turns():
        view, rng = draw.view(index)
        if not view.things:
            continue
        if turn % 3 == 2:
            things, count = [world.fact(t) for t in view.things], metrics.NUMBERS[len(view.things)]
            answer = f"{count.capitalize()}: {', '.join(article(wordings[0]) for wordings in things)}."
            found = (*dict.fromkeys(things), (count,))
            yield draw.sample(index, view, world.ask_all(), found, DESCRIBE, DESCRIPTION, "description", answer=answer)
            continue
        made = _sentence(rng, world, view)
        if made:
            kind, text, stated, answer = made
            yield draw.sample(index, view, f"{text} {IN_A_SENTENCE}", stated, SENTENCE, kind, "sentence", answer=answer)


def _sentence(rng: random.Random, world: World, view: View) -> tuple[str, str, tuple[Fact, ...], str] | None:
    """Its kind, a question, the facts its answer must state in every wording that is accepted, and a full answer."""
    kind = rng.choice((RELATION, RELATION, ATTRIBUTE, COUNTING))
    if kind is ATTRIBUTE:
        color = rng.random() < 0.5
        asked = attribute(rng, world, view, color)
        kind = ATTRIBUTE if color else IDENTITY
        return (kind, asked[0], ((asked[1],),), f"It is {asked[1]}.") if asked else None
    if kind is COUNTING:
        noun, there = number(rng, world, view)
        wordings = (metrics.NUMBERS[there], "no") if there == 0 else (metrics.NUMBERS[there],)
        return kind, world.ask_count(noun), (wordings,), f"The number is {wordings[0]}."
    found = pair(rng, world, view)
    if not found:
        return None
    one, two, _, true = found
    wanted = rng.random() < 0.5
    text = f"Is the {world.label(one)} {true if wanted else OPPOSITE[true]} the {world.label(two)}?"
    said = "yes" if wanted else "no"
    facts = (said,), (f"{world.label(one)} is {true}", f"{world.label(two)} is {OPPOSITE[true]}")
    return kind, text, facts, f"{said.capitalize()}, the {world.label(one)} is {true} the {world.label(two)}."


@dataclass(frozen=True)
class Plan:
    """How a task is made: after which benchmark, from which samples, scored how, what guessing scores.

    `group` samples belong together (a pair, four rotations) and are never parted.
    """

    original: str
    make: Callable[[Draw], Iterator[Sample]]
    metric: Metric
    chance: float | None = None
    group: int = 1


PLANS = {
    "pope": Plan("POPE", pope, metrics.pope),
    "gqa": Plan("GQA", gqa, metrics.accuracy),
    "vqav2": Plan("VQAv2", vqav2, metrics.soft_accuracy),
    "textvqa": Plan("TextVQA", textvqa, metrics.soft_accuracy, 0.0),
    "sqa": Plan("ScienceQA", choices.sqa, metrics.accuracy, 0.25),
    "mmb": Plan("MMBench", choices.mmb, metrics.circular_choice, 0.25**4, 4),
    "seed": Plan("SEED", choices.seed, metrics.accuracy, 0.25),
    "mme": Plan("MME", mme, metrics.mme, group=2),
    "mmvet": Plan("MM-Vet", mmvet, metrics.facts),
}
TASKS = (*PLANS, EASY_VQA)


def load_tasks(
    tasks: Sequence[str] = TASKS, seed: int = 0, limit: int = 300, source: str = "shapes", styles: Sequence[str] = ()
) -> list[Task]:
    """Tasks of `limit` samples each (whole groups: at most that, a multiple of 2 for mme and of 4 for mmb).

    Args:
        tasks: of TASKS. "easy-vqa" has its own pictures and at most 9,673 questions.
        source: "shapes" (nano's world) or "emoji" (composed scenes; the first call fetches the sets).
        styles: drawing styles of the emoji source, default all of them.

    Raises:
        InvalidArgumentError: an unknown task, source or style, a task named twice, or a limit below 4.
        SourceError: a package or set that a source needs is missing.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise InvalidArgumentError(f"tasks is {list(tasks)!r}; accepted: of {', '.join(TASKS)}")
    check_names("tasks", tasks)
    if not (is_whole(limit) and 4 <= limit <= 10**9):
        raise InvalidArgumentError(f"limit is {limit!r}; accepted: whole numbers from 4 to a billion")
    return [_easy(seed, limit) if t == EASY_VQA else _made(t, seed, limit, _world(source, styles)) for t in tasks]


def _made(name: str, seed: int, n: int, world: World) -> Task:
    plan = PLANS[name]
    samples = tuple(islice(plan.make(Draw(world, name, seed)), n - n % plan.group))
    return Task(name, plan.original, world.name, samples, plan.metric, plan.chance)


def _world(source: str, styles: Sequence[str]) -> World:
    if source == "shapes" and not styles:
        return Shapes()
    if source == "emoji":
        from .emoji import Emoji

        return Emoji(styles)
    raise InvalidArgumentError(f"source is {source!r} with styles {list(styles)!r}; accepted: shapes, or emoji")


def _easy(seed: int, n: int) -> Task:
    """A random part of easy-VQA's test questions, in the order drawn."""
    from ..training.nano.easy import load_easy_vqa

    paths, asked = load_easy_vqa("test")
    every = [(path, i, q) for path, questions in zip(paths, asked) for i, q in enumerate(questions)]
    samples = []
    for path, i, q in random.Random(f"easy-vqa/{seed}").sample(every, min(n, len(every))):
        form = YES_NO if q.kind == "presence" else SHORT
        key = f"{EASY_VQA}/{Path(path).stem}/{i}"
        kind = EASY_KINDS[q.kind]
        meta = {"split": q.kind, "style": "", "kind": kind}
        samples.append(Sample(key, partial(_open, path), q.text, q.answer, form, meta))
    return Task(EASY_VQA, "easy-VQA", "easy-VQA", tuple(samples), metrics.accuracy)


def _open(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")
