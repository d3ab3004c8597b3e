"""One run of a live HF model up to the entry of its decoder, with all that is arranged around its modules for it."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, first_line

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


class _AtEntry(Exception):
    """Carries what reached the decoder."""

    def __init__(self, kwargs: dict[str, Any]):
        self.kwargs = kwargs


class _Either:
    """`method` in the thread of a run and while it lasts, `before` for all others; a copy of it is as `before`."""

    def __init__(self, run: VisionRun, method: Callable[..., Any], before: Callable[..., Any]):
        self.run, self.method = run, method
        self.__wrapped__ = before  # HF's code looks at signatures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = _ident() == self.run.thread  # `here`, written out: this is called for every product
        return (self.method if here else self.__wrapped__)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.__wrapped__,)


_ident = threading.get_ident


def _itself(given: Any) -> Any:
    return given


class VisionRun:
    """While it is entered, `model` (HF's, without its LM head) does what was arranged here, for this thread alone.

    The model belongs to its user, who may be calling it in other threads: these calls pass through to what the modules
    did before. Runs of one model, by whatever engine, take turns. At the end the modules are as they were.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.thread = 0
        with _locks_guard:
            self._lock = _locks.setdefault(model, threading.RLock())
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> VisionRun:
        self._lock.acquire()
        self.thread = threading.get_ident()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            while self._undo:
                self._undo.pop()()
        finally:
            self.thread = 0  # whatever a copy of the model has of this run, which another thread made
            self._lock.release()

    @property
    def here(self) -> bool:
        """Whether the calling thread is the one of this run."""
        return threading.get_ident() == self.thread

    def before(self, module: nn.Module, hook: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """`hook(args, kwargs)` before `module` runs; what it returns (args, kwargs), unless None, is used instead."""

        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hook(args, kwargs) if self.here else None

        self.finally_(module.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[[Any], Any]) -> None:
        """`hook(output)` after `module` ran; what it returns, unless None, is the output."""

        def post_hook(module: nn.Module, args: Any, output: Any) -> Any:
            return hook(output) if self.here else None

        self.finally_(module.register_forward_hook(post_hook).remove)

    def replace(self, module: nn.Module, method: Callable[..., Any], name: str = "forward") -> None:
        """`method` instead of the module's own of that name."""
        before, attributes = getattr(module, name), module.__dict__
        either = _Either(self, method, before)
        undo = (
            partial(operator.setitem, attributes, name, before) if name in attributes else partial(attributes.pop, name)
        )
        attributes[name] = either  # a module's own setattr takes longer than all of this
        self.finally_(lambda: attributes.get(name) is either and undo())  # else somebody has put theirs there meanwhile

    def finally_(self, undo: Callable[[], object]) -> None:
        """`undo()` at the end, the latest first."""
        self._undo.append(undo)

    def pad(self, projector: nn.Module, tokens: int) -> list[int]:
        """The projector's output [P, V', d] is filled up with zero rows to [P, tokens, d]; the list holds V' then.

        HF's code merges pictures into as many placeholders as the processor wrote, whatever came out of the tower.
        """
        seen: list[int] = []

        def padded(out: Tensor) -> Tensor:
            seen.append(out.shape[1])
            return nn.functional.pad(out, (0, 0, 0, tokens - out.shape[1]))

        self.after(projector, padded)
        return seen

    def to_entry(self, decoder: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the model on `inputs` and stop where it calls `decoder`; returns what it calls it with.

        Raises ModelError when it never does.
        """

        def stop(args: Any, kwargs: dict[str, Any]) -> None:
            raise _AtEntry(kwargs)

        self.before(decoder, stop)
        try:
            self.model(**inputs, use_cache=False)
        except _AtEntry as entry:
            return entry.kwargs
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as e:
            name = type(self.model).__name__
            raise ModelError(f"the forward of {name} fails before its decoder: {first_line(e)}") from e
        raise ModelError(f"the forward of {type(self.model).__name__} never reached its {type(decoder).__name__}")
