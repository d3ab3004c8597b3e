"""VILA-1.5 as its authors store it: folders `llm`, `vision_tower` and `mm_projector`, each a checkpoint of its own.

The decoder and the tower are transformers' own; only the projector, which first joins 2 x 2 patches, is not. So a live
LLaVA model is put together from the three, with that projector in place of LLaVA's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from .image_processors import pil_image_processor
from .original import TEMPLATE
from .strict import check_stored, load_whole, stored_config


class DownsamplingProjector(nn.Module):
    """Patches [P, side * side, C] -> [P, ceil(side / 2) ** 2, d]; the grid is filled up with zeros to an even side.

    Four patches become one row of 4 C (upper left, upper right, lower left, lower right); rows come column by column.
    """

    needs_grid = True

    def __init__(self, features: int, hidden_size: int):
        super().__init__()
        parts = (nn.Identity(), nn.LayerNorm(4 * features), nn.Linear(4 * features, hidden_size), nn.GELU())
        self.layers = nn.Sequential(*parts, nn.Linear(hidden_size, hidden_size))  # numbered as in the checkpoint

    def forward(self, patches: Tensor) -> Tensor:
        side = int(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side, side))
        grid = F.pad(grid, (0, 0, 0, side % 2, 0, side % 2))
        joined = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [P, row, 2, column, 2, C]
        return self.layers(joined.permute(0, 3, 1, 2, 4, 5).flatten(3).flatten(1, 2))


def is_vila(name: str) -> bool:
    """Whether this is a folder in that layout."""
    return "llm_cfg" in stored_config(name)


def load_vila(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A live LLaVA model and its processor.

    Raises:
        ModelError: another projector or feature selection, or weights missing, left over or of another shape.
    """
    import transformers

    root = Path(folder)
    config = json.loads((root / "config.json").read_text())
    projector_type = json.loads((root / "mm_projector" / "config.json").read_text()).get("mm_projector_type")
    if projector_type != "mlp_downsample":
        raise ModelError(f"mm_projector_type of {folder} is {projector_type!r}; accepted: mlp_downsample")
    if (ratio := config.get("image_aspect_ratio", "resize")) != "resize":
        raise ModelError(f"image_aspect_ratio of {folder} is {ratio!r}; accepted: resize")
    llm = load_whole(transformers.AutoModelForCausalLM, root / "llm", dtype)
    tower = load_whole(transformers.AutoModel, root / "vision_tower", dtype)
    vision = tower.config
    if vision.model_type != "siglip_vision_model":
        raise ModelError(f"the vision tower of {folder} is {vision.model_type!r}; accepted: siglip_vision_model")
    processor, image_id, rows = _processor(root, vision)
    _grow(llm, rows)
    llava = transformers.LlavaConfig(
        vision_config=vision,
        text_config=llm.config,
        image_token_index=image_id,
        vision_feature_layer=config["mm_vision_select_layer"],
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(llava)
    model.model.language_model, model.lm_head = llm.model, llm.lm_head
    model.model.vision_tower = tower
    model.model.multi_modal_projector = _projector(root / "mm_projector", vision.hidden_size, llm, dtype)
    model.generation_config = llm.generation_config
    return model.eval().requires_grad_(False), processor


def _projector(folder: Path, features: int, llm: Any, dtype: torch.dtype) -> DownsamplingProjector:
    from safetensors.torch import load_file

    check_stored(folder)
    projector = DownsamplingProjector(features, llm.config.hidden_size)
    try:
        projector.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    except RuntimeError as e:
        raise ModelError(f"{folder}: {' '.join(str(e).split())}") from e
    return projector.to(dtype)


def _processor(root: Path, vision: Any) -> tuple[Any, int, int]:
    """The processor, the id of a picture's placeholder and the rows that the vocabulary needs."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "llm", trust_remote_code=False)
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True, normalized=False)])
    side = -(-(vision.image_size // vision.patch_size) // 2)
    processor = transformers.LlavaProcessor(
        pil_image_processor("siglip", "SiglipImageProcessor").from_pretrained(root / "vision_tower"),
        tokenizer,
        # One row for a "patch" as large as the picture, and the others on top.
        patch_size=vision.image_size,
        num_additional_image_tokens=side * side - 1,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return processor, tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer)


@torch.no_grad()
def _grow(llm: Any, rows: int) -> None:
    """New rows are the mean of the old ones: as logits they never win, and nobody looks them up."""
    before = llm.config.vocab_size
    if rows <= before:
        return
    llm.resize_token_embeddings(rows, mean_resizing=False)
    for weight in (llm.get_input_embeddings().weight, llm.get_output_embeddings().weight):
        weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
