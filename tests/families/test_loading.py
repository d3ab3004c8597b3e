"""Checkpoint folders of every family, and clear words for those that cannot run."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dyvte_engine import Engine, FixedExit, ModelError, PromptError
from dyvte_engine.config import DecoderShape
from dyvte_engine.inputs.prompts import render
from dyvte_engine.models import VisionLanguageModel
from dyvte_engine.models.families import REFUSED, join
from tests.families import oracle, zoo
from tests.families.test_families import each_family


@pytest.mark.feature("from_pretrained")
@each_family
def test_a_folder_loads(family, tmp_path, monkeypatch):
    hf = zoo.model(family)
    hf.save_pretrained(tmp_path)
    load = lambda name, **options: zoo.processor(family)  # noqa: E731 (some of them need torchvision to be read)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)
    engine = Engine.from_pretrained(tmp_path, FixedExit(1), dtype="float32", device="cpu", max_len=256)
    texts, images = zoo.prompts(family, seed=100, n=2, images=(1, 2))
    got = engine.generate(texts, images, chat=False, max_new_tokens=5)
    for words, pictures, result in zip(texts, images, got):
        entry = oracle.enter(hf, zoo.encode(family, words, pictures))
        assert result.token_ids == oracle.greedy(hf, entry, oracle.fixed(1), 5)[0]
        assert result.stats.prefill_tflops < result.stats.prefill_tflops_keep_all


def test_the_names_that_published_llava_checkpoints_have(tmp_path, monkeypatch):
    """llava-hf/llava-1.5-7b-hf and -13b-hf: the decoder under `language_model.model`, CLIP under `vision_model`."""
    hf = zoo.model("llava")
    hf.save_pretrained(tmp_path)
    names = {}
    for name, weight in hf.state_dict().items():
        bare = name.removeprefix("model.")
        old = bare.replace("language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
        if old.startswith("vision_tower.") and "vision_model" not in old:
            old = old.replace("vision_tower.", "vision_tower.vision_model.")
        names[old] = weight.clone()
    save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name, **options: zoo.processor("llava"))
    loaded = Engine.from_pretrained(tmp_path, dtype="float32", device="cpu", max_len=64).model.hf.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in hf.state_dict().items())


def test_weights_that_are_missing_or_of_another_shape(tmp_path):
    hf = zoo.model("llava")
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    norm = next(name for name in whole if name.endswith("layers.1.post_attention_layernorm.weight"))
    for damaged, words in [
        ({name: weight for name, weight in whole.items() if name != norm}, "missing keys .*post_attention_layernorm"),
        ({**whole, norm: torch.ones(32)}, "mismatched keys .*post_attention_layernorm"),
    ]:
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            Engine.from_pretrained(tmp_path)


def test_a_package_that_transformers_misses(tmp_path, monkeypatch):
    def fail(name, **options):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found.\nSee ...")

    zoo.model("qwen2_vl").save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    with pytest.raises(ModelError, match="package is missing: Qwen2VLVideoProcessor requires the Torchvision"):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_cannot_run_say_why(model_type):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = transformers.AutoConfig.for_model(model_type)
    model = type("Model", (torch.nn.Module,), {"config": config})()
    with pytest.raises(ModelError) as raised:
        VisionLanguageModel(model, None, "checkpoint", None)
    assert REFUSED[model_type] in str(raised.value) and "accepted: llava" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="granite"), "'granite' is not supported"),
        (dict(model_type="cohere2"), "'cohere2' is not supported"),
        (dict(model_type="gemma2"), "'gemma2' is not supported"),
        (dict(residual_multiplier=0.22), "residual_multiplier is 0.22"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
    ],
)
def test_decoders_that_cannot_run(change, words):
    options = dict(change)
    config = zoo.text(options.pop("model_type", "llama"))
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=words):
        DecoderShape.from_hf(config)


def test_a_pixtral_tower_under_a_llava_name():
    """mistral-community/pixtral-12b: pictures of any size, broken into rows."""
    config = transformers.LlavaConfig(
        vision_config=zoo.tower("pixtral", image_size=56, head_dim=16),
        text_config=zoo.text("mistral", sliding_window=None, head_dim=16),
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = VisionLanguageModel(transformers.LlavaForConditionalGeneration(config), None, "pixtral", 128)
    assert not model.family.before_decoder and not model.family.tiles and "image_sizes" in model.family.inputs
    with pytest.raises(ModelError, match="cannot act in the vision tower"):
        _ = model.vision


class Chat:
    """A processor as `render` sees it."""

    image_token = "<|image_pad|>"
    chat_template = "any"

    def apply_chat_template(self, messages, **options):
        parts = [p for m in messages for p in m["content"]]
        return "".join(f"[{self.image_token}]" if p["type"] == "image" else p["text"] for p in parts)


def test_users_mark_pictures_alike_for_all_families():
    for question in ("a <image> b <image>", "a <|image_pad|> b <|image_pad|>"):
        assert render(question, 2, Chat()) == "a[<|image_pad|>]b[<|image_pad|>]"
    assert render("a", 1, Chat()) == "[<|image_pad|>]a"
    with pytest.raises(PromptError, match=r"1 .* marks for 2 pictures"):
        render("a <image>", 2, Chat())


def test_join_fills_up_behind():
    a, b = torch.ones(2, 1, 3), torch.ones(1, 2, 2)
    both = join([a, b])
    assert both.shape == (3, 2, 3) and both.sum() == a.sum() + b.sum()
    assert torch.equal(both[:2, :1], a) and torch.equal(both[2:, :, :2], b)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "idefics3", "mistral3", "qwen2_vl"])
def test_tower_passes_are_what_the_tower_sees(family):
    """Counted at the tower's own patch embedding; towers that take any size count as none."""
    loaded = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, 256)
    texts, images = zoo.prompts(family, seed=110, n=3, images=(2,))
    prompts = loaded.tokenize(texts, images)
    seen = []
    convolution = next(m for m in loaded.hf.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    handle = convolution.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    loaded.prepare(prompts)
    handle.remove()
    counted = sum(loaded.tower_passes(p) for p in prompts)
    assert counted == (sum(seen) if loaded.family.tiles else 0)
