"""Training samples as the command line names them."""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidArgumentError
from .head_data import Example, read_examples


def examples_named(data: str, images: Path | None, samples: int | None, seed: int) -> list[Example]:
    """At most `samples` of FILE.jsonl, of a LLaVA-style FILE.json, or of nano[:SET].

    Raises:
        DataError, InvalidArgumentError, ImageError: what cannot be read or is not known, by name.
    """
    if samples is not None and samples < 1:
        raise InvalidArgumentError(f"samples is {samples}; accepted: at least 1")
    if data.split(":")[0] == "nano":
        from .nano import head_examples

        if images is not None:
            raise InvalidArgumentError(f"images is {images}, and data {data!r} has its own; accepted: with a FILE")
        return head_examples.named(data, seed, samples)
    return read_examples(data, images)[:samples]
