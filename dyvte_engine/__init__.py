"""dyvte_engine: multimodal LLM inference in which visual tokens leave as soon as they are no longer needed.

>>> from dyvte_engine import DynamicExit, Engine, NANO_HEADS
>>> engine = Engine.from_pretrained("nano", policy=DynamicExit.from_file(NANO_HEADS))
>>> engine.generate("What color is the shape?", "picture.png").text
"""

from .assets import EXAMPLES, NANO, NANO_HEADS
from .config import EngineConfig
from .engine import Engine
from .errors import (
    CacheError,
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
    "search_vtw",
]
