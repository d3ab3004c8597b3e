"""One Llama-family decoder (Llama, Vicuna, Mistral, Qwen2, Qwen3) on packed rows, with the weights of a live HF module.

Projections that read the same input are fused (q/k/v, gate/up); the HF parameters become views of the fused
tensors, so nothing is held twice and the HF module still works. The module knows layers, not batches or policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import DecoderShape
from ..errors import ModelError
from ..kernels import ops
from .linear import GateUp, Linear, stacked
from .rotary import rotations


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.data, None if module.bias is None else module.bias.data)


@dataclass
class DecoderLayer:
    """Weights of one layer and the four steps between residual additions."""

    shape: DecoderShape
    input_norm: Tensor
    post_norm: Tensor
    eps: float
    qkv: Linear
    qk_norm: tuple[Tensor, Tensor] | None
    out: Linear
    gate_up: GateUp
    down: Linear

    @classmethod
    def from_hf(cls, layer: Any, shape: DecoderShape) -> DecoderLayer:
        attn, mlp = layer.self_attn, layer.mlp
        q_norm = getattr(attn, "q_norm", None)
        gate_up = stacked((mlp.gate_proj, mlp.up_proj))
        return cls(
            shape=shape,
            input_norm=layer.input_layernorm.weight.data,
            post_norm=layer.post_attention_layernorm.weight.data,
            eps=layer.input_layernorm.variance_epsilon,
            qkv=stacked((attn.q_proj, attn.k_proj, attn.v_proj)),
            qk_norm=None if q_norm is None else (q_norm.weight.data, attn.k_norm.weight.data),
            out=_linear(attn.o_proj),
            gate_up=GateUp(gate_up.weight, gate_up.bias),
            down=_linear(mlp.down_proj),
        )

    @property
    def projections(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [N, n], what the projection `qkv` gives -> its views q [N, Hq, D], k and v [N, Hkv, D]."""
        s = self.shape
        q, k, v = qkv.view(len(qkv), -1, s.head_dim).split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)
        return q, k, v

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `split_heads`, queries and keys normalised where the model does so."""
        q, k, v = self.split_heads(qkv)
        if self.qk_norm is not None:
            q = ops.rms_norm(q, self.qk_norm[0], self.eps)
            k = ops.rms_norm(k, self.qk_norm[1], self.eps)
        return q, k, v

    def project_qk(self, x: Tensor, query_rows: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, d], normalised -> q [B, Hq, D] of the given rows and k [N, Hkv, D] of all: enough to score tokens."""
        s = self.shape
        sizes = (s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim, s.num_kv_heads * s.head_dim)
        w_q, w_k, _ = self.qkv.weight.split(sizes)
        b_q, b_k, _ = (None, None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        q = Linear(w_q, b_q)(x[query_rows]).view(len(query_rows), -1, s.head_dim)
        k = Linear(w_k, b_k)(x).view(len(x), -1, s.head_dim)
        if self.qk_norm is not None:
            q, k = ops.rms_norm(q, self.qk_norm[0], self.eps), ops.rms_norm(k, self.qk_norm[1], self.eps)
        return q, k

    def project_out(self, attended: Tensor) -> Tensor:
        """attended [N, Hq, D] -> [N, d], to be added to the residual stream."""
        return self.out(attended.flatten(1))

    def mlp(self, x: Tensor, workspace: Tensor | None = None) -> Tensor:
        """x [N, d], normalised -> [N, d], to be added to the residual stream. `workspace`: [N or more, 2 m]."""
        return self.down(self.gate_up(x, workspace))


class LayerRows(Protocol):
    """The rows of one pass through the layers: what differs between a prefill and a decoding step.

    Attributes:
        workspace: [N or more, 2 m] to compute in, or None.
    """

    workspace: Tensor | None

    def attend(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [N, Hq, D] and k, put k and v [N, Hkv, D] into the cache, attend.

        Returns the rows of `hidden` [N, d] that the rest of the layer computes, [n, d], and what they read, [n, Hq, D].
        """

    def added(self, layer: int) -> Tensor | None:
        """[n, d] that is added to the residual stream leaving this layer (deepstack), or None."""


class Decoder:
    """The language model of a checkpoint: layers, final norm, LM head and the table of rotations.

    `cos_sin` f32 [max_len, rot_dim] holds cos in its first half and sin in its second, per position.
    """

    def __init__(self, language_model: Any, lm_head: nn.Linear, shape: DecoderShape, max_len: int | None):
        if max_len is not None and max_len > shape.max_positions:
            raise ModelError(f"max_len is {max_len}; accepted: at most the model's {shape.max_positions} positions")
        self.shape = shape
        self.max_len = max_len or min(shape.max_positions, 4096)
        self.layers = [DecoderLayer.from_hf(layer, shape) for layer in language_model.layers]
        self.norm = language_model.norm.weight.data
        self.eps: float = language_model.norm.variance_epsilon
        self.embed: nn.Embedding = language_model.embed_tokens
        self.lm_head = _linear(lm_head)
        self.scale = shape.head_dim**-0.5
        device = self.norm.device
        self.cos_sin = rotations(language_model, torch.arange(self.max_len, device=device)[None])

    @property
    def linears(self) -> list[Linear]:
        """All its projections."""
        return [p for layer in self.layers for p in layer.projections] + [self.lm_head]

    @property
    def layer_weights(self) -> int:
        """Numbers in the products of a layer."""
        return sum(p.weight.numel() for p in self.layers[0].projections)

    def workspace(self, rows: int) -> Tensor | None:
        """Memory [rows, 2 m] that the layers of a pass may share; none on CUDA, where torch keeps what was freed."""
        if self.norm.is_cuda:
            return None
        return self.norm.new_empty(rows, 2 * self.shape.intermediate_size)

    def enter(self, hidden: Tensor) -> Tensor:
        """hidden [N, d] at the decoder's entry -> the same, normalised for layer 0."""
        return ops.rms_norm(hidden, self.layers[0].input_norm, self.eps)

    def reenter(self, layer: int, hidden: Tensor) -> Tensor:
        """As `enter`, for any layer: rounded as in a pass without a stop, where the norm comes with a sum."""
        if layer == 0:
            return self.enter(hidden)
        return ops.add_rms_norm_(hidden, torch.zeros_like(hidden), self.layers[layer].input_norm, self.eps)

    def layer(self, layer: int, hidden: Tensor, x: Tensor, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """One layer of any pass: prefill, captured or not, and decoding.

        hidden [N, d] enters it, and x, the same normalised for it. Returns what leaves it (written in place where all
        rows stay), and that normalised for the next layer, or by the final norm.
        """
        return self.behind_projections(layer, hidden, self.layers[layer].qkv(x), rows)

    def behind_projections(
        self, layer: int, hidden: Tensor, qkv: Tensor, rows: LayerRows, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`layer` without its beginning: qkv [N, n] is what the projection gave. into: [n, d], where x is to be."""
        this, last = self.layers[layer], layer == len(self.layers) - 1
        hidden, attended = rows.attend(layer, hidden, *this.heads(qkv))
        x = ops.add_rms_norm_(hidden, this.project_out(attended), this.post_norm, this.eps)
        out = this.mlp(x, rows.workspace)
        added = rows.added(layer)
        if added is not None:
            hidden += out
            out = added
        following = self.norm if last else self.layers[layer + 1].input_norm
        return hidden, ops.add_rms_norm_(hidden, out, following, self.eps, into)

    def rotate(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        """x [n, H, D] turned as keys and queries are, cos_sin f32 [n, rot_dim]; in plain torch, for scores only."""
        cos, sin = cos_sin[:, None].chunk(2, dim=-1)
        half = cos.shape[-1]
        a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
        return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), dim=-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, d], normalised -> float32 [B, vocab]."""
        return self.lm_head(hidden).float()
