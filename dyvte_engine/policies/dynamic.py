"""DyVTE: a head after each layer says when all visual tokens leave (spec sections 1 and 2)."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import ops
from ..errors import HeadsError, InvalidArgumentError
from ..exit_head import ExitHeads
from .base import Decision, LayerState, VisualTokenPolicy


@dataclass(frozen=True, eq=False)
class DynamicExit(VisualTokenPolicy):
    """Exit at the first asked layer whose head gives p_exit > `threshold`; each sequence by itself, at most once.

    Layers asked: `min_layer`, then every `every_k`-th; the last layer is left out, since nothing follows it.
    """

    heads: ExitHeads
    threshold: float = 0.5
    min_layer: int = 0
    every_k: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidArgumentError(f"threshold is {self.threshold}; accepted: 0 to 1")
        if self.min_layer < 0 or self.every_k < 1:
            raise InvalidArgumentError(f"min_layer {self.min_layer}, every_k {self.every_k}; accepted: >= 0 and >= 1")

    @classmethod
    def from_file(cls, path: str | Path, threshold: float | None = None, **options: Any) -> DynamicExit:
        """Heads written by `ExitHeads.save`; `threshold` defaults to the calibrated one stored there, else 0.5."""
        heads = ExitHeads.load(path)
        if threshold is None:
            threshold = float(heads.metadata.get("threshold", 0.5))
        return cls(heads, threshold, **options)

    def bind(self, model: Any) -> DynamicExit:
        c = self.heads.config
        if (c.hidden_size, c.num_layers) != (model.shape.hidden_size, model.shape.num_layers):
            raise HeadsError(
                f"heads are for hidden_size {c.hidden_size}, {c.num_layers} layers; "
                f"the model has hidden_size {model.shape.hidden_size}, {model.shape.num_layers} layers"
            )
        trained_on = self.heads.metadata.get("model_fingerprint")
        if trained_on and trained_on != model.fingerprint:
            name = self.heads.metadata.get("model_name", "another model")
            warnings.warn(
                f"exit heads were trained on {name} ({trained_on}) and now run on {model.name} ({model.fingerprint})",
                stacklevel=3,
            )
        return replace(self, heads=copy.deepcopy(self.heads).to(device=model.device, dtype=model.dtype))

    def layers(self, num_layers: int) -> set[int]:
        return set(range(self.min_layer, num_layers - 1, self.every_k))

    def decide(self, state: LayerState) -> Decision:
        _, fires = self.ask(state)
        nothing = state.pack.source[:0]
        return [nothing if fire and n else None for fire, n in zip(fires.tolist(), state.pack.n_visual, strict=True)]

    def ask(self, state: LayerState) -> tuple[Tensor, Tensor]:
        """What the layer's head says: p_exit f32 [B], and bool [B] whether that is above the threshold."""
        pack, heads = state.pack, self.heads
        wants_visual = heads.config.state_mask & 3
        return ops.exit_head(
            state.hidden,
            pack.text_ranges,
            pack.visual_rows if wants_visual else None,
            pack.visual_cu if wants_visual else None,
            heads.w1[state.layer],
            heads.w2[state.layer],
            heads.config.state_mask,
            self.threshold,
            heads.config.rms_eps,
        )
