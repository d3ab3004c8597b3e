"""Policies bound to one model: each is checked and prepared once, whoever asks for it and however often."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from ..assets import heads_of
from ..errors import InvalidArgumentError
from .auto import policy_for
from .base import VisualTokenPolicy
from .notation import files_in

_MOST = 64  # policies kept; each may hold its heads on the device


class PolicyCache:
    """Binds policies to `model`. Safe to use from several threads."""

    def __init__(self, model: Any):
        self._model, self._lock = model, threading.RLock()  # a policy's `bind` may come back here
        self._heads = heads_of(model.name).absolute()  # of "auto"
        self._bound: OrderedDict[Hashable, VisualTokenPolicy] = OrderedDict()
        self._keys: dict[int, Hashable] = {}  # of the bound ones, by their id: who brings one back gets it

    def bound(self, policy: VisualTokenPolicy | str) -> VisualTokenPolicy:
        """The policy, or the one that a notation names, ready to run; equal policies give the same object.

        Heads are read again when their file has changed, and moved again when their values have. Policies that may
        change, those that are no frozen dataclasses of hashable fields, are bound at every call.

        Raises:
            InvalidArgumentError, HeadsError, CalibrationError, ModelError: it cannot run on this model.
        """
        if not isinstance(policy, (VisualTokenPolicy, str)):
            given = type(policy).__name__
            raise InvalidArgumentError(f"policy is a {given}; accepted: a VisualTokenPolicy or its notation")
        with self._lock:
            key = self._keys.get(id(policy)) or self._key(policy)
            if key is None:
                return self._ready(policy)
            if key not in self._bound:
                ready = self._ready(policy)
                self._bound[key], self._keys[id(ready)] = ready, key
            self._bound.move_to_end(key)
            while len(self._bound) > _MOST:
                _, oldest = self._bound.popitem(last=False)
                self._keys.pop(id(oldest), None)
            return self._bound[key]

    def _ready(self, policy: VisualTokenPolicy | str) -> VisualTokenPolicy:
        ready = (policy_for(policy, self._heads.parent) if isinstance(policy, str) else policy).bind(self._model)
        if not isinstance(ready, VisualTokenPolicy):
            given = f"{type(policy).__name__}.bind returned a {type(ready).__name__}"
            raise InvalidArgumentError(f"{given}; accepted: a VisualTokenPolicy")
        self._model.check(ready)
        return ready

    def _key(self, policy: VisualTokenPolicy | str) -> Hashable | None:
        """Equal where binding gives the same; None where nobody can tell."""
        if isinstance(policy, str):
            return policy, tuple(_stamp(file) for file in (str(self._heads), *files_in(policy)))
        return (policy, policy.state) if _is_value(policy) else None


def _is_value(policy: VisualTokenPolicy) -> bool:
    """Whether its fields are all there is to it, and stay: a subclass without a decorator of its own may add some."""
    own = vars(type(policy)).get("__dataclass_params__")
    if own is None or not own.frozen or not all(map(_is_value, getattr(policy, "parts", ()))):
        return False
    try:
        hash(policy)
    except TypeError:
        return False
    return True


def _stamp(file: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)
    except OSError:  # reading it says why
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size
