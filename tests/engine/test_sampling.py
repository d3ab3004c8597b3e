"""Sampling options mean what transformers means by them; a sequence's draws do not depend on its batch."""

import pytest
import torch
import transformers

from dyvte_engine import InvalidArgumentError, KeepAll
from dyvte_engine.runtime.sampling import Sampler
from tests import tiny

OPTIONS = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
]


@pytest.fixture
def engine(tiny_engine):
    tiny_engine[0].policy = KeepAll()
    return tiny_engine[0]


@pytest.mark.parametrize("options", OPTIONS)
def test_greedy_with_penalties_equals_generate(tiny_engine, engine, options):
    hf = tiny_engine[1]
    texts, images = tiny.prompts(seed=70, n=10)
    want = [tiny.hf_greedy(hf, engine.model.processor, t, i, 10, **options) for t, i in zip(texts, images)]
    got = engine.generate(texts, images, chat=False, max_new_tokens=10, **options)
    assert [r.token_ids for r in got] == want


def test_draws_follow_transformers_distribution(engine):
    """4,000 draws from one row against the probabilities that transformers' generate works with."""
    logits = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)) * 2
    config = transformers.GenerationConfig(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)
    scores = logits.clone() / 0.8
    for warper in (
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.01),
    ):
        scores = warper(None, scores)
    want = scores.softmax(-1)[0]
    sampler = Sampler(config, [[1]], [0], [2], torch.device("cpu"))
    counts = torch.zeros(128)
    for _ in range(4000):
        counts[sampler(logits, [0], [[1]])] += 1
    assert (counts[want == 0] == 0).all()
    error = (counts / 4000 - want).abs() / (want * (1 - want) / 4000).sqrt().clamp_min(1e-3)
    assert error.max() < 4.5  # standard deviations


def test_unset_top_k_is_transformers_default():
    """generate() samples from the 50 likeliest tokens unless told otherwise."""
    config = transformers.GenerationConfig(do_sample=True)
    sampler = Sampler(config, [[1]], [0], [2], torch.device("cpu"))
    logits = torch.linspace(0, 0.01, 200)[None]
    assert min(sampler(logits, [0], [[1]])[0] for _ in range(300)) >= 150


def test_seeds(engine):
    texts, images = tiny.prompts(seed=71, n=9)
    options = dict(chat=False, max_new_tokens=10, do_sample=True, temperature=1.5)
    batch = [r.token_ids for r in engine.generate(texts, images, seed=5, **options)]
    assert batch == [r.token_ids for r in engine.generate(texts, images, seed=5, **options)]
    assert batch == [
        engine.generate(t, i, seed=5 + n, **options).token_ids for n, (t, i) in enumerate(zip(texts, images))
    ]
    assert batch != [r.token_ids for r in engine.generate(texts, images, seed=6, **options)]
    same = engine.generate([texts[0]] * 2, [images[0]] * 2, seed=[3, 3], **options)
    assert same[0].token_ids == same[1].token_ids


def test_stop_strings_and_finish_reasons(tiny_engine, engine):
    hf, processor = tiny_engine[1], engine.model.processor
    texts, images = tiny.prompts(seed=72, n=12)
    plain = engine.generate(texts, images, chat=False, max_new_tokens=8)
    stopped_short = 0
    for text, pictures, result in zip(texts, images, plain):
        ended = result.token_ids[-1] == 2
        assert result.finish_reason == ("stop" if ended else "length")
        assert len(result.token_ids) == result.stats.new_tokens <= 8
        if len(result.token_ids) < 4:
            continue
        stop = processor.tokenizer.decode(result.token_ids[2])
        want = tiny.hf_greedy(hf, processor, text, pictures, 8, stop_strings=[stop], tokenizer=processor.tokenizer)
        stopped = engine.generate(text, pictures, chat=False, max_new_tokens=8, stop_strings=[stop])
        assert stopped.token_ids == want
        assert stopped.finish_reason == "stop_string"
        stopped_short += 1
    assert stopped_short >= 6


def test_stream_is_generate_in_pieces(engine):
    texts, images = tiny.prompts(seed=73, n=11)  # two batches
    whole = engine.generate(texts, images, chat=False, max_new_tokens=7)
    pieces, tokens, results = [""] * 11, [[] for _ in range(11)], {}
    for chunk in engine.stream(texts, images, chat=False, max_new_tokens=7):
        assert chunk.index not in results, "a chunk after the last"
        pieces[chunk.index] += chunk.text
        tokens[chunk.index].append(chunk.token_id)
        if chunk.result:
            results[chunk.index] = chunk.result
    assert pieces == [r.text for r in whole]
    assert tokens == [r.token_ids for r in whole]
    assert [results[i].text for i in range(11)] == pieces


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"beams": 3}, "beams"),
        ({"generation_config": transformers.GenerationConfig(num_beams=4)}, "num_beams"),
        ({"seed": [1, 2]}, "seed"),
    ],
)
def test_bad_options_are_named(engine, options, name):
    with pytest.raises(InvalidArgumentError, match=name):
        engine.generate("w1", chat=False, **options)
