"""Tapes of kernel calls do what the calls did, with what is at their addresses now."""

import gc

import pytest
import torch

from dyvte_engine.kernels import graphs, ops
from dyvte_engine.kernels.graphs import capture_cpu


def weights(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=draw) for size in ((24, 40), (20, 12), (24, 20))]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_computes_from_what_is_there_now(rows, dtype):
    """Kernels of ours between operations of torch's: functional ones, views, constants, and such that write."""
    w1, w2, scale = (w.to(dtype) for w in weights())
    x, total = torch.zeros(rows, 40, dtype=dtype), torch.zeros(rows, 24)

    def step(x, total):
        h = ops.linear(x, w1)  # [rows, 24]
        h = ops.silu_mul(h.view(rows, 24))  # [rows, 12]
        h = ops.linear(h, w2) + torch.arange(20).to(dtype)
        h = ops.rms_norm(h[:, :20], scale[0], 1e-6)
        total += ops.linear(h, scale).float()
        return h.float() * 2

    replay = capture_cpu(lambda: step(x, total), [])
    total.zero_()
    for seed in range(3):
        x.copy_(torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed)))
        expected_total = total.clone()
        want = step(x.clone(), expected_total)
        gc.collect()
        assert torch.equal(replay(), want)
        assert torch.equal(total, expected_total)


def test_what_a_tape_points_to_stays():
    """Weights and results that nobody else holds."""
    x = torch.ones(2, 40)

    def step():
        w1, w2, _ = weights(1)
        return ops.linear(ops.silu_mul(ops.linear(x, w1)), w2)

    want, replay = step(), capture_cpu(step, [])
    gc.collect()
    rubbish = [torch.full((24, 40), float("nan")) for _ in range(50)]
    assert torch.equal(replay(), want)
    del rubbish


def test_tapes_share_memory_and_a_step_that_needs_more_has_none(monkeypatch):
    monkeypatch.setattr(graphs, "TAPE_BYTES", 3 * 2 * 24 * 4 + 64)
    (w, *_), memory = weights(), []
    xs = [torch.full((2, 40), float(i)) for i in range(3)]
    replays = [capture_cpu(lambda x=x: ops.linear(x, w), memory) for x in xs]
    assert len(memory) == 1
    for x, replay in zip(xs, replays):
        assert torch.equal(replay(), ops.linear(x, w))
    assert capture_cpu(lambda: [ops.linear(xs[0], w) for _ in range(4)], memory) is None
    assert torch.equal(replays[1](), ops.linear(xs[1], w))


def test_a_step_that_fails_ends_its_tape():
    w, *_ = weights()
    with pytest.raises(RuntimeError, match="weight must have shape"):
        capture_cpu(lambda: ops.linear(ops.linear(torch.ones(1, 40), w), w), [])
    x = torch.ones(1, 40)
    assert torch.equal(capture_cpu(lambda: ops.linear(x, w), [])(), ops.linear(x, w))


def test_what_depends_on_the_host_is_refused():
    q = torch.ones(4, 2, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="tape"):
        capture_cpu(lambda: ops.varlen_attention(q, q, q, cu, 1.0, True), [])


def test_wrong_use_is_an_error():
    arena, dyvte = torch.empty(64, dtype=torch.uint8), torch.ops.dyvte
    for bad in (torch.empty(64), torch.empty(8, 8, dtype=torch.uint8), torch.empty(128, dtype=torch.uint8)[::2]):
        with pytest.raises(RuntimeError, match="arena must"):
            dyvte.tape_begin(bad)
    number = dyvte.tape_begin(arena)
    with pytest.raises(RuntimeError, match="records already"):
        dyvte.tape_begin(arena)
    assert dyvte.tape_end(arena) == 0
    with pytest.raises(RuntimeError, match="records nothing"):
        dyvte.tape_end(arena)
    dyvte.tape_run(arena, number)
    dyvte.tape_drop(arena, number)
    with pytest.raises(RuntimeError, match="number of a tape"):
        dyvte.tape_run(arena, number)
