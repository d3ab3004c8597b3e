"""InternVL-Chat-ViT-6B-Vicuna as its authors store it, converted, answers as a plain statement of its parts."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from dyvte_engine import Engine, FixedExit, ModelError
from dyvte_engine.flops import vision_flops
from dyvte_engine.models.intern_vit import config_for
from dyvte_engine.models.original import convert
from tests.families import oracle, zoo
from tests.families.test_original import VOCABULARY, WORDS, write
from tests.families.test_vila import as_llava

WIDTH, HEADS, INNER, BLOCKS, PATCH = 32, 2, 48, 6, 56
STORED, SIDE = 224 // PATCH, 336 // PATCH  # patches on a side: as trained, and as LLaVA's pictures have
NAME = "OpenGVLab/InternViT-6B-224px"


def tower_weights() -> dict[str, torch.Tensor]:
    """As the authors name them."""
    torch.manual_seed(4)
    near_one = lambda *shape: 1 + 0.2 * torch.randn(*shape)  # noqa: E731
    out = {
        "embeddings.class_embedding": torch.randn(1, 1, WIDTH),
        "embeddings.position_embedding": torch.randn(1, 1 + STORED**2, WIDTH),
        "embeddings.patch_embedding.weight": 0.02 * torch.randn(WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": torch.randn(WIDTH),
    }
    for block in range(BLOCKS):
        parts = {
            "attn.qkv.weight": 0.4 * torch.randn(3 * WIDTH, WIDTH),
            "attn.q_norm.weight": near_one(WIDTH),
            "attn.k_norm.weight": near_one(WIDTH),
            "attn.proj.weight": 0.4 * torch.randn(WIDTH, WIDTH),
            "attn.proj.bias": torch.randn(WIDTH),
            "mlp.fc1.weight": 0.4 * torch.randn(INNER, WIDTH),
            "mlp.fc1.bias": torch.randn(INNER),
            "mlp.fc2.weight": 0.4 * torch.randn(WIDTH, INNER),
            "mlp.fc2.bias": torch.randn(WIDTH),
            "norm1.weight": near_one(WIDTH),
            "norm2.weight": near_one(WIDTH),
            "ls1": torch.randn(WIDTH),
            "ls2": torch.randn(WIDTH),
        }
        out |= {f"encoder.layers.{block}.{name}": weight for name, weight in parts.items()}
    return out


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def tower(w, pixels, blocks):
    """pixels [P, 3, 336, 336] -> [P, 37, d] leaving the first `blocks` blocks, head by head, in float64."""
    w = {name: weight.double() for name, weight in w.items()}
    cells = pixels.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [P, 3, row, column, PATCH, PATCH]
    cells = cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = cells @ w["embeddings.patch_embedding.weight"].flatten(1).T + w["embeddings.patch_embedding.bias"]
    x = torch.cat((w["embeddings.class_embedding"].expand(len(x), -1, -1), x), dim=1)
    grid = w["embeddings.position_embedding"][0, 1:].view(STORED, STORED, WIDTH)
    wide = F.interpolate(grid.permute(2, 0, 1)[None].float(), (SIDE, SIDE), mode="bicubic")[0]
    x = x + torch.cat((w["embeddings.position_embedding"][0, :1], wide.flatten(1).T.double()))
    for block in range(blocks):
        p = {n.split(".", 3)[3]: t for n, t in w.items() if n.startswith(f"encoder.layers.{block}.")}
        q, k, v = (rms(x, p["norm1.weight"]) @ p["attn.qkv.weight"].T).split(WIDTH, dim=-1)
        q, k, size = rms(q, p["attn.q_norm.weight"]), rms(k, p["attn.k_norm.weight"]), WIDTH // HEADS
        heads = [slice(h * size, (h + 1) * size) for h in range(HEADS)]
        seen = [(q[..., h] @ k[..., h].transpose(1, 2) / size**0.5).softmax(-1) @ v[..., h] for h in heads]
        x = x + (torch.cat(seen, -1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]) * p["ls1"]
        inner = F.gelu(rms(x, p["norm2.weight"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        x = x + (inner @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]) * p["ls2"]
    return x


def write_folder(folder, llm, weights, **changes):
    """The tower's own folder, which tells its sizes, and the checkpoint that holds its weights."""
    sizes = dict(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS, num_attention_heads=HEADS)
    config = dict(model_type="intern_vit_6b", image_size=224, patch_size=PATCH, qkv_bias=False, qk_normalization=True)
    own = folder / "InternViT-6B-224px"
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps({**sizes, **config, **changes.pop("tower", {})}))
    holder = type("Holder", (), {"config": llm.config})()
    options = dict(mm_vision_tower=NAME, mm_vision_select_layer=-4, mm_hidden_size=WIDTH)
    return write(folder / "source", holder, weights, **{**options, **changes}), own


def checkpoint():
    """The decoder, the tower's weights, the projector's, and all of them as the checkpoint names them."""
    torch.manual_seed(6)
    llm = transformers.AutoModelForCausalLM.from_config(zoo.text("llama", vocab_size=VOCABULARY)).eval()
    vision = tower_weights()
    projector = {"0.weight": torch.randn(64, WIDTH), "0.bias": torch.randn(64), "2.weight": 0.3 * torch.randn(64, 64)}
    projector["2.bias"] = torch.randn(64)
    weights = {name: weight.clone() for name, weight in llm.state_dict().items()}
    weights |= {f"model.vision_tower.vision_tower.{name}": weight for name, weight in vision.items()}
    weights |= {f"model.mm_projector.{name}": weight for name, weight in projector.items()}
    return llm, vision, projector, weights


@pytest.mark.parametrize("stored_tower", [True, False])
@torch.no_grad()
def test_conversion_keeps_the_answers(tmp_path, stored_tower):
    llm, vision, p, weights = checkpoint()
    if not stored_tower:
        weights = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
    source, own = write_folder(tmp_path, llm, weights)
    save_file(vision, own / "model.safetensors")
    convert(source, tmp_path / "out", own)
    engine = Engine.from_pretrained(tmp_path / "out", dtype="float32", device="cpu", max_len=128)
    pictures = engine.model.processor.image_processor
    assert pictures.do_pad and list(pictures.image_mean) == [0.485, 0.456, 0.406]
    rng, seen = random.Random(1), set()
    for layer in (3, 1, 0, 2):
        picture = zoo.picture(rng)
        question = f"w{rng.randrange(WORDS)} <image> w{rng.randrange(WORDS)}"
        inputs = engine.model.processor(text=[question], images=[picture], return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 336, 336)
        ids = inputs["input_ids"][0]
        visual = ids == engine.model.visual_ids[0]
        assert int(visual.sum()) == SIDE**2
        x = tower(vision, inputs["pixel_values"], BLOCKS - 3)[:, 1:]  # the fourth state from the last
        x = F.gelu(x @ p["0.weight"].T.double() + p["0.bias"]) @ p["2.weight"].T.double() + p["2.bias"]
        prepared = engine.model.prepare(engine.model.tokenize([question], [[picture]]))[0]
        torch.testing.assert_close(prepared.inputs_embeds[visual].double(), x[0], rtol=1e-3, atol=1e-3)
        embeds = llm.get_input_embeddings()(ids.masked_fill(visual, 0))
        embeds[visual] = x[0].float()
        entry = oracle.Entry(embeds, visual, torch.arange(len(ids)), len(ids), [])
        engine.policy = FixedExit(layer)
        got = engine.generate(question, picture, chat=False, max_new_tokens=6)
        assert got.token_ids == oracle.greedy(as_llava(llm), entry, oracle.fixed(layer), 6)[0]
        seen.add(tuple(got.token_ids))
    assert len(seen) > 2
    flops = BLOCKS * (8 * 37 * WIDTH**2 + 4 * 37**2 * WIDTH + 4 * 37 * WIDTH * INNER)  # one picture's 36 + 1 rows
    assert vision_flops(engine.model.hf.config.vision_config) == flops


def test_what_is_not_converted(tmp_path):
    llm, _, _, weights = checkpoint()
    first = "model.vision_tower.vision_tower."
    last = f"{first}encoder.layers.{BLOCKS - 1}.ls2"
    cases = {
        "tower: .*Missing key.*lambda_2": dict(weights={n: w for n, w in weights.items() if n != last}),
        "tower: .*Unexpected key.*norm.bias": dict(weights={**weights, f"{first}norm.bias": torch.ones(3)}),
        "qk_normalization of .* is False; accepted: True": dict(weights=weights, tower={"qk_normalization": False}),
        "norm_type of .* is 'layer_norm'": dict(weights=weights, tower={"norm_type": "layer_norm"}),
    }
    for number, (words, change) in enumerate(cases.items()):
        source, own = write_folder(tmp_path / str(number), llm, **change)
        with pytest.raises(ModelError, match=words):
            convert(source, tmp_path / "out", own)
    (tmp_path / "empty").mkdir()
    for content in (None, "{}", "[", "3"):
        if content is not None:
            (tmp_path / "empty" / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"empty/config\.json has no hidden_size"):
            config_for(NAME, tmp_path / "empty")
    with pytest.raises(ModelError, match=r"'OpenGVLab/InternViT-6B-448px-V1-0'; give its folder as vision_tower"):
        config_for("OpenGVLab/InternViT-6B-448px-V1-0", None)
    assert not (tmp_path / "out").exists()


def test_the_published_tower_needs_no_folder():
    config = config_for(NAME, None)
    with torch.device("meta"):
        model = transformers.InternVLVisionModel(config)
    stretched = (24**2 - 16**2) * 3200
    assert round((sum(w.numel() for w in model.parameters()) - stretched) / 1e6) == 5903  # as its model card says
