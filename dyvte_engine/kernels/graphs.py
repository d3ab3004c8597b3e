"""CUDA graphs: what was launched once, launched again as one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], T]  # runs what was captured, at the same addresses; gives what it returned


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Where graphs of one device are captured: torch's own default is a stream of the device that captured first."""
    return torch.cuda.Stream(device)


def capture_cuda(step: Callable[[], T], memory: list[Any]) -> Replay[T]:
    """`step`, run once before (libraries set themselves up then), as a CUDA graph of the current device.

    Graphs that hand over the same list `memory` share one pool: only the results of the last replay are safe in it.
    """
    graph = torch.cuda.CUDAGraph()
    stream = _stream(torch.cuda.current_device())
    with torch.cuda.graph(graph, pool=memory[0] if memory else None, stream=stream):
        out = step()
    if not memory:
        memory.append(graph.pool())

    def replay() -> T:
        graph.replay()
        return out

    return replay
