"""Deciding and dropping rows never wait for a device: shown on the meta device, whose tensors have no values to read.

An operation whose result's size depends on values has no meta kernel and raises; `Waits` sees the copies that wait.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dyvte_engine import DivPrune, Downsample, DynamicExit, FastV, FixedExit, PyramidDrop, Random, compose
from dyvte_engine.kernels import transfer
from dyvte_engine.kernels.transfer import in_one_copy, on, read_later, to_device, to_device_together
from dyvte_engine.models import Decoder
from dyvte_engine.models.rows import Rows
from dyvte_engine.policies import composed
from dyvte_engine.policies.base import LayerState
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_exit import random_heads

aten = torch.ops.aten
META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Raises where a copy from the host waits, as from pageable memory, or a number is put through an index tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copied = function in (aten._to_copy.default, aten.copy_.default)
        out = function(*args, **kwargs)
        if copied and out.is_meta and not args[-1].is_meta:
            assert kwargs.get("non_blocking"), f"{function} waits for the device"
        if function in (aten.index_put_.default, aten._index_put_impl_.default):
            assert args[2].dim() > 0, "a number is copied to the device, which waits"
        return out


class Fires(DynamicExit):
    """The heads are asked, and every sequence leaves."""

    def decide(self, state):
        self.ask(state)
        return self._decision(state, [True] * len(state.rows.n_visual))


@pytest.fixture(scope="module")
def decoder():
    plain = build()[0].model.decoder
    hf = tiny.model().to(META)
    try:
        return Decoder(hf.model.language_model, hf.lm_head, plain.shape, 256)
    except RuntimeError as e:
        if "autocast" not in str(e) and "scalarType" not in str(e):
            raise
        pytest.skip("transformers asks for an autocast that this torch does not have for tensors without numbers")


def entering(decoder, lengths=(9, 12, 5)):
    """Prompts of which all but two rows are visual, as rows with a layer's hidden states, queries and keys."""
    visual = [torch.arange(n).clamp(0, n - 2) > 0 for n in lengths]
    visual = [mark & (torch.arange(len(mark)) < len(mark) - 1) for mark in visual]
    rows = Rows.from_sequences(visual, [torch.arange(n, device=META) for n in lengths])
    s, n = decoder.shape, sum(lengths)
    sizes = (s.hidden_size,), (s.num_heads, s.head_dim), (s.num_kv_heads, s.head_dim)
    return rows, *(torch.empty(n, *size, device=META) for size in sizes)


POLICIES = {
    "fixed": FixedExit(0),
    "fastv": FastV(1, 0.5),
    "fastv, all queries": FastV(1, 0.5, "all"),
    "random": Random(1, 0.5),
    "pyramiddrop": PyramidDrop(),
    "dynamic": Fires(random_heads(6).to(META)),
    "dynamic, some stay": Fires(random_heads(6).to(META), keep=2),
    "fastv and all leave": compose(FastV(1, 0.5), FixedExit(0)),
    "fastv and random": compose(FastV(1, 0.5), Random(1, 0.5)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_rows_leave_without_waiting(decoder, name, monkeypatch):
    reads = []

    def later(counts):
        reads.append(counts)
        return lambda: [1] * len(counts)

    monkeypatch.setattr(composed, "read_later", later)
    with Waits():
        rows, hidden, q, k = entering(decoder)
        fewer, stay = rows.drop(POLICIES[name].decide(LayerState(0, decoder, hidden, q, k, rows)))
        again = fewer.renumbered([True, False, True])
    assert len(stay) == sum(fewer.lengths.host) < len(hidden)
    assert again.positions.shape == fewer.positions.shape == stay.shape
    assert [len(counts) for counts in reads] == ([3] if name == "fastv and random" else []), "one read for all"


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_leave_whole_are_those_that_the_device_finds(seed):
    """Sequences lose all visual rows one after another, known on the host, and as from a decision of the device's."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 14, (5,), generator=generator).tolist()
    visual = [torch.rand(n, generator=generator) < 0.6 for n in lengths]
    host = Rows.from_sequences(visual, [torch.arange(n, dtype=torch.int32) for n in lengths])
    device, nothing = replace(host, marks=None), torch.empty(0, dtype=torch.int64)
    for b in torch.randperm(5, generator=generator).tolist():
        decision = [nothing if b == i else None for i in range(5)]
        fewer, again = host.drop(decision), device.drop(decision)
        assert (fewer is None) == (again is None) == (host.n_visual[b] == 0)
        if fewer is None or again is None:
            continue
        assert torch.equal(fewer[1], again[1])
        (host, _), (device, _) = fewer, again
        assert device.marks is None and torch.equal(host.marks, host.visual)
        for name in ("positions", "visual", "source", "text_ranges"):
            ours, theirs = getattr(host, name), getattr(device, name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert host.lengths.host == device.lengths.host and torch.equal(host.lengths.cu, device.lengths.cu)
        ends = torch.tensor(host.lengths.host).cumsum(0)
        assert host.text_ranges.tolist() == torch.stack((ends - torch.tensor(host.n_tail), ends), 1).tolist()
    assert not host.visual.any()


@pytest.mark.parametrize("device", [META, torch.device("cpu")])
def test_several_values_go_to_the_device_in_one_copy(device):
    parts = [(torch.arange(3), torch.int64), ([], torch.int32), ([[1, 2], [3, 4]], torch.int32), ([True], torch.bool)]
    given = [torch.as_tensor(values, dtype=dtype) for values, dtype in parts]
    with Waits():
        made = to_device_together(parts, device) if device == META else in_one_copy(given, device)
    assert [(t.dtype, t.device.type) for t in made] == [(dtype, device.type) for _, dtype in parts]
    assert len({t.untyped_storage()._cdata for t in made}) == 1
    for (values, dtype), tensor in zip(parts, made, strict=True):
        want = torch.as_tensor(values, dtype=dtype)
        assert tensor.shape == want.shape and (device == META or torch.equal(tensor, want))
    for want, stays in zip(given, to_device_together(parts, torch.device("cpu")), strict=True):
        assert stays.dtype == want.dtype and torch.equal(stays, want)


@pytest.mark.parametrize("policy", [DivPrune(0.5), Downsample(2), Random(0, 0.5)])
def test_pictures_shrink_without_waiting(policy):
    features = [torch.empty(16, 8, device=META), torch.empty(9, 8, device=META)]
    with Waits():
        reduced = policy.reduce(features)
    assert [len(r) < len(f) for r, f in zip(reduced, features, strict=True)] == [True, True]


def test_the_watch_sees_what_waits():
    stay, rows = torch.ones(5, device=META), torch.ones(2, device=META, dtype=torch.int64)
    with Waits():
        to_device([1, 2], META, torch.int32)
        with pytest.raises(AssertionError, match="waits for the device"):
            torch.ones(3).to(META)
        with pytest.raises(AssertionError, match="a number is copied"):
            stay[rows] = 0
        with pytest.raises(RuntimeError):
            stay[stay > 0]


@pytest.mark.parametrize("seed", range(5))
def test_several_partial_decisions_keep_what_all_keep(seed):
    """The tokens as sets, written out."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 12, (4,), generator=generator).tolist()

    def drawn(n):
        kept = torch.rand(n, generator=generator) < torch.rand((), generator=generator)
        return None if torch.rand((), generator=generator) < 0.2 else kept.nonzero()[:, 0]

    decisions = [[drawn(n) for n in sizes] for _ in range(3)]
    merged = composed._both(decisions, sizes)
    for b, n in enumerate(sizes):
        want = set(range(n)).intersection(*(set(d[b].tolist()) for d in decisions if d[b] is not None))
        got = range(n) if merged[b] is None else merged[b].tolist()
        assert list(got) == sorted(want)


def test_a_read_is_recorded_on_the_stream_of_its_tensor(monkeypatch):
    """Not on that of the current device, which may be another one."""
    streams = []

    class Event:
        def record(self, stream=None):
            streams.append(stream)

        def synchronize(self):
            pass

    class OnSecond(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    assert read_later(torch.tensor([3, 4]).as_subclass(OnSecond))() == [3, 4]
    assert streams == ["stream of cuda:1"]


def test_reads_under_way_share_no_memory_and_later_ones_pin_none(monkeypatch):
    """Memory is free for the next once it has been read; what is large is pinned anew."""
    pinned, empty = [], torch.empty

    class OnSecond(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    def pin(*size, pin_memory, **options):
        pinned.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(transfer, "_landings", defaultdict(list))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda s: None, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", pin)
    with torch.inference_mode():
        first, second = (read_later(torch.tensor(n).as_subclass(OnSecond)) for n in ([1, 2], [3, 4, 5]))
    assert (second(), first()) == ([3, 4, 5], [1, 2])
    third = read_later(torch.tensor([[0.5], [1.5]], requires_grad=True).as_subclass(OnSecond))
    assert (first(), second(), third()) == ([1, 2], [3, 4, 5], [[0.5], [1.5]]), "a second look sees what it saw"
    assert len(pinned) == 2
    large = [read_later(torch.arange(1000).as_subclass(OnSecond)) for _ in range(2)]
    assert [read() for read in large] == [list(range(1000))] * 2
    assert pinned[2:] == [(8000,)] * 2


def test_the_device_of_a_call_is_current_while_it_runs(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or torch.no_grad())
    with on(torch.device("cpu")):
        assert entered == []
    with on(torch.device("cuda:1")):
        assert entered == [torch.device("cuda:1")]
