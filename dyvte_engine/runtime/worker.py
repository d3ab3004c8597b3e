"""Who runs the scheduler: one thread at a time.

Whoever waits for an answer runs the scheduler himself unless somebody already does: a plain call needs no thread and
no switch between threads for each token. `start` adds a thread of its own, for as long as there is work, so that
requests proceed while nobody waits.
"""

from __future__ import annotations

import os
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch

from ..errors import DeviceError
from .scheduler import Scheduler

_LINGER = 5.0  # seconds that the thread waits for more work
Ready = Callable[[], bool]
Wake = Callable[[], object]


class Worker:
    """Runs the steps of `scheduler` for those who wait."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._mutex = threading.RLock()  # of all below; never held while a step runs
        self._free = threading.Condition(self._mutex)  # nobody leads, or there is new work
        self._leader: int | None = None  # a thread's number
        self._waiters: list[tuple[Ready, Wake, AbstractEventLoop | None]] = []
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def run_until(self, ready: Ready, timeout: float | None = None) -> bool:
        """Return True as soon as `ready()`, False after `timeout` seconds; steps run meanwhile, here or elsewhere.

        Raises DeviceError as `start`.
        """
        self.check_process()
        end = None if timeout is None else time.monotonic() + float(timeout)
        while not ready():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._lead():
                work = self._run(lambda: ready() or (end is not None and time.monotonic() >= end))
                assert work or ready(), "nothing runs that this could wait for"
            else:
                came = threading.Event()
                with self.waking(lambda: ready() or self._leader is None, came.set):
                    came.wait(None if left is None else min(left, threading.TIMEOUT_MAX))
        return True

    @contextmanager
    def waking(self, ready: Ready, wake: Wake, loop: AbstractEventLoop | None = None) -> Iterator[None]:
        """While this runs, `wake` is called when `ready()`: at once, after the step that made it so, or when nobody
        leads; perhaps more than once.

        loop: where it is called, with all others of that loop in one go: each way into a loop costs a system call.
        """
        waiter = (ready, wake, loop)
        with self._mutex:
            self._waiters.append(waiter)
            if ready():
                _call(loop, [wake])
        try:
            yield
        finally:
            with self._mutex:
                self._waiters.remove(waiter)

    def start(self) -> None:
        """From here on steps run also while nobody waits.

        Raises:
            DeviceError: in a process that was forked while another thread ran steps, and held locks.
        """
        self.check_process()
        with self._mutex:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="dyvte-engine", daemon=True)
                self._thread.start()
            self._free.notify()

    def notify(self) -> None:
        """Something changed outside of a step."""
        with self._mutex:
            self._wake()

    def check_process(self) -> None:
        """Raises DeviceError as `start`."""
        if os.getpid() == self._process:
            return
        if self._thread is not None or self._leader not in (None, threading.get_ident()):
            given = "the engine's thread ran when this process was forked"
            raise DeviceError(
                f"{given}; accepted: fork before the first `submit`, start with 'spawn', or another engine"
            )
        self._process = os.getpid()  # whose threads are its own from here on

    def _lead(self) -> bool:
        me = threading.get_ident()
        with self._mutex:
            if self._leader not in (None, me):  # it is me where an interrupt came before or behind a run
                return False
            self._leader = me
            return True

    def _run(self, enough: Ready) -> bool:
        """As the one who leads: steps until it is enough or no work is left. Returns whether there is some."""
        try:
            with torch.inference_mode():
                while self._scheduler.has_work:
                    if enough():
                        return True
                    self._scheduler.step()
                    if self._waiters:
                        self.notify()
            return False
        finally:
            with self._mutex:
                self._leader = None
                self._wake()
                self._free.notify()

    def _wake(self) -> None:
        due: dict[AbstractEventLoop | None, list[Wake]] = {}
        for ready, wake, loop in self._waiters:
            if ready():
                due.setdefault(loop, []).append(wake)
        for loop, wakes in due.items():
            _call(loop, wakes)

    def _serve(self) -> None:
        try:
            while True:
                with self._mutex:
                    idle = self._leader is not None or not self._scheduler.has_work
                    if idle and not self._free.wait(_LINGER) and not self._scheduler.has_work:
                        self._thread = None  # in one go with the look at the work: `start` makes another
                        return
                if self._scheduler.has_work and self._lead():
                    self._run(lambda: False)
        except BaseException:  # the requests of that step have it too
            with self._mutex:
                self._thread = None
            raise


def _call(loop: AbstractEventLoop | None, wakes: Iterable[Wake]) -> None:
    if loop is None:
        for wake in wakes:
            wake()
        return
    with suppress(RuntimeError):  # it was closed
        loop.call_soon_threadsafe(_call, None, wakes)
