"""What is arranged around a tower acts for one thread and the time of a run, and follows what the tower is by then."""

import copy
import functools
import pickle
import threading

import pytest
import torch

from dyvte_engine import ModelError
from dyvte_engine.models.guard import addresses
from dyvte_engine.models.tower_attention import arrange_attention
from dyvte_engine.models.tower_graphs import TowerGraphs
from dyvte_engine.models.vision_run import VisionRun
from tests import tiny
from tests.engine.conftest import build
from tests.engine.test_graphs import Captures


def elsewhere(function):
    """The result of a call in another thread."""
    out = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join(10)
    return out[0]


def test_other_threads_pass_through():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.randn(3, 4)
    want = model(x)
    with VisionRun(model) as run:
        run.before(model[0], lambda args, kwargs: ((args[0] + 1,), kwargs))
        run.after(model[0], lambda out: 2 * out)
        run.replace(model[1], lambda out: out - 3)
        torch.testing.assert_close(model(x), 2 * model[0].__class__.forward(model[0], x + 1) - 3)
        torch.testing.assert_close(elsewhere(lambda: model(x)), want)
    torch.testing.assert_close(model(x), want)
    assert not any(vars(m).get("forward") or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_of_the_users_comes_back_after_an_error():
    model = torch.nn.Linear(2, 2)
    mine = model.forward = functools.partial(torch.nn.functional.linear, weight=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="stop"), VisionRun(model) as run:
        run.replace(model, torch.neg)
        assert torch.equal(model(torch.ones(1, 2)), -torch.ones(1, 2))
        raise ValueError("stop")
    assert model.forward is mine


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_made_meanwhile_is_the_models_own(make):
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.randn(3, 4)
    want = model(x)
    with VisionRun(model) as run:
        run.replace(model[0], torch.neg)
        copied = elsewhere(lambda: make(model))
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(copied(x), want)


def test_a_copy_that_is_made_meanwhile_has_no_hooks_that_act():
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    with VisionRun(model) as run:
        run.after(model, lambda out: 2 * out)
        copied = elsewhere(lambda: copy.deepcopy(model))
    torch.testing.assert_close(copied(x), model(x))


@pytest.mark.parametrize("before", [False, True])
def test_what_another_thread_arranges_meanwhile_stays(before):
    """Also where it is around what a run arranged, which acts no longer then."""
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    if before:
        model.forward = functools.partial(torch.nn.functional.linear, weight=torch.eye(4))
    want = 2 * model(x)

    def double():
        around = model.forward
        model.forward = lambda x: 2 * around(x)

    with VisionRun(model) as run:
        run.replace(model, torch.neg)
        thread = threading.Thread(target=double)
        thread.start()
        thread.join(10)
    torch.testing.assert_close(model(x), want)


def test_an_attention_that_is_chosen_meanwhile_stays():
    config = tiny.model().model.vision_tower.config
    config._attn_implementation = "sdpa"
    with VisionRun(torch.nn.Identity()) as run:
        arrange_attention(run, [config])
        config._attn_implementation = "eager"
    assert config._attn_implementation == "eager"


def test_runs_of_one_model_take_turns():
    model, order = torch.nn.Identity(), []

    def other():
        with VisionRun(model) as run:
            run.replace(model, lambda x: x + 2)
            order.append(model(0))

    thread = threading.Thread(target=other)
    with VisionRun(model) as run:
        run.replace(model, lambda x: x + 1)
        thread.start()
        thread.join(0.1)
        order.append(model(0))
    thread.join(10)
    assert order == [1, 2] and "forward" not in vars(model)


def test_the_stop_at_the_decoder_is_for_the_run_alone():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = torch.nn.Identity()

        def forward(self, x, use_cache):
            return self.decoder(input=x)

    model = Model()
    with VisionRun(model) as run, pytest.raises(ModelError, match="never reached its Linear"):
        run.to_entry(torch.nn.Linear(1, 1), {"x": 5})
    with VisionRun(model) as run:
        assert run.to_entry(model.decoder, {"x": 5}) == {"input": 5}
        assert elsewhere(lambda: model(5, False)) == 5
    assert model(5, False) == 5


def test_graphs_follow_the_tower():
    """Hooks act, although a graph was there; weights that were exchanged do too."""
    engine, _ = build()
    plain, _ = build()
    tower = engine.model.hf.model.vision_tower
    graphs = engine.model.tower_graphs = TowerGraphs(tower, Captures())
    texts, images = tiny.prompts(seed=95, n=2, images=(1,))
    inputs = engine.model.tokenize(texts, images)

    def equal():
        got, want = (e.model.prepare(inputs)[0].inputs_embeds for e in (engine, plain))
        torch.testing.assert_close(got, want)
        return got

    first = equal()
    equal()
    assert len(graphs._replays) == 1
    towers = tower, plain.model.hf.model.vision_tower
    block = next(name for name, m in tower.named_modules() if name.endswith("layers.0"))
    handles = [t.get_submodule(block).register_forward_pre_hook(lambda m, a: (2 * a[0], *a[1:])) for t in towers]
    assert addresses(tower) is None
    assert not torch.allclose(equal(), first)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(equal(), first)
    for t in towers:
        weight = next(p for n, p in t.named_parameters() if n.endswith("layers.0.mlp.fc1.weight"))
        weight.data = -weight.data
    assert not torch.allclose(equal(), first)
    equal()
    assert len(graphs._replays) == 1


def test_graphs_skip_the_blocks_that_nobody_read_then(monkeypatch):
    """Releases of transformers before 5.24 ask the tower for all hidden states, whichever of them is read."""
    engine, plain = (build(picture_cache=0)[0] for _ in range(2))
    tower = engine.model.hf.model.vision_tower
    engine.model.tower_graphs, own = TowerGraphs(tower, Captures()), TowerGraphs._forward

    def ask(self, plain, inside, pixel_values, **options):
        return own(self, plain, inside, pixel_values, **options | {"output_hidden_states": True})

    monkeypatch.setattr(TowerGraphs, "_forward", ask)
    texts, images = tiny.prompts(seed=97, n=1, images=(1,))
    inputs, rows = engine.model.tokenize(texts, images), []
    for layer in (-2, -1):
        for e in (engine, plain):
            e.model.hf.config.vision_feature_layer = layer
        for _ in range(2):
            got, want = (e.model.prepare(inputs)[0].inputs_embeds for e in (engine, plain))
            torch.testing.assert_close(got, want)
        rows.append(got)
    assert not torch.allclose(*rows, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.zeros(1, 17, 32))])
def test_a_part_that_is_torchscript_runs(make):
    """In the block whose rows nobody reads, which is looked at before each run, and in the one before it."""
    engine, plain = (build(picture_cache=0)[0] for _ in range(2))
    for name, mlp in engine.model.hf.model.vision_tower.named_modules():
        if name.endswith(".mlp"):
            mlp.fc1 = make(mlp.fc1)
    texts, images = tiny.prompts(seed=96, n=2, images=(1,))
    got, want = (e.model.prepare(e.model.tokenize(texts, images)) for e in (engine, plain))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.inputs_embeds, b.inputs_embeds)
