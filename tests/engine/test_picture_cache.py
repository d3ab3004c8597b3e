"""Pictures pass the vision tower once, and answers do not know it."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from dyvte_engine import Engine, EngineConfig, InvalidArgumentError, KeepAll, ToMe, VisionZip
from dyvte_engine.models import VisionLanguageModel
from dyvte_engine.runtime.picture_cache import PictureCache, digest_of
from tests import tiny
from tests.engine.conftest import build
from tests.families import zoo

PICTURES = [tiny.picture(random.Random(seed)) for seed in range(6)]


@pytest.fixture
def seen(monkeypatch):
    """An engine, and a list of how many pictures its tower was given at each call."""
    engine, _ = build()
    calls, tower = [], engine.model.hf.model.vision_tower
    forward = tower.forward

    def counting(pixel_values, **options):
        calls.append(len(pixel_values))
        return forward(pixel_values, **options)

    monkeypatch.setattr(tower, "forward", counting)
    return engine, calls


def entry(engine, text, pictures, policy=None):
    return engine.prepare(text, pictures, chat=False, policy=policy)[0]


def equal(got, want):
    assert torch.equal(got.visual, want.visual) and got.pictures == want.pictures
    assert torch.equal(got.positions, want.positions) and got.positions.dtype == want.positions.dtype
    torch.testing.assert_close(got.inputs_embeds, want.inputs_embeds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", [KeepAll(), ToMe(0.5)])
def test_rows_are_those_of_the_tower_bit_for_bit(policy):
    """The same batch in the tower: the same bits, when it is seen and when it is not."""
    engine, _ = build()
    bound = engine.bind(policy)
    text, pictures = "w1 <image> w2 w3 <image> w4", PICTURES[:2]
    want = engine.model.prepare(engine.model.tokenize([text], [pictures]), bound)[0]
    for _ in range(2):
        got = entry(engine, text, pictures, bound)
        equal(got, want)
        assert torch.equal(got.inputs_embeds, want.inputs_embeds)
    other = "w9 <image> <image> w8 w7"
    want = engine.model.prepare(engine.model.tokenize([other], [pictures]), bound)[0]
    assert torch.equal(entry(engine, other, pictures, bound).inputs_embeds, want.inputs_embeds)


def test_a_picture_is_seen_once_wherever_it_is(seen):
    engine, calls = seen
    a, b, c = PICTURES[:3]

    def ask(text, pictures):
        return engine.generate(text, pictures, chat=False, max_new_tokens=2).stats.pictures_reused

    assert ask("<image> w1", [a]) == 0 and calls == [1]
    assert ask("w5 <image> w1", [a]) == 1 and calls == [1]
    assert ask("w5 <image> w1 <image> <image> w3", [b, a, c]) == 1 and calls == [1, 2]
    assert ask("<image> w1", [c.copy()]) == 1 and calls == [1, 2]
    assert ask("w1 w2", None) == 0 and calls == [1, 2]
    twice = engine.generate(["<image> w1", "<image> w2"], [PICTURES[4], PICTURES[4]], chat=False, max_new_tokens=2)
    assert calls == [1, 2, 1] and [r.stats.pictures_reused for r in twice] == [0, 0]


def test_answers_equal_those_without_a_cache():
    cached, hf = build()
    texts, images = tiny.prompts(seed=11, n=12)
    images = [[PICTURES[(i + j) % 3] for j in range(len(own))] for i, own in enumerate(images)]
    want = [tiny.hf_greedy(hf, cached.model.processor, t, i, 6) for t, i in zip(texts, images)]
    for _ in range(2):
        assert [r.token_ids for r in cached.generate(texts, images, chat=False, max_new_tokens=6)] == want


def test_policies_in_the_tower_share_under_their_own_key(seen):
    engine, calls = seen

    def reused(policy):
        result = engine.generate("<image> w1", PICTURES[0], chat=False, max_new_tokens=2, policy=policy)
        return result.stats.pictures_reused

    assert [reused(ToMe(0.5)), reused(ToMe(0.75)), reused(KeepAll())] == [0, 0, 0] and len(calls) == 3
    assert [reused(ToMe(0.5)), reused(ToMe(0.75)), reused("fixed:1")] == [1, 1, 1] and len(calls) == 3
    assert reused(VisionZip(4, 2)) is None


def test_no_two_pictures_are_taken_for_one():
    """Equal bytes in another shape, dtype, order or under another name."""
    pixels = torch.arange(48, dtype=torch.float32).reshape(1, 3, 4, 4)
    same = [
        dict(pixel_values=pixels),
        dict(pixel_values=pixels.transpose(2, 3)),
        dict(pixel_values=pixels.reshape(1, 3, 2, 8)),
        dict(pixel_values=pixels.view(torch.int32)),
        dict(pixel_values=pixels.double()),
        dict(pixel_values_videos=pixels),
        dict(pixel_values=pixels, image_sizes=torch.tensor([[4, 4]])),
        dict(pixel_values=pixels, image_sizes=torch.tensor([[4, 3]])),
    ]
    assert len({digest_of(inputs) for inputs in same}) == len(same)
    assert digest_of(same[0]) == digest_of(dict(pixel_values=pixels.transpose(2, 3).contiguous().transpose(2, 3)))


def test_crafted_neighbours_get_their_own_rows(seen):
    """A picture, its transpose, and it with one level changed in one pixel."""
    engine, calls = seen
    array = np.frombuffer(random.Random(3).randbytes(28 * 28 * 3), np.uint8).reshape(28, 28, 3).copy()
    changed = array.copy()
    changed[5, 7, 1] ^= 1
    pictures = [Image.fromarray(a) for a in (array, array.transpose(1, 0, 2).copy(), changed)]
    for picture in pictures:
        want = engine.model.prepare(engine.model.tokenize(["<image> w1"], [[picture]]))[0]
        assert torch.equal(entry(engine, "<image> w1", picture).inputs_embeds, want.inputs_embeds)
    assert sum(calls) == 6


def test_its_bytes_are_bounded_and_the_latest_used_stay():
    engine, _ = build()
    one = 16 * 64 * 4  # rows, width, bytes
    cache = PictureCache(engine.model, 2 * one + 7)
    policy = engine.policy

    def ask(*numbers):
        text = " ".join(["<image>"] * len(numbers)) + " w1"
        return cache.prepare(engine.model.tokenize([text], [[PICTURES[n] for n in numbers]]), policy)[0].reused

    assert ask(0, 1) == 0 and cache.bytes_held == 2 * one
    assert ask(0) == 1 and ask(2) == 0 and cache.bytes_held == 2 * one  # 1 leaves, not 0
    assert ask(0, 2) == 2 and ask(1) == 0
    assert ask(0, 1, 2, 3) == 2 and cache.bytes_held == 2 * one  # more than fit at once
    small = PictureCache(engine.model, one - 1)
    assert small.prepare(engine.model.tokenize(["<image> w1"], [[PICTURES[0]]]), policy)[0].reused == 0
    assert small.bytes_held == 0
    off, _ = build(picture_cache=0)
    assert off.generate("<image> w1", PICTURES[0], chat=False, max_new_tokens=1).stats.pictures_reused is None


@pytest.mark.parametrize("value", [-1, 1.5, True, "some", None])
def test_what_it_takes(value):
    with pytest.raises(InvalidArgumentError, match="picture_cache"):
        EngineConfig(torch.device("cpu"), torch.float32, picture_cache=value)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_enters_the_decoder_as_without_it(family):
    """Prompts that share pictures in changing company: rows, marks and positions as transformers' code gives them."""
    model = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, 384)
    engine = Engine(model, EngineConfig(torch.device("cpu"), torch.float32, max_len=384))
    texts, images = zoo.prompts(family, seed=21, n=8)
    pool = [picture for own in images for picture in own][:3]
    images = [[pool[(i + j) % len(pool)] for j in range(len(own))] for i, own in enumerate(images)]
    tokenized = model.tokenize(texts, images)
    reused = []
    for prompt in [*tokenized, *tokenized]:
        want = model.prepare([prompt], engine.policy)[0]
        (seen,) = engine.runner.pictures.prepare([prompt], engine.policy)
        equal(seen.prompt, want)
        reused.append(seen.reused)
    if model.family.axes > 1:
        assert reused == [None] * 16
    else:
        assert reused[8:] == [len(own) for own in images]
        assert model.family.same_rows <= (sum(reused[:8]) >= sum(map(len, images)) - 3)


def test_tiles_that_fill_up_are_no_part_of_a_picture():
    """A small picture is found again when a larger one in its prompt made its tiles more."""
    model = VisionLanguageModel(zoo.model("llava_next"), zoo.processor("llava_next"), "llava_next", 384)
    cache, policy = PictureCache(model, 1 << 20), KeepAll()
    small, large = (Image.new("RGB", size, (200, 40, 90)) for size in ((28, 20), (56, 56)))
    first, both = model.tokenize(["<image> w1", "<image> w1 <image> w2"], [[small], [small, large]])
    assert cache.prepare([first], policy)[0].reused == 0
    widest = [p.inputs["pixel_values"].shape[1] for p in (first, both)]
    (seen,) = cache.prepare([both], policy)
    assert widest[0] < widest[1] and seen.reused == 1
    equal(seen.prompt, model.prepare([both], policy)[0])


def test_what_the_processor_makes_is_kept_by_pixels_and_settings(monkeypatch):
    """Equal pixels are worked on once; turned ones, other modes, options and settings are others."""
    engine, _ = build(max_len=192)
    monkeypatch.setattr(engine.model, "_quick", None)  # tests/families/test_quick_processor.py has the quick one
    processor, inner = PictureCache(engine.model, 1 << 20).processor, engine.model.processor.image_processor
    calls, real = [], type(inner).__call__
    monkeypatch.setattr(type(inner), "__call__", lambda self, *a, **o: calls.append(1) or real(self, *a, **o))
    a = tiny.picture(random.Random(1)).convert("RGB")
    grey, turned = a.convert("L").convert("RGB"), a.transpose(Image.Transpose.TRANSPOSE)

    def made(image, **options):
        before = len(calls)
        got = processor(text=["<image>"], images=[[image]], return_tensors="pt", **options)["pixel_values"]
        kept = len(calls) == before
        want = engine.model.processor(text=["<image>"], images=[[image]], return_tensors="pt", **options)
        assert torch.equal(got, want["pixel_values"])
        return kept

    assert [made(a), made(a.copy()), made(turned), made(grey), made(grey), made(a)] == [
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    assert [made(a, do_normalize=False), made(a, do_normalize=False), made(a)] == [False, True, True]
    assert [made(a.convert("L")), made(a.convert("L"))] == [False, False]
    monkeypatch.setattr(inner, "image_mean", [0.1, 0.2, 0.3])
    assert [made(a), made(a)] == [False, True]
    kept = processor.image_processor
    assert 0 < kept._bytes <= kept._budget and kept._bytes == sum(m["pixel_values"].nbytes for m in kept._made.values())
    kept._budget = 3 * a.size[0] * a.size[1] * 4  # of one picture
    made(turned.rotate(90, expand=True))
    assert len(kept._made) <= 1 and kept._bytes <= kept._budget
    assert build(picture_cache=0)[0].runner.pictures.processor is not processor


def test_an_engine_that_keeps_nothing_uses_the_processor_itself():
    engine, _ = build(picture_cache=0)
    assert engine.runner.pictures.processor is engine.model.reader


def test_text_alone_needs_no_tower_and_no_cache(monkeypatch):
    """Its rows are those that transformers' code gives, beside one with a picture too."""
    engine, _ = build(picture_cache=0, prefix_cache=0)
    model, policy = engine.model, engine.policy
    prompts = model.tokenize(["w1 w2 w3", "<image> w4", "w5"], [[], [PICTURES[0]], []])
    want, prepare, shown = model.prepare(prompts), model.prepare, []
    monkeypatch.setattr(model, "prepare", lambda given, *more: shown.extend(given) or prepare(given, *more))
    for seen, right in zip(engine.runner.pictures.prepare(prompts, policy), want, strict=True):
        equal(seen.prompt, right)
    assert shown == [prompts[1]]
