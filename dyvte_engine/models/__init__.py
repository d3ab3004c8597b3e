"""Hugging Face checkpoints, seen as a vision side that is reused and a decoder that runs in our own loop."""

from .decoder import Decoder
from .families import FAMILIES
from .vision_language import PreparedPrompt, TokenizedPrompt, VisionLanguageModel

__all__ = ["FAMILIES", "Decoder", "PreparedPrompt", "TokenizedPrompt", "VisionLanguageModel"]
