"""Decoding with five kernels a layer: the same answers; chosen where it was measured, refused where it cannot work.

On a CPU, which has no such kernels, what `ref.py` says of them stands for them.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dyvte_engine import EngineConfig, FixedExit
from dyvte_engine.errors import DeviceError, InvalidArgumentError
from dyvte_engine.kernels import ops
from dyvte_engine.kernels.graphs import capture_cuda
from dyvte_engine.models import fused
from dyvte_engine.models.fused import FusedLayers, fused_layers, why_not
from dyvte_engine.runtime.decode import DecodeGraphs
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_graphs import Captures, answered_alike

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CALLS = ("norm_qkv_append_", "add_linear_", "norm_gate_up", "norm_linear")


@pytest.fixture
def calls(monkeypatch):
    """How often each of the kernels was asked for; on a CPU they are its stand-ins."""
    seen = dict.fromkeys(CALLS, 0)

    def counted(name):
        kernel, reference = getattr(ops, name), getattr(ops, f"{name.removesuffix('_')}_ref")

        def call(first, *rest):
            seen[name] += 1
            return (kernel if first.is_cuda else reference)(first, *rest)

        return call

    for name in CALLS:
        monkeypatch.setattr(ops, name, counted(name))
    return seen


def pair(decoder, device, most=8):
    """An engine that decodes with them, through graphs or their stand-in, and one as usual."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = dict(decoder=decoder, dtype=dtype, device=device, policy=FixedExit(1), page_size=4, graphs=False)
    options |= dict(fused_decode=False)
    engine, plain = (build(**options, picture_cache=0, prefix_cache=0)[0] for _ in range(2))
    layers = FusedLayers(engine.model.decoder, most)
    capture = Captures() if device == "cpu" else capture_cuda
    graphs = DecodeGraphs(
        engine.model.decoder, engine.pool, engine.config.max_batch, engine.max_len, capture, fused=layers
    )
    engine.runner.fused = engine._scheduler._running._fused = layers
    engine.runner.graphs = engine._scheduler._running._graphs = graphs
    return engine, plain


def assert_near(got, want, device):
    """Of a layer bfloat16 rounds some other numbers than the usual kernels do."""
    assert (got - want).norm() <= (0.05 if device == "cuda" else 1e-5) * want.norm()


@pytest.mark.parametrize("decoder", ["llama-gqa", "qwen2"])
def test_answers_are_the_usual_ones(decoder, calls):
    """Sequences of other lengths in each layer, which end at different steps; without biases and with."""
    engine, plain = pair(decoder, "cpu")
    answered_alike(engine, plain)
    assert calls["norm_qkv_append_"] > 0
    assert calls["add_linear_"] == 2 * calls["norm_qkv_append_"] == 2 * calls["norm_gate_up"]
    assert calls["norm_qkv_append_"] == 4 * calls["norm_linear"]  # layers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("most", [0, 2, 8])
def test_steps_of_more_sequences_than_it_takes_run_as_usual(device, most, calls):
    engine, plain = pair("llama-gqa", device, most)
    texts, images = tiny.prompts(seed=77, n=3)
    for count in (1, 2, 3):
        prompts = plain.model.prepare(plain.model.tokenize(texts[:count], images[:count]))
        with engine.prefill_prepared(prompts) as got, plain.prefill_prepared(prompts) as want:
            before = calls["norm_gate_up"]
            for token in (5, 9):
                assert_near(got.step([token] * count), want.step([token] * count), device)
            padded = 4 if count == 3 else count  # a graph is for a power of two
            assert (calls["norm_gate_up"] > before) == (padded <= most)
    assert engine.runner.fused._arrived.count_nonzero() == 0


@pytest.mark.gpu
def test_an_engine_that_asks_for_it(calls):
    engine, _ = build("qwen2", dtype=torch.bfloat16, device="cuda", fused_decode=True)
    plain, _ = build("qwen2", dtype=torch.bfloat16, device="cuda", fused_decode=False)
    assert engine.runner.fused.most == 8
    compare_with_float32(engine, plain)
    assert sum(calls.values()) > 0


def compare_with_float32(engine, plain):
    """Both are as near to the same weights in float32: bfloat16 leaves some hundredths of so small a model's logits."""
    exact, _ = build("qwen2", dtype=torch.float32, device=str(plain.config.device))
    exact.model.hf.load_state_dict({name: t.float() for name, t in plain.model.hf.state_dict().items()})
    wrong = {engine: [], plain: []}
    for seed in range(78, 82):
        texts, images = tiny.prompts(seed=seed, n=2)
        prompts = plain.model.prepare(plain.model.tokenize(texts, images))
        whole = [replace(p, inputs_embeds=p.inputs_embeds.float()) for p in prompts]
        with contextlib.ExitStack() as running:
            steps = {e: running.enter_context(e.prefill_prepared(prompts)).step for e in wrong}
            right = running.enter_context(exact.prefill_prepared(whole)).step
            for token in range(5, 12):
                want = right([token] * 2)
                for e, step in steps.items():
                    wrong[e].append(float((step([token] * 2) - want).norm() / want.norm()))
    ours, usual = (sum(w**2 for w in errors) ** 0.5 for errors in wrong.values())
    assert ours < 1.25 * usual and max(wrong[engine]) < 0.15, (wrong[engine], wrong[plain])


def test_rounding_is_as_in_the_usual_kernels(calls):
    engine, plain = (build("qwen2", dtype=torch.bfloat16, graphs=False)[0] for _ in range(2))
    engine.runner.fused = FusedLayers(engine.model.decoder)
    compare_with_float32(engine, plain)
    assert sum(calls.values()) > 0


def test_where_it_is_not_for(monkeypatch):
    with pytest.raises(InvalidArgumentError, match="fused_decode is 'yes'"):
        EngineConfig(torch.device("cpu"), torch.float32, fused_decode="yes")
    with pytest.raises(DeviceError, match="fused_decode does not work here: it is for CUDA, not cpu"):
        build(fused_decode=True)
    for asked in (False, "auto"):
        assert build(fused_decode=asked)[0].runner.fused is None


def on_cuda(decoder="llama-gqa", dtype=torch.bfloat16, **changes):
    """What the rule looks at of a decoder that is on a GPU."""
    whole = build(decoder, dtype=dtype)[0].model.decoder
    norm = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    seen = {name: getattr(whole, name) for name in ("shape", "layers", "cos_sin", "linears")}
    return SimpleNamespace(**{**seen, "norm": norm, **changes})


def test_the_rule(monkeypatch):
    """By what the kernels take, and by the shared memory of a GPU."""
    monkeypatch.setattr(fused, "_shared_bytes", lambda device: 227 << 10)
    assert why_not(on_cuda()) is None
    assert why_not(on_cuda("qwen2")) is None
    assert "float32" in why_not(on_cuda(dtype=torch.float32))
    assert "normalised" in why_not(on_cuda("qwen3"))
    assert "heads" in why_not(on_cuda(cos_sin=torch.zeros(8, 8)))
    monkeypatch.setattr(fused, "_shared_bytes", lambda device: 9300)
    assert "shared memory" in why_not(on_cuda())
    h100, l4 = 227 << 10, 99 << 10
    sizes = {4096: (8, 8), 5120: (8, 8), 8192: (8, 5), 16384: (6, 2), 131072: (0, 0)}
    for hidden, want in sizes.items():
        assert tuple(fused._fitting(hidden, shared) for shared in (h100, l4)) == want


def test_auto_is_by_the_table_of_what_was_measured(monkeypatch):
    monkeypatch.setattr(fused, "_shared_bytes", lambda device: 227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(fused, "FusedLayers", lambda decoder, most: most)
    decoder = on_cuda()
    assert fused_layers(decoder, True) == 8
    assert fused_layers(decoder, False) is None
    assert fused_layers(decoder, "auto") is None, "nothing has been measured"
    monkeypatch.setitem(fused._MEASURED, ("a GPU", decoder.shape.hidden_size), 2)
    assert fused_layers(decoder, "auto") == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another one")
    assert fused_layers(decoder, "auto") is None
