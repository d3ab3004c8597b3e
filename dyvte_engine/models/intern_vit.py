"""InternViT-6B as its authors store it -> transformers' `InternVLVisionModel`, which computes the same.

Its blocks have RMS norms, RMS norms over the queries and the keys of all heads together, and layer scales. The authors
stretch the position embedding to the picture at every call; here that is done once, for the checkpoint's pictures.
"""

from __future__ import annotations

import functools
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from .strict import stored_config
from .vision_run import VisionRun

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, with which this tower was trained
_224PX = dict(  # OpenGVLab/InternViT-6B-224px
    hidden_size=3200, intermediate_size=12800, num_hidden_layers=48, num_attention_heads=25, image_size=224
)
_EPS = 1e-6
_NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}


def is_intern_vit(tower: str) -> bool:
    """Whether `mm_vision_tower` names one."""
    return "internvit6b" in tower.lower().replace("-", "").replace("_", "")


def config_for(tower: str, folder: str | Path | None) -> Any:
    """The transformers config of `mm_vision_tower`, for pictures of the side that LLaVA-type checkpoints have.

    Raises:
        ModelError: a tower that needs its `folder`, or one that `InternVLVisionModel` does not compute.
    """
    import transformers

    if folder is not None:
        given = stored_config(folder)
    elif tower.endswith("InternViT-6B-224px"):
        given = dict(_224PX)
    else:
        raise ModelError(f"mm_vision_tower is {tower!r}; give its folder as vision_tower")
    missing = _224PX.keys() - given.keys() - {"image_size"}
    if missing:
        raise ModelError(f"{folder}/config.json has no {min(missing)}")
    accepted = {"norm_type": "rms_norm", "layer_norm_eps": _EPS, "qk_normalization": True, "hidden_act": "gelu"}
    for name, value in accepted.items():
        if given.get(name, value) != value:
            raise ModelError(f"{name} of {tower} is {given[name]!r}; accepted: {value!r}")
    side, patch = 448 if "448" in tower else 336, given.get("patch_size", 14)
    return transformers.InternVLVisionConfig(
        **{name: given[name] for name in _224PX if name != "image_size"},
        image_size=[side, side],
        patch_size=[patch, patch],
        norm_type="rms_norm",
        layer_norm_eps=_EPS,
        use_qk_norm=True,
        attention_bias=given.get("qkv_bias", False),
        use_mean_pooling=True,  # that is: no norm behind the last block
    )


def renamed(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The authors' names and shapes -> those of `InternVLVisionModel`."""
    out = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[_named(name.replace(".attn.qkv.", f".attention.{part}_proj."))] = rows.clone()
        else:
            out[_named(name)] = _stretched(tensor, config) if name.endswith("position_embedding") else tensor
    return out


def _named(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _stretched(positions: Tensor, config: Any) -> Tensor:
    """[1, 1 + g * g, d], the class token's first -> for the config's grid, by bicubic interpolation in float32."""
    side, stored = config.image_size[0] // config.patch_size[0], int((positions.shape[1] - 1) ** 0.5)
    if side == stored:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def tell_states(run: VisionRun, tower: Any) -> None:
    """In this run, a LLaVA model's InternViT tower gives its blocks' states under transformers 4.

    There LLaVA asks for them by an argument that this one tower does not take; its config says the same.
    """
    if getattr(tower, "config", None) is None or tower.config.model_type != "internvl_vision":
        return
    if tower.config.output_hidden_states or "kwargs" in signature(tower.forward).parameters:
        return
    tower.config.output_hidden_states = True
    run.finally_(functools.partial(setattr, tower.config, "output_hidden_states", False))
    run.before(tower, _without_argument)


def _without_argument(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "output_hidden_states"}
