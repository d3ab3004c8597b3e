"""A checkpoint's chat template, which is a program of its author's, run within bounds of time and size."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..errors import PromptError, first_line

MAX_SECONDS = 10.0
"""For one prompt; the templates of published checkpoints take a few milliseconds."""
MAX_CHARACTERS = 8_000_000
"""Of the text, and of any string or list that a template holds on the way; far beyond what any model can read."""


class _BeyondBounds(Exception):
    pass


def apply_template(processor: Any, messages: Any) -> str:
    """The text of a conversation, as `processor.apply_chat_template` writes it.

    transformers runs templates in Jinja's sandbox, which lets no code out and bounds `range`, but neither time nor
    memory. Here Python's tracing looks at every line that a template or Jinja itself runs: the clock, and the sizes of
    the values in reach. So nested loops, recursion and texts that double end in an error. Not covered is a single
    operation that never comes back to Python (`'x' * 10**12`): it fails with a MemoryError, or takes what memory there
    is. Templates of checkpoints that you do not trust belong into a process with a limit of its own.

    Raises:
        PromptError: the template refuses the conversation, or goes beyond these bounds.
    """
    try:
        text = _bounded(lambda: processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except _BeyondBounds as e:
        raise PromptError(f"the checkpoint's chat template {e}") from None
    except Exception as e:  # jinja2's own, and whatever an operation in the template raises
        raise PromptError(f"the checkpoint's chat template cannot take the prompt: {first_line(e)}") from e
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        raise PromptError(f"the checkpoint's chat template writes more than {MAX_CHARACTERS:,} characters, or no text")
    return text


def _bounded(call: Callable[[], Any]) -> Any:
    """What `call` returns; in this thread only, and with the caller's own tracing (a debugger's) put back."""
    end = time.monotonic() + MAX_SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if file != "<template>" and "jinja2" not in file:
            return None
        if time.monotonic() > end:
            raise _BeyondBounds(f"runs for more than {MAX_SECONDS:g} seconds")
        if file == "<template>" and any(map(_too_large, frame.f_locals.values())):
            raise _BeyondBounds(f"holds more than {MAX_CHARACTERS:,} characters")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


def _too_large(value: Any) -> bool:
    if isinstance(value, (str, list, tuple)):
        return len(value) > MAX_CHARACTERS
    from jinja2.utils import Namespace  # here a template runs, so Jinja is there

    return isinstance(value, Namespace) and any(map(_too_large, value._Namespace__attrs.values()))
