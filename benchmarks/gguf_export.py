"""A LLaVA checkpoint as the two files that llama.cpp reads: `model-*.gguf`, the decoder, and `mmproj-*.gguf`, the rest.

For `benchmarks.versus`. Refuses what llama.cpp does not compute: taken are a CLIP tower, a projector of two layers, a
Llama decoder and a byte-level BPE tokenizer. What remains different in llama.cpp's graph for LLaVA, files cannot mend:

- It puts the class row behind the patches, but passes on all rows but the first (its issue 25814): the language model
  gets no row of the first patch, the others one place early, and the class row at the end.
- "gelu" is the tanh approximation, read from a table of float16 values.
- A picture that is not square is padded, where transformers crops it. Resizing is Pillow's bicubic in both.

`python -m benchmarks.gguf_export CHECKPOINT TARGET --weights f32 bf16`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

WEIGHTS = ("f32", "bf16", "f16")
SUFFIXES = (".weight", ".bias")
CAPITALS = "[A-Z](?![a-z])"  # at which nano's tokenizer splits: a capital letter is alone, but before a small one


def rope(config: Any) -> dict[str, Any]:
    """Its type and theta, which transformers 4 keeps apart."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_type": "default", "rope_theta": getattr(config, "rope_theta", None)} | given


def check(config: LlavaConfig) -> None:
    """Raises ValueError for what llama.cpp's LLaVA graph would compute differently, or not at all."""
    vision, text = config.vision_config, config.text_config
    for name, value, accepted in (
        ("vision_config.model_type", vision.model_type, ("clip_vision_model",)),
        ("vision_config.hidden_act", vision.hidden_act, ("gelu", "quick_gelu")),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, ("default",)),
        ("type of vision_feature_layer", type(config.vision_feature_layer).__name__, ("int",)),
        ("projector_hidden_act", config.projector_hidden_act, ("gelu",)),
        ("multimodal_projector_bias", config.multimodal_projector_bias, (True,)),
        ("text_config.model_type", text.model_type, ("llama",)),
        ("text_config.attention_bias", text.attention_bias, (False,)),
        ("text_config.mlp_bias", text.mlp_bias, (False,)),
        ("text_config.rope_type", rope(text)["rope_type"], ("default",)),
    ):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """[heads * D, ...] for a rotation of rows i and i + D/2 as one for rows 2i and 2i + 1: llama.cpp's for Llama."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def decoder_tensors(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    config = model.config.text_config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.model.language_model.state_dict().items():
        turned = heads.get(name.split(".")[-2])
        yield names.get_name(f"model.{name}", SUFFIXES), interleaved(value, turned) if turned else value
    if not config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight


def picture_tensors(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """Of the tower and the projector, without the norm after the last block: LLaVA does not use it, llama.cpp would.

    The class row's position comes last, as the class row does there, so that every patch has its own.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, model.config.vision_config.num_hidden_layers)
    for name, value in model.model.vision_tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        if name == "embeddings.position_embedding.weight":
            value = value.roll(-1, dims=0)
        if not name.startswith("post_layernorm"):
            yield names.get_name(f"vision_tower.vision_model.{name}", SUFFIXES), value
    for name, value in model.model.multi_modal_projector.state_dict().items():
        yield name.replace("linear_1", "mm.0").replace("linear_2", "mm.2"), value


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError where llama.cpp would make other ids of a text.

    It has no splitting at `CAPITALS`. GPT-2's alone gives the same tokens if no merge crosses such a place.
    """
    found = json.loads((folder / "tokenizer.json").read_text())
    splits = found["pre_tokenizer"]
    splits = splits.get("pretokenizers", [splits])
    merges = [m.split(" ") if isinstance(m, str) else m for m in found["model"].get("merges", [])]
    if splits[0].get("pattern") == {"String": CAPITALS}:
        splits = splits if any(re.search(CAPITALS, a + b) for a, b in merges) else splits[1:]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    known = found["model"]["type"] == "BPE" and not found["normalizer"]
    if not (known and len(splits) == 1 and plain.items() <= splits[0].items()):
        raise ValueError("tokenizer.json is not one of byte-level BPE with GPT-2's splitting, all that is written")
    special = {t["content"] for t in found["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(vocab_size))
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[t in special] for t in tokens])
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def add_decoder(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_picture(writer: gguf.GGUFWriter, config: LlavaConfig, pictures: Any) -> None:
    vision, layer = config.vision_config, config.vision_feature_layer
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")
    writer.add_vision_image_mean(pictures.image_mean)
    writer.add_vision_image_std(pictures.image_std)
    # 0 is what enters the first block, as in transformers' hidden states; without it the last block is left out
    writer.add_array("clip.vision.feature_layer", [layer % (vision.num_hidden_layers + 1)])


def finish(writer: gguf.GGUFWriter, tensors: Iterator[tuple[str, Tensor]], weights: str) -> None:
    """Matrices as `weights`, all else in float32."""
    for name, value in tensors:
        kind = gguf.GGMLQuantizationType[(weights if value.ndim == 2 else "f32").upper()]
        writer.add_tensor(name, gguf.quants.quantize(value.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export(folder: Path, target: Path, weights: Sequence[str] = ("f32",)) -> None:
    """Writes `model-*.gguf` and `mmproj-*.gguf` into `target` for each type of weights."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    processor, config = AutoProcessor.from_pretrained(folder), model.config
    check(config)
    target.mkdir(parents=True, exist_ok=True)
    for kind in weights:
        writer = gguf.GGUFWriter(target / f"model-{kind}.gguf", "llama")
        add_decoder(writer, config.text_config)
        add_tokenizer(writer, folder, processor.tokenizer, config.text_config.vocab_size)
        writer.add_chat_template(processor.chat_template)
        finish(writer, decoder_tensors(model), kind)
        writer = gguf.GGUFWriter(target / f"mmproj-{kind}.gguf", "clip")
        add_picture(writer, config, processor.image_processor)
        finish(writer, picture_tensors(model), kind)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["f32"])
    args = parser.parse_args(argv)
    export(args.checkpoint, args.target, args.weights)


if __name__ == "__main__":
    main()
