"""Linear layers; on a CPU with weights a second time in the layout that they are multiplied in.

torch's own `linear` brings the weight into such a layout at every call, which for the few dozen rows of a prompt takes
as long as the product itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ops
from .guard import places, runs_its_class, version
from .vision_run import VisionRun

_ROWS = 64  # oneDNN picks a layout for about so many


@dataclass(eq=False)
class Linear:
    """weight [n, k], bias [n] or None; once packed also in `panels`, for our own kernel, or in oneDNN's layout."""

    weight: Tensor
    bias: Tensor | None = None
    panels: Tensor | None = None
    packed: Tensor | None = None
    gated: ClassVar[bool] = False  # whose panels are for `packed_silu_mul`, which takes no bias

    def pack(self) -> None:
        """Make the packed copy. The weight must not change afterwards."""
        if ops.multiplies_panels(self.weight.dtype) and not (self.gated and self.bias is not None):
            self.panels = ops.in_panels(self.weight, self.gated)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _ROWS)

    def _gains(self, rows: int) -> bool:
        """On Intel's processors MKL, torch's float32, is ahead for long prompts and in narrow layers (measured)."""
        if self.weight.dtype != torch.float32 or not ops.intel():
            return True
        return rows <= 48 or (rows <= 256 and self.weight.shape[1] >= 1024)

    def __call__(self, x: Tensor, workspace: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n]. Without panels our kernel is for a few rows: it reads the weight once, as it is.

        workspace: [rows, n] of at least as many rows as x [N, k]; the result may be there.
        """
        if x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        x = x if x.stride(-1) == 1 else x.contiguous()  # which our kernels ask for
        if self.panels is not None:
            rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            out = ops.packed_linear(rows, self.panels, self.bias, len(self.weight))
            return out if x.dim() == 2 else out.view(*x.shape[:-1], len(self.weight))
        if x.dim() == 2 and len(x) <= ops.few_rows(x.dtype, x.shape[1], self.packed is not None):
            return ops.linear(x, self.weight, self.bias)
        if self.packed is None or not self._gains(x.shape[:-1].numel()):
            if workspace is None or self.bias is not None:
                return F.linear(x, self.weight, self.bias)
            out, half = workspace[: len(x)], len(self.weight) // 2  # narrower products run closer to the peak
            torch.mm(x, self.weight[:half].t(), out=out[:, :half])
            torch.mm(x, self.weight[half:].t(), out=out[:, half:])
            return out
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def into(self, x: Tensor, out: Tensor) -> None:
        """x [N, k] -> out [N, n], by torch's product."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """GELU of the product; `approximate` as torch has it."""
        if self.packed is None or not self._gains(x.shape[:-1].numel()):
            return F.gelu(self(x), approximate=approximate)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "gelu", [], approximate)


class GateUp(Linear):
    """Of an MLP: weight [2 m, k], the gates first."""

    gated = True

    def __call__(self, x: Tensor, workspace: Tensor | None = None) -> Tensor:
        """x [N, k] -> SwiGLU [N, m]. workspace: [N or more, 2 m] to compute in, or None."""
        if self.panels is not None:
            return ops.packed_silu_mul(x, self.panels, len(self.weight) // 2)
        return ops.silu_mul(super().__call__(x, workspace))


def stacked(linears: Sequence[nn.Linear]) -> Linear:
    """Linears with one input as one. Their weights (and biases) become views of the stack, unless they are already."""
    weight = _stack([m.weight for m in linears])
    return Linear(weight, None if linears[0].bias is None else _stack([m.bias for m in linears]))


def _stack(parts: Sequence[Tensor]) -> Tensor:
    first, rows = parts[0].data, sum(map(len, parts))
    starts = accumulate((p.nbytes for p in parts), initial=first.data_ptr())
    one = {p.untyped_storage().data_ptr() for p in parts}
    if len(one) == 1 and all(p.data_ptr() == at and p.is_contiguous() for p, at in zip(parts, starts, strict=False)):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    with torch.inference_mode(first.is_inference()):  # weights that could be trained can be, and the others keep none
        whole = torch.cat([p.data for p in parts])
        for part, view in zip(parts, whole.split([len(p) for p in parts]), strict=True):
            part.data = view
    return whole


def some_bits(tensor: Tensor) -> Tensor:
    """Some of a weight's numbers, where they are. Of a weight that was copied they tell what its version does not.

    What writes through `.data` counts no change, as peft where it merges; and who holds them keeps the address.
    """
    bits = tensor.data.view(_BITS[tensor.element_size()])
    span = bits.numel() and 1 + sum((n - 1) * apart for n, apart in zip(bits.shape, bits.stride(), strict=True))
    step = span // 64 + 1  # through memory: a weight that is transposed there has no flat view
    return bits.as_strided((-(-span // step),), (step,))


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedLinears:
    """`nn.Linear`s of a live model that compute with packed weights where a run asks for it."""

    def __init__(self, modules: list[nn.Linear]):
        self._modules = modules
        self._packed: dict[nn.Linear, tuple[list[Any], Tensor, Tensor, Linear]] = {}

    def arrange(self, run: VisionRun, but: Set[nn.Module] = frozenset()) -> None:
        """They do in this run; a weight that has changed is packed anew, a module that was patched stays as it is.

        but: those that are not called.
        """
        if not runs_its_class(nn.Linear):
            return
        for module in self._modules:
            weight = module._parameters.get("weight")  # a module's own getattr takes longer than all of this
            if module in but or type(module) is not nn.Linear or "forward" in module.__dict__:
                continue
            bias = module._parameters.get("bias")
            if not is_plain(weight) or packing_fault(weight.dtype) is not None:
                continue
            if module._forward_pre_hooks or not (bias is None or bias.is_contiguous()):  # hooks may write to it first
                continue
            state = [version(weight), *places([weight] if bias is None else [weight, bias])]
            held, some, written, linear = self._packed.get(module, _NOT_YET)
            if state != held or not torch.equal(some, written):
                linear = _linear(module)
                linear.pack()
                some = some_bits(weight)
                self._packed[module] = state, some, some.clone(), linear
            run.replace(module, linear)


_NOT_YET: tuple[list[Any], Tensor, Tensor, Linear] = [], torch.empty(0), torch.empty(0), Linear(torch.empty(0))


def is_plain(weight: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Neither missing, nor quantised, nor sparse."""
    return type(weight) is nn.Parameter and weight.layout is torch.strided


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.data, None if module.bias is None else module.bias.data)


@functools.cache
def packing_fault(dtype: torch.dtype) -> str | None:
    """Try a packed product. Returns None if it works here, else the reason in one sentence."""
    if dtype == torch.float16:
        return "not used for float16"
    try:
        own = torch.Generator().manual_seed(0)  # nobody else's draws change
        x, weight, bias = (torch.randn(size, generator=own).to(dtype) for size in ((20, 48), (32, 48), (32,)))
        packed = Linear(weight, bias)
        packed.pack()
        if not torch.allclose(packed(x).float(), F.linear(x, weight, bias).float(), rtol=2e-2, atol=1e-1):
            return "its result differs from torch's linear"
    except Exception as e:  # whatever oneDNN raises is the reason it does not work here
        return f"{type(e).__name__}: {str(e).splitlines()[0]}"
    return None
