"""Where pictures go among the text: transformers' own rule, counted on the host, which knows the ids.

transformers counts the placeholders on the device and waits for the number, and so for the vision tower before it; all
that the host has to do up to the first layer would come after that.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from .vision_run import VisionRun

_NAME = "get_placeholder_mask"
_ARGUMENTS = ("self", "input_ids", "inputs_embeds", "image_features")


def count_on_host(run: VisionRun, ids: Tensor, visual: Tensor, visual_id: int) -> None:
    """In this run the placeholders `visual_id` of `ids` [B, n] are not counted on the device.

    visual: bool [B, n] on the host, where they are. A method that is not transformers' own, and one that is asked about
    other ids or about features that do not fit, which it refuses, do what they did.
    """
    model: Any = run.model
    if not _is_own(model) or getattr(model.config, "image_token_id", None) != visual_id:
        return
    plain, count = model.get_placeholder_mask, int(visual.sum())

    def mask(input_ids: Any, inputs_embeds: Any, image_features: Any) -> Any:
        if input_ids is not ids or image_features.numel() != count * inputs_embeds.shape[-1]:
            return plain(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)
        return (ids == visual_id).unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

    run.replace(model, mask, _NAME)


def _is_own(model: Any) -> bool:
    """Whether the method is what transformers' file says, and nobody's patch."""
    method = getattr(type(model), _NAME, None)
    code, home = getattr(method, "__code__", None), sys.modules.get(getattr(method, "__module__", ""))
    if code is None or home is None or _NAME in vars(model):
        return False
    theirs = home.__name__.startswith("transformers.models.") and code.co_filename == home.__file__
    return theirs and code.co_varnames[: code.co_argcount] == _ARGUMENTS
