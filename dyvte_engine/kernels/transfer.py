"""Small copies between host and device that wait for nothing, and the device that calls are meant for."""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import DeviceError

T = TypeVar("T")


def on(device: torch.device) -> AbstractContextManager[Any]:
    """While this is entered a CUDA device is the current one, whose streams graphs, events and launches take."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values as a tensor on the device; of the host's from pinned memory, which torch keeps until the copy is done."""
    given = values.to(dtype) if isinstance(values, Tensor) else torch.as_tensor(values, dtype=dtype, device="cpu")
    pinned = device.type == "cuda" and not given.is_cuda
    return (given.pin_memory() if pinned else given).to(device, non_blocking=True)


def copy_into(there: Tensor, values: Tensor) -> None:
    """Values of the host into a tensor of the same dtype on a device, as `to_device`."""
    there.copy_(values.pin_memory() if there.is_cuda else values, non_blocking=True)


Values = tuple[Sequence[Any] | Tensor, torch.dtype]


def to_device_together(parts: Sequence[Values], device: torch.device) -> list[Tensor]:
    """As `to_device`, several values of the host in one copy, the widest dtypes first: there they share memory."""
    given = [torch.as_tensor(values, dtype=dtype, device="cpu") for values, dtype in parts]
    return given if device.type == "cpu" else in_one_copy(given, device)


def in_one_copy(given: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host, on the device."""
    flat = [t.flatten().view(torch.uint8) for t in given]
    sizes = [t.nbytes for t in given]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    there = torch.cat(flat, out=whole).to(device, non_blocking=True).split_with_sizes(sizes)
    return [memory.view(t.dtype).view(t.shape) for memory, t in zip(there, given, strict=True)]


# By devices: memory of the host for small reads, pinned once, with an event for each: to pin anew at every read takes
# longer than the copy. Whoever reads takes one out and brings it back when its copy has come, so no two share one,
# whatever their threads and streams; one that is never read is dropped, and torch frees it behind its copy.
_landings: defaultdict[torch.device, list[tuple[Tensor, torch.cuda.Event]]] = defaultdict(list)
_LANDING_BYTES = 4096


def copy_later(tensor: Tensor, take: Callable[[Tensor], T]) -> Callable[[], T]:
    """Begin to copy to the host; the function returned waits for this copy alone, not for what is queued behind it.

    It gives what `take` makes of the copy, which must not be kept.
    """
    if not tensor.is_cuda:
        return lambda: take(tensor)
    spare = _landings[tensor.device] if tensor.nbytes <= _LANDING_BYTES else []
    try:
        landing = spare.pop()
    except IndexError:
        size = max(tensor.nbytes, _LANDING_BYTES)
        with torch.inference_mode(False):  # others may not be in that mode
            landing = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True), torch.cuda.Event()
    memory, copied = landing
    host = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor.detach(), non_blocking=True)
    copied.record(torch.cuda.current_stream(tensor.device))

    @cache  # the memory is somebody else's after the first call
    def read() -> T:
        copied.synchronize()
        taken = take(host)
        spare.append(landing)
        return taken

    return read


def read_later(tensor: Tensor) -> Callable[[], list[Any]]:
    """As `copy_later`, of the numbers."""
    return copy_later(tensor, Tensor.tolist)


class DeviceLock:
    """Held by whoever uses a device, which is torch's current one meanwhile. One thread may enter it several times.

    Autocast is off meanwhile: it belongs to the thread, which may run steps for others.

    Raises:
        DeviceError: in a process that was forked while another thread held it, which nobody gives back there.
    """

    def __init__(self, device: torch.device):
        self._device, self._lock, self._type = device, threading.RLock(), device.type
        self._entered: list[ExitStack | None] = []  # None: there was nothing to arrange
        self._lost = False
        _locks.add(self)

    def forked(self) -> None:
        """In the new process, before anything else."""
        self._lost = not self._lock.acquire(blocking=False)
        if not self._lost:
            self._lock.release()

    def __enter__(self) -> None:
        if self._lost:
            given = "another thread was at work on the device when this process was forked"
            raise DeviceError(f"{given}; accepted: fork while none is, start with 'spawn', or another engine")
        self._lock.acquire()
        cuda, autocast = self._type == "cuda", torch.is_autocast_enabled(self._type)
        around = ExitStack() if cuda or autocast else None
        if around is not None and cuda:
            around.enter_context(on(self._device))
        if around is not None and autocast:
            around.enter_context(torch.autocast(self._type, enabled=False))
        self._entered.append(around)

    def __exit__(self, *exc: Any) -> None:
        around = self._entered.pop() if self._entered else None
        if around is not None:
            around.close()
        self._lock.release()


def _forked() -> None:
    for lock in list(_locks):
        lock.forked()


_locks: weakref.WeakSet[DeviceLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=_forked)
