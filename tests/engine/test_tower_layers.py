"""Blocks of a vision tower that the engine computes itself, against transformers' own."""

import copy
import functools

import pytest
import torch
import transformers

from dyvte_engine.errors import ModelError
from dyvte_engine.kernels import ops
from dyvte_engine.models import tower_layers
from dyvte_engine.models.linear import packing_fault
from dyvte_engine.models.tower_attention import KIND, arrange_attention, attention_configs
from dyvte_engine.models.tower_layers import TowerLayers, skip, unused_blocks
from dyvte_engine.models.vision_run import VisionRun
from tests import tiny
from tests.engine.conftest import build

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("the blocks of releases before 5 run as they are", allow_module_level=True)

DTYPES = [
    pytest.param(d, marks=pytest.mark.skipif(bool(packing_fault(d)), reason=str(packing_fault(d))))
    for d in (torch.float32, torch.bfloat16)
]
SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=24)


def clip(**options):
    config = transformers.CLIPVisionConfig(patch_size=4, **SIZES | options)
    return transformers.CLIPVisionModel(config)


def siglip(**options):
    config = transformers.SiglipVisionConfig(patch_size=4, vision_use_head=False, **SIZES | options)
    return transformers.SiglipVisionModel(config)


def idefics3(**options):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    config = transformers.Idefics3Config(vision_config=dict(patch_size=4, **SIZES | options)).vision_config
    return Idefics3VisionTransformer(config)


def smolvlm(**options):
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

    config = transformers.SmolVLMConfig(vision_config=dict(patch_size=4, **SIZES | options)).vision_config
    return SmolVLMVisionTransformer(config)


TOWERS = [clip, siglip, idefics3, smolvlm]


def tower(make=clip, dtype=torch.float32, **options):
    torch.manual_seed(7)
    made = make(**options).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    made.config._attn_implementation = "sdpa"
    return made.to(dtype)


def pixels(n=3, dtype=torch.float32):
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(11)).to(dtype)


@torch.no_grad()
def run(made, layers, x):
    """The tower's output, and how many of its linear layers were computed here."""
    with VisionRun(made) as around:
        arrange_attention(around, attention_configs([made]))
        ours = layers.arrange(around)
        return made(x).last_hidden_state, len(ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("make", TOWERS)
@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_transformers(pack, make, act, dtype):
    """The error against float64 is at most twice that of transformers' code."""
    made, x = tower(make, dtype, hidden_act=act), pixels(dtype=dtype)
    with torch.no_grad():
        theirs, exact = made(x).last_hidden_state, copy.deepcopy(made).double()(x.double()).last_hidden_state
    ours, linears = run(made, TowerLayers(made, pack), x)
    assert linears == 3 * 6 and ours.dtype == dtype
    assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("width", [48, 64])  # heads that FlashAttention does not take, and such that it does
@pytest.mark.parametrize("make", TOWERS)
def test_rows_on_cuda_are_transformers(make, width, act, dtype):
    made = tower(make, dtype, hidden_act=act, hidden_size=width)
    exact_tower, made, x = copy.deepcopy(made).double(), made.cuda(), pixels(dtype=dtype)
    with torch.no_grad():
        exact = exact_tower(x.double()).last_hidden_state
        theirs = made(x.cuda()).last_hidden_state.cpu()
    ours, linears = run(made, TowerLayers(made, pack=False), x.cuda())
    assert linears == 3 * 6 and ours.dtype == dtype
    assert (ours.cpu().double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + 1e-6 * exact.norm()


def test_a_run_leaves_nothing_behind():
    made = tower()
    layers = TowerLayers(made)
    run(made, layers, pixels())
    assert not any("forward" in m.__dict__ for m in made.modules())
    assert made.config._attn_implementation != KIND


def in_place(linear):
    linear.weight.mul_(2.0)


def another_tensor(linear):
    linear.weight = torch.nn.Parameter(2 * linear.weight)


def another_bias(linear):
    linear.bias = torch.nn.Parameter(linear.bias + 1)


def through_data(linear):
    linear.weight.data.mul_(2.0)  # as peft merges


@pytest.mark.parametrize("change", [in_place, another_tensor, another_bias, through_data])
@pytest.mark.parametrize("pack", [True, False])
def test_changed_weights_are_read_anew(pack, change):
    made, x = tower(), pixels()
    layers = TowerLayers(made, pack)
    before, _ = run(made, layers, x)
    with torch.no_grad():
        change(made.encoder.layers[1].self_attn.v_proj)
        want = made(x).last_hidden_state
    after, linears = run(made, layers, x)
    assert linears == 18 and not torch.allclose(before, want, atol=1e-3)
    torch.testing.assert_close(after, want, atol=1e-4, rtol=1e-4)


def test_weights_side_by_side_are_the_models_own():
    """Nothing is held twice, what is written to a weight counts without a look at it, and another engine moves none."""
    made, x = tower(), pixels()
    layers = TowerLayers(made, pack=False)
    before, _ = run(made, layers, x)
    attention = made.encoder.layers[1].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    places = [m.weight.data_ptr() for m in linears]
    assert len({m.weight.untyped_storage().data_ptr() for m in linears}) == 1
    assert places == [places[0] + i * linears[0].weight.nbytes for i in range(3)]
    again, _ = run(made, TowerLayers(made, pack=False), x)
    assert [m.weight.data_ptr() for m in linears] == places and torch.equal(again, before)
    with VisionRun(made) as around, torch.no_grad():
        layers.arrange(around)
        attention.v_proj.weight.data.mul_(2.0)
        got = made(x).last_hidden_state
    want = made(x).last_hidden_state
    assert not torch.allclose(before, want, atol=1e-3)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    loss = made.train()(x).last_hidden_state.square().sum()
    loss.backward()
    assert all(m.weight.grad.count_nonzero() for m in linears)


@pytest.mark.parametrize("pack", [True, False])
def test_weights_made_under_inference_mode(pack):
    with torch.inference_mode():
        made = tower()
    layers, x = TowerLayers(made, pack), pixels()
    with torch.no_grad():
        want = made(x).last_hidden_state
    for _ in range(2):
        got, linears = run(made, layers, x)
        assert linears == 18
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("make", TOWERS)
def test_attention_of_fewer_heads(make, pack):
    made, x = tower(make), pixels()
    attention = made.encoder.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(attention, name)
        linear.weight, linear.bias = (torch.nn.Parameter(t.data[:24].clone()) for t in (linear.weight, linear.bias))
    attention.out_proj.weight = torch.nn.Parameter(attention.out_proj.weight.data[:, :24].clone())
    with torch.no_grad():
        want = made(x).last_hidden_state
    got, linears = run(made, TowerLayers(made, pack), x)
    assert linears == 18
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("early", [True, False], ids=["before", "between two runs"])
@pytest.mark.parametrize("part", ["EncoderLayer", "Attention", "MLP"])
@pytest.mark.parametrize("named", [False, True], ids=["by another name", "by its name"])
def test_classes_that_somebody_patched_run_as_they_are(named, part, early, monkeypatch):
    made, x = tower(), pixels()
    layers = TowerLayers(made)
    if not early:
        run(made, layers, x)
    cls = getattr(transformers.models.clip.modeling_clip, f"CLIP{part}")

    def halved(self, *args, own=cls.forward, **options):
        out = own(self, *args, **options)
        return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2

    monkeypatch.setattr(cls, "forward", functools.wraps(cls.forward)(halved) if named else halved)
    with torch.no_grad():
        want = made(x).last_hidden_state
    got, linears = run(made, layers, x)
    assert linears == 0
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_what_a_hook_gets_or_gives_is_not_written_over():
    """Where a block runs as it is, its activation is computed in place."""
    made, x, got = tower(hidden_act="quick_gelu"), pixels(), []
    given = torch.randn(3, 80, 37).transpose(1, 2)
    kept = given.clone()
    made.encoder.layers[1].mlp.fc1.register_forward_hook(lambda m, args, out: got.append(out))
    made.encoder.layers[2].mlp.fc1.register_forward_hook(lambda m, args, out: given)
    with torch.no_grad():
        want = made(x).last_hidden_state
    rows, linears = run(made, TowerLayers(made, pack=False), x)
    assert linears == 6 and torch.equal(given, kept)
    torch.testing.assert_close(got[1], got[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows, want, atol=1e-4, rtol=1e-4)


def test_rows_that_somebody_changes_between_blocks_are_normed_anew():
    """A block hands its rows on together with their norm."""
    made, x = tower(), pixels()
    made.encoder.layers[0].register_forward_hook(lambda m, args, out: out.cos_())
    with torch.no_grad():
        want = made(x).last_hidden_state
    torch.testing.assert_close(run(made, TowerLayers(made), x)[0], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pack", [True, False])
def test_what_a_policy_arranges_inside_counts(pack):
    """Under inference mode, where no tensor counts what is written to it."""
    made, x, rows = tower(), pixels(), []
    first, _, third = made.encoder.layers
    with torch.inference_mode():
        for layers in (None, TowerLayers(made, pack)):
            with VisionRun(made) as around:
                around.after(first, lambda out: out.cos_())
                around.after(third.self_attn.k_proj, lambda out: 2 * out)
                if layers is not None:
                    arrange_attention(around, attention_configs([made]))
                    assert len(layers.arrange(around)) == 12
                rows.append(made(x).last_hidden_state)
    torch.testing.assert_close(*rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", TOWERS)
def test_a_block_has_eight_calls(make, monkeypatch):
    """Between two blocks there is no norm of its own, and no addition."""
    made, x = tower(make, hidden_act="quick_gelu"), pixels()
    layers, seen = TowerLayers(made, pack=False), []
    for name in ("layer_norm", "add_layer_norm", "quick_gelu_"):
        plain = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, n=name, f=plain: seen.append(n) or f(*args))
    assert run(made, layers, x)[1] == 18
    block = ["add_layer_norm", "quick_gelu_"]
    assert seen == ["layer_norm", *block, "add_layer_norm", *block, "add_layer_norm", *block]


def hooked(made):
    made.encoder.layers[1].self_attn.v_proj.register_forward_hook(lambda m, args, out: out * 0.5)


def another_part(made):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    old = made.encoder.layers[1].mlp.fc2
    new = made.encoder.layers[1].mlp.fc2 = Scaled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())


def own_forward(made):
    norm = made.encoder.layers[1].layer_norm2
    norm.forward = lambda x: x * 0.1


def without_bias(made):
    made.encoder.layers[1].mlp.fc1.bias = None


def tied(made):
    attention = made.encoder.layers[1].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    attention.q_proj.weight.data.mul_(2.0)


def dropping(made):
    attention = made.encoder.layers[1].self_attn.train()
    attention.dropout = 1.0


class Halves(torch.Tensor):
    """Holds half of what it stands for, as quantised weights hold something else."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            return cls(args[0].held)
        whole = [2 * a.held if isinstance(a, cls) else a for a in args]
        return op(*whole, **(kwargs or {}))


def quantised(made):
    fc1 = made.encoder.layers[1].mlp.fc1
    fc1.weight = torch.nn.Parameter(Halves(fc1.weight.detach().clone()), requires_grad=False)


def pruned(made):
    from torch.nn.utils import prune

    prune.random_unstructured(made.encoder.layers[1].mlp.fc1, "weight", 0.5)


def forward_of_another_block(made):
    made.encoder.layers[1].mlp.forward = made.encoder.layers[0].mlp.forward


def sparse(made):
    fc1 = made.encoder.layers[1].mlp.fc1
    fc1.weight = torch.nn.Parameter(2 * fc1.weight.detach().to_sparse_csr(), requires_grad=False)


def traced(made):
    block = made.encoder.layers[1]
    with torch.no_grad():
        block.mlp.fc1.weight.mul_(2)
    block.mlp = torch.jit.trace(block.mlp, torch.zeros(1, 37, 48))


def strided_norm(made):
    norm = made.encoder.layers[1].layer_norm2
    norm.weight = torch.nn.Parameter(torch.randn(48, 2)[:, 0])


def made_in_inference_mode(made):
    linear = made.encoder.layers[1].self_attn.v_proj
    with torch.inference_mode():
        linear.weight = torch.nn.Parameter(3 * linear.weight.detach(), requires_grad=False)


CHANGES = [made_in_inference_mode, hooked, another_part, own_forward, pruned, without_bias, tied, dropping, quantised]
CHANGES += [forward_of_another_block, sparse, traced, strided_norm]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Sparse CSR")
@pytest.mark.parametrize("early", [True, False], ids=["before", "between two runs"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pack", [True, False])
def test_a_changed_block_runs_as_it_is(pack, change, early):
    made, x = tower(), pixels()
    layers = TowerLayers(made, pack)
    if not early:
        run(made, layers, x)
    plain = copy.deepcopy(made)
    change(made)
    with torch.no_grad():
        want = made(x).last_hidden_state
        assert change is quantised or not torch.allclose(want, plain(x).last_hidden_state, atol=1e-2)
    got, linears = run(made, layers, x)
    assert linears == 12
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(made(x).last_hidden_state, want, atol=1e-4, rtol=1e-4)  # and so does what is left


@pytest.mark.parametrize("name, value", [("is_causal", True), ("scale", 3.0)])
def test_the_attention_says_how(name, value):
    made, x = tower(), pixels()
    layers = TowerLayers(made)
    before, _ = run(made, layers, x)
    setattr(made.encoder.layers[1].self_attn, name, value)
    with torch.no_grad():
        want = made(x).last_hidden_state
    assert not torch.allclose(want, before, atol=1e-2)
    torch.testing.assert_close(run(made, layers, x)[0], want, atol=1e-4, rtol=1e-4)


def test_a_hook_may_write_weights_first():
    made, x = tower(), pixels()
    made.encoder.layers[1].register_forward_pre_hook(lambda m, args: (m.mlp.fc1.weight.data.zero_(), None)[1])
    got, linears = run(made, TowerLayers(made), x)
    with torch.no_grad():
        torch.testing.assert_close(got, made(x).last_hidden_state, atol=1e-4, rtol=1e-4)
    assert linears == 12


def test_a_hook_on_a_block_runs():
    made, x, seen = tower(), pixels(), []
    made.encoder.layers[2].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    _, linears = run(made, TowerLayers(made), x)
    assert linears == 18 and seen == [(3, 37, 48)]


def test_attention_that_somebody_chose_stays():
    made = tower()
    made.config._attn_implementation = "eager"
    assert run(made, TowerLayers(made), pixels())[1] == 0


def test_padded_pictures_keep_their_mask():
    made = tower(idefics3)
    x, mask = pixels(2), torch.ones(2, 6, 6, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad():
        want = made(x, patch_attention_mask=mask).last_hidden_state
        with VisionRun(made) as around:
            arrange_attention(around, attention_configs([made]))
            assert len(TowerLayers(made).arrange(around)) == 18
            got = made(x, patch_attention_mask=mask).last_hidden_state
    assert not torch.allclose(want, made(x).last_hidden_state, atol=1e-2)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("layer", "unused"), [(-1, 0), (-2, 1), (-3, 2), (1, 1), (2, 0), ([-3, -2], 1), ([0, -1], 0), ([1, -3], 1)]
)
def test_blocks_that_nobody_reads_are_skipped(vision, layer, unused):
    """The picture's rows are transformers', and so many blocks of two are never run."""
    several = isinstance(layer, list)
    hf = tiny.model(vision=vision)
    hf.config.vision_feature_layer = layer
    if several:
        width = hf.model.multi_modal_projector.linear_1.in_features * len(layer)
        hf.model.multi_modal_projector.linear_1 = torch.nn.Linear(width, hf.config.text_config.hidden_size)
    blocks = [m for m in hf.model.vision_tower.modules() if type(m).__name__.endswith("EncoderLayer")]
    assert unused_blocks(hf) == blocks[2 - unused :]
    x, ran = torch.randn(2, 3, 28, 28), []
    want = hf.model.get_image_features(pixel_values=x).pooler_output
    with VisionRun(hf.model) as around:
        skip(around, unused_blocks(hf))
        for block in blocks[: 2 - unused]:
            around.after(block, lambda out: ran.append(1))
        got = hf.model.get_image_features(pixel_values=x).pooler_output
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    assert len(ran) == 2 - unused


def test_a_block_that_somebody_listens_to_runs():
    engine, _ = build(vision="clip", picture_cache=0)
    texts, images = tiny.prompts(seed=90, n=2, images=(1,))
    (unused,), seen = unused_blocks(engine.model.hf), []
    plain = engine.prepare(texts, images, chat=False)
    unused.mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(1))
    listened = engine.prepare(texts, images, chat=False)
    assert seen == [1]
    for a, b in zip(plain, listened):
        torch.testing.assert_close(a.inputs_embeds, b.inputs_embeds, atol=1e-5, rtol=1e-5)


def packed(vision="clip", **options):
    """An engine whose tower stops between its blocks, and the prompts of two questions with a picture."""
    engine, _ = build(vision=vision, pack_weights=True, **options)
    engine.model.pack()
    texts, images = tiny.prompts(seed=90, n=2, images=(1,))
    return engine, engine.model.tokenize(texts, images)


def blocks_run(monkeypatch):
    """How many blocks have been computed so far, as the length of a list."""
    ran, call = [], tower_layers._Layer.__call__
    monkeypatch.setattr(tower_layers._Layer, "__call__", lambda *a, **o: ran.append(len(a[1])) or call(*a, **o))
    return ran


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_blocks_that_run_ahead_give_the_same_rows(vision, monkeypatch):
    """Bit for bit what each picture becomes alone, and no block is computed twice."""
    engine, prompts = packed(vision)
    want = [engine.model.prepare([p])[0].inputs_embeds for p in prompts]
    ran = blocks_run(monkeypatch)
    ahead = engine.model.look_ahead(prompts)
    assert ran == []
    slices = 0
    while not ahead.blocks.done:
        assert ahead.blocks.advance(0) > 0 and ahead.blocks.advance(0, least=False) == 0
        slices += 1
    used = 2 - len(unused_blocks(engine.model.hf))
    assert ran == [1] * slices == [1] * (2 * used)
    got = engine.model.prepare(prompts, None, ahead)
    assert len(ran) == slices
    for rows, alone in zip(got, want):
        torch.testing.assert_close(rows.inputs_embeds, alone, atol=0, rtol=0)


def test_blocks_that_nobody_reads_are_skipped_where_the_others_are_computed_here(monkeypatch):
    engine, prompts = packed()
    ran = blocks_run(monkeypatch)
    engine.model.prepare(prompts)
    assert len(unused_blocks(engine.model.hf)) == 1 and ran == [2]


def test_a_block_costs_its_share_of_a_layer():
    engine, prompts = packed()
    blocks = engine.model.look_ahead(prompts[:1]).blocks
    vision, text = engine.model.hf.config.vision_config, engine.model.hf.config.text_config
    head = text.head_dim
    layer = text.hidden_size * (
        2 * head * (text.num_attention_heads + text.num_key_value_heads) + 3 * text.intermediate_size
    )
    rows = (vision.image_size // vision.patch_size) ** 2 + 1
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    assert blocks.advance(0) == pytest.approx(rows * block / layer)


def test_what_ran_ahead_of_others_is_not_used():
    """Nor where the tower was changed in between: its blocks are called as they are then."""
    engine, prompts = packed(picture_cache=0)
    want = engine.model.prepare(prompts)
    ahead = engine.model.look_ahead(prompts[:1])
    ahead.blocks.advance()
    for got, right in zip(engine.model.prepare(prompts, None, ahead), want):
        torch.testing.assert_close(got.inputs_embeds, right.inputs_embeds, atol=0, rtol=0)
    block = next(m for m in engine.model.hf.modules() if type(m).__name__.endswith("EncoderLayer"))
    block.mlp.fc1.register_forward_hook(lambda m, args, out: 2 * out)
    changed = engine.model.prepare(prompts[:1])
    (got,) = engine.model.prepare(prompts[:1], None, ahead)
    torch.testing.assert_close(got.inputs_embeds, changed[0].inputs_embeds, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got.inputs_embeds, want[0].inputs_embeds, atol=1e-3)


def test_a_tower_that_somebody_listens_to_is_not_cut():
    """Its modules before the blocks would be called twice."""
    engine, prompts = packed(picture_cache=0)
    seen = []
    engine.model.hf.model.vision_tower.register_forward_hook(lambda m, args, out: seen.append(1))
    assert engine.model.look_ahead(prompts) is None and seen == []
    assert engine.model.look_ahead(engine.model.tokenize(["w1"], [[]])) is None


def test_a_tower_that_cannot_be_cut_does_not_run_in_vain(monkeypatch):
    """Its blocks are not computed here: it would come to its end, and all of it be computed again."""
    engine, prompts = packed(picture_cache=0)
    engine.model.hf.model.vision_tower.config._attn_implementation = "eager"
    monkeypatch.setattr(VisionRun, "to_entry", lambda *args: pytest.fail("it runs"))
    assert engine.model.look_ahead(prompts) is None


@pytest.mark.parametrize("part", ["layer_norm2", "self_attn.q_proj", "mlp.fc1"])
def test_what_blocks_made_with_other_weights_is_not_used(part):
    """Which have changed while a picture was in the tower: all of it is as the weights are at its end."""
    engine, prompts = packed(picture_cache=0)
    before = engine.model.prepare(prompts)
    ahead = engine.model.look_ahead(prompts)
    ahead.blocks.advance(0)
    block = next(m for m in engine.model.hf.modules() if type(m).__name__.endswith("EncoderLayer"))
    with torch.no_grad():
        block.get_submodule(part).weight.mul_(2)
    ahead.blocks.advance()
    got, want = engine.model.prepare(prompts, None, ahead), engine.model.prepare(prompts)
    for rows, right, old in zip(got, want, before):
        torch.testing.assert_close(rows.inputs_embeds, right.inputs_embeds, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(rows.inputs_embeds, old.inputs_embeds, atol=1e-3)


def norm_through_data(block):
    block.layer_norm1.weight.data.mul_(2)


def eps(block):
    block.layer_norm2.eps = 3.0


def scale(block):
    block.self_attn.scale = 2.0


def order(block):
    block.self_attn.is_causal = True


@pytest.mark.parametrize("change", [norm_through_data, eps, scale, order])
def test_a_picture_is_not_seen_by_half_a_tower_of_before_and_half_of_now(change):
    engine, prompts = packed(picture_cache=0)
    ahead = engine.model.look_ahead(prompts)
    while not ahead.blocks.done:  # each block of the first picture before, of the second one after
        ahead.blocks.advance(0)
        if len(ahead.blocks._became[-1]) == 1:
            change(next(m for m in engine.model.hf.modules() if type(m).__name__.endswith("EncoderLayer")))
            ahead.blocks.advance()
    got, want = engine.model.prepare(prompts, None, ahead), engine.model.prepare(prompts)
    for rows, right in zip(got, want):
        torch.testing.assert_close(rows.inputs_embeds, right.inputs_embeds, atol=1e-5, rtol=1e-5)


def test_a_block_that_cannot_go_on_leaves_it_to_transformers():
    """To its code the norm is as good in any layout; where a weight has a dtype of its own, it says so."""
    engine, prompts = packed(picture_cache=0)
    block = next(m for m in engine.model.hf.modules() if type(m).__name__.endswith("EncoderLayer"))
    ahead = engine.model.look_ahead(prompts)
    block.layer_norm1.weight = torch.nn.Parameter(torch.randn(32, 2)[:, 0])
    ahead.blocks.advance()
    assert ahead.blocks.done
    got, want = engine.model.prepare(prompts, None, ahead), engine.model.prepare(prompts)
    assert torch.equal(got[0].inputs_embeds, want[0].inputs_embeds)
    ahead = engine.model.look_ahead(prompts)
    assert ahead is None, "a block is transformers'"
    block.layer_norm1.half()
    with pytest.raises(ModelError, match="before its decoder"):
        engine.model.prepare(prompts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tower_in_another_dtype(dtype):
    made, x = tower(), pixels(dtype=dtype)
    layers = TowerLayers(made)
    run(made, layers, pixels())
    made.to(dtype)
    with torch.no_grad():
        want = made(x).last_hidden_state
    torch.testing.assert_close(run(made, layers, x)[0], want, atol=5e-2, rtol=5e-2)


def another_layer(hf, blocks):
    hf.config.vision_feature_layer = -1


def another_order(hf, blocks):
    blocks[0], blocks[1] = blocks[1], blocks[0]


def one_more(hf, blocks):
    blocks.append(copy.deepcopy(blocks[0]))
    hf.model.vision_tower.config.num_hidden_layers += 1


def twice(hf, blocks):
    blocks[0] = blocks[1]


@pytest.mark.parametrize("change", [another_layer, another_order, one_more, twice])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_which_blocks_are_read_may_change(vision, change):
    engine, prompts = packed(vision, picture_cache=0)
    hf = engine.model.hf
    before = engine.model.prepare(prompts)
    change(hf, next(m for m in hf.model.vision_tower.modules() if isinstance(m, torch.nn.ModuleList)))
    texts, images = tiny.prompts(seed=90, n=2, images=(1,))
    for text, pictures, rows, old in zip(texts, images, engine.model.prepare(prompts), before):
        want, _, _ = tiny.embed(hf, engine.model.processor, text, pictures)
        torch.testing.assert_close(rows.inputs_embeds, want, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(want, old.inputs_embeds, atol=1e-3)


def test_weights_in_another_layout_are_looked_at_where_they_are():
    made, x = tower(), pixels()
    layers, linear = TowerLayers(made), made.encoder.layers[1].self_attn.v_proj
    linear.weight = torch.nn.Parameter(torch.randn(48, 48).t())
    run(made, layers, x)
    linear.weight.data.mul_(3)
    with torch.no_grad():
        want = made(x).last_hidden_state
    torch.testing.assert_close(run(made, layers, x)[0], want, atol=1e-4, rtol=1e-4)


def test_what_has_not_changed_is_looked_at_as_a_whole(monkeypatch):
    made, x = tower(), pixels()
    layers = TowerLayers(made)
    first, _ = run(made, layers, x)
    monkeypatch.setattr(tower_layers._Layer, "settle", lambda *args: pytest.fail("part by part"))
    again, linears = run(made, layers, x)
    assert linears == 18 and torch.equal(again, first)


@pytest.mark.parametrize("pack", [True, False])
def test_a_tower_all_of_whose_blocks_have_their_own_forwards(pack):
    made, x = tower(), pixels()
    layers = TowerLayers(made, pack)
    run(made, layers, x)
    for block in made.encoder.layers:
        block.forward = lambda hidden, *args, **options: hidden / 2
    with torch.no_grad():
        want = made(x).last_hidden_state
    rows, linears = run(made, layers, x)
    assert linears == 0
    torch.testing.assert_close(rows, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_so_it_is_where_blocks_are_skipped(vision, monkeypatch):
    engine, prompts = packed(vision, picture_cache=0)
    for _ in range(2):  # in the first run transformers installs hooks
        want = engine.model.prepare(prompts)
    monkeypatch.setattr(tower_layers._Layer, "settle", lambda *args: pytest.fail("part by part"))
    for rows, right in zip(engine.model.prepare(prompts), want):
        assert torch.equal(rows.inputs_embeds, right.inputs_embeds)


def test_what_is_written_while_a_block_runs_as_it_is_counts():
    made, x = tower(), pixels()
    layers, block = TowerLayers(made), made.encoder.layers[1]
    run(made, layers, x)
    handle = block.mlp.register_forward_hook(lambda m, args, out: out + 0)
    through_data(block.self_attn.v_proj)
    assert run(made, layers, x)[1] == 12
    handle.remove()
    with torch.no_grad():
        want = made(x).last_hidden_state
    rows, linears = run(made, layers, x)
    assert linears == 18
    torch.testing.assert_close(rows, want, atol=1e-4, rtol=1e-4)


def exchanged(block):
    attention = block.self_attn
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


def renamed(block):
    """The same modules in the same order under each other's names."""
    attention = block.self_attn
    parts = dict(attention._modules)
    parts["k_proj"], parts["v_proj"] = parts["v_proj"], parts["k_proj"]
    order = [name for wanted in attention._modules.values() for name, part in parts.items() if part is wanted]
    attention._modules.clear()
    attention._modules.update((name, parts[name]) for name in order)


def another_class(block):
    class Halved(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    block.mlp.fc2.__class__ = Halved


def exchanged_weights(block):
    fc1, out = block.mlp.fc1, block.self_attn
    fc1.bias.data = fc1.bias.data.flip(0).clone()
    out.q_proj.weight, out.k_proj.weight = out.k_proj.weight, out.q_proj.weight


def cut(block):
    """A neuron less of each kind, as structured pruning does: the weights stay where they are."""
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    fc1.weight.data, fc1.bias.data, fc2.weight.data = (
        fc1.weight.data[:-16],
        fc1.bias.data[:-16],
        fc2.weight.data[:, :-16],
    )


def turned(block):
    weight = block.self_attn.v_proj.weight
    weight.data = weight.data.t()


def another_formula(block):
    block.mlp.activation_fn.act = torch.relu


CHANGES = [exchanged, renamed, another_class, exchanged_weights, cut, turned, another_formula]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pack", [True, False])
def test_what_changes_between_two_runs_counts(pack, change):
    made, x = tower(hidden_act="gelu"), pixels()
    layers = TowerLayers(made, pack)
    before, _ = run(made, layers, x)
    with torch.no_grad():
        change(made.encoder.layers[1])
        want = made(x).last_hidden_state
    assert not torch.allclose(before, want, atol=1e-3)
    for _ in range(2):
        torch.testing.assert_close(run(made, layers, x)[0], want, atol=1e-4, rtol=1e-4)
