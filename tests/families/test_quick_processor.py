"""Prompts read by a QuickProcessor, against the checkpoint's own processor: the same ids and the same bits."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dyvte_engine import Engine
from dyvte_engine.models import VisionLanguageModel
from dyvte_engine.models.image_processors import pil_image_processor
from dyvte_engine.models.picture_scaling import MAX_PIXELS, Unscaled, scaled
from dyvte_engine.models.quick_processor import picture_values, quick_processor
from dyvte_engine.runtime.picture_cache import PictureCache
from tests import tiny
from tests.families import zoo

SQUARE = {"height": 28, "width": 28}
LETTER = {"height": 35, "width": 21}
KINDS = {
    "clip, as LLaVA-1.5 has it": ("clip", dict(size={"shortest_edge": 28}, crop_size=SQUARE)),
    "clip, a square": ("clip", dict(size=SQUARE, crop_size=SQUARE, do_center_crop=False)),
    "clip, cut out of what is smaller": ("clip", dict(size={"shortest_edge": 20}, crop_size=LETTER)),
    "clip, cut only": ("clip", dict(do_resize=False, crop_size=LETTER)),
    "clip, scaled only": ("clip", dict(size=LETTER, do_center_crop=False, do_normalize=False)),
    "siglip": ("siglip", dict(size=SQUARE)),
    "siglip, normalised only": ("siglip", dict(size=LETTER, do_rescale=False, image_mean=[9.5, 0, 7])),
    "siglip, nearest": ("siglip", dict(size=LETTER, resample=0, rescale_factor=1 / 127.5)),
    "llava": ("llava", dict(size={"shortest_edge": 28}, crop_size=SQUARE)),
    "llava, filled up to a square": ("llava", dict(size={"shortest_edge": 28}, crop_size=SQUARE, do_pad=True)),
}
NAMES = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "llava": "LlavaImageProcessor"}
SIZES = [(28, 28), (20, 31), (200, 4), (4, 200), (5, 5), (97, 97), (160, 120), (35, 21), (1, 40)]


def by_pil(own):
    """Where there is torchvision, transformers takes another image processor."""
    own.image_processor = pil_image_processor("clip", "CLIPImageProcessor")(**own.image_processor.to_dict())
    return own


def images(kind: str, backend: str = "pil"):
    module, options = KINDS[kind]
    if backend == "pil":
        return pil_image_processor(module, NAMES[module])(**options)
    pytest.importorskip("torchvision")
    suffix = "Fast" if transformers.__version__ < "5" else ""
    return getattr(transformers, NAMES[module] + suffix)(**options)


def processor(pictures, specials=("<image>",)) -> transformers.LlavaProcessor:
    made = tiny.processor()
    return transformers.LlavaProcessor(
        pictures,
        tiny.tokenizer(["<pad>", "<s>", "</s>", "<unk>", *specials], ["user", "a", "b", "."]),
        patch_size=made.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.TEMPLATE,
    )


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, random.Random(seed).randbytes(bands * size[0] * size[1]))


def assert_same(own, quick, text: str, pictures: list[Image.Image], quickly: bool = True) -> None:
    for special in (True, False):
        given = dict(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
        want, got = (one(**given, add_special_tokens=special) for one in (own, quick))
        assert got["input_ids"] == want["input_ids"].tolist()
        if pictures:
            pixels, wanted = got["pixel_values"], want["pixel_values"]
            left = quickly and quick.image_processor.leaves(pictures)
            assert isinstance(pixels, Unscaled) == left
            pixels = scaled([pixels], torch.device("cpu")) if left else pixels
            assert (pixels.dtype in (torch.uint8, torch.int64)) == quickly
            if quickly:
                assert torch.equal(picture_values(quick.values.bfloat16(), pixels), wanted.bfloat16())
                pixels = picture_values(quick.values, pixels)
            assert pixels.dtype == wanted.dtype and torch.equal(pixels, wanted)


@pytest.mark.parametrize("backend", ["pil", "torchvision", "pil, scaled on the device"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(kind, backend):
    own, left = processor(images(kind, backend.split(",")[0])), "device" in backend
    quick, why = quick_processor(own, unscaled=left)
    assert why is None
    assert quick.image_processor.leaves([noise((5, 5))]) == (left and KINDS[kind][1].get("do_resize", True))
    for seed, size in enumerate(SIZES):
        assert_same(own, quick, "a <image> b.", [noise(size, seed)])
    assert_same(own, quick, "<image><image> a<image>", [noise(size) for size in SIZES[:3]])
    assert_same(own, quick, "user a", [])
    every = Image.frombytes("RGB", (256, 30), bytes(i for _ in range(30) for i in range(256) for _ in range(3)))
    assert_same(own, quick, "<image>", [every])


def llama_like(sides: str) -> transformers.PreTrainedTokenizerFast:
    """Spaces become part of words, and the first word of a text gets one, as Llama's tokenizers have it."""
    letters = ["▁", *"abc.\n", "▁a", "ab", "▁ab", "<0xC3>", "<0xA9>"]
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "<pad>", *letters])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if "normalizer" in sides:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    mark = transformers.AddedToken("<image>", lstrip="left" in sides, rstrip="right" in sides, special=True)
    made.add_special_tokens({"additional_special_tokens": [mark]})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


@pytest.mark.parametrize("sides", ["", "left", "right", "left, right", "normalizer", "normalizer, left, right"])
def test_texts_around_a_mark(sides):
    """The processor writes a mark 16 times and has all of it tokenized; the quick one has one of them tokenized."""
    own = processor(images("siglip"))
    own = transformers.LlavaProcessor(
        own.image_processor, llama_like(sides), patch_size=7, vision_feature_select_strategy="full"
    )
    quick, why = quick_processor(own)
    assert why is None
    rng, picture = random.Random(5), noise((28, 28))
    for _ in range(60):
        pieces = rng.choices([" ", "  ", "\n", "a", "ab", " ab", "c.", "é", "<s>", "</s>", "<image>", "<image>"], k=8)
        assert_same(own, quick, "".join(pieces), [picture] * pieces.count("<image>"))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families(family):
    """Who has LLaVA's processor is read quickly, all others as their processors do."""
    own = zoo.processor(family)
    quick, why = quick_processor(own)
    assert (quick is None) == (type(own) is not transformers.LlavaProcessor) == (why is not None)
    if quick is None:
        assert type(own).__name__ in why
        return
    for text, pictures in zip(*zoo.prompts(family, 3, 12)):
        assert_same(own, quick, text, pictures)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_other_pictures_go_to_the_processor(mode, unscaled):
    own = processor(images("clip, a square"))
    quick, _ = quick_processor(own, unscaled)
    assert_same(own, quick, "<image>", [noise((30, 20), 1, mode)], quickly=False)
    assert_same(own, quick, "<image><image>", [noise((30, 20)), noise((30, 20), 1, mode)], quickly=False)
    assert_same(own, quick, "<image>", [noise((40, 3))], quickly=False)  # channels, to transformers 4
    seen_through = noise((40, 30))
    seen_through.info["transparency"] = seen_through.getpixel((1, 1))
    assert_same(own, quick, "<image>", [seen_through], quickly=False)


def test_what_pil_scales_although_a_device_could():
    """The largest ones, of which many may wait, and those whose height PIL may scale first."""
    own = processor(images("llava, filled up to a square"))
    padded, _ = quick_processor(own, unscaled=True)
    quick, _ = quick_processor(processor(images("clip, a square")), unscaled=True)
    side = math.isqrt(MAX_PIXELS)
    for one, size, left in (
        (quick, (2048, MAX_PIXELS // 2048), True),
        (quick, (2048, MAX_PIXELS // 2048 + 1), False),
        (quick, (4096, 8), True),
        (quick, (4097, 8), False),
        (quick, (4, 400), True),
        (quick, (4, 401), False),
        (padded, (side, 4), True),
        (padded, (side + 1, 4), False),
    ):
        assert one.image_processor.leaves([noise((9, 9)), Image.new("RGB", size)]) == left
    assert_same(quick.own, quick, "<image><image>", [noise((1, 101)), noise((30, 20))])


def test_other_builds_of_pil_scale_themselves(monkeypatch):
    """Some round their weights to fewer places."""
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **o: resize(self, *a, **o).point(lambda v: v & ~1))
    own = processor(images("clip, a square"))
    quick, why = quick_processor(own, unscaled=True)
    assert why is None and not quick.image_processor.leaves([noise((9, 9))])
    assert_same(own, quick, "<image>", [noise((31, 45))])


def change_mean(own):
    own.image_processor.image_mean = [0.25, *own.image_processor.image_mean[1:]]


def change_size(own):
    own.image_processor.size = dict(SQUARE, width=14)


def change_patches(own):
    own.patch_size = 14


def change_pictures(own):
    own.image_processor = images("siglip")


def change_resize(own):
    resize = own.image_processor.resize
    own.image_processor.resize = lambda *args, **options: 255 - resize(*args, **options)


def change_padding(own):
    own.tokenizer.init_kwargs.update(padding="max_length", max_length=60)


CHANGES = [change_mean, change_size, change_patches, change_pictures, change_resize, change_padding]


@pytest.mark.parametrize("change", CHANGES)
def test_a_processor_changed_later_is_followed(change):
    own = processor(images("clip, a square"))
    quick, _ = quick_processor(own)
    change(own)
    assert_same(own, quick, "a <image> b", [noise((31, 45))], quickly=False)


def test_a_token_of_several_marks_added_later():
    """The processor refuses what it then reads: so must the quick one."""
    own = processor(images("clip, a square"))
    quick, _ = quick_processor(own)
    own.tokenizer.add_tokens(["<image><image>"], special_tokens=True)
    given = dict(text=["a <image> b"], images=[[noise((31, 45))]], return_tensors="pt", add_special_tokens=True)
    for one in (own, quick):
        with pytest.raises(ValueError, match="Mismatch in `image` token count"):
            one(**given)


def bytes_stay(own):
    own.image_processor.do_rescale = own.image_processor.do_normalize = False


class Subclass(type(images("clip, a square"))):
    pass


def refused(kind: str):
    if kind == "subclass":
        return processor(Subclass(size=SQUARE, do_center_crop=False))
    own = processor(images("clip, a square"))
    if kind == "resize":
        change_resize(own)
    elif kind == "bytes":
        bytes_stay(own)
    elif kind == "several sizes":
        own.image_processor.size, own.image_processor.do_center_crop = {"shortest_edge": 28}, False
    elif kind == "mark":
        own.image_token = "a"
    elif kind == "look around":
        own.tokenizer.add_tokens([transformers.AddedToken("<img>", single_word=True, normalized=False)])
        own.image_token = "<img>"
    elif kind == "class":
        own = type("LlavaProcessor", (transformers.LlavaProcessor,), {})(own.image_processor, own.tokenizer, 7)
    return own


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("subclass", "its image processor is a Subclass"),
        ("resize", "resize is replaced"),
        ("bytes", "makes torch.uint8"),
        ("several sizes", "pictures are of several sizes"),
        ("mark", "does not know a as one token"),
        ("look around", "looks around <img>"),
        ("class", "the processor is a LlavaProcessor"),
    ],
)
def test_refused(kind, why):
    quick, because = quick_processor(refused(kind))
    assert quick is None and why in because


def test_a_method_replaced_in_the_class(monkeypatch):
    own = processor(images("clip, a square"))
    normalize = type(own.image_processor).normalize
    quick, _ = quick_processor(own)
    monkeypatch.setattr(type(own.image_processor), "normalize", lambda *a, **o: -normalize(*a, **o))
    assert "normalize is replaced" in quick_processor(own)[1]
    assert_same(own, quick, "a <image> b", [noise((31, 45))], quickly=False)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_model_reads_bytes_and_sees_the_same(unscaled):
    """Tower and projector, with prompts of before and after a change of the processor in one batch."""
    hf, text, pictures = tiny.model(), "w1 <image> w2", [noise((50, 33)), noise((28, 28), 1)]
    model = VisionLanguageModel(hf, by_pil(tiny.processor()), "tiny", None)
    assert model.slow_because is None
    if unscaled:  # as on CUDA
        model._quick, _ = quick_processor(model.processor, unscaled=True)
    read = model.tokenize([text, text], [[p] for p in pictures])
    assert all(isinstance(r.inputs["pixel_values"], Unscaled) == unscaled for r in read)
    assert unscaled or all(r.inputs["pixel_values"].dtype is torch.uint8 for r in read)
    assert [model.tower_passes(r) for r in read] == [1, 1]
    plain = copy.copy(model)
    plain._quick = None
    slow = plain.tokenize([text, text], [[p] for p in pictures])
    assert slow[0].inputs["pixel_values"].dtype is torch.float32
    want = model.prepare(slow)
    (both,) = model.tokenize([f"{text}<image>"], [pictures])
    (two,) = model.prepare([both])
    assert torch.equal(two.inputs_embeds[two.visual], torch.cat([w.inputs_embeds[w.visual] for w in want]))
    for batch in (read, [read[0], slow[1]], [slow[0], read[1]]):
        for one, wanted in zip(model.prepare(batch), want):
            assert torch.equal(one.inputs_embeds, wanted.inputs_embeds)
    bytes_stay(model.processor)
    changed, own = model.tokenize([text], [pictures[:1]]), model.processor
    values = own(text=[text], images=[pictures[:1]], return_tensors="pt")["pixel_values"]
    assert torch.equal(changed[0].inputs["pixel_values"], values.float())


def test_an_engine_remembers_what_it_read(tmp_path):
    engine = Engine.from_pretrained(tiny.save(tmp_path), device="cpu", picture_cache=2**20)
    first, again, other = (
        engine._tokenize("<image> w1", p, None, 2.0, False)[0] for p in (noise((30, 30)),) * 2 + (noise((30, 30), 1),)
    )
    pixels = [one.inputs["pixel_values"] for one in (first, again, other)]
    assert pixels[0] is pixels[1] and not torch.equal(pixels[0], pixels[2])
    engine.model.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    changed = engine._tokenize("<image> w1", noise((30, 30)), None, 2.0, False)[0]
    want = engine.model.processor(text=["<image>"], images=[[noise((30, 30))]], return_tensors="pt")
    assert torch.equal(changed.inputs["pixel_values"], want["pixel_values"])


@pytest.mark.parametrize("kept", [0, 2**20])
def test_an_engine_answers_alike_with_pictures_left_to_the_device(tmp_path, monkeypatch, kept):
    """Its caches know a picture that was left by its bytes and by what they are scaled to."""
    options = dict(device="cpu", picture_cache=kept, prefix_cache=kept)
    plain, left = (Engine.from_pretrained(tiny.save(tmp_path / str(i)), **options) for i in range(2))
    plain.model._quick, left.model._quick = (
        quick_processor(by_pil(e.model.processor), unscaled=e is left)[0] for e in (plain, left)
    )
    monkeypatch.setattr(left.runner, "pictures", PictureCache(left.model, kept, digests=kept > 0))
    pictures = [[noise((50, 33))], [noise((28, 28), 1), noise((50, 33))], None]
    texts = ["<image> w1 w2", "<image> w3 <image>", "w4"]
    for again in (False, True):
        want, got = (e.generate(texts, pictures, chat=False, max_new_tokens=6) for e in (plain, left))
        assert [g.token_ids for g in got] == [w.token_ids for w in want]
        reused = [g.stats.pictures_reused for g in got]
        assert reused == [w.stats.pictures_reused for w in want] and (
            not again or sum(map(bool, reused)) == 2 * (kept > 0)
        )
    (prompt,) = left._tokenize("<image> w1", noise((30, 50)), None, 2.0, False)
    (picture,) = prompt.inputs["pixel_values"].pictures
    assert ("digest" in vars(picture)) == (kept > 0)  # taken by the caller, not by who runs the steps
    turned = left.generate("<image> w1", noise((33, 50)), chat=False, max_new_tokens=6)
    assert turned.token_ids == plain.generate("<image> w1", noise((33, 50)), chat=False, max_new_tokens=6).token_ids
    left.check_integrity()


@pytest.mark.gpu
def test_an_engine_on_a_gpu_scales_there(tmp_path):
    engine = Engine.from_pretrained(tiny.save(tmp_path), device="cuda", dtype="float32")
    own, picture = by_pil(engine.model.processor), noise((640, 480))
    model = VisionLanguageModel(engine.model.hf, own, "tiny", None)
    (prompt,) = model.tokenize(["<image> w1"], [[picture]])
    values = model._pixels([prompt.inputs["pixel_values"]]).cpu()
    want = own(text=["<image>"], images=[[picture]], return_tensors="pt")["pixel_values"]
    assert isinstance(prompt.inputs["pixel_values"], Unscaled) and torch.equal(values, want)


@pytest.mark.gpu
def test_values_on_a_gpu():
    quick, _ = quick_processor(processor(images("siglip")))
    pixels = quick(["<image>"], [[noise((50, 33))]], return_tensors="pt")["pixel_values"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = picture_values(quick.values.to("cuda", dtype), pixels.cuda())
        assert torch.equal(got.cpu(), picture_values(quick.values, pixels).to(dtype))
