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


@pytest.fixture(scope="session")
def tiny_engine():
    return build()
