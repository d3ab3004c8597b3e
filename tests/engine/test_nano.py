"""The engine on the shipped checkpoint, against transformers and against itself without an exit."""

import random

import pytest
import torch
import transformers

from dyvte_engine import NANO, NANO_HEADS, DynamicExit, Engine, FixedExit, KeepAll
from dyvte_engine.training.nano.evaluate import normalised, scene_items
from dyvte_engine.training.nano.head_examples import held_out_examples
from tests import tiny

LAYERS = 12


@pytest.fixture(scope="module")
def nano():
    """The engine and, as the oracle, transformers' own copy; both in float32."""
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).eval()
    return Engine.from_pretrained("nano", dtype="float32", device="cpu"), hf


def chats(n: int, seed: int, images=(0, 1, 1, 2, 3)):
    """Chat prompts about 0 to 3 held-out scenes each: real questions, real pictures."""
    rng = random.Random(seed)
    items = scene_items(seed, "heldout", 0, n)
    counts = [rng.choice(images) for _ in range(n)]
    pictures = [[rng.choice(items).picture for _ in range(count)] for count in counts]
    texts = [rng.choice(items).question.text for _ in range(n)]
    marks = ["".join("<image>" for _ in range(count)) for count in counts]
    return [f"<s><|user|>{m}{t}<|assistant|>" for m, t in zip(marks, texts)], pictures


def test_keep_all_gives_transformers_tokens(nano):
    """80 prompts with 0 to 3 pictures, in mixed batches of 8; 20 of them alone, too."""
    engine, hf = nano
    engine.policy = KeepAll()
    texts, images = chats(80, seed=5)
    want = [tiny.hf_greedy(hf, engine.model.processor, t, i, 8) for t, i in zip(texts, images)]
    assert [r.token_ids for r in engine.generate(texts, images, chat=False, max_new_tokens=8)] == want
    alone = [engine.generate(t, i, chat=False, max_new_tokens=8).token_ids for t, i in zip(texts[:20], images)]
    assert alone == want[:20] and {len(i) for i in images[:20]} == {0, 1, 2, 3}
    assert len({tuple(w) for w in want}) > 20, "the oracle's answers do not depend on the prompt"


@pytest.mark.parametrize("layer", range(LAYERS))
def test_fixed_exit_equals_masking(nano, layer):
    engine, hf = nano
    engine.policy = FixedExit(layer)
    eos = hf.generation_config.eos_token_id
    texts, images = chats(4, seed=60 + layer, images=(1, 2))
    got = engine.generate(texts, images, chat=False, max_new_tokens=4)
    for text, pictures, result in zip(texts, images, got):
        embeds, visual, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        chosen = tiny.masked_choices(hf, embeds, visual, result.token_ids, lambda k, v=visual: v & (k > layer))
        assert chosen == result.token_ids
        ended = result.token_ids.index(eos) + 1 if eos in result.token_ids else 4
        assert len(result.token_ids) == ended


def test_heads_leave_early_and_the_answers_stay(nano):
    """Held-out questions, whole answers: at least 98 % unchanged, mean exit in the first two thirds of the layers."""
    engine, _ = nano
    examples = [e for part in held_out_examples(21, 100).values() for e in part]
    texts, pictures = [e.prompt for e in examples], [e.picture for e in examples]
    engine.policy = KeepAll()
    full = engine.generate(texts, pictures, max_new_tokens=24)
    engine.policy = DynamicExit.from_file(NANO_HEADS)
    early = engine.generate(texts, pictures, max_new_tokens=24)
    same = [normalised(a.text) == normalised(b.text) for a, b in zip(full, early)]
    exits = [LAYERS - 1 if r.stats.exit_layer is None else r.stats.exit_layer for r in early]
    print(f"\n{sum(same)} of {len(same)} answers unchanged, mean exit layer {sum(exits) / len(exits):.2f}")
    assert sum(same) >= 0.98 * len(same)
    assert sum(exits) / len(exits) < LAYERS * 2 / 3
    assert sum(r.stats.kv_bytes for r in early) < 0.8 * sum(r.stats.kv_bytes for r in full)
