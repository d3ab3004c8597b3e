"""Composed scenes, on sprites made here (no network), and the fetching of the real ones through a stand-in for npm."""

import hashlib
import io
import itertools
import json
import os
import random
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dyvte_engine.errors import InvalidArgumentError, SourceError
from dyvte_engine.eval import compose, emoji, load_tasks, suite, task
from dyvte_engine.eval import emoji_sets as sets
from dyvte_engine.eval.suite import PLANS
from dyvte_engine.training.nano.scenes import UNSEEN_WORDS

ATLAS = sets.atlas


def sprites(style):
    """A colour of its own for every noun, its shade told by the style; opaque discs on nothing."""
    rng = np.random.default_rng(sets.STYLES.index(style))
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    out = np.zeros((len(sets.NOUNS), 4, 96, 96), np.uint8)
    out[:, :3] = rng.integers(0, 256, (len(sets.NOUNS), 3, 1, 1))
    out[:, 3] = 255 * (x * x + y * y < 0.8)
    return out


@pytest.fixture(autouse=True)
def made_here(monkeypatch):
    emoji._painter.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sets, "atlas", sprites)
        yield
    emoji._painter.cache_clear()


def at(picture, x, y):
    return picture[min(int(y * 224), 223), min(int(x * 224), 223)].astype(int)


def test_things_lie_where_the_view_says():
    world = emoji.Emoji()
    seen = 0
    for index in range(30):
        style = world.styles[index % 3]
        view = world.view(0, index, style=style)
        picture = np.asarray(view.draw())
        for thing, placed in zip(view.things, view.draw.layout.placed, strict=True):
            sprite = sprites(style)[sets.NOUNS.index(thing.noun), :3, 48, 48]
            assert np.abs(at(picture, *thing.center) - sprite).max() <= 2
            if thing.color:
                edge = at(picture, thing.center[0] - placed.side * 0.58, thing.center[1])
                assert np.abs(edge - emoji.COLORS[thing.color]).max() <= 2
            seen += 1
    assert seen > 50


def test_things_do_not_overlap():
    for index in range(50):
        placed = emoji.Emoji().view(1, index).draw.layout.placed
        for i, a in enumerate(placed):
            for b in placed[:i]:
                gap = max(abs(a.x - b.x), abs(a.y - b.y)) - (a.side + b.side) * compose.TILE / 2
                assert gap > 0 or (a.tile is None and gap > -0.1)


def test_a_batch_is_its_members():
    layouts = [emoji.Emoji().view(2, i, printed=i == 3).draw.layout for i in range(6)]
    painter = compose.Painter({s: torch.from_numpy(sprites(s)) for s in sets.STYLES})
    batch = painter(layouts)
    assert batch.shape == (6, 3, 224, 224)
    for one, layout in zip(batch, layouts):
        assert (one.int() - painter([layout])[0].int()).abs().max() <= 1


def test_painting_against_pillow():
    """One sprite on its tile over a plain ground, at twice its size, as PIL pastes it."""
    sprite = np.zeros((1, 4, 56, 56), np.uint8)
    sprite[0, :3, :28] = 200
    sprite[0, 3] = 255
    layout = compose.Layout("s", ((10, 20, 30),) * 2, 0.0, 0, 0.0, 0, (compose.Placed(0, 0.5, 0.5, 0.5, (90, 80, 70)),))
    drawn = compose.Painter({"s": torch.from_numpy(sprite)})([layout])[0].permute(1, 2, 0).numpy()
    expected = Image.new("RGB", (224, 224), (10, 20, 30))
    tile = round(112 * compose.TILE)
    expected.paste((90, 80, 70), ((224 - tile) // 2,) * 2 + ((224 + tile) // 2,) * 2)
    expected.paste(
        Image.fromarray(sprite[0, :3].transpose(1, 2, 0)).resize((112, 112), Image.Resampling.NEAREST), (56, 56)
    )
    differs = np.abs(drawn.astype(int) - np.asarray(expected, int)).max(-1) > 3
    for edge in (40, 56, 112, 168, 183):  # where anything begins or ends, one sprite pixel is two of the picture
        differs[edge - 2 : edge + 3] = differs[:, edge - 2 : edge + 3] = False
    for y, x in itertools.product((slice(40, 60), slice(164, 184)), repeat=2):
        differs[y, x] = False  # the tile's round corners
    assert not differs.any()
    assert (drawn[42, 42] == (10, 20, 30)).all()


def test_training_never_sees_what_is_held_out():
    world = emoji.Emoji(split="train")
    assert sets.UNSEEN_STYLE not in world.styles
    with pytest.raises(InvalidArgumentError, match="twemoji"):
        emoji.Emoji(("twemoji",), "train")
    for index in range(200):
        view = world.view(0, index, printed=True)
        assert view.word not in UNSEEN_WORDS and view.font == "known font"
        assert view.draw.layout.style in sets.TRAINING_STYLES
    held_out = [emoji.Emoji().view(0, i, printed=True) for i in range(60)]
    assert {v.word for v in held_out} <= set(UNSEEN_WORDS)
    assert {v.font for v in held_out} == {"known font", "unseen font"}
    assert world.view(0, 5).things != emoji.Emoji().view(0, 5).things


def test_alike_is_of_one_category():
    world = emoji.Emoji()
    for index in range(40):
        view = world.view(3, index)
        there = {t.noun for t in view.things}
        other = world.alike(random.Random(index), view)
        assert other not in there and sets.CATEGORY[other] in {sets.CATEGORY[n] for n in there}


def test_all_nine_tasks_in_every_style():
    for made in load_tasks(list(PLANS), seed=3, limit=36, source="emoji"):
        assert len(made.samples) == 36 and made.source == "emoji"
        styles = [s.meta["style"] for s in made.samples]
        assert set(styles) == set(sets.STYLES)
        score = made.score(["yes"] * 36)
        assert set(score["styles"]) == set(sets.STYLES)
        assert sum(s["n"] for s in score["styles"].values()) == score["n"]
    only = load_tasks(["pope"], limit=8, source="emoji", styles=["twemoji"])[0]
    assert {s.meta["style"] for s in only.samples} == {"twemoji"}


BEGINS = {
    task.PRESENCE: r"Is there an? [\w -]+ in the picture\?",
    task.ATTRIBUTE: r"What color is|Is the tile under",
    task.IDENTITY: r"What is on the|Which of these is in|Context:",
    task.COUNTING: r"How many|(Is|Are) there exactly",
    task.RELATION: r"Is the [\w -]+ (left|above|below|to the)|Which of these is (above|below|to the)",
    task.LOCATION: r"Where in the picture",
    task.READING: r"What does the text|Does the text",
    task.DESCRIPTION: r"Describe",
}


def test_the_kind_of_a_question_is_what_it_asks():
    samples = [s for made in load_tasks(list(PLANS), seed=4, limit=90, source="emoji") for s in made.samples]
    for sample in samples:
        assert [kind for kind in task.KINDS if re.match(BEGINS[kind], sample.prompt)] == [sample.meta["kind"]]
    assert {s.meta["kind"] for s in samples} == set(task.KINDS)


@pytest.mark.parametrize(
    "words, others",
    [
        (["CAT", "OTTER"], [{"OTTER"}, {"CAT"}]),
        (["CAT"], []),
        (["CAT", "ZIP", "OTTER"], [{"ZIP"}, {"CAT"}, {"CAT", "ZIP"}]),
    ],
)
def test_a_word_is_denied_where_no_other_has_its_length(words, others):
    """Another of the next length; where there is no other word, nothing is asked."""
    world, asked = emoji.Emoji(split="train", words=words), {}
    for index in range(40):
        view = world.view(0, index, printed=True)
        question = suite._mme_word(random.Random(index), world, view)
        if question:
            asked.setdefault(view.word, set()).add(question[1].split('"')[1])
            assert question[0].split('"')[1] == view.word
    assert [asked[word] for word in words if asked] == others


def tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An `npm` that packs what lies in a folder; returns that folder."""
    shelf, bin_folder = tmp_path / "shelf", tmp_path / "bin"
    shelf.mkdir()
    bin_folder.mkdir()
    script = bin_folder / "npm"
    script.write_text(f'#!/bin/sh\necho "$2" >> {shelf}/asked\ncp {shelf}/*.tgz "$5"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shelf


def test_fetch_keeps_checks_and_refuses(npm, monkeypatch):
    content = tarball({"a.json": 1})
    (npm / "scope-thing-1.0.tgz").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    path = sets.fetch("@scope/thing@1.0", digest)
    assert sets.fetch("@scope/thing@1.0", digest) == path and path.read_bytes() == content
    assert (npm / "asked").read_text().split() == ["@scope/thing@1.0"]  # once
    path.write_bytes(content[:-1])
    with pytest.raises(SourceError, match="SHA-256"):
        sets.fetch("@scope/thing@1.0", digest)
    with pytest.raises(SourceError, match="failed"):
        sets.fetch("other@2.0", digest)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SourceError, match="npm, which is not installed"):
        sets.fetch("other@2.0", digest)


def test_sprites_are_drawn_from_svg_once(npm, monkeypatch):
    pytest.importorskip("resvg_py")
    nouns = ("square", "dot")
    icons = {"square": {"body": '<path fill="#f00" d="M0 0h10v10H0z"/>'}}
    icons["dot"] = {"body": '<circle cx="5" cy="5" r="2.5" fill="#00f"/>', "width": 10}
    drawing = {"icons.json": {"icons": icons, "width": 10, "height": 10}}
    drawing["chars.json"] = {"25a0": "square", "25cf-200d": "dot"}
    words = {"■": {"name": "square"}, "●\u200d\ufe0f": {"name": "dot"}}
    packed = {"fluent": tarball(drawing), "names": tarball({"data-by-emoji.json": words})}
    for key, content in packed.items():
        (npm / f"{key}-1.0.tgz").write_bytes(content)
    found = {key: (f"{key}@1.0", hashlib.sha256(content).hexdigest()) for key, content in packed.items()}
    monkeypatch.setattr(sets, "PACKAGES", found)
    monkeypatch.setattr(sets, "NOUNS", nouns)
    ATLAS.cache_clear()
    first = ATLAS("fluent")
    assert first.shape == (2, 4, 96, 96) and first.dtype == np.uint8
    assert (first[0] == np.array([255, 0, 0, 255])[:, None, None]).all()
    inside = first[1, 3] > 127
    assert inside.sum() == pytest.approx(np.pi * 24**2, rel=0.02) and (first[1, 2][inside] == 255).all()
    for tgz in npm.parent.glob("cache/**/*.tgz"):
        tgz.unlink()
    ATLAS.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert np.array_equal(ATLAS("fluent"), first)  # from the cache, neither npm nor packages needed
    ATLAS.cache_clear()
