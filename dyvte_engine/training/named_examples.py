"""Training samples as the command line names them."""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidArgumentError
from .head_data import Example, read_examples


def examples_named(data: str, images: Path | None, samples: int | None, seed: int) -> list[Example]:
    """At most `samples` of FILE.jsonl, of a LLaVA-style FILE.json, or of nano[:SET] or smol[:SET].

    Raises:
        DataError, InvalidArgumentError, ImageError: what cannot be read or is not known, by name.
    """
    if samples is not None and samples < 1:
        raise InvalidArgumentError(f"samples is {samples}; accepted: at least 1")
    if has_own_pictures(data) and images is not None:
        raise InvalidArgumentError(f"images is {images}, and data {data!r} has its own; accepted: with a FILE")
    if data.split(":")[0] == "nano":
        from .nano import head_examples

        return head_examples.named(data, seed, samples)
    if data.split(":")[0] == "smol":
        from .smol import head_examples as of_smol

        return of_smol.named(data, seed, samples)
    return read_examples(data, images)[:samples]


def has_own_pictures(data: str) -> bool:
    """Whether it is one of the sets that draw their pictures themselves."""
    return data.split(":")[0] in ("nano", "smol")
