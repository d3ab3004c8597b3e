"""Policies bound to one model: each is checked and prepared once, whoever asks for it and however often."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from ..errors import InvalidArgumentError
from .base import VisualTokenPolicy
from .notation import files_in, parse

_MOST = 64  # policies kept; each may hold its heads on the device


class PolicyCache:
    """Binds policies to `model`. Safe to use from several threads."""

    def __init__(self, model: Any):
        self._model, self._lock = model, threading.Lock()
        self._bound: OrderedDict[Hashable, VisualTokenPolicy] = OrderedDict()
        self._keys: dict[int, Hashable] = {}  # of the bound ones, by their id: who brings one back gets it

    def bound(self, policy: VisualTokenPolicy | str) -> VisualTokenPolicy:
        """The policy, or the one that a notation names, ready to run; equal policies give the same object.

        Heads are read again when their file has changed, and moved again when their values have.

        Raises:
            InvalidArgumentError, HeadsError, CalibrationError, ModelError: it cannot run on this model.
        """
        if not isinstance(policy, (VisualTokenPolicy, str)):
            given = type(policy).__name__
            raise InvalidArgumentError(f"policy is a {given}; accepted: a VisualTokenPolicy or its notation")
        with self._lock:
            key = self._keys.get(id(policy)) or _key(policy)
            if key not in self._bound:
                ready = (parse(policy) if isinstance(policy, str) else policy).bind(self._model)
                self._model.check(ready)
                self._bound[key], self._keys[id(ready)] = ready, key
            self._bound.move_to_end(key)
            while len(self._bound) > _MOST:
                _, oldest = self._bound.popitem(last=False)
                self._keys.pop(id(oldest), None)
            return self._bound[key]


def _key(policy: VisualTokenPolicy | str) -> Hashable:
    if isinstance(policy, str):
        return policy, tuple(_stamp(file) for file in files_in(policy))
    named = policy if type(policy).__hash__ is not None else _Same(policy)
    return named, policy.state


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:  # reading it says why
        return None
    return found.st_mtime_ns, found.st_size


class _Same:
    """Equal to what holds the same object; keeps it, so that its id stays its own."""

    def __init__(self, held: object):
        self._held = held

    def __hash__(self) -> int:
        return id(self._held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._held is self._held
