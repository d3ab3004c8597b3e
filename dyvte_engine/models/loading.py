"""From a checkpoint folder or hub id to a `VisionLanguageModel`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import DyvteError, ModelError, first_line
from .eagle import is_eagle, load_eagle
from .families import DECODER_ALONE, LANGUAGE_MODELS, Family, family_of
from .strict import load_whole, nobody_asked, stored_config
from .vila import is_vila, load_vila
from .vision_language import VisionLanguageModel

_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
_OTHERS = ("consolidated*", "onnx/*", "openvino/*")  # the same weights once more


def load_model(
    path: str | Path, dtype: torch.dtype, device: torch.device, max_len: int | None, trust_remote_code: bool
) -> VisionLanguageModel:
    """Load a checkpoint folder or hub id with transformers, safetensors only.

    Code that comes with a checkpoint runs only with `trust_remote_code`, and only its config's and its processor's.

    Raises:
        ModelError: not found, damaged, pickled weights only, weights missing, of another shape or dtype or NaN,
            unsupported family, or a package that transformers needs for the processor is missing.
    """
    name = str(path)
    try:
        folder = _assembled() if name == "smol" else _folder(name)
        if (Path(folder) / "adapter_config.json").exists():
            given = f"{name} holds an adapter"
            raise ModelError(f"{given}; accepted: a whole model, as peft's `merge_and_unload()` makes it")
        with nobody_asked():
            hf_model, processor, family = _parts(folder, dtype, trust_remote_code)
    except DyvteError:
        raise
    except ImportError as e:
        raise ModelError(f"cannot load {_shown(name)}: a package is missing: {first_line(e)}") from e
    except Exception as e:  # transformers raises OSError, ValueError, SafetensorError, ... depending on what is wrong
        raise ModelError(f"cannot load {_shown(name)}: {type(e).__name__}: {first_line(e)}") from e
    return VisionLanguageModel(hf_model.to(device), processor, name, max_len, family)


def _parts(folder: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any, Family | None]:
    """A live model, its processor (None: it takes embeddings only), its family where the config does not say it."""
    import transformers

    if is_vila(folder):
        return *load_vila(folder, dtype), None
    if is_eagle(folder):
        return load_eagle(folder, dtype), None, DECODER_ALONE
    if "mm_vision_tower" in stored_config(folder):
        raise ModelError(f"{folder} has its authors' layout; `dyvte-engine convert` writes it as transformers does")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if config.model_type in LANGUAGE_MODELS:
        return load_whole(transformers.AutoModelForCausalLM, folder, dtype), None, DECODER_ALONE
    cls = getattr(transformers, family_of(config, folder).model_class)
    # Left over are at times what older releases stored too; what is missing would be random.
    hf_model = load_whole(cls, folder, dtype, left_out=("",))
    return hf_model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code), None


def _assembled() -> str:
    from .smol import assembled  # needs the packages of the extra "smol"

    return str(assembled())


def _folder(name: str) -> str:
    """A folder as it is; a hub id's files, downloaded once. One question asks the hub, without the many retries that
    transformers makes for each file, so that a mistyped name has its answer at once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if os.path.isdir(name):
        return name
    accepted = "accepted: a folder, or the name of a checkpoint on the hub, as owner/name"
    try:
        return str(snapshot_download(name, allow_patterns=list(_FILES), ignore_patterns=list(_OTHERS)))
    except HFValidationError:
        raise ModelError(f"cannot load {_shown(name)}: there is no such folder; {accepted}") from None
    except Exception as e:  # of httpx or requests, of the hub, of the disk
        given = f"cannot load {_shown(name)}: there is no such folder, and the hub does not give it"
        raise ModelError(f"{given} ({type(e).__name__}: {first_line(e)}); {accepted}") from e


def _shown(name: str) -> str:
    return name if len(name) <= 200 and name.isprintable() else f"{name[:60]!r}... of {len(name):,} characters"
