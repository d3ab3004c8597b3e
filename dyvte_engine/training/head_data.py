"""What exit heads learn from: prompts, reference answers, and the outcome of an exit at every layer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dyvte_engine.errors import InvalidArgumentError
from dyvte_engine.models import TokenizedPrompt, VisionLanguageModel
from dyvte_engine.training.labels import ExitOutcomes, Rule, Sample, exit_outcomes


@dataclass(frozen=True, eq=False)
class Example:
    """A single-turn prompt about one picture; without an answer the model's greedy answer is the reference (`self`)."""

    picture: Image.Image
    prompt: str
    answer: str | None = None


@dataclass
class HeadData:
    """pooled: float32 [N, L, S*d], the heads' inputs; label, agree: bool [N, L], the rule's verdict and whether the
    answer's tokens all stay; answers: the references."""

    pooled: Tensor
    label: Tensor
    agree: Tensor
    answers: list[str]


def read_jsonl(path: str | Path) -> list[Example]:
    """Lines {"image": file (relative to the list's folder), "prompt": str, "answer": str or absent}."""
    path, examples = Path(path), []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            picture = Image.open(path.parent / entry["image"]).convert("RGB")
            examples.append(Example(picture, entry["prompt"], entry.get("answer")))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InvalidArgumentError(f"data: line {number} of {path} is not a usable example: {error}") from error
    return examples


def collect(
    model: VisionLanguageModel,
    examples: Sequence[Example],
    states: Sequence[str],
    rule: Rule = "paper",
    batch: int = 32,
    max_new_tokens: int = 32,
) -> HeadData:
    """Labels of every exit for every example, in order; prints progress to stderr."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    answers: list[str] = []
    for outcomes, texts in _outcomes(model, examples, batch, max_new_tokens):
        pooled = torch.cat([outcomes.pooled[state] for state in states], -1)
        parts.append((pooled.cpu(), outcomes.labels(rule).cpu(), outcomes.labels("free-running").cpu()))
        answers += texts
    pooled, label, agree = (torch.cat(column) for column in zip(*parts))
    return HeadData(pooled, label, agree, answers)


@torch.inference_mode()
def _outcomes(
    model: VisionLanguageModel, examples: Sequence[Example], batch: int, max_new_tokens: int
) -> Iterator[tuple[ExitOutcomes, list[str]]]:
    start = time.monotonic()
    for first in range(0, len(examples), batch):
        chosen = examples[first : first + batch]
        texts = [_chat(model.processor, e.prompt) for e in chosen]
        answer_ids = _references(model, chosen, texts, max_new_tokens)
        prompts = [
            TokenizedPrompt(p.input_ids + ids, p.pixel_values, p.n_images, p.seconds)
            for p, ids in zip(model.tokenize(texts, [[e.picture] for e in chosen]), answer_ids, strict=True)
        ]
        samples = [
            Sample(p.inputs_embeds, p.visual, p.positions, torch.tensor(ids, device=p.inputs_embeds.device))
            for p, ids in zip(model.prepare(prompts), answer_ids, strict=True)
        ]
        yield (
            exit_outcomes(model.language_model, model.hf.get_output_embeddings(), samples),
            model.processor.batch_decode(answer_ids, skip_special_tokens=True),
        )
        done = first + len(chosen)
        if done // 1000 != first // 1000 or done == len(examples):
            left = (time.monotonic() - start) / done * (len(examples) - done) / 60
            print(f"labels: {done}/{len(examples)} samples, {left:.1f} min left", file=sys.stderr, flush=True)


def _chat(processor: Any, prompt: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _references(
    model: VisionLanguageModel, examples: Sequence[Example], texts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each reference answer with its end token: the given one, else the model's greedy answer."""
    tokenizer = model.processor.tokenizer
    answers = [
        None if e.answer is None else [*tokenizer(e.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for e in examples
    ]
    asked = [i for i, ids in enumerate(answers) if ids is None]
    if asked:
        inputs = model.processor(
            images=[examples[i].picture for i in asked],
            text=[texts[i] for i in asked],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device, model.dtype)
        tokens = model.hf.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        for i, row in zip(asked, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            answers[i] = row[:end]
    return [ids for ids in answers if ids is not None]
