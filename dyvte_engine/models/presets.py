"""Sizes of published LLaVA checkpoints as transformers configs, for models with random weights.

The numbers are those of the `config.json` of llava-hf/llava-1.5-7b-hf, llava-hf/llava-1.5-13b-hf and
llava-hf/llava-v1.6-vicuna-7b-hf. "llava-200m" is made for a CPU: LLaVA's prompt (576 visual tokens), 12 layers of
width 1024, and a tower of the same share of the work (4 %) as in LLaVA-1.5-7B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ModelError


def _llava(text: dict[str, Any], vision: dict[str, Any] | None = None, tiles: int = 1, tied: bool = False) -> Any:
    """A LLaVA config: Vicuna's vocabulary and a CLIP tower of 336 x 336 pixels in patches of 14."""
    import transformers

    clip = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **(vision or clip), image_size=336, patch_size=14, projection_dim=768
        ),
        text_config=transformers.LlamaConfig(
            **text,
            vocab_size=32064,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=32001,
        ),
        image_token_index=32000,
        image_seq_length=576 * tiles,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
        pad_token_id=32001,
    )


_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
_13B = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
_200M = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16)
_200M_TOWER = dict(hidden_size=320, intermediate_size=1280, num_hidden_layers=6, num_attention_heads=5)

PRESETS: dict[str, Callable[[], Any]] = {
    "llava-1.5-7b": lambda: _llava(_7B),
    "llava-1.5-13b": lambda: _llava(_13B),
    "llava-next-7b": lambda: _llava(_7B, tiles=5),
    "llava-200m": lambda: _llava(_200M, _200M_TOWER, tied=True),
}


def preset(name: str) -> Any:
    """The transformers config of one of `PRESETS`. Raises ModelError for another name."""
    if name not in PRESETS:
        raise ModelError(f"config {name!r} is not a preset; accepted: {', '.join(PRESETS)} or a transformers config")
    return PRESETS[name]()


def tiles(config: Any) -> int:
    """How many pictures of the tower's size one of the user's becomes: 1 for LLaVA-1.5, 5 for LLaVA-NeXT.

    The engine has no tiling of its own: give a prompt that many pictures and it has the model's visual tokens.
    """
    tower = config.vision_config
    return max(1, config.image_seq_length // (tower.image_size // tower.patch_size) ** 2)
