"""Processors that take videos, and prompts with them.

The processors are transformers' own, text and all. Their video part needs torchvision: without it something small
stands in that gives the same tensors in names and shapes.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers.video_utils import VideoMetadata

from tests.families import zoo
from tests.families.zoo import PATCH, SIDE, WORDS

FAMILIES = ("llava_onevision", "internvl", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MARKS = {"qwen2_vl": "<break> <video> <end>", "qwen2_5_vl": "<break> <video> <end>", "qwen3_vl": "<break><video><end>"}


class Frames:
    """Square frames, [videos, T, 3, SIDE, SIDE]; `names` of what it gives."""

    model_input_names = ("pixel_values_videos",)
    num_frames, fps = 64, 1

    def __init__(self, pixels: str = "pixel_values_videos", masked: bool = False):
        self.pixels, self.masked = pixels, masked

    def __call__(self, videos: Any, video_metadata: Any, do_sample_frames: bool, **options: Any) -> Any:
        assert not do_sample_frames, "the frames given are those to be seen"
        clips = [clip for row in videos for clip in ([row] if isinstance(row, np.ndarray) else row)]
        data = self.tensors([torch.as_tensor(clip).permute(0, 3, 1, 2) / 127.5 - 1 for clip in clips])
        if options.get("return_metadata"):
            data["video_metadata"] = [VideoMetadata(**told) for told in video_metadata]
        return transformers.BatchFeature(data)

    def tensors(self, clips: list[torch.Tensor]) -> dict[str, Any]:
        pixels = torch.stack([F.interpolate(clip, (SIDE, SIDE)) for clip in clips])
        return {self.pixels: pixels} | (
            {"pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.long)} if self.masked else {}
        )


class QwenFrames(Frames):
    """Rows of 2 x 7 x 7 pixels, 2 x 2 of them one after the other, for frames of 4 x 6 patches, two frames a step."""

    model_input_names = ("pixel_values_videos", "video_grid_thw")
    merge_size = temporal_patch_size = 2

    def tensors(self, clips: list[torch.Tensor]) -> dict[str, Any]:
        rows, grids = [], []
        for clip in clips:
            frames = F.interpolate(torch.cat((clip, clip[-1:])) if len(clip) % 2 else clip, (4 * PATCH, 6 * PATCH))
            cut = frames.view(len(frames) // 2, 2, 3, 2, 2, PATCH, 3, 2, PATCH)
            rows.append(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * PATCH**2))
            grids.append([len(frames) // 2, 4, 6])
        return {"pixel_values_videos": torch.cat(rows), "video_grid_thw": torch.tensor(grids)}


def _real(family: str) -> Any:
    """transformers' own video part, as small as the test's models."""
    square = {"height": SIDE, "width": SIDE}
    if family.startswith("qwen"):
        name = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
        limits = dict(size={"shortest_edge": 4 * PATCH**2, "longest_edge": 256 * PATCH**2})
        return getattr(transformers, name)(patch_size=PATCH, merge_size=2, temporal_patch_size=2, **limits)
    if family == "smolvlm":
        size = {"longest_edge": SIDE}
        return transformers.SmolVLMVideoProcessor(size=size, max_image_size=size, num_frames=64, fps=1)
    name = {"internvl": "InternVLVideoProcessor", "llava_onevision": "LlavaOnevisionVideoProcessor"}[family]
    return getattr(transformers, name)(size=square)


def _stand_in(family: str) -> Any:
    if family == "smolvlm":
        return Frames("pixel_values", masked=True)
    return QwenFrames() if family.startswith("qwen") else Frames()


@cache
def processor(family: str) -> Any:
    """As zoo's, with a video part."""
    video = _real(family) if transformers.utils.is_torchvision_available() else _stand_in(family)
    if family == "smolvlm":
        return _smolvlm(video)
    built = zoo.FAMILIES[family].processor()
    built.video_processor = video
    return built


def _smolvlm(video: Any) -> Any:
    try:
        from transformers.models.smolvlm import processing_smolvlm as module
    except ImportError:
        pytest.skip("this transformers imports SmolVLM's processor only beside torchvision")
    module.num2words = module.num2words or str  # a package for the sentence that tells how many frames there are
    options = dict(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    pictures = zoo.image_processor("idefics3", "Idefics3ImageProcessor", **options)
    unchecked = {"check_argument_for_proper_class": lambda self, argument, value: None}
    cls = type("SmolVLMProcessor", (module.SmolVLMProcessor,), unchecked)
    return cls(pictures, zoo.tokenizer(), video, image_seq_len=4)


def clip(rng: random.Random, frames: int) -> np.ndarray:
    """uint8 [frames, H, W, 3], noise that drifts."""
    noise = np.frombuffer(rng.randbytes(40 * 60 * 3), dtype=np.uint8).reshape(40, 60, 3)
    return np.stack([np.roll(noise, 5 * t, axis=1) for t in range(frames)])


def prompts(family: str, seed: int, n: int) -> tuple[list[str], list[list[Image.Image]], list[list[np.ndarray]]]:
    """Random words with one or two videos of 2 to 5 frames, and where the family takes both a picture at times."""
    rng = random.Random(seed)
    texts, pictures, clips = [], [], []
    for number in range(n):
        images = 1 if family != "smolvlm" and number % 3 == 2 else 0
        videos = 2 if number % 4 == 1 and family != "smolvlm" else 1
        marks = [zoo.FAMILIES[family].mark] * images + [MARKS.get(family, "<video>")] * videos
        words = [f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(2, 12))]
        for mark in marks:
            words.insert(rng.randrange(len(words)), mark)
        texts.append(" ".join(words))
        pictures.append([zoo.picture(rng) for _ in range(images)])
        frames = rng.randint(2, 5)
        clips.append([clip(rng, frames) for _ in range(videos)])
    return texts, pictures, clips


def encode(family: str, words: str, pictures: list[Image.Image], clips: list[np.ndarray], fps: float = 2.0) -> Any:
    """The model inputs that transformers makes of a prompt whose frames are all to be seen."""
    told = [VideoMetadata(total_num_frames=len(c), fps=fps, frames_indices=[*range(len(c))]) for c in clips]
    inputs = processor(family)(
        text=[words],
        images=[pictures] if pictures else None,
        videos=[clips],
        return_tensors="pt",
        videos_kwargs=dict(do_sample_frames=False, video_metadata=told, fps=fps),
    )
    return {name: value for name, value in inputs.items() if name not in ("batch_num_images", "rows", "cols")}
