"""The language model of a checkpoint in EAGLE's layout, fed by a vision side that stays outside."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from dyvte_engine import Engine, FixedExit, KeepAll, ModelError
from tests.families import oracle, zoo
from tests.families.test_vila import as_llava

TOWERS, CHANNELS, GRID = 5, 6, 3  # each tower gives GRID x GRID rows of CHANNELS
ROWS = GRID * GRID


def decoder():
    torch.manual_seed(8)
    return transformers.AutoModelForCausalLM.from_config(zoo.text("llama")).eval()


def vision_side() -> dict[str, torch.Tensor]:
    """Five towers of one convolution each, and the two-layer projector, as the checkpoint names them."""
    torch.manual_seed(9)
    out = {
        f"model.vision_tower.vision_towers.{i}.stem.weight": torch.randn(CHANNELS, 3, i + 2, i + 2)
        for i in range(TOWERS)
    }
    for place, width in (("0", TOWERS * CHANNELS), ("2", 64)):
        out[f"model.mm_projector.{place}.weight"] = 0.5 * torch.randn(64, width)
        out[f"model.mm_projector.{place}.bias"] = torch.randn(64)
    return out


def write(folder, llm, left_out=None, more=None, **changes):
    """Two shards with their index, and a config of Llama's with EAGLE's entries."""
    folder.mkdir()
    weights = {**llm.state_dict(), **vision_side(), **(more or {})}
    weights = {name: weight.clone().contiguous() for name, weight in weights.items() if name != left_out}
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    given = llm.config.to_dict()
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["max_position_embeddings", "rms_norm_eps", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"]
    config = {
        "model_type": "eagle_llama",
        "architectures": ["EagleLlamaForCausalLM"],
        **{name: given[name] for name in names},
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "mm_hidden_size": TOWERS * CHANNELS,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "clip-448;convnext-1024;sam-1024;pix2struct-1024;det-1024",
        "transformers_version": "4.37.2",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def features(w, pixels):
    """pixels [P, 3, h, h] -> [P, ROWS, 64]: every tower's map on one grid, channel by channel, then the projector."""
    maps = []
    for i in range(TOWERS):
        seen = F.conv2d(pixels, w[f"model.vision_tower.vision_towers.{i}.stem.weight"], stride=i + 2)
        maps.append(F.adaptive_avg_pool2d(seen, GRID).flatten(2).transpose(1, 2))
    x = torch.cat(maps, dim=-1) @ w["model.mm_projector.0.weight"].T + w["model.mm_projector.0.bias"]
    return F.gelu(x) @ w["model.mm_projector.2.weight"].T + w["model.mm_projector.2.bias"]


@torch.no_grad()
def prompt(llm, w, seed):
    """Words with one to three pictures between them -> embeds [n, 64] and visual bool [n]."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    words = lambda: llm.get_input_embeddings()(torch.tensor([rng.randrange(20, 80) for _ in range(rng.randint(1, 5))]))  # noqa: E731
    parts = [words()]
    for _ in range(rng.randint(1, 3)):
        parts += [features(w, torch.randn(1, 3, 30, 30))[0], words()]
    pictures = [torch.full((len(p),), i % 2 == 1) for i, p in enumerate(parts)]
    return torch.cat(parts), torch.cat(pictures)


def answer(engine, embeds, visual, n):
    """The loop that docs/families.md shows."""
    with engine.prefill(embeds, visual) as running:
        tokens = [int(running.logits[0].argmax())]
        while tokens[-1] != 2 and len(tokens) < n:
            tokens.append(int(running.step(tokens[-1:])[0].argmax()))
        return tokens, running.exit_layers[0]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    llm = decoder()
    folder = write(tmp_path_factory.mktemp("eagle") / "checkpoint", llm)
    return Engine.from_pretrained(folder, dtype="float32", device="cpu", max_len=128), llm


@torch.no_grad()
def test_all_tokens_is_generate(loaded):
    engine, llm = loaded
    engine.policy, w, seen = KeepAll(), vision_side(), set()
    for seed in range(50):
        embeds, visual = prompt(llm, w, seed)
        want = llm.generate(
            inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)), max_new_tokens=6, do_sample=False
        )
        assert answer(engine, embeds, visual, 6) == (want[0].tolist(), None)
        seen.add(tuple(want[0].tolist()))
    assert len(seen) > 25


@pytest.mark.parametrize("layer", range(zoo.LAYERS - 1))
def test_exit_is_masking(loaded, layer):
    engine, llm = loaded
    engine.policy, w, twin = FixedExit(layer), vision_side(), as_llava(decoder())
    prompts = [prompt(llm, w, seed) for seed in range(50)]
    for embeds, visual in prompts:
        entry = oracle.Entry(embeds, visual, torch.arange(len(embeds)), len(embeds), [])
        tokens, exit_layer = answer(engine, embeds, visual, 5)
        assert exit_layer == layer
        oracle.assert_greedy(twin, entry, tokens, oracle.fixed(layer), 5)
    together = [list(part) for part in zip(*prompts[:8])]
    with engine.prefill(*together) as running:
        alone = []
        for embeds, visual in prompts[:8]:
            with engine.prefill(embeds, visual) as one:
                alone.append(one.logits[0])
        torch.testing.assert_close(running.logits, torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_decoder_alone_is_loaded_too(tmp_path):
    llm = decoder()
    llm.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, FixedExit(1), dtype="float32", device="cpu", max_len=128)
    embeds, visual = prompt(llm, vision_side(), 3)
    entry = oracle.Entry(embeds, visual, torch.arange(len(embeds)), len(embeds), [])
    oracle.assert_greedy(as_llava(llm), entry, answer(engine, embeds, visual, 5)[0], oracle.fixed(1), 5)


def test_what_is_refused(tmp_path, loaded):
    with pytest.raises(ModelError, match=r"its vision code lives elsewhere; accepted: Engine.prefill\(inputs_embeds"):
        loaded[0].generate("a question")
    cases = {
        "missing keys model.norm.weight": dict(left_out="model.norm.weight"),
        "unexpected keys model.adapter.weight": dict(more={"model.adapter.weight": torch.ones(3)}),
        "mismatch": dict(hidden_size=32),
        "hidden_act 'gelu'": dict(hidden_act="gelu"),
    }
    for number, (words, change) in enumerate(cases.items()):
        with pytest.raises(ModelError, match=words):
            Engine.from_pretrained(write(tmp_path / str(number), decoder(), **change), dtype="float32", device="cpu")
