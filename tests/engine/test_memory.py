"""K/V memory is what the pool really gave out."""

import gc
import random
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

from dyvte_engine import CacheError, DynamicExit, FastV, FixedExit, KeepAll, Request
from dyvte_engine.runtime.kv_cache import KVCache
from dyvte_engine.runtime.scheduler import _Group
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_exit import random_heads

LAYERS = 4


def pages(rows: int, size: int) -> int:
    return -(-rows // size)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_bytes_after_an_exit_follow_the_formula(page_size, layer):
    engine, _ = build(policy=FixedExit(layer), page_size=page_size)
    texts, images = tiny.prompts(seed=60, n=5)
    prompts = engine.model.prepare(engine.model.tokenize(texts, images))
    with engine.prefill([p.inputs_embeds for p in prompts], [p.visual for p in prompts]) as running:
        want = 0
        for b, p in enumerate(prompts):
            full, text = len(p.visual), int((~p.visual).sum())
            mine = (layer + 1) * pages(full, page_size) + (LAYERS - 1 - layer) * pages(text, page_size)
            assert running.cache.bytes_of(b) == mine * engine.pool.page_bytes
            want += mine
        assert engine.pool.allocator.used_count == want
        assert engine.pool.bytes_held == running.cache.bytes_held == want * engine.pool.page_bytes
        assert running.cache.lens.tolist() == running.cache.host_lens.tolist()
    assert engine.pool.bytes_held == 0
    one_row = 2 * 2 * 16 * 4  # K and V, 2 heads of 16 float32
    assert engine.pool.page_bytes == page_size * one_row


def test_drop_early_kv_frees_pages_of_all_layers():
    engine, _ = build(policy=FixedExit(1), page_size=4, drop_early_kv=True)
    texts, images = tiny.prompts(seed=61, n=4)
    prompts = engine.model.prepare(engine.model.tokenize(texts, images))
    with engine.prefill([p.inputs_embeds for p in prompts], [p.visual for p in prompts]) as running:
        want = sum(LAYERS * pages(int((~p.visual).sum()), 4) for p in prompts)
        assert engine.pool.allocator.used_count == want
        assert running.cache.lens.tolist() == running.cache.host_lens.tolist()


@pytest.mark.parametrize("policy", [KeepAll(), FixedExit(1), FastV(1, 0.5), DynamicExit(random_heads(4), 0.7)])
def test_every_page_comes_back(policy):
    engine, _ = build(policy=policy, page_size=3)
    texts, images = tiny.prompts(seed=62, n=10)
    engine.generate(texts, images, chat=False, max_new_tokens=12)
    assert engine.pool.bytes_held == engine.pool.claimed == 0
    stream = engine.stream(texts, images, chat=False, max_new_tokens=12)
    next(stream)
    stream.close()  # a reader that stops early
    assert engine.pool.bytes_held == engine.pool.claimed == 0


def test_stats_report_what_was_held():
    engine, _ = build(policy=FixedExit(0), page_size=8)
    texts, images = tiny.prompts(seed=63, n=3, images=(1, 2))
    for text, pictures in zip(texts, images):
        stats = engine.generate(text, pictures, chat=False, max_new_tokens=1).stats
        full = stats.visual_tokens + stats.text_tokens
        assert stats.visual_tokens == tiny.VISUAL_TOKENS * len(pictures)
        assert stats.tokens_per_layer == [full] + [stats.text_tokens] * (LAYERS - 1)
        assert stats.kv_bytes == (pages(full, 8) + 3 * pages(stats.text_tokens, 8)) * engine.pool.page_bytes
        assert stats.kv_bytes_keep_all == LAYERS * pages(full, 8) * engine.pool.page_bytes


def test_idle_pages_leave_as_far_as_a_claim_is_short_of_others():
    pool = build(page_size=16, max_batch=1, max_len=32, prefix_cache=0)[0].pool
    asked: list[int] = []
    pool.reclaim, pool.idle = asked.append, 3
    for beyond in range(4):
        n = pool.claimable - pool.idle + beyond
        pool.claim(n)
        pool.claim(-n)
    assert asked == [1, 2, 3]
    with pytest.raises(CacheError, match="out of pages"):
        pool.claim(pool.claimable + 1)


def test_a_group_that_ends_before_its_prefill_gives_its_claims_back():
    engine, _ = build(page_size=4)
    group = _Group(engine.runner, engine._prepare_request(Request("w1 w2", tiny.picture(random.Random(0)))), [None])
    group.claim()
    assert engine.pool.claimed > 0
    engine.runner.check_integrity()
    engine.pool.claim(1)  # nobody's
    with pytest.raises(CacheError, match="does not add up"):
        engine.runner.check_integrity()
    engine.pool.claim(-1)
    group.close()
    assert engine.pool.claimed == 0
    engine.runner.check_integrity()


def test_a_pool_without_pages_says_so():
    engine, _ = build(page_size=16, max_batch=1, max_len=32, prefix_cache=0)
    cache = KVCache(engine.pool, 1, 512, 1)
    with pytest.raises(CacheError, match="out of pages"):
        cache.reserve(range(1), [512])
    cache.close()
    assert engine.pool.bytes_held == 0


def test_pages_ahead_of_a_decision_are_taken_of_what_is_claimed_alone():
    engine, _ = build(page_size=16, max_batch=1, max_len=64, prefix_cache=0)
    cache = KVCache(engine.pool, 1, 64, 1)
    assert not cache.reserve_claimed(range(2), np.array([[40], [40]]))
    assert engine.pool.claimed == engine.pool.bytes_held == 0
    cache.claim(0, 6)
    assert cache.reserve_claimed(range(2), np.array([[40], [40]]))
    assert not cache.reserve_claimed(range(2, 3), np.array([[1]]))
    assert (engine.pool.claimed, cache.held(0)) == (6, 6)
    cache.trim(range(1, 2), [17])
    assert (engine.pool.claimed, cache.held(0), engine.pool.allocator.used_count) == (6, 5, 5)
    cache.close()
    assert engine.pool.claimed == engine.pool.bytes_held == 0


def test_the_time_in_the_queue_is_not_the_time_of_reading_pictures():
    engine, _ = build()
    (sequence,) = engine._prepare_request(Request("w1 w2", chat=False, options=dict(max_new_tokens=2)))
    began = time.perf_counter()
    sequence.prompt, sequence._asked_at = replace(sequence.prompt, seconds=500.0), began - 500
    stats = engine._enqueue([sequence])[0].result().stats
    took = time.perf_counter() - began
    assert -1e-6 <= stats.queued_s <= took < 500 <= stats.ttft_s <= 500 + took


@pytest.mark.parametrize("policy", ["keep-all", "fixed:1", "fastv:1,0.5+fixed:2"])
def test_an_engine_that_nobody_has_leaves_its_memory_at_once(policy):
    """Not when Python comes to look for circles."""
    gc.collect()
    gc.disable()
    try:
        engine, _ = build(policy=policy, prefix_cache=1 << 22, picture_cache=1 << 20)
        texts, images = tiny.prompts(seed=66, n=3)
        engine.generate(texts, images, chat=False, max_new_tokens=3)
        list(engine.stream(texts[0], images[0], chat=False, max_new_tokens=3))
        parts = engine, engine.runner, engine.pool, engine.model, engine.model.decoder
        left = [weakref.ref(part) for part in parts]
        del engine, parts
        assert [ref() for ref in left] == [None] * 5
    finally:
        gc.enable()
