"""`dyvte-engine serve`: an HTTP server with OpenAI's interface."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from ..errors import SourceError
from .output import loading, quiet

MOST_THREADS = 1024  # torch aborts the process where the system cannot start so many


def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, 'nano' or 'smol'.")] = "nano",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    policy: Annotated[str, typer.Option(help="When visual tokens leave, unless a request says otherwise.")] = "auto",
    allow_policy: Annotated[
        list[str] | None, typer.Option(help="NOTATION or NAME=NOTATION that requests may name; may be repeated.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name for requests; default MODEL's.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that clients must send; may be repeated.", envvar="DYVTE_API_KEY")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 8,
    max_len: Annotated[int | None, typer.Option(help="Prompt and answer tokens of one sequence.")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; beyond it 429.")] = 64,
    max_n: Annotated[int, typer.Option(min=1, help="Answers of one request.")] = 8,
    allow_domain: Annotated[
        list[str] | None, typer.Option(help="A host that pictures may be fetched from; may be repeated.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=0, help="Pictures of one request.")] = 16,
    max_videos: Annotated[int, typer.Option(min=0, help="Videos of one request.")] = 2,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames of its videos together.")] = 512,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of its pictures and frames together.")] = 50_000_000,
    max_media_mib: Annotated[int, typer.Option(min=1, help="MiB of its pictures' and videos' files together.")] = 24,
    max_connections: Annotated[int, typer.Option(min=1, help="Open connections; beyond it 503.")] = 512,
    drain_seconds: Annotated[int, typer.Option(min=0, help="After SIGTERM, time for what is under way.")] = 60,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    attn_backend: Annotated[
        str, typer.Option(help="auto, flash_attn_3, flash_attn_4, flash_attn, torch_flash, native, sdpa")
    ] = "auto",
    drop_early_kv: Annotated[bool, typer.Option(help="Also drop the early layers' visual K/V.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Of kernels on a CPU; default: one core is left.")
    ] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's interface (docs/serving.md)."""
    media = dict(images=max_images, videos=max_videos, frames=max_frames, pixels=max_pixels)
    size = dict(max_batch=max_batch, max_len=max_len, dtype=dtype, device=device, attn_backend=attn_backend)
    options: dict[str, Any] = dict(max_queue=max_queue, max_choices=max_n, api_keys=tuple(api_key or ()))
    options.update(body_bytes=max_media_mib * 2**20 * 3 // 2)
    if served_model_name is not None:
        options.update(model_name=served_model_name)
    try:
        from ..serve.build import build
        from ..serve.run import check_address
        from ..serve.run import serve as listen
    except ModuleNotFoundError as e:
        raise SourceError(f"{e.name} is not installed; pip install 'dyvte-engine[serve]'") from e
    quiet()
    check_address(host, port)  # before a model is loaded
    _limit(threads)
    with loading(model):
        limits = dict(media, bytes=max_media_mib * 2**20, domains=tuple(allow_domain or ()))
        app = build(model, policy, allow_policy or [], dict(size, drop_early_kv=drop_early_kv), limits, options)
    listen(app, host, port, drain_seconds, max_connections)


def _limit(threads: int | None) -> None:
    """Kernels that wait for each other on every core are held up by whatever HTTP does there: one is left to it."""
    import torch

    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(threads or max(1, torch.get_num_threads() - 1))
