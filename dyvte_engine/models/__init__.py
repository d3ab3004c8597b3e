"""Hugging Face checkpoints, seen as a vision side that is reused and a decoder that runs in our own loop."""

from .adapters import PreparedPrompt, TokenizedPrompt, VisionLanguageModel
from .decoder import Decoder
from .families import FAMILIES

__all__ = ["FAMILIES", "Decoder", "PreparedPrompt", "TokenizedPrompt", "VisionLanguageModel"]
