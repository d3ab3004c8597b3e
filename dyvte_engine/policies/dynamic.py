"""DyVTE: a head after each layer says when all visual tokens leave (docs/method.md sections 1 and 2)."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import is_whole
from ..errors import CalibrationError, HeadsError, InvalidArgumentError
from ..heads.calibration import Calibration
from ..heads.exit_head import ExitHeads
from ..heads.rule import ExitRule
from ..kernels import ops
from ..kernels.transfer import read_later
from .base import Decision, LayerState, VisualTokenPolicy, highest, visual_attention

# By heads: what they were when they were copied, and the copies. The paper's take 1.7 GB at 13B.
_copies: weakref.WeakKeyDictionary[ExitHeads, tuple[Hashable, dict[Any, ExitHeads]]] = weakref.WeakKeyDictionary()


def _state(heads: ExitHeads) -> Hashable:
    """Changes with their values. Tensors made under inference_mode do not count their changes."""
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in heads.parameters())


def _moved(heads: ExitHeads, device: torch.device, dtype: torch.dtype) -> ExitHeads:
    """A copy on the device, one for all policies with these heads: whoever trains them on does not change it."""
    state, copies = _copies.get(heads, (None, {}))
    if state != _state(heads):
        copies = {}
        _copies[heads] = _state(heads), copies
    if (device, dtype) not in copies:
        copies[device, dtype] = copy.deepcopy(heads).to(device=device, dtype=dtype)
    return copies[device, dtype]


@dataclass(frozen=True, eq=False)
class DynamicExit(VisualTokenPolicy):
    """All visual tokens leave where `ExitRule` has an exit; each sequence by itself, at most once.

    threshold (one value, or one for each layer), min_layer, every_k, hysteresis: the rule's. `keep`: so many visual
    tokens stay after the exit, those with the most attention from the last text token in that layer (FastV's measure);
    their exit layer counts as none.
    """

    heads: ExitHeads
    threshold: float | tuple[float, ...] = 0.5
    min_layer: int = 0
    every_k: int = 1
    hysteresis: int = 1
    keep: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.heads, ExitHeads):
            raise InvalidArgumentError(f"heads is a {type(self.heads).__name__}; accepted: ExitHeads")
        object.__setattr__(self, "threshold", self.rule.threshold)  # a list became a tuple; and all of it is checked
        if not (is_whole(self.keep) and self.keep >= 0):
            raise InvalidArgumentError(f"keep is {self.keep!r}; accepted: whole numbers of at least 0")

    @cached_property
    def rule(self) -> ExitRule:
        return ExitRule(self.threshold, self.min_layer, self.every_k, self.hysteresis)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        threshold: float | tuple[float, ...] | None = None,
        *,
        target_agreement: float | None = None,
        target_flops: float | None = None,
        **options: Any,
    ) -> DynamicExit:
        """Heads written by `ExitHeads.save`.

        threshold: default the one stored there, else 0.5. Or from the stored calibration (`heads.calibration`):
        target_agreement: the share of answers that stay as they are, guaranteed at the level stated there;
        target_flops: mean FLOPs of a prefill over those without an exit, as measured there.
        options: the other fields; by default those the calibration was made with.

        Raises:
            CalibrationError: no calibration stored, made for other options, or too small for the target.
        """
        given = [v for v in (threshold, target_agreement, target_flops) if v is not None]
        if len(given) > 1:
            raise InvalidArgumentError("accepted: one of threshold, target_agreement and target_flops")
        heads = ExitHeads.load(path)
        calibration = Calibration.of_metadata(heads.metadata)
        if target_agreement is not None or target_flops is not None:
            calibration = _calibrated_for(calibration, options, path)
            if target_agreement is not None:
                threshold = calibration.for_agreement(target_agreement)
            else:
                threshold = calibration.for_flops(target_flops)  # type: ignore[arg-type]
        rule = ExitRule.of_metadata(heads.metadata, threshold)
        return cls(heads, **{**vars(rule), **options})

    @property
    def state(self) -> Hashable:
        return _state(self.heads)

    def bind(self, model: Any) -> DynamicExit:
        c = self.heads.config
        if (c.hidden_size, c.num_layers) != (model.shape.hidden_size, model.shape.num_layers):
            raise HeadsError(
                f"heads are for hidden_size {c.hidden_size}, {c.num_layers} layers; "
                f"the model has hidden_size {model.shape.hidden_size}, {model.shape.num_layers} layers"
            )
        self.rule.check(c.num_layers)
        if self.min_layer >= c.num_layers:
            raise InvalidArgumentError(f"min_layer is {self.min_layer}; accepted: 0 to {c.num_layers - 1}")
        trained_on = self.heads.metadata.get("model_fingerprint")
        if trained_on and trained_on != model.fingerprint:
            name = self.heads.metadata.get("model_name", "another model")
            warnings.warn(
                f"exit heads were trained on {name} ({trained_on}) and now run on {model.name} ({model.fingerprint})",
                stacklevel=3,
            )
        return replace(self, heads=_moved(self.heads, model.device, model.dtype))

    @property
    def all_or_none(self) -> bool:
        return self.keep == 0 and type(self).decide is DynamicExit.decide

    def layers(self, num_layers: int) -> set[int]:
        return set(self.rule.layers(num_layers))

    def ask(self, state: LayerState) -> Tensor:
        """What the layer's head says: p_exit f32 [B]."""
        rows, heads = state.rows, self.heads
        wants_visual = heads.config.state_mask & 3
        w1, w2, b1 = heads.of_layer(state.layer)
        p_exit, _ = ops.exit_head(
            state.hidden,
            rows.text_ranges,
            rows.visual_rows if wants_visual else None,
            rows.visual_cu if wants_visual else None,
            w1,
            w2,
            heads.config.state_mask,
            rms_eps=heads.config.rms_eps,
            b1=b1,
        )
        return p_exit

    def decide(self, state: LayerState) -> Decision | Callable[[], Decision]:
        p_exit = self.ask(state)
        if not p_exit.is_cuda:
            return self._decision(state, p_exit.tolist())
        read = read_later(p_exit)
        return lambda: self._decision(state, read())

    def _decision(self, state: LayerState, p_exit: list[float]) -> Decision:
        leaves = self._leaves(state, p_exit)
        if self.keep and any(leaves):
            return self._best(state, leaves)
        nothing = state.rows.source[:0]
        return [nothing if leave else None for leave in leaves]

    def _leaves(self, state: LayerState, p_exit: list[float]) -> list[bool]:
        """Which sequences exit here: those with visual tokens that the rule lets go. Remembers each one's run."""
        before = state.memory.get(self, [0] * len(p_exit))
        steps = [self.rule.step(run, p, state.layer) for run, p in zip(before, p_exit, strict=True)]
        state.memory[self] = [run for run, _ in steps]
        return [exits and n > 0 for (_, exits), n in zip(steps, state.rows.n_visual, strict=True)]

    def _best(self, state: LayerState, leaves: list[bool]) -> Decision:
        rows = state.rows
        visual = visual_attention(rows, state.q[rows.last_rows], state.k, state.scale)
        return [highest(s, self.keep) if leave else None for s, leave in zip(visual, leaves, strict=True)]


def _calibrated_for(calibration: Calibration | None, options: dict[str, Any], path: str | Path) -> Calibration:
    """The calibration, made sure that it speaks of a policy with these options."""
    if calibration is None:
        raise CalibrationError(f"{path} holds no calibration; `dyvte-engine train-heads` stores one")
    measured = {**calibration.options, "keep": 0}
    other = {name: value for name, value in options.items() if measured.get(name, value) != value}
    if other:
        given = ", ".join(f"{name} {value}" for name, value in other.items())
        made = ", ".join(f"{name} {measured[name]}" for name in other)
        raise CalibrationError(f"{given} was asked for, but {path} is calibrated for {made}")
    return calibration
