"""Checkpoint folders of every family, and clear words for those that cannot run."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save_file

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
    read = lambda name, **options: zoo.processor(family)  # noqa: E731 (some of them need torchvision to be read)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", read)
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


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"), (torch.bool, "BOOL")],
)
def test_weights_of_other_dtypes(dtype, words, tmp_path):
    """transformers casts them without a word."""
    zoo.model("llava").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = next(n for n in whole if n.endswith("layers.1.mlp.up_proj.weight"))
    save_file({**whole, name: whole[name].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"weight '{name}' of .* is {words}; accepted: F32, BF16, F16, F64"):
        Engine.from_pretrained(tmp_path)


def test_whole_numbers_that_old_releases_stored_are_no_weights(tmp_path, monkeypatch):
    zoo.model("llava").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file({**load_file(file), **old}, file, metadata={"format": "pt"})
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name, **options: zoo.processor("llava"))
    Engine.from_pretrained(tmp_path, dtype="float32", device="cpu", max_len=64)


def test_damaged_files(tmp_path):
    zoo.model("llava").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    weights = load(data)
    for damaged in (b"", data[:7], b"\xff" * 8 + data[8:], data[:8] + b"x" + data[9:], data[:-5], b"{}" * 400):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"is no readable safetensors file"):
            Engine.from_pretrained(tmp_path)
    for layout in ("tf", "mlx", ""):
        save_file(weights, file, metadata={"format": layout})
        with pytest.raises(ModelError, match=f"model.safetensors is '{layout}'; accepted: pt"):
            Engine.from_pretrained(tmp_path)
    file.write_bytes(data)
    (tmp_path / "exit_heads.safetensors").write_bytes(b"of no concern here")
    with pytest.raises(ModelError, match="processor"):
        Engine.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    file.rename(tmp_path / "shard-1.safetensors")
    for weight_map in ({"a": "shard-1.safetensors", "b": "shard-2.safetensors"}, {"a": 3}, [], None):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(ModelError, match=r"shard-2|cannot load"):
            Engine.from_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for damaged in ("", "[]", "3", "{", config.replace('"llava"', "[]"), "[" * 100_000):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ModelError):
            Engine.from_pretrained(tmp_path)


def bad(place):
    """A LLaVA model with a value that is no number in one place."""
    hf = zoo.model("llava")
    language = hf.model.language_model
    where = {
        "embed_tokens": language.embed_tokens.weight,
        "lm_head": hf.lm_head.weight,
        "inv_freq": language.rotary_emb.inv_freq,
        "position_embedding": hf.model.vision_tower.get_parameter(
            next(n for n, _ in hf.model.vision_tower.named_parameters() if "position_embedding" in n)
        ),
        "multi_modal_projector": hf.model.multi_modal_projector.linear_2.bias,
    }[place]
    where.data.view(-1)[-1] = float("nan")
    return hf


@pytest.mark.parametrize(
    "place", ["embed_tokens", "lm_head", "inv_freq", "position_embedding", "multi_modal_projector"]
)
def test_no_number_anywhere(place):
    with pytest.raises(ModelError, match=f"{place}.* holds NaN or infinity"):
        VisionLanguageModel(bad(place), zoo.processor("llava"), "checkpoint", 64)


def test_weights_without_values():
    hf = zoo.model("llava")
    hf.model.language_model.layers[1].to("meta")
    with pytest.raises(ModelError, match=r"layers.1.*is on the meta device: no value was loaded"):
        VisionLanguageModel(hf, zoo.processor("llava"), "checkpoint", 64)


def test_names_of_no_checkpoint(tmp_path, monkeypatch):
    """One question to the hub, without retries; here nothing can be reached."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def unreachable(self, repo_id, **options):
        asked.append(repo_id)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    (tmp_path / "file").write_text("")
    for name, words in [
        ("llava-hf/lava-1.5-7b", "cannot load llava-hf/lava-1.5-7b: there is no such folder, and the hub"),
        ("/nowhere/at/all", "cannot load /nowhere/at/all: there is no such folder"),
        (tmp_path / "file", "there is no such folder"),
        ("", "there is no such folder"),
        ("a\0b", r"'a\\x00b'"),
        ("x" * 5000, "of 5,000 characters"),
    ]:
        with pytest.raises(ModelError, match=words) as raised:
            Engine.from_pretrained(name)
        assert "accepted: a folder" in str(raised.value) and len(str(raised.value)) < 700
    assert asked == ["llava-hf/lava-1.5-7b"]


def test_a_hub_name_is_its_folder_in_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "0" * 40
    folder = tmp_path / "models--somebody--llava" / "snapshots" / commit
    (folder.parent.parent / "refs").mkdir(parents=True)
    (folder.parent.parent / "refs" / "main").write_text(commit)
    hf = zoo.model("llava")
    hf.save_pretrained(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name, **options: zoo.processor("llava"))
    engine = Engine.from_pretrained("somebody/llava", dtype="float32", device="cpu", max_len=64)
    assert engine.model.name == "somebody/llava"
    assert torch.equal(engine.model.hf.lm_head.weight, hf.lm_head.weight)


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
