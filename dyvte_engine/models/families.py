"""The families of checkpoints: one record each, and for those that cannot run the reason why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError


@dataclass(frozen=True)
class Family:
    """What differs between families. All else is read from the live model.

    Attributes:
        model_class: the transformers class.
        inputs: what the model takes besides ids and mask, as the processor names it.
        token_inputs: those with one number for each id.
        visual_ids: names of the placeholder ids in its config, older names last; each placeholder is a visual row.
        language_model: where the decoder is in the model; empty where it is the model.
        same_rows: every picture has equally many rows; elsewhere each unbroken stretch of rows counts as a picture.
        in_tower: the tower's features reach the projector as they are, so policies may act in it.
        before_decoder: policies may take rows before the first layer (a picture is unbroken, positions have one axis).
        axes: of its positions.
        tiles: the tower sees pictures of one size, `pixel_values` [..., C, H, W]; else pictures of any size.
        videos: its processor takes them; with pictures in the same prompt, or alone.
        one_mask: rows of pictures take the places of one id, which `get_placeholder_mask` looks for and counts.
    """

    model_class: str
    inputs: tuple[str, ...] = ("pixel_values",)
    token_inputs: tuple[str, ...] = ()
    visual_ids: tuple[tuple[str, ...], ...] = (("image_token_id", "image_token_index"),)
    language_model: str = "language_model"
    same_rows: bool = False
    in_tower: bool = False
    before_decoder: bool = True
    axes: int = 1
    tiles: bool = True
    videos: Literal["", "with pictures", "alone"] = ""
    one_mask: bool = False


_IMAGE_AND_VIDEO = (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index"))
_MASKED_TILES = ("pixel_values", "pixel_attention_mask")


def _qwen(model_class: str, *more: str) -> Family:
    """Pictures and videos of any size, positions of time, height and width."""
    return Family(
        model_class,
        ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", *more),
        ("mm_token_type_ids",),
        visual_ids=_IMAGE_AND_VIDEO,
        before_decoder=False,
        axes=3,
        tiles=False,
        videos="with pictures",
    )


FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", same_rows=True, in_tower=True, one_mask=True),
    "vipllava": Family("VipLlavaForConditionalGeneration", same_rows=True, one_mask=True),
    "llava_next": Family("LlavaNextForConditionalGeneration", ("pixel_values", "image_sizes"), one_mask=True),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos"),
        visual_ids=_IMAGE_AND_VIDEO,
        videos="with pictures",
    ),
    "internvl": Family("InternVLForConditionalGeneration", videos="with pictures", one_mask=True),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        ("pixel_values", "image_sizes"),
        before_decoder=False,
        tiles=False,
        one_mask=True,
    ),
    "idefics3": Family("Idefics3ForConditionalGeneration", _MASKED_TILES, language_model="text_model"),
    "smolvlm": Family("SmolVLMForConditionalGeneration", _MASKED_TILES, language_model="text_model", videos="alone"),
    "deepseek_vl": Family("DeepseekVLForConditionalGeneration", same_rows=True, one_mask=True),
    "qwen2_vl": _qwen("Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLForConditionalGeneration", "second_per_grid_ts"),
    "qwen3_vl": _qwen("Qwen3VLForConditionalGeneration"),
}

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")
DECODER_ALONE = Family("AutoModelForCausalLM", inputs=(), visual_ids=(), language_model="")

_OWN_MASKS = "its pictures attend to themselves in both directions, which the layer loop does not do"
_LINEAR = "its linear-attention state has already absorbed the picture when visual tokens would leave"
_EXPERTS = "its decoder is a mixture of experts"
REFUSED = {
    "paligemma": _OWN_MASKS,
    "gemma3": f"{_OWN_MASKS}; its layers use different rotations and windows",
    "aya_vision": "its decoder (cohere2) runs attention and MLP side by side and mixes rotated with unrotated layers",
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_vl_moe": _EXPERTS,
    "deepseek_vl_hybrid": "it merges two towers; only deepseek_vl is known",
    "mllama": "its decoder reads pictures through cross-attention: they are no rows that could leave",
}


def family_of(config: Any, name: str) -> Family:
    """The record for a transformers config. Raises ModelError, with the reason where there is a known one."""
    model_type = config.model_type
    if model_type == "llava" and config.vision_config.model_type == "pixtral":
        return replace(FAMILIES["mistral3"], model_class=FAMILIES["llava"].model_class)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    why = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
    accepted = ", ".join(FAMILIES)
    raise ModelError(f"model_type {model_type!r} of {name} is not supported{why}; accepted: {accepted}")


def visual_ids(family: Family, config: Any) -> tuple[int, ...]:
    """The placeholder ids that this config has."""
    found = (next((getattr(config, n, None) for n in names if hasattr(config, n)), None) for names in family.visual_ids)
    ids = tuple(i for i in found if i is not None)
    if not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in ids):
        raise ModelError(f"placeholder ids are {ids}; accepted: token ids")
    return ids


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along dim 0; in all others shorter ones are filled up with zeros, which is HF's padding.

    So tiles, pictures of several sizes, their masks and their sizes of several prompts become one batch.
    """
    longest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    return torch.cat([_pad(t, longest) for t in tensors])


def _pad(tensor: Tensor, longest: Sequence[int]) -> Tensor:
    missing = [n - have for n, have in zip(longest, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return F.pad(tensor, [p for m in reversed(missing) for p in (0, m)])
