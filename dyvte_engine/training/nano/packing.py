"""nano's questions as the tokens that `training/packing.py` packs; its prefix is `<s> <|user|> <image> x 144`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from dyvte_engine.training.nano.questions import KINDS, Question
from dyvte_engine.training.nano.scenes import GRID
from dyvte_engine.training.packing import Encoded

VISUAL = GRID * GRID
PREFIX = 2 + VISUAL
BLOCK = 48  # tokens; the longest question with its answer has fewer


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
