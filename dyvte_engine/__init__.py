"""dyvte_engine: multimodal LLM inference in which visual tokens leave as soon as they are no longer needed.

>>> from dyvte_engine import DynamicExit, Engine, NANO_HEADS
>>> engine = Engine.from_pretrained("nano", policy=DynamicExit.from_file(NANO_HEADS))
>>> engine.generate("What color is the shape?", "picture.png").text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .lazy import find

if TYPE_CHECKING:
    from . import hf
    from .assets import EXAMPLES, NANO, NANO_HEADS
    from .config import EngineConfig
    from .engine import Engine
    from .errors import (
        CacheError,
        CalibrationError,
        DataError,
        DeviceError,
        DyvteError,
        HeadsError,
        ImageError,
        InvalidArgumentError,
        ModelError,
        NativeLibraryError,
        PromptError,
    )
    from .exit_head import ExitHeadConfig, ExitHeads
    from .generation import GenerationResult, GenerationStats, Running, StreamChunk
    from .policies import (
        DivPrune,
        Downsample,
        DynamicExit,
        FastV,
        FixedExit,
        KeepAll,
        PyramidDrop,
        Random,
        ToMe,
        VisionZip,
        VisualTokenPolicy,
        compose,
        search_vtw,
    )

__version__ = "0.1.0"

__all__ = [
    "EXAMPLES",
    "NANO",
    "NANO_HEADS",
    "CacheError",
    "CalibrationError",
    "DataError",
    "DeviceError",
    "DivPrune",
    "Downsample",
    "DynamicExit",
    "DyvteError",
    "Engine",
    "EngineConfig",
    "ExitHeadConfig",
    "ExitHeads",
    "FastV",
    "FixedExit",
    "GenerationResult",
    "GenerationStats",
    "HeadsError",
    "ImageError",
    "InvalidArgumentError",
    "KeepAll",
    "ModelError",
    "NativeLibraryError",
    "PromptError",
    "PyramidDrop",
    "Random",
    "Running",
    "StreamChunk",
    "ToMe",
    "VisionZip",
    "VisualTokenPolicy",
    "compose",
    "hf",
    "search_vtw",
]

_HOMES = ("errors", "assets", "config", "exit_head", "policies", "generation", "engine")  # the light ones first


def __getattr__(name: str) -> Any:
    """Names are looked up at first use: the doctor must start where torch or the native library is missing."""
    if name == "hf":
        return importlib.import_module(".hf", __name__)
    return find(__name__, name, _HOMES if name in __all__ else ())


def __dir__() -> list[str]:
    return [*globals(), *__all__]
