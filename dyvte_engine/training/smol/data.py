"""What smol learns from: scenes by number, many questions of the nine tasks about each, a packed batch for every step.

Step i's batch depends on (seed, i) alone: a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.eval.compose import TILE, Layout, Painter, typeset
from dyvte_engine.eval.draw import NAMES, PER_TASK, Draw
from dyvte_engine.eval.emoji import COLORS, Emoji
from dyvte_engine.eval.emoji_sets import NOUNS
from dyvte_engine.eval.suite import PLANS
from dyvte_engine.eval.task import Sample
from dyvte_engine.eval.worlds import View
from dyvte_engine.models.smol import SIDE
from dyvte_engine.training.packing import Encoded, Packed, pack

SHARES = {"pope": 4, "gqa": 6, "vqav2": 5, "sqa": 2, "mmb": 3, "seed": 3, "mme": 3, "mmvet": 4}
WORDS = {"textvqa": 1, "mme": 2}  # what can be asked about a printed word
TURNS = 60  # after so many turns every task repeats its kinds of question
POPULAR = 20  # pictures that tell which things are frequent
PRINTED = 2  # every so many steps the pictures are printed words
BLOCK = 96  # tokens; the longest question with its answer has fewer
LETTERS = "ABCD"
NAMED = (*NOUNS, *string.ascii_uppercase)  # what patches may show
VOTES = {"yes": 1, "no": -1}
BEFORE = "<|im_start|>user\n"  # the picture


def known_words(tokenizer: Any) -> list[str]:
    """Words of 3 to 6 letters that are one token behind a space; in capitals, as they are printed: two or three."""
    bare = (token[1:] for token in tokenizer.get_vocab() if token.startswith("\u0120"))  # how byte-level BPE says " "
    return sorted({w.upper() for w in bare if 3 <= len(w) <= 6 and w.isascii() and w.isalpha() and w.islower()})


def spoken(sample: Sample) -> str:
    """The answer in words that training teaches."""
    if "options" in sample.meta:
        return LETTERS[sample.reference]
    if "answer" in sample.meta:
        return sample.meta["answer"]
    votes: Any = sample.reference
    return max(votes, key=lambda answer: votes[answer]) if isinstance(votes, dict) else votes


class _OtherPicture(Exception):
    """A question was to be asked about a scene, and the picture is a printed word, or the reverse."""


class _OneTurn(Draw):
    """A task's question of one kind about a picture that is there already."""

    def __init__(self, scenes: Scenes, task: str, number: int, view: View, turn: int):
        super().__init__(scenes.world, task, scenes.seed, POPULAR)
        self.scenes, self.index, self.shown, self.turn = scenes, POPULAR + number, view, turn

    def style(self, index: int) -> str:
        return super().style(index - POPULAR)

    def turns(self) -> Iterator[tuple[int, int]]:
        yield self.index, self.turn

    def view(self, index: int, printed: bool = False) -> tuple[View, random.Random]:
        if index != self.index:
            return self.scenes.view(index, False), random.Random(index)
        if printed != (self.shown.word is not None):
            raise _OtherPicture
        return self.shown, random.Random(f"{self.task}/{self.shown.key}/{self.turn}")


class Scenes:
    """Pictures of a split by number, none of which the nine tasks show, and what can be asked about each.

    words: what training prints (see `Emoji`).
    """

    def __init__(self, split: str, seed: int, styles: tuple[str, ...] = (), words: Sequence[str] = ()):
        self.world, self.seed = Emoji(styles, split, words), seed
        self.view = cache(self._view)  # for the frequent things

    def _view(self, number: int, printed: bool) -> View:
        style = self.world.styles[number % len(self.world.styles)]
        return self.world.view(self.seed, (len(NAMES) + printed) * PER_TASK + number, printed, style)

    def layout(self, number: int, printed: bool) -> Layout:
        return self._view(number, printed).draw.layout  # type: ignore[attr-defined]

    def ask(self, number: int, printed: bool, count: int, visit: int = 0) -> list[tuple[str, Sample]]:
        """Up to `count` different questions about a picture, each with its task's name; other ones at each visit.

        There is always something more to deny, but not to affirm: of questions that begin alike one is denied for each
        that is affirmed before.
        """
        view, shares = self._view(number, printed), WORDS if printed else SHARES
        rng = random.Random(f"asked/{view.key}/{visit}")
        asked: dict[str, tuple[str, Sample]] = {}
        ahead: Counter[str] = Counter()  # by how many "yes" exceeds "no", by how questions begin
        for _ in range(3 * count):
            task = rng.choices(list(shares), list(shares.values()))[0]
            try:
                made = list(PLANS[task].make(_OneTurn(self, task, number, view, rng.randrange(TURNS))))
            except _OtherPicture:
                continue
            for s in made if PLANS[task].group == 2 else rng.sample(made, min(1, len(made))):
                vote, begin = VOTES.get(spoken(s), 0), " ".join(s.prompt.split()[:2])
                if s.prompt not in asked and vote * (ahead[begin] - 0.5) <= 0:
                    asked[s.prompt] = task, s
                    ahead[begin] += vote
            if len(asked) >= count:
                break
        return list(asked.values())[:count]


def patch_labels(layout: Layout, grid: int) -> np.ndarray:
    """int64 [grid * grid, 2]: what of NAMED and which tile's colour (by number) is at each patch's centre, -1: none."""
    labels = np.full((grid, grid, 2), -1)
    y, x = np.meshgrid((np.arange(grid) + 0.5) / grid, (np.arange(grid) + 0.5) / grid, indexing="ij")
    colors = list(COLORS.values())
    for placed in layout.placed:
        away = np.maximum(abs(x - placed.x), abs(y - placed.y))
        if placed.tile is not None:
            labels[away < placed.side * TILE / 2, 1] = colors.index(placed.tile)
        labels[away < placed.side / 2, 0] = placed.sprite
    if layout.printed is not None:
        text = layout.printed.text
        font, (left, above) = typeset(layout.printed, SIDE)
        _, top, _, bottom = font.getbbox(text)
        ends = [left + font.getlength(text[:i]) for i in range(len(text) + 1)]
        for letter, begin, end in zip(text, ends, ends[1:]):
            here = (x * SIDE >= begin) & (x * SIDE < end) & (y * SIDE >= above + top) & (y * SIDE < above + bottom)
            labels[here, 0] = NAMED.index(letter)
    return labels.reshape(-1, 2)


@dataclass
class Step:
    """A batch: the pictures' numbers, whether they are printed words, and the questions packed behind them.

    Where a painter made them: the pictures, uint8 [B, 3, H, W], and what their patches show (`patch_labels`).
    """

    numbers: list[int]
    printed: bool
    packed: Packed
    pictures: Tensor | None = None
    labels: Tensor | None = None


class Steps(Dataset):
    """Batch i of a training run, by number; step i of every PRINTED shows printed words, and packs one block of them.

    pictures: how many scenes there are; they come around again with other questions. rows: tokens behind each, in
    blocks of `block` that no question goes beyond. painter: paints each step's pictures, if given.
    """

    def __init__(
        self,
        processor: Any,
        scenes: Scenes,
        pictures: int,
        batch: int,
        rows: int,
        block: int = BLOCK,
        painter: Painter | None = None,
    ):
        if rows % block or rows <= 0:
            raise InvalidArgumentError(f"rows is {rows}; accepted: multiples of {block}")
        self.block, self.painter = block, painter
        self.processor, self.scenes, self.pictures, self.batch, self.rows = processor, scenes, pictures, batch, rows

    def __getitem__(self, step: int) -> Step:
        printed = step % PRINTED == PRINTED - 1
        first = (step // PRINTED if printed else step - step // PRINTED) * self.batch
        there = self.words if printed else self.pictures
        numbers = [(first + i) % there for i in range(self.batch)]
        visits = [(first + i) // there for i in range(self.batch)]
        made = Step(numbers, printed, self.packed(numbers, printed, visits))
        if self.painter is not None:
            layouts = [self.scenes.layout(n, printed) for n in numbers]
            grid = self.painter.size // self.processor.patch_size
            made.pictures = self.painter(layouts)
            made.labels = torch.stack([torch.from_numpy(patch_labels(one, grid)) for one in layouts])
        return made

    @property
    def words(self) -> int:
        """How many pictures of printed words there are."""
        return -(-self.pictures // PRINTED)

    @property
    def sizes(self) -> tuple[tuple[bool, int], tuple[bool, int]]:
        """Whether printed, and how many pictures there are."""
        return (False, self.pictures), (True, self.words)

    def reached(self, steps: int) -> tuple[int, int]:
        """How many pictures, without and with a word, the first `steps` steps show."""
        printed = steps // PRINTED
        return min((steps - printed) * self.batch, self.pictures), min(printed * self.batch, self.words)

    def packed(self, numbers: list[int], printed: bool, visits: list[int]) -> Packed:
        rows = self.block if printed else self.rows
        asked = [
            [self.encoded(*one) for one in self.scenes.ask(number, printed, rows // 20, visit)]
            for number, visit in zip(numbers, visits)
        ]
        return pack(asked, rows, self.prefix, self.block)

    def encoded(self, task: str, sample: Sample) -> Encoded:
        """What stands behind the picture: the question and its answer."""
        text = f"\n{sample.prompt}<|im_end|>\n<|im_start|>assistant\n"
        asked, said = self._tokens(text), self._tokens(f"{spoken(sample)}<|im_end|>")
        if len(asked) + len(said) > self.block:
            given = f"{sample.prompt!r} with its answer has {len(asked) + len(said)} tokens"
            raise InvalidArgumentError(f"{given}; accepted: at most {self.block}")
        return Encoded(np.array(asked + said), len(asked), NAMES.index(task))

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def before(self) -> Tensor:
        """int64: the tokens before the picture."""
        return torch.tensor(self._tokens(BEFORE))

    @cached_property
    def prefix(self) -> int:
        side = self.processor.image_processor.crop_size["height"] // self.processor.patch_size
        return len(self.before) + side * side


def stream(steps: Steps, first: int, last: int, workers: int) -> Iterator[Step]:
    """Steps `first` to `last` - 1, made by so many worker processes."""
    options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    yield from DataLoader(steps, sampler=range(first, last), batch_size=None, num_workers=workers, **options)
