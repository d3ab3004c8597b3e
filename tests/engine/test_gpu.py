"""The engine on a CUDA device: the same answers as on the CPU and as transformers, on every attention backend there."""

import pytest
import torch

from dyvte_engine import DivPrune, DynamicExit, FastV, FixedExit, KeepAll, PyramidDrop, Random, compose
from dyvte_engine.kernels.attention import BACKENDS, CAPTURABLE, try_backend
from tests import tiny
from tests.engine.conftest import build, logits_errors
from tests.engine.test_exit import random_heads
from tests.engine.test_keep_all import FAMILIES

pytestmark = pytest.mark.gpu
POLICIES = {
    "keep-all": KeepAll(),
    "fixed": FixedExit(1),
    "fastv": FastV(1, 0.5),
    "dynamic": DynamicExit(random_heads(6), 0.7),
    "dyvte+fastv": compose(FastV(1, 0.5), DynamicExit(random_heads(6), 0.7)),
    "pyramiddrop": PyramidDrop(),
    "divprune": DivPrune(0.5),
    "random": Random(2, 0.5),
    "two that keep a part": compose(FastV(2, 0.5), Random(2, 0.5)),
}


@pytest.mark.parametrize(("decoder", "vision"), FAMILIES)
def test_greedy_tokens_equal_generate(decoder, vision):
    engine, hf = build(decoder, vision, device="cuda")
    texts, images = tiny.prompts(seed=FAMILIES.index((decoder, vision)), n=24)
    want = [tiny.hf_greedy(hf, engine.model.processor, t, i, 8) for t, i in zip(texts, images)]
    assert [r.token_ids for r in engine.generate(texts, images, chat=False, max_new_tokens=8)] == want


@pytest.mark.parametrize("drop_early_kv", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_policies_equal_the_cpu(name, drop_early_kv):
    texts, images = tiny.prompts(seed=80, n=16)
    answers = []
    for device in ("cpu", "cuda"):
        engine, _ = build(device=device, policy=POLICIES[name], drop_early_kv=drop_early_kv)
        answers.append(engine.generate(texts, images, chat=False, max_new_tokens=8))
        assert engine.pool.bytes_held == 0
    cpu, cuda = answers
    assert [r.token_ids for r in cuda] == [r.token_ids for r in cpu]
    assert [r.stats.exit_layer for r in cuda] == [r.stats.exit_layer for r in cpu]
    assert [r.stats.kv_bytes for r in cuda] == [r.stats.kv_bytes for r in cpu]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_stay_within_twice_torchs_error(backend, dtype):
    reason = try_backend(backend, torch.device("cuda"), dtype, head_dim=16)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    engine, low = build(dtype=dtype, device="cuda", attn_backend=backend)
    assert (engine.runner.layer_graphs is not None) == (backend in CAPTURABLE)
    exact = tiny.model().to("cuda", dtype).double()
    for images in ((1, 2, 3), (0,)):  # without a picture all layers run as graphs, after the first prompt as replays
        ours, theirs = logits_errors(engine, low, exact, *tiny.prompts(seed=81, n=8, images=images))
        assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # with the second, text-only layers are graphs too
@pytest.mark.parametrize("drop_early_kv", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_neither_prefill_nor_decoding_waits_for_the_device(name, drop_early_kv, dtype):
    """torch raises where an operation waits; decisions are read by an event, behind queued work."""
    engine, _ = build(device="cuda", dtype=dtype, policy=POLICIES[name], page_size=4, drop_early_kv=drop_early_kv)
    texts, images = tiny.prompts(seed=82, n=8, images=(1, 2))
    prompts = engine.model.prepare(engine.model.tokenize(texts, images))
    tokens = torch.full((8,), 7, device="cuda")
    for mode in ("default", "error"):  # first so that libraries are set up and graphs captured
        torch.cuda.set_sync_debug_mode(mode)
        try:
            running = engine.prefill_prepared(prompts)
            for _ in range(6):
                running.step(tokens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        running.close()


@pytest.mark.parametrize("picture_cache", [0, "auto"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_request_waits_for_nothing_but_decisions_and_tokens(name, picture_cache):
    """From its pictures to its last token: the vision side, what is kept of pictures, joining, sampling. Both are read
    by events, which torch does not count. The second time all pictures are known, the third time none is."""
    options = dict(device="cuda", dtype=torch.bfloat16, policy=POLICIES[name], page_size=4)
    engine, _ = build(**options, picture_cache=picture_cache)
    for mode, seed in (("default", 84), ("error", 84), ("error", 85)):
        texts, images = tiny.prompts(seed=seed, n=8, images=(1, 2))
        torch.cuda.set_sync_debug_mode(mode)
        try:
            results = engine.generate(texts, images, chat=False, max_new_tokens=4)
            alone = engine.generate(texts[0], images[0], chat=False, max_new_tokens=4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(r.token_ids for r in (*results, alone))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["keep-all", "dyvte+fastv"])
def test_a_device_that_is_not_the_current_one(name):
    """Both devices in turn, so that graphs of one are captured when the other has some already."""
    texts, images = tiny.prompts(seed=83, n=8)
    engines = [build(device=f"cuda:{n}", dtype=torch.bfloat16, policy=POLICIES[name], page_size=4)[0] for n in (0, 1)]
    assert torch.cuda.current_device() == 0
    answers = [engine.generate(texts, images, chat=False, max_new_tokens=8) for engine in (*engines, *engines)]
    assert len({str([r.token_ids for r in answer]) for answer in answers}) == 1
    assert torch.cuda.current_device() == 0
