"""Whether a live HF decoder still computes what its class does: the engine reads its weights and runs none of its code.

So what somebody put around these weights (an adapter, a hook, a forward of their own, a quantised layer) would be
ignored. It is refused instead, when a model is taken over and at each call that comes from outside.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DecoderShape
from ..errors import ModelError

_PARTS = ("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")  # how names of classes end
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList)
_ACTIVATIONS = (("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation"))
# Hooks that record outputs for those who ask the forward for them, and what `VisionRun` arranges.
_HARMLESS = ("transformers.utils.output_capturing", "dyvte_engine.models.vision_run")
_MARKS_ONLY = ("make_inputs_require_grads", "make_inputs_require_grad")  # of transformers and peft: values stay
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def version(tensor: Tensor) -> int:
    """Counts changes in place, but those through `.data`. Tensors made under inference_mode do not count."""
    try:
        return int(tensor._version)
    except RuntimeError:
        return 0


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """`version` of each, in a third of the time where all of them count."""
    try:
        return [*map(_VERSION, tensors)]
    except RuntimeError:
        return [*map(version, tensors)]


_VERSION = operator.attrgetter("_version")


def places(tensors: Sequence[Tensor]) -> list[Any]:
    """Where these are, and how: what is cut or transposed through `.data` keeps its address and its version."""
    try:
        return [*map(Tensor.data_ptr, tensors), *map(Tensor.size, tensors), *map(Tensor.stride, tensors)]
    except RuntimeError:  # a sparse one is nowhere
        return places([t for t in tensors if t.layout is torch.strided])


def runs_its_class(cls: type) -> bool:
    """Whether it has the forward that it was written with: one that wraps this (`functools.wraps`) has its name."""
    forward = getattr(cls, "forward", None)
    return getattr(forward, "__module__", None) == cls.__module__ and _is_of(forward, cls.__module__)


def _is_of(forward: Any, home: str) -> bool:
    """Whether its code is of the package that module `home` is in, or of torch: both decorate forwards."""
    code = getattr(forward, "__globals__", {}).get("__name__", "")
    return code.partition(".")[0] in (home.partition(".")[0], "torch")


def is_patched(module: nn.Module) -> bool:
    """Whether this module has hooks or a forward of its own, those apart that change nothing."""
    return _is_touched(module.__dict__) and _patch_of(module) is not None


def is_heard(module: nn.Module) -> bool:
    """As `is_patched`, and also by what a `VisionRun` arranged there."""
    return _is_touched(module.__dict__) and _patch_of(module, _HARMLESS[:1]) is not None


def addresses(module: nn.Module) -> tuple[Any, ...] | None:
    """Where the weights of a module tree are, and what runs them; None if a part has hooks or a forward of its own."""
    tensors: list[Tensor | None] = []
    classes: list[type] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:  # as `_tree`, written out: a tower is looked at before every run, while the device waits
        m = waiting.pop()
        if m is None:
            continue
        if is_patched(m):
            return None
        classes.append(m.__class__)
        if m._parameters:  # not of `state`: a traced module keeps them elsewhere
            tensors += m._parameters.values()
        if m._modules:
            waiting += m._modules.values()
    forwards = [getattr(cls, "forward", None) for cls in dict.fromkeys(classes)]
    return module.training, *classes, *forwards, *places([t for t in tensors if t is not None])


def _is_touched(state: dict[str, Any]) -> bool:
    """A quick look for what `is_patched` judges, in a module's attributes."""
    return bool("forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"])


class Guard:
    """Looks at the decoder of `hf_model`, its LM head included; `language_model` is its name, as `Family` has it."""

    def __init__(self, hf_model: Any, language_model: str, shape: DecoderShape):
        self._hf, self._name, self._shape = hf_model, language_model, shape
        self._taken: tuple[Any, ...] = ()
        self._copied: list[Tensor] = []
        self._written: tuple[list[int], Tensor] = ([], torch.empty(0))

    def take(self, copied: Iterable[Tensor] = ()) -> None:
        """From here on `changed` compares with what the weights are now; of those `copied`, their values too.

        Raises ModelError, naming the module and what is off.
        """
        self._taken = self._look()
        self._check_layout()
        self._copied = list(copied)
        self._written = self._values()

    def changed(self) -> bool:
        """Whether a weight has been exchanged since `take` (or, if copied, written to). Raises as `take`.

        What writes through `.data` counts no change, as peft where it merges: of these, a number in every row is
        compared, another column in each.
        """
        if self._look() != self._taken:
            return True
        (counts, numbers), (counted, held) = self._values(), self._written
        return counts != counted or not torch.equal(numbers, held)

    def _values(self) -> tuple[list[int], Tensor]:
        """Of those copied, how often they were changed, and the bits of some of their numbers."""
        some = [t.detach().flatten()[:: max(1, t.shape[-1] - 1)] for t in self._copied]  # longer steps would miss rows
        return [version(t) for t in self._copied], torch.cat(some).view(torch.uint8) if some else torch.empty(0)

    def _look(self) -> tuple[Any, ...]:
        """Identifies the decoder's weights and sizes."""
        self._check_above()
        model = self._hf.model
        decoder = getattr(model, self._name) if self._name else model
        home = type(decoder).__module__
        classes: set[type] = set()
        weights: list[Tensor] = []
        norms: set[float] = set()
        kinds: set[str] = set()
        for module in (*_tree(decoder), self._hf.get_output_embeddings()):
            cls, state = type(module), module.__dict__
            if cls not in classes:
                self._check_class(module, home)
                classes.add(cls)
            if _is_touched(state):
                self._check_patch(module)
            if "scaling" in state:
                self._check_attention(module)
                kinds.add(state["config"]._attn_implementation)
            elif "variance_epsilon" in state:
                norms.add(state["variance_epsilon"])
            for tensor in state["_parameters"].values():
                if tensor is not None:
                    weights.append(tensor)
        self._check_settings(decoder, norms)
        for kind in kinds:
            _check_attention_function(kind)
        self._check_weights(weights)
        frequencies = decoder.rotary_emb
        turns = frequencies.inv_freq.data_ptr(), version(frequencies.inv_freq), frequencies.attention_scaling
        return (id(decoder), *turns, *norms, *[(w.data_ptr(), w.shape, w.stride()) for w in weights])

    def _check_above(self) -> None:
        """What is around the decoder, whose forwards are not run to their ends."""
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
            if getattr(nn.modules.module, name, None):
                raise ModelError("torch has forward hooks for all modules, which the engine does not call; remove them")
        for module in (self._hf, self._hf.model):
            cls = module.__class__  # not its type: `hf_model` may be a weak proxy
            if not (cls.forward.__module__.startswith("transformers.") and _is_of(cls.forward, "transformers")):
                raise ModelError(f"the model is a {_named(cls)}; accepted: transformers' own classes{_advice(cls)}")
            self._check_patch(module)

    def _check_class(self, module: nn.Module, home: str) -> None:
        cls = type(module)
        known = getattr(sys.modules[home], cls.__name__, None) is cls  # defined next to the decoder, or imported there
        own = known and cls.__name__.endswith(_PARTS) and cls.__module__.startswith("transformers.")
        if not (own or cls in _PLAIN or (cls.__module__, cls.__name__) in _ACTIVATIONS):
            raise ModelError(f"{self._where(module)} is a {_named(cls)}, which the engine does not run{_advice(cls)}")
        if not runs_its_class(cls) and cls is not nn.ModuleList:  # which has none
            theirs = f"{getattr(cls.forward, '__globals__', {}).get('__name__')}.{cls.forward.__qualname__}"
            raise ModelError(f"the forward of {cls.__name__} is {theirs}; accepted: transformers' own")

    def _check_patch(self, module: nn.Module) -> None:
        patch = _patch_of(module)
        if patch is not None:
            raise ModelError(f"{self._where(module)} has {patch}, which the engine would not run; remove it")

    def _check_attention(self, module: Any) -> None:
        shape, state = self._shape, module.__dict__
        wanted = {"scaling": shape.head_dim**-0.5, "head_dim": shape.head_dim, "is_causal": True}
        for name, value in wanted.items():
            if state.get(name, value) != value:
                raise ModelError(f"{self._where(module)}.{name} is {state[name]}; accepted: {value}")
        window = state.get("sliding_window")
        if window is not None and window < shape.max_positions:
            raise ModelError(f"{self._where(module)}.sliding_window is {window}; accepted: None")
        if state["training"] and state.get("attention_dropout"):
            given = f"{self._where(module)} is in training mode with attention_dropout {state['attention_dropout']}"
            raise ModelError(f"{given}; accepted: `model.eval()`, or no dropout")

    def _check_settings(self, decoder: Any, norms: set[float]) -> None:
        count = decoder.config.num_hidden_layers
        if not len(decoder.layers) == count == self._shape.num_layers:
            given = f"the decoder has {len(decoder.layers)} layers, its config {count}"
            raise ModelError(f"{given}; accepted: {self._shape.num_layers} as when it was taken over")
        if len(norms) != 1:
            raise ModelError(f"the decoder's norms have variance_epsilon {sorted(norms)}; accepted: one for all")
        if decoder.embed_tokens.max_norm is not None:
            raise ModelError(f"{self._where(decoder.embed_tokens)}.max_norm is set; accepted: None")
        for layer in decoder.layers:
            if "act_fn" not in layer.mlp._modules:
                raise ModelError(f"{self._where(layer.mlp)}.act_fn was exchanged; accepted: SiLU")

    def _check_layout(self) -> None:
        """Rows of weights are whole; projections that are computed as one have biases together."""
        decoder = getattr(self._hf.model, self._name) if self._name else self._hf.model
        for module in (*_tree(decoder), self._hf.get_output_embeddings()):
            if not all(t is None or t.is_contiguous() for t in module._parameters.values()):
                raise ModelError(f"{self._where(module)} has weights in another layout; accepted: contiguous")
        for layer in decoder.layers:
            attn, mlp = layer.self_attn, layer.mlp
            for together in ((attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)):
                if len({linear.bias is None for linear in together}) > 1:
                    raise ModelError(
                        f"{self._where(together[0])} and its kin: only some have a bias; accepted: all or none"
                    )
                if len({p.is_inference() for linear in together for p in linear.parameters()}) > 1:
                    given = f"{self._where(together[0])} and its kin: only some weights were made in inference mode"
                    raise ModelError(f"{given}; accepted: all or none")

    def _check_weights(self, weights: list[Tensor]) -> None:
        first = weights[0]
        dtype, device = first.dtype, first.device
        for w in weights:
            if type(w) is not nn.Parameter or w.dtype is not dtype or w.device != device or w.is_meta or not w.numel():
                name = next((n for n, p in self._hf.named_parameters() if p is w), "a weight")
                given = f"{name} is a {_named(type(w))}, {w.dtype} {list(w.shape)} on {w.device}"
                raise ModelError(f"{given}; accepted: whole plain weights, all of them {dtype} on one device")

    def _where(self, module: nn.Module) -> str:
        """The path of a module in the model."""
        found = next((name for name, m in self._hf.named_modules() if m is module), "")
        return found or "the model"


def _tree(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, as `modules()`, in a fraction of its time."""
    waiting = [module]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [m for m in module._modules.values() if m is not None]


def _patch_of(module: nn.Module, harmless: tuple[str, ...] = _HARMLESS) -> str | None:
    """What was put on a module that changes its forward, in words."""
    state = module.__dict__
    own = getattr(module.__class__, "forward", None)  # a scripted module's class has none
    if "forward" in state:
        given = state["forward"]
        if getattr(given, "__func__", False) is not own or vars(given.__self__) is not state:  # of another module
            return "a forward of its own"
    for name in _HOOKS:
        for hook in state[name].values():
            where = getattr(hook, "__module__", type(hook).__module__)
            called = getattr(hook, "__name__", type(hook).__name__)
            if where not in harmless and not (called in _MARKS_ONLY and where.startswith(("transformers.", "peft."))):
                return f"a {name[1:-1].replace('_', ' ')} ({called})"
    return None


def _check_attention_function(kind: str) -> None:
    if kind == "eager":
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(kind)
    function = getattr(function, "func", function)
    if not getattr(function, "__module__", "").startswith("transformers."):
        raise ModelError(f"the decoder's attention is {kind!r}, a function of your own; accepted: transformers' own")


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _advice(cls: type) -> str:
    return "; merge the adapter with `merge_and_unload()`" if cls.__module__.startswith("peft.") else ""
