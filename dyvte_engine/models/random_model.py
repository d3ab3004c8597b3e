"""A LLaVA model with random weights, made on the device from its config, and a processor that needs no download.

It says nothing sensible, but takes the time, the memory and the code paths of a real one.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import DecoderShape
from ..errors import ModelError
from .image_processors import pil_image_processor

_TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def random_model(config: Any, seed: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers `LlavaForConditionalGeneration`, initialised as transformers does it; alike for a seed and device.

    Raises:
        ModelError: not a LLaVA config, or a decoder the engine does not run.
    """
    import transformers

    if getattr(config, "model_type", None) != "llava":
        given = getattr(config, "model_type", type(config).__name__)
        raise ModelError(f"config is of model_type {given!r}; accepted: llava")
    DecoderShape.from_hf(config.get_text_config())
    before = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype)  # no float32 copy of a model that may not fit
            model = transformers.LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    text = config.get_text_config()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model.eval().requires_grad_(False)


def byte_processor(config: Any) -> Any:
    """A LlavaProcessor for the config's tower whose tokenizer has a token for every byte.

    Raises:
        ModelError: the vocabulary has no room for 256 bytes and the special tokens.
    """
    import transformers

    tower = config.vision_config
    square = {"height": tower.image_size, "width": tower.image_size}
    pictures = pil_image_processor("clip", "CLIPImageProcessor")
    return transformers.LlavaProcessor(
        image_processor=pictures(size=square, do_center_crop=False, crop_size=square),
        tokenizer=_byte_tokenizer(config),
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower.model_type == "clip_vision_model"),  # its class token
        chat_template=_TEMPLATE,
    )


def _byte_tokenizer(config: Any) -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    text, image = config.get_text_config(), getattr(config, "image_token_id", None)
    image = config.image_token_index if image is None else image
    eos = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    given = {"<s>": text.bos_token_id, "</s>": eos, "<pad>": text.pad_token_id, "<image>": image}
    vocab = {token: number for token, number in given.items() if number is not None}
    free = [i for i in range(text.vocab_size) if i not in vocab.values()]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    if len(free) < len(symbols):
        raise ModelError(f"config has vocab_size {text.vocab_size}; accepted: at least {len(symbols) + len(vocab)}")
    vocab |= dict(zip(symbols, free, strict=False))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=["<image>"],
        **{name: token for name, token in names.items() if token in vocab},
    )
