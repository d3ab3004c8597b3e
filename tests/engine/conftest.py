import pytest
import torch

from dyvte_engine import Engine, EngineConfig
from dyvte_engine.models import VisionLanguageModel
from tests import tiny


def build(decoder="llama-gqa", vision="clip", dtype=torch.float32, seed=0, device="cpu", **options):
    """An engine on a random tiny model, and a second, untouched copy of that model as the oracle."""
    hf = tiny.model(decoder, vision, seed=seed).to(device, dtype)
    oracle = tiny.model(decoder, vision, seed=seed).to(device, dtype)
    policy = options.pop("policy", None)
    config = EngineConfig(torch.device(device), dtype, **{"max_len": 256, **options})
    loaded = VisionLanguageModel(hf, tiny.processor(vision), f"tiny-{decoder}", config.max_len)
    return Engine(loaded, config, policy), oracle


def logits_errors(engine, low, exact, texts, images):
    """Norms over all prompts of the next token's logits less those of `exact` (float64): the engine's, and torch's.

    `low` holds transformers' layers in the engine's dtype, `exact` the same weights.
    """
    ours, theirs = [], []
    for text, pictures in zip(texts, images):
        embeds, visual, _ = tiny.embed(low, engine.model.processor, text, pictures)
        nothing = tiny.see_all(len(embeds))
        want = tiny.masked_logits(exact, embeds.double(), nothing)[-1]
        with engine.prefill(embeds, visual) as running:
            ours.append(running.logits[0].double() - want)
        theirs.append(tiny.masked_logits(low, embeds, nothing)[-1].double() - want)
    return torch.stack(ours).norm(), torch.stack(theirs).norm()


@pytest.fixture(scope="session")
def tiny_engine():
    return build()
