"""The exit heads ("hyper-network" in the paper): one two-layer MLP after every decoder layer (spec section 1).

This module knows their weights, their file and the plain torch forward used for training; inference
runs the fused `dyvte::exit_head` kernel on the same tensors.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import HeadsError, InvalidArgumentError

STATE_BITS = {"mean_visual": 1, "last_visual": 2, "mean_text": 4, "last_text": 8}


@dataclass(frozen=True)
class ExitHeadConfig:
    """Shape of a set of heads. `states` are concatenated in the order of `STATE_BITS`; `rms_eps` normalises each."""

    hidden_size: int
    num_layers: int
    head_hidden: int = 2048
    states: tuple[str, ...] = ("mean_text", "last_text")
    rms_eps: float | None = None

    def __post_init__(self) -> None:
        ordered = tuple(s for s in STATE_BITS if s in self.states)
        if not ordered or set(self.states) - set(STATE_BITS):
            raise InvalidArgumentError(
                f"states is {self.states!r}; accepted: a non-empty subset of {tuple(STATE_BITS)}"
            )
        object.__setattr__(self, "states", ordered)

    @property
    def state_mask(self) -> int:
        return sum(STATE_BITS[s] for s in self.states)


class ExitHeads(nn.Module):
    """`w1` [L, h, S*d] and `w2` [L, 2, h], no biases, Xavier-uniform (spec section 1); logits are (keep, exit)."""

    def __init__(self, config: ExitHeadConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}
        c = config
        self.w1 = nn.Parameter(torch.empty(c.num_layers, c.head_hidden, len(c.states) * c.hidden_size))
        self.w2 = nn.Parameter(torch.empty(c.num_layers, 2, c.head_hidden))
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for weight in (*self.w1, *self.w2):
            nn.init.xavier_uniform_(weight.data, generator=generator)

    def forward(self, pooled: Tensor, layer: int) -> Tensor:
        """pooled [..., S*d], the states of one layer -> logits [..., 2]."""
        if self.config.rms_eps is not None:
            states = pooled.unflatten(-1, (len(self.config.states), -1))
            rms = states.float().pow(2).mean(-1, keepdim=True).add(self.config.rms_eps).rsqrt()
            pooled = (states * rms.to(states.dtype)).flatten(-2)
        hidden = nn.functional.gelu(pooled @ self.w1[layer].T)
        return hidden @ self.w2[layer].T

    def save(self, path: str | Path, model_fingerprint: str = "", **metadata: Any) -> None:
        """Write one safetensors file: weights, config, the fingerprint of the model, any JSON-able metadata."""
        header = {"config": asdict(self.config), "model_fingerprint": model_fingerprint, **metadata}
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        save_file(tensors, str(path), metadata={"dyvte_exit_heads": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> ExitHeads:
        """Read what `save` wrote; everything but the config is in `.metadata`.

        Raises:
            HeadsError: missing, damaged, not exit heads, or with NaN weights.
        """
        try:
            with safe_open(str(path), framework="pt") as f:
                header = json.loads((f.metadata() or {})["dyvte_exit_heads"])
                tensors = {k: f.get_tensor(k) for k in ("w1", "w2")}
            config = header.pop("config")
            heads = cls(ExitHeadConfig(**{**config, "states": tuple(config["states"])}))
            dtype = tensors["w1"].dtype
            heads.to(dtype).load_state_dict(tensors)
        except FileNotFoundError:
            raise HeadsError(f"exit heads file not found: {path}") from None
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError) as e:
            raise HeadsError(
                f"{path} is not a readable exit-heads file (safetensors written by ExitHeads.save): {e}"
            ) from e
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise HeadsError(f"exit heads {path}: weight {name!r} holds NaN or infinity")
        heads.metadata = header
        return heads.requires_grad_(False)
