"""`dyvte-engine inspect`: a page that shows where the picture leaves the model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import SourceError
from .output import loading, quiet


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, 'nano' or 'smol'.")] = "nano",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 7860,
    policy: Annotated[
        str, typer.Option(help="The policy that the page begins with; it may name a heads file.")
    ] = "auto",
    webcam: Annotated[bool, typer.Option("--webcam", help="Let pictures come from a camera too.")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 8,
    max_len: Annotated[int | None, typer.Option(help="Prompt and answer tokens of one sequence.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    attn_backend: Annotated[
        str, typer.Option(help="auto, flash_attn_3, flash_attn_4, flash_attn, torch_flash, native, sdpa")
    ] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Show in a browser which layers still look at the picture.

    docs/inspector.md has the controls.
    """
    try:
        from ..inspect.app import create_app, serve
        from ..serve.run import check_address
    except ModuleNotFoundError as e:
        raise SourceError(f"{e.name} is not installed; pip install 'dyvte-engine[inspect]'") from e
    from ..engine import Engine
    from ..inspect.run import Inspector

    quiet()
    check_address(host, port)  # before a model is loaded
    with loading(model):
        engine = Engine.from_pretrained(
            model,
            dtype=dtype,
            device=device,
            attn_backend=attn_backend,
            max_batch=max_batch,
            max_len=max_len,
            trust_remote_code=trust_remote_code,
        )
        app = create_app(Inspector(engine, model, policy), webcam)
    serve(app, host, port)
