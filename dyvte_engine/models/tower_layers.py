"""Blocks of a vision tower on a CPU, in eight calls each.

transformers' code around the products of a small tower takes as long as half of these products. Here queries, keys and
values are one product, and the activation is a part of its own. Whatever a block is asked for beyond rows in and rows
out, and whatever is not as transformers made it, runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .guard import addresses, is_patched, version
from .linear import Linear
from .tower_attention import KIND, attend_rows
from .vision_run import VisionRun

_CLASSES = {
    f"transformers.models.{kind}.modeling_{kind}.{name}EncoderLayer"
    for kind, name in (("clip", "CLIP"), ("siglip", "Siglip"), ("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
}
# Of transformers.activations -> torch's name of the approximation.
_GELU = {"GELUActivation": "none", "GELUTanh": "tanh"}


def unused_blocks(hf_model: Any) -> list[nn.Module]:
    """Those behind the last one whose rows the projector gets: LLaVA takes the rows before the last block."""
    layers = getattr(hf_model.config, "vision_feature_layer", None)
    tower = getattr(hf_model.model, "vision_tower", None)
    if layers is None or tower is None:
        return []
    blocks = [m for m in tower.modules() if _is_known(type(m))]
    states = len(blocks) + 1  # that can be asked for: the first block's input, and what each gives
    return blocks[max(layer % states for layer in (layers if isinstance(layers, (list, tuple)) else [layers])) :]


def skip(run: VisionRun, blocks: Iterable[nn.Module]) -> None:
    """In this run these blocks give what they get, but for those that somebody has hooked."""
    for block in blocks:
        if addresses(block) is not None:
            run.replace(block, _unchanged)


def _unchanged(hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    return hidden_states


class TowerLayers:
    """Those blocks below `root` that are computed here where a run asks for it."""

    def __init__(self, root: nn.Module):
        self._layers = [_Layer(m) for m in root.modules() if _is_known(type(m))]
        self._arranged: set[_Layer] = set()

    def arrange(self, run: VisionRun, ahead: BlocksAhead | None = None) -> set[nn.Module]:
        """They are in this run. Returns their linear layers, which then compute nothing themselves.

        ahead: blocks that have run already; asked for the same rows, they give what these became.
        """
        self._arranged = {layer for layer in self._layers if layer.ready()}
        recalls = {} if ahead is None else ahead.recalls()
        for layer in self._arranged:
            run.replace(layer.module, recalls.get(layer, layer))
        return {linear for layer in self._arranged for linear in layer.linears}

    def stop_before(self, run: VisionRun, but: Iterable[nn.Module], layer_weights: int) -> bool:
        """To be called when they are arranged: this run ends with `AtBlocks` where it asks for the first of them.

        but: blocks that the run skips; layer_weights: as `BlocksAhead` takes them. Returns whether it does: not where
        one of the others is not computed here.
        """
        unused = set(but)
        layers = [layer for layer in self._layers if layer.module not in unused]

        def stop(hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> None:
            raise AtBlocks(BlocksAhead(layers, hidden_states, attention_mask, options, layer_weights))

        if not layers or not self._arranged.issuperset(layers):
            return False
        run.replace(layers[0].module, stop)
        return True


class AtBlocks(Exception):
    """Carries what a run that stopped before the blocks of its tower would do next."""

    def __init__(self, ahead: BlocksAhead):
        self.ahead = ahead


class BlocksAhead:
    """Blocks of a tower that run before transformers' code asks for them: picture by picture, one block at a time.

    layers: in their order; hidden [B, n, d] and the rest as the first one is called with. layer_weights: numbers in the
    products of a layer of the decoder, in whose rows times layers the work here is counted.
    """

    def __init__(
        self, layers: list[_Layer], hidden: Tensor, mask: Tensor | None, options: dict[str, Any], layer_weights: int
    ):
        self._layers, self._options, self._hidden = layers, options, hidden
        own_masks = mask is not None and len(mask) == len(hidden)
        self._masks = mask.split(1) if mask is not None and own_masks else [mask] * len(hidden)
        self._pictures = hidden.split(1)
        self._became = [list[Tensor]() for _ in layers]  # of each block, what it made of the first pictures
        self._weights = _weights(layers)
        self._cost = hidden.shape[1] * layers[0].weights / layer_weights

    @property
    def done(self) -> bool:
        return len(self._became[-1]) == len(self._pictures)

    @torch.inference_mode()
    def advance(self, row_layers: float = float("inf"), least: bool = True) -> float:
        """Run blocks while they cost at most `row_layers`; `least`: one, whatever it costs. Returns the cost."""
        used = 0.0
        while not self.done and (used + self._cost <= row_layers or (least and not used)):
            self._step()
            used += self._cost
        return used

    def _step(self) -> None:
        b = len(self._became[-1])
        k = next(k for k, became in enumerate(self._became) if len(became) == b)
        given = self._became[k - 1][b] if k else self._pictures[b]
        self._became[k].append(self._layers[k](given, self._masks[b], **self._options))

    def recalls(self) -> dict[_Layer, Callable[..., Tensor]]:
        """The blocks, which compute nothing where they are asked for what is known.

        Empty where some have not run, or ran with other weights than they have now.
        """
        recalls, given = dict[_Layer, Callable[..., Tensor]](), self._hidden
        if self.done and self._weights == _weights(self._layers):
            for layer, became in zip(self._layers, map(torch.cat, self._became), strict=True):
                recalls[layer] = partial(_recalled, layer, given, became)
                given = became
        return recalls


def _weights(layers: Iterable[_Layer]) -> list[tuple[int, int]]:
    """Changes when one of theirs does, norms included."""
    return [(t.data_ptr(), version(t)) for layer in layers for t in layer.module.parameters()]


def _recalled(
    layer: _Layer, given: Tensor, became: Tensor, hidden_states: Tensor, *args: Any, **options: Any
) -> Tensor:
    if hidden_states is given or torch.equal(hidden_states, given):
        return became
    return layer(hidden_states, *args, **options)


def _is_known(cls: type) -> bool:
    """Releases before 5 give a tuple."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    return name in _CLASSES and signature(cls.forward).return_annotation in (Tensor, "torch.Tensor")  # type: ignore[attr-defined]


class _Layer:
    """One block: norm, attention of all rows with all rows, norm, an MLP of two products."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._parts: tuple[Any, ...] = ()
        self._plain = False
        self._gelu: str | None = None
        self._state: list[tuple[int, int]] = []

    @property
    def linears(self) -> tuple[Any, ...]:
        return self._parts[5:]

    @property
    def weights(self) -> int:
        """Numbers in its products."""
        return sum(m.weight.numel() for m in self.linears)

    def ready(self) -> bool:
        """Whether the block still is what its class says; a weight that has changed is packed anew."""
        parts = _parts(self.module)
        if parts != self._parts:  # somebody has put another module in
            self._parts, self._plain, self._state = parts, _are_plain(self.module, parts), []
            kind = type(parts[4]) if parts else None
            self._gelu = _GELU.get(kind.__name__) if kind and kind.__module__ == "transformers.activations" else None
        patched = "forward" in self.module.__dict__ or any(map(is_patched, parts))
        if not self._plain or patched or self.module.training or parts[0].config._attn_implementation != KIND:
            return False
        tensors = [m._parameters.get(name) for m in self.linears for name in ("weight", "bias")]
        if any(t is None for t in tensors):
            return False
        state = [(t.data_ptr(), version(t)) for t in tensors]
        if state != self._state:
            q, k, v, out, fc1, fc2 = self.linears
            self._qkv, self._out, self._fc1, self._fc2 = _packed(q, k, v), _packed(out), _packed(fc1), _packed(fc2)
            self._state = state
        return True

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """hidden_states [B, n, d] -> [B, n, d]."""
        attention, _, norm1, norm2, activation = self._parts[:5]
        batch, n, width = hidden_states.shape
        hidden = hidden_states.reshape(batch * n, width)
        qkv = self._qkv(_normed(norm1, hidden)).view(batch * n, 3, attention.num_heads, -1)
        hidden = self._out(attend_rows(attention, qkv, batch, attention_mask, **options)) + hidden
        rows = _normed(norm2, hidden)
        wide = self._fc1.gelu(rows, self._gelu) if self._gelu is not None else activation(self._fc1(rows))
        return (self._fc2(wide) + hidden).view_as(hidden_states)


def _parts(layer: Any) -> tuple[Any, ...]:
    """Attention, MLP, norms, activation, and the six linear layers; () where one is missing."""
    own = layer._modules  # a module's own getattr takes longer than all of this
    try:
        attention, mlp = own["self_attn"], own["mlp"]
        a, m = attention._modules, mlp._modules
        norms = own["layer_norm1"], own["layer_norm2"]
        return attention, mlp, *norms, m["activation_fn"], *(a[n] for n in _PROJECTIONS), m["fc1"], m["fc2"]
    except KeyError:
        return ()


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _are_plain(layer: nn.Module, parts: tuple[Any, ...]) -> bool:
    """Whether the parts are those that transformers' class has."""
    if not parts:
        return False
    attention, mlp, norm1, norm2, _, *linears = parts
    home = type(layer).__module__
    ours = all(type(m).__module__ == home for m in (attention, mlp))
    norms = all(type(m) is nn.LayerNorm and m.weight is not None for m in (norm1, norm2))
    return ours and norms and all(type(m) is nn.Linear for m in linears)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _packed(*modules: Any) -> Linear:
    """Their products as one."""
    weight, bias = (torch.cat([getattr(m, name).data for m in modules]) for name in ("weight", "bias"))
    linear = Linear(weight, bias)
    linear.pack()
    return linear
