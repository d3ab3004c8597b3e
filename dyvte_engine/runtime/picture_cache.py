"""Pictures that vision tower and projector have seen are kept as the rows they became, for every later request.

A picture is known by what the processor made of it (each tensor's name, shape, dtype and bytes), never by a path. What
the processor makes of equal pixels is kept too.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from ..kernels.transfer import to_device_together
from ..models import PreparedPrompt, TokenizedPrompt, VisionLanguageModel
from ..models.picture_scaling import Unscaled
from ..models.rows import runs
from ..models.vision_language import LookAhead
from ..policies import VisualTokenPolicy


@dataclass(frozen=True, eq=False)
class _Unit:
    """What the tower is asked for at once: a picture alone, with nothing but its placeholders around it.

    Where a prompt's pictures cannot be taken apart: all of them.
    """

    prompt: TokenizedPrompt
    digest: bytes


@dataclass(frozen=True, eq=False)
class Seen:
    """A prepared prompt.

    reused: how many of its pictures and videos the tower did not see again; None where nothing is shared.
    digest: what its pictures are known by, in their order.
    """

    prompt: PreparedPrompt
    reused: int | None
    digest: bytes


class PictureCache:
    """Prepares prompts for `model`, and keeps the rows of their pictures: at most `budget` bytes, latest used.

    The caller holds the device's lock.
    """

    def __init__(self, model: VisionLanguageModel, budget: int, digests: bool = False):
        """digests: whether somebody asks for them even where no rows are kept."""
        self._model, self.budget, self._digests = model, budget, digests
        self.bytes_held = 0
        self._rows: OrderedDict[Hashable, Tensor] = OrderedDict()  # [n, d] each
        self._units: WeakKeyDictionary[TokenizedPrompt, list[_Unit]] = WeakKeyDictionary()
        self.processor: Any = model.reader if model.sees_pictures else None
        images = getattr(self.processor, "image_processor", None)
        if budget and images is not None:
            self.processor = copy.copy(self.processor)
            self.processor.image_processor = _Remembering(images, budget // 4)

    @torch.inference_mode()
    def prepare(
        self, prompts: Sequence[TokenizedPrompt], policy: VisualTokenPolicy, ahead: LookAhead | None = None
    ) -> list[Seen]:
        """As `VisionLanguageModel.prepare`.

        Nothing is shared where positions have several axes, which come from transformers' code with the whole prompt,
        and under a policy that needs Python inside the tower, which has no key.
        """
        units, inside = self._keyed(prompts, policy)
        if inside is None:
            shown = self._shown(prompts)
            prepared = iter(self._model.prepare(shown, policy, ahead) if shown else [])
            every = [next(prepared) if p in shown else _assembled(self._model, p, []) for p in prompts]
            return [Seen(p, None, _digest(own)) for p, own in zip(every, units, strict=True)]
        found: dict[Hashable, Tensor] = {}
        new = self._new(units, inside)
        for unit in (u for own in units for u in own):
            key: Hashable = (unit.digest, inside)
            if key not in new:
                self._rows.move_to_end(key)
                found[key] = self._rows[key]
        seen = self._model.prepare(list(new.values()), policy, ahead) if new else []
        for key, rows in zip(new, (s.inputs_embeds for s in seen), strict=True):
            found[key] = rows
            self._keep(key, rows)
        out = []
        for prompt, own in zip(prompts, units, strict=True):
            reused = sum(_pictures(u.prompt) for u in own if (u.digest, inside) not in new)
            assembled = _assembled(self._model, prompt, [found[u.digest, inside] for u in own])
            out.append(Seen(assembled, reused, _digest(own)))
        return out

    def look_ahead(self, prompts: Sequence[TokenizedPrompt], policy: VisualTokenPolicy) -> LookAhead | None:
        """As `VisionLanguageModel.look_ahead`, of what is `unseen`."""
        return self._model.look_ahead(self.unseen(prompts, policy), policy)

    def unseen(self, prompts: Sequence[TokenizedPrompt], policy: VisualTokenPolicy) -> list[TokenizedPrompt]:
        """What `prepare` is going to show the tower: where pictures are shared, those whose rows are not here."""
        units, inside = self._keyed(prompts, policy)
        return self._shown(prompts) if inside is None else [*self._new(units, inside).values()]

    def _shown(self, prompts: Sequence[TokenizedPrompt]) -> list[TokenizedPrompt]:
        """Where nothing is shared: all but texts with plain positions, which need no code of transformers'."""
        return [p for p in prompts if p.inputs or self._model.family.axes > 1]

    def _keyed(
        self, prompts: Sequence[TokenizedPrompt], policy: VisualTokenPolicy
    ) -> tuple[list[list[_Unit]], Hashable]:
        """Their units, and what the policy does inside the tower; None: nothing is shared."""
        inside = policy.tower_key if policy.acts_in_tower else ()
        units = [self._units_of(p) for p in prompts]
        together = policy.acts_in_tower and any(len(own) < p.n_images for own, p in zip(units, prompts, strict=True))
        off = self.budget == 0 or self._model.family.axes > 1 or together
        return units, None if off else inside

    def _new(self, units: Sequence[Sequence[_Unit]], inside: Hashable) -> dict[Hashable, TokenizedPrompt]:
        """What the tower has to see: those whose rows are not here."""
        keys = {(u.digest, inside): u.prompt for own in units for u in own}
        return {key: prompt for key, prompt in keys.items() if key not in self._rows}

    def digest(self, prompt: TokenizedPrompt) -> bytes:
        """What its pictures are known by, in their order (`Seen.digest`)."""
        return _digest(self._units_of(prompt))

    def _units_of(self, prompt: TokenizedPrompt) -> list[_Unit]:
        if not (self.budget or self._digests):
            return []
        if prompt not in self._units:
            self._units[prompt] = _units(self._model, prompt)
        return self._units[prompt]

    def clear(self) -> None:
        """Forget all of them."""
        self._rows.clear()
        self.bytes_held = 0

    def _keep(self, key: Hashable, rows: Tensor) -> None:
        if rows.nbytes > self.budget:
            return
        self._rows[key] = rows
        self.bytes_held += rows.nbytes
        while self.bytes_held > self.budget:
            self.bytes_held -= self._rows.popitem(last=False)[1].nbytes


class _Remembering:
    """An image processor that gives again what it made of the same pixels: `budget` bytes of it, the latest used.

    Safe to use from several threads.
    """

    def __init__(self, processor: Any, budget: int):
        self._processor, self._budget, self._bytes = processor, budget, 0
        self._state = vars(getattr(processor, "own", processor))  # all it goes by
        self._made: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        if getattr(self._processor, "leaves", lambda _: False)(images):  # they stay what they are
            made = self._processor(images)
            for picture in made["pixel_values"].pictures:
                _ = picture.digest  # in the caller's time, not in that of who runs the steps
            return made
        pixels = hashlib.sha256(repr((self._state, sorted(options.items()))).encode())
        if not _add_pixels(pixels, images):
            return self._processor(images, **options)
        key = pixels.digest()
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return copy.copy(self._made[key])
        made = self._processor(images, **options)
        with self._lock:
            if key not in self._made and _bytes(made) <= self._budget:
                self._made[key] = copy.copy(made)
                self._bytes += _bytes(made)
            while self._bytes > self._budget:
                self._bytes -= _bytes(self._made.popitem(last=False)[1])
        return made


def _add_pixels(digest: Any, images: Any) -> bool:
    """Add what an image processor looks at; False where that is more than RGB pictures in lists."""
    if isinstance(images, (list, tuple)):
        digest.update(f"{len(images)} pictures ".encode())
        return all(_add_pixels(digest, image) for image in images)
    if not isinstance(images, Image.Image) or images.mode != "RGB":
        return False
    digest.update(f"{images.size} ".encode())
    digest.update(images.tobytes())
    return True


def _bytes(made: Any) -> int:
    return sum(t.nbytes for t in made.values() if isinstance(t, Tensor))


def digest_of(inputs: Mapping[str, Tensor | Unscaled]) -> bytes:
    """Equal for equal names, shapes, dtypes, bytes and ways of scaling, and for nothing else."""
    digest = hashlib.sha256()
    for name, given in sorted(inputs.items()):
        if isinstance(given, Unscaled):
            digest.update(f"{name} {len(given)} unscaled\n".encode() + b"".join(p.digest for p in given.pictures))
        else:
            digest.update(f"{name} {given.dtype} {list(given.shape)}\n".encode())
            digest.update(given.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _digest(units: Sequence[_Unit]) -> bytes:
    return b"".join(unit.digest for unit in units)


def _pictures(prompt: TokenizedPrompt) -> int:
    """Pictures and videos in it; videos count as one."""
    return prompt.n_images + any(name.startswith("pixel_values_videos") for name in prompt.inputs)


def _units(model: VisionLanguageModel, prompt: TokenizedPrompt) -> list[_Unit]:
    """In the order of their placeholders."""
    given = {name: t for name, t in prompt.inputs.items() if name in model.family.inputs}
    if not given:
        return []
    ids = torch.tensor(prompt.input_ids, device="cpu")
    visual = model.visual(ids)
    n, sizes = prompt.n_images, runs(visual)
    if model.family.same_rows and n:
        sizes = [int(visual.sum()) // n] * n
    apart = model.family.before_decoder and n == len(sizes) and all(len(t) == n for t in given.values())
    if not apart:
        return [_Unit(TokenizedPrompt(ids[visual].tolist(), given, n), digest_of(given))]
    out = []
    for i, part in enumerate(ids[visual].split(sizes)):
        alone = {name: _trimmed(t[i : i + 1]) for name, t in given.items()}
        out.append(_Unit(TokenizedPrompt(part.tolist(), alone, 1), digest_of(alone)))
    return out


def _trimmed(tensor: Tensor | Unscaled) -> Tensor | Unscaled:
    """Tiles [1, T, C, H, W] without those at the end that are all zero: they fill up what another picture has more."""
    if isinstance(tensor, Unscaled) or tensor.dim() != 5:
        return tensor
    some = tensor[0].flatten(1).any(dim=1).nonzero()
    return tensor[:, : int(some[-1]) + 1] if len(some) else tensor


def _assembled(model: VisionLanguageModel, prompt: TokenizedPrompt, units: Sequence[Tensor]) -> PreparedPrompt:
    """The prompt at the decoder's entry; `units`: rows [n, d] of its pictures, perhaps fewer than placeholders."""
    ids = torch.tensor(prompt.input_ids, device="cpu")
    visual = model.visual(ids)
    places = visual.nonzero()[:, 0]
    if sum(map(len, units)) < len(places):  # in the tower, which leaves equally many of each picture
        kept = places.view(len(units), -1)[:, : len(units[0])].flatten()
        stays = ~visual
        stays[kept] = True
        ids, visual = ids[stays], visual[stays]
        places = visual.nonzero()[:, 0]
    integers = (ids.masked_fill(visual, 0), torch.int64), (places, torch.int64)
    words, places = to_device_together(integers, model.device)
    embeds = model.decoder.embed(words)
    if units:
        embeds.index_copy_(0, places, torch.cat(list(units)))
    return PreparedPrompt(
        inputs_embeds=embeds,
        visual=visual,
        positions=torch.arange(len(visual), dtype=torch.int32, device=model.device),
        pictures=[len(rows) for rows in units] if model.family.same_rows and units else runs(visual),
    )
