"""What random traces through a tight engine share: requests come, proceed and are cancelled, and all adds up.

`DYVTE_TRACES=2000` asks for more of them.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dyvte_engine import RequestCancelledError
from dyvte_engine.runtime.kv_cache import KVCache
from dyvte_engine.runtime.scheduler import _Group

TRACES = int(os.environ.get("DYVTE_TRACES", 25))


def told(result):
    stats = result.stats
    return result.token_ids, result.text, result.finish_reason, stats.exit_layer, stats.tokens_per_layer


def settings_of(steps):
    return settings(
        max_examples=TRACES,
        stateful_step_count=steps,
        deadline=None,
        derandomize="DYVTE_TRACES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


def forbid_growing_claims(patch):
    """What a request is admitted with suffices until it ends, unless its group may wait between two layers.

    An assertion in a step is its error.
    """
    claim, promised, waiting = KVCache.claim, _Group._promised, []

    def checked(cache, sequence, pages):
        assert pages >= cache.held(sequence)
        assert cache.claims[sequence] == 0 or pages <= cache.claims[sequence] or cache is waiting[-1]
        claim(cache, sequence, pages)

    def noted(group, prefill):
        waiting.append(group.cache)
        try:
            return promised(group, prefill)
        finally:
            waiting.pop()

    patch.setattr(KVCache, "claim", checked)
    patch.setattr(_Group, "_promised", noted)


class Traces(RuleBasedStateMachine):
    """A machine says how it submits, and gives its tight engine, `request_of` a spec and the right `answer` to one."""

    request_of: Any
    answer: Any

    def __init__(self, engine):
        super().__init__()
        self.engine, self.scheduler, self.handles = engine, engine._scheduler, []
        self.patch = pytest.MonkeyPatch()
        forbid_growing_claims(self.patch)

    def ask(self, spec, priority):
        sequences = self.engine._prepare_request(type(self).request_of(spec, priority))
        self.handles.append((spec, self.engine._enqueue(sequences)[0]))

    @rule(steps=st.integers(1, 12))
    def step(self, steps):
        for _ in range(steps):
            self.scheduler.step()

    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        if self.handles:
            _, handle = self.handles[which % len(self.handles)]
            done = handle.done
            handle.cancel()
            assert handle.done
            if not done:
                with pytest.raises(RequestCancelledError):
                    handle.result(0)

    @invariant()
    def pages_add_up(self):
        with self.engine.runner.lock:
            self.engine.runner.check_integrity()
            assert self.engine.pool.claimed + self.engine.pool.idle <= self.engine.pool.n_pages
            for cache in self.engine.runner._caches:
                assert all(cache.held(b) <= claim for b, claim in enumerate(cache.claims))

    def teardown(self):
        while self.scheduler.has_work:
            self.scheduler.step()
        self.patch.undo()
        self.engine.check_integrity()
        assert self.engine.pool.bytes_held == self.engine.pool.claimed == 0
        for spec, handle in self.handles:
            if handle._error is None:
                answer = type(self).answer(spec)
                assert told(handle.result(0)) == answer, spec
                assert "".join(chunk.text for chunk in handle) == answer[1]
            else:
                assert isinstance(handle._error, RequestCancelledError)
