"""LLaVA-1.5 in its authors' own layout -> the layout that transformers and the engine read.

The authors' `config.json` is Llama's with `mm_*` entries, the decoder is under `model.`, the projector under
`model.mm_projector`, the tower (where it is stored at all) under `model.vision_tower.vision_tower`. The tower
is CLIP's, or InternViT-6B (InternVL-Chat-ViT-6B-Vicuna), which models/intern_vit.py knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, first_line
from ..files import parse_json
from . import intern_vit
from .image_processors import pil_image_processor
from .strict import nobody_asked

_PROJECTOR, _TOWER, _DECODER, _HEAD = "model.mm_projector.", "model.vision_tower.vision_tower.", "model.", "lm_head."
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # old releases stored these too
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LINEAR = {"0": "linear_1", "2": "linear_2"}  # of the projector, an nn.Sequential
_CLIP_336 = dict(  # openai/clip-vit-large-patch14-336
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
_MULTIPLE = 64  # of rows in the embedding
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if m['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def convert(
    source: str | Path, target: str | Path, vision_tower: str | Path | None = None, unpickle: bool = False
) -> None:
    """Write the checkpoint folder `source` (LLaVA-1.5, authors' layout) to `target` as transformers stores it.

    Args:
        vision_tower: folder of the model named by `mm_vision_tower`, where the checkpoint does not hold its own.
        unpickle: also read `.bin` files, with torch's restricted unpickler (`weights_only`).

    Raises:
        ModelError: another layout, tower or projector; weights missing or left over, damaged, or of a dtype that is not
            floating; pickles without `unpickle`; files that cannot be read or written.
    """
    try:
        with nobody_asked():
            _convert(Path(source), target, vision_tower, unpickle)
    except ModelError:
        raise
    except Exception as e:  # SafetensorError, UnpicklingError, KeyError, OSError, ... depending on what is wrong
        raise ModelError(f"cannot convert {source}: {type(e).__name__}: {first_line(e)}") from e


def _convert(source: Path, target: str | Path, vision_tower: str | Path | None, unpickle: bool) -> None:
    import transformers

    config = _read_config(source)
    parts = _split(_weights(source, unpickle))
    tower = _tower_config(config, vision_tower)
    if not parts["tower"]:
        if vision_tower is None:
            given = f"{source} holds no vision tower"
            raise ModelError(f"{given}; give the folder of {config['mm_vision_tower']} as vision_tower")
        parts["tower"] = _tower_weights(Path(vision_tower), unpickle)
    if tower.model_type == "internvl_vision":
        parts["tower"] = intern_vit.renamed(parts["tower"], tower)
    processor, ids = _processor(source, config, tower)
    rows = -(-max(ids["rows"], len(parts["decoder"]["embed_tokens.weight"])) // _MULTIPLE) * _MULTIPLE
    for name, part in (("embed_tokens.weight", "decoder"), ("weight", "head")):
        parts[part][name] = _grown(parts[part][name], rows)
    known = transformers.LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    text = {k: v for k, v in config.items() if k in known} | {"vocab_size": rows}
    llava = transformers.LlavaConfig(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=ids["image"],
        vision_feature_layer=config["mm_vision_select_layer"],
        vision_feature_select_strategy="default",
        image_seq_length=(_side(tower.image_size) // _side(tower.patch_size)) ** 2,
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(llava)
    _fill(model, parts)
    model.config.dtype = parts["head"]["weight"].dtype
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=text.get("bos_token_id"), eos_token_id=text.get("eos_token_id"), pad_token_id=ids["pad"]
    )
    model.save_pretrained(target)
    processor.save_pretrained(target)


def _read_config(source: Path) -> dict[str, Any]:
    """config.json, checked to be what this file knows."""
    try:
        config: dict[str, Any] = parse_json((source / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise ModelError(f"{source}/config.json cannot be read: {e}") from e
    if "llm_cfg" in config or "mm_vision_tower" not in config:
        layout = (
            "VILA's layout, which needs no conversion"
            if "llm_cfg" in config
            else "no LLaVA layout (mm_vision_tower is missing)"
        )
        raise ModelError(f"{source} has {layout}; accepted: LLaVA-1.5 as its authors store it")
    accepted = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch",),
        "image_aspect_ratio": ("pad", "square"),
    }
    for name, values in accepted.items():
        given = config.setdefault(name, values[0])
        if given not in values:
            raise ModelError(f"{name} is {given!r}; accepted: {', '.join(values)}")
    if config.get("mm_use_im_start_end"):
        raise ModelError("mm_use_im_start_end is true; accepted: pictures without marks around them")
    return config


def _weights(folder: Path, unpickle: bool) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not files and pickles and not unpickle:
        raise ModelError(f"{pickles[0]} is pickled; accepted: safetensors, or .bin files with unpickle")
    if not files and not pickles:
        raise ModelError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")
    for file in files or pickles:
        weights = load_file(file) if files else torch.load(file, map_location="cpu", weights_only=True)
        for name, weight in weights.items():
            if weight.dtype not in _FLOATING and not name.endswith(_COMPUTED):
                raise ModelError(f"weight {name!r} of {file} is {weight.dtype}; accepted: 16 to 64 floating bits")
            yield name, weight


def _split(weights: Iterator[tuple[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The weights by the part they belong to, under the names that transformers has there."""
    parts: dict[str, dict[str, Tensor]] = {"projector": {}, "tower": {}, "decoder": {}, "head": {}}
    prefixes = {_PROJECTOR: "projector", _TOWER: "tower", _DECODER: "decoder", _HEAD: "head"}  # the longest first
    for name, tensor in weights:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            raise ModelError(f"weight {name!r} belongs to no part of LLaVA-1.5")
        inner = name.removeprefix(prefix)
        if inner.endswith(_COMPUTED):
            continue
        if prefix == _PROJECTOR:
            number, _, rest = inner.partition(".")
            inner = f"{_LINEAR.get(number, number)}.{rest}"
        parts[prefixes[prefix]][inner] = tensor
    for name, part in (("embed_tokens.weight", "decoder"), ("weight", "head")):
        if name not in parts[part]:
            raise ModelError(f"the {part} has no {name}")
    return parts


def _side(size: Any) -> int:
    """Of a square, which some configs give as two numbers."""
    return int(size if isinstance(size, int) else size[0])


def _tower_config(config: dict[str, Any], folder: str | Path | None) -> Any:
    import transformers

    if intern_vit.is_intern_vit(config["mm_vision_tower"]):
        return intern_vit.config_for(config["mm_vision_tower"], folder)
    if folder is not None:
        clip = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return getattr(clip, "vision_config", clip)
    if not config["mm_vision_tower"].endswith("clip-vit-large-patch14-336"):
        raise ModelError(f"mm_vision_tower is {config['mm_vision_tower']!r}; give its folder as vision_tower")
    return transformers.CLIPVisionConfig(**_CLIP_336)


def _tower_weights(folder: Path, unpickle: bool) -> dict[str, Tensor]:
    """Those of the vision half, of a whole CLIP model or of a vision model."""
    names = dict(_weights(folder, unpickle))
    inside = {n: t for n, t in names.items() if n.startswith("vision_model.")} or names
    return {n: t for n, t in inside.items() if not n.endswith(_COMPUTED)}


def _processor(source: Path, config: dict[str, Any], tower: Any) -> tuple[Any, dict[str, int]]:
    """The processor, and the ids of picture and padding with the rows that the vocabulary needs."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as e:
        raise ModelError(f"the tokenizer of {source} cannot be read: {first_line(e)}") from e
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True, normalized=False)])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    side = _side(tower.image_size)
    colours = (intern_vit.MEAN, intern_vit.STD) if tower.model_type == "internvl_vision" else (_CLIP_MEAN, _CLIP_STD)
    pictures = pil_image_processor("llava", "LlavaImageProcessor")(
        do_pad=config["image_aspect_ratio"] == "pad",
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=colours[0],
        image_std=colours[1],
    )
    processor = transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=_side(tower.patch_size),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    ids = {"image": tokenizer.convert_tokens_to_ids("<image>"), "pad": tokenizer.pad_token_id, "rows": len(tokenizer)}
    return processor, ids


_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def _grown(weight: Tensor, rows: int) -> Tensor:
    """New rows are the mean of the old ones: as logits they never win, and nobody looks them up."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat((weight, mean.expand(rows - len(weight), -1)))


def _fill(model: Any, parts: dict[str, dict[str, Tensor]]) -> None:
    """Put every weight in its place; raises ModelError for one that is missing, left over or of another shape."""
    inner = model.model
    places = {
        "decoder": inner.language_model,
        "projector": inner.multi_modal_projector,
        "tower": inner.vision_tower,
        "head": model.lm_head,
    }
    for part, module in places.items():
        weights = parts[part]
        if part == "tower":
            weights = _as_stored(module, weights)
        try:
            module.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as e:
            raise ModelError(f"{part}: {' '.join(str(e).split())}") from e


def _as_stored(tower: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Releases of transformers differ in whether a vision tower's names begin with `vision_model.`."""
    prefix = "vision_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    with_prefix = all(name.startswith(prefix) for name in tower.state_dict())
    return {prefix + name: tensor for name, tensor in bare.items()} if with_prefix else bare
