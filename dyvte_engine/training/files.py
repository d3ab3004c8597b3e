"""Tensors with a JSON header in one file, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dyvte_engine.errors import DataError
from dyvte_engine.files import write_bytes

_KEY = "dyvte"  # one metadata key: safetensors writes several in no fixed order


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
    """One safetensors file with a JSON header; the same input gives the same bytes."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(packed, metadata={_KEY: json.dumps(header)}))


def read_tensors(path: Path, wanted: Any = None) -> tuple[dict[str, Tensor], Any]:
    """What `write_tensors` wrote; of the tensors only those whose name `wanted` accepts, if given.

    Raises:
        DataError: missing, damaged, or not such a file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if wanted is None or wanted(name)]  # noqa: SIM118 (not a dict)
            return {name: file.get_tensor(name) for name in names}, json.loads((file.metadata() or {})[_KEY])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a readable file of this project: {error}") from error
