"""Joint training: packed questions are blind to each other and equal single prompts; a resumed run ends the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dyvte_engine.training.nano import scenes
from dyvte_engine.training.nano.joint import JointSettings, Source, answer_logits, layer_runner, train_joint
from dyvte_engine.training.nano.model import build_config, build_model, build_tokenizer, normalise
from dyvte_engine.training.nano.optim import MasterAdamW
from dyvte_engine.training.nano.packing import encode, pack
from dyvte_engine.training.nano.questions import Question, ask_many
from dyvte_engine.training.nano.tower import DenseTower, train_tower

ROWS = 80
PREFIX_IDS = torch.tensor([1, 4])


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return build_model(build_config(tokenizer, tiny=True), seed=0).eval()


def logits(model, tokenizer, questions: list[Question], exit_layer: int | None = None) -> torch.Tensor:
    picture = torch.full((1, 96, 96, 3), 200, dtype=torch.uint8)
    encoded = encode(tokenizer, [questions])
    packed = pack([[encoded.question(i) for i in range(len(questions))]], ROWS)
    with torch.no_grad():
        features = model.model.vision_tower(normalise(picture, torch.float32)).last_hidden_state[:, 1:]
        visual = model.model.multi_modal_projector(features)
        run = layer_runner(model.model.language_model, compile_model=False)
        return answer_logits(model, visual, PREFIX_IDS, packed, exit_layer, run)


@pytest.mark.parametrize("exit_layer", [None, 0])
def test_packed_questions_do_not_see_each_other(tiny, tokenizer, exit_layer) -> None:
    first = Question("What color is the star?", "red", "color")
    second = Question("How many stars are there?", "three", "count")
    other = Question("Is there a circle?", "no", "presence")
    third = Question("Read the word.", "STOP", "word")
    a = logits(tiny, tokenizer, [first, second, third], exit_layer)
    b = logits(tiny, tokenizer, [first, other, third], exit_layer)
    own = len(tokenizer("red</s>").input_ids)
    last = len(tokenizer("STOP</s>").input_ids)
    torch.testing.assert_close(a[:own], b[:own])
    torch.testing.assert_close(a[-last:], b[-last:])
    assert not torch.allclose(a[own:-last][:2], b[own:-last][:2])


def test_a_packed_question_equals_a_single_prompt(tiny, tokenizer) -> None:
    asked = [Question("Is there a circle?", "no", "presence"), Question("What color is the star?", "red", "color")]
    got = logits(tiny, tokenizer, asked)
    answer = tokenizer("red</s>").input_ids
    ids = tokenizer("<s><|user|>" + "<image>" * 144 + "What color is the star?<|assistant|>red</s>").input_ids
    pixels = normalise(torch.full((1, 96, 96, 3), 200, dtype=torch.uint8), torch.float32)
    tiny.model.language_model.config._attn_implementation = "eager"
    with torch.no_grad():
        expected = tiny(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -len(answer) - 1 : -1]
    torch.testing.assert_close(got[-len(answer) :], expected, rtol=1e-4, atol=1e-5)


def test_resumed_joint_training_ends_with_the_same_weights(tokenizer, tmp_path: Path) -> None:
    drawn = [scenes.sample_scene(0, "train", index) for index in range(12)]
    pictures, labels = np.stack([scenes.render(s) for s in drawn]), np.stack([scenes.patch_labels(s) for s in drawn])
    source = Source(pictures, labels, encode(tokenizer, [ask_many(s, 4) for s in drawn]))
    shape = dict(seed=0, steps=6, batch=2, lr=1e-3, device="cpu", rows=ROWS, shares=(1.0,), exit_range=(0, 0))

    def run(folder: Path, stop_at: int | None) -> dict[str, torch.Tensor]:
        class Stop(Exception):
            pass

        def on_save(step: int) -> None:
            if step == stop_at:
                raise Stop

        folder.mkdir(exist_ok=True)
        config = build_config(tokenizer, tiny=True)
        model = build_model(config, seed=0)
        dense = DenseTower(model.model.vision_tower, config.vision_config.hidden_size)
        torch.nn.init.zeros_(dense.labels.weight)
        torch.nn.init.zeros_(dense.labels.bias)
        settings = JointSettings(**shape, label_pictures=2, compile_model=False, save_every=3)
        try:
            train_joint(model, dense, [source], PREFIX_IDS, settings, folder, on_save)
        except Stop:
            return run(folder, None)
        return load_file(folder / "joint.safetensors")

    whole, resumed = run(tmp_path / "whole", None), run(tmp_path / "parts", 3)
    assert whole.keys() == resumed.keys() and int(resumed["steps_done"]) == 6
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_resumed_tower_training_ends_with_the_same_weights(tokenizer, tmp_path: Path, monkeypatch) -> None:
    drawn = [scenes.sample_scene(0, "train", index) for index in range(12)]
    pictures, labels = np.stack([scenes.render(s) for s in drawn]), np.stack([scenes.patch_labels(s) for s in drawn])
    config = build_config(tokenizer, tiny=True)
    save = MasterAdamW.save

    def run(folder: Path) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        dense = DenseTower(build_model(config, 0).model.vision_tower, config.vision_config.hidden_size)
        train_tower(dense, pictures, labels, folder, 0, 4, 2, 1e-3, "cpu", compile_model=False, save_every=2)
        return load_file(folder / "tower.safetensors")

    def save_and_stop(optimiser: MasterAdamW, path: Path) -> None:
        save(optimiser, path)
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(MasterAdamW, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.setattr(MasterAdamW, "save", save)
    resumed = run(tmp_path / "parts")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
