"""What ships with the package: the small model "nano" with its exit heads, example pictures, the paper's tables."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
NANO = _HERE / "nano"
NANO_HEADS = NANO / "exit_heads.safetensors"
SMOL_TRAINED = _HERE / "smol" / "trained.safetensors"  # what training adds to smol's parts
EXAMPLES = _HERE / "examples"
PAPER_RESULTS = _HERE / "paper_results.json"  # the published tables, with their source


def resolve_model(model: str | Path) -> str:
    """The folder of a shipped model ("nano"), any other name or path as it is."""
    return str(NANO) if str(model) == "nano" else str(model)
