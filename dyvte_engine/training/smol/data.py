"""What smol learns from: the nine tasks' questions about training scenes, a batch for every step, made as it is needed.

Step i's batch depends on (seed, i) alone: a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dyvte_engine.eval.compose import Layout
from dyvte_engine.eval.draw import Draw
from dyvte_engine.eval.emoji import Emoji
from dyvte_engine.eval.suite import PLANS
from dyvte_engine.eval.task import Sample

# of 32: rotations of one question and pairs come in fours and twos
SHARES = {"pope": 4, "gqa": 6, "vqav2": 5, "textvqa": 3, "sqa": 2, "mmb": 4, "seed": 3, "mme": 2, "mmvet": 3}
LETTERS = "ABCD"


@dataclass
class Step:
    """A batch of B questions, each about its own layout.

    ids: prompts with answers, right-padded; mask; labels: -100 but at answers; int64 [B, n] all three.
    """

    layouts: list[Layout]
    ids: Tensor
    mask: Tensor
    labels: Tensor


def spoken(sample: Sample) -> str:
    """The answer in words that training teaches."""
    if "options" in sample.meta:
        return LETTERS[sample.reference]
    if "answer" in sample.meta:
        return sample.meta["answer"]
    votes: Any = sample.reference
    return max(votes, key=lambda answer: votes[answer]) if isinstance(votes, dict) else votes


class Steps(Dataset):
    """Batch i of a training run, by number."""

    def __init__(self, processor: Any, seed: int, batch: int):
        self.processor, self.seed, self.batch = processor, seed, batch
        self.world = Emoji(split="train")

    def samples(self, step: int) -> list[Sample]:
        found: list[Sample] = []
        for name, share in SHARES.items():
            wanted = max(1, round(share * self.batch / sum(SHARES.values())))
            made = PLANS[name].make(Draw(self.world, name, (self.seed << 32) + step, popular_from=20))
            found += islice(made, wanted)
        return found[: self.batch]

    def __getitem__(self, step: int) -> Step:
        samples = self.samples(step)
        prompts = [self._chat(s.prompt) for s in samples]
        answers = [f"{spoken(s)}<|im_end|>" for s in samples]
        tokenizer = self.processor.tokenizer
        asked = tokenizer(prompts, add_special_tokens=False).input_ids
        said = tokenizer(answers, add_special_tokens=False).input_ids
        longest = max(len(a) + len(b) for a, b in zip(asked, said))
        ids = torch.full((len(samples), longest), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (a, b) in enumerate(zip(asked, said)):
            ids[i, : len(a) + len(b)] = torch.tensor(a + b)
            mask[i, : len(a) + len(b)] = 1
            labels[i, len(a) : len(a) + len(b)] = torch.tensor(b)
        return Step([s.draw.layout for s in samples], ids, mask, labels)  # type: ignore[attr-defined]

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text.replace(self.processor.image_token, self.processor.image_token * self._visual)

    @property
    def _visual(self) -> int:
        side = self.processor.image_processor.crop_size["height"] // self.processor.patch_size
        return side * side


def stream(processor: Any, seed: int, batch: int, first: int, last: int, workers: int) -> Iterator[Step]:
    """Steps `first` to `last` - 1, made by so many worker processes."""
    steps = Steps(processor, seed, batch)
    options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    yield from DataLoader(steps, sampler=range(first, last), batch_size=None, num_workers=workers, **options)
