"""Every family against transformers' own model: the same rules for all, one random tiny model each.

A test marked with a feature fills that column of docs/families.md (`python -m tests.families.table`).
"""

import pytest
import torch

from dyvte_engine import (
    DivPrune,
    Downsample,
    DynamicExit,
    Engine,
    EngineConfig,
    ExitHeadConfig,
    ExitHeads,
    FastV,
    FixedExit,
    InvalidArgumentError,
    KeepAll,
    ModelError,
    Random,
    ToMe,
    VisionZip,
    compose,
)
from dyvte_engine.models import FAMILIES, VisionLanguageModel
from dyvte_engine.models.rows import runs
from dyvte_engine.policies import PyramidDrop
from tests.families import oracle, zoo
from tests.policies.reference import divprune_rows, random_rows

SAME_ROWS = ("llava", "vipllava", "deepseek_vl")
BROKEN = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
_built: dict[str, tuple[Engine, torch.nn.Module]] = {}


@pytest.fixture
def pair(family):
    """An engine, and a second, untouched copy of its model as the oracle."""
    if family not in _built:
        config = EngineConfig(torch.device("cpu"), torch.float32, max_len=384)
        loaded = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, config.max_len)
        _built[family] = Engine(loaded, config), zoo.model(family)
    engine, hf = _built[family]
    engine.policy = KeepAll()
    yield engine, hf
    assert engine.pool.bytes_held == 0


def test_the_table_holds_every_family():
    assert list(zoo.FAMILIES) == list(FAMILIES)


@pytest.mark.feature("all tokens = generate, batch = alone")
@each_family
def test_keep_all_is_generate(family, pair):
    """20 prompts with 0 to 3 pictures: in batches of 8 and alone."""
    engine, hf = pair
    texts, images = zoo.prompts(family, seed=1, n=20)
    want = [oracle.generate(hf, zoo.encode(family, t, i), 6) for t, i in zip(texts, images)]
    assert [r.token_ids for r in engine.generate(texts, images, chat=False, max_new_tokens=6)] == want
    alone = [engine.generate(t, i, chat=False, max_new_tokens=6).token_ids for t, i in zip(texts, images)]
    assert alone == want
    assert len({tuple(w) for w in want}) > 10, "the oracle's answers do not depend on the prompt"


@pytest.mark.feature("exit at each layer")
@each_family
@pytest.mark.parametrize("layer", range(zoo.LAYERS))
def test_exit_is_masking(family, pair, layer):
    """16 prompts with 0 to 3 pictures, in batches of 8."""
    engine, hf = pair
    engine.policy = FixedExit(layer)
    texts, images = zoo.prompts(family, seed=20 + layer, n=16)
    got = engine.generate(texts, images, chat=False, max_new_tokens=5)
    assert {len(pictures) for pictures in images} == {0, 1, 2, 3}
    for words, pictures, result in zip(texts, images, got):
        entry = oracle.enter(hf, zoo.encode(family, words, pictures))
        assert (len(entry.deepstack) == 2) == (family == "qwen3_vl" and len(pictures) > 0)
        oracle.assert_greedy(hf, entry, result.token_ids, oracle.fixed(layer), 5)
        assert result.stats.exit_layer == (layer if layer < zoo.LAYERS - 1 and pictures else None)
        assert result.stats.visual_tokens == int(entry.visual.sum())


def random_heads() -> ExitHeads:
    heads = ExitHeads(ExitHeadConfig(64, zoo.LAYERS, 32), seed=6)
    heads.w2.data *= 8  # opinions, not coin tosses around 0.5
    return heads.requires_grad_(False)


HEADS = random_heads()
INSIDE = {
    "DynamicExit": (DynamicExit(HEADS, threshold=0.7), oracle.heads(HEADS, 0.7)),
    "FastV": (FastV(2, 0.5), oracle.fastv(2, 0.5)),
    "PyramidDrop": (PyramidDrop((0.6, 0.4, 0.2)), oracle.pyramid((0.6, 0.4, 0.2))),
    "FastV + exit": (compose(FastV(1, 0.5), FixedExit(2)), oracle.both(oracle.fastv(1, 0.5), oracle.fixed(2))),
}


@each_family
@pytest.mark.parametrize("policy", [pytest.param(p, marks=pytest.mark.feature(p)) for p in INSIDE])
def test_policies_between_layers(family, pair, policy):
    engine, hf = pair
    engine.policy, rule = INSIDE[policy]
    texts, images = zoo.prompts(family, seed=30, n=6, images=(0, 1, 2))
    got = engine.generate(texts, images, chat=False, max_new_tokens=4)
    left = 0
    for words, pictures, result in zip(texts, images, got):
        entry = oracle.enter(hf, zoo.encode(family, words, pictures))
        tokens, gone = oracle.greedy(hf, entry, rule if pictures else lambda at: None, 4)
        assert result.stats.tokens_per_layer == [len(g) - int(g.sum()) for g in gone]
        assert result.token_ids == tokens
        left += int(gone[-1].sum())
    assert left > 0, "no token left: this seed tests nothing"


BEFORE = {
    "Random": (Random(0, 0.5, seed=3), lambda features: random_rows(len(features), 0.5, 3)),
    "DivPrune": (DivPrune(0.4), lambda features: divprune_rows(features, 0.4) or [0]),
}


@pytest.mark.feature("Random, DivPrune before layer 0")
@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in BROKEN])
@pytest.mark.parametrize("policy", BEFORE)
def test_policies_before_layer_0(family, pair, policy):
    engine, hf = pair
    engine.policy, select = BEFORE[policy]
    texts, images = zoo.prompts(family, seed=50, n=5, images=(0, 1, 2))
    got = engine.generate(texts, images, chat=False, max_new_tokens=4)
    for words, pictures, result in zip(texts, images, got):
        entry = oracle.enter(hf, zoo.encode(family, words, pictures))
        sizes = [zoo.ROWS] * len(pictures) if family in SAME_ROWS else runs(entry.visual)
        short = oracle.spliced(entry, sizes, select)
        assert result.token_ids == oracle.greedy(hf, short, lambda at: None, 4)[0]
        assert result.stats.tokens_per_layer == [len(short.embeds)] * zoo.LAYERS


@pytest.mark.feature("Random, DivPrune before layer 0", refused=True)
@pytest.mark.parametrize("family", BROKEN)
@pytest.mark.parametrize("policy", [Random(0, 0.5), DivPrune(0.5), Downsample(2), compose(FixedExit(1), DivPrune())])
def test_policies_before_layer_0_refused(family, pair, policy):
    with pytest.raises(ModelError, match=f"a {family} model's pictures have no plain row order"):
        pair[0].policy = policy
    pair[0].policy = Random(1, 0.5)


@pytest.mark.feature("ToMe, VisionZip in the tower")
@pytest.mark.parametrize("family", ["llava"])
@pytest.mark.parametrize("policy", [ToMe(0.5), VisionZip(5, 2)])
def test_policies_in_the_tower(family, pair, policy):
    """That they do what they should is tested with the policies."""
    engine, _ = pair
    texts, images = zoo.prompts(family, seed=60, n=4, images=(1, 2))
    full = engine.generate(texts, images, chat=False, max_new_tokens=1)
    engine.policy = policy
    short = engine.generate(texts, images, chat=False, max_new_tokens=1)
    assert all(s.stats.tokens_per_layer[0] < f.stats.tokens_per_layer[0] for s, f in zip(short, full))


@pytest.mark.feature("ToMe, VisionZip in the tower", refused=True)
@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f != "llava"])
@pytest.mark.parametrize("policy", [ToMe(0.5), VisionZip(5, 2)])
def test_policies_in_the_tower_refused(family, pair, policy):
    with pytest.raises(ModelError, match=f"cannot act in the vision tower of a {family} model"):
        pair[0].policy = policy


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_renumbering_needs_one_axis(family, pair):
    with pytest.raises(ModelError, match="positions of 3 axes"):
        pair[0].policy = PyramidDrop(renumber=True)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_lower_entry_takes_positions_of_three_axes(family, pair):
    engine, hf = pair
    texts, images = zoo.prompts(family, seed=65, n=3, images=(1, 2))
    for words, pictures in zip(texts, images):
        entry = oracle.enter(hf, zoo.encode(family, words, pictures))
        with engine.prefill(entry.embeds, entry.visual, entry.positions) as running:
            want, _ = oracle.run(hf, entry, [], lambda at: None)
            torch.testing.assert_close(running.logits, want, rtol=1e-4, atol=1e-4)
            assert running.positions.tolist() == [entry.next_position]
            want, _ = oracle.run(hf, entry, [7], lambda at: None)
            torch.testing.assert_close(running.step([7])[0], want[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidArgumentError, match=r"accepted: integer \[\d+\] or \[3, \d+\]"):
        engine.prefill(entry.embeds, entry.visual, entry.positions[:2])
