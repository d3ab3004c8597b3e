"""A checkpoint's vision tower as policies see it: its blocks, where its features come from, and its projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError

_BLOCK_PARTS = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
_ATTENTION_PARTS = ("q_proj", "k_proj", "num_heads", "scale")


@dataclass(frozen=True, eq=False)
class VisionTower:
    """A ViT in HF's naming (CLIP, SigLIP and towers made like them).

    Attributes:
        blocks: its pre-norm blocks with `layer_norm1`, `self_attn`, `layer_norm2`, `mlp`.
        used: the features that reach the projector leave block `used - 1`.
        cls: rows before the patches (1 with a class token, else 0); they do not reach the projector.
        tokens: V, patches of one picture.
        projector: takes features [P, V, d_vision] of P pictures to the language model's width.
    """

    blocks: Sequence[Any]
    used: int
    cls: int
    tokens: int
    projector: nn.Module

    @classmethod
    def of(cls, hf_model: Any) -> VisionTower:
        """The tower of a LLaVA-like model. Raises ModelError when it is built in another way."""
        config, tower = hf_model.config, hf_model.model.vision_tower
        if getattr(hf_model.model.multi_modal_projector, "needs_grid", False):
            raise ModelError(
                "the projector joins neighbouring patches; policies in the tower would break up their grid"
            )
        blocks = next((m for m in tower.modules() if isinstance(m, nn.ModuleList) and _are_blocks(m)), None)
        if blocks is None:
            raise ModelError(f"the vision tower {type(tower).__name__} has no blocks with {', '.join(_BLOCK_PARTS)}")
        if not isinstance(config.vision_feature_layer, int):
            raise ModelError(f"vision_feature_layer is {config.vision_feature_layer}; accepted here: one layer")
        used = config.vision_feature_layer % (len(blocks) + 1)
        has_class = any(name.endswith("class_embedding") for name, _ in tower.named_parameters())
        if used == 0 or has_class != (config.vision_feature_select_strategy == "default"):
            given = f"layer {config.vision_feature_layer}, strategy {config.vision_feature_select_strategy!r}"
            raise ModelError(f"vision features are taken at {given}; accepted here: after a block, without class token")
        vision = config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        return cls(list(blocks), used, int(has_class), tokens, hf_model.model.multi_modal_projector)


def _are_blocks(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(
        all(hasattr(m, part) for part in _BLOCK_PARTS) and all(hasattr(m.self_attn, part) for part in _ATTENTION_PARTS)
        for m in modules
    )
