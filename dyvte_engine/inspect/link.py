"""What a link to the page holds: the state that it opens with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ..assets import EXAMPLES
from ..errors import InvalidArgumentError
from .run import Settings


@dataclass(frozen=True)
class State:
    """All that a link can say.

    example: name of a shipped picture; None: an uploaded one, which no link holds. layer: whose attention is shown.
    """

    example: str | None = None
    question: str = ""
    settings: Settings = field(default_factory=Settings)
    layer: int = 2  # early, where most models look most

    @property
    def query(self) -> str:
        """For the address, with its question mark; what is as it would be without a link is left out."""
        plain = Settings()
        changed = {f.name: getattr(self.settings, f.name) for f in fields(Settings)}
        said = {name: value for name, value in changed.items() if value != getattr(plain, name)}
        own = dict(example=self.example, question=self.question, layer=self.layer)
        return "?" + urlencode({name: value for name, value in {**own, **said}.items() if value is not None})


_TYPES: dict[str, Any] = {
    "example": str,
    "question": str,
    "layer": int,
    "policy": str,
    "threshold": float,
    "max_new_tokens": int,
    "temperature": float,
    "seed": int,
}


def read(query: Mapping[str, str]) -> State:
    """The state that a link's parameters name; others, such as the page's own, are left alone.

    Raises:
        InvalidArgumentError: a value of another type, or an example that is not shipped.
    """
    given: dict[str, Any] = {}
    for name, value in query.items():
        if name in _TYPES:
            try:
                given[name] = _TYPES[name](value)
            except ValueError as e:
                accepted = {int: "a whole number", float: "a number"}[_TYPES[name]]
                raise InvalidArgumentError(f"{name} in the link is {value!r}; accepted: {accepted}") from e
    example = given.get("example")
    if example is not None and example not in pictures():
        raise InvalidArgumentError(f"example in the link is {example!r}; accepted: {', '.join(pictures())}")
    own = {name: given.pop(name) for name in ("example", "question", "layer") if name in given}
    return State(settings=Settings(**given), **own)


@lru_cache(maxsize=1)
def pictures() -> dict[str, Path]:
    """The shipped examples by their names, without numbers and ending in order of the files."""
    return {path.stem: path for path in sorted(EXAMPLES.glob("*.png"))}


def example_of(path: str | Path | None) -> str | None:
    """The name of the shipped example that a file holds, wherever it is now."""
    if path is None:
        return None
    data = Path(path).read_bytes()
    return next((name for name, own in pictures().items() if own.read_bytes() == data), None)
