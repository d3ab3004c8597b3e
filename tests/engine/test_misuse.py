"""What no caller should do, and what may happen to one at any moment: right afterwards, or a typed error."""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dyvte_engine import (
    CacheError,
    FixedExit,
    InvalidArgumentError,
    KeepAll,
    PromptError,
    Request,
    StreamChunk,
    compose,
)
from dyvte_engine.engine import _keep_freed_memory
from dyvte_engine.policies import VisualTokenPolicy
from dyvte_engine.requests import Handle
from dyvte_engine.runtime import worker
from dyvte_engine.runtime.kv_cache import SharedPages
from dyvte_engine.runtime.sequence import Sequence
from tests import tiny
from tests.engine.conftest import build

TEXTS, IMAGES = tiny.prompts(seed=7, n=3, images=(1,))


@pytest.fixture(scope="module")
def engine():
    return build(page_size=4, max_batch=3, max_stall=40, max_len=192)[0]


ROOT = Path(__file__).parents[2]


def answers(engine, policy, n=5):
    results = engine.generate(TEXTS, IMAGES, policy=policy, chat=False, max_new_tokens=n)
    return [r.token_ids for r in results], results[0].stats.tokens_per_layer


@pytest.mark.parametrize("policy", [None, "fixed:-1", "fixed:1"])
@pytest.mark.parametrize("page_size", [1, 4, 7])
def test_steps_end_at_max_len(policy, page_size):
    """In rows or in positions: beyond it are other pages and other rotations, which CUDA kernels would not notice."""
    engine, oracle = build(page_size=page_size, max_batch=2, max_len=40)
    with engine.prefill_prepared(engine.prepare(TEXTS[0], IMAGES[0], chat=False), policy) as running:
        n = int(running.positions[0])
        for _ in range(40 - n):
            running.step([5])
        with pytest.raises(CacheError, match="max_len 40"):
            running.step([5])
        if policy is None:
            embeds, _, _ = tiny.embed(oracle, engine.model.processor, TEXTS[0], IMAGES[0])
            fed = torch.cat((embeds, oracle.get_input_embeddings()(torch.full((40 - n,), 5))))
            want = tiny.masked_logits(oracle, fed, tiny.see_all(40))[-1]
            torch.testing.assert_close(running.logits[0], want, atol=2e-3, rtol=1e-3)
    engine.check_integrity()
    assert engine.pool.claimed == 0


def test_prompts_that_do_not_fit_are_refused_before_they_take_pages():
    engine, _ = build(page_size=4, max_batch=2, max_len=24)
    with pytest.raises(PromptError, match="max_len 24"):
        engine.prefill_prepared(engine.prepare(" ".join(["w1"] * 25), None, chat=False))
    for count in (0, 3):
        with pytest.raises(InvalidArgumentError, match="max_batch 2"):
            engine.prefill_prepared(engine.prepare("w1", None, chat=False) * count)
    engine.check_integrity()


def test_a_batch_is_joined_by_caches_of_its_own_pool_alone():
    one, two = (build(page_size=4, max_batch=2, max_len=64)[0] for _ in range(2))
    with one.runner.nobody(4) as batch, two.prefill_prepared(two.prepare("w1 w2", None, chat=False)) as foreign:
        for cache in (foreign.cache, batch.cache):
            with pytest.raises(InvalidArgumentError, match="another engine"):
                batch.join(cache, foreign.logits)
    for engine in (one, two):
        engine.check_integrity()


@dataclass
class Keeps(VisualTokenPolicy):
    """May be changed by its user, also after it was used."""

    keep: object
    copies: bool = False

    def bind(self, model):
        return replace(self) if self.copies else self

    def layers(self, num_layers):
        return {1}

    def decide(self, state):
        return [self.keep] * len(state.rows.n_visual)


@pytest.mark.parametrize(
    "keep",
    [
        torch.tensor([3, 0]),
        torch.tensor([3, 3]),
        torch.tensor([-1]),
        torch.tensor([16]),
        torch.arange(16) < 4,
        torch.tensor([0.0]),
        torch.tensor([[0, 1]]),
        [0, 1],
    ],
)
def test_what_is_no_decision_is_refused(engine, keep):
    with pytest.raises(InvalidArgumentError, match="Keeps decided"):
        answers(engine, Keeps(keep))
    engine.check_integrity()
    assert engine.pool.claimed == 0


@pytest.mark.parametrize("layers", [{4}, {-2}, [1], {True}])
def test_layers_that_are_not_there_are_refused(engine, layers):
    class Asks(Keeps):
        def layers(self, num_layers):
            return layers

    with pytest.raises(InvalidArgumentError, match=r"layers\(4\)"):
        engine.bind(Asks(None))


@dataclass(frozen=True)
class Reduces(VisualTokenPolicy):
    how: str

    def reduce(self, features):
        return {
            "fewer": features[1:],
            "more": [*features, features[0]],
            "longer": [torch.cat((f, f)) for f in features],
            "narrower": [f[:, :5] for f in features],
            "flat": [f[0] for f in features],
            "nothing": [f[:0] for f in features],
        }[self.how]


@pytest.mark.parametrize("how", ["fewer", "more", "longer", "narrower", "flat", "nothing"])
def test_reduced_pictures_are_as_many_and_no_longer(engine, how):
    with pytest.raises(InvalidArgumentError, match="Reduces"):
        engine.generate("<image>", IMAGES[0], policy=Reduces(how), chat=False, max_new_tokens=2)
    engine.check_integrity()


@pytest.mark.parametrize("copies", [False, True])
def test_policies_that_change_are_bound_anew(engine, copies):
    policy = Keeps(torch.arange(2), copies)
    assert answers(engine, policy)[1] == [18, 18, 4, 4]
    both = compose(policy, FixedExit(2))
    assert answers(engine, both)[1] == [18, 18, 4, 2]
    policy.keep = torch.arange(5)
    assert answers(engine, policy)[1] == [18, 18, 7, 7]
    assert answers(engine, both)[1] == [18, 18, 7, 2]


def test_subclasses_without_a_decorator_are_not_taken_for_each_other(engine):
    """Of a frozen dataclass they have the equality, which does not see what they add."""

    class First(KeepAll):
        def __init__(self, n):
            object.__setattr__(self, "n", n)

        def layers(self, num_layers):
            return {1}

        def decide(self, state):
            return [torch.arange(self.n)] * len(state.rows.n_visual)

    assert First(2) == First(5)
    assert [answers(engine, First(n))[1] for n in (2, 5)] == [[18, 18, 4, 4], [18, 18, 7, 7]]


def test_a_policy_that_asks_its_own_engine_is_refused(engine):
    class Asks(Keeps):
        def decide(self, state):
            engine.generate("w1", chat=False, max_new_tokens=1)

    want = answers(engine, "fixed:1")
    with pytest.raises(InvalidArgumentError, match="another engine"):
        answers(engine, Asks(None))
    assert answers(engine, "fixed:1") == want


def test_a_stream_that_is_left_in_the_midst_of_a_step_is_cancelled_behind_it(engine):
    """As when it is garbage that happens to be collected there."""
    streams = []

    class Leaves(Keeps):
        def decide(self, state):
            if streams:
                streams.pop().close()
            return [None] * len(state.rows.n_visual)

    want = answers(engine, "keep-all")
    streams.append(engine.stream(TEXTS[0], IMAGES[0], chat=False, max_new_tokens=50))
    next(streams[0])
    assert answers(engine, Leaves(None)) == want
    assert engine.pool.claimed == 0


def test_autocast_of_the_caller_changes_nothing(engine):
    want = answers(engine, "fixed:1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert answers(engine, "fixed:1") == want


def test_the_callers_default_device_has_no_say_in_what_malloc_keeps(monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: made.append(empty(*args, **options).device.type))
    with torch.device("meta"):
        _keep_freed_memory()
    assert made == ["cpu"]


@pytest.mark.parametrize("taken", [True, False])
def test_an_interrupt_while_shared_pages_change_hands_leaves_nobody_behind(taken, monkeypatch):
    """After they were taken and before anybody knows, or when nobody knows any more and before they were returned."""
    engine, _ = build(page_size=4, max_batch=3, max_len=192)
    want = answers(engine, "keep-all")
    name = "acquire" if taken else "release"
    change, moments = getattr(SharedPages, name), iter([True])

    def interrupted(pages):
        if taken:
            change(pages)
        if next(moments, False):
            raise KeyboardInterrupt
        if not taken:
            change(pages)

    monkeypatch.setattr(SharedPages, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(engine, "keep-all")
    engine.check_integrity()
    assert engine.pool.claimed == 0
    assert answers(engine, "keep-all") == want


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that came in a callback
def test_interrupts_at_any_moment_leave_the_engine_whole():
    """Real signals: 60 calls, each with one somewhere in it."""
    engine, _ = build(page_size=4, max_batch=3, max_stall=40, max_len=192)
    policies, rng, interrupted = ["keep-all", "fixed:1", "fastv:1,0.5+fixed:2"], random.Random(1), 0
    want = {p: answers(engine, p) for p in policies}
    began = time.perf_counter()
    answers(engine, "keep-all")
    seconds = time.perf_counter() - began
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(60):
            policy = policies[number % 3]
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.01, 0.9) * seconds)
                answers(engine, policy)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            engine.check_integrity()
            assert engine.pool.claimed == 0
            if number % 10 == 0:
                assert answers(engine, policy) == want[policy]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10


@pytest.mark.parametrize("name", ["alloc", "claim", "_free", "finish", "_emit"])
def test_an_interrupt_between_two_counts(name, monkeypatch):
    """Where pages are taken, given back or handed on; the neighbour, of another thread, gets the interrupt too."""
    engine, _ = build(page_size=4, max_batch=3, max_len=192)
    want = answers(engine, "fixed:1")
    from dyvte_engine.runtime import kv_cache, scheduler

    owner = {"_emit": scheduler.Scheduler, "finish": scheduler._Group, "claim": kv_cache.PagePool}.get(
        name, kv_cache.KVCache
    )
    called = "_take" if name == "alloc" else name
    whole = getattr(owner, called)

    def interrupted(*args):
        whole(*args)
        raise KeyboardInterrupt

    handle = engine._enqueue(engine._prepare_request(Request(TEXTS[0], IMAGES[0], chat=False)))[0]
    monkeypatch.setattr(owner, called, interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(engine, "fixed:1")
    monkeypatch.undo()
    engine.check_integrity()
    if not handle.done:
        handle.cancel()
    assert engine.pool.claimed == 0 and not engine._scheduler.has_work
    assert answers(engine, "fixed:1") == want


@pytest.mark.parametrize("called", ["copy_into", "to_device", "_count_rows"])
def test_an_interrupt_in_a_call_of_a_batch_ends_its_sequences(called, monkeypatch):
    """Between a page and the table that names it, and in the midst of those that change places or come in."""
    engine, _ = build(page_size=4, max_batch=3, max_len=192)
    want = answers(engine, "fixed:1")
    prompts = engine.prepare(TEXTS, IMAGES, chat=False)
    running, alone = engine.prefill_prepared(prompts[:2]), engine.prefill_prepared(prompts[2:])

    def steps_select_join():
        for _ in range(4):
            running.step([5] * 2)
        running.select([1, 0])
        running.join(alone.cache, alone.logits)

    from dyvte_engine.runtime import kv_cache

    owner = kv_cache.KVCache if called == "_count_rows" else kv_cache
    monkeypatch.setattr(owner, called, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        steps_select_join()
    monkeypatch.undo()
    assert len(running) == len(running.logits) == 0
    with pytest.raises(InvalidArgumentError, match="for each of 0 sequences"):
        running.step([5] * 2)
    running.close()
    alone.close()
    engine.check_integrity()
    assert engine.pool.claimed == 0
    assert answers(engine, "fixed:1") == want


@pytest.mark.parametrize("called", ["fill_", "clone", "copy_"])
def test_an_interrupt_where_batches_take_turns_leaves_the_other_one_whole(called, monkeypatch):
    """The state that captured steps work on is one batch's at a time."""
    engine, _ = build(page_size=4, max_batch=3, max_len=192)
    first = engine.prefill_prepared(engine.prepare(TEXTS[0], IMAGES[0], chat=False))
    both = engine.prefill_prepared(engine.prepare(TEXTS[:2], IMAGES[:2], chat=False))
    for _ in range(3):
        first.step([5])
        both.step([5, 6])
    for skipped in range(6):
        own, left = getattr(torch.Tensor, called), [skipped]

        def interrupted(tensor, *args, own=own, left=left):
            out = own(tensor, *args)
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            return out

        first.step([7])
        both.step([7, 8])  # it has the place
        other = engine.prefill_prepared(engine.prepare(TEXTS[2], IMAGES[2], chat=False))
        with other, monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(torch.Tensor, called, interrupted)
            other.step([5])
        torch.testing.assert_close(both.step([9, 9])[:1], first.step([9]), rtol=1e-4, atol=1e-4)
    for batch in (first, both):
        batch.close()
    engine.check_integrity()


def test_a_leader_that_was_interrupted_before_its_first_step_leads_again(engine):
    assert engine._worker._lead()  # and nothing runs: as if a signal came here
    assert answers(engine, "fixed:1") == answers(engine, "fixed:1")


FORKS = """
import os
import signal
import threading
from dyvte_engine import DeviceError, Request
from tests.engine.conftest import build
from tests.engine.test_misuse import IMAGES, TEXTS, answers

def asked():
    return answers(engine, "fixed:1") == want

def submitted():
    request = Request(TEXTS[0], IMAGES[0], chat=False, options=dict(max_new_tokens=3))
    return bool(engine.submit(request).result(20).token_ids)

def in_child(call):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            os._exit(10 * call())
        except DeviceError:
            os._exit(20)
        finally:
            os._exit(30)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

engine, _ = build(page_size=4, max_batch=3, max_len=192)
want = answers(engine, "fixed:1")
assert in_child(asked) == in_child(submitted) == 10
held, enough = threading.Event(), threading.Event()

def at_work():
    with engine.runner.lock:
        held.set()
        enough.wait(60)

thread = threading.Thread(target=at_work)
thread.start()
held.wait()
assert in_child(engine.forget) == in_child(asked) == 20
enough.set()
thread.join()
assert in_child(asked) == 10 and submitted()
assert in_child(asked) == in_child(submitted) == 20
assert asked()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_with_the_thread_under_way_is_refused_and_others_work():
    """In a process of its own: OpenMP's threads, of which this one may have started some, do not come along."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_shared_handle_ends_when_its_request_does():
    """A loop that finds a chunk taken by another loop waits for the next one."""

    class Taken:
        """Somebody else takes the first chunk just before this loop does."""

        def run_until(self, ready, timeout=None):
            assert ready() or chunks
            if len(chunks) == 2:
                handle._chunks.clear()
            handle.put(chunks.pop(0))
            return True

    chunks = [StreamChunk(0, n, "", None) for n in range(3)] + [StreamChunk(0, 3, "", result=object())]
    handle = Handle(Taken(), lambda: None)
    taken = handle._take
    handle._take = lambda: None if handle._chunks[0].token_id == 1 and handle._chunks.popleft() else taken()
    assert [c.token_id for c in handle][-1] == 3


def test_the_last_chunk_is_there_when_the_result_is():
    """Another thread may look between the two."""
    seen = []

    class Chunks(list):
        def append(self, chunk):
            seen.append(handle.done)
            super().append(chunk)

    handle = Handle(None, lambda: None, Chunks())
    handle.put(StreamChunk(0, 1, "", result=object()))
    assert seen == [False] and handle.done


def test_a_stream_gives_the_last_chunk_that_comes_while_it_looks(engine, monkeypatch):
    """Another thread runs the steps: the rest comes between two looks of this one."""
    run_until = engine._worker.run_until

    def rest_comes_later(ready, timeout=None):
        came = run_until(ready, timeout)
        monkeypatch.setattr(Handle, "done", property(finishes))
        return came

    def finishes(handle):
        monkeypatch.setattr(Handle, "done", done)
        while engine._scheduler.has_work:
            engine._scheduler.step()
        return handle.done

    done = Handle.done
    monkeypatch.setattr(engine._worker, "run_until", rest_comes_later)
    chunks = list(engine.stream(TEXTS[0], IMAGES[0], chat=False, max_new_tokens=6, eos_token_id=[]))
    assert len(chunks) == 6 and chunks[-1].result is not None


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_long_timeouts_are_waited_for_beside_the_thread(engine, timeout):
    handle = engine.submit(Request("w1 w2", chat=False, options=dict(max_new_tokens=40)))
    assert handle.result(timeout).stats.new_tokens > 0
    with pytest.raises(InvalidArgumentError, match="nan"):
        handle.result(float("nan"))


def test_the_thread_ends_when_nothing_comes_and_another_takes_its_place(engine, monkeypatch):
    monkeypatch.setattr(worker, "_LINGER", 0.05)
    for _ in range(2):
        handle = engine.submit(Request("w1 w2", chat=False, options=dict(max_new_tokens=3)))
        thread = next(t for t in threading.enumerate() if t.name == "dyvte-engine")
        while not handle.done:  # nobody else runs steps, or wakes it
            time.sleep(0.01)
        thread.join(60)
        assert not thread.is_alive()


def test_done_requests_are_no_garbage_for_the_collector():
    """They hold pictures."""
    engine, _ = build(page_size=4, max_batch=3, max_len=192)
    gone = []
    enqueue = engine._enqueue

    def remember(sequences, *rest):
        gone.extend(weakref.ref(s) for s in sequences)
        return enqueue(sequences, *rest)

    engine._enqueue = remember
    gc.collect()
    gc.disable()
    try:
        answers(engine, "fixed:1")
        list(engine.stream(TEXTS, IMAGES, chat=False, max_new_tokens=3))
        assert len(gone) == 6 and not any(ref() for ref in gone)
    finally:
        gc.enable()


def test_a_timeout_ends_while_another_thread_leads(engine, monkeypatch):
    monkeypatch.setattr(engine._worker, "_leader", -1)
    ends = threading.Timer(30, engine._worker.notify)  # instead of a test that hangs
    ends.start()
    started = time.monotonic()
    assert engine._worker.run_until(lambda: time.monotonic() > started + 30, 0.05) is False
    ends.cancel()


def test_a_timeout_beside_another_leader_is_a_timeout(engine, monkeypatch):
    """What another thread is just taking over looks like no work at all."""
    monkeypatch.setattr(type(engine._scheduler), "has_work", property(lambda self: threading.current_thread() is main))
    main = threading.current_thread()
    assert engine._worker.run_until(lambda: False, 0.0) is False
    monkeypatch.undo()
    handle = engine._enqueue(engine._prepare_request(Request(TEXTS[0], IMAGES[0], chat=False)))[0]
    with pytest.raises(TimeoutError):
        handle.result(1e-9)
    handle.cancel()
    assert all(isinstance(s, Sequence) for s in engine._scheduler._begun)
