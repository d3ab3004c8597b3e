"""When a request's vision begins and ends, noted without a wait for the device."""

import time

import pytest
import torch

from benchmarks import workload
from dyvte_engine import Engine, KeepAll
from tests import tiny


def test_a_request_on_a_cpu_has_its_times_in_order(tmp_path):
    engine = Engine.from_pretrained(tiny.save(tmp_path), dtype="float32", device="cpu", max_len=256)
    texts, images = tiny.prompts(seed=3, n=1, images=(1,))
    with workload.endless(engine):
        line, results = workload.Request(engine, texts, images).run(KeepAll(), 3)
    times = [line.start, *line.vision, *line.tokens]
    assert len(results) == 1 and len(line.vision) == 2 and len(line.tokens) == 3
    assert times == sorted(times)
    assert not engine.model.hf.model._forward_pre_hooks
    assert not engine.model.hf.model.multi_modal_projector._forward_hooks


def test_a_device_that_is_behind_is_asked_for_its_times_at_the_end(monkeypatch):
    """It gets to what was given to it half a second later; nobody waits where an event is recorded."""
    waits, events, device = [], [], torch.device("cuda", 1)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.delay = 0.5 if events else 0.0  # the device is idle at the first

        def record(self, stream):
            assert stream == f"stream of {device}"
            events.append(self)
            self.at = time.perf_counter() + self.delay

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(workload, "wait_for", waits.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = workload._DeviceClock(device)
    host, stamp = time.perf_counter(), clock.stamp()
    assert waits == [device]
    assert stamp() == pytest.approx(host + 0.5, abs=0.05)
    assert waits == [device, events[1]]
