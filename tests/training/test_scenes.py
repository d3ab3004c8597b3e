"""Generated pictures and questions: repeatable, and true when read back from the objects and the pixels."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dyvte_engine.training.nano import scenes
from dyvte_engine.training.nano.pool import pool_questions
from dyvte_engine.training.nano.questions import ASKED, NUMBERS, Question, ask_many
from dyvte_engine.training.nano.scenes import COLORS, SHAPES, Scene, sample_scene

SCENES = [sample_scene(7, split, index) for split in ("train", "heldout") for index in range(150)]


def test_equal_seeds_give_equal_pictures_and_questions() -> None:
    for split in ("train", "heldout"):
        first, second = sample_scene(3, split, 5), sample_scene(3, split, 5)
        assert first == second
        assert np.array_equal(scenes.render(first), scenes.render(second))
        assert np.array_equal(scenes.patch_labels(first), scenes.patch_labels(second))
        assert ask_many(first, 8) == ask_many(second, 8)
    assert sample_scene(3, "train", 5) != sample_scene(3, "heldout", 5)
    assert sample_scene(3, "train", 5) != sample_scene(4, "train", 5)


def test_unseen_words_are_never_printed_in_training() -> None:
    words = {scene.word.text for index in range(3000) if (scene := sample_scene(0, "train", index)).word}
    assert len(words) > 300 and not words & set(scenes.UNSEEN_WORDS)


def test_shapes_do_not_touch_and_show_their_colour() -> None:
    for scene in SCENES:
        pixels = np.asarray(scenes.render(scene)).astype(int)
        for shape in scene.shapes:
            x, y = shape.center
            assert np.abs(pixels[int(y), int(x)] - COLORS[shape.color]).max() <= 20, (scene, shape)
        for i, one in enumerate(scene.shapes):
            for two in scene.shapes[:i]:
                apart = (
                    one.box[0] > two.box[2]
                    or two.box[0] > one.box[2]
                    or one.box[1] > two.box[3]
                    or two.box[1] > one.box[3]
                )
                assert apart


def test_patch_labels_name_the_object_at_the_patch() -> None:
    for scene in SCENES:
        labels = scenes.patch_labels(scene).reshape(scenes.GRID, scenes.GRID, -1)
        for shape in scene.shapes:
            x, y = shape.center
            column, row = int(x) // scenes.PATCH, int(y) // scenes.PATCH
            found = labels[row, column]
            assert found[0] == 1 + SHAPES.index(shape.kind) and found[1] == 1 + list(COLORS).index(shape.color)
            assert tuple(found[2:4]) == (column + 1, row + 1)
        if scene.word:
            letters = labels[..., 6]
            shown = {chr(64 + v) for v in np.unique(letters) if 0 < v <= 26}
            # a narrow letter may lose every patch to its neighbours
            assert set(scene.word.text) - set("IJ") <= shown <= set(scene.word.text)


def named(scene: Scene, noun: str) -> list[scenes.Shape]:
    """The shapes that "red star", "star", "red shape" or "shape" names."""
    noun = noun.replace("crosses", "cross") if noun.endswith("sses") else noun
    *color, kind = (noun if noun.endswith("cross") else noun.removesuffix("s")).split()
    return [s for s in scene.shapes if kind in ("shape", s.kind) and (not color or color[0] == s.color)]


def recount(scene: Scene, text: str) -> str:
    """The one-word answer, read from the words of the question alone."""
    text = re.sub(r" (Answer|Use|One word).*", "", text)
    if match := re.fullmatch(r"(?:How many (.*) (?:are there|do you see)\?|Count the (.*)\.)", text):
        return NUMBERS[len(named(scene, match[1] or match[2]))]
    if match := re.fullmatch(r"Is the (.*) (left or right of|above or below) the (.*)\?", text):
        (one,), (two,) = named(scene, match[1]), named(scene, match[3])
        if match[2].startswith("left"):
            return "left" if one.center[0] < two.center[0] else "right"
        return "above" if one.center[1] < two.center[1] else "below"
    if match := re.fullmatch(r"Is the (.*) (to the left of|to the right of|above|below) the (.*)\?", text):
        (one,), (two,) = named(scene, match[1]), named(scene, match[3])
        axis, sign = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}[match[2]]
        return "yes" if sign * (two.center[axis] - one.center[axis]) > 0 else "no"
    if scene.word and ("word" in text or "text" in text):
        return scene.word.text
    if match := re.search(r"(?i)(?:color is the|color of the|color does the) (\w+)", text):
        (shape,) = named(scene, match[1])
        return shape.color
    if match := re.fullmatch(r"(?:what is the (\w+) shape|(?:What|Which) shape is (\w+))\?", text):
        (shape,) = named(scene, f"{match[1] or match[2]} shape")
        return shape.kind
    if re.match("what shape", text):
        (shape,) = scene.shapes
        return shape.kind
    match = re.search(r"\b(?:a|an|no) ((?:\w+ )?(?:shape|circle|rectangle|triangle|star|cross))\b", text)
    assert match, text
    there, negated = bool(named(scene, match[1])), bool(re.search(r"\b(not|no)\b", text))
    return "yes" if there != negated else "no"


def one_word(scene: Scene, question: Question) -> str:
    """The fact in a sentence answer."""
    answer = question.answer
    if " " not in answer:
        return answer
    words = answer.rstrip(".").split()
    if question.kind == "count":
        return {"no": "zero"}.get(words[2], words[2])
    if answer.startswith(("Yes,", "No,")):
        return words[0].rstrip(",").lower()
    if question.kind == "spatial":
        return next(w for w in ("left", "right", "above", "below") if w in words)
    return words[-1]


@pytest.mark.parametrize("kind", ["presence", "color", "shape", "count", "spatial", "word"])
def test_answers_are_true(kind: str) -> None:
    asked = [(scene, q) for scene in SCENES for q in ask_many(scene, 12) if q.kind == kind]
    assert len(asked) > 100
    for scene, question in asked:
        assert one_word(scene, question) == recount(scene, question.text), (question, scene)


def test_side_asks_spatial_questions_that_offer_both_answers() -> None:
    only_sides = [name == "side" for name in ASKED]
    asked = [(scene, q) for scene in SCENES for q in ask_many(scene, 12, only_sides)]
    assert len(asked) > 100 and {q.kind for _, q in asked} == {"spatial"}
    for scene, question in asked:
        assert re.search("left or right of|above or below", question.text)
        assert one_word(scene, question) == recount(scene, question.text), (question, scene)


def test_place_asks_on_which_side_of_the_middle() -> None:
    asked = [(scene, q) for scene in SCENES for q in ask_many(scene, 12, [name == "place" for name in ASKED])]
    assert len(asked) > 100
    for scene, question in asked:
        noun, choice = re.match(r"Is the (.*) (left or right of|above or below) the middle\?", question.text).groups()
        (shape,) = named(scene, noun)
        x, y = shape.center
        true = ("left", "right")[x > 48] if choice.startswith("left") else ("above", "below")[y > 48]
        assert one_word(scene, question) == true, (question, scene)


def test_questions_about_scenes_with_few_shapes_only() -> None:
    drawn = [sample_scene(7, "train", index) for index in range(150)]
    for scene, asked in zip(drawn, pool_questions(7, "train", 150, 4, workers=1, shapes=(2, 3)), strict=True):
        if scene.style != "shapes" or len(scene.shapes) in (2, 3):
            assert asked == ask_many(scene, 4)
        else:
            assert not asked


def test_yes_and_no_are_balanced() -> None:
    answers = [q.answer.split()[0].strip(",.").lower() for s in SCENES for q in ask_many(s, 12) if q.kind == "presence"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6
