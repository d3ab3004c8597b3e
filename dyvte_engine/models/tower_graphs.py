"""A vision tower as CUDA graphs: its hundreds of small launches become one for each number of pictures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from ..errors import first_line
from ..kernels.graphs import Replay, capture_cuda
from .guard import addresses
from .vision_run import VisionRun

MOST = 8  # shapes that get a graph of their own, for each policy; each holds one block's activations and all features


class TowerGraphs:
    """Runs `tower` captured: one graph for each shape of pixels and policy inside, for those that come first.

    For towers that see pictures of one size. A call with more tensors than pixels, of a further shape, or of a tower
    that somebody hooked runs without a graph; graphs of weights that were exchanged since are forgotten. What a
    replay gives has fixed addresses and holds until the next one. A tower that cannot be captured runs without.
    """

    def __init__(self, tower: nn.Module, capture: Callable[..., Replay[Any]] = capture_cuda):
        self.tower, self._capture = tower, capture
        self._replays: dict[Any, tuple[Tensor, Replay[Any]]] = {}
        self._memory: list[Any] = []
        self._weights: tuple[int, ...] = ()
        self.sealed = False  # no more graphs are made

    def knows(self, inside: Hashable) -> bool:
        """Whether a graph was captured with this policy inside."""
        return any(known == inside for known, *_ in self._replays)

    def arrange(self, run: VisionRun, inside: Hashable = None) -> None:
        """The tower runs so in this run. `inside`: the `tower_key` of the policy that acts in it, if one does.

        To be called before anything else is arranged in the tower.
        """
        weights = addresses(self.tower)
        if weights is None:
            return
        if weights != self._weights:
            self._replays, self._weights = {}, weights
        plain = self.tower.forward
        run.replace(self.tower, lambda *args, **options: self._forward(plain, inside, *args, **options))

    def _forward(self, plain: Callable[..., Any], inside: Hashable, pixel_values: Tensor, **options: Any) -> Any:
        if not all(isinstance(value, (bool, int, str, type(None))) for value in options.values()):
            return plain(pixel_values, **options)
        key = (inside, pixel_values.shape, pixel_values.dtype, tuple(sorted(options.items())))
        if key not in self._replays:
            out = plain(pixel_values, **options)  # libraries set themselves up
            if sum(known == inside for known, *_ in self._replays) < MOST and not self.sealed:
                pixels = pixel_values.clone()
                try:
                    self._replays[key] = pixels, self._capture(lambda: plain(pixels, **options), self._memory)
                except RuntimeError as error:
                    self.sealed = True
                    warnings.warn(f"the vision tower runs without CUDA graphs: {first_line(error)}", stacklevel=2)
            return out
        pixels, replay = self._replays[key]
        pixels.copy_(pixel_values)
        return copy.copy(replay())  # HF's code writes into the record it gets
