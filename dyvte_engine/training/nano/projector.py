"""A start for the projector: a patch that shows a red star begins as the words "red" and "star".

From a random start the decoder spends most of a short training on finding out what the visual tokens mean. Here the
first layer reads the patch labels off the tower (`tower.py`), and the second writes, for every label, a direction that
is added to the embedding of its word as well; everything is learnt further.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from dyvte_engine.training.nano.questions import NUMBERS
from dyvte_engine.training.nano.scenes import COLORS, GRID, IGNORE, LABELS, MAX_LETTERS, SHAPES
from dyvte_engine.training.nano.tower import DenseTower

RARE = 1.5  # standard deviations over its mean from which a label counts as seen


def label_words() -> dict[str, list[str | None]]:
    """The word of every class of every label; None where there is none."""
    return {
        "shape": [None, *SHAPES, None],
        "color": [None, *COLORS],
        "column": [None] * (GRID + 1),
        "row": [None] * (GRID + 1),
        "same_shape": [None, *NUMBERS[1:]],
        "same_color": [None, *NUMBERS[1:]],
        "letter": [None, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"],
        "letter_index": [None] * (MAX_LETTERS + 1),
    }


def _mark_word(
    tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor, word: str, generator: torch.Generator
) -> torch.Tensor:
    """Gives the word's tokens a direction of their own, which is returned with unit RMS."""
    direction = torch.randn(embeddings.shape[1], generator=generator)
    forms = (word, f" {word}") if len(word) == 1 else (word, f" {word}", f" {word}s")
    ids = [tokenizer(form, add_special_tokens=False).input_ids for form in forms]
    for token in {tokens[-1] for tokens in ids if len(tokens) == 1 or len(word) == 1}:
        embeddings[token] += embeddings.std() * direction
    return direction


@torch.no_grad()
def start_projector(
    projector: nn.Module,
    dense: DenseTower,
    pixels: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    embeddings: torch.Tensor,
) -> None:
    """Sets the projector's weights; adds a direction to each label word's row of `embeddings` [vocabulary, d].

    pixels: [B, 3, 96, 96], on which the labels' usual strength is measured. Rows of the first layer left over read
    the whitened features: a few directions hold nearly all of their variance.
    """
    width = embeddings.shape[1]
    generator = torch.Generator().manual_seed(0)
    features = dense(pixels)[0].flatten(0, 1)
    mean = features.mean(0)
    readers, vectors, start = [], [], 0
    for words in label_words().values():
        classes = slice(start, start + len(words))
        # A softmax ignores what all its logits share, and that part is large: only the differences are read.
        reader = dense.labels.weight[classes] - dense.labels.weight[classes].mean(0)
        strength = (features @ reader.T).std(0)
        tag = torch.randn(width, generator=generator)
        for index, word in enumerate(words):
            if not index:  # class 0 is "nothing"
                continue
            own = torch.randn(width, generator=generator)
            vector = own if word is None else _mark_word(tokenizer, embeddings, word, generator)
            readers.append(reader[index] / strength[index])
            vectors.append((vector + 0.5 * tag) / 3)
        start += len(words)
    values, directions = torch.linalg.eigh((features - mean).T @ (features - mean) / len(features))
    whitened = (directions * values.clamp(min=1e-4).rsqrt()).T.flip(0)  # the widest directions first
    rest = whitened[: projector.linear_1.out_features - len(readers)]
    weight = torch.cat([torch.stack(readers), rest])
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-weight @ mean)
    projector.linear_1.bias[: len(readers)] -= RARE
    projector.linear_2.weight.normal_(0, 0.02, generator=generator)
    projector.linear_2.weight[:, : len(readers)] = torch.stack(vectors, 1)
    projector.linear_2.bias.zero_()


@torch.no_grad()
def add_places(projector: nn.Module, dense: DenseTower, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    """Lets a trained projector pass on where things are: adds two directions, x and y of the object at a patch.

    The tower knows them, but as long as no answer needs them the projector loses them, and then no gradient asks for
    them. Two hidden units of opposite sign pass a number through the GELU unchanged; those four that matter least are
    given up. pixels: [B, 3, 96, 96]; labels: uint8 [B, 144, len(LABELS)], from which the places are fitted.
    """
    generator = torch.Generator().manual_seed(1)
    features = dense(pixels)[0].flatten(0, 1)
    own = torch.arange(GRID**2).repeat(len(labels))
    places = []  # of the object at the patch, and where there is none of the patch itself
    for name, patch in (("column", own % GRID), ("row", own // GRID)):
        label = labels[..., LABELS.index(name)].flatten().long()
        places.append(torch.where((label == 0) | (label == IGNORE), patch, label - 1).float())
    target = torch.stack(places, 1)
    target = (target - target.mean(0)) / target.std(0)
    inputs = torch.cat([features, torch.ones(len(features), 1)], 1)
    shown = (labels[..., LABELS.index("column")].flatten() % IGNORE > 0).float()[:, None]
    weighted = inputs * (shown + 0.05)
    ridge = torch.eye(inputs.shape[1])
    solution = torch.linalg.solve(weighted.T @ inputs + ridge, weighted.T @ target)  # [width + 1, 2]
    hidden = projector.act(projector.linear_1(features))
    least = (hidden.std(0) * projector.linear_2.weight.norm(dim=0)).argsort()[:4]
    visual = projector.linear_2(hidden)
    directions = visual.square().mean().sqrt() / 2 * torch.randn(2, visual.shape[-1], generator=generator)
    signs = torch.tensor([1.0, -1.0])[:, None, None]
    projector.linear_1.weight[least] = (signs * solution[:-1].T).flatten(0, 1)
    projector.linear_1.bias[least] = (signs * solution[-1:].T).flatten()
    projector.linear_2.bias += projector.linear_2.weight[:, least] @ hidden[:, least].mean(0)
    projector.linear_2.weight[:, least] = (signs * directions).flatten(0, 1).T
