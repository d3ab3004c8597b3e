"""Requests that join and leave a running batch: each is answered as if it were alone, and nothing leaks.

Random traces of submit, step and cancel with mixed policies, lengths, pictures, sampling and stop rules.
"""

import asyncio
import functools
import itertools
import math
import random
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import strategies as st
from hypothesis.stateful import rule

from dyvte_engine import (
    CacheError,
    DynamicExit,
    FastV,
    FixedExit,
    InvalidArgumentError,
    KeepAll,
    ModelError,
    PromptError,
    PyramidDrop,
    Random,
    Request,
    RequestCancelledError,
    compose,
)
from dyvte_engine.models.linear import packing_fault
from dyvte_engine.models.tower_layers import BlocksAhead
from dyvte_engine.policies import Composed
from dyvte_engine.runtime import scheduler as scheduler_module
from dyvte_engine.runtime import sequence as sequence_module
from dyvte_engine.runtime.prefill import Prefill
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_exit import random_heads
from tests.engine.traces import Traces, settings_of, told

TEXTS, IMAGES = tiny.prompts(seed=7, n=16)
PICTURE = max(range(16), key=lambda i: len(IMAGES[i]))


@dataclass(frozen=True)
class Late(KeepAll):
    """Leaves after layer 1, and nobody knows before."""

    def layers(self, num_layers):
        return {1}

    def decide(self, state):
        return [state.rows.source[:0]] * len(state.rows.n_visual)


@dataclass(frozen=True)
class Awaited(Late):
    """The same, said when the next layer has begun, as where a decision is on its way from a device."""

    def decide(self, state):
        return lambda: super(Awaited, self).decide(state)


@dataclass(frozen=True)
class AwaitedThenLate(Late):
    """Asked after layer 0 too, when it says later that all stay."""

    def layers(self, num_layers):
        return {0, 1}

    def decide(self, state):
        nobody = [None] * len(state.rows.n_visual)
        return super().decide(state) if state.layer else lambda: nobody


POLICIES = {
    "none": None,
    "keep-all": KeepAll(),
    "before": FixedExit(-1),
    "fixed": FixedExit(1),
    "notation": "fastv:1,0.5+fixed:2",
    "dynamic": DynamicExit(random_heads(4), 0.7),
    "fastv+dynamic": compose(FastV(1, 0.5), DynamicExit(random_heads(4), 0.6, hysteresis=2)),
    "random": Random(0, 0.5),
    "pyramid": PyramidDrop(),
    "late": Late(),
    "awaited": Awaited(),
    "awaited, then late": AwaitedThenLate(),
}
SAMPLING = {
    "greedy": {},
    "sampled": dict(do_sample=True, temperature=1.3, top_k=40),
    "penalty": dict(repetition_penalty=1.4),
    "stop string": dict(stop_strings=["w7", "w1 w2", "w33"]),
    "end tokens": dict(eos_token_id=list(range(3, 30))),
}
requests = st.tuples(
    st.integers(0, len(TEXTS) - 1),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(sorted(SAMPLING)),
    st.integers(0, 3),
    st.sampled_from([1, 2, 3, 9, 24]),
)


def request_of(spec, priority=0):
    prompt, policy, sampling, seed, n = spec
    options = dict(max_new_tokens=n, **SAMPLING[sampling])
    return Request(
        TEXTS[prompt],
        IMAGES[prompt],
        chat=False,
        policy=POLICIES[policy],
        seed=seed,
        priority=priority,
        options=options,
    )


@functools.cache
def engines():
    """One whose pool holds about two requests and whose slices are short, and one for each request alone."""
    memory, packed = 4 * 48 * 2 * 4 * 2 * 2 * 16 * 4 // 2, packing_fault(torch.float32) is None  # towers stop then
    tight, _ = build(page_size=4, max_batch=3, max_stall=40, max_len=192, kv_memory=memory, pack_weights=packed)
    alone, _ = build(page_size=4, max_batch=1, max_len=192, pack_weights=packed)
    return tight, alone


@functools.cache
def answer(spec):
    r = request_of(spec)
    alone = engines()[1]
    return told(alone.generate(r.prompt, r.images, chat=False, policy=r.policy, seed=r.seed, **r.options))


class SchedulerTraces(Traces):
    request_of, answer = request_of, answer

    def __init__(self):
        super().__init__(engines()[0])

    @rule(spec=requests, priority=st.integers(-1, 1))
    def submit(self, spec, priority):
        self.ask(spec, priority)


TestTraces = SchedulerTraces.TestCase
TestTraces.settings = settings_of(30)


@functools.cache
def sharing():
    """Its pool holds one of the longest requests, and what is usual is promised."""
    longest = max(map(len, engines()[1].tokenize(TEXTS, IMAGES, chat=False))) + 24
    memory = 4 * -(-longest // 4) * 4 * 2 * 2 * 16 * 4
    return build(page_size=4, max_batch=5, max_stall=40, max_len=longest, kv_memory=memory, prefix_cache=0)[0]


overlapping = st.tuples(
    st.integers(0, len(TEXTS) - 1),
    st.sampled_from(["dynamic", "fastv+dynamic", "awaited", "keep-all"]),
    st.just("greedy"),
    st.just(0),
    st.sampled_from([9, 24]),
)


class UsualTraces(SchedulerTraces):
    """Whatever part of their worst case requests are promised, all are answered, and right."""

    def __init__(self):
        Traces.__init__(self, sharing())

    @rule(spec=overlapping, priority=st.integers(-1, 1))
    def submit(self, spec, priority):
        self.ask(spec, priority)

    @rule(share=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]))
    def usual(self, share):
        self.scheduler._shares = {type(policy): share for policy in POLICIES.values()}


TestUsualTraces = UsualTraces.TestCase
TestUsualTraces.settings = settings_of(40)


def specs(n):
    policies, sampling = sorted(POLICIES), sorted(SAMPLING)
    return [
        (i % 16, policies[i % len(policies)], sampling[i % len(sampling)], i % 3, 3 + 5 * (i % 4)) for i in range(n)
    ]


def test_threads_that_submit_stream_and_generate_at_once():
    """Every thread gets its own answers, whoever runs the steps."""
    engine, _ = engines()
    right = []

    def work(offset):
        for spec in specs(24)[offset::4]:
            r = request_of(spec)
            if offset % 2:
                got = told(engine.submit(r).result(60))
            else:
                options = dict(chat=False, policy=r.policy, seed=r.seed, **r.options)
                chunks = list(engine.stream(r.prompt, r.images, **options))
                got = told(chunks[-1].result)
            assert got == answer(spec), spec
            right.append(spec)

    for spec in specs(24):
        answer(spec)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert sorted(right) == sorted(specs(24))
    engine.check_integrity()
    assert engine.pool.claimed == 0


def test_async_iteration():
    engine, _ = engines()

    async def ask(spec):
        handle = engine.submit(request_of(spec))
        text = "".join([chunk.text async for chunk in handle])
        result = await handle.wait()
        assert text == result.text
        return told(result)

    async def all_of(chosen):
        return await asyncio.gather(*(ask(spec) for spec in chosen))

    chosen = specs(10)
    assert asyncio.run(all_of(chosen)) == [answer(spec) for spec in chosen]


def test_all_who_wait_in_one_loop_are_woken_by_one_call_into_it(monkeypatch):
    """Each is a system call, and there is a token for everybody in every step."""
    engine, _ = build(page_size=4, max_batch=4)
    handles = queue(engine, *((i, "fixed", "greedy", 0, 3) for i in range(4)))
    calls = []

    async def read(handle):
        return [chunk.text async for chunk in handle]

    async def all_of():
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(1) or call(*args), raising=False)
        tasks = [asyncio.create_task(read(handle)) for handle in handles]
        while not all(handle.done for handle in handles):
            await asyncio.sleep(0.001)
            calls.clear()
            engine._scheduler.step()
            engine._worker.notify()
            assert len(calls) <= 1
        return ["".join(await task) for task in tasks]

    assert asyncio.run(all_of()) == [handle.result().text for handle in handles]


def test_a_stream_that_is_left_frees_everything():
    engine, _ = engines()
    for chunk in engine.stream(TEXTS[:4], IMAGES[:4], chat=False, max_new_tokens=20):
        assert chunk.token_id >= 0
        break
    assert engine.pool.claimed == 0
    never = engine.stream(TEXTS[0], IMAGES[0], chat=False)
    del never
    assert not engine._scheduler.has_work


def test_priority_goes_first():
    engine, _ = build(page_size=4, max_batch=2)
    order = []
    handles = [
        engine._enqueue(engine._prepare_request(request_of((i, "fixed", "greedy", 0, 2), priority)))[0]
        for i, priority in enumerate([0, 0, 5, 0, 5])
    ]
    while not all(h.done for h in handles):
        engine._scheduler.step()
        order += [i for i, h in enumerate(handles) if h.done and i not in order]
    assert order == [2, 4, 0, 1, 3]


def test_what_cannot_be_queued_is_refused_at_once():
    engine, _ = engines()
    with pytest.raises(InvalidArgumentError, match="a Request"):
        engine.submit("Hello")
    with pytest.raises(InvalidArgumentError, match="one prompt"):
        engine.submit(Request(["a", "b"], chat=False))
    with pytest.raises(PromptError, match="max_len"):
        engine.submit(Request("w1", chat=False, options=dict(max_new_tokens=1000)))
    with pytest.raises(InvalidArgumentError, match="policy"):
        engine.submit(Request("w1", chat=False, policy=3))
    assert not engine._scheduler.has_work


def test_pages_held_by_an_open_prefill_are_not_waited_for():
    engine, _ = build(page_size=4, max_batch=1, max_len=32, prefix_cache=0)
    texts, images = tiny.prompts(seed=3, n=1, images=(0,))
    running = engine.prefill_prepared(engine.prepare(texts, images, chat=False))
    with pytest.raises(CacheError, match=r"Engine\.prefill"):
        engine.generate(texts[0], chat=False, max_new_tokens=8)
    running.close()
    assert engine.generate(texts[0], chat=False, max_new_tokens=8).stats.new_tokens == 8


def test_one_failing_request_leaves_its_neighbours_alone(monkeypatch):
    engine, _ = engines()
    chosen = [(i, "fixed", "greedy", 0, 9) for i in range(3)]
    want = [answer(spec) for spec in chosen]
    prepare = engine.model.prepare

    def failing(prompts, *more):
        if any(torch.equal(p.inputs["pixel_values"], bad) for p in prompts if p.inputs):
            raise RuntimeError("the tower is out of memory")
        return prepare(prompts, *more)

    sequences = [engine._prepare_request(request_of(spec))[0] for spec in chosen]
    bad = sequences[1].prompt.inputs["pixel_values"]
    engine.runner.pictures.clear()
    monkeypatch.setattr(engine.model, "prepare", failing)
    handles = engine._enqueue(sequences)
    assert told(handles[0].result()) == want[0] and told(handles[2].result()) == want[2]
    with pytest.raises(RuntimeError, match="out of memory"):
        handles[1].result()
    engine.check_integrity()
    assert engine.pool.claimed == 0


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_an_interrupt_leaves_nothing_behind(where, monkeypatch):
    """Ctrl-C in the middle of a step: the call ends with it, and the next one is as on the first day."""
    engine, _ = engines()
    spec = specs(4)[3]
    want, r = answer(spec), request_of(spec)
    target = engine._scheduler._running if where == "step" else engine.model.decoder
    name = "feed" if where == "step" else "layer"
    monkeypatch.setattr(target, name, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    options = dict(chat=False, policy=r.policy, seed=r.seed, **r.options)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(r.prompt, r.images, **options)
    monkeypatch.undo()
    engine.check_integrity()
    assert engine.pool.claimed == 0 and not engine._scheduler.has_work
    assert told(engine.generate(r.prompt, r.images, **options)) == want


@pytest.mark.parametrize("steps", [0, 1])
def test_an_interrupt_leaves_those_who_wait(steps, monkeypatch):
    """Only who has begun ends with it."""
    engine, _ = build(page_size=4, max_batch=1)
    chosen = [(i, "fixed", "greedy", 0, 3) for i in range(3)]
    first, *others = queue(engine, *chosen)
    for _ in range(steps):
        engine._scheduler.step()
    monkeypatch.setattr(engine._scheduler, "_choose", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine._scheduler.step()
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        first.result(0)
    assert [told(handle.result()) for handle in others] == [answer(spec) for spec in chosen[1:]]
    engine.check_integrity()
    assert engine.pool.claimed == 0


def test_an_interrupt_between_two_halves_of_a_cancel_loses_nobody(monkeypatch):
    """Nor where one who waits is refused: who is not done yet is still there."""
    engine, _ = build(page_size=4, max_batch=1, max_len=96, prefix_cache=0)
    spec = 1, "fixed", "greedy", 0, 3
    (handle,) = queue(engine, spec)
    scheduler, held = engine._scheduler, engine.runner.cache(1, 1)
    held.claim(0, engine.pool.n_pages)
    monkeypatch.setattr(handle, "fail", lambda error: (_ for _ in ()).throw(KeyboardInterrupt()))
    for interrupted in (handle.cancel, scheduler.step):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not handle.done and scheduler.counts["waiting"] == 1
    monkeypatch.undo()
    held.close()
    assert told(handle.result()) == answer(spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True), dict(repetition_penalty=1.2)])
def test_logits_that_are_not_finite_end_their_request_alone(value, sampling, monkeypatch):
    """A token of them would be made up. The neighbour is answered."""
    engine, _ = build(page_size=4, max_batch=2, graphs=False)  # which would not call what is patched
    want = engine.generate("w1 w2 w3", chat=False, max_new_tokens=6).token_ids
    logits = engine.model.decoder.logits

    def overflows(hidden):
        out = logits(hidden)
        out[0, 7] = value
        return out

    handles = [
        engine._enqueue(engine._prepare_request(Request(text, chat=False, options=dict(max_new_tokens=6, **options))))[
            0
        ]
        for text, options in (("w9", sampling), ("w1 w2 w3", {}))
    ]
    engine._scheduler.step()  # both have a token
    monkeypatch.setattr(engine.model.decoder, "logits", overflows)
    engine._scheduler.step()
    monkeypatch.undo()
    with pytest.raises(ModelError, match="not finite"):
        handles[0].result()
    assert handles[1].result().token_ids == want
    engine.check_integrity()


@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True), dict(repetition_penalty=1.2)])
def test_the_first_word_of_the_vocabulary_is_a_word(sampling, monkeypatch):
    engine, _ = build(page_size=4, max_batch=2, graphs=False)
    logits = engine.model.decoder.logits
    monkeypatch.setattr(engine.model.decoder, "logits", lambda hidden: logits(hidden).index_fill(1, zero, 1e4))
    zero = torch.tensor([0])
    assert engine.generate("w1 w2", chat=False, max_new_tokens=3, **sampling).token_ids == [0, 0, 0]


def test_the_thread_comes_back_after_an_error(monkeypatch):
    engine, _ = build(page_size=4, max_batch=2)
    request = Request("w1 w2", chat=False, options=dict(max_new_tokens=3))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(engine._scheduler, "_choose", lambda: (_ for _ in ()).throw(SystemExit()))
    handle = engine.submit(request)
    with pytest.raises(SystemExit):
        handle.result(20)
    monkeypatch.undo()
    assert engine.submit(request).result(20).stats.new_tokens == 3


def test_a_group_does_not_stall_those_who_run_for_longer_than_a_slice():
    """Three prompts that come while one is answered are not prefilled as one: a layer of all would exceed the slice."""
    engine, _ = build(page_size=4, max_batch=6, max_stall=30)
    seen, (running, *others) = [], [(i, "keep-all", "greedy", 0, 24) for i in range(4)]
    first = engine._enqueue(engine._prepare_request(request_of(running)))[0]
    engine._scheduler.step()
    for spec in others:
        engine._enqueue(engine._prepare_request(request_of(spec)))
    while not first.done:
        engine._scheduler.step()
        group = engine._scheduler._group
        if group is not None:
            rows = [len(s.prompt.input_ids) for s in group.sequences]
            seen.append(len(rows) == 1 or sum(rows) <= 30)
    assert seen and all(seen)


def test_few_wait_for_half_a_slice():
    """On a CPU; there it costs little, and where many are here a short slice would leave few to be decoded together."""
    engine, _ = build(page_size=4, max_batch=6, max_stall=30)
    slices, asked = [], Request("w1", chat=False, options=dict(max_new_tokens=24, eos_token_id=[]))
    for n in (1, 7, 4, 4, 4):
        for _ in range(n):
            engine._enqueue(engine._prepare_request(asked))
        engine._scheduler.step()  # the first begins, the others wait
        slices.append(engine._scheduler._slice)
    assert slices == [15, 15, 22.5, 30, 30]
    engine._scheduler._queued = True  # a device whose steps cost the same for one and for many
    assert engine._scheduler._slice == 30


@pytest.mark.parametrize("prefix_cache", [0, 1 << 20])
@pytest.mark.parametrize(("more", "slices"), [(3.1, [3, 1]), (2.9, [2, 2]), (2, [2, 2]), (0.9, [1, 1, 1, 1])])
def test_a_slice_is_as_many_layers_as_fit_into_it(prefix_cache, more, slices, monkeypatch):
    monkeypatch.setattr(scheduler_module, "_MANY", 1)  # slices are whole
    text, rows = next((t, len(t.split())) for t, pictures in zip(TEXTS, IMAGES) if not pictures)
    engine, _ = build(page_size=4, max_batch=2, max_stall=int(more * rows), prefix_cache=prefix_cache)
    asked = [
        Request(t, chat=False, options=dict(max_new_tokens=n, eos_token_id=[])) for t, n in (("w1", 24), (text, 2))
    ]
    (first,) = engine._enqueue(engine._prepare_request(asked[0]))
    engine._scheduler.step()
    layer, seen, counts = engine.model.decoder.layer, [], []

    def watched(number, hidden, x, of):
        seen.extend([len(hidden)] if isinstance(of, Prefill) else [])
        return layer(number, hidden, x, of)

    monkeypatch.setattr(engine.model.decoder, "layer", watched)
    (second,) = engine._enqueue(engine._prepare_request(asked[1]))
    while not second.done:
        seen.clear()
        engine._scheduler.step()
        counts.extend([len(seen)] if seen else [])
        assert set(seen) <= {rows}
    assert counts == slices and not first.done
    assert first.result().stats.new_tokens == 24


def cut_tower():
    """An engine with somebody who is answered, whose scheduler stops between the blocks of a tower.

    Returns it, the handle and the right answer, and the numbers of two prompts with a picture.
    """
    if packing_fault(torch.float32) or int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("a tower whose weights are not packed runs as a whole, and so does that of releases before 5")
    engine, _ = build(page_size=4, max_batch=4, max_stall=1, pack_weights=True, picture_cache=0)
    longest = max(((i, "keep-all", "greedy", 0, 24) for i in range(16)), key=lambda spec: len(answer(spec)[0]))
    (first,) = queue(engine, longest)
    while not engine._scheduler.counts["running"]:
        engine._scheduler.step()
    return engine, (first, answer(longest)), [i for i, pictures in enumerate(IMAGES) if len(pictures) == 1][:2]


def test_a_picture_in_the_tower_does_not_stall_those_who_run(monkeypatch):
    """A step computes at most one block of one picture, and a token; the answers are those of each alone."""
    engine, (first, right), pictures = cut_tower()
    step, ran, most = BlocksAhead._step, [], []
    monkeypatch.setattr(BlocksAhead, "_step", lambda ahead: ran.append(step(ahead)))
    engine._scheduler._max_stall = 10**6
    chosen = [(i, "fixed", "greedy", 0, 3) for i in pictures]
    handles = queue(engine, *chosen)
    engine._scheduler._admit()
    engine._scheduler._max_stall = 1
    while not first.done and not all(h.done for h in handles):
        before = len(ran), len(first._chunks)
        engine._scheduler.step()
        most.append(len(ran) - before[0])
        assert first.done or len(first._chunks) == before[1] + 1
    assert sum(most) == 2 * 1 and set(most) <= {0, 1}, "of two blocks LLaVA reads the first"
    assert [told(handle.result()) for handle in handles] == [answer(spec) for spec in chosen]
    assert told(first.result()) == right


@pytest.mark.parametrize("packed", [packing_fault(torch.float32) is None, False])
def test_pictures_that_the_tower_has_seen_do_not_fill_a_slice(packed):
    """Questions of three policies about one picture, which are three groups, enter in one slice that has room."""
    engine, _ = build(page_size=4, max_batch=4, max_stall=10**6, prefix_cache=0, pack_weights=packed)
    picture = next(i for i, pictures in enumerate(IMAGES) if len(pictures) == 1)
    chosen = [(picture, policy, "greedy", 0, 3) for policy in ("keep-all", "fixed", "late")]
    queue(engine, chosen[0])[0].result()
    (first,) = queue(engine, (0, "keep-all", "greedy", 0, 24))
    engine._scheduler.step()
    handles = queue(engine, *chosen)
    engine._scheduler.step()
    assert engine._scheduler.counts == dict(waiting=0, prefilling=0, running=4)
    assert [told(h.result()) for h in handles] == [answer(spec) for spec in chosen]
    first.cancel()


@pytest.mark.parametrize("what", ["cancel", "interrupt", "fail"])
def test_who_ends_in_the_middle_of_a_tower_leaves_the_others(what, monkeypatch):
    """One of two whose pictures are there is cancelled, or a block is interrupted, or fails for one of them."""
    engine, (first, right), pictures = cut_tower()
    chosen = [(i, "fixed", "greedy", 0, 3) for i in pictures]
    engine._scheduler._max_stall = 10**6
    handles = queue(engine, *chosen)
    engine._scheduler._admit()
    engine._scheduler._max_stall = 1
    for _ in range(2):
        engine._scheduler.step()
    assert len(engine._scheduler._group._ahead.blocks._became[0]) == 1
    if what == "cancel":
        handles[0].cancel()
    else:
        error = KeyboardInterrupt if what == "interrupt" else ZeroDivisionError
        monkeypatch.setattr(BlocksAhead, "_step", lambda ahead: (_ for _ in ()).throw(error()))
        with pytest.raises(KeyboardInterrupt) if what == "interrupt" else nullcontext():
            engine._scheduler.step()
        monkeypatch.undo()
    if what == "interrupt":
        for handle in (first, *handles):
            with pytest.raises(KeyboardInterrupt):
                handle.result(0)
    else:
        assert told(first.result()) == right
        assert [told(h.result()) for h in handles[what == "cancel" :]] == [
            answer(s) for s in chosen[what == "cancel" :]
        ]
    engine.check_integrity()
    assert engine.pool.claimed == 0 and not engine._scheduler.has_work


def queue(engine, *chosen):
    """Their handles; nothing runs yet."""
    return [engine._enqueue(engine._prepare_request(request_of(spec)))[0] for spec in chosen]


def test_who_is_where_is_counted():
    engine, _ = build(page_size=4, max_batch=4, max_stall=1000)
    scheduler, picture = engine._scheduler, next(i for i, pictures in enumerate(IMAGES) if pictures)
    seen = []
    first = queue(engine, (picture, "fixed", "greedy", 0, 24))
    seen.append(tuple(scheduler.counts.values()))
    scheduler.step()
    others = queue(
        engine, (0, "keep-all", "greedy", 0, 3), (1, "keep-all", "greedy", 0, 3), (2, "fixed", "greedy", 0, 3)
    )
    for _ in range(2):
        seen.append(tuple(scheduler.counts.values()))
        scheduler.step()
    assert list(scheduler.counts) == ["waiting", "prefilling", "running"]
    assert seen == [(1, 0, 0), (3, 0, 1), (1, 2, 1)]
    for handle in first + others:
        handle.result()
    assert set(scheduler.counts.values()) == {0}


@pytest.mark.parametrize("gone", range(4))
@pytest.mark.parametrize("steps", range(1, 6))
def test_one_cancelled_while_a_group_is_prefilled_leaves_the_others_their_prompts(gone, steps):
    """The one who runs, or one of the group: before it is prepared, after it, and between the layers."""
    engine, _ = build(page_size=4, max_batch=4, max_stall=120)
    longest = max(((i, "keep-all", "greedy", 0, 24) for i in range(16)), key=lambda spec: len(answer(spec)[0]))
    chosen = [longest, *((i, "keep-all", "greedy", 0, 3) for i in range(1, 4))]
    handles = queue(engine, chosen[0])
    engine._scheduler.step()
    handles += queue(engine, *chosen[1:])
    for _ in range(steps):
        engine._scheduler.step()
    held, claimed = not (handles[gone].done or engine._scheduler.counts["waiting"]), engine.pool.claimed
    handles[gone].cancel()
    if held:
        assert engine.pool.claimed < claimed, "its pages are free at once"
    for handle, spec in zip(handles, chosen, strict=True):
        if handle is not handles[gone]:
            assert told(handle.result()) == answer(spec)
    engine.check_integrity()
    assert engine.pool.claimed == 0


@dataclass(frozen=True)
class Stumbling(KeepAll):
    def layers(self, num_layers):
        return {1}

    def decide(self, state):
        raise ZeroDivisionError


def test_a_policy_that_fails_ends_its_group_alone():
    engine, _ = build(page_size=4, max_batch=4, max_stall=1000)
    picture = next(i for i, pictures in enumerate(IMAGES) if pictures)
    running = (picture, "fixed", "greedy", 0, 24)
    first = queue(engine, running)[0]
    engine._scheduler.step()
    failing = Request(TEXTS[picture], IMAGES[picture], chat=False, policy=Stumbling())
    handle = engine._enqueue(engine._prepare_request(failing))[0]
    later = queue(engine, (1, "fixed", "greedy", 0, 3))[0]
    with pytest.raises(ZeroDivisionError):
        handle.result()
    assert told(first.result()) == answer(running) and told(later.result()) == answer((1, "fixed", "greedy", 0, 3))
    engine.check_integrity()
    assert engine.pool.claimed == 0 and not engine._scheduler.has_work


@pytest.mark.parametrize(
    ("policy", "visual"),
    [
        (KeepAll(), [9, 9, 9, 9]),
        (FixedExit(-1), [0, 0, 0, 0]),
        (FixedExit(1), [9, 9, 0, 0]),
        (FastV(1, 0.5), [9, 5, 5, 5]),
        (compose(FastV(1, 0.5), FixedExit(2)), [9, 5, 5, 0]),
        (DynamicExit(random_heads(4), 0.7), [9, 9, 9, 9]),
        (Stumbling(), [9, 9, 9, 9]),
    ],
)
def test_what_a_policy_is_sure_to_take_out_is_not_reserved(policy, visual):
    """And no request is promised less than it holds in any layer."""
    engine, _ = build(page_size=4, max_batch=4, prefix_cache=0)
    assert policy.most(9, 4) == visual
    pages, bound = engine.pool.pages, engine.bind(policy)
    assert engine.runner.worst_pages(30, 9, bound, None) == sum(pages(21 + n) for n in visual)


@dataclass(frozen=True)
class Says(FixedExit):
    """With an own opinion of what layers see."""

    says: object = None

    def most(self, visual, num_layers):
        return self.says(visual)


@dataclass(frozen=True)
class LaterExit(FixedExit):
    def layers(self, num_layers):
        return {self.layer + 1}


@dataclass(frozen=True)
class LaterFastV(FastV):
    def layers(self, num_layers):
        return {self.k}


@dataclass(frozen=True)
class KeepsMore(FastV):
    def decide(self, state):
        return [None] * len(state.rows.n_visual)


@pytest.mark.parametrize("says", [lambda n: None, lambda n: [n], lambda n: [n, n, n, -1], lambda n: [n, 0, 0, n + 1]])
def test_a_policy_that_promises_nonsense_is_refused_at_once(says):
    """Not when its turn comes, in a step that others wait for."""
    engine, _ = build(page_size=4)
    picture = next(i for i, pictures in enumerate(IMAGES) if pictures)
    for policy in Says(0, says), compose(KeepAll(), Says(0, says)):
        with pytest.raises(InvalidArgumentError, match=r"Says\.most.*accepted: 4 whole numbers"):
            engine.generate(TEXTS[picture], IMAGES[picture], chat=False, policy=policy)
    assert not engine._scheduler.has_work and engine.generate("w1", chat=False, max_new_tokens=1).token_ids


def test_a_policy_that_fails_to_say_what_layers_see_leaves_the_others():
    engine, _ = build(page_size=4, max_batch=4)
    picture = next(i for i, pictures in enumerate(IMAGES) if pictures)
    (first,) = queue(engine, (picture, "fixed", "greedy", 0, 24))
    engine._scheduler.step()
    with pytest.raises(ZeroDivisionError):
        engine.submit(Request(TEXTS[picture], IMAGES[picture], chat=False, policy=Says(0, lambda n: n // 0)))
    assert told(first.result()) == answer((picture, "fixed", "greedy", 0, 24))


@pytest.mark.parametrize(
    "policy", [LaterExit(0), LaterFastV(1, 1), KeepsMore(1, 1), compose(LaterExit(0)), Composed(())], ids=str
)
def test_what_a_subclass_may_keep_is_reserved(policy):
    """Five requests, in a pool with less room than they need together: each waits for its turn."""
    picture, prompt = IMAGES[next(i for i, pictures in enumerate(IMAGES) if pictures)][:1], "<image> w1"
    sizes = dict(page_size=1, max_len=25, max_batch=8, picture_cache=0, prefix_cache=0)
    engine, _ = build(kv_memory=110 * 4 * 2 * 2 * 16, **sizes)
    want = build(**sizes)[0].generate(prompt, picture, chat=False, policy=policy, max_new_tokens=2)
    got = engine.generate([prompt] * 5, [picture] * 5, chat=False, policy=policy, max_new_tokens=2)
    assert all(told(g) == told(want) for g in got)
    engine.check_integrity()


@pytest.mark.parametrize("policy", [FixedExit(-1), FixedExit(0), FastV(1, 0.5)])
def test_the_last_row_of_a_prompt_that_ends_in_a_picture_is_reserved(policy):
    """It stays, since the next token follows from it. The pool is full with what these are promised."""
    room, prompt, picture = 4 * 32, "w1 <image>", IMAGES[next(i for i, pictures in enumerate(IMAGES) if pictures)][:1]
    row = 4 * 2 * 2 * 16  # bytes of one in a layer
    sizes = dict(page_size=1, max_len=32, max_batch=32, picture_cache=0, prefix_cache=0)
    engine, _ = build(kv_memory=room * row, **sizes)
    want = build(**sizes)[0].generate(prompt, picture, chat=False, policy=policy, max_new_tokens=1)
    got = engine.generate([prompt] * 32, [picture] * 32, chat=False, policy=policy, max_new_tokens=1)
    assert all(told(g) == told(want) for g in got)
    assert engine.runner.worst_pages(17, 15, engine.bind(policy), None) == sum(want.stats.tokens_per_layer)
    engine.check_integrity()


def test_a_claim_that_counts_on_a_later_exit_does_not_grow_with_an_earlier_one():
    """FastV leaves rows that the exit is sure to take. The pool is nearly full with what both were promised."""
    picture, prompt = IMAGES[next(i for i, pictures in enumerate(IMAGES) if pictures)][:1], "<image> w1"
    policy, row = compose(FastV(1, 0.25), FixedExit(1)), 4 * 2 * 2 * 16  # bytes of a row in a layer
    sizes = dict(page_size=1, max_len=25, picture_cache=0, prefix_cache=0)
    engine, _ = build(kv_memory=100 * row, max_stall=1, **sizes)
    assert engine.runner.worst_pages(17, 16, engine.bind(policy), None) == 17 + 13 + 1 + 1
    long = Request("w1 w2", chat=False, options=dict(max_new_tokens=12))  # others are prefilled in slices meanwhile
    short = Request(prompt, picture, chat=False, policy=policy, options=dict(max_new_tokens=1))
    want = build(**sizes)[0].generate(prompt, picture, chat=False, policy=policy, max_new_tokens=1)
    running = engine._enqueue(engine._prepare_request(long))[0]
    engine._scheduler.step()
    assert told(engine._enqueue(engine._prepare_request(short))[0].result()) == told(want)
    assert len(running.result().token_ids) == 12
    engine.check_integrity()


def test_a_claim_falls_with_the_exit_while_the_prefill_is_under_way():
    """Between two layers, by exactly the pages that the layers behind it will not need."""
    engine, _ = build(page_size=4, max_batch=4, max_stall=1, prefix_cache=0)
    scheduler, picture = engine._scheduler, next(i for i, pictures in enumerate(IMAGES) if pictures)
    chosen = [(0, "keep-all", "greedy", 0, 24), (picture, "late", "greedy", 0, 3)]
    right = [answer(spec) for spec in chosen]
    (first,) = queue(engine, chosen[0])
    scheduler.step()
    (other,) = queue(engine, chosen[1])
    claims = []
    while not other.done:
        scheduler.step()
        if scheduler._group is not None and scheduler._group.sequences:
            claims.append(
                (scheduler._group._prefill and scheduler._group._prefill.next, scheduler._group.cache.claims[0])
            )
    (sequence,) = engine._prepare_request(request_of(chosen[1]))
    n, visual, pages = sequence.rows, sequence.visual_tokens, engine.pool.pages
    assert {claim for layer, claim in claims if not layer or layer < 2} == {4 * pages(n)}
    assert {claim for layer, claim in claims if layer and layer >= 2} == {2 * pages(n) + 2 * pages(n - visual)}
    assert [told(handle.result()) for handle in (first, other)] == right


@pytest.mark.parametrize("name", ["awaited", "late", "awaited, then late"])
def test_a_claim_never_falls_below_the_pages_that_are_held(name):
    """Those of later layers, taken while a decision was under way, are back before others may claim them."""
    engine, _ = build(page_size=4, max_batch=4, max_stall=1, prefix_cache=0)
    scheduler = engine._scheduler
    queue(engine, (0, "keep-all", "greedy", 0, 24))
    scheduler.step()
    (other,) = queue(engine, (PICTURE, name, "greedy", 0, 1))
    while not other.done:
        scheduler.step()
        for cache in engine.runner._caches:
            assert all(cache.held(b) <= cache.claims[b] for b in range(cache.count))
    assert told(other.result()) == answer((PICTURE, name, "greedy", 0, 1))


def waiting_group(share, policy, others=0):
    """An engine whose pool one long answer leaves too small for a picture's worst case, and the handles of both.

    The picture's is promised a `share` of it. Behind the picture `others` wait.
    """
    engine, _ = engines()
    (sequence,) = engine._prepare_request(request_of((PICTURE, "late", "greedy", 0, 3)))
    worst, long = 4 * engine.pool.pages(sequence.rows), 4 * engine.pool.pages(2 + 24 - 1)
    most = 4 * engine.pool.pages(sequence.rows - sequence.visual_tokens)
    free = (worst + most) // 2 + 2  # of a late one's worst case half of the layers have the picture
    page = 4 * 4 * 2 * 2 * 16  # bytes
    sizes = dict(page_size=4, max_batch=4, max_len=sequence.rows + 1, max_stall=1000, prefix_cache=0)
    engine, _ = build(kv_memory=(long + free) * page, **sizes)
    scheduler = engine._scheduler
    scheduler._shares = {type(engine.bind(policy)): share}
    request = Request("w1 w2", chat=False, options=dict(max_new_tokens=24))
    first = engine._enqueue(engine._prepare_request(request))[0]
    scheduler.step()
    request = Request(TEXTS[PICTURE], IMAGES[PICTURE], chat=False, policy=policy, options=dict(max_new_tokens=3))
    rest = [engine._enqueue(engine._prepare_request(request))[0] for _ in range(1 + others)]
    for _ in range(4):
        scheduler.step()
    return engine, first, rest


@pytest.mark.parametrize("policy", [Late(), Awaited()])
@pytest.mark.parametrize(("share", "earlier"), [(1.0, False), (0.5, True)])
def test_what_is_usual_admits_earlier(share, earlier, policy):
    """Half of the layers will not have the picture, but that is not known before."""
    engine, first, (second,) = waiting_group(share, policy)
    assert engine._scheduler.counts["waiting"] == 1 - earlier
    assert told(second.result()) == answer((PICTURE, "late", "greedy", 0, 3)) and first.done != earlier
    assert first.result().stats.new_tokens == 24
    engine.check_integrity()


def test_a_group_that_needs_more_than_usual_waits_between_layers_for_who_runs():
    """And nobody else begins meanwhile; who runs gets a token in every step."""
    engine, first, rest = waiting_group(0.2, DynamicExit(random_heads(4), 1.0), others=1)
    scheduler, steps = engine._scheduler, 0
    group = scheduler._group
    while not first.done:
        assert scheduler._group is group and group.waits and group._prefill.next > 0
        assert scheduler.counts == dict(waiting=1, prefilling=1, running=1)
        before = len(first._chunks)
        scheduler.step()
        steps += 1
        assert len(first._chunks) == before + 1
    assert steps > 10
    want = answer((PICTURE, "keep-all", "greedy", 0, 3))[0]
    assert [handle.result().token_ids for handle in rest] == [want, want]
    engine.check_integrity()
    assert engine.pool.claimed == 0


@dataclass(frozen=True)
class ShortLeaves(KeepAll):
    """Asked after each layer but the last, and read later: two pictures leave after layer 2, more stay."""

    def layers(self, num_layers):
        return set(range(num_layers - 1))

    def decide(self, state):
        leave = [state.layer == 2 and n == 2 * tiny.VISUAL_TOKENS for n in state.rows.n_visual]
        return lambda: [state.rows.source[:0] if this else None for this in leave]


def test_a_group_that_waits_holds_nothing_beyond_its_claims():
    """Pages that were taken ahead, before a decision was read, go back before the claim falls."""
    engine, _ = build(page_size=1, max_batch=1, max_len=192)

    def asked(words, pictures, n, policy=None):
        text = " ".join(["<image>"] * pictures + [f"w{i}" for i in range(words)])
        images = [tiny.picture(random.Random(i)) for i in range(pictures)] or None
        options = dict(max_new_tokens=n, eos_token_id=[])
        return Request(text, images, chat=False, policy=policy, options=options)

    runs, long, short = asked(2, 0, 100), asked(60, 3, 80, ShortLeaves()), asked(10, 2, 7, ShortLeaves())
    worst = [4 * engine._prepare_request(request)[0].rows for request in (runs, long, short)]
    usual = sum(math.ceil(0.94 * n) for n in worst[1:])
    want = [told(engine.submit(request).result()) for request in (long, short)]
    sizes = dict(page_size=1, max_batch=3, max_len=192, max_stall=1000, prefix_cache=0)
    engine, _ = build(kv_memory=max(worst[0] + usual + 6, sum(worst[1:])) * engine.pool.page_bytes, **sizes)
    scheduler, held = engine._scheduler, engine.runner.cache(1, 1)
    scheduler._shares = {ShortLeaves: 0.94}
    engine._enqueue(engine._prepare_request(runs))
    scheduler.step()
    held.claim(0, engine.pool.claimable - usual - 6)
    handles = [engine._enqueue(engine._prepare_request(request))[0] for request in (long, short)]
    for _ in range(4):
        scheduler.step()
    group = scheduler._group
    assert group.waits and group._prefill.next == 3 and group._prefill.rows.n_visual[1] == 0
    assert all(group.cache.held(b) <= claim for b, claim in enumerate(group.cache.claims))
    held.close()
    assert [told(handle.result()) for handle in handles] == want
    assert engine.pool.claimed == 0


def test_a_group_does_not_wait_for_what_is_held_elsewhere():
    engine, first, (second,) = waiting_group(0.2, DynamicExit(random_heads(4), 1.0))
    held = engine.runner.cache(1, 1)
    held.claim(0, engine.pool.claimable)
    while not first.done:
        engine._scheduler.step()
    held.claim(0, held.claims[0] + engine.pool.claimable)  # before the next step can give it to the group
    with pytest.raises(CacheError, match=r"Engine\.prefill"):
        second.result()
    held.close()
    engine.check_integrity()
    assert engine.pool.claimed == 0


def test_what_is_usual_is_learnt_from_those_with_pictures():
    engine, _ = build(page_size=4, max_batch=4, prefix_cache=0)
    scheduler = engine._scheduler
    assert scheduler._shares == {}
    for policy in [*[Late()] * 12, KeepAll()]:
        engine.generate(TEXTS[PICTURE], IMAGES[PICTURE], chat=False, policy=policy, max_new_tokens=3)
        engine.generate("w1 w2", chat=False, policy=policy, max_new_tokens=3)
    (sequence,) = engine._prepare_request(request_of((PICTURE, "late", "greedy", 0, 3)))
    n, visual, pages = sequence.rows, sequence.visual_tokens, engine.pool.pages
    held = (2 * pages(n) + 2 * pages(n - visual)) / (4 * pages(n))
    assert scheduler._shares[Late] == pytest.approx(held + (1 - held) * (7 / 8) ** 12)
    assert scheduler._shares[KeepAll] == 1.0


def test_policies_are_bound_once():
    """By value, by notation and by what binding gave; heads are copied again when their values change."""
    engine, _ = build()
    heads = random_heads(3)
    one, two = (DynamicExit(heads, threshold) for threshold in (0.5, 0.9))
    bound = engine.bind(one)
    assert engine.bind(one) is bound and engine.bind(bound) is bound
    assert engine.bind(two).heads is bound.heads and engine.bind(two) is not bound
    assert engine.bind("fixed:2") is engine.bind("fixed:2") and engine.bind(FixedExit(2)) is engine.bind(FixedExit(2))
    heads.w2.data.add_(1)
    with torch.no_grad():
        heads.w2.mul_(2)
    again = engine.bind(one)
    assert again is not bound and not torch.equal(again.heads.w2, bound.heads.w2)
    with torch.inference_mode():
        made = DynamicExit(random_heads(5))
        assert engine.bind(made) is engine.bind(made)
    for layer in range(4):
        for k in range(40):
            engine.bind(compose(FixedExit(layer), Random(1, 0.01 * k)))
    assert len(engine._policies._bound) == len(engine._policies._keys) <= 64


def test_who_submits_or_cancels_does_not_wait_for_an_admission(monkeypatch):
    """Which hashes pictures: meanwhile another thread submits one more, and cancels the second that is chosen."""
    engine, _ = build(page_size=4, max_batch=4)
    known, chosen, late = engine.runner.known, [(i, "keep-all", "greedy", 0, 3) for i in range(3)], []
    handles = queue(engine, *chosen[:2])

    def meanwhile(prompt, policy):
        if not late:
            other = threading.Thread(target=lambda: (late.extend(queue(engine, chosen[2])), handles[1].cancel()))
            other.start()
            other.join(20)
            assert not other.is_alive()
        return known(prompt, policy)

    monkeypatch.setattr(engine.runner, "known", meanwhile)
    engine._scheduler._admit()
    assert engine.load["prefilling"] == engine.load["waiting"] == 1
    assert told(handles[0].result()) == answer(chosen[0]) and told(late[0].result()) == answer(chosen[2])
    with pytest.raises(RequestCancelledError):
        handles[1].result(0)
    engine.check_integrity()
    assert engine.pool.claimed == 0


class Bytes:
    """A tokenizer whose tokens are the bytes of a text."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    """The parts of an unfinished one give no text; what is still unfinished in the end shows as such."""
    engine, _ = engines()

    def stream(data, n):
        (sequence,) = engine._prepare_request(Request("w1", chat=False, options=dict(max_new_tokens=n)))
        engine._enqueue([sequence])
        engine._scheduler._waiting.clear()
        sequence._growing, sequence._figures = sequence_module.GrowingText(Bytes()), answer_figures()
        for byte in data:
            sequence.accept(byte)
            sequence.emit()
        return [chunk.text for chunk in sequence.handle._chunks], sequence.handle._result

    data = "aß€😀b".encode()
    texts, result = stream(data, len(data))
    assert texts == ["a", "", "ß", "", "", "€", "", "", "", "😀", "b"] and result.text == "aß€😀b"
    texts, result = stream(data[:-2], len(data) - 2)
    assert result.text == "".join(texts) == "aß€\ufffd"


def test_a_request_is_promised_the_rows_that_transformers_cache_has_in_the_end():
    engine, hf = build()
    for new in (1, 2, 5):
        options = dict(max_new_tokens=new, eos_token_id=[128])
        (sequence,) = engine._prepare_request(Request(TEXTS[1], IMAGES[1], chat=False, options=options))
        inputs = engine.model.processor(text=TEXTS[1], images=IMAGES[1] or None, return_tensors="pt")
        out = hf.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True)
        assert sequence.rows == out.past_key_values.get_seq_length()


def test_times_are_counted_from_the_question(monkeypatch):
    """On a clock that is half a second on whenever somebody looks: at the question, its turn, and each token."""
    engine, _ = build()
    for n, per_second in ((5, 2.0), (1, 0.0)):
        clock = itertools.count()
        monkeypatch.setattr(sequence_module, "time", SimpleNamespace(perf_counter=lambda c=clock: next(c) / 2))
        request = Request("w1", chat=False, options=dict(max_new_tokens=n, eos_token_id=[]))
        (sequence,) = engine._prepare_request(request)
        stats = engine._enqueue([sequence])[0].result().stats
        assert (stats.new_tokens, stats.decode_tokens_per_s) == (n, per_second)
        assert (stats.queued_s, stats.ttft_s) == pytest.approx((0.5, 1.0 + sequence.prompt.seconds))


def answer_figures():
    """Those of a prefill, of any values."""
    engine = engines()[1]
    stats = vars(engine.generate("w1", chat=False, max_new_tokens=1).stats)
    own = {"visual_tokens", "text_tokens", "new_tokens", "ttft_s", "queued_s", "vision_s", "decode_tokens_per_s"}
    own |= {"pictures_reused"}
    return {name: value for name, value in stats.items() if name not in own}


def test_one_thread_leads_at_a_time():
    engine, _ = build(page_size=4, max_batch=4)
    step, inside, most = engine._scheduler.step, [], []

    def watched():
        inside.append(threading.get_ident())
        most.append(len(set(inside)))
        step()
        inside.remove(threading.get_ident())

    engine._scheduler.step = watched
    work = [
        threading.Thread(target=lambda: engine.generate(TEXTS[:3], IMAGES[:3], chat=False, max_new_tokens=12))
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(60)
    assert len(most) > 12 and set(most) == {1}


def test_one_sequence_steps_with_a_tensor():
    engine, _ = build()
    texts, images = tiny.prompts(seed=5, n=1)
    prompts = engine.prepare(texts, images, chat=False)
    with engine.prefill_prepared(prompts) as one, engine.prefill_prepared(prompts) as other:
        torch.testing.assert_close(one.step(torch.tensor([9])), other.step([9]))
