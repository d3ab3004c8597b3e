"""The shipped checkpoint: complete, loads with plain transformers, and answers its own held-out examples."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dyvte_engine.assets import EXAMPLES, NANO, NANO_HEADS
from dyvte_engine.heads.exit_head import ExitHeads
from dyvte_engine.training.nano.evaluate import Item, answer, normalised, scene_items
from dyvte_engine.training.nano.questions import Question


@pytest.fixture(scope="module")
def nano():
    model = LlavaForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(NANO)


def test_size_and_shape(nano) -> None:
    model, processor = nano
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 12e6
    assert (NANO / "model.safetensors").stat().st_size < 25e6
    heads = ExitHeads.load(NANO_HEADS)
    text = model.config.text_config
    assert (
        (heads.config.num_layers, heads.config.hidden_size) == (text.num_hidden_layers, text.hidden_size) == (12, 256)
    )
    ids = processor(text="<s><|user|><image>hello<|assistant|>", images=Image.new("RGB", (30, 50)), return_tensors="pt")
    assert (ids["input_ids"] == model.config.image_token_id).sum() == 144


def test_any_text_survives_the_tokenizer(nano) -> None:
    tokenizer = nano[1].tokenizer
    for text in ("What is this?", "naïve façade, 你好 — 🙂", "tabs\tand\nlines", "<b>ZEBRA</b>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_answers_the_shipped_examples(nano) -> None:
    entries = json.loads((EXAMPLES / "examples.json").read_text())
    items = [Item(Image.open(EXAMPLES / e["file"]), Question(e["prompt"], e["reference"], ""), "") for e in entries]
    given = answer(*nano, items)
    right = [normalised(a) == normalised(e["reference"]) for a, e in zip(given, entries)]
    # the first five are of the kinds this checkpoint is good at (report.json)
    assert all(right[:5]), list(zip(given, entries))


def test_looks_at_the_picture(nano) -> None:
    items = scene_items(11, "heldout", 0, 25)
    given = answer(*nano, items)
    right = [normalised(a) == normalised(item.question.answer) for a, item in zip(given, items)]
    assert sum(right) / len(right) > 0.65  # 0.77 of 450; a blind guess gets less than half


@pytest.mark.parametrize("pictures", [0, 1, 2, 3])
def test_any_number_of_pictures_runs(nano, pictures: int) -> None:
    model, processor = nano
    images = [Image.new("RGB", (64, 64), (40 * i, 90, 200)) for i in range(pictures)]
    text = "<s><|user|>" + "<image>" * pictures + "What color is the circle?<|assistant|>"
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1
