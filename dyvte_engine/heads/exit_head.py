"""The exit heads: one two-layer MLP after every decoder layer ("hyper-network" in the paper, docs/method.md section 1),
or the light form in which all layers share one trunk and differ by an embedding (section 6 there).

This module knows their weights, their file and the plain torch forward used for training; inference
runs the fused `dyvte::exit_head` kernel on the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import is_real, is_whole
from ..errors import HeadsError, InvalidArgumentError, first_line
from ..files import parse_json, write_bytes
from .calibration import Calibration
from .rule import ExitRule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a file may hold
STATE_BITS = {"mean_visual": 1, "last_visual": 2, "mean_text": 4, "last_text": 8}


def ordered(states: Sequence[str]) -> tuple[str, ...]:
    """The same in the order of `STATE_BITS`; raises InvalidArgumentError where one is not known, or there is none."""
    if not states or not all(isinstance(s, str) and s in STATE_BITS for s in states):
        raise InvalidArgumentError(f"states is {states!r}; accepted: a non-empty subset of {tuple(STATE_BITS)}")
    return tuple(s for s in STATE_BITS if s in states)


@dataclass(frozen=True)
class ExitHeadConfig:
    """Shape of a set of heads. `states` are concatenated in the order of `STATE_BITS`; `rms_eps` normalises each.

    `shared`: one trunk and one output for all layers, with a layer embedding [h] added before the GELU.
    """

    hidden_size: int
    num_layers: int
    head_hidden: int = 2048
    states: tuple[str, ...] = ("mean_text", "last_text")
    rms_eps: float | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.states, (tuple, list)) and isinstance(self.shared, bool)):
            given = f"states is {self.states!r}, shared {self.shared!r}"
            raise InvalidArgumentError(f"{given}; accepted: a tuple of names, True or False")
        if self.rms_eps is not None:
            if not is_real(self.rms_eps):
                raise InvalidArgumentError(f"rms_eps is {self.rms_eps!r}; accepted: None or a number")
            object.__setattr__(self, "rms_eps", float(self.rms_eps))  # NumPy's would not go into a file
        object.__setattr__(self, "states", ordered(self.states))
        for name in ("hidden_size", "num_layers", "head_hidden"):
            value = getattr(self, name)
            if not (is_whole(value) and value >= 1):
                raise InvalidArgumentError(f"{name} is {value!r}; accepted: whole numbers, at least 1")
            object.__setattr__(self, name, int(value))
        if self.rms_eps is not None and not 0 <= self.rms_eps < math.inf:
            raise InvalidArgumentError(f"rms_eps is {self.rms_eps}; accepted: None, or at least 0")

    @property
    def state_mask(self) -> int:
        return sum(STATE_BITS[s] for s in self.states)


class ExitHeads(nn.Module):
    """`w1` [L, h, S*d] and `w2` [L, 2, h], no biases, Xavier-uniform; logits are (keep, exit).

    With `config.shared`: w1 [1, h, S*d], w2 [1, 2, h] and the layer embedding `b1` [L, h], else `b1` is None.
    """

    b1: nn.Parameter | None

    def __init__(self, config: ExitHeadConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}
        c = config
        trunks = 1 if c.shared else c.num_layers
        try:
            self.w1 = nn.Parameter(torch.empty(trunks, c.head_hidden, len(c.states) * c.hidden_size))
            self.w2 = nn.Parameter(torch.empty(trunks, 2, c.head_hidden))
            self.b1 = nn.Parameter(torch.empty(c.num_layers, c.head_hidden)) if c.shared else None
        except (OverflowError, RuntimeError, TypeError) as e:
            raise HeadsError(f"heads of these sizes do not fit into memory ({config}): {first_line(e)}") from e
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for weight in (*self.w1, *self.w2):
            nn.init.xavier_uniform_(weight.data, generator=generator)
        if self.b1 is not None:
            nn.init.normal_(self.b1.data, std=c.head_hidden**-0.5, generator=generator)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """w1 [h, S*d], w2 [2, h] and b1 [h] or None of the head after `layer`, as `ops.exit_head` takes them.

        Raises:
            InvalidArgumentError: there is no head after this layer.
        """
        if not (is_whole(layer) and 0 <= layer < self.config.num_layers):
            given = f"layer is {layer!r}"
            raise InvalidArgumentError(f"{given}; accepted: 0 to {self.config.num_layers - 1}, the layers with a head")
        trunk = 0 if self.config.shared else layer
        return self.w1[trunk], self.w2[trunk], None if self.b1 is None else self.b1[layer]

    def forward(self, pooled: Tensor, layer: int) -> Tensor:
        """pooled [..., S*d], the states of one layer -> logits [..., 2]; refuses what `of_layer` does."""
        w1, w2, b1 = self.of_layer(layer)
        return F.linear(F.gelu(F.linear(self._normalised(pooled), w1, b1)), w2)

    def all_layers(self, pooled: Tensor) -> Tensor:
        """pooled [N, L, S*d], the states of every layer -> logits [N, L, 2].

        Raises:
            InvalidArgumentError: `pooled` is of another shape.
        """
        layers = self.config.num_layers
        if pooled.dim() != 3 or pooled.shape[1] != layers:
            raise InvalidArgumentError(f"pooled is {list(pooled.shape)}; accepted: [N, {layers}, {self.w1.shape[2]}]")
        pooled = self._normalised(pooled)
        if self.b1 is not None:
            return F.linear(F.gelu(F.linear(pooled, self.w1[0]) + self.b1), self.w2[0])
        hidden = F.gelu(pooled.transpose(0, 1) @ self.w1.mT)  # [L, N, h]
        return (hidden @ self.w2.mT).transpose(0, 1)

    def _normalised(self, pooled: Tensor) -> Tensor:
        width = self.w1.shape[2]
        if pooled.shape[-1:] != (width,):
            raise InvalidArgumentError(f"pooled is {list(pooled.shape)}; accepted: [..., {width}]")
        if self.config.rms_eps is None:
            return pooled
        states = pooled.unflatten(-1, (len(self.config.states), -1))
        rms = states.float().pow(2).mean(-1, keepdim=True).add(self.config.rms_eps).rsqrt()
        return (states * rms.to(states.dtype)).flatten(-2)

    def save(self, path: str | Path, model_fingerprint: str = "", **metadata: Any) -> None:
        """Write one safetensors file: weights, config, the fingerprint of the model, any JSON-able metadata.

        Raises:
            FileError: `path` cannot be written; what was there still is.
        """
        header = {"config": asdict(self.config), "model_fingerprint": model_fingerprint, **metadata}
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        write_bytes(path, save(tensors, metadata={"dyvte_exit_heads": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> ExitHeads:
        """Read what `save` wrote; everything but the config is in `.metadata`.

        Raises:
            HeadsError: missing, damaged, not exit heads, of a dtype that heads do not run in, or with NaN weights.
        """
        try:
            with safe_open(str(path), framework="pt") as f:
                header = parse_json((f.metadata() or {})["dyvte_exit_heads"])
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
            _check_weights(path, tensors)
            config = header.pop("config")
            with torch.device("meta"):  # the weights are those of the file
                heads = cls(ExitHeadConfig(**{**config, "states": tuple(config["states"])}))
            heads.load_state_dict(tensors, assign=True)
            ExitRule.of_metadata(header).check(heads.config.num_layers)
            calibration = Calibration.of_metadata(header)
            for threshold in calibration.thresholds if calibration else ():
                ExitRule(threshold).check(heads.config.num_layers)
        except FileNotFoundError:
            raise HeadsError(f"exit heads file not found: {path}") from None
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as e:
            raise HeadsError(
                f"{path} is not a readable exit-heads file (safetensors written by ExitHeads.save): {e}"
            ) from e
        heads.metadata = header
        return heads.requires_grad_(False)


def _check_weights(path: str | Path, tensors: dict[str, Tensor]) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        given = f"exit heads {path}: weights are {', '.join(sorted(map(str, dtypes)))}"
        raise HeadsError(f"{given}; accepted: one of {', '.join(map(str, DTYPES))}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise HeadsError(f"exit heads {path}: weight {name!r} holds NaN or infinity")
