"""What exit heads learn from: prompts about one picture each, from JSON lines, LLaVA's JSON, or a `datasets` object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dyvte_engine.errors import DataError, ImageError
from dyvte_engine.files import parse_json
from dyvte_engine.inputs.images import load_image

SHOWN = 10  # bad lines named in one error


@dataclass(frozen=True, eq=False)
class Example:
    """A single-turn prompt about one picture: a file, a PIL picture, or a function that gives one.

    `answer` is the reference, None where there is none. `name` says where the example is (a line, a row); it names
    the example in errors and, with the picture's file, prompt and answer, in the fingerprint of the data.
    """

    picture: Path | Image.Image | Callable[[], Image.Image]
    prompt: str
    answer: str | None = None
    name: str = ""

    def load(self) -> Image.Image:
        """The picture in RGB. Raises DataError naming the example."""
        try:
            if callable(self.picture):
                return load_image(self.picture())
            return load_image(self.picture, str(self.picture) if isinstance(self.picture, Path) else "picture")
        except ImageError as error:
            raise DataError(f"{self.name or 'example'}: {error}") from error

    def identity(self) -> list[str | None]:
        """What the fingerprint of the data sees; a nameless example is known by its pixels."""
        name = self.name or hashlib.sha256(self.load().tobytes()).hexdigest()
        file = self.picture.name if isinstance(self.picture, Path) else None
        return [name, file, self.prompt, self.answer]


def fingerprint(examples: Sequence[Example]) -> str:
    """16 hex digits over names, prompts and answers, in order (files are known by name, not by content)."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.identity()).encode() + b"\n")
    return digest.hexdigest()[:16]


def read_examples(path: str | Path, images: str | Path | None = None) -> list[Example]:
    """Examples of a file: `.jsonl` with lines {"image", "prompt", "answer"?}, or LLaVA's `.json`.

    LLaVA's is a list of {"image", "conversations": [{"from": "human", "value": text}, {"from": "gpt", ...}, ...]}, of
    which the first turn counts and entries without a picture are left out. `images`: the folder that picture names are
    relative to; default the file's own.

    Raises:
        DataError: the file is missing or no JSON, or entries are not usable; it names their lines.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    if images is not None and not folder.is_dir():
        raise DataError(f"images: {folder} is no folder")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no UTF-8, or a name that no file can have
        raise DataError(f"data: {path} cannot be read: {error}") from error
    entries = _json_lines(path, text) if path.suffix == ".jsonl" else _llava(path, text)
    examples: list[Example] = []
    bad: list[str] = []
    for name, parse in entries:
        try:
            example = parse(folder, name)
            if example is not None:
                _check_picture(example)
                examples.append(example)
        except (DataError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"{type(error).__name__} {error}" if isinstance(error, (KeyError, IndexError)) else str(error)
            bad.append(what if what.startswith(name) else f"{name}: {what}")
    if bad:
        more = f"\n... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"data: {len(bad)} unusable entries:\n" + "\n".join(bad[:SHOWN]) + more)
    if not examples:
        raise DataError(f"data: {path} holds no entry with a picture")
    return examples


def from_dataset(
    dataset: Any, image: str = "image", prompt: str = "prompt", answer: str | None = None
) -> list[Example]:
    """Examples of a Hugging Face `datasets.Dataset`; pictures are decoded when needed.

    image, prompt, answer: column names.

    Raises:
        DataError: no rows, a missing column, or something else than one split that is on the disk.
    """
    identity = getattr(dataset, "_fingerprint", "dataset")
    try:
        columns = set(dataset[0])
    except (IndexError, KeyError, TypeError, NotImplementedError) as error:
        given = f"dataset is a {type(dataset).__name__} without a row 0"
        raise DataError(f"{given}; accepted: a datasets.Dataset with rows (one split, not streamed)") from error
    missing = {image, prompt, *([answer] if answer else [])} - columns
    if missing:
        raise DataError(f"dataset has no column {', '.join(sorted(missing))}; it has {', '.join(sorted(columns))}")
    prompts = list(dataset[prompt])
    answers = [None] * len(prompts) if answer is None else list(dataset[answer])
    return [
        Example(partial(_cell, dataset, i, image), p, a, f"row {i} of {identity}")
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]


def _cell(dataset: Any, row: int, column: str) -> Image.Image:
    return dataset[row][column]


Parse = Callable[[Path, str], "Example | None"]


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Parse]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"line {number} of {path.name}", partial(_parse_line, line)


def _parse_line(line: str, folder: Path, name: str) -> Example:
    entry = parse_json(line)
    return Example(folder / entry["image"], _text(entry, "prompt"), _answer(entry.get("answer")), name)


def _llava(path: Path, text: str) -> Iterator[tuple[str, Parse]]:
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise DataError(f"data: {path} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"data: {path} holds a {type(entries).__name__}; accepted: a list of conversations, or .jsonl")
    for number, entry in enumerate(entries, 1):
        yield f"entry {number} of {path.name}", partial(_parse_conversation, entry)


def _parse_conversation(entry: Any, folder: Path, name: str) -> Example | None:
    if "image" not in entry:
        return None
    question, reply = entry["conversations"][:2]
    if (question["from"], reply["from"]) != ("human", "gpt"):
        raise DataError(f"conversations begin with {question['from']!r}, {reply['from']!r}; accepted: human, gpt")
    prompt = question["value"].replace("<image>", "").strip()
    return Example(folder / entry["image"], _text({"value": prompt}, "value"), _answer(reply["value"]), name)


def _text(entry: dict[str, Any], key: str) -> str:
    if not isinstance(entry[key], str) or not entry[key].strip():
        raise DataError(f"{key} is {entry[key]!r}; accepted: text")
    return entry[key]


def _answer(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise DataError(f"answer is {value!r}; accepted: text, or none at all")
    return value


def _check_picture(example: Example) -> None:
    """Whether the file is there and begins like a picture; it is decoded when its turn comes."""
    try:
        Image.open(str(example.picture)).close()
    except Exception as error:  # PIL raises what it likes, DecompressionBombError and SyntaxError among it
        raise DataError(f"{example.name}: {example.picture} is not a readable picture: {error}") from error
