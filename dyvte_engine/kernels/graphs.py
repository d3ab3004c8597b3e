"""What was launched once, launched again as one: CUDA graphs, and on a CPU tapes of kernel calls."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
Replay = Callable[[], T]  # runs what was captured, at the same addresses; gives what it returned
TAPE_BYTES = 16 << 20
"""What the kernels on all tapes that share memory may return. Where that is not enough, kernels take so long that a
tape would save nothing."""


_one_at_a_time = threading.RLock()  # captures of all threads: of one stream, and while nothing is collected


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
    options: dict[str, Any] = dict(stream=stream, capture_error_mode="thread_local")  # others may do what they like
    pool = memory[0] if memory else None
    with _one_at_a_time, _nothing_collected(), torch.cuda.graph(graph, pool=pool, **options):
        out = step()
    if not memory:
        memory.append(graph.pool())

    def replay() -> T:
        graph.replay()
        return out

    return replay


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Among garbage there may be graphs, and to destroy one breaks a capture of the same thread."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def capture_cpu(step: Callable[[], T], memory: list[Any]) -> Replay[T] | None:
    """`step`, run once more, as tapes: a replay makes the kernel calls anew, in one go and without Python's lock.

    The few operations of torch's own between them are called as they were. `memory` as for `capture_cuda`. None where
    what the kernels return does not fit into `TAPE_BYTES`.
    """
    if not memory:
        memory.append(torch.empty(TAPE_BYTES, dtype=torch.uint8))
    recorder = _Recorder(memory[0])
    try:
        with recorder:
            out = step()
    finally:
        recorder.end()
    if recorder.full:
        return None

    def replay() -> T:  # keeps the recorder, and so what the tapes point to
        for call in recorder.calls:
            call()
        return out

    return replay


class _Recorder(TorchDispatchMode):
    """`calls`: what repeats the operations that it has seen. What they read and returned stays alive with it."""

    def __init__(self, arena: Tensor):
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.full = False
        self._arena, self._taping, self._kept = arena, False, list[Any]()  # the arena: what is left of it

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = partial(function, *args, **(kwargs or {}))
        if function.namespace == "dyvte":
            if not self._taping:
                self.calls.append(_Tape(self._arena))
                self._taping = True
            out = call()
            self._kept += call.args
            return out
        out, writes = call(), function._schema.is_mutable
        given = [_memory_of(t) for t in _tensors((args, kwargs))]
        if given and (writes or any(_memory_of(t) not in given for t in _tensors(out))):  # not a view, nor a constant
            self.end()
            self.calls.append(call if writes else partial(_again, call, _tensors(out)))
        self._kept.append(out)
        return out

    def end(self) -> None:
        """The next kernel begins another tape."""
        if self._taping:
            used, self._taping = torch.ops.dyvte.tape_end(self._arena), False
            self.full |= used > len(self._arena)
            self._arena = self._arena[used:]


class _Tape:
    """A tape that records until `tape_end`; called, it runs."""

    def __init__(self, arena: Tensor):
        self._run, self._arena = torch.ops.dyvte.tape_run.default, arena
        self._number = torch.ops.dyvte.tape_begin(arena)
        weakref.finalize(self, torch.ops.dyvte.tape_drop.default, arena, self._number)

    def __call__(self) -> None:
        self._run(self._arena, self._number)


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


def _memory_of(tensor: Tensor) -> int | None:
    """Where it begins; None in a layout of oneDNN's."""
    return None if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def _again(call: Callable[[], Any], there: Sequence[Tensor]) -> None:
    """`call`, with its results where they were the first time."""
    result = call()
    values = [result] if isinstance(result, Tensor) else _tensors(result)
    for first, value in zip(there, values, strict=True):
        first.copy_(value)
