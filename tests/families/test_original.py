"""A checkpoint written in the layout of LLaVA's authors, converted, answers as the model it was written from."""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from dyvte_engine import Engine, ModelError
from dyvte_engine.commands.main import app
from dyvte_engine.models.original import convert
from tests.families import zoo

WORDS = 90
VOCABULARY = WORDS + 3


def source_model():
    config = transformers.LlavaConfig(
        vision_config=zoo.tower("clip_vision_model", projection_dim=32),
        text_config=zoo.text("llama", vocab_size=VOCABULARY),
        image_token_index=0,
    )
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if "vision" in name or "projector" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def original_weights(model) -> dict[str, torch.Tensor]:
    """The names the authors' code gives the same weights."""
    inner, out = model.model, {"lm_head.weight": model.lm_head.weight}
    for name, weight in inner.language_model.state_dict().items():
        out[f"model.{name}"] = weight
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        for kind in ("weight", "bias"):
            out[f"model.mm_projector.{theirs}.{kind}"] = getattr(getattr(inner.multi_modal_projector, ours), kind)
    for name, weight in inner.vision_tower.state_dict().items():
        out[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = weight
    out["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    return {name: weight.detach().clone().contiguous() for name, weight in out.items()}


def write(folder, model, weights=None, pickled=False, **changes):
    folder.mkdir()
    text = model.config.get_text_config()
    config = {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        **{k: getattr(text, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")},
        **{k: getattr(text, k) for k in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")},
        "rms_norm_eps": text.rms_norm_eps,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = original_weights(model) if weights is None else weights
    if pickled:
        torch.save(weights, folder / "pytorch_model-00001-of-00001.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return write_tokenizer(folder)


def write_tokenizer(folder):
    """As the authors have it: no mark for pictures yet."""
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials: dict = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    inputs = ["input_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, **specials
    ).save_pretrained(folder)
    return folder


def write_tower(folder, model):
    """A CLIP model's folder, with its text half."""
    vision = model.config.vision_config.to_dict()
    config = transformers.CLIPConfig(vision_config=vision, text_config=dict(hidden_size=32, num_hidden_layers=1))
    config.save_pretrained(folder)
    tower = model.model.vision_tower.state_dict()
    weights = {f"vision_model.{n.removeprefix('vision_model.')}": w.clone() for n, w in tower.items()}
    save_file({**weights, "logit_scale": torch.ones(())}, folder / "model.safetensors")
    return folder


def answer(model, engine, question, picture):
    """Greedy tokens of the source model on the converted processor's inputs, with its own embeddings put together."""
    inputs = engine.model.processor(text=[question], images=[picture], return_tensors="pt")
    ids, tower = inputs["input_ids"][0], model.model.vision_tower
    image = ids == engine.model.processor.tokenizer.convert_tokens_to_ids("<image>")
    features = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    embeds = model.get_input_embeddings()(ids.masked_fill(image, 0))
    embeds[image] = model.model.multi_modal_projector(features).flatten(0, 1)
    tokens = []
    for _ in range(6):
        hidden = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state
        tokens.append(int(model.lm_head(hidden[0, -1]).argmax()))
        if tokens[-1] == 2:
            break
        embeds = torch.cat((embeds, model.get_input_embeddings()(torch.tensor(tokens[-1:]))))
    return tokens


@pytest.mark.parametrize("stored_tower", [True, False])
@torch.no_grad()
def test_conversion_keeps_the_answers(tmp_path, stored_tower):
    model = source_model()
    weights = original_weights(model)
    clip = write_tower(tmp_path / "clip", model)
    if not stored_tower:
        weights = {n: w for n, w in weights.items() if "vision_tower" not in n}
    source = write(tmp_path / "source", model, weights)
    options = ["convert", str(source), str(tmp_path / "out"), "--vision-tower", str(clip)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    engine = Engine.from_pretrained(tmp_path / "out", dtype="float32", device="cpu", max_len=128)
    text = engine.model.hf.config.get_text_config()
    assert text.vocab_size == 128 and engine.model.processor.image_processor.do_pad
    rng, seen = random.Random(1), set()
    for _ in range(6):
        picture = zoo.picture(rng)
        question = f"w{rng.randrange(WORDS)} <image> w{rng.randrange(WORDS)}"
        got = engine.generate(question, picture, chat=False, max_new_tokens=6).token_ids
        assert got == answer(model, engine, question, picture)
        seen.add(tuple(got))
    assert len(seen) > 2
    chat = engine.generate("w1 w2", picture, max_new_tokens=2)
    assert chat.stats.visual_tokens == zoo.ROWS


def test_what_is_not_converted(tmp_path):
    model = source_model()
    clip = write_tower(tmp_path / "clip", model)
    weights = original_weights(model)
    norm = "model.norm.weight"
    cases = {
        "VILA's layout": dict(llm_cfg={}),
        "mm_projector_type is 'linear'": dict(mm_projector_type="linear"),
        "image_aspect_ratio is 'anyres'": dict(image_aspect_ratio="anyres"),
        "mm_use_im_start_end": dict(mm_use_im_start_end=True),
        "is pickled; accepted: safetensors": dict(pickled=True),
        'decoder: .*Missing key.* "norm.weight"': dict(weights={n: w for n, w in weights.items() if n != norm}),
        "decoder: .*Unexpected key.*image_newline": dict(weights={**weights, "model.image_newline": torch.ones(64)}),
        "'extra.weight' belongs to no part": dict(weights={**weights, "extra.weight": torch.ones(3)}),
        "projector: .*size mismatch": dict(weights={**weights, "model.mm_projector.0.bias": torch.ones(3)}),
        "norm.weight' of .* is torch.int32; accepted": dict(weights={**weights, norm: weights[norm].int()}),
        "head has no weight": dict(weights={n: w for n, w in weights.items() if n != "lm_head.weight"}),
    }
    for number, (words, change) in enumerate(cases.items()):
        source = write(tmp_path / str(number), model, **change)
        with pytest.raises(ModelError, match=words):
            convert(source, tmp_path / "out", clip)
    for file, words in [
        ("model.safetensors", "cannot convert .*: SafetensorError"),
        ("tokenizer.json", r"the tokenizer of .* cannot be read|cannot convert"),
        ("config.json", "no LLaVA layout"),
    ]:
        damaged = write(tmp_path / f"damaged {file}", model)
        (damaged / file).write_bytes(b"[]")
        with pytest.raises(ModelError, match=words):
            convert(damaged, tmp_path / "out", clip)
    for number, stored in enumerate(([1], {norm: 3}, {3: weights[norm]})):
        source = write(tmp_path / f"pickle-{number}", model, stored, pickled=True)
        with pytest.raises(ModelError, match="cannot convert"):
            convert(source, tmp_path / "out", clip, unpickle=True)
    no_tower = {n: w for n, w in weights.items() if "vision_tower" not in n}
    with pytest.raises(ModelError, match="holds no vision tower; give the folder of openai"):
        convert(write(tmp_path / "bare", model, no_tower), tmp_path / "out")
    with pytest.raises(ModelError, match=r"mm_vision_tower is 'google/siglip.*give its folder"):
        convert(write(tmp_path / "vit", model, mm_vision_tower="google/siglip-so400m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(write(tmp_path / "bin", model, pickled=True), tmp_path / "unpickled", clip, unpickle=True)
    assert (tmp_path / "unpickled" / "model.safetensors").exists()
    for kind in ("llava", "llava_llama"):
        with pytest.raises(ModelError, match="has its authors' layout; `dyvte-engine convert` writes it"):
            Engine.from_pretrained(write(tmp_path / kind, model, model_type=kind))
