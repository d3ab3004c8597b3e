"""Cosines and sines of a live model's own rotary module, one row for each position the kernels may be given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotations(language_model: Any, positions: Tensor) -> Tensor:
    """positions [1, n], or [3, n] (time, height, width) -> f32 [n, rot_dim]: cosines, then sines of rot_dim / 2 angles.

    Asked in float32: the rows are exact and the kernel rotates in float32.
    """
    several = hasattr(language_model.rotary_emb, "mrope_section") or _sections(language_model)
    asked = positions.expand(3, -1)[:, None] if several else positions
    cos, sin = language_model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=positions.device), asked)
    half = cos.shape[-1] // 2
    if cos.dim() == 4:  # [3, 1, n, D]: transformers 4 leaves it to the layers to choose each angle's axis
        cos, sin = (_choose(t[..., :half], _sections(language_model)) for t in (cos, sin))
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).float().contiguous()


def layer_rotations(language_model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows f32 [B, n, rot_dim] as `rotations` gives them -> the cosines and sines that the model's layers take.

    [B, n, D] each, or under transformers 4 [3, B, n, D]: there the layers choose each angle's axis, here among equals.
    """
    cos, sin = (torch.cat((half, half), dim=-1) for half in rows.chunk(2, dim=-1))
    position = torch.zeros(3, 1, 1, dtype=torch.long, device=rows.device)
    if language_model.rotary_emb(rows[:1, :1], position)[0].dim() == 3:
        return cos, sin
    return cos.expand(3, *cos.shape), sin.expand(3, *sin.shape)


def _sections(language_model: Any) -> list[int]:
    """How many angles turn with each axis; empty where positions have one."""
    config = language_model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("mrope_section", [])


def _choose(angles: Tensor, sections: list[int]) -> Tensor:
    """[3, 1, n, D / 2] -> [1, n, D / 2], the first sections[0] from axis 0, the next from axis 1, and so on."""
    return torch.cat([part[i % 3] for i, part in enumerate(angles.split(sections, dim=-1))], dim=-1)
