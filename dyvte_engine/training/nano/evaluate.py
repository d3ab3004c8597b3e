"""Measures a nano checkpoint with plain transformers: `python -m dyvte_engine.training.nano.evaluate --model FOLDER`.

Reports the 9,673 easy-VQA test questions and questions about held-out scenes, by kind, with two blind baselines:
the most frequent training answer to the same question, and the model itself shown a uniform grey picture.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dyvte_engine.training.metrics import share
from dyvte_engine.training.nano import scenes
from dyvte_engine.training.nano.easy import load_easy_vqa
from dyvte_engine.training.nano.pool import pool_questions
from dyvte_engine.training.nano.questions import Question, ask_many

BLANK = Image.new("RGB", (scenes.SIZE, scenes.SIZE), (128, 128, 128))


@dataclass
class Item:
    """One question to ask; `group` is the line of the report it counts in."""

    picture: Image.Image
    question: Question
    group: str


def easy_items(split: str = "test") -> list[Item]:
    """All easy-VQA questions of a split."""
    paths, asked = load_easy_vqa(split)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return [Item(picture, q, q.kind) for picture, questions in zip(pictures, asked) for q in questions]


def scene_items(seed: int, split: str, start: int, count: int, number: int = 4) -> list[Item]:
    """Up to `number` questions about each of `count` generated scenes from index `start` on."""
    items = []
    for index in range(start, start + count):
        scene = scenes.sample_scene(seed, split, index)
        picture = scenes.render(scene)
        for question in ask_many(scene, number):
            group = question.kind
            if scene.word and group == "word":
                group = "word, unseen" if scene.word.text in scenes.UNSEEN_WORDS else "word, seen"
            items.append(Item(picture, question, group))
    return items


def normalised(text: str) -> str:
    return " ".join(text.split()).casefold()


def chat_prompt(processor: AutoProcessor, text: str) -> str:
    """The checkpoint's chat template around one picture and one question."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration, processor: AutoProcessor, items: list[Item], batch: int = 64
) -> list[str]:
    """Greedy answers of the model, in the order of the items."""
    prompts = [chat_prompt(processor, item.question.text) for item in items]
    # Prompts that end alike ("... in a sentence.") have answers of like length: batches finish together.
    order = sorted(range(len(items)), key=lambda i: (prompts[i][-35:], len(prompts[i])))
    answers = [""] * len(items)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = processor(
            images=[items[i].picture for i in chosen],
            text=[prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, processor.batch_decode(tokens, skip_special_tokens=True)):
            answers[i] = text
    return answers


def majority_answers(training: Iterable[Question]) -> dict[str, str]:
    """The most frequent training answer to each question text."""
    seen: dict[str, Counter] = defaultdict(Counter)
    for question in training:
        seen[question.text][question.answer] += 1
    return {text: counts.most_common(1)[0][0] for text, counts in seen.items()}


def score(items: list[Item], answers: list[str]) -> dict[str, dict]:
    """Exact matches (spacing and case aside) by group and in all."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for item, given in zip(items, answers, strict=True):
        right = normalised(given) == normalised(item.question.answer)
        for group in ("all", item.group):
            hits[group].append(right)
    return {group: share(sum(rights), len(rights)) for group, rights in sorted(hits.items())}


def compare(
    model: LlavaForConditionalGeneration, processor: AutoProcessor, items: list[Item], majority: dict[str, str]
) -> dict:
    """The model's scores and both blind baselines'."""
    blank = [Item(BLANK, item.question, item.group) for item in items]
    texts = sorted({item.question.text for item in items})
    once = answer(model, processor, [Item(BLANK, Question(text, "", ""), "") for text in texts])
    by_text = dict(zip(texts, once, strict=True))
    return {
        "model": score(items, answer(model, processor, items)),
        "blind, majority answer of the training questions": score(
            items, [majority.get(i.question.text, "") for i in items]
        ),
        "blind, model with a grey picture": score(blank, [by_text[i.question.text] for i in items]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="report.json to write")
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes, up to four questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--easy-limit", type=int, help="only the first so many easy-VQA test questions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    model = (
        LlavaForConditionalGeneration.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        .to(args.device)
        .eval()
    )
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=False)
    easy_majority = majority_answers(q for questions in load_easy_vqa("train")[1] for q in questions)
    scene_majority = majority_answers(
        q for questions in pool_questions(args.seed, "train", 10000, 16) for q in questions
    )
    held_out = scene_items(args.seed, "heldout", 0, args.scenes)
    report = {
        "settings": {
            "dtype": args.dtype,
            "decoding": "greedy",
            "match": "whole answer, case and spacing aside",
            "interval": "95 % Wilson",
            "scenes": f"seed {args.seed}, split heldout, indices 0 to {args.scenes - 1}, up to 4 questions each",
            "easy_vqa": "test half of the PyPI package easy-vqa 1.0",
        },
        "easy_vqa": compare(model, processor, easy_items()[: args.easy_limit], easy_majority),
        "scenes": compare(model, processor, held_out, scene_majority),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
