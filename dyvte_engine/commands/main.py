"""`dyvte-engine`: all commands with their examples, and `generate` and `doctor` themselves."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
import typer.core
from rich.table import Table

from .. import __version__
from ..errors import FileError
from .analysis import analyze, reproduce
from .convert import convert
from .evaluation import evaluate, sweep
from .guard import CLOSED, guarded
from .inspect import inspect
from .output import err, loading, quiet
from .serve import serve
from .training import ablate_heads, label, test_heads, train_heads


class _Group(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # else typer ends without a word
            raise FileError(CLOSED) from error


app = typer.Typer(cls=_Group, no_args_is_help=True)


def _version(asked: bool) -> None:
    if asked:
        print(f"dyvte-engine {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ask vision-language models about pictures; visual tokens leave as soon as they are no longer needed."""


def generate(
    prompt: Annotated[list[str], typer.Option(help="The question; repeat it to ask several as one batch.")],
    image: Annotated[list[str] | None, typer.Option(help="A picture; with several prompts, one for each.")] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="A folder of frames or an animated picture; with several prompts one each.")
    ] = None,
    video_fps: Annotated[float, typer.Option(help="Frames of the videos in a second.")] = 2.0,
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, 'nano' or 'smol'.")] = "nano",
    policy: Annotated[
        str, typer.Option(help="auto, keep-all, fixed:LAYER, fastv:K,R, dynamic:HEADS[,THRESHOLD]; join with '+'.")
    ] = "auto",
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; default 128 or what fits.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sample with this temperature; as top-k, top-p and min-p, greedy without.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="From the likeliest that hold this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="From those at least this times as likely as the first.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: against repetition.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    attn_backend: Annotated[
        str, typer.Option(help="auto, flash_attn_3, flash_attn_4, flash_attn, torch_flash, native, sdpa")
    ] = "auto",
    max_len: Annotated[int | None, typer.Option(help="Prompt and answer tokens of one sequence.")] = None,
    drop_early_kv: Annotated[bool, typer.Option(help="Also drop the early layers' visual K/V.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array with texts, tokens and figures.")] = False,
) -> None:
    """Answer questions about pictures and videos.

    The policy "auto" is the model's own exit heads where its folder holds them (exit_heads.safetensors), else keep-all.
    """
    from ..engine import Engine  # torch and transformers load here, not for --help
    from ..policies.auto import policy_for

    quiet()
    options: dict[str, Any] = {
        **dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        **dict(repetition_penalty=repetition_penalty, stop_strings=stop, video_fps=video_fps),
    }
    options = {k: v for k, v in options.items() if v is not None}
    if any(v is not None for v in (temperature, top_k, top_p, min_p)):
        options["do_sample"] = True
    made: dict[str, Any] = dict(max_batch=min(len(prompt), 8), max_len=max_len)
    made |= dict(drop_early_kv=drop_early_kv, attn_backend=attn_backend)
    with loading(model):
        chosen = policy_for(policy, model)
        engine = Engine.from_pretrained(model, chosen, dtype, device, trust_remote_code=trust_remote_code, **made)
    if len(prompt) == 1 and not as_json:
        _stream_one(engine, prompt[0], image, video, seed, options)
        return
    images, videos = (image, video) if len(prompt) > 1 else ([image], [video])
    results = engine.generate(prompt, images, videos=videos, seed=seed, **options)
    _print(prompt, results, as_json)


def _print(prompts: list[str], results: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(r) for r in results], indent=2))
        return
    for question, result in zip(prompts, results, strict=True):
        print(f"{question}\n{result.text.strip()}")
        _show(result.stats)


def _stream_one(engine: Any, prompt: str, images: Any, videos: Any, seed: int, options: dict[str, Any]) -> None:
    for chunk in engine.stream(prompt, images, videos=videos, seed=seed, **options):
        print(chunk.text, end="", flush=True)
        if chunk.result is not None:
            print()
            _show(chunk.result.stats)


def _show(stats: Any) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    left = "stayed to the end" if stats.exit_layer is None else f"left after layer {stats.exit_layer}"
    left = "left before layer 0" if stats.exit_layer == -1 else left
    layers = len(stats.tokens_per_layer)
    table.add_row("visual tokens", f"{stats.visual_tokens} ({left} of {layers})" if stats.visual_tokens else "none")
    table.add_row("text tokens", f"{stats.text_tokens} + {stats.new_tokens} new")
    table.add_row("first token", f"{1e3 * stats.ttft_s:.1f} ms (vision {1e3 * stats.vision_s:.1f} ms)")
    table.add_row("decode", f"{stats.decode_tokens_per_s:.0f} tokens/s" if stats.decode_tokens_per_s else "one token")
    table.add_row("prefill", f"{_ratio(stats.prefill_tflops, stats.prefill_tflops_keep_all)} of the FLOPs")
    table.add_row("K/V held", f"{stats.kv_bytes / 1024:.0f} KiB, {_ratio(stats.kv_bytes, stats.kv_bytes_keep_all)}")
    err.print(table)


def _ratio(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def doctor(as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False) -> None:
    """Check what was built and what works here."""
    from . import doctor as module

    raise typer.Exit(module.run(as_json))


ANSWER, HEADS, JUDGE, TOOLS = "Answer questions", "Train exit heads", "Judge a model", "Tools"
COMMANDS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (  # panel of the help, name, function, examples
    (ANSWER, "generate", generate, ("--image a.png --prompt 'What is this?'", "--prompt 'Say hello.' --json")),
    (ANSWER, "serve", serve, ("nano --port 8000", "MODEL --policy keep-all --allow-policy early=fixed:8")),
    (ANSWER, "inspect", inspect, ("nano --port 7860", "MODEL --policy dynamic:heads.safetensors,0.9")),
    (HEADS, "label", label, ("MODEL --data questions.jsonl --out labels",)),
    (HEADS, "train-heads", train_heads, ("labels --kind light --out heads.safetensors",)),
    (HEADS, "ablate-heads", ablate_heads, ("labels --out ablation",)),
    (HEADS, "test-heads", test_heads, ("labels heads.safetensors",)),
    (JUDGE, "eval", evaluate, ("nano --tasks pope,gqa --policy keep-all --policy auto --limit 100",)),
    (JUDGE, "sweep", sweep, ("nano --limit 48 --plot curve.png --page curve.md",)),
    (JUDGE, "analyze", analyze, ("nano --data gqa,textvqa --out analysis",)),
    (JUDGE, "reproduce", reproduce, ("nano --limit 50 --out tables",)),
    (TOOLS, "convert", convert, ("llava-v1.5-7b llava-hf",)),
    (TOOLS, "doctor", doctor, ("", "--json")),
)
for panel, name, function, examples in COMMANDS:
    lines = [f"dyvte-engine {name} {example}".rstrip() for example in examples]
    first = (function.__doc__ or "").split("\n\n")[0]
    app.command(name, short_help=first, rich_help_panel=panel, epilog="\n\n".join(["For example:", *lines]))(function)


def main() -> None:
    """Entry point: errors become one line and exit code 2."""
    guarded(app)


if __name__ == "__main__":
    main()
