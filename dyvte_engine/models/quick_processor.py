"""transformers' LlavaProcessor without its detours: pictures stay bytes until they are on the device.

transformers turns a picture into floats in several passes over it on the host. Of a byte, rescaling and normalising
make one of 256 numbers for each channel, so a table of those, made by the checkpoint's own processor, says the same
bit for bit. Scaling may be left to the device too (`picture_scaling`). And the processor writes a picture's mark once
for every row, which the tokenizer then reads again.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from itertools import starmap
from types import FunctionType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_processors import pil_image_processor
from .picture_scaling import Axis, Unscaled, UnscaledPicture, axis, knows_pil, scaled, scales_as_pil

_KNOWN = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "llava": "LlavaImageProcessor"}
_SIZES = ((31, 43), (61, 24), (97, 97), (640, 36))  # of the pictures that are compared at loading
_FEW = 4  # rows of pixels that transformers 4 may take for channels


class QuickProcessor:
    """Called as transformers' LlavaProcessor, for one prompt: the same ids, in lists, and `pixel_values` as uint8
    [P, 3, H, W].

    What it was not made for goes to the checkpoint's own processor: other arguments, other pictures than RGB ones of
    PIL, or anything after the processor was changed. `values` [3, 256] f32: what a byte of each channel stands for.
    `unscaled`: what PIL would scale stays as it came (`Unscaled`), for the device to scale.
    """

    def __init__(self, processor: Any, unscaled: bool = False):
        """Raises _Unlike where it would not give the same."""
        fault = _unknown(processor)
        if fault is not None:
            raise _Unlike(fault)
        self.own, self._before = processor, _state(processor)
        self.image_processor: Any = ByteImages(processor.image_processor)
        self.values = _values(processor.image_processor)
        self._id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._text, self._rows = _asked(processor), 0
        self._compare()
        self.image_processor.unscaled = unscaled and self.image_processor.scales_alike(_noise())

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> dict[str, Any]:
        pictures = [] if images is None else images[0]
        special = options.get("add_special_tokens", True)
        usual = options == dict(return_tensors="pt", add_special_tokens=special) and _state(self.own) == self._before
        marks = text[0].count(self.own.image_token)
        if not (usual and len(text) == 1 and marks == len(pictures) and self.image_processor.takes(pictures)):
            return self._as_it_does(text, images, options)
        ids = self.own.tokenizer(text, **{**self._text, "add_special_tokens": special})["input_ids"][0]
        if ids.count(self._id) != marks:
            return self._as_it_does(text, images, options)
        whole = [one for i in ids for one in ([i] * self._rows if i == self._id else [i])]
        made = dict(self.image_processor(pictures)) if pictures else {}
        return dict(made, input_ids=[whole])

    def _as_it_does(self, text: list[str], images: Any, options: dict[str, Any]) -> dict[str, Any]:
        made = dict(self.own(text=text, images=images, **options))
        made["input_ids"], pixels = made["input_ids"].tolist(), made.get("pixel_values")
        if isinstance(pixels, Tensor) and pixels.dtype is torch.uint8:  # changed so that it neither scales nor shifts
            made["pixel_values"] = pixels.float()
        return made

    def _compare(self) -> None:
        """Look at what both make of some pictures and texts."""
        noise, mark = _noise(), self.own.image_token
        for pictures, special in ((noise, True), (noise[:1], False), ([], True), ([], False)):
            text = mark.join(["One, ", *["\ntwo. "] * len(pictures)])
            given: dict[str, Any] = dict(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
            want = self.own(**given, add_special_tokens=special)
            ids = want["input_ids"][0].tolist()
            self._rows = self._rows or ids.count(self._id) // len(pictures)
            got = self(**given, add_special_tokens=special)
            if got["input_ids"][0] != ids:
                raise _Unlike(f"its tokenizer reads {mark} in its own way")
            pixels = got["pixel_values"] if pictures else None
            if pixels is not None and pixels.dtype is not torch.uint8:
                raise _Unlike(f"it makes {pixels.dtype} of pictures where it neither scales nor shifts")
            if pixels is not None and not torch.equal(picture_values(self.values, pixels), want["pixel_values"]):
                raise _Unlike("it makes other pixels")


class ByteImages:
    """An image processor that stops at the bytes: RGB pictures of PIL -> `pixel_values` uint8 [P, 3, H, W].

    `own` is the checkpoint's. Where that uses PIL, the same is done here, or with `unscaled` left to the device; one
    that uses torchvision scales itself.
    """

    def __init__(self, own: Any):
        self.own, self._before, self.unscaled = own, deepcopy(vars(own)), False
        self._pil = type(own) in {pil_image_processor(*names) for names in _KNOWN.items()}
        size, crop = ({} if value is None else dict(value) for value in (own.size, getattr(own, "crop_size", None)))
        self._crop = (crop["height"], crop["width"]) if getattr(own, "do_center_crop", False) else None
        self._size, self._pad = size if own.do_resize else None, bool(getattr(own, "do_pad", False))
        if self._size is not None and set(size) not in ({"height", "width"}, {"shortest_edge"}):
            raise _Unlike(f"it scales pictures to {size}")
        if self._crop is None and (self._size is None or "height" not in size):
            raise _Unlike("its pictures are of several sizes")

    def takes(self, pictures: Sequence[Any]) -> bool:
        """Whether it knows these, and `own` is as it was."""
        return all(map(_plain, pictures)) and vars(self.own) == self._before

    def leaves(self, pictures: Sequence[Image.Image]) -> bool:
        """Whether these are left to the device."""
        sizes = [(max(p.size), max(p.size)) if self._pad else p.size for p in pictures]
        return self.unscaled and all(starmap(scales_as_pil, sizes))

    def scales_alike(self, pictures: Sequence[Image.Image]) -> bool:
        """Whether `scaled` makes of these what PIL does, of which there are other builds."""
        if not self._pil or self._size is None or not knows_pil():
            return False
        made = scaled([self._unscaled(pictures)], torch.device("cpu"))
        return torch.equal(made, self._bytes(pictures).long())

    def __call__(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor | Unscaled]:
        if not self._pil:
            return dict(self.own(list(pictures), do_rescale=False, do_normalize=False, return_tensors="pt"))
        return {"pixel_values": self._unscaled(pictures) if self.leaves(pictures) else self._bytes(pictures)}

    def _bytes(self, pictures: Sequence[Image.Image]) -> Tensor:
        """uint8 [P, 3, H, W]"""
        return torch.from_numpy(np.stack([self._cut(self._squared(p)) for p in pictures]))

    def _unscaled(self, pictures: Sequence[Image.Image]) -> Unscaled:
        whole = [self._squared(p) for p in pictures]
        return Unscaled(tuple(UnscaledPicture(torch.from_numpy(np.array(p)), *self._axes(p)) for p in whole))

    def _cut(self, picture: Image.Image) -> np.ndarray:
        """uint8 [3, H, W]"""
        from transformers.image_transforms import center_crop

        if self._size is not None:
            height, width = self._scaled(picture)
            picture = picture.resize((width, height), resample=self.own.resample)
        array = np.asarray(picture).transpose(2, 0, 1)
        if self._crop is None or self._crop == array.shape[1:]:
            return array
        return center_crop(array, self._crop, "channels_first", "channels_first")

    def _axes(self, picture: Image.Image) -> tuple[Axis, Axis]:
        """As `_cut`."""
        (height, width), resample = self._scaled(picture), self.own.resample
        rows, columns = self._crop or (height, width)
        down = axis(picture.height, height, (height - rows) // 2, rows, resample)
        return down, axis(picture.width, width, (width - columns) // 2, columns, resample)

    def _scaled(self, picture: Image.Image) -> tuple[int, int]:
        from transformers.image_transforms import get_resize_output_image_size

        assert self._size is not None
        if "height" in self._size:
            return self._size["height"], self._size["width"]
        shape = np.broadcast_to(np.uint8(0), (3, picture.height, picture.width))
        edge = self._size["shortest_edge"]
        return get_resize_output_image_size(shape, edge, False, input_data_format="channels_first")

    def _squared(self, picture: Image.Image) -> Image.Image:
        if not self._pad:
            return picture
        side = max(picture.size)
        mean = self.own.image_mean
        square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in mean) if mean else 0)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square


def _plain(picture: Any) -> bool:
    """Whether no processor looks at anything but its bytes."""
    known = isinstance(picture, Image.Image) and picture.mode == "RGB" and "transparency" not in picture.info
    return known and picture.height >= _FEW


def _noise() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in _SIZES]


def quick_processor(processor: Any, unscaled: bool = False) -> tuple[QuickProcessor | None, str | None]:
    """A processor that gives the same more quickly, or None and why there is none."""
    with torch.inference_mode(False), torch.device("cpu"):
        try:
            return QuickProcessor(processor, unscaled), None
        except _Unlike as why:
            return None, str(why)
        except Exception as error:  # of transformers, whatever a processor that is not whole leads to
            return None, f"{type(error).__name__}: {error}"


def picture_values(values: Tensor, pixels: Tensor) -> Tensor:
    """values [3, 256], pixels uint8 or int64 [P, 3, H, W] -> [P, 3, H, W] in the dtype of `values`, on its device."""
    index = pixels.flatten(2).long()
    return values.expand(len(pixels), -1, -1).gather(2, index).view(pixels.shape)


class _Unlike(Exception):
    """Why the checkpoint's processor is not imitated."""


def _unknown(processor: Any) -> str | None:
    """What speaks against it before anything is tried; None: nothing."""
    import transformers

    if processor is None:
        return "there is no processor"
    if type(processor) is not transformers.LlavaProcessor:
        return f"the processor is a {type(processor).__name__}"
    pictures, token = processor.image_processor, processor.image_token
    home, name = type(pictures).__module__, type(pictures).__name__.removesuffix("Pil").removesuffix("Fast")
    if not any(home.startswith(f"transformers.models.{m}.") and name == known for m, known in _KNOWN.items()):
        return f"its image processor is a {type(pictures).__name__}"
    for part in (processor, pictures):
        owned = {name: f for cls in reversed(type(part).__mro__) for name, f in vars(cls).items() if callable(f)}
        strange = [n for n, f in owned.items() if not str(getattr(f, "__module__", None)).startswith(_HOMES)]
        strange += [n for n in vars(part) if n in owned]
        if strange:
            return f"{type(part).__name__}.{strange[0]} is replaced"
    added = processor.tokenizer.added_tokens_decoder.get(processor.tokenizer.convert_tokens_to_ids(token))
    if not processor.tokenizer.is_fast or added is None or added.content != token:
        return f"its tokenizer does not know {token} as one token"
    return f"its tokenizer looks around {token}" if added.normalized or added.single_word else None


_HOMES = ("transformers.", "builtins", "typing", "None")


def _state(processor: Any) -> dict[str, Any]:
    """All that ids and pictures depend on; of the tokenizer, which is still asked, what makes more of several marks."""
    parts = {name: value for name, value in vars(processor).items() if name != "chat_template"}
    tokens = {"vocabulary": len(processor.tokenizer), "init_kwargs": dict(processor.tokenizer.init_kwargs)}
    classes = [cls for part in (processor, processor.image_processor) for cls in type(part).__mro__]
    methods = [f for cls in classes for f in vars(cls).values() if isinstance(f, FunctionType)]
    return {**parts, **tokens, "methods": methods}


def _values(pictures: Any) -> Tensor:
    """f32 [3, 256]: what the processor makes of the bytes of each channel."""
    ramp = Image.fromarray(np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (8, 256, 3)).copy())
    off = {name: False for name in ("do_resize", "do_center_crop", "do_pad") if hasattr(pictures, name)}
    made = pictures([ramp], return_tensors="pt", **off)
    values = made["pixel_values"][0, :, 0]
    if values.shape != (3, 256) or values.dtype != torch.float32:
        raise _Unlike(f"it makes {values.dtype} {list(values.shape)} of 256 bytes")
    return values.clone()


def _asked(processor: Any) -> dict[str, Any]:
    """What the processor asks its tokenizer for."""
    spied, asked = copy(processor), _Spy(processor.tokenizer)
    spied.tokenizer = asked
    spied(text=["one"], return_tensors="pt", add_special_tokens=True)
    (options,) = asked.calls
    if options.get("truncation") or options.get("padding"):
        raise _Unlike("its tokenizer truncates or pads")
    return {**options, "return_tensors": None}


class _Spy:
    """Passes everything on, and remembers what it was called with."""

    def __init__(self, spied: Any):
        self._spied = spied
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spied, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append(options)
        return self._spied(*args, **options)
