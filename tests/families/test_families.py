"""Every family against transformers' own model: the same rules for all, one random tiny model each."""

import pytest
import torch

from dyvte_engine import Engine, EngineConfig, FixedExit, KeepAll
from dyvte_engine.models import FAMILIES, VisionLanguageModel
from tests.families import oracle, zoo

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
_built: dict[str, tuple[Engine, torch.nn.Module]] = {}


@pytest.fixture
def pair(family):
    """An engine, and a second, untouched copy of its model as the oracle."""
    if family not in _built:
        _built.clear()  # tests of one family follow each other
        config = EngineConfig(torch.device("cpu"), torch.float32, max_len=384)
        loaded = VisionLanguageModel(zoo.model(family), zoo.processor(family), family, config.max_len)
        _built[family] = Engine(loaded, config), zoo.model(family)
    engine, hf = _built[family]
    engine.policy = KeepAll()
    yield engine, hf
    assert engine.pool.bytes_held == 0


def test_the_table_holds_every_family():
    assert list(zoo.FAMILIES) == list(FAMILIES)


@each_family
def test_keep_all_is_generate(family, pair):
    """50 prompts with 0 to 3 pictures: in batches of 8 and alone."""
    engine, hf = pair
    texts, images = zoo.prompts(family, seed=1, n=50)
    want = [oracle.generate(hf, zoo.encode(family, t, i), 6) for t, i in zip(texts, images)]
    assert [r.token_ids for r in engine.generate(texts, images, chat=False, max_new_tokens=6)] == want
    alone = [engine.generate(t, i, chat=False, max_new_tokens=6).token_ids for t, i in zip(texts[:12], images[:12])]
    assert alone == want[:12]
    assert len({tuple(w) for w in want}) > 25, "the oracle's answers do not depend on the prompt"


@each_family
@pytest.mark.parametrize("layer", range(zoo.LAYERS))
def test_exit_is_masking(family, pair, layer):
    engine, hf = pair
    engine.policy = FixedExit(layer)
    texts, images = zoo.prompts(family, seed=10 + layer, n=6, images=(0, 1, 2, 3))
    got = engine.generate(texts, images, chat=False, max_new_tokens=5)
    for words, pictures, result in zip(texts, images, got):
        entry = oracle.enter(hf, zoo.encode(family, words, pictures))
        assert result.token_ids == oracle.masked_greedy(hf, entry, layer, 5)
        assert result.stats.exit_layer == (layer if layer < zoo.LAYERS - 1 and pictures else None)
        assert result.stats.visual_tokens == int(entry.visual.sum())
