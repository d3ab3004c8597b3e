"""The list of policies that all shared tests run over, each with its plain statement; and a tiny engine to run on."""

from __future__ import annotations

from dataclasses import dataclass

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
    KeepAll,
    PyramidDrop,
    Random,
    ToMe,
    VisionZip,
    VisualTokenPolicy,
    compose,
)
from dyvte_engine.models import VisionLanguageModel
from tests import tiny
from tests.policies import reference as ref
from tests.policies.reference import Reference

LAYERS = 8


@dataclass(frozen=True)
class KeepEvery(VisualTokenPolicy):
    """Every `step`-th visual token stays after `layer`. The example of docs/policies.md, whole."""

    layer: int = 2
    step: int = 3

    def layers(self, num_layers: int) -> set[int]:
        return {self.layer}

    def decide(self, state):
        return [torch.arange(0, n, self.step, device=state.hidden.device) for n in state.rows.n_visual]


def keep_every(at: ref.At):
    stay = ~at.visual
    stay[at.visual.nonzero()[::3, 0]] = True
    return stay if at.number == 2 else None


def always_exit(layer: int, **options) -> DynamicExit:
    """Heads that fire at once, asked from `layer` on."""
    heads = ExitHeads(ExitHeadConfig(64, LAYERS, 16), seed=0).requires_grad_(False)
    return DynamicExit(heads, threshold=0.0, min_layer=layer, **options)


def projected(tower_features):
    return lambda hf, features, pixels: hf.model.multi_modal_projector(tower_features(hf, pixels)[None])[0]


TOME = Reference(projected(lambda hf, pixels: ref.tome_features(hf, pixels, 0.5)))
POLICIES = {
    "keep-all": (KeepAll(), Reference()),
    "fixed": (FixedExit(3), ref.then_exit(Reference(), 3)),
    "dynamic": (always_exit(4), ref.then_exit(Reference(), 4)),
    "dynamic-later": (always_exit(1, every_k=2, hysteresis=2), ref.then_exit(Reference(), 3)),
    "dynamic-partial": (always_exit(4, keep=5), ref.keep_best(4, 5)),
    "fastv": (FastV(2, 0.5), ref.fastv(2, 0.5)),
    "pyramiddrop": (PyramidDrop(), ref.pyramid_drop(renumber=False)),
    "pyramiddrop-renumbered": (PyramidDrop(renumber=True), ref.pyramid_drop(renumber=True)),
    "divprune": (DivPrune(0.3), Reference(lambda hf, f, pixels: f[ref.divprune_rows(f, 0.3)])),
    "visionzip": (VisionZip(5, 3), Reference(projected(lambda hf, pixels: ref.visionzip_features(hf, pixels, 5, 3)))),
    "tome": (ToMe(0.5), TOME),
    "random": (Random(0, 0.6, 3), Reference(lambda hf, f, pixels: f[ref.random_rows(len(f), 0.6, 3)])),
    "random-later": (Random(3, 0.7, 5), ref.random_later(3, 0.7, 5)),
    "downsample": (Downsample(3), Reference(lambda hf, f, pixels: ref.downsample(f, 3))),
    "tome+fastv": (compose(ToMe(0.5), FastV(2, 0.5)), Reference(TOME.entry, ref.fastv(2, 0.5).stay)),
    "example": (KeepEvery(), Reference(stay=keep_every)),
}
VISION = ("clip", "siglip")


def build(vision: str = "clip", policy: VisualTokenPolicy | None = None, dtype=torch.float32, device="cpu", **options):
    """An engine of 8 layers whose features come from the third of four tower blocks, and an untouched twin."""
    models = [tiny.model("llama-gqa", vision, layers=LAYERS, tower_layers=4).to(device, dtype) for _ in range(2)]
    config = EngineConfig(torch.device(device), dtype, **{"max_len": 256, "page_size": 4, **options})
    loaded = VisionLanguageModel(models[0], tiny.processor(vision), f"tiny-{vision}", config.max_len)
    return Engine(loaded, config, policy), models[1]


def prefill(engine: Engine, texts, images):
    """A running batch, the way `generate` makes it."""
    prepared = engine.model.prepare(engine.model.tokenize(texts, images), engine.policy)
    return engine.prefill_prepared(prepared)
