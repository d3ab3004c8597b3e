"""Plain records: the decoder's shape, read from a Hugging Face config, and the engine's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from .errors import InvalidArgumentError, ModelError

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
_SCALES = (  # of Granite, Gemma and kin
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_MAX_STALL = {"cpu": 1024, "cuda": 8192}  # row-layers: some decoding steps
_PICTURES = 1 << 28  # bytes: some thousand small pictures, or some fifty of a model of 7e9 weights
_PREFIXES = {"cpu": 1 << 30, "cuda": 0}
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the prompt's length


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of one Llama-family decoder; `rope_type` is transformers' name for the position encoding."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int

    @property
    def kv_bytes_per_row(self) -> int:
        """Numbers (not bytes of a dtype) that one cached token holds in one layer: K and V."""
        return 2 * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Any) -> DecoderShape:
        """Read the text config of a transformers model.

        Raises:
            ModelError: the decoder is not of the Llama family, or uses something the loop does not do.
        """
        if config.model_type not in _LLAMA_LIKE:
            raise ModelError(
                f"decoder model_type {config.model_type!r} is not supported; accepted: {', '.join(_LLAMA_LIKE)}"
            )
        scaled = [name for name in _SCALES if getattr(config, name, None) not in (None, 1)]
        if scaled:
            raise ModelError(f"decoder {scaled[0]} is {getattr(config, scaled[0])}; accepted: none")
        if config.hidden_act not in ("silu", "swish"):
            raise ModelError(f"decoder hidden_act {config.hidden_act!r} is not supported; accepted: silu")
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in _FIXED_ROPE:
            raise ModelError(f"rope_type {rope_type!r} is not supported; accepted: {', '.join(_FIXED_ROPE)}")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ModelError("decoders with sliding-window layers are not supported")
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            # A window that is never outgrown changes nothing, so it only bounds the prompt.
            max_positions=min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 1 << 30),
        )


class EngineOptions(TypedDict, total=False):
    """Options of `Engine.from_pretrained` and `Engine.from_config`.

    Attributes:
        attn_backend: "auto", "flash_attn_3", "flash_attn_4", "flash_attn", "torch_flash", "native" (on a CPU) or
            "sdpa"; of the prefill; decoding has a kernel of its own.
        max_batch, max_len: sequences run together, and prompt + answer tokens of each; they size the K/V pool.
            max_len defaults to the model's positions, at most 4096.
        page_size: rows of one K/V page.
        drop_early_kv: after the prefill, take the rows that left out of the earlier layers' K/V too.
        graphs: decoding runs captured steps: CUDA graphs, on a CPU tapes of kernel calls. On CUDA also prefill
            layers without visual tokens (not with "sdpa") and towers of one picture size.
        warm_up: capture all CUDA graphs now, some seconds, with a progress bar; else each at its first use, which
            the request that needs it waits for. A tape takes one step more at its first use.
        kv_memory: bytes of the K/V pool; default: what `max_batch` sequences of `max_len` tokens need, and
            `prefix_cache`. With less, requests wait until it can promise them what they need.
        max_stall: rows times layers of other prompts that a running answer may wait for between two of its tokens, at
            least one layer. A block of the vision tower counts by its share of a layer's weights where a tower can stop
            between blocks (CPU, packed weights, CLIP and SigLIP); elsewhere it runs as a whole. 0 is 1024 on a CPU,
            8192 on CUDA; with less the answers under way wait less, and fewer requests are answered in a second. On a
            CPU it is half of that while fewer than 8 requests are here, growing to all of it with 16.
        picture_cache: bytes for the rows that vision tower and projector made of pictures; later requests take
            them from there (docs/again.md). "auto" is 256 MiB, 0 none.
        prefix_cache: bytes for what prompts are up to their last visual token, most of them in the K/V pool; another
            question about the same pictures computes only its own text. "auto" is 1 GiB on a CPU, none on CUDA.
        fused_decode: on CUDA with float16 or bfloat16, decoding of up to 8 sequences runs a layer as five kernels
            (docs/performance.md); "auto": where that was measured to be faster.
        pack_weights: on a CPU, keep the linear layers' weights a second time, in the layout they are multiplied in
            (faster prompts); "auto": where all weights take at most a quarter of the machine's memory.
    """

    attn_backend: str
    max_batch: int
    max_len: int | None
    page_size: int
    drop_early_kv: bool
    graphs: bool
    warm_up: bool
    kv_memory: int | None
    max_stall: int
    picture_cache: int | str
    prefix_cache: int | str
    fused_decode: bool | str
    pack_weights: bool | str


@dataclass(frozen=True)
class EngineConfig:
    """`EngineOptions`, checked and decided."""

    device: torch.device
    dtype: torch.dtype
    attn_backend: str = "auto"
    max_batch: int = 8
    max_len: int | None = None
    page_size: int = 16
    drop_early_kv: bool = False
    graphs: bool = True
    warm_up: bool = True
    pack_weights: bool = False
    kv_memory: int | None = None
    max_stall: int = 0  # 0: as many as suits the device
    picture_cache: int | str = "auto"  # bytes
    prefix_cache: int | str = "auto"
    fused_decode: bool | str = "auto"

    def __post_init__(self) -> None:
        for name in ("drop_early_kv", "graphs", "warm_up", "pack_weights"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(f"{name} is a {type(getattr(self, name)).__name__}; accepted: True or False")
        if self.pack_weights and self.device.type != "cpu":
            raise InvalidArgumentError(f"pack_weights is True on {self.device}; accepted: False, it is for CPUs")
        if not isinstance(self.fused_decode, bool) and not _is_auto(self.fused_decode):
            raise InvalidArgumentError(f"fused_decode is {self.fused_decode!r}; accepted: True, False, 'auto'")
        if self.max_stall == 0:
            object.__setattr__(self, "max_stall", _MAX_STALL[self.device.type])
        _set_budget(self, "picture_cache", _PICTURES)
        _set_budget(self, "prefix_cache", _PREFIXES[self.device.type])
        for name in ("max_batch", "max_len", "page_size", "kv_memory", "max_stall"):
            value = getattr(self, name)
            optional = name in ("max_len", "kv_memory") and value is None
            if not optional and (type(value) is not int or not 1 <= value < 1 << 48):
                raise InvalidArgumentError(f"{name} is {value!r}; accepted: an integer of at least 1")


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"  # an array would compare its elements


def _set_budget(config: EngineConfig, name: str, auto: int) -> None:
    """Bytes of a cache, decided."""
    value = getattr(config, name)
    if value == "auto":
        object.__setattr__(config, name, auto)
    elif type(value) is not int or not 0 <= value < 1 << 48:
        raise InvalidArgumentError(f"{name} is {value!r}; accepted: 'auto', bytes, or 0 for none")
