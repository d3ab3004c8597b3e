"""Several questions behind one picture in one row of tokens, none of which can see another.

A packed row is the prefix `<s> <|user|> <image> x 144` and then, one after another, questions with their answers; every
question starts again at the position after the prefix and attends to the prefix and to itself only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dyvte_engine.training.nano.questions import Question
from dyvte_engine.training.nano.scenes import GRID

VISUAL = GRID * GRID
PREFIX = 2 + VISUAL


@dataclass
class EncodedQuestions:
    """Token ids of many questions, flat.

    Question i is ids[start[i]:start[i+1]]; its answer begins answer[i] tokens later and ends with the end token.
    Picture p owns the questions picture_start[p]:picture_start[p+1].
    """

    ids: np.ndarray
    start: np.ndarray
    answer: np.ndarray
    picture_start: np.ndarray

    def question(self, index: int) -> tuple[np.ndarray, int]:
        return self.ids[self.start[index] : self.start[index + 1]], int(self.answer[index])


def encode(tokenizer: PreTrainedTokenizerFast, asked: list[list[Question]]) -> EncodedQuestions:
    """Tokens of `text <|assistant|> answer </s>` for all questions of all pictures."""
    flat = [question for questions in asked for question in questions]
    texts = sorted({q.text + "<|assistant|>" for q in flat} | {q.answer + "</s>" for q in flat})
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False).input_ids))
    heads = [ids[q.text + "<|assistant|>"] for q in flat]
    tails = [ids[q.answer + "</s>"] for q in flat]
    lengths = [len(head) + len(tail) for head, tail in zip(heads, tails)]
    return EncodedQuestions(
        np.fromiter((t for head, tail in zip(heads, tails) for t in (*head, *tail)), np.int16, sum(lengths)),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.array([len(head) for head in heads], np.uint8),
        np.concatenate([[0], np.cumsum([len(questions) for questions in asked])]),
    )


@dataclass
class Packed:
    """The text part of a batch, B rows of R tokens; padding has segment 0 and is seen by nobody but itself."""

    ids: torch.Tensor  # int64 [B, R]
    positions: torch.Tensor  # int64 [B, PREFIX + R]
    mask: torch.Tensor  # bool [B, 1, PREFIX + R, PREFIX + R], True = may look
    targets: torch.Tensor  # int64 [B, R]: the next token where it belongs to an answer, else -100

    def to(self, device: str) -> Packed:
        return Packed(*(getattr(self, name).to(device) for name in ("ids", "positions", "mask", "targets")))


def pack(batch: list[list[tuple[np.ndarray, int]]], rows: int) -> Packed:
    """Packs each picture's (token ids, answer start) questions into `rows` tokens, leaving out what does not fit."""
    ids = np.zeros((len(batch), rows), np.int64)
    segment, offset = np.zeros_like(ids), np.zeros_like(ids)
    targets = np.full_like(ids, -100)
    for b, questions in enumerate(batch):
        at = 0
        for number, (tokens, answer) in enumerate(questions, 1):
            end = at + len(tokens)
            if end > rows:
                continue
            ids[b, at:end], segment[b, at:end], offset[b, at:end] = tokens, number, np.arange(len(tokens))
            targets[b, at + answer - 1 : end - 1] = tokens[answer:]
            at = end
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(
            np.concatenate([np.broadcast_to(np.arange(PREFIX), (len(batch), PREFIX)), offset + PREFIX], 1)
        ),
        _mask(torch.from_numpy(segment)),
        torch.from_numpy(targets),
    )


def _mask(segment: torch.Tensor) -> torch.Tensor:
    size = PREFIX + segment.shape[1]
    owner = torch.cat([torch.zeros(len(segment), PREFIX, dtype=segment.dtype), segment], 1)  # [B, size]
    same = owner[:, :, None] == owner[:, None, :]
    to_prefix = (torch.arange(size) < PREFIX)[None, None, :]
    padding = (owner == 0) & (torch.arange(size) >= PREFIX)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    allowed = (same | to_prefix) & causal & ~padding[:, None, :]
    return (allowed | torch.eye(size, dtype=torch.bool))[:, None]
