"""Loading with transformers in which nothing is missing and nothing is left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError


def stored_config(name: str | Path) -> dict[str, Any]:
    """The config.json of a folder, empty where there is none: what tells the layouts of authors apart."""
    try:
        found = json.loads((Path(name) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_whole(
    loader: Any, folder: str | Path, dtype: torch.dtype, left_out: tuple[str, ...] = (), **options: Any
) -> Any:
    """`loader.from_pretrained` of a folder of safetensors, to be used and not trained.

    left_out: how names begin that the folder may hold beside the model's.

    Raises:
        ModelError: a weight is missing, left over or of another shape.
    """
    reported = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    module, info = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, **reported, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [n for n in sorted(map(str, info[what])) if what != "unexpected_keys" or not n.startswith(left_out)]
        if names:
            raise ModelError(f"{folder}: {what.replace('_', ' ')} {names[0]}")
    return module.requires_grad_(False)
