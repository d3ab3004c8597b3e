"""Where attention is computed: backends, and vision towers on a CPU.

The flash-attn packages themselves need a GPU: tests/engine/test_gpu.py runs those there.
"""

import subprocess
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dyvte_engine import DeviceError
from dyvte_engine.kernels import ops
from dyvte_engine.kernels.attention import _FUNCTIONS, _PACKAGES, BACKENDS, Lengths, choose_backend
from dyvte_engine.models.tower_attention import KIND, arrange_attention, attention_configs
from dyvte_engine.models.tower_layers import unused_blocks
from dyvte_engine.models.vision_run import VisionRun
from tests import tiny
from tests.engine.conftest import build

LENGTHS = Lengths(torch.tensor([0, 3, 4, 11], dtype=torch.int32), [3, 1, 7])


def causal(q, k, v, scale):
    """Plain torch in float64: q [n, Hq, D], k and v [n, Hkv, D]."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def package(with_lse):
    """A module with the packages' published signature, computing in plain torch."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        assert causal and max_seqlen_q == max_seqlen_k == 7
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        parts = [reference(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in pairwise(ends)]
        out = torch.cat(parts).to(q.dtype)
        return (out, torch.zeros(q.shape[1], len(q))) if with_lse else out

    reference = globals()["causal"]
    module = ModuleType("package")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", _PACKAGES)
def test_packages_are_called_by_their_interface(name, with_lse, monkeypatch):
    monkeypatch.setitem(sys.modules, _PACKAGES[name], package(with_lse))
    q, k, v = torch.randn(3, 11, 4, 8).unbind()
    got = _FUNCTIONS[name](q, k[:, :2], v[:, :2], LENGTHS, 0.3)
    torch.testing.assert_close(got, _FUNCTIONS["sdpa"](q, k[:, :2], v[:, :2], LENGTHS, 0.3))
    want = torch.cat([causal(q[a:b], k[a:b, :2], v[a:b, :2], 0.3) for a, b in ((0, 3), (3, 4), (4, 11))])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_every_backend_that_does_not_work_here_says_why():
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 64)[0] == "native"
    for name in BACKENDS[:-2]:
        with pytest.raises(DeviceError, match=f"{name}: runs on CUDA devices only"):
            choose_backend(name, torch.device("cpu"), torch.float32, 64)
    with pytest.raises(
        DeviceError, match="accepted: auto, flash_attn_3, flash_attn_4, flash_attn, torch_flash, native, sdpa"
    ):
        choose_backend("flash", torch.device("cpu"), torch.float32, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amx", [False, True])
def test_the_own_kernel_serves_a_cpu_but_long_prompts_with_matrix_units(dtype, amx, monkeypatch):
    calls = counted(monkeypatch)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for n in (1, 256, 257):
        q, k, v = torch.randn(3, n, 4, 64).to(dtype).unbind()
        lengths = Lengths(torch.tensor([0, n], dtype=torch.int32), [n])
        got = _FUNCTIONS["native"](q, k[:, :2], v[:, :2], lengths, 0.125)
        want = causal(q, k[:, :2], v[:, :2], 0.125)
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert len(calls) == (2 if amx and dtype == torch.bfloat16 else 3)


def counted(monkeypatch):
    """A list with an entry for each call of the kernel."""
    calls, kernel = [], ops.varlen_attention
    monkeypatch.setattr(ops, "varlen_attention", lambda *a, **o: calls.append(a) or kernel(*a, **o))
    return calls


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_towers_use_the_own_kernel(vision, monkeypatch):
    engine, hf = build(vision=vision)
    texts, images = tiny.prompts(seed=320, n=8, images=(1, 2))
    inputs = engine.model.tokenize(texts, images)
    calls = counted(monkeypatch)
    got = engine.model.prepare(inputs)
    assert 0 < len(calls) <= hf.config.vision_config.num_hidden_layers
    assert all(len(cu) == 1 + sum(map(len, images)) for _, _, _, cu, _ in calls)
    for text, pictures, mine in zip(texts, images, got, strict=True):
        embeds, _, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        torch.testing.assert_close(mine.inputs_embeds, embeds, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": False},
        {"is_causal": True},
        {"dropout": 0.5},
        {"position_bias": torch.ones(9, 9)},
        {"mask": True},
    ],
)
def test_transformers_attention_is_as_it_was_where_the_kernel_does_not_fit(options, monkeypatch):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls, module = counted(monkeypatch), torch.nn.Module()
    module.is_causal = False
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind()
    mask = torch.rand(2, 1, 9, 9) > 0.3 if options.pop("mask", False) else None
    arguments = (module, q, k, v, mask)
    with VisionRun(module) as run:
        arrange_attention(run, [])
        torch.manual_seed(0)
        got = ALL_ATTENTION_FUNCTIONS[KIND](*arguments, **options)[0]
        causal_pair = ALL_ATTENTION_FUNCTIONS[KIND](module, q, k[:, :, :5], v[:, :, :5], None)[0]
        learning = ALL_ATTENTION_FUNCTIONS[KIND](module, q.clone().requires_grad_(), k, v, None)[0]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    torch.manual_seed(0)
    torch.testing.assert_close(got, before(*arguments, **options)[0])
    torch.testing.assert_close(causal_pair, before(module, q, k[:, :, :5], v[:, :, :5], None)[0])
    assert learning.requires_grad
    assert len(calls) == (mask is None and options in ({}, {"is_causal": False}))
    ALL_ATTENTION_FUNCTIONS[KIND](module, q, k, v, None)
    assert len(calls) <= 1, "outside a run it is transformers'"


@pytest.mark.parametrize(("dim", "used"), [(256, 1), (257, 0)])
def test_heads_too_large_for_the_kernel_are_left_to_torch(dim, used, monkeypatch):
    calls, module = counted(monkeypatch), torch.nn.Module()
    module.is_causal = False
    q, k, v = torch.randn(3, 1, 2, 5, dim).unbind()
    want = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None)[0]
    with VisionRun(module) as run:
        arrange_attention(run, [])
        torch.testing.assert_close(ALL_ATTENTION_FUNCTIONS[KIND](module, q, k, v, None)[0], want)
    assert len(calls) == used


def test_an_attention_of_the_users_own_is_used(monkeypatch):
    engine, hf = build()
    texts, images = tiny.prompts(seed=321, n=2, images=(1,))
    seen, before = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **o: seen.append(a) or before(*a, **o))
    engine.model.prepare(engine.model.tokenize(texts, images))
    assert len(seen) == hf.config.vision_config.num_hidden_layers - len(unused_blocks(hf)) > 0


def test_the_towers_config_comes_back_after_an_error():
    engine, _ = build()
    config = engine.model.hf.model.vision_tower.config
    with pytest.raises(ValueError, match="stop"), VisionRun(engine.model.hf.model) as run:
        arrange_attention(run, attention_configs([engine.model.hf.model.vision_tower]))
        assert config._attn_implementation == KIND
        raise ValueError("stop")
    assert config._attn_implementation == "sdpa"
    assert engine.model.language_model.config._attn_implementation == "sdpa"


def test_importing_the_engine_leaves_transformers_models_alone():
    """Their base module takes seconds to import, which a command that loads no model should not wait for."""
    code = "import sys; from dyvte_engine import Engine; print('transformers.modeling_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
