"""Loading with transformers in which nothing is missing, nothing is left over, and no code of a checkpoint runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, first_line
from ..files import parse_json

_STORED = ("F32", "BF16", "F16", "F64")  # as safetensors names them
_COUNTERS = ("position_ids", "num_batches_tracked")  # whole numbers that old releases stored with the weights

_LOADING = threading.Lock()


@contextmanager
def nobody_asked() -> Iterator[None]:
    """Within it transformers refuses code of a checkpoint where it would ask on the terminal whether to run it.

    It asks wherever `trust_remote_code` is not given, and does not hand the argument to all that it loads by itself
    (the parts of a processor that no file names). A time limit of 0 for the answer means: do not ask.
    """
    from transformers import dynamic_module_utils as code

    with _LOADING:  # one loader at a time, or the first to end would switch the question on for the others
        before = code.TIME_OUT_REMOTE_CODE
        code.TIME_OUT_REMOTE_CODE = 0
        try:
            yield
        finally:
            code.TIME_OUT_REMOTE_CODE = before


def stored_config(name: str | Path) -> dict[str, Any]:
    """The config.json of a folder, empty where there is none: what tells the layouts of authors apart."""
    try:
        found = parse_json((Path(name) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_whole(
    loader: Any, folder: str | Path, dtype: torch.dtype, left_out: tuple[str, ...] = (), **options: Any
) -> Any:
    """`loader.from_pretrained` of a folder of safetensors.

    left_out: how names begin that the folder may hold besides the model's.

    Raises:
        ModelError: a weight is missing, left over, of another shape, or not of a floating dtype.
    """
    check_stored(folder)
    reported = dict(output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False)
    module, info = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, **reported, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [n for n in sorted(map(str, info[what])) if what != "unexpected_keys" or not n.startswith(left_out)]
        if names:
            raise ModelError(f"{folder}: {what.replace('_', ' ')} {names[0]}")
    return module.requires_grad_(False)


def check_stored(folder: str | Path) -> None:
    """Raises ModelError for weights that transformers would read wrongly without a word: of whole numbers or 8 bits, or
    laid out as another framework has them.
    """
    from safetensors import SafetensorError, safe_open

    for file in _stored_files(Path(folder)):
        try:
            with safe_open(file, "pt") as stored:
                layout = (stored.metadata() or {}).get("format", "pt")
                dtypes = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as e:
            raise ModelError(f"{file} is no readable safetensors file: {first_line(e)}") from e
        if layout != "pt":
            raise ModelError(f"the format of {file} is {layout!r}; accepted: pt")
        wrong = next((n for n, t in dtypes.items() if t not in _STORED and not n.endswith(_COUNTERS)), None)
        if wrong is not None:
            raise ModelError(f"weight {wrong!r} of {file} is {dtypes[wrong]}; accepted: {', '.join(_STORED)}")


def _stored_files(folder: Path) -> list[Path]:
    """Those that transformers reads; none where it will say itself what is missing."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    try:
        weights = parse_json((folder / "model.safetensors.index.json").read_text())["weight_map"]
        return sorted({folder / name for name in weights.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
