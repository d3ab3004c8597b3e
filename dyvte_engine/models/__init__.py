"""Hugging Face checkpoints, seen as a vision side that is reused and a decoder that runs in our own loop."""

from .adapters import FAMILIES, PreparedPrompt, TokenizedPrompt, VisionLanguageModel
from .decoder import Decoder

__all__ = ["FAMILIES", "Decoder", "PreparedPrompt", "TokenizedPrompt", "VisionLanguageModel"]
