"""`dyvte-engine convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import check_folder


def convert(
    source: Annotated[
        Path, typer.Argument(help="Folder of LLaVA-1.5, or InternVL-Chat with Vicuna, as its authors store it.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write, as transformers stores it.", callback=check_folder)],
    vision_tower: Annotated[
        Path | None, typer.Option(help="Folder of its vision model, where the checkpoint holds no vision tower.")
    ] = None,
    unpickle: Annotated[bool, typer.Option(help="Also read .bin files, with torch's restricted unpickler.")] = False,
) -> None:
    """Convert a checkpoint from its authors' layout."""
    from ..models.original import convert as run

    run(source, target, vision_tower, unpickle)
    typer.echo(f"{target} written")
