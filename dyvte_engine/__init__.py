"""dyvte_engine: multimodal LLM inference in which visual tokens leave as soon as they are no longer needed.

>>> from dyvte_engine import DynamicExit, Engine, NANO_HEADS
>>> engine = Engine.from_pretrained("nano", policy=DynamicExit.from_file(NANO_HEADS))
>>> engine.generate("What color is the shape?", "picture.png").text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .lazy import find

if TYPE_CHECKING:
    from . import hf
    from .assets import EXAMPLES, NANO, NANO_HEADS
    from .chat import Chat
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
        RequestCancelledError,
    )
    from .heads.exit_head import ExitHeadConfig, ExitHeads
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
    )
    from .requests import GenerationResult, GenerationStats, Handle, Request, StreamChunk
    from .runtime.running import Running
    from .training.vtw_search import search_vtw

__version__ = "0.1.0"

__all__ = [
    "EXAMPLES",
    "NANO",
    "NANO_HEADS",
    "CacheError",
    "CalibrationError",
    "Chat",
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
    "Handle",
    "HeadsError",
    "ImageError",
    "InvalidArgumentError",
    "KeepAll",
    "ModelError",
    "NativeLibraryError",
    "PromptError",
    "PyramidDrop",
    "Random",
    "Request",
    "RequestCancelledError",
    "Running",
    "StreamChunk",
    "ToMe",
    "VisionZip",
    "VisualTokenPolicy",
    "compose",
    "hf",
    "search_vtw",
]

_HOMES = {
    "Handle": "requests",
    "Request": "requests",
    "RequestCancelledError": "errors",
    "CacheError": "errors",
    "Chat": "chat",
    "CalibrationError": "errors",
    "DataError": "errors",
    "DeviceError": "errors",
    "DivPrune": "policies",
    "Downsample": "policies",
    "DynamicExit": "policies",
    "DyvteError": "errors",
    "EXAMPLES": "assets",
    "Engine": "engine",
    "EngineConfig": "config",
    "ExitHeadConfig": "heads.exit_head",
    "ExitHeads": "heads.exit_head",
    "FastV": "policies",
    "FixedExit": "policies",
    "GenerationResult": "requests",
    "GenerationStats": "requests",
    "HeadsError": "errors",
    "ImageError": "errors",
    "InvalidArgumentError": "errors",
    "KeepAll": "policies",
    "ModelError": "errors",
    "NANO": "assets",
    "NANO_HEADS": "assets",
    "NativeLibraryError": "errors",
    "PromptError": "errors",
    "PyramidDrop": "policies",
    "Random": "policies",
    "Running": "runtime.running",
    "StreamChunk": "requests",
    "ToMe": "policies",
    "VisionZip": "policies",
    "VisualTokenPolicy": "policies",
    "compose": "policies",
    "hf": "",
    "search_vtw": "training.vtw_search",
}


def __getattr__(name: str) -> Any:
    """Names are looked up at first use: the doctor must start where torch or the native library is missing."""
    return find(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
