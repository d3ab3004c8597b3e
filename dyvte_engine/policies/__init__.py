"""Policies: when visual tokens leave, and which. `parse` reads the command line's notation.

To add one: a file here with a subclass of `VisualTokenPolicy`, and a line in `notation.POLICIES` (docs/policies.md).
"""

from .base import Decision, LayerState, VisualTokenPolicy
from .composed import Composed, compose
from .divprune import DivPrune
from .downsample import Downsample
from .dynamic import DynamicExit
from .fastv import FastV
from .fixed import FixedExit, KeepAll
from .notation import NOTATION, POLICIES, parse
from .pyramid_drop import PyramidDrop
from .random import Random
from .tome import ToMe
from .visionzip import VisionZip

__all__ = [
    "NOTATION",
    "POLICIES",
    "Composed",
    "Decision",
    "DivPrune",
    "Downsample",
    "DynamicExit",
    "FastV",
    "FixedExit",
    "KeepAll",
    "LayerState",
    "PyramidDrop",
    "Random",
    "ToMe",
    "VisionZip",
    "VisualTokenPolicy",
    "compose",
    "parse",
]
