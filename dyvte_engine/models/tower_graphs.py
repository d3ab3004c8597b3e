"""A vision tower as CUDA graphs: its hundreds of small launches become one for each number of pictures."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..kernels.graphs import Replay, capture_cuda

_MOST = 8  # shapes that get a graph of their own; each holds the activations of one block and all its features


class TowerGraphs:
    """Runs `tower` captured: one graph for each shape of pixels and policy inside, for those that come first.

    For towers that see pictures of one size. A call with more tensors than pixels, or of a further shape, runs plainly.
    What a replay gives lies at fixed addresses and holds until the next one.
    """

    def __init__(self, tower: nn.Module, capture: Callable[..., Replay[Any]] = capture_cuda):
        self.tower, self._capture = tower, capture
        self._plain = tower.forward
        self._inside: Hashable = None
        self._replays: dict[Any, tuple[Tensor, Replay[Any]]] = {}
        self._memory: list[Any] = []

    @contextmanager
    def entered(self, inside: Hashable = None) -> Iterator[None]:
        """While this runs, the tower does so. `inside`: the `tower_key` of the policy that acts in it, if one does."""
        own = "forward" in self.tower.__dict__
        self._plain, self._inside = self.tower.forward, inside
        self.tower.forward = self._forward
        try:
            yield
        finally:
            if own:
                self.tower.forward = self._plain
            else:
                del self.tower.forward

    def _forward(self, pixel_values: Tensor, **options: Any) -> Any:
        if not all(isinstance(value, (bool, int, str, type(None))) for value in options.values()):
            return self._plain(pixel_values, **options)
        key = (self._inside, pixel_values.shape, pixel_values.dtype, tuple(sorted(options.items())))
        if key not in self._replays:
            out = self._plain(pixel_values, **options)  # libraries set themselves up
            if len(self._replays) < _MOST:
                pixels = pixel_values.clone()
                self._replays[key] = pixels, self._capture(lambda: self._plain(pixels, **options), self._memory)
            return out
        pixels, replay = self._replays[key]
        pixels.copy_(pixel_values)
        return tree_map(lambda leaf: leaf, replay())  # HF's code writes into the record it gets
