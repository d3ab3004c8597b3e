"""Another question about the same pictures: computed is its text, and the answer is a fresh engine's."""

import functools
import random

import pytest
import torch

from benchmarks.again import prefix_bytes
from dyvte_engine import (
    DivPrune,
    Downsample,
    DynamicExit,
    FastV,
    FixedExit,
    InvalidArgumentError,
    KeepAll,
    PyramidDrop,
    Random,
    Request,
    ToMe,
    VisionZip,
    compose,
)
from dyvte_engine.kernels import ops
from dyvte_engine.runtime import scheduler as scheduler_module
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_exit import random_heads
from tests.engine.traces import forbid_growing_claims

STATES = ("mean_visual", "last_visual", "mean_text", "last_text")
LAYERS, ROWS = 4, tiny.VISUAL_TOKENS
PICTURES = [tiny.picture(random.Random(seed)) for seed in range(4)]
BEGINNINGS = [  # up to the last picture: plain, with text before, with text between, two at once, three
    ("<image>", PICTURES[:1]),
    ("w1 w2 <image>", PICTURES[1:2]),
    ("w3 <image> w4 w5 w6 <image>", PICTURES[:2]),
    ("w1 <image> <image>", PICTURES[2:4]),
    ("<image> w9 <image> w8 <image>", PICTURES[1:4]),
]
QUESTIONS = ["w7", "w11 w12 w13", "w50 w51 w52 w53 w54 w55", "w60 w61"]


@functools.cache
def policies():
    return {
        "keep-all": KeepAll(),
        **{f"fixed {n}": FixedExit(n) for n in range(LAYERS)},
        "text": DynamicExit(random_heads(0), 0.5),
        "visual mean": DynamicExit(random_heads(1, ("mean_visual", "last_text")), 0.5),
        "visual last": DynamicExit(random_heads(2, ("last_visual", "mean_text")), 0.5),
        "all states": DynamicExit(random_heads(3, STATES, rms_eps=1e-5), 0.5, hysteresis=2),
    }


@functools.cache
def fresh():
    return build(prefix_cache=0, picture_cache=0, max_len=192)[0]


@functools.cache
def told(beginning, question, policy, n=5):
    text, pictures = BEGINNINGS[beginning]
    given = f"{text} {QUESTIONS[question]}"
    result = fresh().generate(given, pictures, chat=False, max_new_tokens=n, policy=policies()[policy])
    return figures(result)


def figures(result):
    return result.token_ids, result.stats.exit_layer, result.stats.tokens_per_layer, result.stats.kv_bytes


def ask(engine, beginning, question, policy, n=5):
    text, pictures = BEGINNINGS[beginning]
    given = f"{text} {QUESTIONS[question]}"
    result = engine.generate(given, pictures, chat=False, max_new_tokens=n, policy=policies()[policy])
    compared = 4 if engine.config.page_size == 16 else 3  # bytes of pages
    assert figures(result)[:compared] == told(beginning, question, policy, n)[:compared], (beginning, question, policy)
    return result.stats


@pytest.mark.parametrize("beginning", range(len(BEGINNINGS)))
@pytest.mark.parametrize(("order", "page_size"), [(0, 16), (1, 16), (2, 3)])
def test_every_policy_in_any_order(beginning, order, page_size, monkeypatch):
    forbid_growing_claims(monkeypatch)
    engine, _ = build(max_len=192, page_size=page_size)
    names = sorted(policies())
    random.Random(order).shuffle(names)
    for i, name in enumerate(names):
        stats = ask(engine, beginning, i % len(QUESTIONS), name)
        assert stats.prefix == ("miss" if i == 0 else "hit")
    engine.check_integrity()
    assert engine.pool.claimed == 0 and len(engine.runner.prefixes) == 1


def test_the_exits_differ_so_that_the_tests_see_something():
    exits = {told(b, q, name)[1] for b in range(5) for q in range(4) for name in policies()}
    assert exits == {None, 0, 1, 2} or exits == {None, 0, 1, 2, 3}
    assert len({tuple(told(b, q, "keep-all")[0]) for b in range(5) for q in range(4)}) > 12


@pytest.mark.parametrize(("first", "second"), [("fixed 0", "fixed 2"), ("fixed 2", "fixed 0"), ("fixed 1", "keep-all")])
def test_the_frontier_moves_as_deep_as_somebody_needs(first, second):
    engine, _ = build(max_len=192)
    depth = {"fixed 0": 0, "fixed 1": 1, "fixed 2": 2, "keep-all": 3}
    a, b = ask(engine, 2, 1, first), ask(engine, 2, 2, second)
    assert a.prefix_frontier == (-1, depth[first]) and a.rows_reused == [0] * LAYERS
    assert b.prefix_frontier == (depth[first], max(depth[first], depth[second]))
    visual, between, head = 2 * ROWS, 3, 1
    known = min(depth[first], depth[second])
    for layer in range(LAYERS):
        # Text before the pictures has gone through all layers; text between them depends on the exit.
        want = head + visual + between if layer <= known else head
        assert b.rows_reused[layer] == want, layer


@functools.cache
def looking():
    """Policies that take some visual tokens out, with the layer up to which they share; and what they share with."""
    own = {
        "fastv 1": (FastV(1, 0.5), 0),
        "fastv 3": (FastV(3, 0.4, "all"), 2),
        "pyramid": (PyramidDrop(), 0),
        "renumbered": (PyramidDrop((0.75, 0.5, 0.25), renumber=True), 0),
        "random": (Random(2, 0.5), 1),
        "best": (DynamicExit(random_heads(0), 0.5, min_layer=1, keep=3), 1),
        "both": (compose(FastV(2, 0.5), DynamicExit(random_heads(2, STATES), 0.5, min_layer=2)), 1),
        "pruned": (DivPrune(0.4), None),
        "coarse": (compose(Downsample(2), FixedExit(1)), None),
        "merged": (compose(ToMe(0.5), DynamicExit(random_heads(4, STATES), 0.5)), None),
        "merged, fastv": (compose(ToMe(0.5), FastV(2, 0.5)), 1),
        "zip": (VisionZip(6, 2), None),
    }
    return own | {name: (policy, None) for name, policy in policies().items()}


@pytest.mark.parametrize("beginning", [0, 2, 3])
def test_policies_that_look_share_up_to_the_layer_where_they_do(beginning, monkeypatch):
    forbid_growing_claims(monkeypatch)
    engine, _ = build(max_len=192)
    text, pictures = BEGINNINGS[beginning]
    names, deepest = [*looking()] * 2, {}
    random.Random(beginning).shuffle(names)
    for i, name in enumerate(names):
        policy, stop = looking()[name]
        options = dict(chat=False, max_new_tokens=4, policy=policy)
        given = f"{text} {QUESTIONS[i % len(QUESTIONS)]}"
        got, want = (e.generate(given, pictures, **options) for e in (engine, fresh()))
        assert figures(got) == figures(want), name
        if stop is not None:
            before, after = got.stats.prefix_frontier
            assert after >= stop and (name not in deepest or before >= stop)
            if name in deepest:
                known = got.stats.tokens_per_layer[0] - len(QUESTIONS[i % len(QUESTIONS)].split())
                assert got.stats.rows_reused == [known] * (stop + 1) + [0] * (LAYERS - 1 - stop)
        assert name not in deepest or got.stats.prefix == "hit"
        deepest[name] = got.stats.prefix_frontier
    engine.check_integrity()
    assert engine.pool.claimed == 0


def test_questions_asked_together_compute_their_prefix_once():
    engine, _ = build(max_len=192)
    text, pictures = BEGINNINGS[2]
    prompts = [f"{text} {q}" for q in QUESTIONS] + ["w1 w2 w3", f"{BEGINNINGS[1][0]} {QUESTIONS[0]}"]
    images = [pictures] * 4 + [None, BEGINNINGS[1][1]]
    for name in ("fixed 1", "text", "all states", "keep-all", "fixed 0"):
        got = engine.generate(prompts, images, chat=False, max_new_tokens=5, policy=policies()[name])
        want = fresh().generate(prompts, images, chat=False, max_new_tokens=5, policy=policies()[name])
        assert [figures(r) for r in got] == [figures(r) for r in want]
        if name == "fixed 1":
            assert [r.stats.prefix for r in got] == ["miss"] * 4 + ["no picture", "miss"]
            assert [r.stats.rows_reused[0] for r in got] == [0] + 3 * [1 + 2 * ROWS + 3] + [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decoder", "vision"), [("llama-gqa", "clip"), ("qwen2", "clip"), ("qwen3", "siglip")])
def test_logits_error_is_at_most_twice_torchs(decoder, vision, dtype):
    """Of a question behind a known prefix, and of one that takes it deeper, against the same weights in float64."""
    engine, low = build(decoder, vision, dtype, prefix_cache=1 << 24)
    exact = tiny.model(decoder, vision).to(dtype).double()
    ours, theirs = [], []
    for text, pictures in BEGINNINGS:
        for question, policy in zip(QUESTIONS, ("fixed:0", "fixed:2", "none", "none")):
            given = f"{text} {question}"
            embeds, visual, _ = tiny.embed(low, engine.model.processor, given, pictures)
            if policy == "none":
                hidden, bound = tiny.see_all(len(embeds)), engine.bind(KeepAll())
            else:
                bound, layer = engine.bind(policy), int(policy[-1])
                hidden = functools.partial(gone, visual, layer)
            want = tiny.masked_logits(exact, embeds.double(), hidden)[-1]
            ours.append(logits(engine, given, pictures, bound).double() - want)
            theirs.append(tiny.masked_logits(low, embeds, hidden)[-1].double() - want)
    assert len(engine.runner.prefixes) == len(BEGINNINGS)
    assert torch.stack(ours).norm() <= 2 * torch.stack(theirs).norm()


def gone(visual, exit_layer, layer):
    """After the exit text rows do not see visual ones."""
    return (~visual[:, None] & visual[None]) & (layer > exit_layer)


@torch.inference_mode()
def logits(engine, text, pictures, policy):
    runner, prompt = engine.runner, engine.model.tokenize([text], [pictures])[0]
    with runner.lock:
        (seen,) = runner.pictures.prepare([prompt], policy)
        cache = runner.cache(1, 1)
        prefill = runner.prefill(cache, [seen.prompt], policy, keys=[(prompt.input_ids, seen.digest, None)])
        while not prefill.done:
            prefill.advance(1)
        out = prefill.finish().logits[0]
        cache.close()
    return out


def test_nothing_known_is_bit_for_bit_the_plain_prefill():
    engine, _ = build(max_len=192)
    for text, pictures in BEGINNINGS:
        engine.runner.prefixes.clear()
        given = f"{text} {QUESTIONS[2]}"
        for name in ("keep-all", "fixed 1"):
            engine.runner.prefixes.clear()
            bound = engine.bind(policies()[name])
            with engine.prefill_prepared(engine.prepare(given, pictures, chat=False), bound) as running:
                assert torch.equal(running.logits[0], logits(engine, given, pictures, bound))


def test_other_pictures_or_words_before_are_another_prefix():
    engine, _ = build(max_len=192)
    for text, picture in (("<image>", 0), ("<image>", 1), ("w1 <image>", 0), ("w2 <image>", 0), ("<image> <image>", 0)):
        pictures = [PICTURES[picture]] * text.count("<image>")
        stats = engine.generate(f"{text} w3", pictures, chat=False, max_new_tokens=2).stats
        assert stats.prefix == "miss"
    assert len(engine.runner.prefixes) == 5


@pytest.mark.parametrize("page_size", [3, 16])
@pytest.mark.parametrize("name", ["keep-all", "fixed 0", "fixed 2", "pyramid", "fastv 3"])
@pytest.mark.parametrize("beginning", range(len(BEGINNINGS)))
def test_bytes_follow_the_formula_and_are_those_of_pool_and_tensors(beginning, name, page_size):
    engine, _ = build(max_len=192, page_size=page_size)
    text, pictures = BEGINNINGS[beginning]
    policy = looking()[name][0]
    for question in QUESTIONS[:2]:
        stats = engine.generate(f"{text} {question}", pictures, chat=False, max_new_tokens=3, policy=policy).stats
        (prefix,) = engine.runner.prefixes
        assert engine.runner.prefixes.bytes_held == prefix_bytes(engine, prefix)
        assert prefix.pages.count == engine.pool.idle == engine.pool.allocator.used_count
        assert stats.prefix_frontier is not None


def test_bytes_are_bounded_and_what_left_comes_again():
    sized, _ = build(max_len=192)
    ask(sized, 2, 0, "keep-all")
    one = sized.runner.prefixes.bytes_held
    engine, _ = build(max_len=192, prefix_cache=2 * one)
    rng = random.Random(5)
    for _ in range(40):
        ask(engine, rng.randrange(5), rng.randrange(4), rng.choice(sorted(policies())))
        assert engine.runner.prefixes.bytes_held <= 2 * one
    assert len(engine.runner.prefixes) >= 1
    tight, _ = build(max_len=192, prefix_cache=1)
    assert [ask(tight, 2, q, "keep-all").prefix for q in range(3)] == ["miss"] * 3
    assert tight.runner.prefixes.bytes_held == 0


def test_one_in_use_does_not_leave():
    """What a sequence reads stays until it ends, found or not; then the store keeps to its budget."""
    engine, _ = build(max_len=192, page_size=4, prefix_cache=1)
    pool, store = engine.pool, engine.runner.prefixes
    handle = begin(engine, "w1 <image> w2", PICTURES[:1], 40)
    for _ in range(5):
        engine._scheduler.step()
    (prefix,) = store._entries.values()
    shared = prefix.pages.count
    assert prefix.pages.users == 1 and shared == LAYERS * ((1 + ROWS) // 4) and pool.idle == 0
    store.trim()
    assert len(store) == 1
    engine.forget()
    assert len(store) == store.bytes_held == 0 and not prefix.pages.kept and prefix.pages.count == shared
    engine.runner.check_integrity()
    handle.cancel()
    assert prefix.pages.count == pool.claimed == pool.idle == pool.allocator.used_count == 0
    engine.check_integrity()


def test_what_cannot_share_says_so():
    text, pictures = "<image> w1 w2", PICTURES[:1]
    say = {}
    for name, options in (("off", dict(prefix_cache=0)), ("drop_early_kv", dict(drop_early_kv=True)), ("", {})):
        engine, _ = build(max_len=192, **options)
        for policy in (KeepAll(), FastV(1, 0.5), FixedExit(-1), DynamicExit(random_heads(0), 0.5, keep=2)):
            stats = engine.generate(text, pictures, chat=False, max_new_tokens=2, policy=policy).stats
            say[name, type(policy).__name__] = stats.prefix
            assert stats.prefix_frontier is None or name == ""
    assert {reason for (name, _), reason in say.items() if name} == {"off", "drop_early_kv"}
    assert [say["", p] for p in ("KeepAll", "FastV", "FixedExit", "DynamicExit")] == ["miss", "miss", "policy", "hit"]
    stats = engine.generate("w1 w2", chat=False, max_new_tokens=2).stats
    assert stats.prefix == "no picture" and stats.prefix_frontier is None


def test_a_prompt_that_ends_in_a_picture():
    """Its last row is what the next token is predicted from: it is computed anew."""
    engine, _ = build(max_len=192)
    for text, pictures in (("w1 <image>", PICTURES[:1]), ("<image> w2 <image>", PICTURES[:2])):
        for policy in ("fixed:1", "none", "fixed:0"):
            bound = KeepAll() if policy == "none" else policy
            options = dict(chat=False, max_new_tokens=4, policy=bound)
            got, want = (e.generate(text, pictures, **options) for e in (engine, fresh()))
            assert figures(got) == figures(want)
        assert got.stats.prefix == "hit"


def test_a_layer_that_fails_half_way_leaves_no_broken_prefix(monkeypatch):
    engine, _ = build(max_len=192)
    ask(engine, 2, 0, "fixed 0")
    calls, add = [], ops.silu_mul

    def failing(x):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return add(x)

    monkeypatch.setattr(ops, "silu_mul", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(engine, 2, 1, "keep-all")
    monkeypatch.undo()
    engine.check_integrity()
    assert len(engine.runner.prefixes) == engine.pool.claimed == engine.pool.idle == 0
    assert ask(engine, 2, 1, "keep-all").prefix == "miss"


def step_to_layer(scheduler, layers):
    """Until the group under way has passed so many."""
    while scheduler._group is None or scheduler._group._prefill is None or scheduler._group._prefill.next < layers:
        scheduler.step()
    assert scheduler._group._prefill.next == layers


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_who_is_cancelled_half_way_leaves_what_was_computed(layers):
    engine, _ = build(max_len=192, max_stall=1)
    scheduler = engine._scheduler
    running = begin(engine, "w1 w2 w3", None, 40)
    for _ in range(4):
        scheduler.step()
    text, pictures = BEGINNINGS[2]
    half = begin(engine, f"{text} w9", pictures, 4)
    step_to_layer(scheduler, layers)
    half.cancel()
    stats = ask(engine, 2, 1, "fixed 2")
    assert stats.prefix_frontier == (layers - 1, 2)
    assert len(running.result().token_ids) > 0
    ask(engine, 2, 3, "keep-all")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("known", "page_size"), [(False, 4), (False, 5), (True, 4), (True, 5)])
def test_who_computes_for_others_is_cancelled(layers, known, page_size):
    """The first of three that extend one prefix together, in whose pages it is, then the second, between two layers."""
    engine, _ = build(max_len=192, max_stall=1, page_size=page_size)
    if known:
        ask(engine, 2, 3, "fixed 0")
    running, (text, pictures) = begin(engine, "w1 w2 w3", None, 60), BEGINNINGS[2]
    for _ in range(4):
        engine._scheduler.step()
    engine._scheduler._max_stall = 10**6
    handles = [begin(engine, f"{text} {q}", pictures, 5) for q in QUESTIONS[:3]]
    engine._scheduler._admit()
    engine._scheduler._max_stall = 1
    step_to_layer(engine._scheduler, layers)
    assert len(engine._scheduler._group.sequences) == 3
    for handle in handles[:2]:
        handle.cancel()
        engine._scheduler.step()
        engine.runner.check_integrity()
    assert handles[2].result(60).token_ids == told(2, 2, "keep-all")[0] and running.result().token_ids
    assert ask(engine, 2, 0, "keep-all").prefix_frontier == (3, 3)
    engine.check_integrity()


def test_nobody_writes_into_pages_that_are_shared():
    engine, _ = build(max_len=192, page_size=4)
    ask(engine, 2, 0, "fixed 1")
    (prefix,) = engine.runner.prefixes
    before = content(engine.pool, prefix)
    text, pictures = BEGINNINGS[2]
    names = ["keep-all", "fixed 0", "text", "fixed 2"]
    for name in names:  # longer answers, deeper and shallower, several at once
        engine.generate(
            [f"{text} {q}" for q in QUESTIONS], [pictures] * 4, chat=False, max_new_tokens=40, policy=policies()[name]
        )
    after = content(engine.pool, prefix)
    assert len(after) > len(before) > 10 and all(torch.equal(after[place], rows) for place, rows in before.items())


def content(pool, prefix):
    """K and V of every shared page, by layer and place."""
    return {
        (layer, i): torch.stack((pool.k[page], pool.v[page])).clone()
        for layer, numbers in enumerate(prefix.pages.numbers)
        for i, page in enumerate(numbers)
    }


def test_running_questions_share_their_memory():
    """Of those that are decoded, each holds its own rows only; `kv_bytes` says what it reads."""
    engine, _ = build(max_len=192, page_size=4, max_batch=8)
    ask(engine, 0, 0, "keep-all")
    text, pictures = BEGINNINGS[0]
    handles = [begin(engine, f"{text} w{n}", pictures, 30) for n in range(8)]
    for _ in range(9):
        engine._scheduler.step()
    (prefix,), pool = engine.runner.prefixes, engine.pool
    assert prefix.pages.users == engine.load["running"] > 4
    own = sum(cache.bytes_held for cache in engine.runner._caches) // pool.page_bytes
    rows = len(prefix) % 4 + 1 + 30  # at most
    assert pool.allocator.used_count == prefix.pages.count + own and 0 < own <= 8 * LAYERS * -(-rows // 4)
    for stats in (handle.result(60).stats for handle in handles):
        assert stats.kv_bytes_shared == prefix.pages.count * pool.page_bytes < stats.kv_bytes


@pytest.mark.parametrize(("depth", "admitted"), [(None, 2), ("fixed 1", 3), ("keep-all", 7)])
def test_pages_of_a_known_prefix_are_promised_once(depth, admitted, monkeypatch):
    """A pool of 44 pages, requests of 20 rows in 4 layers; the prefix has 4 pages in each layer where it is known."""
    forbid_growing_claims(monkeypatch)
    engine, _ = build(max_len=44, page_size=4, kv_memory=44 * 4 * 2 * 2 * 16 * 4, max_batch=8)
    assert engine.pool.n_pages == 44
    if depth is not None:
        ask(engine, 0, 0, depth)
    handles = [begin(engine, f"<image> w{n}", PICTURES[:1], 4) for n in range(8)]
    engine._scheduler.step()
    assert engine.load["waiting"] == 8 - admitted
    want = fresh().generate([f"<image> w{n}" for n in range(8)], [PICTURES[:1]] * 8, chat=False, max_new_tokens=4)
    assert [handle.result(60).token_ids for handle in handles] == [result.token_ids for result in want]
    engine.check_integrity()


@pytest.mark.parametrize(
    ("depth", "policy", "together"), [("keep-all", None, 4), ("fixed 2", None, 1), ("keep-all", FastV(2, 0.5), 1)]
)
def test_a_group_within_a_slice_counts_the_rows_that_it_computes(depth, policy, together, monkeypatch):
    """While somebody is answered, a layer of those who begin is of at most 30 rows; a prompt here has 37."""
    monkeypatch.setattr(scheduler_module, "_MANY", 1)  # slices are whole
    engine, _ = build(max_len=192, page_size=4, max_batch=8, max_stall=30)
    ask(engine, 2, 0, depth)
    text, pictures = BEGINNINGS[2]
    begin(engine, "w1 w2 w3", None, 60)
    engine._scheduler.step()
    handles = [begin(engine, f"{text} w{n}", pictures, 3, policy) for n in range(4)]
    engine._scheduler.step()
    assert engine.load["prefilling"] == together
    want = fresh().generate(
        [f"{text} w{n}" for n in range(4)], [pictures] * 4, chat=False, max_new_tokens=3, policy=policy
    )
    assert [handle.result(60).token_ids for handle in handles] == [result.token_ids for result in want]


def test_a_prefix_deeper_than_there_is_room_for_leaves_for_a_request(monkeypatch):
    """It keeps out nobody who would fit without it."""
    forbid_growing_claims(monkeypatch)
    engine, _ = build(max_len=40, page_size=4, kv_memory=40 * 4 * 2 * 2 * 16 * 4, max_batch=8)
    ask(engine, 1, 0, "keep-all")
    text, pictures = BEGINNINGS[1]
    longest = 40 - len(text.split()) - ROWS
    result = engine.generate(f"{text} w7", pictures, chat=False, max_new_tokens=longest, eos_token_id=[])
    want = fresh().generate(f"{text} w7", pictures, chat=False, max_new_tokens=longest, eos_token_id=[])
    assert result.token_ids == want.token_ids and len(want.token_ids) == longest


@pytest.mark.parametrize("exit_layer", range(3))
@pytest.mark.parametrize("depth", range(3))
def test_behind_a_prefix_no_more_is_reserved_than_without_one(depth, exit_layer, monkeypatch):
    """However deep it is: what the policy is sure to take out is not reserved in the layers behind."""
    forbid_growing_claims(monkeypatch)
    engine, _ = build(max_len=96, page_size=4)
    engine.generate("<image> w1", PICTURES[:1], chat=False, max_new_tokens=2, policy=FixedExit(depth))
    policy = engine.bind(FixedExit(exit_layer))
    request = Request("<image> w2", PICTURES[:1], chat=False, policy=policy, options=dict(max_new_tokens=8))
    (s,) = engine._prepare_request(request)
    prefix, worst = engine.runner.known(s.prompt, policy), engine.runner.worst_pages
    assert prefix is not None
    assert worst(s.rows, s.may_leave, policy, prefix) <= worst(s.rows, s.may_leave, policy, None)
    (handle,) = engine._enqueue([s])
    assert handle.result(20).stats.prefix == "hit"
    engine.check_integrity()


def test_what_is_forgotten_while_a_request_begins(monkeypatch):
    """It has what it was admitted with."""
    forbid_growing_claims(monkeypatch)
    engine, _ = build(max_len=40, page_size=4, kv_memory=40 * 4 * 2 * 2 * 16 * 4, max_batch=8, max_stall=1)
    ask(engine, 0, 0, "keep-all")
    first = begin(engine, "w1", None, 8)
    engine._scheduler.step()
    handles = [begin(engine, f"<image> w{n}", PICTURES[:1], 4) for n in range(2)]
    engine._scheduler.step()
    assert engine.load["prefilling"] == 1
    engine.forget()
    for handle in (first, *handles):
        assert handle.result(60).token_ids
    assert [handle.result(0).stats.prefix for handle in handles] == ["hit", "miss"]
    engine.check_integrity()


def test_no_page_is_left_in_the_midst_of_an_extension(monkeypatch):
    engine, _ = build(max_len=192, page_size=4)
    ask(engine, 2, 0, "fixed 0")

    class Empty:
        calls = 0

        def __getattr__(self, name):
            return getattr(real, name)

        def alloc(self, n):
            self.calls += 1
            if self.calls == 2:
                raise MemoryError("no page is left")
            return real.alloc(n)

    real = engine.pool.allocator
    monkeypatch.setattr(engine.pool, "allocator", Empty())
    text, pictures = BEGINNINGS[2]
    with pytest.raises(MemoryError, match="no page is left"):
        engine.generate([f"{text} {q}" for q in QUESTIONS[:2]], [pictures] * 2, chat=False, max_new_tokens=3)
    monkeypatch.undo()
    engine.check_integrity()
    assert engine.pool.claimed == 0
    ask(engine, 2, 1, "keep-all")


def test_a_small_pool_lets_prefixes_leave_for_requests():
    one = LAYERS * 12 * 4 * 2 * 2 * 16 * 4  # bytes of a sequence of 48 rows, in pages of 4
    engine, _ = build(max_len=48, page_size=4, kv_memory=one + 1024, max_batch=4)
    rng, seen = random.Random(8), set()
    for _ in range(30):
        seen.add(ask(engine, rng.choice([0, 1]), rng.randrange(2), rng.choice(sorted(policies()))).prefix)
        engine.check_integrity()
    text, pictures = BEGINNINGS[0]
    result = engine.generate(f"{text} w7", pictures, chat=False, max_new_tokens=48 - ROWS - 2)  # all there is
    assert len(result.token_ids) > 0 and seen == {"hit", "miss"}
    assert engine.pool.claimed == 0 and engine.pool.allocator.used_count == engine.pool.idle


def test_after_a_change_of_weights_nothing_old_is_found():
    """Also where somebody reads it at that moment."""
    engine, _ = build(max_len=192)
    changed, _ = build(max_len=192, prefix_cache=0, picture_cache=0)
    for e in (engine, changed):
        ask(e, 1, 0, "fixed 1")
    handle = begin(engine, f"{BEGINNINGS[1][0]} w7", BEGINNINGS[1][1], 60)
    for _ in range(5):
        engine._scheduler.step()
    for e in (engine, changed):
        for layer in e.model.decoder.layers:
            layer.qkv.weight.mul_(1.3)
    engine.forget()
    text, pictures = BEGINNINGS[1]
    for n in range(2):
        options = dict(chat=False, max_new_tokens=5, policy=policies()["fixed 1"])
        got, want = (e.generate(f"{text} {QUESTIONS[1]}", pictures, **options) for e in (engine, changed))
        assert figures(got) == figures(want) and got.stats.prefix == ("miss", "hit")[n]
    assert got.token_ids != told(1, 1, "fixed 1")[0]
    handle.cancel()
    engine.check_integrity()


def begin(engine, text, pictures, n, policy=None):
    config, inputs = engine._config(None, dict(max_new_tokens=n)), engine._tokenize(text, pictures, None, 2.0, False)
    return engine._enqueue(engine._sequences(inputs, policy, 0, config))[0]


@pytest.mark.parametrize("value", [-1, 2.5, False, "all", None])
def test_what_it_takes(value):
    with pytest.raises(InvalidArgumentError, match="prefix_cache"):
        build(prefix_cache=value)
