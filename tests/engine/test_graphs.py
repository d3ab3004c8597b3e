"""Decoding and vision towers at fixed addresses give what they give plainly.

On the CPU a stand-in for the graph runs the step again at each replay; with `-m gpu` the same tests run real graphs.
"""

import gc

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dyvte_engine import DynamicExit, FixedExit, KeepAll, ToMe
from dyvte_engine.decode import DecodeGraphs
from dyvte_engine.graphs import capture_cuda
from dyvte_engine.models.tower_graphs import TowerGraphs
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_exit import random_heads

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Captures:
    """What stands for `capture_cuda`: a replay computes at the same addresses and writes into the same result."""

    def __call__(self, step, memory):
        result = None

        def replay():
            nonlocal result
            out = step()
            result = out if result is None else result
            for there, new in zip(tree_leaves(result), tree_leaves(out), strict=True):
                if isinstance(new, torch.Tensor):
                    there.copy_(new)
            return result

        return replay


def with_graphs(device, policy=None, **options):
    engine, _ = build(device=device, policy=policy, **{"page_size": 4, "cuda_graphs": False, **options})
    plain, _ = build(device=device, policy=policy, **{"page_size": 4, "cuda_graphs": False, **options})
    capture = Captures() if device == "cpu" else capture_cuda
    engine._graphs = DecodeGraphs(engine.model.decoder, engine.pool, capture)
    return engine, plain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", [KeepAll(), FixedExit(1), DynamicExit(random_heads(4), 0.7)])
def test_answers_equal_those_without_graphs(policy, device):
    """Sequences of different lengths end at different steps, so the batch shrinks; pages fill up on the way."""
    engine, plain = with_graphs(device, policy)
    texts, images = tiny.prompts(seed=90, n=12)
    options = {"chat": False, "max_new_tokens": 24, "eos_token_id": list(range(3, 12))}
    want = [r.token_ids for r in plain.generate(texts, images, **options)]
    assert [r.token_ids for r in engine.generate(texts, images, **options)] == want
    assert len({len(w) for w in want}) > 3, "all answers have one length: the batch never shrank"
    assert engine.pool.bytes_held == 0
    buckets = sorted(engine._graphs._replays)
    assert len({batch for batch, _ in buckets}) > 3
    assert len({pages for _, pages in buckets}) > 1
    engine.generate(texts, images, **options)
    assert sorted(engine._graphs._replays) == buckets, "captured again"


@pytest.mark.parametrize("device", DEVICES)
def test_running_batches_of_one_size_do_not_disturb_each_other(device):
    engine, plain = with_graphs(device)
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
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs))
    assert [r.cache.lens.tolist() for r in running] == [r.cache.host_lens.tolist() for r in running]
    for r in running:
        r.close()
    assert engine.pool.bytes_held == 0


def test_a_batch_that_is_gone_is_not_kept():
    engine, _ = with_graphs("cpu")
    texts, images = tiny.prompts(seed=92, n=1)
    running = engine.prefill_prepared(engine.model.prepare(engine.model.tokenize(texts, images)))
    running.step([5])
    home = engine._graphs._homes[1]
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
    ((_, pages),) = engine._graphs._replays
    assert rows + 1 <= 4 * pages
    assert pages == 10 or (pages & (pages - 1) == 0 and 2 * rows >= 4 * pages - 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_captured_tower_gives_the_same_rows(vision, device):
    """Pictures in turn, so that a replay that reads or writes elsewhere would give those of another prompt."""
    engine, _ = build(vision=vision, device=device, cuda_graphs=False)
    graphs = TowerGraphs(engine.model.hf.model.vision_tower, Captures() if device == "cpu" else capture_cuda)
    texts, images = tiny.prompts(seed=93, n=40)
    inputs = engine.model.tokenize(texts, images)
    batches = [inputs[i : i + 1 + i % 3] for i in range(40)]
    want = [engine.model.prepare(batch) for batch in batches]
    engine.model.tower_graphs = graphs
    for batch, prompts in zip(batches, want):
        for got, plain in zip(engine.model.prepare(batch), prompts):
            torch.testing.assert_close(got.inputs_embeds, plain.inputs_embeds)
    assert len(graphs._replays) > 3, "hardly any number of pictures was captured"
    assert "forward" not in engine.model.hf.model.vision_tower.__dict__


@pytest.mark.parametrize("device", DEVICES)
def test_policies_in_the_tower_pass_by_the_graphs(device):
    engine, plain = (build(device=device, cuda_graphs=False, policy=ToMe(0.5))[0] for _ in range(2))
    capture = Captures() if device == "cpu" else capture_cuda
    engine.model.tower_graphs = TowerGraphs(engine.model.hf.model.vision_tower, capture)
    texts, images = tiny.prompts(seed=94, n=6, images=(1, 2))
    for policy in (KeepAll(), ToMe(0.5), KeepAll()):
        engine.policy = plain.policy = policy
        answers = [e.generate(texts, images, chat=False, max_new_tokens=4) for e in (engine, plain)]
        assert [r.token_ids for r in answers[0]] == [r.token_ids for r in answers[1]]
