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
_LINES = 4  # a look at the values takes longer than such a line


class _BeyondBounds(Exception):
    pass


def apply_template(processor: Any, messages: Any) -> str:
    """The text of a conversation, as `processor.apply_chat_template` writes it.

    transformers runs templates in Jinja's sandbox, which lets no code out and bounds `range`, but neither time nor
    memory. Here Python's tracing looks at the clock at every line of a template, and at the sizes of the values in
    reach at every fourth; that takes 0.1 ms for a question. So nested loops, recursion and texts that double end
    in an error. Not covered is a single operation that never comes back to Python (`'x' * 10**12`): it fails with a
    MemoryError, or takes the memory and the time. For templates of authors whom you do not trust at all, limit the
    process.

    Raises:
        PromptError: the template refuses the conversation, or goes beyond these bounds.
    """
    try:
        text = _bounded(lambda: processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except _BeyondBounds as e:
        raise PromptError(f"the checkpoint's chat template {e}") from None
    except Exception as e:  # jinja2's own, and whatever an operation in the template raises
        raise PromptError(f"the checkpoint's chat template cannot take the prompt: {first_line(e)}") from e
    return str(text)


def _bounded(call: Callable[[], Any]) -> Any:
    """What `call` returns; in this thread only, and with the caller's own tracing (a debugger's) put back."""
    from jinja2.utils import Namespace

    clock, end, written, lines = time.monotonic, time.monotonic() + MAX_SECONDS, 0, 0

    def size(value: Any) -> int:
        if isinstance(value, (str, list, tuple)):
            return len(value)
        if isinstance(value, Namespace):  # what outlives a loop's turn
            return max(map(size, value._Namespace__attrs.values()), default=0)
        return 0

    def each_call(frame: FrameType, event: str, argument: Any) -> Any:
        if clock() > end:
            raise _BeyondBounds(f"runs for more than {MAX_SECONDS:g} seconds")
        return each_line if frame.f_code.co_filename == "<template>" else None

    def each_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal written, lines
        each_call(frame, event, argument)
        if event == "return":  # or yields a piece of the text
            written += size(argument)
        lines += 1
        largest = max(map(size, frame.f_locals.values()), default=0) if lines % _LINES == 0 else 0
        if max(written, largest) > MAX_CHARACTERS:
            raise _BeyondBounds(f"writes or holds more than {MAX_CHARACTERS:,} characters")
        return each_line

    before = sys.gettrace()
    sys.settrace(each_call)
    try:
        return call()
    finally:
        sys.settrace(before)
