"""Joint training: packed questions are blind to each other and equal single prompts; a resumed run ends the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dyvte_engine.training.nano import scenes, tower
from dyvte_engine.training.nano.joint import JointSettings, Source, draw_batch, right_answers, train_joint
from dyvte_engine.training.nano.model import build_config, build_model, build_tokenizer, normalise
from dyvte_engine.training.nano.packing import BLOCK, PREFIX, encode
from dyvte_engine.training.nano.projector import add_places
from dyvte_engine.training.nano.questions import KINDS, Question, ask_many
from dyvte_engine.training.nano.tower import DenseTower, train_tower
from dyvte_engine.training.optim import MasterAdamW, average_over_workers
from dyvte_engine.training.packing import answer_logits, layer_runner, pack

ROWS = 2 * BLOCK
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
    packed = pack([[encoded.question(i) for i in range(len(questions))]], ROWS, PREFIX, BLOCK)
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


def test_questions_stay_whole_within_their_block(tokenizer) -> None:
    asked = ask_many(scenes.sample_scene(0, "train", 3, "shapes"), 24)
    encoded = encode(tokenizer, [asked])
    packed = pack([[encoded.question(i) for i in range(len(asked))]], 4 * BLOCK, PREFIX, BLOCK)
    texts = set()
    for index, kind in enumerate(packed.kinds.tolist()):
        at = torch.nonzero((packed.owner[0] == index) & (packed.ids[0] != 0)).flatten()
        assert at[0] // BLOCK == at[-1] // BLOCK and torch.equal(at, torch.arange(at[0], at[-1] + 1))
        assert packed.positions[0, PREFIX + at].tolist() == list(range(PREFIX, PREFIX + len(at)))
        text = tokenizer.decode(packed.ids[0, at])
        (question,) = [q for q in asked if text == f"{q.text}<|assistant|>{q.answer}</s>"]
        assert KINDS[kind] == question.kind
        texts.add(text)
    assert len(texts) == len(packed.kinds) > 6


def test_right_answers_counts_whole_answers_by_kind(tokenizer) -> None:
    asked = [
        Question("Is there a circle?", "No, there is no circle.", "presence"),
        Question("Is there a star?", "no", "presence"),
        Question("Read the word.", "STOP", "word"),
    ]
    encoded = encode(tokenizer, [asked])
    packed = pack([[encoded.question(i) for i in range(3)]], ROWS, PREFIX, BLOCK)
    targets = packed.targets[packed.targets >= 0]
    logits = torch.nn.functional.one_hot(targets, len(tokenizer)).float()
    assert right_answers(logits, packed) == {"presence": 1.0, "word": 1.0}
    logits[2] = 0  # the third token of the first answer
    assert right_answers(logits, packed) == {"presence": 0.5, "word": 1.0}


def test_a_batch_shows_members_only(tokenizer) -> None:
    pictures = np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(96, 1).repeat(96, 2).repeat(3, 3)
    labels = np.zeros((8, 144, len(scenes.LABELS)), np.uint8)
    questions = encode(tokenizer, [[Question("Is there a star?", "no", "presence")]] * 8)
    sources = [Source(pictures, labels, questions, np.arange(*part)) for part in ((0, 3), (3, 8))]
    settings = JointSettings(0, 1, 4, 1e-3, "cpu", ROWS, shares=(0.0, 2.0), label_pictures=2)
    for step in range(5):
        batch = draw_batch(sources, settings, step)
        assert len(batch.pictures) == 6 and batch.pictures.min() >= 3 and len(batch.packed.ids) == 4


def test_resumed_joint_training_ends_with_the_same_weights(tokenizer, tmp_path: Path) -> None:
    drawn = [scenes.sample_scene(0, "train", index) for index in range(12)]
    pictures, labels = np.stack([scenes.render(s) for s in drawn]), np.stack([scenes.patch_labels(s) for s in drawn])
    source = Source(pictures, labels, encode(tokenizer, [ask_many(s, 4) for s in drawn]), np.arange(len(drawn)))
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


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gradients = [torch.full((2, 3), 1.0 + rank), torch.arange(4.0) * (1 - rank)]
    average_over_workers(gradients)
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()  # else its threads may abort the process at the end


def test_workers_average_their_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        first, second = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(first, torch.full((2, 3), 1.5)) and torch.equal(second, torch.arange(4.0) / 2)


def test_workers_draw_different_batches(tokenizer) -> None:
    pictures = np.arange(64, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    questions = encode(tokenizer, [[Question("Is there a star?", "no", "presence")]] * 64)
    source = Source(pictures, np.zeros((64, 144, len(scenes.LABELS)), np.uint8), questions, np.arange(64))
    shape = dict(seed=0, steps=1, batch=8, lr=1e-3, device="cpu", rows=ROWS, shares=(1.0,))
    shown = [draw_batch([source], JointSettings(**shape, worker=worker), 0).pictures for worker in (0, 0, 1)]
    assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])


def test_word_share_is_the_share_of_pictures_with_a_word(tokenizer, tmp_path: Path, monkeypatch) -> None:
    drawn = [scenes.sample_scene(0, "train", index) for index in range(40)]
    words = {np.asarray(scenes.render(s)).tobytes() for s in drawn if s.word}
    pictures, labels = np.stack([scenes.render(s) for s in drawn]), np.stack([scenes.patch_labels(s) for s in drawn])
    config = build_config(tokenizer, tiny=True)
    dense = DenseTower(build_model(config, 0).model.vision_tower, config.vision_config.hidden_size)
    shown: list[int] = []

    def count(chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        shown.append(sum(picture.numpy().tobytes() in words for picture in chosen))
        return normalise(chosen, dtype)

    monkeypatch.setattr(tower, "normalise", count)
    train_tower(dense, pictures, labels, tmp_path, 0, 3, 8, 1e-3, "cpu", compile_model=False, word_share=0.75)
    assert shown == [6, 6, 6] and 6 < len(words) < 34


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


def test_added_places_can_be_read_off_the_visual_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(60, 144, len(scenes.LABELS), dtype=torch.uint8)
    shown = torch.rand(60, 144, generator=generator) < 0.3
    place = torch.randint(1, scenes.GRID + 1, (60, 144, 2), generator=generator)
    first = scenes.LABELS.index("column")
    assert scenes.LABELS.index("row") == first + 1
    labels[..., first : first + 2] = (place * shown[..., None]).byte()
    code = torch.randn(2, 32, generator=generator)
    features = place.float() @ code + 0.1 * torch.randn(60, 144, 32, generator=generator)

    config = build_config(build_tokenizer(), tiny=True)
    projector = build_model(config, seed=0).model.multi_modal_projector.requires_grad_(False)
    basis = torch.linalg.qr(code.T).Q
    projector.linear_1.weight -= projector.linear_1.weight @ basis @ basis.T  # blind to places

    def read() -> float:
        """Share of the columns' variance that a linear fit to the first half of the pictures explains in the rest."""
        visual = projector(features).double()
        visual = torch.cat([visual, torch.ones(60, 144, 1).double()], -1)
        inputs, column = visual[:30][shown[:30]], place[..., 0].double()
        weights = torch.linalg.lstsq(inputs, column[:30][shown[:30]]).solution
        rest = column[30:][shown[30:]] - visual[30:][shown[30:]] @ weights
        return float(1 - rest.square().mean() / column.var())

    assert read() < 0.1
    add_places(projector, lambda pixels: (features[: len(pixels)], None), torch.zeros(40, 3, 96, 96), labels[:40])
    assert read() > 0.9
