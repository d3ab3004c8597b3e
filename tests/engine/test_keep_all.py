"""KeepAll is transformers' own generate, token for token."""

import random

import pytest
import torch

from dyvte_engine import FixedExit, KeepAll
from tests import tiny
from tests.engine.conftest import build, logits_errors

FAMILIES = [("llama", "clip"), ("llama-gqa", "siglip"), ("mistral", "clip"), ("qwen2", "clip"), ("qwen3", "siglip")]


@pytest.mark.parametrize(("decoder", "vision"), FAMILIES)
def test_greedy_tokens_equal_generate(decoder, vision):
    """40 prompts a family (200 in all), with 0 to 3 pictures: alone, and in mixed batches of 8."""
    engine, hf = build(decoder, vision)
    texts, images = tiny.prompts(seed=FAMILIES.index((decoder, vision)), n=40)
    want = [tiny.hf_greedy(hf, engine.model.processor, t, i, 8) for t, i in zip(texts, images)]
    batched = engine.generate(texts, images, chat=False, max_new_tokens=8)
    assert [r.token_ids for r in batched] == want
    alone = [engine.generate(t, i, chat=False, max_new_tokens=8).token_ids for t, i in zip(texts, images)]
    assert alone == want
    assert len({tuple(w) for w in want}) > 20, "the oracle's answers do not depend on the prompt"


def test_chat_template_equals_transformers(tiny_engine):
    engine, hf = tiny_engine
    picture = tiny.picture(random.Random(3))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2 w3"}]}]
    text = engine.model.processor.apply_chat_template(messages, add_generation_prompt=True)
    want = tiny.hf_greedy(hf, engine.model.processor, text, [picture], 8)
    assert engine.generate("w1 w2 w3", picture, max_new_tokens=8).token_ids == want
    assert engine.generate("<image> w1 w2 w3", [picture], max_new_tokens=8).token_ids == want
    assert engine.generate(messages, picture, max_new_tokens=8).token_ids == want
    messages[0]["content"][0]["image"] = picture
    assert engine.generate(messages, max_new_tokens=8).token_ids == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("decoder", "vision"), FAMILIES)
def test_logits_error_is_at_most_twice_torchs(decoder, vision, dtype):
    engine, low = build(decoder, vision, dtype)
    exact = tiny.model(decoder, vision).to(dtype).double()
    texts, images = tiny.prompts(seed=5, n=6)
    ours, theirs = logits_errors(engine, low, exact, texts, images)
    assert ours <= 2 * theirs


def test_cached_decoding_equals_recomputation(tiny_engine):
    engine, _ = tiny_engine
    engine.policy = KeepAll()
    texts, images = tiny.prompts(seed=9, n=3, images=(1, 2))
    for text, pictures in zip(texts, images):
        prompt = engine.model.prepare(engine.model.tokenize([text], [pictures]))[0]
        tokens = [7, 30, 31, 55]
        with engine.prefill(prompt.inputs_embeds, prompt.visual) as running:
            for token in tokens:
                running.step([token])
            stepped = running.logits
        embeds = torch.cat((prompt.inputs_embeds, engine.model.decoder.embed(torch.tensor(tokens))))
        visual = torch.cat((prompt.visual, torch.zeros(len(tokens), dtype=torch.bool)))
        with engine.prefill(embeds, visual) as running:
            torch.testing.assert_close(stepped, running.logits, rtol=1e-4, atol=1e-4)


def test_exit_after_the_last_layer_is_keep_all_bit_for_bit(tiny_engine):
    engine, _ = tiny_engine
    texts, images = tiny.prompts(seed=2, n=8)
    prepared = engine.model.prepare(engine.model.tokenize(texts, images))
    entry = [p.inputs_embeds for p in prepared], [p.visual for p in prepared]
    logits = []
    for policy in (KeepAll(), FixedExit(engine.model.shape.num_layers - 1)):
        engine.policy = policy
        with engine.prefill(*entry) as running:
            logits.append(running.logits)
    assert torch.equal(*logits)
    engine.policy = KeepAll()


def test_positions_with_gaps_are_used_as_given(tiny_engine):
    engine, hf = tiny_engine
    engine.policy = KeepAll()
    embeds, visual, _ = tiny.embed(hf, engine.model.processor, "w1 <image> w2 w3", [tiny.picture(random.Random(1))])
    positions = torch.arange(len(embeds)) * 3 + 1
    want = tiny.masked_logits(hf, embeds, tiny.see_all(len(embeds)), positions)
    with engine.prefill(embeds, visual, positions) as running:
        torch.testing.assert_close(running.logits[0], want[-1], rtol=1e-4, atol=1e-4)
        assert running.positions.tolist() == [positions[-1] + 1]


@pytest.mark.parametrize("policy", [KeepAll(), FixedExit(1)])
def test_a_single_sequence_may_have_any_strides(tiny_engine, policy):
    """It is copied to no batch, where it would get those of the kernels."""
    engine, oracle = tiny_engine
    embeds, visual, _ = tiny.embed(oracle, engine.model.processor, "w5 <image> w6 w7", [tiny.picture(random.Random(4))])
    positions = torch.arange(2 * len(embeds), dtype=torch.int32)[::2]
    with engine.prefill([embeds] * 2, [visual] * 2, [positions.contiguous()] * 2, policy=policy) as running:
        want = running.logits[:1]
    turned = embeds.t().contiguous().t()
    assert not turned.is_contiguous() and not positions.is_contiguous()
    with engine.prefill(turned, visual, positions, policy=policy) as running:
        torch.testing.assert_close(running.logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotations_are_float32_in_every_dtype(dtype):
    """Angles of hundreds of radians: in the model's 16 bits neighbours of a position would turn alike."""
    engine, hf = build("llama", dtype=dtype)
    rotary = hf.model.language_model.rotary_emb
    angles = torch.arange(256).double()[:, None] * rotary.inv_freq.double()
    table = engine.model.decoder.cos_sin
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), torch.cat((angles.cos(), angles.sin()), -1), rtol=0, atol=5e-5)
