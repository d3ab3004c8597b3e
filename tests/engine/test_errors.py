"""Bad input gets a typed error that names what is wrong, before anything is computed or half-written."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dyvte_engine import (
    DeviceError,
    DynamicExit,
    DyvteError,
    Engine,
    ExitHeadConfig,
    ExitHeads,
    FastV,
    FixedExit,
    HeadsError,
    ImageError,
    InvalidArgumentError,
    KeepAll,
    ModelError,
    PromptError,
    policies,
)
from dyvte_engine.heads.rule import ExitRule
from dyvte_engine.inputs.images import load_video
from tests import tiny
from tests.engine.conftest import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def engine(tiny_engine):
    tiny_engine[0].policy = KeepAll()
    yield tiny_engine[0]
    assert tiny_engine[0].pool.bytes_held == 0


def test_a_checkpoint_loads_and_answers(checkpoint, engine):
    loaded = Engine.from_pretrained(checkpoint, dtype="float32", max_len=128)
    picture = tiny.picture(random.Random(0))
    answers = [e.generate("w1 w2", picture, max_new_tokens=12).token_ids for e in (loaded, engine)]
    assert answers[0] == answers[1]
    assert loaded.model.fingerprint == engine.model.fingerprint


def test_images(engine, tmp_path):
    picture = tmp_path / "a.png"
    tiny.picture(random.Random(0)).save(picture)
    cases = {
        "not found": tmp_path / "none.png",
        "not a readable picture": tmp_path / "text.png",
        "cannot be decoded": tmp_path / "short.png",
        "900000000 pixels|30000 x 30000": tmp_path / "huge.png",
        "accepted: a path or a PIL image": 17,
    }
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole)
    (tmp_path / "short.png").write_bytes(whole.read_bytes()[:2000])
    Image.new("1", (30000, 30000)).save(tmp_path / "huge.png")
    for words, source in cases.items():
        with pytest.raises(ImageError, match=words):
            engine.generate("w1", source)
    assert engine.generate("w1", str(picture)).token_ids


def test_marks_and_pictures_must_agree(engine):
    picture = tiny.picture(random.Random(0))
    for text, images in [("<image> <image> w1", [picture]), ("<image> w1", [picture, picture]), ("<image> w1", None)]:
        for chat in (True, False):
            with pytest.raises(PromptError, match="marks for"):
                engine.generate(text, images, chat=chat)
    with pytest.raises(PromptError, match="marks for"):
        engine.generate("w1", picture, chat=False)
    with pytest.raises(InvalidArgumentError, match="images must be a list"):
        engine.generate(["w1", "w2"], [picture])
    for odd in ({}, {"role": "user", "content": "w1"}, [3, 4], [[]], (p for p in ["w1"]), None, b"w1", [["w1"]]):
        with pytest.raises(InvalidArgumentError, match="prompts"):
            engine.generate(odd)
    assert engine.generate([]) == []
    with pytest.raises(PromptError, match="empty prompt"):
        engine.generate("", chat=False)


def test_prompts_that_do_not_fit(engine):
    with pytest.raises(PromptError, match="max_len 256"):
        engine.generate("w1 " * 300, chat=False)
    with pytest.raises(PromptError, match="max_new_tokens is 250"):
        engine.generate("w1 " * 20, chat=False, max_new_tokens=250)
    fits = engine.generate("w1 " * 255, chat=False)
    assert fits.stats.new_tokens == 1


def test_damaged_checkpoints(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="cannot load"):
        Engine.from_pretrained(tmp_path / "nothing-here")
    weights = load_file(f"{checkpoint}/model.safetensors")

    def copy(name):
        (tmp_path / name).mkdir()
        for file in (
            "config.json",
            "generation_config.json",
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "preprocessor_config.json",
        ):
            source = f"{checkpoint}/{file}"
            try:
                (tmp_path / name / file).write_bytes(Path(source).read_bytes())
            except FileNotFoundError:
                continue
        return tmp_path / name

    broken = dict(weights)
    name = next(n for n in weights if n.endswith("layers.1.mlp.up_proj.weight"))
    broken[name] = weights[name].clone().index_fill_(0, torch.tensor(3), float("nan"))
    save_file(broken, copy("nan") / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight' holds NaN"):
        Engine.from_pretrained(tmp_path / "nan")

    data = Path(f"{checkpoint}/model.safetensors").read_bytes()
    (copy("short") / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"model.safetensors is no readable safetensors file"):
        Engine.from_pretrained(tmp_path / "short")

    torch.save(weights, copy("pickle") / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        Engine.from_pretrained(tmp_path / "pickle")

    other = copy("family")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "blip-2"}))
    with pytest.raises(ModelError, match=r"'blip-2'.*accepted: llava"):
        Engine.from_pretrained(other)


def test_devices_and_dtypes(checkpoint):
    for options, words in [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "toaster"}, "toaster"),
        ({"device": "meta"}, "not supported"),
        ({"dtype": "float8"}, "float8"),
        ({"dtype": torch.int8}, "int8"),
        ({"device": "cpu", "attn_backend": "flash_attn"}, "CUDA devices only"),
        ({"attn_backend": "magic"}, "magic"),
    ]:
        with pytest.raises(DeviceError, match=words):
            Engine.from_pretrained(checkpoint, **options)
    for options in ({"max_batch": 0}, {"page_size": 0}, {"max_len": -1}):
        with pytest.raises(InvalidArgumentError, match=next(iter(options))):
            Engine.from_pretrained(checkpoint, **options)
    with pytest.raises(ModelError, match="max_len is 513"):
        Engine.from_pretrained(checkpoint, max_len=513)


def test_heads(engine, tmp_path):
    with pytest.raises(HeadsError, match="not found"):
        DynamicExit.from_file(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 50)
    with pytest.raises(HeadsError, match="not a readable"):
        DynamicExit.from_file(tmp_path / "junk.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(HeadsError, match="not a readable"):
        DynamicExit.from_file(tmp_path / "other.safetensors")
    heads = ExitHeads(ExitHeadConfig(64, 4, 16), seed=0)
    heads.w1.data[2, 3, 4] = float("nan")
    heads.save(tmp_path / "nan.safetensors")
    with pytest.raises(HeadsError, match="NaN"):
        DynamicExit.from_file(tmp_path / "nan.safetensors")
    for dtype in (torch.int32, torch.float8_e4m3fn, torch.float64):
        rewrite_heads(tmp_path / "h.safetensors", weights=lambda w, dtype=dtype: w.to(dtype))
        with pytest.raises(HeadsError, match=rf"h.safetensors: weights are {dtype}; accepted: one of torch.float32"):
            DynamicExit.from_file(tmp_path / "h.safetensors")
    for shape in ((32, 4), (64, 5)):
        with pytest.raises(HeadsError, match="heads are for hidden_size"):
            engine.policy = DynamicExit(ExitHeads(ExitHeadConfig(*shape, 16), seed=0))
    assert isinstance(engine.policy, KeepAll), "a refused policy must not replace the old one"


def rewrite_heads(path, header=None, weights=lambda w: w) -> None:
    """Sound heads for the tiny model, then other metadata or weights in their file."""
    ExitHeads(ExitHeadConfig(64, 4, 16), seed=0).save(path, threshold=0.5)
    with safe_open(path, "pt") as f:
        found = json.loads(f.metadata()["dyvte_exit_heads"])
        tensors = {name: weights(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, path, metadata={"dyvte_exit_heads": json.dumps(found if header is None else header(found))})


@pytest.mark.parametrize(
    "header",
    [
        lambda h: [h],
        lambda h: "text",
        lambda h: {},
        lambda h: h | {"config": None},
        lambda h: h | {"config": h["config"] | {"hidden_size": "64"}},
        lambda h: h | {"config": h["config"] | {"num_layers": -4}},
        lambda h: h | {"config": h["config"] | {"num_layers": 10**15}},
        lambda h: h | {"config": h["config"] | {"head_hidden": 17}},
        lambda h: h | {"config": h["config"] | {"states": ["mean_txt"]}},
        lambda h: h | {"config": h["config"] | {"states": 3}},
        lambda h: h | {"config": h["config"] | {"rms_eps": float("nan")}},
        lambda h: h | {"config": h["config"] | {"new": 1}},
        lambda h: h | {"threshold": "high"},
        lambda h: h | {"threshold": float("nan")},
        lambda h: h | {"threshold": [0.5, 0.5]},
        lambda h: h | {"calibration": {"samples": 3}},
        lambda h: h | {"calibration": "none"},
        lambda h: h | {"calibration": [1]},
    ],
)
def test_heads_with_damaged_metadata(tmp_path, header):
    rewrite_heads(tmp_path / "h.safetensors", header)
    with pytest.raises(HeadsError, match=r"h.safetensors is not a readable exit-heads file"):
        DynamicExit.from_file(tmp_path / "h.safetensors")


def test_heads_of_another_model_run_with_a_warning(engine, tmp_path):
    heads = ExitHeads(ExitHeadConfig(64, 4, 16), seed=0)
    heads.save(tmp_path / "h.safetensors", model_fingerprint="0123", model_name="another/model", threshold=0.25)
    loaded = DynamicExit.from_file(tmp_path / "h.safetensors")
    assert loaded.threshold == 0.25
    with pytest.warns(UserWarning, match=r"another/model.*tiny-llama-gqa"):
        engine.policy = loaded
    heads.save(tmp_path / "own.safetensors", model_fingerprint=engine.model.fingerprint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.policy = DynamicExit.from_file(tmp_path / "own.safetensors", 0.9)


def test_policies(engine):
    for bad in (FixedExit(4), FixedExit(-2), FastV(4, 0.5)):
        with pytest.raises(InvalidArgumentError, match="accepted"):
            engine.policy = bad
    for bad in ("keep-all:3", "fixed", "fixed:x", "fastv:2,0.5,1", "dynamic", "fastv:0", "fastv:2,1.5", "nonsense", ""):
        with pytest.raises(DyvteError, match="accepted"):
            policies.parse(bad)
    with pytest.raises(InvalidArgumentError, match="policy is a int"):
        engine.policy = 2
    assert policies.parse("fastv:3,0.25") == FastV(3, 0.25)
    parsed = policies.parse("fastv:2+fixed:1")
    assert parsed.parts == (FastV(2, 0.5), FixedExit(1))


def test_the_lower_entry_checks_its_arguments(engine):
    x, mask = torch.randn(5, 64), torch.zeros(5, dtype=torch.bool)
    for args, name in [
        ((x[:, :63], mask), "inputs_embeds"),
        ((x[:0], mask[:0]), "inputs_embeds"),
        ((x.long(), mask), "inputs_embeds"),
        ((x, mask[:4]), "visual_mask"),
        ((x, mask.int()), "visual_mask"),
        ((x, mask, torch.arange(4)), "position_ids"),
        ((x, mask, torch.tensor([0, 1, 1, 2, 3])), "position_ids"),
        ((x, mask, torch.arange(252, 257)), "position_ids"),
        *[((x, mask, torch.arange(5).to(t)), "position_ids") for t in (torch.complex64, torch.float16, torch.bool)],
        *[((x, mask, torch.arange(5, 0, -1).to(t)), "ascend") for t in (torch.uint8, torch.int8, torch.int64)],
        (([x] * 9, [mask] * 9), "max_batch"),
        (([x], [mask] * 2), "visual_mask"),
    ]:
        with pytest.raises(InvalidArgumentError, match=name):
            engine.prefill(*args)


def test_odd_values_are_named():
    """Found by fuzzing: arrays where names are expected, tensors without numbers, heads that are none."""
    for name in ("attn_backend", "pack_weights", "dtype"):
        with pytest.raises(DyvteError, match=name):
            Engine.from_pretrained("nano", **{name: np.empty((0, 3))})
    with pytest.raises(ImageError, match="without numbers"):
        load_video(torch.empty(2, 8, 8, 3, dtype=torch.uint8, device="meta"))
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.bool):
        with pytest.raises(ImageError, match=rf"an array {dtype} \[2, 8, 8, 3\]; accepted: uint8"):
            load_video(torch.zeros(2, 8, 8, 3, dtype=torch.uint8).to(dtype))
    with pytest.raises(InvalidArgumentError, match="ExitHeads"):
        DynamicExit([None])
    with pytest.raises(InvalidArgumentError, match="drop_early_kv"):
        Engine.from_pretrained("nano", drop_early_kv=torch.zeros(2))
    with pytest.raises(HeadsError, match="memory"):
        ExitHeads(ExitHeadConfig(2**40, 3, 2**20))
    with pytest.raises(InvalidArgumentError, match="pooled"):
        ExitHeads(ExitHeadConfig(4, 3, 2, ("mean_text",)))(torch.zeros(2, 8), 0)
    for keep in (print, "3", 1.5, True, -1):
        with pytest.raises(InvalidArgumentError, match="keep is"):
            DynamicExit(ExitHeads(ExitHeadConfig(8, 3, 4)), keep=keep)
    engine, _ = build()
    with engine.prefill(torch.randn(5, 64), torch.zeros(5, dtype=torch.bool)) as running:
        for nobody in ("", b"", b"\0", bytearray(1), memoryview(b"\0"), [True], [0.0], {0}):
            with pytest.raises(InvalidArgumentError, match="keep is"):
                running.select(nobody)
            with pytest.raises(InvalidArgumentError, match="tokens is"):
                running.step(nobody)
        running.step([np.int64(5)])
    never = ExitRule(0.5, hysteresis=2**31).first_exits(torch.ones(3, 4))
    assert never.tolist() == [3, 3, 3]


@pytest.mark.parametrize("make", [Engine.from_pretrained, Engine.from_config])
def test_a_mistyped_option_is_an_error(make):
    with pytest.raises(InvalidArgumentError, match=r"max_bacth is no option of an engine; accepted: .*max_batch"):
        make("llava-200m", max_bacth=4)
