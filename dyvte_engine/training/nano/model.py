"""The architecture of nano: CLIP tower (144 patches), MLP projector, Llama decoder of 12 layers; its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dyvte_engine.training.nano import questions, scenes

try:  # transformers 5 has a PIL image processor next to the torchvision one
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
EXTRA = {"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT}
MAX_VOCAB = 768
MAX_POSITIONS = 2048
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from the questions themselves: any text can be encoded, capitals stay single letters."""
    corpus = []
    for index in range(4000):
        for asked in questions.ask_many(scenes.sample_scene(0, "train", index), 6):
            corpus += (
                [asked.text, asked.answer.lower(), asked.answer.capitalize()] if asked.kind != "word" else [asked.text]
            )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("[A-Z](?![a-z])", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=MAX_VOCAB,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=EXTRA,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor of the checkpoint; pictures become float32 [3, 96, 96]."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE},
        crop_size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, tiny: bool = False) -> LlavaConfig:
    """nano's configuration; `tiny` is a two-layer version for tests of the training code."""
    vision = CLIPVisionConfig(
        hidden_size=192 if not tiny else 32,
        intermediate_size=768 if not tiny else 32,
        num_hidden_layers=6 if not tiny else 1,
        num_attention_heads=3 if not tiny else 2,
        image_size=scenes.SIZE,
        patch_size=scenes.PATCH,
        projection_dim=192 if not tiny else 32,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=256 if not tiny else 32,
        intermediate_size=640 if not tiny else 32,
        num_hidden_layers=12 if not tiny else 2,
        num_attention_heads=4 if not tiny else 2,
        num_key_value_heads=2 if not tiny else 1,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=scenes.GRID**2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def build_model(config: LlavaConfig, seed: int, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A freshly initialised model; `eager` attention is what compiles best at these sizes."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    return LlavaForConditionalGeneration(config).to(dtype)


def normalise(pictures: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [B, 96, 96, 3] -> what the image processor gives, [B, 3, 96, 96]."""
    mean, std = (torch.tensor(v, device=pictures.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> None:
    """Writes a complete checkpoint folder in bfloat16 that plain transformers, 4.57 and 5, loads."""
    folder = Path(folder)
    model.generation_config.max_new_tokens = 32
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # where transformers 4 looks for it
    tokenizer_config = folder / "tokenizer_config.json"
    entries = json.loads(tokenizer_config.read_text())
    # the forms that both transformers 4 and 5 read
    entries |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": EXTRA}
    tokenizer_config.write_text(json.dumps(entries, indent=2) + "\n")
    _use_hub_names(folder / "model.safetensors")


def _use_hub_names(path: Path) -> None:
    """Renames the tower's weights to what published LLaVA-1.5 files use and every version reads."""
    new, hub = "vision_tower.", "vision_tower.vision_model."
    weights = {
        hub + name[len(new) :] if name.startswith(new) and not name.startswith(hub) else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
