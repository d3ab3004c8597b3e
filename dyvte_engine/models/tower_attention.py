"""Attention of vision towers: on a CPU transformers' code computes it with this project's kernel.

It is one more entry in transformers' registry of attentions, which the configs of a tower name while it runs here.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.attention import MAX_HEAD_DIM, native_gains
from .vision_run import VisionRun

KIND = "dyvte_engine"
_REPLACED = "sdpa"  # what transformers chooses by itself; a model that was asked for another keeps it
_KNOWN = {"scaling", "is_causal", "dropout", "output_hidden_states", "output_attentions", "return_dict", "use_cache"}
_run = threading.local()  # `active` in threads inside a run


def attention_configs(parts: Iterable[nn.Module]) -> list[Any]:
    """The configs that say which attention the modules inside `parts` take.

    Not those with configs inside: setting it in a config of several models would set it in all of them.
    """
    configs: dict[int, Any] = {id(m.config): m.config for part in parts for m in part.modules() if hasattr(m, "config")}
    return [config for config in configs.values() if not getattr(config, "sub_configs", None)]


def arrange_attention(run: VisionRun, configs: Iterable[Any]) -> None:
    """In this run, attention without a mask under `configs` is `varlen_attention`; everything else is as before.

    Nothing is arranged where somebody has put an attention of their own in the place of transformers'.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # seconds to import, and only models need it

    if ALL_ATTENTION_FUNCTIONS[_REPLACED] is not sdpa_attention_forward:
        return
    _register()
    _run.active = getattr(_run, "active", 0) + 1
    run.finally_(_left)
    for config in configs:
        if config._attn_implementation == _REPLACED:
            config._attn_implementation = KIND
            run.finally_(functools.partial(_put_back, config))


def _put_back(config: Any) -> None:
    """Unless somebody has chosen another one meanwhile."""
    if config._attn_implementation == KIND:
        config._attn_implementation = _REPLACED


def _left() -> None:
    _run.active -= 1


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(KIND, attend)
    AttentionMaskInterface.register(KIND, sdpa_mask)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """As transformers calls its attentions: q, k and v [B, H, n, D] -> [B, n, H, D] and None."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, _, n, dim = q.shape
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    ours = getattr(_run, "active", 0) and q.shape == k.shape == v.shape and not learns and not q.is_cuda
    if not ours or not _is_plain(module, q.dtype, n, dim, attention_mask, options):
        return sdpa_attention_forward(module, q, k, v, attention_mask, **options)
    # a view, unless the heads of a row are apart, or the columns of a product of somebody's own
    q, k, v = (t.transpose(1, 2).flatten(2).flatten(0, 1).unflatten(1, (-1, dim)) for t in (q, k, v))
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = ops.varlen_attention(q, k, v, _starts(batch, n), options.get("scaling") or dim**-0.5, causal=False)
    return out.unflatten(0, (batch, n)), None


def attend_rows(module: Any, qkv: Tensor, batch: int, mask: Tensor | None, **options: Any) -> Tensor:
    """As `attend` in a run, of qkv [B * n, 3, H, D]: what each row asks for and holds -> [B * n, H * D]."""
    n, dim = len(qkv) // batch, qkv.shape[-1]
    if not qkv.is_cuda and _is_plain(module, qkv.dtype, n, dim, mask, options):
        q, k, v = qkv.unbind(1)
        return ops.varlen_attention(q, k, v, _starts(batch, n), module.scale, causal=False).flatten(1)
    q, k, v = qkv.unflatten(0, (batch, n)).permute(2, 0, 3, 1, 4)
    out, _ = attend(module, q, k, v, mask, scaling=module.scale, dropout=0.0, **options)
    return out.reshape(len(qkv), -1)


def _is_plain(module: Any, dtype: torch.dtype, n: int, dim: int, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether our kernel does what is asked for, and gains by it."""
    asked = {name for name, value in options.items() if value is not None}
    causal = options.get("is_causal", getattr(module, "is_causal", True))
    plain = mask is None and causal is False and asked <= _KNOWN and not options.get("dropout")
    return plain and dim <= MAX_HEAD_DIM and native_gains(dtype, n)


@functools.lru_cache(16)
def _starts(batch: int, n: int) -> Tensor:
    """int32 [B + 1], where the rows of each picture begin."""
    with torch.inference_mode(False):
        return torch.arange(0, (batch + 1) * n, n, dtype=torch.int32)
