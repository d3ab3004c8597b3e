"""A Hugging Face vision-language checkpoint: its processor, vision tower and projector are used as they are.

How the decoder's input is had: the HF model runs up to the entry of its `language_model`, where `inputs_embeds` and
`position_ids` are taken and the forward ends. What happens before (tower, projection, merging the pictures into the
placeholders) is HF's own code for every family.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import DecoderShape
from ..errors import ModelError, PromptError
from .decoder import Decoder
from .vision import VisionTower, padded_features

if TYPE_CHECKING:
    from ..policies import VisualTokenPolicy


@dataclass(frozen=True)
class Family:
    """What differs between families: the transformers class and the names of the image-token id in its config."""

    model_class: str
    image_token_id: tuple[str, ...] = ("image_token_id", "image_token_index")


FAMILIES = {"llava": Family("LlavaForConditionalGeneration")}


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """One prompt after the processor: ids with placeholders expanded, pixel_values of its pictures, seconds it took."""

    input_ids: list[int]
    pixel_values: Tensor | None
    n_images: int
    seconds: float


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """One prompt at the decoder's entry.

    inputs_embeds [n, d], visual bool [n] (on the host), positions int32 [n], and the visual rows of each picture.
    """

    inputs_embeds: Tensor
    visual: Tensor
    positions: Tensor
    pictures: list[int]


class _AtEntry(Exception):
    """Carries what reached the language model."""

    def __init__(self, kwargs: dict[str, Any]):
        self.kwargs = kwargs


def _stop_at_entry(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    raise _AtEntry(kwargs)


class VisionLanguageModel:
    """A live HF model with its processor, and the `Decoder` made of its language model."""

    def __init__(self, hf_model: Any, processor: Any, name: str, max_len: int | None):
        config = hf_model.config
        if config.model_type not in FAMILIES:
            raise ModelError(f"model_type {config.model_type!r} is not supported; accepted: {', '.join(FAMILIES)}")
        family = FAMILIES[config.model_type]
        _check_finite(hf_model)
        self.hf = hf_model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.shape = DecoderShape.from_hf(config.get_text_config())
        self.image_token_id = next(int(getattr(config, n)) for n in family.image_token_id if hasattr(config, n))
        self.language_model = hf_model.model.language_model
        self.fingerprint = _fingerprint(config, self.language_model)
        self.decoder = Decoder(self.language_model, hf_model.get_output_embeddings(), self.shape, max_len)

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.device

    @cached_property
    def vision(self) -> VisionTower:
        """The vision tower, for policies that act in it. Raises ModelError for towers they cannot act in."""
        return VisionTower.of(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.dtype

    def tokenize(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> list[TokenizedPrompt]:
        """Run the processor on each text (image marks inside) with its PIL pictures."""
        return [self._tokenize_one(text, pictures) for text, pictures in zip(texts, images, strict=True)]

    def _tokenize_one(self, text: str, pictures: Sequence[Any]) -> TokenizedPrompt:
        started = time.perf_counter()
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        encoded = self.processor(
            text=[text],
            images=list(pictures) or None,
            return_tensors="pt",
            add_special_tokens=not (bos and text.startswith(bos)),  # the template may have written it already
        )
        ids = encoded["input_ids"][0].tolist()
        if not ids:
            raise PromptError("prompts holds an empty prompt")
        pixels = encoded["pixel_values"] if pictures else None
        return TokenizedPrompt(ids, pixels, len(pictures), time.perf_counter() - started)

    @torch.inference_mode()
    def prepare(
        self, prompts: Sequence[TokenizedPrompt], policy: VisualTokenPolicy | None = None
    ) -> list[PreparedPrompt]:
        """Run vision tower, projector and embedding (all pictures as one batch) up to the decoder's entry.

        A `policy` (bound to this model) that acts in the tower shortens the pictures and closes the gaps.
        """
        longest = max(len(p.input_ids) for p in prompts)
        # Right padding: true rows come first, so neither embeddings nor positions depend on it.
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, row_mask, p in zip(ids, mask, prompts, strict=True):
            row[: len(p.input_ids)] = torch.tensor(p.input_ids)
            row_mask[: len(p.input_ids)] = 1
        pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
        extra = {"pixel_values": torch.cat(pixels).to(self.device, self.dtype)} if pixels else {}
        inputs = dict(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **extra)
        visual = ids == self.image_token_id
        full = kept = int(visual.sum()) // max(sum(p.n_images for p in prompts), 1)  # rows of a picture
        if policy is None or not policy.acts_in_tower or not pixels:
            entry = self._run_to_entry(**inputs)
        else:
            with policy.in_tower(self.vision), padded_features(self.vision.projector, full) as seen:
                entry = self._run_to_entry(**inputs)
            kept = seen[0]
        positions = entry.get("position_ids")
        if positions is None:
            positions = torch.arange(longest, device=self.device)[None]
        positions = positions.expand(len(prompts), -1).to(torch.int32)
        out = []
        for b, p in enumerate(prompts):
            n, embeds, marks = len(p.input_ids), entry["inputs_embeds"][b], visual[b]
            if kept < full:
                stay = ~marks | ((marks.cumsum(0) - 1) % full < kept)  # the first rows of each picture; padding follows
                stay[n:] = False
                rows = stay.nonzero()[:, 0]
                embeds, marks, n = embeds[rows.to(embeds.device)], marks[rows], len(rows)
            out.append(PreparedPrompt(embeds[:n], marks[:n], positions[b, :n], [kept] * p.n_images))
        return out

    def _run_to_entry(self, **inputs: Any) -> dict[str, Any]:
        handle = self.language_model.register_forward_pre_hook(_stop_at_entry, with_kwargs=True)
        try:
            self.hf.model(**inputs, use_cache=False)
        except _AtEntry as entry:
            return entry.kwargs
        finally:
            handle.remove()
        raise ModelError(f"{self.name}: the forward never reached its language_model")


def load_model(
    path: str | Path, dtype: torch.dtype, device: torch.device, max_len: int | None, trust_remote_code: bool
) -> VisionLanguageModel:
    """Load a checkpoint folder or hub id with transformers, safetensors only.

    Raises:
        ModelError: not found, damaged, pickled weights only, unsupported family, NaN weights.
    """
    import transformers

    name = str(path)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if config.model_type not in FAMILIES:
            raise ModelError(
                f"model_type {config.model_type!r} of {name} is not supported; accepted: {', '.join(FAMILIES)}"
            )
        cls = getattr(transformers, FAMILIES[config.model_type].model_class)
        hf_model = cls.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as e:  # transformers raises OSError, ValueError, SafetensorError, ... depending on what is wrong
        raise ModelError(f"cannot load {name}: {type(e).__name__}: {str(e).strip().splitlines()[0]}") from e
    return VisionLanguageModel(hf_model.to(device), processor, name, max_len)


def _check_finite(module: torch.nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"weight {name!r} holds NaN or infinity")


def _fingerprint(config: Any, language_model: Any) -> str:
    """16 hex digits that tell checkpoints apart: sizes, and a sample of every layer's weights in bf16."""
    text = config.get_text_config()
    digest = hashlib.sha256(
        f"{config.model_type} {text.hidden_size} {text.num_hidden_layers} {text.vocab_size}".encode()
    )
    for layer in language_model.layers:
        for weight in (layer.input_layernorm.weight, layer.self_attn.q_proj.weight[:1], layer.mlp.up_proj.weight[:1]):
            digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
