"""Random traces of questions about few pictures through a tight engine: known prefixes come, deepen, leave, return."""

import functools
import random
import threading
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from dyvte_engine import FastV, Request, ToMe
from tests.engine.conftest import build
from tests.engine.test_prefix import BEGINNINGS, QUESTIONS, policies
from tests.engine.traces import Traces, settings_of, told

POLICIES = {**policies(), "before": "fixed:-1", "fastv": FastV(1, 0.5), "in the tower": ToMe(0.5)}
BUDGET = 60_000  # bytes: about three of these prefixes, or one and a half to the last layer
specs = st.tuples(
    st.integers(0, len(BEGINNINGS)),
    st.integers(0, len(QUESTIONS) - 1),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([1, 3, 9]),
)


def request_of(spec, priority=0):
    beginning, question, policy, n = spec
    text, pictures = [*BEGINNINGS, ("w1", None)][beginning]
    options = dict(max_new_tokens=n)
    prompt = f"{text} {QUESTIONS[question]}"
    return Request(prompt, pictures, chat=False, policy=POLICIES[policy], priority=priority, options=options)


@functools.cache
def engines():
    """One whose pool, slices and caches are small, and one that answers each request alone and keeps nothing."""
    memory = 4 * 48 * 2 * 4 * 2 * 2 * 16 * 4 // 2
    small = dict(page_size=4, max_batch=3, max_stall=40, max_len=192, kv_memory=memory)
    tight, _ = build(prefix_cache=BUDGET, picture_cache=3 * 16 * 64 * 4, **small)
    alone, _ = build(prefix_cache=0, picture_cache=0, page_size=4, max_batch=1, max_len=192)
    return tight, alone


@functools.cache
def answer(spec):
    r = request_of(spec)
    return told(engines()[1].generate(r.prompt, r.images, chat=False, policy=r.policy, **r.options))


class PrefixTraces(Traces):
    request_of, answer = request_of, answer

    def __init__(self):
        super().__init__(engines()[0])
        self.prefixes = self.engine.runner.prefixes

    @rule(spec=specs, priority=st.integers(-1, 1))
    def submit(self, spec, priority):
        self.ask(spec, priority)

    @rule()
    def forget(self):
        with self.engine.runner.lock:
            self.prefixes.clear()

    @invariant()
    def prefixes_add_up(self):
        with self.engine.runner.lock:
            caches = list(self.engine.runner._caches)
            leases = Counter(lease for cache in caches for lease in cache.leases if lease is not None)
            entries = [prefix.pages for prefix in self.prefixes._entries.values()]
            assert all(pages.users == leases[pages] for pages in (*entries, *leases))
            assert all(pages.kept == (pages in entries) for pages in (*entries, *leases))
            assert all(pages.users for pages in entries) or self.prefixes.bytes_held <= BUDGET
            for cache in caches:
                for b, lease in enumerate(cache.leases):
                    for layer, n in enumerate(cache._shared[:, b].tolist()):
                        assert cache._host_table[layer, b, :n].tolist() == (
                            [] if lease is None else lease.numbers[layer][:n]
                        )

    def teardown(self):
        super().teardown()
        assert self.prefixes.bytes_held <= BUDGET


TestTraces = PrefixTraces.TestCase
TestTraces.settings = settings_of(40)


def test_threads_that_ask_about_the_same_pictures():
    engine, _ = engines()
    rng = random.Random(4)
    chosen = [(rng.randrange(3), i % 4, rng.choice(sorted(POLICIES)), rng.choice([1, 3, 9])) for i in range(48)]
    for spec in chosen:
        answer(spec)
    right = []

    def work(offset):
        handles = [(spec, engine.submit(request_of(spec))) for spec in chosen[offset::4]]
        right.extend(spec for spec, handle in handles if told(handle.result(60)) == answer(spec))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert sorted(right) == sorted(chosen)
    engine.check_integrity()
    assert engine.pool.claimed == 0 and engine.runner.prefixes.bytes_held <= BUDGET


def test_an_interrupt_leaves_no_broken_prefix(monkeypatch):
    """Ctrl-C in the middle of a layer that deepens a prefix."""
    engine, _ = engines()
    first, second = (2, 0, "fixed 0", 3), (2, 1, "keep-all", 3)
    for spec in (first, second):
        r = request_of(spec)
        options = dict(chat=False, policy=r.policy, **r.options)
        if spec is second:
            real, calls = engine.model.decoder.layer, []

            def layer(number, *rest, real=real, calls=calls):
                calls.append(number)
                out = real(number, *rest)
                if number == 1:
                    raise KeyboardInterrupt
                return out

            monkeypatch.setattr(engine.model.decoder, "layer", layer)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(r.prompt, r.images, **options)
            monkeypatch.undo()
            engine.check_integrity()
            assert engine.pool.claimed == 0 and calls == [0, 1]
        assert told(engine.generate(r.prompt, r.images, **options)) == answer(spec)
