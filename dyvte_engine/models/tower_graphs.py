"""A vision tower as CUDA graphs: its hundreds of small launches become one for each number of pictures."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..kernels.graphs import Replay, capture_cuda
from .guard import addresses, version
from .tower_layers import TowerLayers
from .vision_run import VisionRun

MOST = 8  # shapes that get a graph of their own, for each policy; each holds one block's activations and all features


class TowerGraphs:
    """Runs `tower` captured: one graph for each shape of pixels and policy inside, for those that come first.

    For towers that see pictures of one size. A call with more tensors than pixels, of a further shape, or of a tower
    that somebody hooked runs without a graph; graphs of weights that were exchanged since are forgotten. What a
    replay gives has fixed addresses and holds until the next one. A tower that cannot be captured runs without.

    layers: the tower's blocks, computed so wherever it runs, captured or not, but for those that a policy replaces.
    """

    def __init__(
        self, tower: nn.Module, capture: Callable[..., Replay[Any]] = capture_cuda, layers: TowerLayers | None = None
    ):
        self.tower, self._capture, self._layers = tower, capture, layers
        self._replays: dict[Any, tuple[Tensor, Replay[Any]]] = {}
        self._memory: list[Any] = []
        self._weights: tuple[Any, ...] = ()
        self._storages: list[Any] = []  # theirs, until the next look: no graph reads freed memory
        self._expected: tuple[Any, Tensor, int, Any] | None = None  # key, pixels, their version, what a replay gave
        self._as_expected = False  # whether the last run was
        self.sealed = False  # no more graphs are made

    def knows(self, inside: Hashable) -> bool:
        """Whether a graph was captured with this policy inside."""
        return any(known == inside for known, *_ in self._replays)

    def begin(self, pixel_values: Tensor, inside: Hashable = None) -> None:
        """If the last run asked for what it was expected to: launch the replay that the next one is going to ask for.

        So the device works while the host looks at the tower and arranges the run. A replay writes nothing but its
        results, which nobody takes where the tower turns out to be another one, or to be asked for other pixels.
        """
        self._expected = None
        wanted = (inside, pixel_values.shape, pixel_values.dtype)
        keys = [key for key in self._replays if key[:3] == wanted]
        if len(keys) == 1:
            out = self._replay(keys[0], pixel_values) if self._as_expected else None
            self._expected = keys[0], pixel_values, version(pixel_values), out

    def arrange(self, run: VisionRun, inside: Hashable = None) -> None:
        """The tower runs so in this run. `inside`: the `tower_key` of the policy that acts in it, if one does.

        To be called before anything else is arranged in the tower.
        """
        weights = addresses(self.tower)
        if weights is None:
            self._expected, self._as_expected = None, False
            return
        if weights != self._weights:
            self._forget(weights)
        own = self.tower.forward
        arrange_layers = functools.cache(lambda: self._layers and self._layers.arrange(run))

        def plain(*args: Any, **options: Any) -> Any:
            arrange_layers()  # where nothing is replayed, and all that a policy replaces has been replaced
            return own(*args, **options)

        run.replace(self.tower, lambda *args, **options: self._forward(plain, inside, *args, **options))

    def _forget(self, weights: tuple[Any, ...]) -> None:
        """There are others now."""
        begun, self._expected = self._expected, None
        if begun is not None and begun[1].is_cuda:  # its graph is not to be destroyed while it runs
            torch.cuda.current_stream(begun[1].device).synchronize()
        if self._layers is not None:
            self._layers.settle()
            weights = addresses(self.tower) or ()
        self._replays, self._weights = {}, weights
        self._storages = [t.untyped_storage() for t in chain(self.tower.parameters(), self.tower.buffers())]

    def _replay(self, key: Any, pixel_values: Tensor) -> Any:
        pixels, replay = self._replays[key]
        pixels.copy_(pixel_values)
        return replay()

    def _forward(self, plain: Callable[..., Any], inside: Hashable, pixel_values: Tensor, **options: Any) -> Any:
        if not all(isinstance(value, (bool, int, str, type(None))) for value in options.values()):
            return plain(pixel_values, **options)
        key = (inside, pixel_values.shape, pixel_values.dtype, tuple(sorted(options.items())))
        expected, self._expected = self._expected, None
        if expected is not None:
            asked, pixels, count, out = expected
            self._as_expected = asked == key and pixels is pixel_values and count == version(pixels)
            if self._as_expected and out is not None:
                return copy.copy(out)
        if key not in self._replays:
            out = plain(pixel_values, **options)  # libraries set themselves up
            if sum(known == inside for known, *_ in self._replays) < MOST and not self.sealed:
                with torch.inference_mode(False):  # others may write there in any mode
                    pixels = pixel_values.clone()
                try:
                    self._replays[key] = pixels, self._capture(lambda: plain(pixels, **options), self._memory)
                except RuntimeError as error:
                    self.sealed = True
                    warnings.warn(f"the vision tower runs without CUDA graphs: {first_line(error)}", stacklevel=2)
            return out
        return copy.copy(self._replay(key, pixel_values))  # HF's code writes into the record it gets
