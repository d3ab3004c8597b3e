"""Vision towers on a CPU: transformers' code computes its attention with the own kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.attention import MAX_HEAD_DIM, native_gains

_KIND = "sdpa"  # what transformers chooses by itself; a model that was asked for another keeps it
_KNOWN = {"scaling", "is_causal", "dropout", "output_hidden_states", "output_attentions", "return_dict", "use_cache"}


@contextmanager
def own_attention() -> Iterator[None]:
    """While this runs, attention without a mask is `varlen_attention`; everything else is as before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # seconds to import, and only models need it

    before = ALL_ATTENTION_FUNCTIONS[_KIND]

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        """q, k and v [B, H, n, D] -> [B, n, H, D]."""
        batch, _, n, dim = q.shape
        asked = {name for name, value in options.items() if value is not None}
        causal = options.get("is_causal", getattr(module, "is_causal", True))
        plain = attention_mask is None and causal is False and asked <= _KNOWN and not options.get("dropout")
        if not (plain and dim <= MAX_HEAD_DIM and q.shape == k.shape == v.shape and native_gains(q.dtype, n)):
            return before(module, q, k, v, attention_mask, **options)
        # a view, unless the heads of a row do not lie together
        q, k, v = (t.transpose(1, 2).flatten(2).flatten(0, 1).unflatten(1, (-1, dim)) for t in (q, k, v))
        cu = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32)
        out = ops.varlen_attention(q, k, v, cu, options.get("scaling") or dim**-0.5, causal=False)
        return out.unflatten(0, (batch, n)), None

    ALL_ATTENTION_FUNCTIONS[_KIND] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[_KIND] = before
