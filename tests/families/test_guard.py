"""What somebody put around a decoder is refused and never ignored; weights that were exchanged are read anew."""

import contextlib
import copy
import functools
import time

import pytest
import torch
import transformers
from torch import nn

from dyvte_engine import Engine, FixedExit, KeepAll, ModelError, hf
from dyvte_engine.models import VisionLanguageModel
from tests import tiny
from tests.families import oracle, zoo

HOOK = dict(do_sample=False, max_new_tokens=6, custom_generate=hf.generate)


def inputs_of(family="llava", seed=170):
    texts, images = zoo.prompts(family, seed=seed, n=1, images=(2,))
    return zoo.encode(family, texts[0], images[0])


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def decoder(model):
    return model.model.language_model


def subclassed(model):
    old = decoder(model).layers[1].mlp.up_proj
    decoder(model).layers[1].mlp.up_proj = Scaled(old.in_features, old.out_features, bias=False)


def own_attention(model):
    transformers.AttentionInterface.register("mine", lambda *args, **options: None)
    decoder(model).config._attn_implementation = "mine"


def own_attention_in_a_layer(model):
    config = layer(model).self_attn.config = copy.deepcopy(layer(model).self_attn.config)
    transformers.AttentionInterface.register("mine", lambda *args, **options: None)
    config._attn_implementation = "mine"


def transposed(model):
    weight = layer(model).self_attn.o_proj.weight
    weight.data = weight.data.t()


def without_a_layer(model):
    del decoder(model).layers[-1]


def with_adapter(kind, target):
    def change(model):
        peft = pytest.importorskip("peft")
        configs = {
            "lora": lambda: peft.LoraConfig(target_modules=[target], r=4, init_lora_weights=False),
            "dora": lambda: peft.LoraConfig(target_modules=[target], r=4, use_dora=True, init_lora_weights=False),
            "ia3": lambda: peft.IA3Config(target_modules=[target], feedforward_modules=[]),
        }
        peft.inject_adapter_in_model(configs[kind](), model)  # what `add_adapter` does

    return change


def layer(model, number=1):
    return decoder(model).layers[number]


def setting(where, name, value):
    return lambda model: setattr(where(model), name, value)


def made_in_inference_mode(linear):
    with torch.inference_mode():
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)


CHANGES = {
    "hook of a layer": (lambda m: layer(m).register_forward_hook(lambda *a: None), r"layers\.1 has a forward hook"),
    "hook before q": (
        lambda m: layer(m).self_attn.q_proj.register_forward_pre_hook(lambda *a: None),
        r"layers\.1\.self_attn\.q_proj has a forward pre hook",
    ),
    "hook of the embedding": (
        lambda m: m.get_input_embeddings().register_forward_hook(lambda *a: None),
        "embed_tokens has a forward hook",
    ),
    "hook of the LM head": (lambda m: m.lm_head.register_forward_hook(lambda *a: None), "lm_head has a forward hook"),
    "hook of the model": (lambda m: m.register_forward_hook(lambda *a: None), "the model has a forward hook"),
    "hook of the decoder": (lambda m: decoder(m).register_forward_pre_hook(lambda *a: None), "language_model has a"),
    "forward of a layer": (setting(layer, "forward", lambda *a, **k: a[0]), r"layers\.1 has a forward of its own"),
    "inference mode": (
        lambda m: made_in_inference_mode(layer(m).self_attn.k_proj),
        "only some weights were made in inference mode",
    ),
    "forward of another layer": (
        lambda m: setattr(layer(m), "forward", decoder(m).layers[0].forward),
        r"layers\.1 has a forward of its own",
    ),
    "forward of the model": (
        lambda m: setattr(m, "forward", functools.partial(type(m).forward, m)),
        "the model has a forward of its own",
    ),
    "subclass": (subclassed, r"up_proj is a tests\.families\.test_guard\.Scaled"),
    "norm": (
        lambda m: setattr(layer(m), "input_layernorm", nn.LayerNorm(64)),
        r"input_layernorm is a torch\.nn\.modules\.normalization\.LayerNorm",
    ),
    "activation": (lambda m: setattr(layer(m).mlp, "act_fn", nn.GELU()), r"act_fn is a torch.*GELU"),
    "eps": (lambda m: setattr(layer(m).post_attention_layernorm, "variance_epsilon", 1.0), "variance_epsilon"),
    "scaling": (lambda m: setattr(layer(m).self_attn, "scaling", 1.0), r"self_attn\.scaling is 1\.0"),
    "window": (lambda m: setattr(layer(m).self_attn, "sliding_window", 8), r"self_attn\.sliding_window is 8"),
    "not causal": (lambda m: setattr(layer(m).self_attn, "is_causal", False), "is_causal is False; accepted: True"),
    "attention function of a layer": (own_attention_in_a_layer, "attention is 'mine', a function of your own"),
    "attention function": (own_attention, "attention is 'mine', a function of your own"),
    "weight_norm": (
        lambda m: nn.utils.parametrizations.weight_norm(layer(m).self_attn.o_proj),
        "o_proj is a .*ParametrizedLinear",
    ),
    "old weight_norm": (lambda m: nn.utils.weight_norm(layer(m).self_attn.o_proj), "o_proj has a forward pre hook"),
    "transposed": (transposed, "o_proj has weights in another layout"),
    "layers": (without_a_layer, "decoder has 3 layers"),
    "dropout": (
        lambda m: [setattr(x.self_attn, "attention_dropout", 0.1) for x in decoder(m.train()).layers],
        r"training mode with attention_dropout 0\.1",
    ),
    "bias": (lambda m: layer(m).self_attn.q_proj.register_parameter("bias", nn.Parameter(torch.ones(64))), "a bias"),
    "dtypes": (lambda m: layer(m, 0).mlp.to(torch.bfloat16), "bfloat16"),
    "lora": (with_adapter("lora", "q_proj"), r"q_proj is a peft.*merge_and_unload"),
    "dora": (with_adapter("dora", "down_proj"), r"down_proj is a peft.*merge_and_unload"),
    "ia3": (with_adapter("ia3", "k_proj"), r"k_proj is a peft.*merge_and_unload"),
    "lora of the LM head": (with_adapter("lora", "lm_head"), r"lm_head is a peft.*merge_and_unload"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGES)
def test_what_would_be_ignored_is_refused(name):
    """When the model is taken over, and at a call where it was fine before."""
    change, words = CHANGES[name]
    model, inputs = zoo.model("llava"), inputs_of()
    model.generate(**inputs, **HOOK)
    change(model)
    with pytest.raises(ModelError, match=words):
        model.generate(**inputs, **HOOK)
    fresh = zoo.model("llava")
    change(fresh)
    if name != "layers":  # a model may have fewer, if its config says so
        with pytest.raises(ModelError, match=words):
            hf.enable(fresh)
        assert "generate" not in vars(fresh)
        with pytest.raises(ModelError, match=words):
            VisionLanguageModel(fresh, None, "changed", 128)


def test_a_peft_model_and_a_patched_class_and_hooks_for_all_modules(monkeypatch):
    model, inputs = zoo.model("llava"), inputs_of()
    model.generate(**inputs, **HOOK)
    mlp = type(layer(model).mlp)
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", lambda self, x: x)
        with pytest.raises(ModelError, match=f"the forward of {mlp.__name__} is tests"):
            model.generate(**inputs, **HOOK)
    for part in (layer(model).self_attn, model):  # by something that has the name of what it wraps
        with monkeypatch.context() as patch:
            own = type(part).forward
            patch.setattr(type(part), "forward", functools.wraps(own)(lambda *args, **options: 0))
            with pytest.raises(ModelError, match=type(part).__name__):
                model.generate(**inputs, **HOOK)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    with pytest.raises(ModelError, match="hooks for all modules"):
        model.generate(**inputs, **HOOK)
    handle.remove()
    assert model.generate(**inputs, **HOOK) is not None
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        hf.enable(wrapped)


def test_hooks_that_transformers_leaves_are_accepted():
    model, twin, inputs = zoo.model("llava"), zoo.model("llava"), inputs_of()
    model(**inputs, output_hidden_states=True)
    model.enable_input_require_grads()
    assert torch.equal(model.generate(**inputs, **HOOK), twin.generate(**inputs, **{**HOOK, "custom_generate": None}))


def test_an_adapter_in_the_tower_acts():
    """HF's own code runs there."""
    peft = pytest.importorskip("peft")
    model, inputs = zoo.model("llava"), inputs_of()
    before = model.generate(**inputs, **HOOK)
    config = peft.LoraConfig(target_modules=["q_proj", "fc1"], r=8, lora_alpha=800, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.model.vision_tower)
    got = model.generate(**inputs, **HOOK)
    assert torch.equal(got, model.generate(**inputs, **{**HOOK, "custom_generate": None}))
    assert not torch.equal(got, before)


def other_weights(model):
    return {n: w + 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5)) for n, w in model.items()}


def assigned(model):
    model.load_state_dict(other_weights(model.state_dict()), assign=True)


def replaced(model):
    weight = layer(model).mlp.down_proj.weight
    weight.data = -weight.data


def exchanged(model):
    with torch.no_grad():
        decoder(model).layers[0] = copy.deepcopy(decoder(model).layers[2])
        decoder(model).layers[0].self_attn.layer_idx = 0
        decoder(model).layers[0].self_attn.config = decoder(model).config


def resized(model):
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 8, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-8:] = 0.0
        model.get_input_embeddings().weight[-8:] = 0.0


def merged(model, safe=True, target=r".*language_model.*(q_proj|up_proj)"):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=target, lora_alpha=80, init_lora_weights=False)
    whole = peft.get_peft_model(model, config)
    assert whole.merge_and_unload(safe_merge=safe) is model


def merged_in_place(model):
    merged(model, safe=False, target=r".*layers\.1\.mlp\.down_proj")


def written_by_data(model):
    layer(model).self_attn.o_proj.weight.data.neg_()


def rows_written_by_data(model):
    layer(model).mlp.up_proj.weight.data[::3] = 0.2


def row_written_by_data(model):
    weight = layer(model).mlp.up_proj.weight.data
    weight[weight.shape[1]] = 5.0  # as many rows further on as there are columns


def columns_written_by_data(model):
    layer(model).mlp.up_proj.weight.data[:, 40:50] = 0.2


def trained(model):
    model.train().requires_grad_(True)
    inputs = inputs_of()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def turned(model):
    decoder(model).rotary_emb.inv_freq = 2 * decoder(model).rotary_emb.inv_freq


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        *(assigned, replaced, exchanged, resized, merged, merged_in_place, trained, turned),
        *(written_by_data, rows_written_by_data, row_written_by_data, columns_written_by_data),
    ],
)
def test_changed_weights_are_read(change, pack):
    model, twin, inputs = zoo.model("llava"), zoo.model("llava"), inputs_of()
    state = hf.enable(model, max_len=384, pack_weights=pack)
    plain = dict(do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    before = model.generate(**inputs, **plain)
    for one in (model, twin):
        change(one)
    got, want = (one.generate(**inputs, **plain) for one in (model, twin))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=1e-3)
    assert got.logits[0].shape != before.logits[0].shape or not torch.allclose(got.logits[0], before.logits[0])
    state.policy = FixedExit(1)
    n = inputs["input_ids"].shape[1]
    exited = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, n:].tolist()
    assert exited == oracle.greedy(twin, oracle.enter(twin, inputs), oracle.fixed(1), 6)[0]


def test_another_dtype_is_read():
    model, inputs = zoo.model("llava"), inputs_of()
    state = hf.enable(model)
    model.to(torch.bfloat16)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert state.engine.config.dtype is torch.bfloat16 and isinstance(state.policy, KeepAll)


def test_looking_takes_well_under_a_millisecond():
    model = VisionLanguageModel(tiny.model(layers=32), None, "deep", 64)
    times = []
    for _ in range(20):
        started = time.thread_time()
        assert not model.guard.changed()
        times.append(time.thread_time() - started)
    assert min(times) < 1e-3


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = zoo.model("llava")
    with contextlib.suppress(OSError):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds an adapter; accepted: a whole model"):
        Engine.from_pretrained(tmp_path, device="cpu")
