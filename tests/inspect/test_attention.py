"""Where the text looks: against transformers' eager attention maps, and against patches that were painted over."""

import re
from functools import partial

import pytest
import torch
import transformers
from PIL import Image

from dyvte_engine import NANO, Engine, EngineConfig, KeepAll
from dyvte_engine.inspect.attention import AttentionWatch, as_seen, grid_of
from dyvte_engine.inspect.run import read_picture
from dyvte_engine.models import VisionLanguageModel
from tests import tiny
from tests.engine.conftest import build
from tests.families import zoo

from .conftest import PICTURE, QUESTION

CLOSE = dict(rtol=2e-4, atol=2e-6)


def eager(hf, inputs, visual_id):
    """[L, n_visual]: the mean over heads and the rows behind the picture, from whole maps."""
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        maps = hf(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"][0] == visual_id
    tail = int(visual.nonzero()[-1]) + 1
    return torch.stack([m[0].double().mean(0)[tail:].mean(0)[visual] for m in maps]).float()


@pytest.mark.parametrize("decoder", ["llama-gqa", "qwen3"])
def test_it_is_that_of_transformers(decoder):
    engine, hf = build(decoder)
    texts, images = tiny.prompts(seed=5, n=3, images=(1, 2))
    for text, pictures in zip(texts, images):
        watch = AttentionWatch(engine.model.decoder.scale)
        engine.prefill_prepared(engine.prepare([text], [pictures], chat=False), KeepAll(), watch).close()
        inputs = engine.model.processor(text=[text], images=pictures, return_tensors="pt")
        torch.testing.assert_close(torch.tensor(watch.table), eager(hf, inputs, 4), **CLOSE)


def test_the_look_at_nano_has_it_too(inspector):
    look = inspector.look(QUESTION, read_picture(PICTURE), inspector.policy("auto"))
    hf = transformers.AutoModelForImageTextToText.from_pretrained(NANO, dtype=torch.float32).eval()
    processor = inspector.engine.model.processor
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[read_picture(PICTURE)], return_tensors="pt", add_special_tokens=False)
    want = eager(hf, inputs, hf.config.image_token_id)
    assert inputs["input_ids"][0].tolist() == inspector.engine.tokenize(QUESTION, PICTURE)[0]
    torch.testing.assert_close(torch.tensor(look.attention), want, **CLOSE)


GRIDS = {
    "llava": 28,
    "vipllava": 28,
    "deepseek_vl": 28,
    "mistral3": 84,
    "qwen2_vl": 84,
    "qwen2_5_vl": 84,
    "qwen3_vl": 84,
}


def without_mixing(family):
    """A model whose tower carries nothing from patch to patch."""
    hf = zoo.model(family)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "vi" in name and re.search(r"(out_proj|o_proj|attn\.proj)\.(weight|bias)", name):
                weight.zero_()
    return hf


@pytest.fixture(autouse=True)
def pixtral_by_itself(monkeypatch):
    """What Mistral 3's processor has and its stand-in has not."""

    def image_processor(self, images, return_tensors):
        return self(text=["<image>"], images=[images], return_tensors=return_tensors)

    monkeypatch.setattr(
        zoo.PixtralStandIn, "image_processor", property(lambda self: partial(image_processor, self)), False
    )


@pytest.mark.parametrize("family", GRIDS)
def test_a_patch_that_is_painted_over_is_where_the_grid_says(family):
    config = EngineConfig(torch.device("cpu"), torch.float32, max_len=384, picture_cache=0)
    engine = Engine(VisionLanguageModel(without_mixing(family), zoo.processor(family), family, config.max_len), config)
    side, mark = GRIDS[family], zoo.FAMILIES[family].mark
    plain = Image.new("RGB", (side, side), (90, 120, 150))

    def rows(picture):
        prompt = engine.prepare([f"w1 {mark} w2 w3"], [[picture]], chat=False)[0]
        return prompt.inputs_embeds[prompt.visual], grid_of(engine.model, picture, prompt.pictures)

    before, grid = rows(plain)
    assert grid is not None and grid[0] * grid[1] == len(before) and grid[0] > 1
    down, across = side // grid[0], side // grid[1]
    for r, c in [(0, 1), (1, 0), (grid[0] - 1, grid[1] - 1)]:
        painted = plain.copy()
        painted.paste((255, 0, 0), (c * across, r * down, (c + 1) * across, (r + 1) * down))
        moved = (rows(painted)[0] - before).norm(dim=1).view(grid)
        assert divmod(int(moved.argmax()), grid[1]) == (r, c)  # scaling lets its neighbours move a little
        assert moved.flatten().topk(2).values.diff() < -0.3 * moved.max()


def test_a_family_that_cuts_pictures_into_tiles_has_no_grid():
    config = EngineConfig(torch.device("cpu"), torch.float32, max_len=384)
    model = VisionLanguageModel(zoo.model("llava_next"), zoo.processor("llava_next"), "llava_next", config.max_len)
    picture = Image.new("RGB", (56, 28), "red")
    prompt = Engine(model, config).prepare([f"w1 {zoo.FAMILIES['llava_next'].mark} w2"], [[picture]], chat=False)[0]
    assert grid_of(model, picture, prompt.pictures) is None
    assert as_seen(model, picture) is picture


def test_the_picture_is_shown_as_the_tower_gets_it(inspector):
    """nano's processor scales to 96 x 96; every colour comes back within what eight bits round."""
    model, picture = inspector.engine.model, read_picture(PICTURE)
    shown = as_seen(model, picture)
    assert shown.size == (96, 96)
    again = model.processor.image_processor(images=[shown], return_tensors="pt")["pixel_values"]
    first = model.processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(again, first, rtol=0, atol=0.02)
