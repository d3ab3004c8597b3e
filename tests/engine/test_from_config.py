"""Engines made from a config alone: published sizes, random weights, no download."""

import pytest
import torch
import transformers
from PIL import Image

from dyvte_engine import Engine, FixedExit, InvalidArgumentError, ModelError
from dyvte_engine.models.presets import preset, tiles
from dyvte_engine.models.random_model import random_model
from tests import tiny

PICTURE = Image.new("RGB", (50, 40), (200, 30, 90))


def small_config(**changes):
    """A config of two dozen thousand weights with room for the byte tokenizer."""
    config = tiny.model().config
    config.text_config.update({"vocab_size": 300, **changes})
    return config


def parameters(name: str) -> tuple[int, ...]:
    """Weights of the whole model and of its decoder layers, counted without allocating any."""
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(preset(name))
    decoder = model.model.language_model.layers
    return tuple(sum(p.numel() for p in module.parameters()) for module in (model, decoder))


@pytest.mark.parametrize(
    ("name", "total", "visual"),
    [  # LLaVA-1.5 has 32,000 tokens; transformers' conversions add 64 rows to both vocabulary matrices
        ("llava-1.5-7b", 7_062_902_784 + 2 * 64 * 4096, 576),
        ("llava-1.5-13b", 13_350_839_296 + 2 * 64 * 5120, 576),
        ("llava-next-7b", 7_062_902_784 + 2 * 64 * 4096, 2880),
        ("llava-200m", None, 576),
    ],
)
def test_presets_have_the_published_sizes(name, total, visual):
    config = preset(name)
    grid = config.vision_config.image_size // config.vision_config.patch_size
    assert tiles(config) * grid**2 == visual
    counted, layers = parameters(name)
    if total is None:
        assert 1.9e8 < counted < 2.1e8
    else:
        assert counted == total
    assert layers > 0.7 * counted


def test_generates_offline_and_equals_transformers():
    engine = Engine.from_config(small_config(), seed=3, dtype="float32", device="cpu", max_len=256)
    result = engine.generate("Which color?", PICTURE, max_new_tokens=12, min_new_tokens=12)
    assert result.stats.visual_tokens == tiny.VISUAL_TOKENS
    assert result.stats.text_tokens == len("USER: \nWhich color? ASSISTANT:")  # a token for every byte
    text = "USER: <image>\nWhich color? ASSISTANT:"
    hf = random_model(small_config(), 3, torch.float32, torch.device("cpu"))
    want = tiny.hf_greedy(hf, engine.model.processor, text, [PICTURE], 12, min_new_tokens=12)
    assert result.token_ids == want


def test_seed_decides_the_weights_and_leaves_torch_alone():
    config, device = small_config(), torch.device("cpu")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    a, b, c = (random_model(config, seed, torch.float32, device).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_dtype_policy_and_unicode():
    engine = Engine.from_config(small_config(), policy=FixedExit(1), dtype="bfloat16", device="cpu", max_len=256)
    assert all(p.dtype == torch.bfloat16 for p in engine.model.hf.parameters())
    assert torch.get_default_dtype() == torch.float32
    result = engine.generate("Größe? \U0001f600", PICTURE, max_new_tokens=2, min_new_tokens=2)
    assert result.stats.exit_layer == 1
    ids = engine.model.processor.tokenizer("Größe? \U0001f600").input_ids
    assert engine.model.processor.tokenizer.decode(ids) == "Größe? \U0001f600"


def test_refusals():
    with pytest.raises(InvalidArgumentError, match="weights is 'zeros'; accepted: 'random'"):
        Engine.from_config("llava-200m", weights="zeros")
    with pytest.raises(ModelError, match=r"config 'llava-3b' is not a preset; accepted: llava-1\.5-7b"):
        Engine.from_config("llava-3b")
    with pytest.raises(ModelError, match="model_type 'llama'; accepted: llava"):
        Engine.from_config(transformers.LlamaConfig(), device="cpu")
    with pytest.raises(ModelError, match="vocab_size 100; accepted: at least 260"):
        Engine.from_config(small_config(vocab_size=100), device="cpu")
