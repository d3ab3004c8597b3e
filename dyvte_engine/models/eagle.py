"""The language model of an EAGLE checkpoint (Eagle-X4, Eagle-X5), for `Engine.prefill`.

The checkpoint is one of Llama's with `mm_*` entries. Its towers, its projector and their weights stay with EAGLE's own
code, which makes the embeddings.
"""

from __future__ import annotations

from typing import Any

import torch

from .strict import load_whole, stored_config

_VISION_SIDE = ("model.vision_tower.", "model.mm_projector.", "model.image_newline")


def is_eagle(name: str) -> bool:
    """Whether this is a folder in that layout."""
    return stored_config(name).get("model_type") == "eagle_llama"


def load_eagle(folder: str, dtype: torch.dtype) -> Any:
    """A live LlamaForCausalLM: all of the checkpoint but the weights under `_VISION_SIDE`.

    Raises:
        ModelError: a weight of the decoder is missing or of another shape, or one belongs to neither side.
    """
    import transformers

    known = transformers.LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = transformers.LlamaConfig(**{k: v for k, v in stored_config(folder).items() if k in known})
    return load_whole(transformers.LlamaForCausalLM, folder, dtype, _VISION_SIDE, config=config)
