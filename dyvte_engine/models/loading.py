"""From a checkpoint folder or hub id to a `VisionLanguageModel`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ModelError
from .eagle import is_eagle, load_eagle
from .families import DECODER_ALONE, LANGUAGE_MODELS, family_of
from .strict import load_whole, stored_config
from .vila import is_vila, load_vila
from .vision_language import VisionLanguageModel


def load_model(
    path: str | Path, dtype: torch.dtype, device: torch.device, max_len: int | None, trust_remote_code: bool
) -> VisionLanguageModel:
    """Load a checkpoint folder or hub id with transformers, safetensors only.

    Raises:
        ModelError: not found, damaged, pickled weights only, weights missing, of another shape or NaN, unsupported
            family, or a package that transformers needs for the processor is missing.
    """
    import transformers

    name = str(path)
    try:
        if (Path(name) / "adapter_config.json").exists():
            given = f"{name} holds an adapter"
            raise ModelError(f"{given}; accepted: a whole model, as peft's `merge_and_unload()` makes it")
        if is_vila(name):
            hf_model, processor = load_vila(name, dtype)
            return VisionLanguageModel(hf_model.to(device), processor, name, max_len)
        if is_eagle(name):
            return VisionLanguageModel(load_eagle(name, dtype).to(device), None, name, max_len, DECODER_ALONE)
        if "mm_vision_tower" in stored_config(name):
            raise ModelError(f"{name} has its authors' layout; `dyvte-engine convert` writes it as transformers does")
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if config.model_type in LANGUAGE_MODELS:
            decoder = load_whole(transformers.AutoModelForCausalLM, name, dtype)
            return VisionLanguageModel(decoder.to(device), None, name, max_len, DECODER_ALONE)
        cls = getattr(transformers, family_of(config, name).model_class)
        # Left over are at times what older releases stored too; what is missing would be random.
        hf_model = load_whole(cls, name, dtype, left_out=("",), trust_remote_code=trust_remote_code)
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except ImportError as e:  # transformers' sentence begins with an empty line
        raise ModelError(f"cannot load {name}: a package is missing: {str(e).strip().splitlines()[0]}") from e
    except Exception as e:  # transformers raises OSError, ValueError, SafetensorError, ... depending on what is wrong
        raise ModelError(f"cannot load {name}: {type(e).__name__}: {str(e).strip().splitlines()[0]}") from e
    return VisionLanguageModel(hf_model.to(device), processor, name, max_len)
