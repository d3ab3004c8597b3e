"""Decoding, text-only layers and vision towers at fixed addresses give what they give plainly.

On the CPU a stand-in for the graph runs the step again at each replay; with `-m gpu` the same tests run real graphs.
Decoding runs on a CPU's own tapes too.
"""

import contextlib
import functools
import gc
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyvte_engine import (
    DynamicExit,
    Engine,
    EngineConfig,
    FastV,
    FixedExit,
    KeepAll,
    ToMe,
    VisionZip,
    VisualTokenPolicy,
    compose,
)
from dyvte_engine.kernels import graphs, ops
from dyvte_engine.kernels.attention import causal
from dyvte_engine.kernels.graphs import capture_cuda
from dyvte_engine.models import PreparedPrompt, VisionLanguageModel, tower_graphs
from dyvte_engine.models.tower_graphs import TowerGraphs
from dyvte_engine.models.tower_layers import TowerLayers
from dyvte_engine.runtime import layer_graphs, prefill
from dyvte_engine.runtime.decode import DecodeGraphs
from dyvte_engine.runtime.kv_cache import KVCache
from dyvte_engine.runtime.layer_graphs import BUCKETS, LayerGraphs, bucket_of
from dyvte_engine.runtime.running import Running
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_exit import LAYERS, Later, random_heads
from tests.families import zoo
from tests.policies import shared

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Operations(TorchDispatchMode):
    """Everything that torch is asked to do while it is entered, on which tensors; what that wrote is taken back."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a graph cannot read values on the host"
        kwargs = kwargs or {}
        named = dict(zip((a.name for a in function._schema.arguments), args)) | kwargs
        for argument in function._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and named.get(argument.name) is not None:  # an argument may be left out
                storage = named[argument.name].untyped_storage()
                self.before.setdefault(storage._cdata, (storage, storage.clone()))
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    def __exit__(self, *exc):
        super().__exit__(*exc)
        for storage, old in self.before.values():
            storage.copy_(old)
        self.before.clear()  # whoever replays keeps this object


def storages(values):
    return {v.untyped_storage()._cdata for v in tree_leaves(values) if isinstance(v, torch.Tensor)}


POOL = 8 << 20  # bytes of K/V; a replay of `Captures` copies all of it


class Captures:
    """What stands for `capture_cuda`: a replay runs no Python of the step, but its operations at the same addresses."""

    def __call__(self, step, memory):
        with Operations() as operations:
            result = step()

        def replay():
            for function, args, kwargs, out in operations.calls:
                new, given = function(*args, **kwargs), storages((args, kwargs))
                for there, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(value, torch.Tensor) and not storages(there) & given:
                        there.copy_(value)
            return result

        return replay


def test_each_device_captures_on_a_stream_of_its_own(monkeypatch):
    """torch's default is one stream for all graphs, of the device that captured first."""
    streams = []

    @contextlib.contextmanager
    def graph(graph, pool, stream, **options):
        streams.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: [device])
    monkeypatch.setattr(graphs, "_stream", functools.cache(graphs._stream.__wrapped__))
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert capture_cuda(lambda: "out", [])() == "out"
    assert streams == [[0], [1], [0]]
    assert streams[0] is streams[2], "graphs that share memory must share a stream"


def with_graphs(device, policy=None, **options):
    # What was seen runs no graph.
    plainly = dict(page_size=4, graphs=False, picture_cache=0, prefix_cache=0, kv_memory=POOL)
    engine, _ = build(device=device, policy=policy, **{**plainly, **options})
    plain, _ = build(device=device, policy=policy, **{**plainly, **options})
    capture = Captures() if device == "cpu" else capture_cuda
    graphs = DecodeGraphs(engine.model.decoder, engine.pool, engine.config.max_batch, engine.max_len, capture)
    engine.runner.graphs = engine._scheduler._running._graphs = graphs
    return engine, plain


def with_tapes(policy=None, **options):
    """As an engine on a CPU is, and one without tapes."""
    options = dict(page_size=4, picture_cache=0, prefix_cache=0, policy=policy) | options
    return build(**options)[0], build(**options, graphs=False)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", [KeepAll(), FixedExit(1), DynamicExit(random_heads(4), 0.7)])
def test_answers_equal_those_without_graphs(policy, device):
    """Sequences of different lengths end at different steps, so the batch shrinks; pages fill up on the way."""
    engine, plain = with_graphs(device, policy)
    buckets = answered_alike(engine, plain)
    assert len({pages for _, pages in buckets}) > 1


@pytest.mark.parametrize("decoder", tiny.DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_equal_those_without_tapes(decoder, dtype):
    engine, plain = with_tapes(FixedExit(1), decoder=decoder, dtype=dtype)
    assert plain.runner.graphs is None
    assert {pages for _, pages in answered_alike(engine, plain)} == {64}, "a tape for each length"


def answered_alike(engine, plain):
    texts, images = tiny.prompts(seed=91, n=12)
    options = {"chat": False, "max_new_tokens": 24, "eos_token_id": list(range(3, 12))}
    want = [r.token_ids for r in plain.generate(texts, images, **options)]
    assert [r.token_ids for r in engine.generate(texts, images, **options)] == want
    assert len({len(w) for w in want}) > 3, "all answers have one length: the batch never shrank"
    assert engine.pool.bytes_held == 0
    buckets = sorted(engine.runner.graphs._replays)
    assert len({batch for batch, _ in buckets}) > 2
    assert None not in engine.runner.graphs._replays.values()
    engine.generate(texts, images, **options)
    assert sorted(engine.runner.graphs._replays) == buckets, "captured again"
    return buckets


@pytest.mark.parametrize("device", [*DEVICES, "tape"])
def test_running_batches_of_one_size_do_not_disturb_each_other(device):
    engine, plain = with_tapes() if device == "tape" else with_graphs(device)
    texts, images = tiny.prompts(seed=91, n=6)
    entries = [engine.model.prepare(engine.model.tokenize(texts[i : i + 2], images[i : i + 2])) for i in (0, 2, 4)]
    tokens = [[5, 9], [7, 30], [31, 8], [55, 12]]

    def alone(entry):
        with plain.prefill_prepared(entry) as running:
            return [running.logits, *(running.step(t) for t in tokens)]

    want = [alone(entry) for entry in entries]
    running = [engine.prefill_prepared(entry) for entry in entries]
    got = [[r.logits] for r in running]
    for step in tokens:
        for r, mine in zip(running, got):
            mine.append(r.step(step))
    # A graph's table ends at its bucket: attention on a GPU splits the rows in fewer parts, and sums in another order.
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-4, atol=1e-4)
    assert [r.cache.lens.tolist() for r in running] == [r.cache.host_lens.tolist() for r in running]
    for r in running:
        r.close()
    assert engine.pool.bytes_held == 0


def test_a_step_like_the_last_writes_its_tokens_and_nothing_else():
    """What is launched between two replays keeps the device waiting."""
    engine, _ = with_graphs("cpu", page_size=64)
    texts, images = tiny.prompts(seed=92, n=3)
    with engine.prefill_prepared(engine.model.prepare(engine.model.tokenize(texts, images))) as running:
        running.step([5, 6, 7])
        engine.runner.graphs._replays = dict.fromkeys(engine.runner.graphs._replays, lambda: running.logits)
        with Operations() as operations:
            running.feed(torch.tensor([5, 6, 7]))
    writing = [f for f, *_ in operations.calls if f._schema.is_mutable]
    assert writing == [torch.ops.aten.copy_.default]


def test_a_batch_that_is_gone_is_not_kept():
    engine, _ = with_graphs("cpu")
    texts, images = tiny.prompts(seed=92, n=1)
    running = engine.prefill_prepared(engine.model.prepare(engine.model.tokenize(texts, images)))
    running.step([5])
    home = engine.runner.graphs._home
    assert home.tenant() is running.cache
    running.close()
    del running
    gc.collect()
    assert home.tenant() is None


@pytest.mark.parametrize("rows", range(1, 40))
def test_the_bucket_holds_one_more_row(rows):
    """Pages of 4 rows, at most 10 of them: the table's slice is a power of two, or all of it."""
    engine, plain = with_graphs("cpu", max_len=40)
    embeds = torch.randn(rows, engine.model.shape.hidden_size, generator=torch.Generator().manual_seed(rows))
    text = torch.zeros(rows, dtype=torch.bool)
    with engine.prefill(embeds, text) as running, plain.prefill(embeds, text) as other:
        torch.testing.assert_close(running.step([6]), other.step([6]))
    ((_, pages),) = engine.runner.graphs._replays
    assert rows + 1 <= 4 * pages
    assert pages == 10 or (pages & (pages - 1) == 0 and 2 * rows >= 4 * pages - 8)


def captured_blocks(engine, capture):
    """As `VisionLanguageModel.capture_tower` makes them."""
    tower = engine.model.hf.model.vision_tower
    return TowerGraphs(tower, capture, TowerLayers(tower, pack=False))


def same_rows(got, want):
    """But for the order of sums: transformers' blocks have three products where ours have one."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_captured_tower_gives_the_same_rows(vision, device):
    """Pictures in turn, so that a replay that reads or writes elsewhere would give those of another prompt."""
    engine, _ = build(vision=vision, device=device, graphs=False)
    graphs = captured_blocks(engine, Captures() if device == "cpu" else capture_cuda)
    texts, images = tiny.prompts(seed=93, n=40)
    inputs = engine.model.tokenize(texts, images)
    batches = [inputs[i : i + 1 + i % 3] for i in range(40)]
    want = [engine.model.prepare(batch) for batch in batches]
    engine.model.tower_graphs = graphs
    for batch, prompts in zip(batches, want):
        for got, plain in zip(engine.model.prepare(batch), prompts):
            same_rows(got.inputs_embeds, plain.inputs_embeds)
    assert len(graphs._replays) > 3, "hardly any number of pictures was captured"
    assert "forward" not in engine.model.hf.model.vision_tower.__dict__


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("modes", [*itertools.product([False, True], repeat=2)])
def test_a_tower_captured_in_one_mode_is_replayed_in_another(modes, device):
    """transformers' generate may be called in inference mode or not, time and again."""

    def capture(step, memory):
        replay = (Captures() if device == "cpu" else capture_cuda)(step, memory)
        return torch.inference_mode()(replay)  # a graph asks for no mode

    engine, plain = (build(device=device, graphs=False)[0].model for _ in range(2))
    engine.tower_graphs = TowerGraphs(engine.hf.model.vision_tower, capture)
    for seed, mode in enumerate([*modes, *modes]):
        (prompt,) = engine.tokenize(*tiny.prompts(seed=seed, n=1, images=(1,)))
        ids = torch.tensor([prompt.input_ids], device=device)
        given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), **engine._pictures([prompt]))
        with torch.inference_mode(mode):
            got, want = (model.prepare_inputs(given, [ids.shape[1]], 1)[0] for model in (engine, plain))
        torch.testing.assert_close(got.inputs_embeds, want.inputs_embeds)
    assert len(engine.tower_graphs._replays) == 1


def first_linear(model):
    return next(m for m in model.vision_tower.modules() if isinstance(m, torch.nn.Linear))


def other_weights(model):
    """At other addresses; the old ones are as they were."""
    first_linear(model).weight.data = first_linear(model).weight.data * 1.5


def weights_in_place(model):
    first_linear(model).weight.data.mul_(1.5)


def hook(model):
    first_linear(model).register_forward_hook(lambda module, args, out: 1.5 * out)


def patch(model):
    plain = first_linear(model).forward
    first_linear(model).forward = lambda x: 1.5 * plain(x)


def exchange(model):
    """A module in place of another."""
    mlp = next(m for m in model.vision_tower.modules() if hasattr(m, "fc1"))
    mlp.fc1 = torch.nn.Linear(mlp.fc1.in_features, mlp.fc1.out_features).to(mlp.fc1.weight)
    torch.nn.init.constant_(mlp.fc1.weight, 0.01)
    torch.nn.init.constant_(mlp.fc1.bias, 0.02)


def at_entry(model, altered):
    def hook(module, args, kwargs):
        return args, {**kwargs, "pixel_values": altered(kwargs["pixel_values"])}

    model.register_forward_pre_hook(hook, with_kwargs=True)


def other_pixels(model):
    at_entry(model, lambda given: given * 0.5)


def pixels_in_place(model):
    at_entry(model, lambda given: given.mul_(0.5))


CHANGES = [None, other_weights, weights_in_place, hook, patch, exchange, other_pixels, pixels_in_place]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_tower_that_begins_before_it_is_looked_at_gives_what_it_is_asked_for(change, device, monkeypatch):
    """The replay is launched first; what has changed since the last run still counts for this one."""
    engine, plain = (build(device=device, graphs=False)[0] for _ in range(2))
    model, log, capture = engine.model, [], Captures() if device == "cpu" else capture_cuda

    def noted(step, memory):
        replay = capture(step, memory)
        return lambda: (log.append("replay"), replay())[1]

    def looked(module):
        log.append("look")
        return addresses(module)

    addresses = tower_graphs.addresses
    monkeypatch.setattr(tower_graphs, "addresses", looked)
    model.tower_graphs = TowerGraphs(model.hf.model.vision_tower, noted)
    batches = [model.tokenize(*tiny.prompts(seed=seed, n=2, images=(1,))) for seed in range(5)]
    runs = []
    for i, batch in enumerate(batches):
        for hf in (model.hf.model, plain.model.hf.model):
            if i == 3 and change is not None:
                change(hf)
        log.clear()
        for got, want in zip(model.prepare(batch), plain.model.prepare(batch), strict=True):
            torch.testing.assert_close(got.inputs_embeds, want.inputs_embeds)
        runs.append(list(log))
    assert runs[:3] == [["look"], ["look", "replay"], ["replay", "look"]]
    if change in (None, weights_in_place):
        assert runs[3:] == [["replay", "look"]] * 2
    if change in (hook, patch):
        assert runs[3:] == [["replay", "look"], ["look"]], "run for nothing more than once"
    if change in (other_pixels, pixels_in_place):
        assert runs[3:] == [["replay", "look", "replay"], ["look", "replay"]]


def another_activation(model, monkeypatch):
    block = next(m for m in model.modules() if type(m).__name__ == "CLIPMLP")
    block.activation_fn = torch.nn.ReLU()


def another_class(model, monkeypatch):
    cls = type(next(m for m in model.modules() if type(m).__name__ == "CLIPMLP"))
    monkeypatch.setattr(cls, "forward", lambda self, x, own=cls.forward: own(self, x) / 2)


def test_a_tower_in_training_mode_is_another():
    tower = tiny.model().model.vision_tower.eval()
    assert tower_graphs.addresses(tower) == tower_graphs.addresses(tower) != tower_graphs.addresses(tower.train())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", [another_activation, another_class])
def test_a_captured_tower_follows_its_code(change, device, monkeypatch):
    engine, plain = (build(device=device, graphs=False, picture_cache=0)[0] for _ in range(2))
    engine.model.tower_graphs = captured_blocks(engine, Captures() if device == "cpu" else capture_cuda)
    inputs = engine.model.tokenize(*tiny.prompts(seed=93, n=2, images=(1,)))
    seen = []
    for changed in (False, True):
        for model in (engine.model.hf.model, plain.model.hf.model) if changed else ():
            change(model, monkeypatch)
        got = [engine.model.prepare(inputs)[0].inputs_embeds for _ in range(2)]
        seen.append(plain.model.prepare(inputs)[0].inputs_embeds)
        for rows in got:
            same_rows(rows, seen[-1])
    assert not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_captured_tower_follows_its_weights(vision, device):
    """Those that were put side by side too: written to, behind torch's back or not, and exchanged."""
    engine, plain = (build(vision=vision, device=device, graphs=False, picture_cache=0)[0] for _ in range(2))
    graphs = engine.model.tower_graphs = captured_blocks(engine, Captures() if device == "cpu" else capture_cuda)
    inputs = engine.model.tokenize(*tiny.prompts(seed=93, n=2, images=(1,)))
    towers = [e.model.hf.model.vision_tower for e in (engine, plain)]

    def weight(tower):
        return next(m for name, m in tower.named_modules() if name.endswith("layers.0.self_attn.v_proj"))

    def prepared():
        """Twice: the first of them may capture."""
        got = [engine.model.prepare(inputs)[0].inputs_embeds for _ in range(2)]
        want = plain.model.prepare(inputs)[0].inputs_embeds
        for rows in got:
            same_rows(rows, want)
        return want

    seen = [prepared()]
    for change in (
        lambda m: m.weight.mul_(3.0),
        lambda m: m.weight.data.mul_(-2.0),
        lambda m: setattr(m, "weight", torch.nn.Parameter(-m.weight)),
    ):
        with torch.no_grad():
            for tower in towers:
                change(weight(tower))
        seen.append(prepared())
        assert len(graphs._replays) == 1 and not torch.allclose(seen[-1], seen[-2])
    made = weight(towers[0]).weight
    assert made.is_leaf and made.requires_grad == weight(towers[1]).weight.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_merging_runs_in_the_captured_tower(vision, device, monkeypatch):
    """Policies in turn, on the same shapes of pixels; VisionZip reads the tower by hooks and passes by the graphs."""
    engine, plain = (shared.build(vision, device=device, graphs=False)[0] for _ in range(2))
    capture = Captures() if device == "cpu" else capture_cuda
    engine.model.tower_graphs = captured_blocks(engine, capture)
    texts, images = tiny.prompts(seed=94, n=6, images=(1, 2))
    merging = [ToMe(0.5), ToMe(0.3), compose(ToMe(0.7), FixedExit(1))]
    calls, quick = [], ops.quick_gelu_
    monkeypatch.setattr(ops, "quick_gelu_", lambda x: (calls.append(type(engine.policy)), quick(x))[1])
    for policy in 2 * [KeepAll(), *merging, VisionZip(5, 2)]:
        engine.policy = plain.policy = policy
        for batch in (slice(0, 3), slice(3, 6)):
            got, want = (e.prepare(texts[batch], images[batch], chat=False) for e in (engine, plain))
            assert [g.pictures for g in got] == [w.pictures for w in want]
            for g, w in zip(got, want):
                same_rows(g.inputs_embeds, w.inputs_embeds)
    assert (ToMe in calls) == (vision == "clip"), "CLIP's activation takes three launches"
    shapes = {(inside, pixels[0]) for inside, pixels, *_ in engine.model.tower_graphs._replays}
    numbers = {sum(map(len, images[batch])) for batch in (slice(0, 3), slice(3, 6))}
    assert len(numbers) == 2
    inside = {engine.model._graph_key(None), *(ToMe(keep).bind(plain.model).tower_key for keep in (0.5, 0.3, 0.7))}
    assert shapes == set(itertools.product(inside, numbers))


def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch):
    """Garbage may hold graphs, and one that is destroyed meanwhile breaks the capture."""

    class Died:
        def __init__(self):
            self.me = self

        def __del__(self):
            seen.append(capturing[0])

    @contextlib.contextmanager
    def captured(*_, **options):
        assert options["capture_error_mode"] == "thread_local"
        capturing[0] = True
        try:
            yield
        finally:
            capturing[0] = False

    seen, capturing, before = [], [False], gc.get_threshold()
    monkeypatch.setattr(graphs, "_stream", lambda device: None)
    for name, value in dict(graph=captured, CUDAGraph=Mock, current_device=lambda: 0).items():
        monkeypatch.setattr(torch.cuda, name, value)
    gc.set_threshold(1)
    try:
        capture_cuda(lambda: [Died() for _ in range(50)], [])
        with pytest.raises(ZeroDivisionError):
            capture_cuda(lambda: 1 / 0, [])
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(seen) == 50 and not any(seen)


def test_two_engines_do_not_capture_at_once(monkeypatch):
    """Their graphs share a stream of the device, and what ends first would have garbage collected in the other."""
    at_work, first = [], threading.Event()

    @contextlib.contextmanager
    def captured(*_, **options):
        at_work.append(1)
        yield
        at_work.pop()

    def step():
        first.set()
        for _ in range(20):
            time.sleep(0.002)
            assert len(at_work) == 1 and not gc.isenabled()

    monkeypatch.setattr(graphs, "_stream", lambda device: None)
    for name, value in dict(graph=captured, CUDAGraph=Mock, current_device=lambda: 0).items():
        monkeypatch.setattr(torch.cuda, name, value)
    with ThreadPoolExecutor(3) as threads:
        captures = [threads.submit(capture_cuda, step, [])]
        assert first.wait(20)
        captures += [threads.submit(capture_cuda, step, []) for _ in range(2)]
        for capture in captures:
            capture.result()
    assert gc.isenabled()


def attend_by_offsets(q, k, v, lengths, scale):
    """Knows where sequences begin from the device alone, and weighs the rows of all others by 0."""
    rows = torch.arange(len(q), dtype=torch.int32, device=q.device)
    sequence = torch.bucketize(rows, lengths.cu, right=True)
    seen = (sequence[:, None] == sequence) & (rows[:, None] >= rows)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = torch.einsum("nhd,mhd->hnm", q, k) * scale
    return torch.einsum("hnm,mhd->nhd", logits.masked_fill(~seen, -torch.inf).softmax(dim=-1), v)


def add_layer_graphs(engine, device, alone=causal):
    """The engine's graphs, and a list that gets one entry for each capture."""
    captures, capture = [], Captures() if device == "cpu" else capture_cuda

    def counted(step, memory):
        captures.append(step)
        return capture(step, memory)

    engine.runner.layer_graphs = LayerGraphs(engine.model.decoder, engine.pool, attend_by_offsets, counted, alone)
    return engine.runner.layer_graphs, captures


def with_layer_graphs(device, policy=None, **options):
    engine, plain = with_graphs(device, policy, **options)
    return engine, plain, *add_layer_graphs(engine, device)


close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # products of more rows sum otherwise


def state(running):
    """All that a prefill left: logits, and K and V of each (layer, sequence), read through the page tables."""
    cache, out = running.cache, [running.logits, running.cache.positions, running.cache.lens]
    for table, lens in zip(cache.block_table.long(), cache.host_lens.tolist()):
        for pages, n in zip(table, lens):
            out += [pool[pages].flatten(0, 1)[:n].clone() for pool in (cache.pool.k, cache.pool.v)]
    return out


def left_by(engine, prompts):
    """`state` after a prefill, kept, and the exit layers."""
    with engine.prefill_prepared(prompts) as running:
        return [t.clone() for t in state(running)], running.exit_layers


def captured(rows, asked_last):
    """What must run as a graph: every layer with its rows, but the last one where a policy looks at all of them."""
    layers = range(LAYERS - 1 if asked_last else LAYERS)
    return {(layer, len(rows[layer]), bucket_of(sum(rows[layer]))) for layer in layers}


@dataclass(frozen=True, eq=False)
class OneByOne(VisualTokenPolicy):
    """Sequence b loses its visual tokens after layer b."""

    def layers(self, num_layers):
        return set(range(num_layers - 1))

    def decide(self, state):
        return [state.rows.source[:0] if b == state.layer else None for b in range(len(state.rows.n_visual))]


EXITS = {
    "keep-all": KeepAll(),
    **{f"after {layer}": FixedExit(layer) for layer in range(-1, LAYERS)},
    "one by one": OneByOne(),
    "dynamic": DynamicExit(random_heads(4), 0.7),
    "late": Later(FixedExit(1)),
    "fastv+fixed": compose(FastV(1, 0.5), FixedExit(2)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drop_early_kv", [False, True])
@pytest.mark.parametrize("name", EXITS)
def test_layers_equal_those_without_graphs(name, drop_early_kv, device):
    """Batches of 1 to 3 in turn, first captured, then replayed with other prompts of other lengths."""
    policy = EXITS[name]
    engine, plain, graphs, _ = with_layer_graphs(device, policy, drop_early_kv=drop_early_kv)
    texts, images = tiny.prompts(seed=95, n=24)
    last, seen = LAYERS - 1, set()
    for start in range(0, 24, 3):
        for batch in (slice(start, start + 1), slice(start + 1, start + 3), slice(start, start + 3)):
            prompts = plain.model.prepare(plain.model.tokenize(texts[batch], images[batch]))
            with plain.prefill_prepared(prompts) as want, engine.prefill_prepared(prompts) as got:
                assert got.exit_layers == want.exit_layers
                assert got.rows == want.rows
                close(state(got), state(want))
                close(got.step([5] * len(prompts)), want.step([5] * len(prompts)))
                stayed = any(n and e in (None, last) for n, e in zip(map(len, images[batch]), want.exit_layers))
                asked_last = drop_early_kv and stayed and last in policy.layers(LAYERS)
                seen |= captured(want.rows, asked_last)
            assert set(graphs._replays) == seen
    assert engine.pool.bytes_held == 0
    assert seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alone", [None, causal])
def test_a_prompt_alone_attends_with_its_padding_or_apart_from_it(alone, device, monkeypatch):
    monkeypatch.setattr(layer_graphs, "ALONE_FROM", 0)
    engine, plain = with_graphs(device, EXITS["after 1"])
    asked = []
    add_layer_graphs(engine, device, alone and (lambda q, *rest: asked.append(len(q)) or alone(q, *rest)))
    for n in (1, 2):
        prompts = plain.model.prepare(plain.model.tokenize(*tiny.prompts(seed=97, n=n)))
        want, got = (left_by(e, prompts)[0] for e in (plain, engine))
        close(got, want)
    first = left_by(plain, prompts[:1])  # of two there
    close(left_by(engine, prompts[:1])[0], first[0])
    assert bool(asked) == (alone is not None)
    assert all(n in BUCKETS for n in asked)


@pytest.mark.parametrize("device", DEVICES)
def test_answers_equal_those_without_layer_graphs(device):
    engine, plain, graphs, captures = with_layer_graphs(device, EXITS["dynamic"])
    texts, images = tiny.prompts(seed=96, n=24)
    options = {"chat": False, "max_new_tokens": 8}
    want = [r.token_ids for r in plain.generate(texts, images, **options)]
    for _ in range(2):
        assert [r.token_ids for r in engine.generate(texts, images, **options)] == want
        assert len(captures) == len(graphs._replays) > 0, "captured again"


def text_prompts(engine, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeds = [torch.randn(n, engine.model.shape.hidden_size, generator=generator) for n in lengths]
    return embeds, [torch.zeros(n, dtype=torch.bool) for n in lengths]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        *(([n], 32) for n in (1, 2, 31, 32)),
        ([33], 64),
        ([31, 1], 32),
        ([1, 31, 1], 64),
        ([100, 29], 192),
        ([250, 250, 250, 250, 24], 1024),
        ([250, 250, 250, 250, 25], None),
    ],
)
def test_buckets_of_rows(lengths, bucket, device):
    """Also full ones, in which the sequence that fills up is empty, and more rows than the largest holds."""
    engine, plain, graphs, _ = with_layer_graphs(device)
    entry = text_prompts(engine, lengths)
    for _ in range(2):
        with engine.prefill(*entry) as got, plain.prefill(*entry) as want:
            close(state(got), state(want))
    assert set(graphs._replays) == ({(n, len(lengths), bucket) for n in range(LAYERS)} if bucket else set())


@pytest.mark.parametrize("device", DEVICES)
def test_other_running_batches_keep_their_pages(device):
    """Prompts of one bucket come and go; what others hold stays bit for bit, and theirs goes where it should."""
    engine, plain, _, captures = with_layer_graphs(device)
    kept = [engine.prefill(*text_prompts(engine, [n, 7], seed=n)) for n in (9, 24)]
    before = [state(running) for running in kept]
    for seed, n in enumerate((3, 20, 11, 16)):
        entry = text_prompts(engine, [n, 5], seed)
        with engine.prefill(*entry) as got, plain.prefill(*entry) as want:
            close(state(got), state(want))
    assert len(captures) == LAYERS
    for running, old in zip(kept, before):
        assert all(torch.equal(now, then) for now, then in zip(state(running), old, strict=True))
        running.close()
    assert engine.pool.bytes_held == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["keep-all", "late", "one by one", "fastv+fixed"])
def test_prefills_that_are_under_way_together(name, device):
    """Each stops after every layer, and one at a time has its rows on the graphs."""
    engine, plain, graphs, _ = with_layer_graphs(device, EXITS[name])
    texts, images = tiny.prompts(seed=101, n=6)
    batches = [plain.model.prepare(plain.model.tokenize(texts[i : i + 3], images[i : i + 3])) for i in (0, 3)]
    want = [left_by(plain, batch) for batch in batches]
    runner = engine.runner
    with torch.inference_mode():
        prefills = [runner.prefill(runner.cache(3, 3), batch, engine.policy) for batch in batches]
        for _ in range(LAYERS):
            for prefill in prefills:
                prefill.advance(1)
        assert all(prefill.done for prefill in prefills)
        for prefill, (states, exits) in zip(prefills, want):
            done = prefill.finish()
            assert done.exit_layers == exits
            running = Running(engine.model.decoder, prefill.cache, done)
            close(state(running), states)
            running.close()
    assert graphs._replays
    assert not any(graphs.holds(prefill) for prefill in prefills)
    assert engine.pool.bytes_held == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", [FixedExit(1), FastV(1, 0.5), DynamicExit(random_heads(4), 0.7), OneByOne()])
def test_pages_taken_ahead_of_a_decision_go_back_where_rows_leave(policy, graphs, device, monkeypatch):
    """Of requests, which have claimed them; those of a layer beyond what stays are free before it runs."""
    engine, plain = with_graphs(device)
    if graphs:
        add_layer_graphs(engine, device)
    ahead, reserve, trimmed, trim = [], KVCache.reserve_claimed, [], KVCache.trim

    def reserving(cache, layers, rows):
        ahead.append(reserve(cache, layers, rows))
        return ahead[-1]

    def trimming(cache, layers, rows):
        before = cache._held.sum()
        trim(cache, layers, rows)
        trimmed.append(int(before - cache._held.sum()))

    texts, images = tiny.prompts(seed=97, n=12)
    options = {"chat": False, "max_new_tokens": 4}
    want = plain.generate(texts, images, policy=policy, **options)
    monkeypatch.setattr(KVCache, "reserve_claimed", reserving)
    monkeypatch.setattr(KVCache, "trim", trimming)
    got = engine.generate(texts, images, policy=Later(policy), **options)
    for a, b in zip(got, want, strict=True):
        assert (a.token_ids, a.stats.tokens_per_layer) == (b.token_ids, b.stats.tokens_per_layer)
        assert a.stats.kv_bytes == b.stats.kv_bytes
    assert ahead and all(ahead) and any(trimmed)
    assert engine.pool.bytes_held == 0


@dataclass(frozen=True, eq=False)
class Undecided(VisualTokenPolicy):
    """Asked after layers 1 and 2, and says later that all stay."""

    def layers(self, num_layers):
        return {1, 2}

    def decide(self, state):
        return lambda: [None] * len(state.rows.n_visual)


def test_pages_taken_ahead_are_of_the_rows_that_entered(monkeypatch):
    """FastV halves those, not what it left: no layer has to look for more."""
    engine, _ = with_graphs("cpu")
    taken, take = [], KVCache._take

    def taking(cache, layers, missing):
        taken.append((layers, bool(missing.any())))
        take(cache, layers, missing)

    monkeypatch.setattr(KVCache, "_take", taking)
    texts, images = tiny.prompts(seed=97, n=1, images=(1,))
    engine.generate(texts, images, policy=compose(FastV(1, 0.5), Undecided()), chat=False, max_new_tokens=1)
    assert taken == [(range(1), True), (range(1, 2), True), (range(2, LAYERS), True)]


@dataclass(frozen=True, eq=False)
class LeaveSecond(VisualTokenPolicy):
    """All stay after layer 0, which is said later, and none after layer 1, which is said at once, or later too."""

    at_once: bool

    def layers(self, num_layers):
        return {0, 1}

    def decide(self, state):
        nothing = state.rows.source[:0] if state.layer else None
        decision = [nothing] * len(state.rows.n_visual)
        return decision if state.layer and self.at_once else lambda: decision


@pytest.mark.parametrize("at_once", [True, False])
def test_pages_taken_ahead_go_back_with_a_decision_that_no_layer_follows(at_once):
    """A prefill may be left there for long."""
    engine, _ = with_graphs("cpu")
    runner = engine.runner
    prompts = engine.model.prepare(engine.model.tokenize(*tiny.prompts(seed=97, n=2, images=(1,))))
    with torch.inference_mode():
        prefill = runner.prefill(runner.cache(2, 2), prompts, LeaveSecond(at_once))
        runner._claim_worst(prefill.cache, prefill.rows, LeaveSecond(at_once))
        prefill.advance(1)
        prefill.advance(1)
        if prefill.awaits_decision:
            prefill.move_out()
        assert not any(prefill.rows.n_visual)
        for b, rows in enumerate(prefill.most_rows()):
            assert prefill.cache.held(b) == sum(map(engine.pool.pages, rows))


@dataclass(frozen=True, eq=False)
class Noted(VisualTokenPolicy):
    """All visual tokens leave after `layer`, asked after each; a list notes when that has been read."""

    layer: int
    log: list

    def layers(self, num_layers):
        return set(range(num_layers - 1))

    def decide(self, state):
        nothing, leave = state.rows.source[:0], state.layer == self.layer

        def read():
            self.log.append("read")
            return [nothing if leave else None for _ in state.rows.n_visual]

        return read


class Work(TorchDispatchMode):
    """Notes what torch is asked to do, views apart."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.log.append(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("fastv", [False, True])
def test_between_a_decision_and_its_layer_next_to_nothing_is_launched(pictures, fastv, monkeypatch):
    """Of a request: the device has nothing but the projections to do meanwhile."""
    monkeypatch.setattr(prefill, "_stays", lambda keep, n: True)  # a device's numbers are not looked at
    engine, _ = with_graphs("cpu", page_size=16)
    log = []

    def capture(step, memory):
        replay = Captures()(step, memory)

        def launched():
            log.append("layer")
            before = list(log)
            out = replay()
            log[:] = before
            return out

        return launched

    graphs = LayerGraphs(engine.model.decoder, engine.pool, attend_by_offsets, capture)
    engine.runner.layer_graphs = graphs
    texts, images = tiny.prompts(seed=98, n=1, images=(pictures,))

    def answered(exit_after):
        policy = compose(FastV(2, 0.5), exit_after) if fastv else exit_after
        (result,) = engine.generate(texts, images, policy=policy, chat=False, max_new_tokens=4)
        return result

    want = answered(FixedExit(2))
    answered(Noted(2, log))  # captures
    log.clear()
    with Work(log):
        got = answered(Noted(2, log))
    assert (got.token_ids, got.stats.tokens_per_layer) == (want.token_ids, want.stats.tokens_per_layer)
    reads = [i for i, entry in enumerate(log) if entry == "read"]
    between = [log[i + 1 : log.index("layer", i)] for i in reads]
    moved_up = ["index_select", "copy_"] * 2 + ["copy_"] * 2
    assert between == [[], moved_up if fastv else [], moved_up]
    assert engine.pool.bytes_held == 0


@pytest.mark.parametrize("device", DEVICES)
def test_one_given_up_between_layers_that_are_captured_writes_no_page_of_others(device):
    """Its pages are free, and were copied to the graphs for all layers together."""
    engine, plain, graphs, _ = with_layer_graphs(device)
    entry = text_prompts(engine, [9, 7])
    with plain.prefill(*entry) as want:
        states = [t.clone() for t in state(want)[3:]]  # K and V of each layer, of both sequences
    runner = engine.runner
    prompts = [
        PreparedPrompt(e.to(device), v, torch.arange(len(e), dtype=torch.int32, device=device), [])
        for e, v in zip(*entry)
    ]
    with torch.inference_mode():
        cache = runner.cache(2, 2)
        prefill = runner.prefill(cache, prompts, engine.policy)
        prefill.advance(1)
        assert graphs.holds(prefill)
        prefill.give_up(0)
        free = runner.cache(1, 1)  # gets what was given up
        free.reserve(range(LAYERS), [9])
        pages = sorted(set(free.pages_held()))
        for pool in (engine.pool.k, engine.pool.v):
            pool[pages] = 7.0
        prefill.advance()
        prefill.finish()
        assert all((pool[pages] == 7.0).all() for pool in (engine.pool.k, engine.pool.v))
        table, n = cache.block_table.long(), 7
        for layer in range(LAYERS):
            for pool, kept in zip((engine.pool.k, engine.pool.v), states[4 * layer + 2 : 4 * layer + 4]):
                close(pool[table[layer, 1]].flatten(0, 1)[:n], kept)
        cache.close()
        free.close()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_left_over_that_no_graph_covers_go_on_without(device):
    """The projections were launched for all rows, a late decision leaves fewer, and nothing is captured any more."""
    engine, plain, graphs, captures = with_layer_graphs(device, EXITS["late"])
    texts, images = tiny.prompts(seed=102, n=3, images=(2,))
    prompts = plain.model.prepare(plain.model.tokenize(texts, images))
    total = sum(len(p.visual) for p in prompts)
    engine.runner.layer_graphs.warm_up(3, bucket_of(total))
    graphs.sealed, count = True, len(captures)
    with plain.prefill_prepared(prompts) as want, engine.prefill_prepared(prompts) as got:
        assert bucket_of(sum(want.rows[-1])) < bucket_of(total), "they would fit into the same graphs"
        assert got.exit_layers == want.exit_layers
        close(state(got), state(want))
    assert len(captures) == count


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_leave_the_graphs_are_not_written_by_the_next(device):
    """The first layers are captured, those behind an exit only for fewer rows, and then nothing is any more."""
    engine, plain, graphs, _ = with_layer_graphs(device)
    texts, images = tiny.prompts(seed=102, n=2, images=(3,))
    first, other = ([p] for p in plain.model.prepare(plain.model.tokenize(texts, images)))
    engine.prefill_prepared(first, policy=FixedExit(0)).close()
    graphs.sealed = True
    want, _ = left_by(plain, first)
    runner = engine.runner
    with torch.inference_mode():
        prefill = runner.prefill(runner.cache(1, 1), first, engine.policy)
        prefill.advance(1)
        assert graphs.holds(prefill)
        prefill.advance(1)
        assert not graphs.holds(prefill)
        engine.prefill_prepared(other, policy=FixedExit(0)).close()
        prefill.advance()
        with Running(engine.model.decoder, prefill.cache, prefill.finish()) as running:
            close(state(running), want)


@pytest.mark.parametrize("device", DEVICES)
def test_warming_up_while_a_prefill_has_its_rows_on_the_graphs(device):
    engine, plain, graphs, _ = with_layer_graphs(device)
    texts, images = tiny.prompts(seed=102, n=1, images=(2,))
    prompts = plain.model.prepare(plain.model.tokenize(texts, images))
    want, _ = left_by(plain, prompts)
    runner = engine.runner
    with torch.inference_mode():
        prefill = runner.prefill(runner.cache(1, 1), prompts, engine.policy)
        prefill.advance(1)
        assert graphs.holds(prefill)
        graphs.warm_up(1, 32)
        prefill.advance()
        with Running(engine.model.decoder, prefill.cache, prefill.finish()) as running:
            close(state(running), want)


@dataclass(frozen=True, eq=False)
class Fails(VisualTokenPolicy):
    error: type[BaseException]

    def layers(self, num_layers):
        return {0}

    def decide(self, state):
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_prefill_that_failed_leaves_the_graphs(error):
    """However long somebody keeps the traceback, which keeps the prefill."""
    engine, _, graphs, _ = with_layer_graphs("cpu")
    texts, images = tiny.prompts(seed=102, n=1, images=(1,))
    prompts = engine.prepare(texts, images, chat=False)
    with pytest.raises(error) as kept:
        engine.prefill_prepared(prompts, policy=Fails(error))
    assert kept and graphs._tenant is None
    with pytest.raises(error) as kept:
        engine.generate(texts, images, chat=False, policy=Fails(error))
    assert kept and graphs._tenant is None
    engine.check_integrity()


@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_no_graph_keeps_queries_and_keys_of_its_own(decoder):
    """Hundreds of graphs hold what they return; queries and keys that are normalised are new tensors."""
    engine, _ = build(decoder, page_size=4, kv_memory=POOL)
    graphs, _ = add_layer_graphs(engine, "cpu")
    engine.prefill(*text_prompts(engine, [10])).close()
    for replay in graphs._replays.values():
        with torch.inference_mode():
            given = replay()
        assert {t.untyped_storage().data_ptr() for t in (given.q, given.k)} == {graphs._qkv.data_ptr()}


def test_a_prefill_given_up_on_the_graphs_leaves_them():
    engine, _, graphs, _ = with_layer_graphs("cpu")
    prompts = engine.prepare(["w3 w4"], [None], chat=False)
    runner = engine.runner
    with torch.inference_mode():
        prefill = runner.prefill(runner.cache(1, 1), prompts, engine.policy)
        prefill.advance(1)
        assert graphs.holds(prefill)
        prefill.close()
        assert not graphs.holds(prefill)
        other = runner.prefill(runner.cache(1, 1), prompts, engine.policy)
        other.advance(1)
        assert graphs.holds(other)
        del other  # nobody closed it
        gc.collect()
        assert graphs.take(prefill, 0, prefill.rows)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_fill_up_write_to_the_spare_page_alone(device):
    engine, _, _, _ = with_layer_graphs(device)
    pool = engine.pool
    pool.k.fill_(7)
    pool.v.fill_(7)
    with engine.prefill(*text_prompts(engine, [10, 9])) as running:
        held = set(running.cache.pages_held())
    written = {page for t in (pool.k, pool.v) for page in (t != 7).flatten(1).any(dim=1).nonzero()[:, 0].tolist()}
    assert written == held | {pool.spare}
    assert sorted(pool.allocator.alloc(pool.allocator.free_count)) == list(range(pool.spare)), "it is given to somebody"


@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_rows_that_fill_up_are_as_new_for_every_prompt(decoder):
    """NaN among them would reach the others, and what added up over prompts would end in it."""
    engine, _ = build(decoder, page_size=4, kv_memory=POOL)
    graphs, _ = add_layer_graphs(engine, "cpu")
    entry, fill = text_prompts(engine, [10, 9]), []
    for leftover in (0, torch.nan, 1e30):
        graphs._hidden[19:] = graphs._x[19:] = leftover
        engine.prefill(*entry).close()
        fill.append(torch.cat((graphs._hidden[19:32], graphs._x[19:32])))
    assert fill[0].isfinite().all()
    assert all(torch.equal(f, fill[0]) for f in fill)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_prefill_gave_holds_through_the_next(device, monkeypatch):
    engine, _, _, _ = with_layer_graphs(device)
    given, logits = [], engine.model.decoder.logits
    monkeypatch.setattr(engine.model.decoder, "logits", lambda hidden: given.append(hidden) or logits(hidden))
    for seed in range(3):  # captured, replayed, replayed
        engine.prefill(*text_prompts(engine, [10, 9], seed)).close()
        if seed == 1:
            before = given[1].clone()
    assert torch.equal(given[1], before)


def test_watched_layers_pass_by_the_graphs():
    engine, _, graphs, _ = with_layer_graphs("cpu")
    prompts = engine.prepare(["w3 w4"], [None], chat=False)
    seen = []
    engine.prefill_prepared(prompts, watch=lambda number, q, k, rows: seen.append(number)).close()
    assert seen == list(range(LAYERS))
    assert not graphs._replays


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_layers_of_families_with_several_axes_and_deepstack(family, layer):
    """Their angles are not those of a position; what deepstack adds after the first layers is added plainly."""
    config = EngineConfig(torch.device("cpu"), torch.float32, max_len=384, kv_memory=POOL)
    loaded = [VisionLanguageModel(zoo.model(family), zoo.processor(family), family, 384) for _ in range(2)]
    engine, plain = (Engine(model, config, FixedExit(layer)) for model in loaded)
    graphs, _ = add_layer_graphs(engine, "cpu")
    texts, images = zoo.prompts(family, seed=97, n=12, images=(1, 2))
    for start in range(0, 12, 2):
        batch = slice(start, start + 2)
        prompts = plain.model.prepare(plain.model.tokenize(texts[batch], images[batch]))
        assert all(p.rotations is not None for p in prompts)
        added = max(len(p.additions) for p in prompts)
        with plain.prefill_prepared(prompts) as want, engine.prefill_prepared(prompts) as got:
            close(state(got), state(want))
    assert (added > 0) == (family == "qwen3_vl")
    assert min(number for number, _, _ in graphs._replays) == added


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_captured_in_a_request_after_warming_up(device):
    """What no graph covers (several texts at once, more pictures than were captured) runs plainly, and right."""
    engine, plain, _, captures = with_layer_graphs(device, EXITS["dynamic"], max_len=96)
    runner, counts = engine.runner, []
    tower = captured_blocks(engine, runner.layer_graphs._capture)
    engine.model.tower_graphs = tower
    engine.warm_up()
    assert len(runner.graphs._replays) == len(runner.graphs.buckets())
    assert len(tower._replays) == engine.config.max_batch
    counts.append((len(captures), len(runner.graphs._replays)))
    texts, images = tiny.prompts(seed=98, n=16)
    options = {"chat": False, "max_new_tokens": 20}
    want = [r.token_ids for r in plain.generate(texts, images, **options)]
    assert [r.token_ids for r in engine.generate(texts, images, **options)] == want
    assert [engine.generate(t, i, **options).token_ids for t, i in zip(texts[:4], images)] == want[:4]
    assert (len(captures), len(runner.graphs._replays)) == counts[0]
    engine.check_integrity()


@pytest.mark.parametrize("device", DEVICES)
def test_a_policy_bound_after_warming_up_is_captured_in_the_tower(device):
    """Where it is bound, not in a request; others still find the graphs sealed."""
    engine, plain = (shared.build("clip", device=device, graphs=False, picture_cache=0)[0] for _ in range(2))
    capture = Captures() if device == "cpu" else capture_cuda
    tower = engine.model.tower_graphs = captured_blocks(engine, capture)
    engine.policy = ToMe(0.7)
    assert not tower._replays, "captured before it was asked to"
    engine.warm_up()
    texts, images = tiny.prompts(seed=103, n=4, images=(1,))
    keys = [policy.bind(engine.model).tower_key for policy in (ToMe(0.7), ToMe(0.5), ToMe(0.3))]
    assert [tower.knows(key) for key in keys] == [True, False, False]
    bound, count = engine.bind(ToMe(0.5)), len(tower._replays)
    assert [tower.knows(key) for key in keys] == [True, True, False]
    for policy in (ToMe(0.7), bound, ToMe(0.3), VisionZip(5, 2)):
        got, want = (
            [r.token_ids for r in e.generate(texts, images, chat=False, max_new_tokens=4, policy=policy)]
            for e in (engine, plain)
        )
        assert got == want
    assert len(tower._replays) == count, "captured in a request"
    assert tower.sealed


def test_a_tower_that_cannot_be_captured_runs_plainly():
    engine, _ = build(picture_cache=0, kv_memory=POOL)
    texts, images = tiny.prompts(seed=99, n=3, images=(1,))

    def fails(step, memory):
        raise RuntimeError("operation not permitted when stream is capturing")

    want = [r.token_ids for r in engine.generate(texts, images, chat=False)]
    engine.model.tower_graphs = captured_blocks(engine, fails)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        assert [r.token_ids for r in engine.generate(texts, images, chat=False)] == want
    assert [r.token_ids for r in engine.generate(texts, images, chat=False)] == want
    assert not engine.model.tower_graphs._replays
