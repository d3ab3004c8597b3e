"""A folder written in VILA-1.5's layout loads whole, and answers as its parts put together by hand."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dyvte_engine import Engine, FixedExit, ModelError, VisionZip
from tests.families import oracle, zoo
from tests.families.test_original import WORDS, write_tokenizer

SIDE = 35  # 5 x 5 patches: an odd grid


def join_patches(x):
    """[P, 25, C] -> [P, 9, 4 C], in loops: column by column, each cell row by row, zeros outside."""
    out = []
    for picture in x:
        at = lambda r, c, p=picture: p[5 * r + c] if r < 5 and c < 5 else torch.zeros(x.shape[2])  # noqa: E731
        cells = [(r, c) for c in (0, 2, 4) for r in (0, 2, 4)]
        out.append(torch.stack([torch.cat([at(r + i, c + j) for i in (0, 1) for j in (0, 1)]) for r, c in cells]))
    return torch.stack(out)


def write(folder, **changes):
    """The three parts and their folder."""
    torch.manual_seed(5)
    llm = transformers.AutoModelForCausalLM.from_config(zoo.text("llama", vocab_size=WORDS + 3)).eval()
    tower = transformers.AutoModel.from_config(
        zoo.tower("siglip_vision_model", image_size=SIDE, vision_use_head=False)
    ).eval()
    torch.nn.init.normal_(tower.get_input_embeddings().weight, std=0.5)
    for weight in tower.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.5)
    llm.save_pretrained(folder / "llm")
    tower.save_pretrained(folder / "vision_tower")
    write_tokenizer(folder / "llm")
    size = {"height": SIDE, "width": SIDE}
    zoo.image_processor("siglip", "SiglipImageProcessor", size=size).save_pretrained(folder / "vision_tower")
    projector = {
        "layers.1.weight": 1 + 0.2 * torch.randn(128),
        "layers.1.bias": 0.2 * torch.randn(128),
        "layers.2.weight": 0.3 * torch.randn(64, 128),
        "layers.2.bias": torch.randn(64),
        "layers.4.weight": 0.3 * torch.randn(64, 64),
        "layers.4.bias": torch.randn(64),
    }
    (folder / "mm_projector").mkdir()
    save_file(projector, folder / "mm_projector" / "model.safetensors")
    kind = {"mm_projector_type": changes.pop("mm_projector_type", "mlp_downsample")}
    (folder / "mm_projector" / "config.json").write_text(json.dumps(kind))
    config = {"model_type": "llava_llama", "llm_cfg": {}, "vision_tower_cfg": {}, "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return llm, tower, projector


@torch.no_grad()
def test_it_loads_whole_and_answers(tmp_path):
    llm, tower, p = write(tmp_path)
    engine = Engine.from_pretrained(tmp_path, dtype="float32", device="cpu", max_len=128)
    assert not [n for n, w in engine.model.hf.named_parameters() if w.is_meta]
    rng, seen = random.Random(1), set()
    for layer in (3, 1, 0, 2):
        picture = zoo.picture(rng)
        question = f"w{rng.randrange(WORDS)} <image> w{rng.randrange(WORDS)}"
        inputs = engine.model.processor(text=[question], images=[picture], return_tensors="pt")
        ids = inputs["input_ids"][0]
        visual = ids == engine.model.visual_ids[0]
        assert int(visual.sum()) == 9
        x = join_patches(tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2])
        x = torch.nn.functional.layer_norm(x, (128,), p["layers.1.weight"], p["layers.1.bias"])
        x = torch.nn.functional.gelu(x @ p["layers.2.weight"].T + p["layers.2.bias"])
        x = x @ p["layers.4.weight"].T + p["layers.4.bias"]
        embeds = llm.get_input_embeddings()(ids.masked_fill(visual, 0))
        embeds[visual] = x[0]
        entry = oracle.Entry(embeds, visual, torch.arange(len(ids)), len(ids), [])
        engine.policy = FixedExit(layer)
        got = engine.generate(question, picture, chat=False, max_new_tokens=6).token_ids
        assert got == oracle.greedy(as_llava(llm), entry, oracle.fixed(layer), 6)[0]
        seen.add(tuple(got))
    assert len(seen) > 2
    assert engine.generate("w1", picture, max_new_tokens=1).stats.visual_tokens == 9
    with pytest.raises(ModelError, match="joins neighbouring patches"):
        engine.policy = VisionZip(5, 2)


def as_llava(llm):
    """What the oracle asks of a vision-language model, answered by the language model alone."""
    return SimpleNamespace(
        model=SimpleNamespace(language_model=llm.model),
        lm_head=llm.lm_head,
        get_input_embeddings=llm.get_input_embeddings,
        set_attn_implementation=llm.set_attn_implementation,
    )


def test_damaged_parts(tmp_path):
    write(tmp_path / "type", mm_projector_type="mlp2x_gelu")
    with pytest.raises(ModelError, match="'mlp2x_gelu'; accepted: mlp_downsample"):
        Engine.from_pretrained(tmp_path / "type")
    write(tmp_path / "tiles", image_aspect_ratio="dynamic")
    with pytest.raises(ModelError, match="'dynamic'; accepted: resize"):
        Engine.from_pretrained(tmp_path / "tiles")
    write(tmp_path / "part")
    for part, name, words in [
        ("mm_projector", "layers.2.bias", "Missing key.*layers.2.bias"),
        ("llm", "model.norm.weight", "missing keys model.norm.weight|missing keys norm.weight"),
    ]:
        file = tmp_path / "part" / part / "model.safetensors"
        whole = load_file(file)
        save_file({n: w for n, w in whole.items() if n != name}, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            Engine.from_pretrained(tmp_path / "part")
        save_file(whole, file, metadata={"format": "pt"})
