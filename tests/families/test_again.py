"""Further questions about the same pictures, of every family: exits and tokens as of an engine that knows none."""

import random

import pytest
import torch

from dyvte_engine import DynamicExit, Engine, EngineConfig, ExitHeadConfig, ExitHeads, FixedExit, KeepAll
from dyvte_engine.models import VisionLanguageModel
from tests.families import zoo


def engine_of(family, **options):
    config = EngineConfig(torch.device("cpu"), torch.float32, max_len=384, **options)
    return Engine(VisionLanguageModel(zoo.model(family), zoo.processor(family), family, 384), config)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_further_questions_are_answered_as_by_a_fresh_engine(family):
    again, fresh = engine_of(family), engine_of(family, prefix_cache=0, picture_cache=0)
    heads = ExitHeads(ExitHeadConfig(64, zoo.LAYERS, 32, ("mean_visual", "last_text")), seed=3)
    heads.w2.data *= 8
    policies = [KeepAll(), DynamicExit(heads.requires_grad_(False), 0.5), *map(FixedExit, range(zoo.LAYERS))]
    rng, hits, seen = random.Random(3), 0, set()
    texts, images = zoo.prompts(family, seed=8, n=5)
    for _ in range(2):
        for policy in rng.sample(policies, len(policies)):
            asked = [f"{text} w{rng.randrange(50)} w{rng.randrange(50)}" for text in texts]
            options = dict(chat=False, max_new_tokens=4, policy=policy)
            got, want = (e.generate(asked, images, **options) for e in (again, fresh))
            for a, b, pictures in zip(got, want, images):
                assert (a.token_ids, a.stats.exit_layer) == (b.token_ids, b.stats.exit_layer)
                assert a.stats.tokens_per_layer == b.stats.tokens_per_layer
                hits += a.stats.prefix == "hit"
                assert (a.stats.prefix == "no picture") == (not pictures)
                seen.add(a.stats.exit_layer)
    again.check_integrity()
    assert hits >= 11 and len(seen) >= 3
