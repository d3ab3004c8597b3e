"""transformers' image processors that need no torchvision."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def pil_image_processor(module: str, name: str) -> Any:
    """The class `name` of `transformers.models.<module>` on PIL; release 5 keeps those in modules of their own."""
    folder = f"transformers.models.{module}"
    try:
        return getattr(import_module(f"{folder}.image_processing_pil_{module}"), f"{name}Pil")
    except ImportError:
        return getattr(import_module(f"{folder}.image_processing_{module}"), name)
