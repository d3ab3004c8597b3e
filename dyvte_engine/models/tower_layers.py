"""Blocks of a vision tower in eight calls each, on a CPU and in what is captured on CUDA.

transformers' code around the products of a small tower takes as long as half of these products. Here queries, keys and
values are one product, a residual addition comes with the norm that follows it, also in the next block, and the
activation is a part of its own. Whatever a block is asked for beyond rows in and rows out, and whatever is not as
transformers made it, runs as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import signature
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from .guard import addresses, is_heard, places, runs_its_class, version, versions
from .linear import Linear, is_plain, packing_fault, stacked
from .samples import Samples
from .tower_attention import KIND, arrange_attention, attend_rows, attention_configs
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
    blocks = _in_order(tower)
    if not all(map(_is_known, set(map(type, blocks)))):
        return []
    states = len(blocks) + 1  # that can be asked for: the first block's input, and what each gives
    used = max(layer % states for layer in (layers if isinstance(layers, (list, tuple)) else [layers]))
    return [block for block in blocks[used:] if block not in blocks[:used]]


def _in_order(tower: nn.Module) -> list[nn.Module]:
    """Its blocks, one as often as it is called; not a walk through all of its modules, as that is for every run."""
    blocks, waiting = list[nn.Module](), [tower]
    while waiting:
        module = waiting.pop()
        within = [m for m in module._modules.values() if m is not None]
        if isinstance(module, nn.ModuleList):
            blocks += within
        else:
            waiting += reversed(within)
    return blocks


def skip(run: VisionRun, blocks: Iterable[nn.Module]) -> None:
    """In this run these blocks give what they get, but for those that somebody has hooked."""
    for block in blocks:
        if addresses(block) is not None:
            run.replace(block, _unchanged)


def _unchanged(hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
    return hidden_states


class TowerLayers:
    """Those blocks below `root` that are computed here where a run asks for it.

    pack: with weights a second time, as a CPU multiplies them. Else with their own, queries', keys' and values' side by
    side, so that what is written to them counts at once.
    """

    def __init__(self, root: nn.Module, pack: bool = True):
        self._root, self._pack = root, pack
        known = {m: _Layer(m, pack) for m in root.modules() if _is_known(type(m))}
        rows = [m for m in root.modules() if isinstance(m, nn.ModuleList)]
        self._next = {known[a]: known[b] for row in rows for a, b in pairwise(row) if a in known and b in known}
        self._layers = list(known.values())
        self._settled = list[_Layer]()  # as `_look` was at `_below`, and `_samples`
        self._theirs, self._below, self._samples = list[_Layer](), list[nn.Module](), Samples(())
        self._look: tuple[list[Any], list[Any]] | None = None
        self._arranged: set[_Layer] = set()

    def settle(self) -> None:
        """Where weights must move to be side by side, they do now, and not in a run."""
        for layer in self._layers:
            layer.settle()

    def arrange(self, run: VisionRun, ahead: BlocksAhead | None = None) -> set[nn.Module]:
        """They are in this run. Returns their linear layers, which then compute nothing themselves.

        ahead: blocks that have run already; asked for the same rows, they give what these became.
        """
        if self._layers and not self._pack:
            arrange_attention(run, attention_configs([self._root]))
        self._arranged = set(self._ready())
        recalls = {} if ahead is None else ahead.recalls(self._look)
        for layer in self._arranged:
            behind = self._next.get(layer)
            unseen = behind in self._arranged and not (layer.heard or behind.heard)
            layer.behind = behind if unseen else None
            run.replace(layer.module, recalls.get(layer, layer))
        if not self._pack:
            for layer in set(self._layers) - self._arranged:
                layer.arrange_activation(run)
        return {linear for layer in self._arranged for linear in layer.linears}

    def _ready(self) -> list[_Layer]:
        """Those that still are what their classes say, and are asked for torch's attention or ours."""
        written = self._samples.changed()
        # Those with a forward of their own run as they are; that of blocks which a run skips is another every time.
        theirs = [layer for layer in self._layers if "forward" not in layer.module.__dict__]
        if self._look is None or written or theirs != self._theirs or not _same(_look(self._below), self._look):
            self._look = None  # until all is settled: an interrupt may come
            below = (m for layer in theirs for m in layer.module.modules())
            self._theirs, self._below = theirs, [m for m in below if not isinstance(m, torch.jit.ScriptModule)]
            look = _look(self._below)  # before they are settled: what somebody changes meanwhile is seen next time
            self._settled = [layer for layer in self._layers if layer.settle(written)]
            self._samples = Samples(t for layer in self._layers for t in layer.copied)
            self._look = look
        configs = {id(config): config for config in (layer.config for layer in self._settled)}
        ours = {name for name, config in configs.items() if config._attn_implementation == KIND}
        return [layer for layer in self._settled if id(layer.config) in ours]

    def stop_before(self, run: VisionRun, but: Iterable[nn.Module], layer_weights: int) -> bool:
        """To be called when they are arranged: this run ends with `AtBlocks` where it asks for the first of them.

        but: blocks that the run skips; layer_weights: as `BlocksAhead` takes them. Returns whether it does: not where
        one of the others is not computed here.
        """
        unused = set(but)
        layers = [layer for layer in self._layers if layer.module not in unused]

        def stop(hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> None:
            raise AtBlocks(BlocksAhead(layers, hidden_states, attention_mask, options, layer_weights, self._look))

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
    products of a layer of the decoder, in whose rows times layers the work here is counted; look: what they are now.
    """

    def __init__(
        self,
        layers: list[_Layer],
        hidden: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        layer_weights: int,
        look: object,
    ):
        self._layers, self._options, self._hidden = layers, options, hidden
        own_masks = mask is not None and len(mask) == len(hidden)
        self._masks = mask.split(1) if mask is not None and own_masks else [mask] * len(hidden)
        self._pictures = hidden.split(1)
        self._became = [list[Tensor]() for _ in layers]  # of each block, what it made of the first pictures
        self._look = look
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
        try:
            self._became[k].append(self._layers[k](given, self._masks[b], **self._options))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # somebody has changed what it is since: transformers' code is going to say how it ends
            self._pictures, self._became, self._look = (), [[]], None

    def recalls(self, look: object) -> dict[_Layer, Callable[..., Tensor]]:
        """The blocks, which compute nothing where they are asked for what is known. look: what they are now.

        Empty where some have not run, or ran with other weights than they have now.
        """
        recalls, given = dict[_Layer, Callable[..., Tensor]](), self._hidden
        if self.done and look is self._look:
            for layer, became in zip(self._layers, map(torch.cat, self._became), strict=True):
                recalls[layer] = partial(_recalled, layer, given, became)
                given = became
        return recalls


def _recalled(
    layer: _Layer, given: Tensor, became: Tensor, hidden_states: Tensor, *args: Any, **options: Any
) -> Tensor:
    if hidden_states is given or torch.equal(hidden_states, given):
        return became
    return layer(hidden_states, *args, **options)


def _is_known(cls: type) -> bool:
    """Releases before 5 give a tuple, and some after them say FloatTensor of any tensor."""
    name, tensors = f"{cls.__module__}.{cls.__qualname__}", (Tensor, torch.FloatTensor)
    given = (*tensors, "torch.Tensor", "torch.FloatTensor")
    return name in _CLASSES and signature(cls.forward).return_annotation in given  # type: ignore[attr-defined]


class _Layer:
    """One block: norm, attention of all rows with all rows, norm, an MLP of two products."""

    def __init__(self, module: nn.Module, pack: bool):
        self.module = module
        self.behind: _Layer | None = None  # the next one, where nobody sees the rows in between
        self._given: tuple[Tensor, int, Tensor] | None = None  # rows, their version, and those behind its first norm
        self._join = _packed if pack else stacked
        self._parts: tuple[Any, ...] = ()
        self._plain = self.heard = False
        self._gelu: str | None = None
        self._quick = False
        self._state: list[Any] = []
        self.copied: list[Tensor] = []  # weights as they are in another layout here, and norms

    @property
    def linears(self) -> tuple[Any, ...]:
        return self._parts[5:]

    @property
    def weights(self) -> int:
        """Numbers in its products."""
        return sum(m.weight.numel() for m in self.linears)

    @property
    def config(self) -> Any:
        return self._parts[0].__dict__["config"]

    def settle(self, written: bool = False) -> bool:
        """Whether the block still is what its class says; weights that have changed are put together anew.

        written: some have, though nothing counted it.
        """
        parts, self.heard = _parts(self.module), is_heard(self.module)
        if written or parts != self._parts:  # somebody has put another module in, or other numbers
            self._parts, self._state = parts, []
        self._plain, kind = _are_plain(self.module, parts), type(parts[4]) if parts else nn.Module
        name = kind.__name__ if kind.__module__ == "transformers.activations" else ""
        self._gelu = _GELU.get(name) if self._plain and _calls_gelu(parts[4]) else None
        self._quick = name == "QuickGELUActivation"
        own = runs_its_class(type(self.module)) and "forward" not in self.module.__dict__
        own = own and not self.module._forward_pre_hooks  # which may write to the weights first
        if not self._plain or not own or not all(map(_is_untouched, parts)):
            return False
        if self.module.training or parts[0].training:  # which draws what attention drops
            return False
        tensors = [m._parameters.get(name) for m in (*parts[2:4], *self.linears) for name in ("weight", "bias")]
        if not all(map(is_plain, tensors)):
            return False
        if _state(tensors) != self._state:
            q, k, v, *others = self.linears
            kinds = {(t.dtype, t.device, t.is_inference()) for t in tensors}  # no stack has weights of both modes
            shapes = {m.weight.shape for m in (q, k, v)}
            tied = len({t.data_ptr() for t in tensors}) < len(tensors)  # one weight cannot be in two places of a stack
            if tied or len(kinds) > 1 or len(shapes) > 1 or not all(t.is_contiguous() for t in tensors[:4]):
                return False
            if self._join is _packed and packing_fault(tensors[0].dtype) is not None:
                return False
            self._qkv, self._out, self._fc1, self._fc2 = map(self._join, ([q, k, v], *([m] for m in others)))
            self._state = _state(tensors)
            if self._join is _packed:
                self.copied = tensors
        return True

    def arrange_activation(self, run: VisionRun) -> None:
        """In this run, of a block that somebody else computes: QuickGELU in one launch."""
        if not self._plain or not self._quick:
            return
        _, mlp, _, _, activation, *_, fc1, _ = self._parts
        plain = is_plain(fc1._parameters.get("weight"))  # whose product is contiguous
        if plain and all(map(_is_untouched, (mlp, activation, fc1))):  # else somebody may hold what is written over
            run.replace(activation, ops.quick_gelu_)

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """hidden_states [B, n, d] -> [B, n, d]."""
        attention, _, norm1, norm2, activation = self._parts[:5]
        batch, n, width = hidden_states.shape
        hidden = hidden_states.contiguous().view(batch * n, width)
        given, self._given = self._given, None
        if given is not None and given[0] is hidden_states and given[1] == version(hidden_states):
            rows = given[2]
        else:
            rows = ops.layer_norm(hidden, norm1.weight, norm1.bias, norm1.eps)
        qkv = self._qkv(rows)
        qkv = qkv.view(batch * n, 3, qkv.shape[1] // (3 * attention.head_dim), attention.head_dim)  # some may be pruned
        attended = self._out(attend_rows(attention, qkv, batch, attention_mask, **options))
        hidden, rows = ops.add_layer_norm(attended, hidden, norm2.weight, norm2.bias, norm2.eps)
        if self._gelu is not None:
            wide = self._fc1.gelu(rows, self._gelu)
        else:
            wide = self._fc1(rows)
            wide = ops.quick_gelu_(wide) if self._quick else activation(wide)
        return self._ended(self._fc2(wide), hidden, hidden_states.shape)

    def _ended(self, x: Tensor, hidden: Tensor, shape: torch.Size) -> Tensor:
        """Their sum; the block behind gets it with its norm."""
        if self.behind is None:
            return (x + hidden).view(shape)
        norm = self.behind._parts[2]
        total, rows = ops.add_layer_norm(x, hidden, norm.weight, norm.bias, norm.eps)
        total = total.view(shape)
        self.behind._given = total, version(total), rows
        return total


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
    return ours and all(type(m) is nn.LayerNorm for m in (norm1, norm2)) and all(type(m) is nn.Linear for m in linears)


def _calls_gelu(activation: nn.Module) -> bool:
    """Whether it calls torch's function, and not what its formula is in Python."""
    act = getattr(activation, "act", None)
    return getattr(act, "func", act) is nn.functional.gelu


def _is_untouched(module: nn.Module) -> bool:
    return runs_its_class(type(module)) and not is_heard(module)


def _look(modules: Sequence[nn.Module]) -> tuple[list[Any], list[Any]]:
    """All that decides what they compute, attributes like a norm's eps too, but for what is written through `.data`.

    The same objects and equal numbers as long as nothing has changed. One kind of thing after the other, without code
    of Python in between: before a run nothing of this is in the processor's caches.
    """
    if not modules:
        return [], []
    states = [*map(vars, modules)]
    parameters, *others = zip(*map(_STATE, states), strict=True)
    full = [*states, *filter(None, chain(parameters, *others))]
    objects = [*map(type, modules), *chain.from_iterable(full), *chain.from_iterable(map(dict.values, full))]
    objects += [getattr(cls, "forward", None) for cls in dict.fromkeys(map(type, modules))]
    tensors = [t for t in chain.from_iterable(map(dict.values, parameters)) if t is not None]
    return objects, [*map(len, full), *places(tensors), *versions(tensors)]


_STATE = operator.itemgetter("_parameters", "_modules", "_forward_pre_hooks", "_forward_hooks")


def _same(look: tuple[list[Any], list[Any]], before: tuple[list[Any], list[Any]]) -> bool:
    (objects, numbers), (objects_before, numbers_before) = look, before
    return numbers == numbers_before and all(map(operator.is_, objects, objects_before))


def _state(tensors: Sequence[Any]) -> list[Any]:
    return [*places(tensors), *versions(tensors)]


def _packed(modules: Any) -> Linear:
    """Their products as one."""
    weight, bias = (torch.cat([getattr(m, name).data for m in modules]) for name in ("weight", "bias"))
    linear = Linear(weight, bias)
    linear.pack()
    return linear
