"""Tensors with a JSON header in one file, whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dyvte_engine.errors import DataError
from dyvte_engine.files import parse_json, write_bytes

_KEY = "dyvte"  # one metadata key: safetensors writes several in no fixed order


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
    """One safetensors file with a JSON header and a checksum; the same input gives the same bytes."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole = {"header": header, "sha256": _checksum(packed, header)}
    write_bytes(path, save(packed, metadata={_KEY: json.dumps(whole)}))


def _checksum(tensors: Mapping[str, Tensor], header: Any) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the header that `write_tensors` wrote.

    Raises:
        DataError: missing, damaged, or not such a file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            whole = parse_json((file.metadata() or {})[_KEY])
        header, written = whole["header"], whole["sha256"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a readable file of this project: {error}") from error
    if _checksum(tensors, header) != written:
        raise DataError(f"{path} is damaged: its content does not fit its checksum")
    return tensors, header
