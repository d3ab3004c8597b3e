"""Several questions behind one picture in one row of tokens, none of which can see another.

A packed row is the prefix `<s> <|user|> <image> x 144` and then, one after another, questions with their answers; every
question starts again at the position after the prefix and attends to the prefix and to itself only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dyvte_engine.training.nano.questions import KINDS, Question
from dyvte_engine.training.nano.scenes import GRID

VISUAL = GRID * GRID
PREFIX = 2 + VISUAL
BLOCK = 48  # tokens; the longest question with its answer has fewer


class Encoded(NamedTuple):
    """Token ids of one question and its answer, where the answer begins, and the question's kind."""

    ids: np.ndarray
    answer: int
    kind: int


@dataclass
class EncodedQuestions:
    """Token ids of many questions, flat.

    Question i is ids[start[i]:start[i+1]]; its answer begins answer[i] tokens later and ends with the end token; its
    kind is KINDS[kind[i]]. Picture p owns the questions picture_start[p]:picture_start[p+1].
    """

    ids: np.ndarray
    start: np.ndarray
    answer: np.ndarray
    kind: np.ndarray
    picture_start: np.ndarray

    def question(self, index: int) -> Encoded:
        tokens = self.ids[self.start[index] : self.start[index + 1]]
        return Encoded(tokens, int(self.answer[index]), int(self.kind[index]))


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
        np.array([KINDS.index(q.kind) for q in flat], np.uint8),
        np.concatenate([[0], np.cumsum([len(questions) for questions in asked])]),
    )


@dataclass
class Packed:
    """The text part of a batch, B rows of R tokens; only tokens of one block of BLOCK can belong together."""

    ids: torch.Tensor  # int64 [B, R]
    positions: torch.Tensor  # int64 [B, PREFIX + R]
    mask: torch.Tensor  # bool [B, R / BLOCK, BLOCK, BLOCK], True = may look; the prefix is seen by all
    targets: torch.Tensor  # int64 [B, R]: the next token where it belongs to an answer, else -100
    owner: torch.Tensor  # int64 [B, R]: index of the token's question among `kinds`
    kinds: torch.Tensor  # int64 [questions]: KINDS of the packed questions

    def to(self, device: str) -> Packed:
        return Packed(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(batch: list[list[Encoded]], rows: int) -> Packed:
    """Packs each picture's questions into `rows` tokens (a multiple of BLOCK), leaving out what does not fit.

    No question goes over the border of a block, so that attention among questions costs BLOCK scores a token.
    """
    ids = np.zeros((len(batch), rows), np.int64)
    segment, offset, owner = np.zeros_like(ids), np.zeros_like(ids), np.zeros_like(ids)
    targets = np.full_like(ids, -100)
    kinds: list[int] = []
    for b, questions in enumerate(batch):
        used = np.zeros(rows // BLOCK, np.int64)
        for number, (tokens, answer, kind) in enumerate(questions, 1):
            block = int(np.argmax(used + len(tokens) <= BLOCK))
            at = block * BLOCK + used[block]
            end = at + len(tokens)
            if used[block] + len(tokens) > BLOCK:
                continue
            ids[b, at:end], segment[b, at:end], offset[b, at:end] = tokens, number, np.arange(len(tokens))
            targets[b, at + answer - 1 : end - 1] = tokens[answer:]
            owner[b, at:end] = len(kinds)
            kinds.append(int(kind))
            used[block] += len(tokens)
    prefix = np.broadcast_to(np.arange(PREFIX), (len(batch), PREFIX))
    return Packed(
        torch.from_numpy(ids),
        torch.from_numpy(np.concatenate([prefix, offset + PREFIX], 1)),
        _mask(torch.from_numpy(segment).view(len(batch), -1, BLOCK)),
        torch.from_numpy(targets),
        torch.from_numpy(owner),
        torch.tensor(kinds),
    )


def _mask(segment: torch.Tensor) -> torch.Tensor:
    same = segment[..., :, None] == segment[..., None, :]
    return same & torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril()
