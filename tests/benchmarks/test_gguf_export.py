"""The files for llama.cpp, read back: tensors and settings of the checkpoint, and the same ids of a text."""

import json
import random
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import gguf_export, workload
from dyvte_engine.assets import NANO
from tests import tiny

# What llama.cpp calls them: its llama-arch.cpp and clip-impl.h.
DECODER = {
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
TOWER = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("gguf")
    gguf_export.main([str(NANO), str(target), "--weights", *gguf_export.WEIGHTS])
    return target


@pytest.fixture(scope="module")
def checkpoint():
    return {name: value.float() for name, value in load_file(NANO / "model.safetensors").items()}


def tensors(path):
    """By name, in float32; GGUF tells the shape backwards, and bfloat16 comes as bytes."""
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        data = torch.tensor(t.data)
        data = data.view(torch.bfloat16) if t.tensor_type == gguf.GGMLQuantizationType.BF16 else data
        found[t.name] = data.float().view(*map(int, t.shape[::-1]))
    return found


def settings(path):
    return {f.name: f.contents() for f in gguf.GGUFReader(path).fields.values() if not f.name.startswith("GGUF.")}


def expected(checkpoint):
    """Names in the two files for the tensors written as they are."""
    model = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm"}
    model = {there: checkpoint[f"language_model.model.{here}.weight"] for there, here in model.items()}
    for layer in range(12):
        for here, there in DECODER.items():
            value = checkpoint[f"language_model.model.layers.{layer}.{here}.weight"]
            model[f"blk.{layer}.{there}.weight"] = value
    pictures = {there: checkpoint[f"vision_tower.vision_model.{here}"] for here, there in TOWER.items()}
    for kind in ("weight", "bias"):
        for layer in range(6):
            for here, there in BLOCK.items():
                value = checkpoint[f"vision_tower.vision_model.encoder.layers.{layer}.{here}.{kind}"]
                pictures[f"v.blk.{layer}.{there}.{kind}"] = value
        pictures[f"mm.0.{kind}"] = checkpoint[f"multi_modal_projector.linear_1.{kind}"]
        pictures[f"mm.2.{kind}"] = checkpoint[f"multi_modal_projector.linear_2.{kind}"]
    return model, pictures


@pytest.mark.parametrize("weights, dtype", [("f32", None), ("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_tensors_are_the_checkpoints(folder, checkpoint, weights, dtype):
    turned = {f"blk.{layer}.attn_{x}.weight" for layer in range(12) for x in "qk"}, {"v.position_embd.weight"}
    for file, known, others in zip(("model", "mmproj"), expected(checkpoint), turned):
        found = tensors(folder / f"{file}-{weights}.gguf")
        assert found.keys() == known.keys() | others
        for name, value in known.items():
            assert torch.equal(found[name], value.to(dtype).float() if dtype and value.ndim == 2 else value), name


def test_each_patch_has_its_position_with_the_class_row_last(folder):
    """The order of llama.cpp through transformers' blocks, against transformers' own."""
    found = tensors(folder / "mmproj-f32.gguf")
    hf = LlavaForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).model
    tower = getattr(hf.vision_tower, "vision_model", hf.vision_tower)
    pixels = torch.rand(2, 3, 96, 96)
    rows = torch.nn.functional.conv2d(pixels, found["v.patch_embd.weight"], stride=8).flatten(2).mT
    rows = torch.cat([rows, found["v.class_embd"].expand(2, 1, -1)], 1) + found["v.position_embd.weight"]
    with torch.no_grad():
        rows = tower.encoder(inputs_embeds=tower.pre_layrnorm(rows)).last_hidden_state
        known = hf.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(rows, torch.cat([known[:, 1:], known[:, :1]], 1), rtol=1e-4, atol=1e-4)


def test_rotating_neighbours_gives_the_scores_of_rotating_halves(folder, checkpoint):
    """llama.cpp turns rows 2i and 2i + 1 of a head by the i-th angle, transformers rows i and i + D/2."""
    found = tensors(folder / "model-f32.gguf")
    x, angles = torch.randn(7, 256, dtype=torch.double), torch.rand(7, 32, dtype=torch.double) * 6
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [S, 1, D/2]
    theirs, ours = [], []
    for part, heads in (("q", 4), ("k", 2)):
        y = (x @ found[f"blk.3.attn_{part}.weight"].double().T).view(7, heads, 32, 2)
        theirs.append(torch.view_as_real(torch.view_as_complex(y) * turn).flatten(2).repeat_interleave(4 // heads, 1))
        weight = checkpoint[f"language_model.model.layers.3.self_attn.{part}_proj.weight"].double()
        ours.append((x @ weight.T).view(1, 7, heads, 64).repeat_interleave(4 // heads, 2))
    cos, sin = (f(torch.cat([angles, angles], 1))[None] for f in (torch.cos, torch.sin))
    q, k = apply_rotary_pos_emb(*ours, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(torch.einsum("shd,thd->hst", *theirs), torch.einsum("bshd,bthd->hst", q, k))


def test_settings_are_the_checkpoints(folder):
    config = json.loads((NANO / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert settings(folder / "mmproj-f32.gguf") == {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": text["hidden_size"],
        "clip.vision.image_size": vision["image_size"],
        "clip.vision.patch_size": vision["patch_size"],
        "clip.vision.embedding_length": vision["hidden_size"],
        "clip.vision.feed_forward_length": vision["intermediate_size"],
        "clip.vision.block_count": vision["num_hidden_layers"],
        "clip.vision.attention.head_count": vision["num_attention_heads"],
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(vision["layer_norm_eps"]),
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.25, 0.25, 0.25],
        "clip.vision.feature_layer": [6],  # after the last of 6 blocks
    }
    found = settings(folder / "model-f32.gguf")
    known = {
        "general.architecture": "llama",
        "llama.vocab_size": text["vocab_size"],
        "llama.context_length": text["max_position_embeddings"],
        "llama.embedding_length": text["hidden_size"],
        "llama.block_count": text["num_hidden_layers"],
        "llama.feed_forward_length": text["intermediate_size"],
        "llama.attention.head_count": text["num_attention_heads"],
        "llama.attention.head_count_kv": text["num_key_value_heads"],
        "llama.attention.key_length": text["head_dim"],
        "llama.attention.value_length": text["head_dim"],
        "llama.rope.dimension_count": text["head_dim"],
        "llama.rope.freq_base": text["rope_parameters"]["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(text["rms_norm_eps"]),
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (NANO / "chat_template.jinja").read_text(),
    }
    assert {name: found[name] for name in known} == known


def test_tokens_make_the_same_ids(folder):
    """What is written, split as GPT-2 does, against the checkpoint's tokenizer with its splitting at capitals."""
    found = settings(folder / "model-f32.gguf")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in found["tokenizer.ggml.merges"]]
    there = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    there.pre_tokenizer, there.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    there.add_special_tokens([t for t, k in zip(tokens, kinds) if k == gguf.TokenType.CONTROL])
    here = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    rng = random.Random(0)
    texts = ["".join(rng.choices("ABTIab cd.?3 ~'é<|user|><image></s>", k=40)) for _ in range(500)]
    texts += [f"<s><|user|><image>{text}<|assistant|>" for text in workload.questions("nano", 50)[0]]
    assert [there.encode(t).ids for t in texts] == [here.encode(t, add_special_tokens=False).ids for t in texts]
    assert there.encode("<s><|user|><image>Is it A?</s>").ids[:3] == [1, 4, 3]


@pytest.mark.parametrize(
    "part, name, value",
    [
        (None, "vision_feature_select_strategy", "full"),
        (None, "projector_hidden_act", "relu"),
        ("vision_config", "hidden_act", "relu"),
        ("text_config", "attention_bias", True),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(part, name, value):
    config = tiny.model().config
    setattr(config if part is None else getattr(config, part), name, value)
    with pytest.raises(ValueError, match=f"{name} is {value!r}; accepted: "):
        gguf_export.check(config)


def test_another_tokenizer_is_refused(tmp_path):
    tiny.save(tmp_path / "words")
    with pytest.raises(ValueError, match="byte-level BPE"):
        gguf_export.export(tmp_path / "words", tmp_path / "out")
    shutil.copytree(NANO, tmp_path / "crossing")
    path = tmp_path / "crossing/tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["merges"].append(["Ġ", "A"])  # a capital that GPT-2's splitting leaves with its space
    found["model"]["vocab"]["ĠA"] = len(found["model"]["vocab"])
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="byte-level BPE"):
        gguf_export.export(tmp_path / "crossing", tmp_path / "out")
