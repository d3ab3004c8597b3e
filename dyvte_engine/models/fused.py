"""A decoding step in five kernels a layer, on CUDA: its products with what comes before and after them, and attention.

The usual way needs eight launches, each of which drains and refills the device, and a product whose library is
made for more rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DeviceError
from ..kernels import ops
from .decoder import Decoder

MOST_ROWS = 8  # one of each sequence
_MEASURED: dict[tuple[str, int], int] = {("NVIDIA H100 80GB HBM3", 4096): 4}
"""By the GPU's name and the hidden size: up to so many rows it is faster than the usual way (`benchmarks.decoding`).
GPUs of one compute capability differ in memory, which is what decoding waits for."""

_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}  # CUDA's guide

OneLayer = tuple[Tensor, Tensor, Tensor, Tensor]  # positions, block_table, lens, lens + 1 of all sequences


class FusedLayers:
    """All layers and the LM head for one row of each of at most `most` sequences.

    It counts in memory of its own, so it is for one stream at a time.

    Attributes:
        most: as far as the normalised rows fit into the shared memory of one multiprocessor.
    """

    def __init__(self, decoder: Decoder, most: int = MOST_ROWS):
        self.decoder, self.most = decoder, most
        self._arrived = torch.zeros(most * decoder.shape.num_heads, dtype=torch.int32, device=decoder.norm.device)

    def run(self, hidden: Tensor, k_pool: Tensor, v_pool: Tensor, of_layer: Sequence[OneLayer]) -> Tensor:
        """hidden [B, d] at the decoder's entry, which is written over -> f32 logits [B, vocab].

        Appends a row to the cache of each sequence and layer; pools and tables as in `ops.decode_attention`.
        """
        decoder = self.decoder
        for this, (positions, table, lens, kv_lens) in zip(decoder.layers, of_layer, strict=True):
            entry = hidden, this.input_norm, this.eps, this.qkv.weight, this.qkv.bias
            q = ops.norm_qkv_append_(*entry, decoder.cos_sin, positions, k_pool, v_pool, table, lens)
            read = ops.decode_attention(q, k_pool, v_pool, table, kv_lens, decoder.scale, self._arrived)
            ops.add_linear_(hidden, read.flatten(1), this.out.weight, this.out.bias)
            inner = ops.norm_gate_up(hidden, this.post_norm, this.eps, this.gate_up.weight, this.gate_up.bias)
            ops.add_linear_(hidden, inner, this.down.weight, this.down.bias)
        return ops.norm_linear(hidden, decoder.norm, decoder.eps, decoder.lm_head.weight, decoder.lm_head.bias)


def fused_layers(decoder: Decoder, asked: bool | str) -> FusedLayers | None:
    """For the engine's option `fused_decode`; with "auto", where it was measured to be faster.

    Raises:
        DeviceError: it is asked for, and does not work here.
    """
    reason = why_not(decoder)
    if asked is True and reason is not None:
        raise DeviceError(f"fused_decode does not work here: {reason}; accepted: False, 'auto'")
    if not asked or reason is not None:
        return None
    device = decoder.norm.device
    wanted = (
        MOST_ROWS
        if asked is True
        else _MEASURED.get((torch.cuda.get_device_name(device), decoder.shape.hidden_size), 0)
    )
    most = min(wanted, _fitting(decoder.shape.hidden_size, _shared_bytes(device)))
    return FusedLayers(decoder, most) if most > 0 else None


def why_not(decoder: Decoder) -> str | None:
    """Why no kernel covers this decoder, in a few words; None where they do, for some number of rows."""
    shape, norm = decoder.shape, decoder.norm
    if norm.device.type != "cuda":
        return f"it is for CUDA, not {norm.device}"
    if norm.dtype == torch.float32:
        return "it is for float16 and bfloat16, not float32"
    if any(layer.qk_norm is not None for layer in decoder.layers):
        return "queries and keys are normalised"
    if shape.head_dim % 16 or decoder.cos_sin.shape[1] != shape.head_dim:
        return f"it turns heads as a whole, of a multiple of 16 channels, not {shape.head_dim}"
    if shape.hidden_size % 8 or shape.intermediate_size % 8:
        return f"sizes {shape.hidden_size} and {shape.intermediate_size} are no multiples of 8"
    if any(p.weight.data_ptr() % 16 for p in decoder.linears):
        return "a weight does not begin at a multiple of 16 bytes"
    fits = _fitting(shape.hidden_size, _shared_bytes(norm.device))
    return None if fits else f"a row of {shape.hidden_size} does not fit into its shared memory"


def _shared_bytes(device: torch.device) -> int:
    """What a block may have."""
    return _SHARED_KIB.get(torch.cuda.get_device_capability(device), 99) << 10


def _fitting(hidden_size: int, shared_bytes: int) -> int:
    """So many normalised rows fit, as csrc/cuda/decode_linear.cu lays them out, with its 9 KiB for sums."""
    row = 2 * (-(-hidden_size // 64) * 64 + 32)
    return min(MOST_ROWS, (shared_bytes - 9216) // row)
