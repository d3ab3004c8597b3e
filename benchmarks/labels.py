"""The labels of all exits in one packed pass, against one forward for each exit: FLOPs and time.

Two forms of the latter: the visual rows removed after the exit (the least work), or masked in a whole forward (the
plain way with transformers). The FLOPs are counted (`flops.paper_layer`, decoder only), the times interleaved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import header, interleave, options, paired_ratio, spread
from dyvte_engine.assets import resolve_model
from dyvte_engine.config import DecoderShape
from dyvte_engine.flops import leaving_flops, paper_layer
from dyvte_engine.models import VisionLanguageModel
from dyvte_engine.models.loading import load_model
from dyvte_engine.training.labels import Sample, exit_outcomes

LLAVA_7B = DecoderShape(4096, 32, 32, 32, 128, 11008, 32064, 4096)


def counted(shape: DecoderShape, n: int, visual: int) -> dict[str, float]:
    """FLOPs over those of one plain forward of n tokens."""
    layers, text = shape.num_layers, n - visual
    plain = layers * paper_layer(shape, n)
    packed = plain + sum(j * paper_layer(shape, text) for j in range(layers))
    removed = sum(leaving_flops(shape, n, visual, layer) for layer in range(layers))
    return {"packed": packed / plain, "removed": removed / plain, "masked": float(layers)}


def samples_of(model: VisionLanguageModel, batch: int, n: int, visual: int, answer: int) -> list[Sample]:
    """Random embeddings: the work does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, n, model.shape.hidden_size, generator=generator).to(model.device, model.dtype)
    marks = (torch.arange(n) >= 4) & (torch.arange(n) < 4 + visual)
    ids = torch.randint(model.shape.vocab_size, (batch, answer), generator=generator).to(model.device)
    return [Sample(e, marks, torch.arange(n, device=model.device), a) for e, a in zip(embeds, ids, strict=True)]


@torch.inference_mode()
def one_exit(model: VisionLanguageModel, samples: Sequence[Sample], exit_layer: int, remove: bool) -> torch.Tensor:
    """Logits of the answer's rows with an exit after `exit_layer`, in transformers' own layers."""
    lm, visual = model.language_model, samples[0].visual.to(model.device)
    hidden = torch.stack([s.inputs_embeds for s in samples])
    positions = samples[0].positions[None].long()
    for number, layer in enumerate(lm.layers):
        n = hidden.shape[1]
        blocked = torch.ones(n, n, dtype=torch.bool, device=model.device).triu(1)
        if number > exit_layer and not remove:
            blocked |= visual[None] & ~torch.eye(n, dtype=torch.bool, device=model.device)
        mask = torch.zeros(1, 1, n, n, dtype=hidden.dtype, device=model.device)
        mask.masked_fill_(blocked, torch.finfo(hidden.dtype).min)
        rotation = lm.rotary_emb(hidden, positions)
        out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        hidden = out[0] if isinstance(out, tuple) else out
        if number == exit_layer and remove:
            hidden, positions = hidden[:, ~visual], positions[:, ~visual]
    rows = hidden[:, -len(samples[0].answer) - 1 : -1]
    return model.hf.get_output_embeddings()(lm.norm(rows)).float().log_softmax(-1)


def measured(model: VisionLanguageModel, samples: list[Sample], rounds: int) -> dict[str, Any]:
    """Seconds of the three ways for the same labels, and how many times faster the packed pass is."""
    lm, head, layers = model.language_model, model.hf.get_output_embeddings(), range(model.shape.num_layers)
    packed = torch.inference_mode()(exit_outcomes)
    calls = {
        "packed": lambda: packed(lm, head, samples),
        "removed": lambda: [one_exit(model, samples, layer, True) for layer in layers],
        "masked": lambda: [one_exit(model, samples, layer, False) for layer in layers],
    }
    times = interleave(calls, rounds, model.device, warmup=1)
    seconds = {name: spread(t) for name, t in times.items()}
    return {"seconds": seconds, "faster_than": {n: paired_ratio(times[n], times["packed"]) for n in calls}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, "labels")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, nargs=3, default=(176, 144, 6), help="all, visual, answer")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    model = load_model(resolve_model(args.model), dtype, device, None, False)
    n, visual, answer = args.tokens
    result = header("labels", args, argv)
    result["flops_of_a_forward"] = {
        "LLaVA-7B, 640 tokens, 576 visual": counted(LLAVA_7B, 640, 576),
        f"{args.model}, {n} tokens, {visual} visual": counted(model.shape, n, visual),
    }
    result |= measured(model, samples_of(model, args.batch, n, visual, answer), args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, counts in result["flops_of_a_forward"].items():
        listed = ", ".join(f"{way} {cost:.2f}" for way, cost in counts.items())
        print(
            f"FLOPs over one forward ({name}): {listed}; packed is {counts['removed'] / counts['packed']:.1f} x and "
            f"{counts['masked'] / counts['packed']:.1f} x less"
        )
    for name in ("removed", "masked"):
        ratio = result["faster_than"][name]
        quartiles = f"quartiles {ratio['q1']:.2f} - {ratio['q3']:.2f}"
        print(f"time: packed is {ratio['median']:.2f} x faster than {name} ({quartiles})")


if __name__ == "__main__":
    main()
