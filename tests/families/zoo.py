"""Random tiny models of every family, with transformers' own processors where they run without torchvision."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from PIL import Image

from tests import tiny

WORDS = 100
LAYERS = 4
SIDE, PATCH = 28, 7
ROWS = (SIDE // PATCH) ** 2
# Sides that scale to SIDE exactly: DeepseekVL's processor of transformers 4 otherwise gives squares of two sizes. And
# large enough for two rows: of a single picture with one row transformers' Mistral3 takes away a dimension too many.
SIDES = [n for n in range(15, 90) if int(n * (SIDE / n)) == SIDE]
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
TILES = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<fake>", "<global-img>", "<break>", "<end>", *TILES]
FAKE = "<fake_token_around_image>"
EXTRA = [FAKE, "<end_of_utterance>"]
VOCABULARY = WORDS + len(SPECIALS) + len(EXTRA)


@dataclass(frozen=True)
class Member:
    """A family as the tests build it: config, processor, and the mark that stands for a picture in a text."""

    config: Callable[[], Any]
    processor: Callable[[], Any]
    mark: str = "<image>"


def text(model_type: str, **options: Any) -> Any:
    return transformers.AutoConfig.for_model(model_type, **{**_TEXT, **options})


_TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=104,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.25,  # far from uniform attention, so that a missing token shows
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH)


def tower(model_type: str, **options: Any) -> Any:
    return transformers.AutoConfig.for_model(model_type, **{**_TOWER, "image_size": SIDE, **options})


def tokenizer(**named: str) -> Any:
    """Words and special tokens; `named` are what a family's processor asks its tokenizer for, as attributes."""
    built = tiny.tokenizer([*SPECIALS, *EXTRA], [f"w{i}" for i in range(WORDS)])
    for name, token in named.items():
        setattr(built, name, token)
        setattr(built, f"{name}_id", built.convert_tokens_to_ids(token))
    return built


def image_processor(module: str, name: str, **options: Any) -> Any:
    """transformers 5 keeps the image processors that need no torchvision in modules of their own."""
    folder = f"transformers.models.{module}"
    try:
        cls = getattr(importlib.import_module(f"{folder}.image_processing_pil_{module}"), f"{name}Pil")
    except ImportError:
        cls = getattr(importlib.import_module(f"{folder}.image_processing_{module}"), name)
    return cls(**options)


def without_video(name: str, **parts: Any) -> Any:
    """A processor whose video part is missing, because that needs torchvision."""
    unchecked = {"check_argument_for_proper_class": lambda self, argument, value: None}
    return type(name, (getattr(transformers, name),), unchecked)(**parts, video_processor=None)


def _clip() -> Any:
    square = {"height": SIDE, "width": SIDE}
    return transformers.CLIPImageProcessor(size=square, do_center_crop=False, crop_size=square)


def _llava_processor() -> Any:
    return transformers.LlavaProcessor(
        _clip(), tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=tower("clip_vision_model", projection_dim=32), text_config=text("llama"), image_token_index=4
    )


def _vipllava() -> Any:
    layers = (-2, -1, 1)
    new = "vision_feature_layer" in transformers.VipLlavaConfig(vision_feature_layers=layers).to_dict()
    return transformers.VipLlavaConfig(
        vision_config=tower("clip_vision_model", projection_dim=32),
        text_config=text("llama"),
        image_token_index=4,
        **{"vision_feature_layer" if new else "vision_feature_layers": layers},
    )


def _llava_next() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=tower("clip_vision_model", projection_dim=32),
        text_config=text("mistral", sliding_window=None),
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_next_processor() -> Any:
    crop = {"height": SIDE, "width": SIDE}
    options = dict(size={"shortest_edge": SIDE}, crop_size=crop, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaNextProcessor(
        image_processor("llava_next", "LlavaNextImageProcessor", **options),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=text("qwen2"),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision_processor() -> Any:
    options = dict(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    return without_video(
        "LlavaOnevisionProcessor",
        image_processor=image_processor("llava_onevision", "LlavaOnevisionImageProcessor", **options),
        tokenizer=tokenizer(),
        num_image_tokens=ROWS,
        vision_feature_select_strategy="full",
    )


def _internvl() -> Any:
    square = dict(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    return transformers.InternVLConfig(
        vision_config=tower("internvl_vision", **square), text_config=text("qwen2"), image_token_id=4
    )


def _internvl_processor() -> Any:
    options = dict(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4)
    named = dict(start_image_token="<break>", end_image_token="<end>", context_image_token="<image>")
    return without_video(
        "InternVLProcessor",
        image_processor=image_processor("got_ocr2", "GotOcr2ImageProcessor", **options),
        tokenizer=tokenizer(**named, video_token="<video>"),
        image_seq_length=4,
    )


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=tower("pixtral", image_size=2 * SIDE, head_dim=16),
        text_config=text("mistral", sliding_window=None, head_dim=16),
        image_token_index=4,
    )


class PixtralStandIn:
    """PixtralProcessor's way of writing a picture: rows of placeholders with a break after each and an end mark.

    The module of transformers' own asks for torchvision from release 5 on.
    """

    image_token = "<image>"

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        size, patch = {"longest_edge": 2 * SIDE}, {"height": 2 * PATCH, "width": 2 * PATCH}
        self.pictures = image_processor("pixtral", "PixtralImageProcessor", size=size, patch_size=patch)

    def __call__(self, text: list[str], images: Any = None, return_tensors: str = "pt", **options: Any) -> Any:
        pixels = self.pictures(images, return_tensors="pt") if images else {}
        pieces = text[0].split("<image>")
        for i, (height, width) in enumerate(pixels.get("image_sizes", [])):
            row = "<image>" * (int(width) // (2 * PATCH)) + "<break>"
            pieces[i] += (row * (int(height) // (2 * PATCH))).removesuffix("<break>") + "<end>"
        encoded = self.tokenizer(["".join(pieces)], return_tensors="pt", **options)
        return transformers.BatchFeature({**encoded, **pixels})


def _idefics3() -> Any:
    return transformers.Idefics3Config(
        vision_config=dict(_TOWER, image_size=SIDE),
        text_config=text("llama"),
        scale_factor=2,
        image_token_id=4,
        pad_token_id=0,
    )


def _idefics3_processor() -> Any:
    """SmolVLM's writes the same for pictures, but asks for torchvision and num2words because of its videos."""
    options = dict(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return transformers.Idefics3Processor(
        image_processor("idefics3", "Idefics3ImageProcessor", **options), tokenizer(), image_seq_len=4
    )


def _smolvlm() -> Any:
    return transformers.SmolVLMConfig(
        vision_config=dict(_TOWER, image_size=SIDE),
        text_config=text("llama", attention_bias=True, mlp_bias=True),
        scale_factor=2,
        image_token_id=4,
        pad_token_id=0,
    )


def _deepseek_vl() -> Any:
    return transformers.DeepseekVLConfig(
        vision_config=tower("siglip_vision_model"), text_config=text("llama"), image_token_id=4
    )


def _deepseek_vl_processor() -> Any:
    options = dict(size={"height": SIDE, "width": SIDE}, min_size=7)
    return transformers.DeepseekVLProcessor(
        image_processor("deepseek_vl", "DeepseekVLImageProcessor", **options),
        tokenizer(image_token="<image>"),
        num_image_tokens=ROWS,
    )


def _qwen_tower(**options: Any) -> dict[str, Any]:
    return dict(depth=2, num_heads=2, patch_size=PATCH, spatial_merge_size=2, **options)


def _rope(**options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **options}


def _qwen(name: str, vision: dict[str, Any], **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")
    decoder = {**_TEXT, **options, "rope_scaling": _rope(), "rope_theta": 10000.0}
    ids = dict(image_token_id=4, video_token_id=5, vision_start_token_id=8, vision_end_token_id=9)
    return config(text_config=decoder, vision_config=vision, tie_word_embeddings=False, **ids)


def _qwen_processor(name: str) -> Any:
    options = dict(patch_size=PATCH, merge_size=2, min_pixels=4 * PATCH**2, max_pixels=64 * PATCH**2)
    named = dict(image_token="<image>", video_token="<video>")
    return without_video(
        f"{name}Processor",
        image_processor=image_processor("qwen2_vl", "Qwen2VLImageProcessor", **options),
        tokenizer=tokenizer(**named, vision_start_token="<break>", vision_end_token="<end>"),
    )


_QWEN_MARK = "<break> <image> <end>"
FAMILIES: dict[str, Member] = {
    "llava": Member(_llava, _llava_processor),
    "vipllava": Member(_vipllava, _llava_processor),
    "llava_next": Member(_llava_next, _llava_next_processor),
    "llava_onevision": Member(_llava_onevision, _llava_onevision_processor),
    "internvl": Member(_internvl, _internvl_processor),
    "mistral3": Member(_mistral3, PixtralStandIn),
    "idefics3": Member(_idefics3, _idefics3_processor),
    "smolvlm": Member(_smolvlm, _idefics3_processor),
    "deepseek_vl": Member(_deepseek_vl, _deepseek_vl_processor),
    "qwen2_vl": Member(
        lambda: _qwen("Qwen2VL", _qwen_tower(embed_dim=32, hidden_size=64, mlp_ratio=2)),
        lambda: _qwen_processor("Qwen2VL"),
        _QWEN_MARK,
    ),
    "qwen2_5_vl": Member(
        lambda: _qwen(
            "Qwen2_5_VL",
            _qwen_tower(
                hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=28, fullatt_block_indexes=[1]
            ),
        ),
        lambda: _qwen_processor("Qwen2_5_VL"),
        _QWEN_MARK,
    ),
    "qwen3_vl": Member(
        lambda: _qwen(
            "Qwen3VL",
            _qwen_tower(
                hidden_size=32,
                intermediate_size=48,
                out_hidden_size=64,
                num_position_embeddings=64,
                deepstack_visual_indexes=[0, 1],
            ),
            head_dim=16,
        ),
        lambda: _qwen_processor("Qwen3VL"),
        _QWEN_MARK,
    ),
}


@cache
def processor(family: str) -> Any:
    return FAMILIES[family].processor()


def model(family: str, seed: int = 0) -> Any:
    """The tiny model, its random weights large enough for answers to depend on every picture."""
    config = FAMILIES[family].config()
    torch.manual_seed(seed)
    built = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if not any(part in name for part in ("language_model", "text_model", "lm_head")):
                torch.nn.init.normal_(weight, std=0.5)
            elif "norm" in name or "bias" in name:
                weight += 0.2 * torch.randn_like(weight)
    built.generation_config.eos_token_id, built.generation_config.pad_token_id = 2, 0
    return built


def picture(rng: random.Random) -> Image.Image:
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def prompts(family: str, seed: int, n: int, images=(0, 1, 1, 2, 3)) -> tuple[list[str], list[list[Image.Image]]]:
    """Random words with marks at random places, ending in words; and as many pictures as marks."""
    rng, mark = random.Random(seed), FAMILIES[family].mark
    texts, pictures = [], []
    for _ in range(n):
        count = rng.choice(images)
        words = [f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(2, 16))]
        for _ in range(count):
            words.insert(rng.randrange(len(words)), mark)
        texts.append(" ".join(words))
        pictures.append([picture(rng) for _ in range(count)])
    return texts, pictures


def encode(family: str, words: str, pictures: list[Image.Image]) -> Any:
    return processor(family)(text=[words], images=[pictures] if pictures else None, return_tensors="pt")


def encode_batch(family: str, texts: list[str], images: list[list[Image.Image]], side: str = "left") -> Any:
    """Several prompts as transformers takes them, padded; made of the single ones, as `encode` gives them."""
    alone = [encode(family, t, i) for t, i in zip(texts, images)]
    longest = max(e["input_ids"].shape[1] for e in alone)
    batch = {}
    for name in {n: None for e in alone for n in e}:
        parts = [torch.as_tensor(e[name]) for e in alone if name in e]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            pads = [longest - p.shape[1] for p in parts]
            sides = [(pad, 0) if side == "left" else (0, pad) for pad in pads]
            batch[name] = torch.cat([torch.nn.functional.pad(p, s) for p, s in zip(parts, sides)])
        else:
            batch[name] = torch.cat([_filled(p, parts) for p in parts])
    return batch


def _filled(part: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """Filled up with zeros behind, in all dimensions but the first, to the largest of `parts`."""
    out = part.new_zeros(len(part), *(max(p.shape[d] for p in parts) for d in range(1, part.dim())))
    out[tuple(slice(n) for n in part.shape)] = part
    return out
