"""What a GPU computes packed batches with, held on the CPU to the paths that other tests compare with transformers."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaModel

from dyvte_engine.training import packing

BATCH, PREFIX, BLOCKS, BLOCK = 2, 5, 3, 4


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    config._attn_implementation = "prefix_split"
    model = LlamaModel(config)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"]), model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def inputs(model, prefix):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, prefix + BLOCKS * BLOCK, 24, generator=generator)
    allowed = torch.rand(BATCH, 1, BLOCKS, BLOCK, BLOCK, generator=generator) < 0.5
    allowed |= torch.eye(BLOCK, dtype=torch.bool)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    cos, sin = model.rotary_emb(hidden, torch.arange(hidden.shape[1]).expand(BATCH, -1))
    return hidden, mask, cos, sin, prefix


@pytest.mark.parametrize("prefix", [PREFIX, 1])
def test_a_layer_in_few_passes_is_transformers_layer(decoder, prefix):
    found = []
    for own in (False, True):
        model = copy.deepcopy(decoder)
        layer = model.layers[0]
        hidden, *others = inputs(model, prefix)
        hidden.requires_grad_()
        run = packing.llama_layer if own else packing.layer_runner(model, False)
        out = run(layer, hidden, *others)
        out.square().sum().backward()
        found.append([out.detach(), hidden.grad, *(p.grad for p in layer.parameters())])
    assert len(found[0]) > 10
    for theirs, ours in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_layer_that_the_cpu_does(decoder):
    hidden, mask, cos, sin, prefix = inputs(decoder, PREFIX)
    expected = packing.layer_runner(decoder, False)(decoder.layers[0], hidden, mask, cos, sin, prefix)
    there = copy.deepcopy(decoder).to("cuda", torch.bfloat16)
    run = packing.layer_runner(there, False)
    moved = [x.to("cuda", torch.bfloat16) for x in (hidden, mask, cos, sin)]
    found = run(there.layers[0], *moved, prefix)
    assert run is packing.llama_layer
    assert (found.float().cpu() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("prefix", [PREFIX, 1])
def test_fused_attention_is_the_plain_one(decoder, prefix):
    _, mask, *_ = inputs(decoder, prefix)
    found = []
    for one in (packing._split_attention, packing._fused_attention):
        generator = torch.Generator().manual_seed(2)
        shapes = [(BATCH, heads, prefix + BLOCKS * BLOCK, 8) for heads in (6, 2, 2)]
        qkv = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        out = (
            one(decoder, *qkv, mask, 0.3, prefix)[0]
            if one is packing._split_attention
            else one(*qkv, mask, 0.3, prefix)
        )
        (out * torch.arange(8.0)).square().sum().backward()
        found.append([out.detach(), *(x.grad for x in qkv)])
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
