"""Packed weights on a CPU change the time of a product and nothing else."""

import functools

import pytest
import torch

from dyvte_engine import DeviceError, Engine, EngineConfig, FixedExit, InvalidArgumentError, ToMe
from dyvte_engine.models import linear
from dyvte_engine.models.linear import Linear, PackedLinears, packing_fault
from dyvte_engine.models.vision_run import VisionRun
from tests import tiny
from tests.engine.conftest import build, logits_errors
from tests.engine.test_keep_all import FAMILIES

CPU = torch.device("cpu")
DTYPES = [pytest.param(d, marks=pytest.mark.skipif(bool(packing_fault(d)), reason=str(packing_fault(d)))) for d in
          (torch.float32, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("panels", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 5, 16, 17, 48, 49, 300])
@pytest.mark.parametrize(("k", "n"), [(48, 96), (1024, 40), (7, 3)])
def test_products(k, n, rows, dtype, panels, monkeypatch):
    """The error against float64 is at most twice that of torch's own product, with every layout and for every size."""
    monkeypatch.setattr(linear.ops, "multiplies_panels", lambda _: panels)
    x, weight, bias = (t.to(dtype) for t in (torch.randn(rows, k), torch.randn(n, k), torch.randn(n)))
    packed, plain = Linear(weight, bias), Linear(weight, bias)
    packed.pack()
    want = x.double() @ weight.double().T + bias.double()
    theirs = (torch.nn.functional.linear(x, weight, bias).double() - want).norm()
    assert (packed.panels is None) != panels
    for got in (packed(x), plain(x), packed(x[None])[0], packed(x.t().contiguous().t())):
        assert got.shape == (rows, n) and got.dtype == dtype
        assert (got.double() - want).norm() <= 2 * theirs + 1e-6 * want.norm()
    space = torch.full((rows + 2, n), torch.nan, dtype=dtype)
    free, given = Linear(weight)(x), Linear(weight)(x, space)
    torch.testing.assert_close(given, free, rtol=1e-2, atol=1e-3)
    assert space[rows:].isnan().all()


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_long_float32_products_are_left_to_mkl_on_intel_only(maker, monkeypatch):
    monkeypatch.setattr(linear.ops, "intel", lambda: maker == "GenuineIntel")
    monkeypatch.setattr(linear.ops, "multiplies_panels", lambda _: False)
    monkeypatch.setattr(linear.ops, "few_rows", lambda *_: 0)
    calls, product = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(a) or product(*a))
    layer = Linear(torch.randn(24, 48))
    layer.pack()
    for rows in (48, 49):
        layer(torch.randn(rows, 48))
    assert len(calls) == (1 if maker == "GenuineIntel" else 2)


def test_modules_are_packed_only_in_a_run():
    module = torch.nn.Linear(32, 16)
    packed, x = PackedLinears([module]), torch.randn(4, 9, 32)
    for _ in range(2):  # and again with what the weight is by then
        with VisionRun(module) as run:
            packed.arrange(run)
            assert "forward" in module.__dict__
            torch.testing.assert_close(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
        assert "forward" not in module.__dict__
        with torch.no_grad():
            module.weight.add_(1.0)


def through_data(module):
    module.weight.data.mul_(2)


def another_bias(module):
    module.bias = torch.nn.Parameter(module.bias + 1)


def same_address(module):
    """Other numbers where the weight was, whose version they have."""
    at = module.weight.data
    module.weight.data = torch.zeros_like(at)
    module.weight.data = at.mul_(2)


def turned(module):
    module.weight.data = module.weight.data.t()


def for_the_class(module):
    own = torch.nn.Linear.forward

    @functools.wraps(own)
    def forward(self, x):
        return 2 * own(self, x)

    torch.nn.Linear.forward = forward


def sparse(module):
    module.weight = torch.nn.Parameter(2 * module.weight.detach().to_sparse_csr(), requires_grad=False)


def strided_bias(module):
    module.bias = torch.nn.Parameter(torch.randn(32, 2)[:, 0])


CHANGES = [through_data, another_bias, same_address, turned, for_the_class, sparse, strided_bias]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_what_no_version_counts_is_noticed(change, contiguous, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", torch.nn.Linear.forward)
    module = torch.nn.Linear(32, 32)
    if not contiguous:
        module.weight = torch.nn.Parameter(torch.randn(32, 32).t())
    packed, x = PackedLinears([module]), torch.randn(4, 90, 32)
    for changed in (False, True):
        if changed:
            change(module)
        want = module(x)
        with VisionRun(module) as run, torch.no_grad():
            packed.arrange(run)
            torch.testing.assert_close(module(x), want)


def test_a_hook_may_write_the_weight_first():
    module = torch.nn.Linear(32, 24)
    module.register_forward_pre_hook(lambda m, args: (m.weight.data.fill_(0.1), None)[1])
    packed, x = PackedLinears([module]), torch.randn(4, 90, 32)
    with VisionRun(module) as run, torch.no_grad():
        packed.arrange(run)
        torch.testing.assert_close(module(x), torch.nn.functional.linear(x, torch.full((24, 32), 0.1), module.bias))


def test_a_dtype_that_cannot_be_packed_stays_torchs():
    module = torch.nn.Linear(32, 24).half()
    with VisionRun(module) as run:
        PackedLinears([module]).arrange(run)
        assert "forward" not in module.__dict__


@pytest.mark.parametrize(("decoder", "vision"), FAMILIES)
def test_greedy_tokens_equal_generate(decoder, vision):
    engine, hf = build(decoder, vision, pack_weights=True)
    assert engine.model.packed_vision is not None
    texts, images = tiny.prompts(seed=300 + FAMILIES.index((decoder, vision)), n=24)
    want = [tiny.hf_greedy(hf, engine.model.processor, t, i, 8) for t, i in zip(texts, images)]
    assert [r.token_ids for r in engine.generate(texts, images, chat=False, max_new_tokens=8)] == want


@pytest.mark.parametrize("policy", [FixedExit(1), ToMe(0.5)])
def test_policies_run_with_packed_weights(policy):
    plain, packed = (build(policy=policy, pack_weights=pack)[0] for pack in (False, True))
    texts, images = tiny.prompts(seed=310, n=12)
    answers = [e.generate(texts, images, chat=False, max_new_tokens=6) for e in (plain, packed)]
    assert [r.token_ids for r in answers[0]] == [r.token_ids for r in answers[1]]


def test_logits_error_is_at_most_twice_torchs():
    engine, low = build(dtype=torch.bfloat16, pack_weights=True)
    exact = tiny.model().to(torch.bfloat16).double()
    texts, images = tiny.prompts(seed=311, n=6)
    ours, theirs = logits_errors(engine, low, exact, texts, images)
    assert ours <= 2 * theirs


def test_the_option(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "tiny")
    given = {"dtype": "float32", "device": "cpu", "max_len": 64}
    assert Engine.from_pretrained(folder, **given).config.pack_weights
    assert not Engine.from_pretrained(folder, pack_weights=False, **given).config.pack_weights
    weights = sum(p.nbytes for p in tiny.model().parameters())
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 4 * weights - 1}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert not Engine.from_pretrained(folder, **given).config.pack_weights, "more than a quarter of the memory"
    with pytest.raises(InvalidArgumentError, match="pack_weights is 'yes'; accepted: True, False, 'auto'"):
        Engine.from_pretrained(folder, pack_weights="yes", **given)
    with pytest.raises(InvalidArgumentError, match="pack_weights is True on cuda; accepted: False"):
        EngineConfig(torch.device("cuda"), torch.float32, pack_weights=True)
    with pytest.raises(DeviceError, match=r"pack_weights does not work here with torch.float16: not used"):
        build(dtype=torch.float16, pack_weights=True)
