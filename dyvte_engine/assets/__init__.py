"""What ships with the package: nano with its exit heads, what training adds to smol, pictures, the paper's tables."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
NANO = _HERE / "nano"
NANO_HEADS = NANO / "exit_heads.safetensors"
SMOL = _HERE / "smol"
SMOL_TRAINED = SMOL / "trained.safetensors"  # what training adds to smol's parts
EXAMPLES = _HERE / "examples"
PAPER_RESULTS = _HERE / "paper_results.json"  # the published tables, with their source


def resolve_model(model: str | Path) -> str:
    """The folder of a checkpoint that ships whole ("nano"), any other name or path as it is."""
    return str(NANO) if str(model) == "nano" else str(model)


def heads_of(model: str | Path) -> Path:
    """Where the exit heads of a checkpoint folder, of "nano" or of "smol" are, if it has any."""
    return (SMOL if str(model) == "smol" else Path(resolve_model(model))) / "exit_heads.safetensors"
