"""Generation options mean what transformers means by them; a sequence's draws depend on its seed alone."""

import copy
import math
import random

import numpy
import pytest
import torch
import transformers
from tokenizers import processors

from dyvte_engine import Engine, EngineConfig, InvalidArgumentError, KeepAll, Request
from dyvte_engine.models import VisionLanguageModel
from dyvte_engine.models.random_model import byte_processor
from dyvte_engine.runtime import kv_cache, running, sampling, scheduler
from dyvte_engine.runtime import options as generation_options
from dyvte_engine.runtime.options import MergedConfigs
from dyvte_engine.runtime.sampling import (
    Sampler,
    StopRules,
    answer_limit,
    check_seed,
    end_tokens,
    merge_config,
    most_likely,
    sequence_seeds,
)
from tests import tiny
from tests.engine.conftest import build

CPU = torch.device("cpu")
ALWAYS = [
    {"sequence_bias": {(7,): 6.0, (9, 8): -3.0, (11,): float("-inf")}},
    {"sequence_bias": [[[7], 6.0], [[9, 8], -3.0]]},
    {"encoder_repetition_penalty": 1.5},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[w] for w in range(9, 60)] + [[60, 61]]},
    {"min_length": 34},
    {"min_new_tokens": 6},
    {"min_new_tokens": 2, "min_length": 200},
    {"forced_bos_token_id": 20},
    {"forced_eos_token_id": 3},
    {"forced_eos_token_id": [3, 2]},
    {"remove_invalid_values": True},
    {"exponential_decay_length_penalty": (2, 1.6)},
    {"exponential_decay_length_penalty": [0, 3]},
    {"suppress_tokens": list(range(40, 90))},
    {"begin_suppress_tokens": list(range(9, 90))},
    {"watermarking_config": transformers.WatermarkingConfig(bias=4.0, context_width=2, seeding_scheme="selfhash")},
    {"watermarking_config": transformers.SynthIDTextWatermarkingConfig(ngram_len=3, keys=[11, 5, 8, 900])},
    {"renormalize_logits": True},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "begin_suppress_tokens": [10], "forced_eos_token_id": 5},
]
SAMPLING = [
    {"temperature": 0.4},
    {"temperature": 2.0, "top_k": 7},
    {"top_k": 0, "top_p": 0.7},
    {"min_p": 0.05},
    {"top_h": 0.5},
    {"typical_p": 0.6},
    {"epsilon_cutoff": 0.02},
    {"eta_cutoff": 0.05},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 0.001},
    {
        "eta_cutoff": 0.01,
        "repetition_penalty": 1.2,
        "renormalize_logits": True,
        "watermarking_config": transformers.WatermarkingConfig(bias=3.0),
    },
]


def known(options):
    """Whether the installed transformers has all of these options: top_h came with a later release."""
    return all(hasattr(transformers.GenerationConfig(), name) for name in options)


@pytest.fixture
def engine(tiny_engine):
    tiny_engine[0].policy = KeepAll()
    return tiny_engine[0]


def scores_of_generate(hf, ids, sampled, options, **inputs):
    """transformers' own tokens, logits [vocab] and processed scores [vocab] of every step."""
    torch.manual_seed(len(ids))
    asked = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, do_sample=sampled)
    out = hf.generate(input_ids=torch.tensor([ids]), max_new_tokens=9, **asked, **copy.deepcopy(options), **inputs)
    return out.sequences[0, len(ids) :].tolist(), [x[0] for x in out.logits], [x[0] for x in out.scores]


def check_scores(hf, ids, sampled, options, **inputs):
    """Every step's scores as transformers processes them; returns the number of steps, and of those it changed."""
    tokens, logits, want = scores_of_generate(hf, ids, sampled, options, **inputs)
    config = merge_config(hf.generation_config, None, {**options, "do_sample": sampled, "max_new_tokens": 9})
    sampler = Sampler(config, ids, 0, end_tokens(config, None), CPU)
    for step, (x, scores) in enumerate(zip(logits, want)):
        so_far = ids + tokens[:step]
        torch.testing.assert_close(sampler.scores(x, so_far), scores, rtol=1e-5, atol=1e-6)
    return len(tokens), sum(not torch.equal(x, scores) for x, scores in zip(logits, want))


@pytest.mark.parametrize(
    ("sampled", "options"),
    [(False, o) for o in ALWAYS] + [(True, o) for o in ALWAYS[::4] + SAMPLING],
    ids=lambda value: str(value)[:60],
)
def test_scores_of_every_step_equal_generate(tiny_engine, engine, sampled, options):
    if not known(options):
        pytest.skip("the installed transformers does not have it")
    hf, processor = tiny_engine[1], engine.model.processor
    texts, images = tiny.prompts(seed=69, n=3)
    steps = changed = 0
    for text, pictures in zip(texts, images):
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
        ids = inputs.pop("input_ids")[0].tolist()
        of_prompt = check_scores(hf, ids, sampled, options, **inputs)
        steps, changed = steps + of_prompt[0], changed + of_prompt[1]
    assert steps >= 6
    inert = {"remove_invalid_values", "forced_bos_token_id"}.intersection(options)  # on such prompts and logits
    assert sampled or bool(changed) != bool(inert)


@pytest.mark.parametrize(
    "options", [{"forced_bos_token_id": 20}, {"forced_bos_token_id": 20, "begin_suppress_tokens": [7]}]
)
def test_forced_first_token_of_a_prompt_of_one(tiny_engine, options):
    tokens = scores_of_generate(tiny_engine[1], [1], False, options)[0]
    assert tokens[0] == 20
    assert check_scores(tiny_engine[1], [1], False, options)[1] >= 1


def test_invalid_values_are_removed():
    logits = torch.tensor([0.0, float("nan"), float("inf"), float("-inf"), 2.0])
    config = merge_config(transformers.GenerationConfig(), None, {"remove_invalid_values": True})
    got = Sampler(config, [1], 0, [], CPU).scores(logits, [1])
    assert torch.equal(got, transformers.InfNanRemoveLogitsProcessor()(None, logits[None].clone())[0])
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("source", "options"),
    [("keyword", o) for o in ALWAYS] + [(s, o) for s in ("generation_config", "checkpoint") for o in ALWAYS[2::4]],
    ids=lambda value: str(value)[:60],
)
def test_greedy_answers_equal_generate(tiny_engine, engine, options, source, monkeypatch):
    """Wherever the options come from."""
    hf = tiny_engine[1]
    texts, images = tiny.prompts(seed=70, n=3)
    want = [
        tiny.hf_greedy(hf, engine.model.processor, t, i, 8, **copy.deepcopy(options)) for t, i in zip(texts, images)
    ]
    given = transformers.GenerationConfig(**copy.deepcopy(options), max_new_tokens=8)
    before = copy.deepcopy(given)
    if source == "keyword":
        passed = {**options, "max_new_tokens": 8}
    elif source == "generation_config":
        passed = {"generation_config": given}
    else:
        passed = {}
        given.eos_token_id = engine.model.hf.generation_config.eos_token_id
        monkeypatch.setattr(engine.model.hf, "generation_config", given)
    got = engine.generate(texts, images, chat=False, **passed)
    assert [r.token_ids for r in got] == want
    if source == "generation_config":
        assert vars(given).keys() == vars(before).keys() and given.max_new_tokens == 8 and given.eos_token_id is None


def test_plain_is_argmax():
    base = transformers.GenerationConfig(eos_token_id=2)
    for options, plain in (
        ({}, True),
        ({"temperature": 0.5, "min_new_tokens": 0, "suppress_tokens": []}, True),
        ({"do_sample": True}, False),
        ({"do_sample": True, "top_k": 0}, False),
        ({"min_new_tokens": 1}, False),
    ):
        assert Sampler(merge_config(base, None, options), [1], 0, [2], CPU).plain is plain, options


def test_what_nobody_looks_at_is_not_copied_to_the_device(monkeypatch):
    """One greedy request alone: neither its ids nor, when it has ended, the numbers of those who stay (none)."""
    engine, _ = build(picture_cache=0, prefix_cache=0)
    picture = tiny.picture(random.Random(4))
    copied = []
    for module in (sampling, kv_cache, running, scheduler):
        if hasattr(module, "to_device"):

            def count(values, *where, to=module.to_device):
                return copied.append(list(values)) or to(values, *where)

            monkeypatch.setattr(module, "to_device", count)
    prompt = engine.tokenize("<image> w1 w2", picture, chat=False)[0]
    engine.generate("<image> w1 w2", picture, chat=False, max_new_tokens=1)
    assert prompt not in copied and [] not in copied
    engine.generate("<image> w1 w2", picture, chat=False, max_new_tokens=1, repetition_penalty=1.5)
    assert prompt in copied


def test_max_length_counts_the_prompt(tiny_engine, engine):
    hf, processor = tiny_engine[1], engine.model.processor
    inputs = processor(text=["w1 w2 w3"], return_tensors="pt")
    want = hf.generate(**inputs, max_length=8, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    got = engine.generate("w1 w2 w3", chat=False, max_length=8, eos_token_id=[])
    assert (got.token_ids, got.finish_reason) == (want, "length")
    assert len(engine.generate("w1 w2 w3", chat=False, max_length=200, eos_token_id=[]).token_ids) == 197
    assert len(engine.generate("w1 w2 w3", chat=False, max_length=8, max_new_tokens=2, eos_token_id=[]).token_ids) == 2
    with pytest.raises(InvalidArgumentError, match="max_length"):
        engine.generate("w1 w2 w3", chat=False, max_length=3)


def test_draws_follow_transformers_distribution(engine):
    """4,000 draws from one row against the probabilities that transformers' generate works with."""
    logits = torch.randn(128, generator=torch.Generator().manual_seed(0)) * 2
    options = dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)
    config = merge_config(transformers.GenerationConfig(), None, options)
    scores = logits[None] / 0.8
    for warper in (
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.01),
    ):
        scores = warper(None, scores)
    want = scores.softmax(-1)[0]
    sampler = Sampler(config, [1], 0, [2], CPU)
    counts = torch.zeros(128)
    for _ in range(4000):
        counts[sampler(logits, [1])] += 1
    assert (counts[want == 0] == 0).all()
    error = (counts / 4000 - want).abs() / (want * (1 - want) / 4000).sqrt().clamp_min(1e-3)
    assert error.max() < 4.5  # standard deviations


def test_unset_top_k_is_transformers_default():
    """generate() samples from the 50 likeliest tokens unless told otherwise."""
    config = merge_config(transformers.GenerationConfig(), None, {"do_sample": True})
    sampler = Sampler(config, [1], 0, [2], CPU)
    logits = torch.linspace(0, 0.01, 200)
    assert min(sampler(logits, [1]) for _ in range(300)) >= 150


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


def states():
    name, keys, *place = numpy.random.get_state()
    return torch.get_rng_state().tolist(), (name, keys.tolist(), *place), random.getstate()


def test_global_random_states_are_not_touched():
    """Neither read (the answers are the same whatever they are) nor written."""
    answers = []
    for seed in (1, 2):
        hf, processor = tiny.model(), tiny.processor()
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        random.seed(seed)
        before = states()
        engine = build_around(hf, processor)
        options = dict(do_sample=True, temperature=2.0, watermarking_config={"bias": 1.0}, max_new_tokens=8)
        answers.append(engine.generate("w1 w2", chat=False, seed=11, eos_token_id=[], **options).token_ids)
        assert states() == before
    assert answers[0] == answers[1]


def build_around(hf, processor):
    config = EngineConfig(CPU, torch.float32, max_len=64)
    return Engine(VisionLanguageModel(hf, processor, "tiny", 64), config)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed):
    config = merge_config(transformers.GenerationConfig(), None, {"do_sample": True})
    logits = torch.linspace(0, 1, 200)
    first, again = (Sampler(config, [1], check_seed(seed), [2], CPU) for _ in range(2))
    assert [int(first(logits, [1])) for _ in range(5)] == [int(again(logits, [1])) for _ in range(5)]


@pytest.mark.parametrize("seed", [True, 1.0, "1", None, float("nan"), [1], 2**64, -(2**63) - 1, torch.tensor(3)])
def test_bad_seeds(seed):
    with pytest.raises(InvalidArgumentError, match="seed"):
        sequence_seeds(seed, 2)


def test_seeds_of_several_sequences():
    assert sequence_seeds(5, 3) == [5, 6, 7]
    assert sequence_seeds((3, 3), 2) == [3, 3]
    assert sequence_seeds(range(4), 4) == [0, 1, 2, 3]
    for seed in ([1, 2.0], [1], 2**64 - 1, [True, 1]):
        with pytest.raises(InvalidArgumentError, match="seed"):
            sequence_seeds(seed, 2)


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


def test_end_token_at_the_last_place(engine):
    """The answer is whole: "stop", not "length"; one place earlier it was cut."""
    tokens = engine.generate("w1 w2 w3", chat=False, max_new_tokens=6, eos_token_id=[]).token_ids
    last = next(n for n in range(1, 6) if tokens[n] not in tokens[:n])
    for budget, reason in ((last + 2, "stop"), (last + 1, "stop"), (last, "length")):
        got = engine.generate("w1 w2 w3", chat=False, max_new_tokens=budget, eos_token_id=[128, tokens[last]])
        assert (got.finish_reason, got.token_ids) == (reason, tokens[: min(budget, last + 1)])


def test_several_stop_strings(tiny_engine, engine):
    tokenizer = engine.model.processor.tokenizer
    tokens = engine.generate("w1 w2 w3", chat=False, max_new_tokens=8, eos_token_id=[]).token_ids
    later, sooner = tokenizer.decode(tokens[5]), tokenizer.decode(tokens[3])
    options = dict(stop_strings=[later, sooner, "w1w2w3"], eos_token_id=[])
    want = tiny.hf_greedy(
        tiny_engine[1],
        engine.model.processor,
        "w1 w2 w3",
        [],
        8,
        tokenizer=tokenizer,
        **options | {"eos_token_id": 128},
    )
    got = engine.generate("w1 w2 w3", chat=False, max_new_tokens=8, **options)
    assert (got.finish_reason, got.token_ids) == ("stop_string", want)
    assert len(want) <= 4


@pytest.mark.parametrize("stops", ["lo, w", ["never", "o, wor", "zzz"], ["d!"], ["ld", "world!", "w"]])
def test_stop_strings_span_tokens(stops):
    """One token a byte: the end is where the text first ends in a stop string."""
    tokenizer = byte_processor(tiny_byte_config()).tokenizer
    ids, text = tokenizer("So: hello, world!", add_special_tokens=False).input_ids, "So: hello, world!"
    assert len(ids) == len(text)
    config = merge_config(transformers.GenerationConfig(), None, {"stop_strings": stops})
    rules = StopRules(config, tokenizer, [], 4, 100)
    strings = tuple([stops] if isinstance(stops, str) else stops)
    for n in range(5, len(ids) + 1):
        assert rules.reason(ids[:n], ids[4:n]) == ("stop_string" if text[:n].endswith(strings) else None)


def tiny_byte_config():
    config = tiny.model(layers=1).config
    config.text_config.vocab_size = 300
    return config


def test_max_time(engine):
    """Looked at after each token, as transformers does: the first comes in any case."""
    options = dict(chat=False, max_new_tokens=20, eos_token_id=[])
    got = engine.generate("w1 w2 w3", max_time=0, **options)
    assert (got.finish_reason, len(got.token_ids)) == ("time", 1)
    assert engine.generate("w1 w2 w3", max_time=1e9, **options).finish_reason == "length"


def test_order_of_reasons():
    config = merge_config(transformers.GenerationConfig(), None, {"max_time": 0.0, "stop_strings": "w3"})
    rules = StopRules(config, tiny.processor().tokenizer, [2], 1, 2)
    w3, other = 9 + 3, 9 + 4
    assert rules.reason([1, w3, 2], [w3, 2]) == "stop"
    assert rules.reason([1, other, w3], [other, w3]) == "stop_string"
    assert rules.reason([1, w3, other], [w3, other]) == "length"
    assert rules.reason([1, other], [other]) == "time"


@pytest.mark.parametrize("written", [True, False])
def test_one_begin_token(written):
    """The template or the tokenizer begins a prompt, not both."""
    processor = tiny.processor()
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = post
    processor.chat_template = ("{{ bos_token }} " if written else "") + tiny.TEMPLATE
    messages = [{"role": "user", "content": [{"type": "text", "text": "w1 w2"}]}]
    want = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, add_generation_prompt=True, tokenize=False
    )
    want = processor.tokenizer(want, add_special_tokens=not written).input_ids
    got = build_around(tiny.model(), processor).generate("w1 w2", max_new_tokens=1)
    assert got.stats.text_tokens == len(want)
    assert want.count(1) == 1


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


@pytest.mark.parametrize("bias", [{(5,): 1e9, (7,): -1e9}, {(5,): float("-inf")}])
@pytest.mark.parametrize("temperature", [1e-20, 1e20])
@pytest.mark.parametrize("penalty", [1e-4, 1e4])
def test_the_ends_of_all_ranges_together_leave_something_to_draw(bias, temperature, penalty):
    engine, _ = build()
    options = dict(do_sample=True, temperature=temperature, repetition_penalty=penalty, sequence_bias=bias)
    options |= dict(encoder_repetition_penalty=penalty, no_repeat_ngram_size=1, min_new_tokens=8, max_new_tokens=8)
    result = engine.generate("w1 w2 w1", chat=False, **options)
    assert len(set(result.token_ids)) == result.stats.new_tokens == 8
    for name, value in (("temperature", 9 * temperature**1.1), ("repetition_penalty", 9 * penalty**1.3)):
        with pytest.raises(InvalidArgumentError, match=f"{name} is .*; accepted: a number from 1e-"):
            engine.generate("w1", chat=False, **options | {name: value})


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_callers_default_device_has_no_say(device):
    engine, _ = build()
    options = dict(max_new_tokens=6, do_sample=True, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=2)
    call = lambda: engine.generate("w1 w2", tiny.picture(random.Random(0)), stop_strings=["w5"], **options)  # noqa: E731
    want = call().token_ids
    with torch.device(device):
        assert call().token_ids == want


def test_where_no_token_is_left_the_request_is_refused_and_others_are_answered():
    engine, _ = build()
    other = engine.submit(Request("w1 w2", chat=False, options={"max_new_tokens": 6}))
    with pytest.raises(InvalidArgumentError, match="the options leave no token to draw"):
        engine.generate("w1", chat=False, do_sample=True, suppress_tokens=list(range(129)))
    endless = dict(exponential_decay_length_penalty=(0, 1e4), suppress_tokens=[2], max_new_tokens=90)
    with pytest.raises(InvalidArgumentError, match=r"the options overflow after [0-9]+ tokens"):
        engine.generate("w1", chat=False, **endless)
    assert other.result().token_ids == engine.generate("w1 w2", chat=False, max_new_tokens=6).token_ids
    engine.check_integrity()


ODD = [True, "3", float("nan"), float("inf"), -1, [], [-1], [[]], {}, object()]


@pytest.mark.parametrize(
    "name",
    [
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
        *("encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "max_new_tokens"),
        *("max_length", "min_new_tokens", "min_length", "max_time", "sequence_bias", "bad_words_ids"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    ],
)
def test_odd_values_are_named(name):
    for value in ODD:
        with pytest.raises(InvalidArgumentError, match=name):
            merge_config(transformers.GenerationConfig(), None, {name: value, "do_sample": True})


@pytest.mark.parametrize("name", ["top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"])
def test_a_whole_share_is_one_of_those_accepted(name):
    if known([name]):
        merge_config(transformers.GenerationConfig(), None, {name: 1.0, "do_sample": True})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"stop_strings": []}, "stop_strings"),
        ({"stop_strings": ["a", ""]}, "stop_strings"),
        ({"stop_strings": "\N{SNOWMAN}"}, "stop_strings"),
        ({"eos_token_id": 1.0}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": 129}, "eos_token_id.*129"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"suppress_tokens": [5, 500]}, "suppress_tokens.*129"),
        ({"bad_words_ids": [[5], [6, 129]]}, "bad_words_ids.*129"),
        ({"sequence_bias": {(5, 129): 1.0}}, "sequence_bias.*129"),
        ({"sequence_bias": [[[129], 1.0]]}, "sequence_bias.*129"),
        ({"sequence_bias": {(5,): float("nan")}}, "sequence_bias"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id"),
        ({"watermarking_config": {"greenlist_ratio": 3}}, "watermarking_config"),
        ({"watermarking_config": {"colour": "green"}}, "watermarking_config"),
        ({"renormalize_logits": 1}, "renormalize_logits"),
        ({"beams": 3}, "beams"),
        ({"generation_config": transformers.GenerationConfig(num_beams=4)}, "num_beams"),
        ({"generation_config": {"top_k": 3}}, "generation_config"),
        ({"generation_config": transformers.GenerationConfig(do_sample=True, temperature=-1.0)}, "temperature"),
        ({"generation_config": transformers.GenerationConfig(top_kk=3)}, "top_kk"),
        ({"generation_config": transformers.GenerationConfig(eos_token_id=129)}, "eos_token_id"),
        (
            {"generation_config": transformers.GenerationConfig(output_scores=True, return_dict_in_generate=True)},
            "scores",
        ),
        ({"use_cache": False}, "use_cache"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"seed": [1, 2]}, "seed"),
    ],
)
def test_bad_options_are_named(engine, options, name):
    with pytest.raises(InvalidArgumentError, match=name):
        engine.generate("w1", chat=False, **options)


NOT_SERVED = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "guidance_scale": 1.5,
    "token_healing": True,
    "synced_gpus": True,
}


@pytest.mark.parametrize("name", NOT_SERVED)
@pytest.mark.parametrize("source", ["keyword", "generation_config", "checkpoint"])
def test_other_searches_are_refused(name, source):
    base, given, options = transformers.GenerationConfig(), None, {}
    if source == "keyword":
        options = {name: NOT_SERVED[name]}
    else:
        config = transformers.GenerationConfig(do_sample=False, top_k=4)
        setattr(config, name, NOT_SERVED[name])
        base, given = (base, config) if source == "generation_config" else (config, None)
    with pytest.raises(InvalidArgumentError, match=name):
        merge_config(base, given, options)


def test_options_of_a_newer_release_are_refused(monkeypatch):
    """One that GenerationConfig has and this project has never heard of."""

    class Newer(transformers.GenerationConfig):
        def __init__(self, **kwargs):
            self.surprise, self.habit = kwargs.pop("surprise", 0.0), kwargs.pop("habit", True)
            super().__init__(**kwargs)

    monkeypatch.setattr(generation_options.transformers, "GenerationConfig", Newer)
    merge_config(Newer(), Newer(), {})
    for base, given in ((Newer(surprise=1.0), None), (Newer(), Newer(surprise=1.0))):
        with pytest.raises(InvalidArgumentError, match="surprise"):
            merge_config(base, given, {})
    with pytest.raises(InvalidArgumentError, match="habit"):
        merge_config(Newer(habit=False), None, {})


def test_checkpoints_own_values_without_effect_are_accepted():
    """As found in published checkpoints; what has no effect there is no reason to refuse the model."""
    base = transformers.GenerationConfig(
        bos_token_id=1,
        eos_token_id=[2, 500],
        pad_token_id=0,
        max_length=4096,
        num_beams=1,
        use_cache=True,
        early_stopping=True,
        length_penalty=1.2,
        num_beam_groups=1,
        chat_format="chatml",
        output_scores=True,
        num_assistant_tokens=5,
        guidance_scale=1.0,
    )
    for name in ("temperature", "top_k", "top_p", "penalty_alpha", "repetition_penalty"):
        setattr(base, name, None)
    merge_config(base, None, {}, vocab_size=100)
    base.temperature, base.top_p, base.top_k = 0.0, -1.0, 50  # only sampling looks at them
    base.return_dict_in_generate = True
    before = copy.deepcopy(vars(base))
    merged = merge_config(base, None, {"max_new_tokens": 3, "num_beams": 1, "synced_gpus": False}, vocab_size=100)
    assert vars(base) == before
    assert (merged.max_new_tokens, end_tokens(merged, None)) == (3, [2, 500])
    merge_config(base, copy.deepcopy(base), {}, vocab_size=100)
    with pytest.raises(InvalidArgumentError, match="temperature"):
        merge_config(base, None, {"do_sample": True})


def test_special_tokens_of_the_checkpoint_stay():
    """A generation_config replaces the checkpoint's, which still knows how its answers end."""
    base = transformers.GenerationConfig(eos_token_id=[7, 2], pad_token_id=0, temperature=0.3)
    merged = merge_config(base, transformers.GenerationConfig(do_sample=True), {})
    assert (end_tokens(merged, None), merged.pad_token_id) == ([2, 7], 0)
    assert merged.temperature == transformers.GenerationConfig().temperature
    tokenizer = tiny.processor().tokenizer
    assert end_tokens(merge_config(transformers.GenerationConfig(), None, {}), tokenizer) == [2]
    assert end_tokens(merge_config(base, None, {"eos_token_id": []}), tokenizer) == []
    assert end_tokens(merge_config(base, None, {"eos_token_id": 9}), tokenizer) == [9]


def test_answer_limit():
    base = transformers.GenerationConfig()
    for options, limit in (({}, None), ({"max_new_tokens": 3}, 3), ({"max_length": 20}, 13)):
        assert answer_limit(merge_config(base, None, options), 7) == limit
    both = {"max_length": 20, "max_new_tokens": 3}
    assert answer_limit(merge_config(base, None, both), 30) == 3
    rules = StopRules(merge_config(base, None, {"max_length": 9}), None, [], 7, 100)
    assert [rules.reason([1] * n, [1] * (n - 7)) for n in (8, 9)] == [None, "length"]


def test_merged_options_are_kept_while_all_is_the_same():
    merged, base = MergedConfigs(), transformers.GenerationConfig(eos_token_id=[2, 3])
    first = merged(base, None, {"top_k": 1}, 90)
    assert merged(base, None, {"top_k": 1}, 90) is first
    with pytest.raises(InvalidArgumentError, match="top_k is True"):
        merged(base, None, {"top_k": True}, 90)
    with pytest.raises(InvalidArgumentError, match=r"top_k is 1\.0"):
        merged(base, None, {"top_k": 1.0}, 90)
    assert merged(base, None, {"top_k": 2}, 90).top_k == 2
    before = merged(base, None, {}, 90)
    base.eos_token_id.append(4)
    assert merged(base, None, {}, 90).eos_token_id == [2, 3, 4] and before.eos_token_id == [2, 3]
    words = [[7]]
    one = merged(base, None, {"bad_words_ids": words}, 90)
    words.append([8])
    assert one.bad_words_ids == [[7]] and merged(base, None, {"bad_words_ids": words}, 90).bad_words_ids == [[7], [8]]
    assert merged(base, transformers.GenerationConfig(top_k=9), {}, 90).top_k == 9


def test_the_most_likely_tokens_and_whether_logits_are_finite():
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [[1.0, 3.0, 2.0], [nan, 1.0, 2.0], [-inf, -inf, 0.5], [-inf] * 3, [1.0, inf, 0.0], [4.0, 4.0, 1.0]]
    )
    tokens, read = most_likely(logits)
    assert tokens.dtype == torch.int64 and torch.equal(tokens[[0, 2, 5]], logits.argmax(1)[[0, 2, 5]])
    assert read() == [1, -1, 2, -1, -1, 0]
    tokens[0] = 2  # sampled
    tokens[1] = 0
    assert read() == [2, -1, 2, -1, -1, 0]
    assert most_likely(logits[:0])[1]() == []
