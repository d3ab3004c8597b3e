"""A Hugging Face vision-language checkpoint: its processor, vision tower and projector are used as they are.

How inputs reach the decoder: the HF model runs up to the entry of its `language_model`, where `inputs_embeds` and
`position_ids` are taken and the forward ends. What happens before (tower, projection, merging the pictures into the
placeholders) is HF's own code for every family.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import is_real, is_whole
from ..config import DecoderShape
from ..errors import ImageError, InvalidArgumentError, ModelError, PromptError, first_line
from ..kernels.transfer import to_device, to_device_together
from .decoder import Decoder
from .families import Family, family_of, join, visual_ids
from .guard import Guard, addresses
from .intern_vit import tell_states
from .linear import PackedLinears
from .picture_scaling import Unscaled, scaled
from .placeholders import count_on_host
from .quick_processor import picture_values, quick_processor
from .rotary import rotations
from .rows import runs
from .tower_attention import arrange_attention, attention_configs
from .tower_graphs import TowerGraphs
from .tower_layers import AtBlocks, BlocksAhead, TowerLayers, skip, unused_blocks
from .vision import VisionTower
from .vision_run import VisionRun

if TYPE_CHECKING:
    from ..policies import VisualTokenPolicy


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """One prompt after the processor.

    input_ids with placeholders expanded; `inputs` as the family names them, on the host (a `token_inputs` may be
    shorter than the ids: 0 for the others; pictures of a quick processor are bytes still, for a model on CUDA as they
    came, whatever device sees them then); n_images of the user's pictures, videos not counted; seconds it took.
    """

    input_ids: list[int]
    inputs: dict[str, Tensor | Unscaled]
    n_images: int
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """One prompt at the decoder's entry.

    Attributes:
        inputs_embeds: [n, d].
        visual: bool [n], on the host.
        positions: int32 [n]; with several axes the next token comes one after the last of them.
        pictures: visual rows of each picture.
        rotations: f32 [n, rot_dim] where positions have several axes.
        additions: [n, d] each, what is added to the residual stream leaving the first layers (deepstack).
    """

    inputs_embeds: Tensor
    visual: Tensor
    positions: Tensor
    pictures: list[int]
    rotations: Tensor | None = None
    additions: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class LookAhead:
    """What `blocks` of a tower make of the pictures of these prompts, whose `inputs` are those of the model."""

    prompts: Sequence[TokenizedPrompt]
    inputs: dict[str, Tensor]
    blocks: BlocksAhead


class VisionLanguageModel:
    """A live HF model with its processor, and the `Decoder` made of its language model.

    Without a processor it takes embeddings only; `family` is for models that are none of a known family. Prompts go
    through a `QuickProcessor`; `slow_because` says why not, where they go through the processor itself.
    """

    def __init__(self, hf_model: Any, processor: Any, name: str, max_len: int | None, family: Family | None = None):
        config = hf_model.config
        self.family = family or family_of(config, name)
        self.shape = DecoderShape.from_hf(config.get_text_config())
        inner = self.family.language_model
        self.guard = Guard(hf_model, inner, self.shape)
        _check_finite(hf_model)
        self.guard.take()
        self.hf = hf_model
        self._processor = processor
        self.name = name
        self.visual_ids = visual_ids(self.family, config)
        self.language_model = getattr(hf_model.model, inner) if inner else hf_model.model
        self.tower_graphs: TowerGraphs | None = None
        self.packed_vision: PackedLinears | None = None
        self.tower_layers: TowerLayers | None = None
        self.fingerprint = _fingerprint(config, self.language_model)
        with torch.inference_mode(False), torch.no_grad():  # weights must not become tensors of inference alone
            self.decoder = Decoder(self.language_model, hf_model.get_output_embeddings(), self.shape, max_len)
            self._quick, self.slow_because = quick_processor(processor, unscaled=self.device.type == "cuda")
            self._values = None if self._quick is None else self._quick.values.to(self.device, self.dtype)
        self.guard.take()

    @property
    def sees_pictures(self) -> bool:
        """Whether there is a processor; else the vision code is elsewhere."""
        return self._processor is not None

    @property
    def processor(self) -> Any:
        """Raises ModelError where there is none: the vision code lives elsewhere."""
        if self._processor is None:
            given = f"{self.name} has no processor: its vision code lives elsewhere"
            raise ModelError(f"{given}; accepted: Engine.prefill(inputs_embeds, visual_mask)")
        return self._processor

    @property
    def reader(self) -> Any:
        """What prompts go through: the processor, or what gives the same more quickly. Raises as `processor`."""
        return self.processor if self._quick is None else self._quick

    def pack(self) -> None:
        """On a CPU: keep all linear layers' weights a second time, packed. They must not change then."""
        for linear in self.decoder.linears:
            linear.pack()
        decoder = {*self.language_model.modules(), self.hf.get_output_embeddings()}
        vision = [m for m in self.hf.modules() if type(m) is torch.nn.Linear and m not in decoder]
        self.packed_vision = PackedLinears(vision)
        self.tower_layers = TowerLayers(self.hf.model)
        self.guard.take(p for m in decoder if type(m) is torch.nn.Linear for p in m.parameters())

    def capture_tower(self) -> None:
        """From here on the tower runs as CUDA graphs, where it sees pictures of one size."""
        if self.tower_graphs is None and self.family.tiles and hasattr(self.hf.model, "vision_tower"):
            tower = self.hf.model.vision_tower
            self.tower_graphs = TowerGraphs(tower, layers=TowerLayers(tower, pack=False))

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.dtype

    @cached_property
    def vision(self) -> VisionTower:
        """The vision tower, for policies that act in it. Raises ModelError for towers they cannot act in."""
        if not self.family.in_tower:
            raise ModelError(f"policies cannot act in the vision tower of a {self.hf.config.model_type} model")
        return VisionTower.of(self.hf)

    def check(self, policy: VisualTokenPolicy) -> None:
        """Raises ModelError when `policy` needs what this family does not give (the policy's own checks aside).

        And InvalidArgumentError when it wants to be asked after layers that are not there.
        """
        kind, last = self.hf.config.model_type, self.shape.num_layers - 1
        asked = policy.layers(last + 1)
        if not (isinstance(asked, (set, frozenset)) and all(is_whole(n) and -1 <= n <= last for n in asked)):
            given = f"{type(policy).__name__}.layers({last + 1}) is {asked!r}"
            raise InvalidArgumentError(f"{given}; accepted: a set of layers, -1 to {last}")
        if policy.acts_before_decoder and not self.family.before_decoder:
            raise ModelError(f"a {kind} model's pictures have no plain row order: policies cannot act before layer 0")
        layers = self.shape.num_layers
        if self.family.axes > 1 and any(policy.renumbers(n, layers) for n in policy.layers(layers)):
            raise ModelError(f"a {kind} model has positions of {self.family.axes} axes: policies cannot renumber rows")

    def visual(self, input_ids: Tensor) -> Tensor:
        """Integer ids -> bool, where they mark a visual row."""
        return torch.isin(input_ids, torch.tensor(self.visual_ids, device=input_ids.device))

    def count_visual(self, input_ids: Sequence[int]) -> int:
        """How many of them mark a visual row."""
        return sum(map(input_ids.count, set(self.visual_ids)))

    def tower_passes(self, prompt: TokenizedPrompt) -> int:
        """Pictures, tiles and frames that the tower sees; 0 for towers that take any size."""
        given = [prompt.inputs[name] for name in ("pixel_values", "pixel_values_videos") if name in prompt.inputs]
        return sum(map(_tiles, given)) if self.family.tiles else 0

    def tokenize(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Any]],
        videos: Sequence[Sequence[Any]] | None = None,
        video_fps: float = 2.0,
        processor: Any = None,
    ) -> list[TokenizedPrompt]:
        """Run the processor on each text (marks inside) with its PIL pictures and its videos, uint8 [T, H, W, 3].

        All frames are used; `video_fps` of them are a second. `processor`: one that gives the same as `reader`.
        Raises InvalidArgumentError where the family takes none, and for frames that follow each other in no time.
        """
        if not (is_real(video_fps) and 0 < video_fps < math.inf):
            raise InvalidArgumentError(f"video_fps is {video_fps!r}; accepted: above 0")
        videos = [[] for _ in texts] if videos is None else videos
        return [
            self._tokenize_one(text, pictures, clips, video_fps, processor or self.reader)
            for text, pictures, clips in zip(texts, images, videos, strict=True)
        ]

    def _tokenize_one(
        self, text: str, pictures: Sequence[Any], clips: Sequence[Any], video_fps: float, processor: Any
    ) -> TokenizedPrompt:
        started = time.perf_counter()
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        arguments = self._video_arguments(pictures, clips, video_fps) if clips else {}
        try:
            with torch.device("cpu"):  # whatever device the caller has made the default
                encoded = processor(
                    text=[text],
                    images=[list(pictures)] if pictures else None,
                    return_tensors="pt",
                    add_special_tokens=not (bos and text.startswith(bos)),  # the template may have written it already
                    **arguments,
                )
        except Exception as e:  # of a picture that it scales to no pixels, for one
            if isinstance(e.__context__, KeyboardInterrupt):  # which transformers 4 takes for an error of its own
                raise e.__context__ from None
            kind = ImageError if pictures or clips else PromptError
            raise kind(f"the checkpoint's processor cannot take the prompt: {type(e).__name__}: {first_line(e)}") from e
        ids = encoded["input_ids"][0]  # a list already of a quick processor
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        if not ids:
            raise PromptError("prompts holds an empty prompt")
        names = (*self.family.inputs, *self.family.token_inputs) if pictures or clips else ()
        found = {name: encoded[name] for name in names if name in encoded}
        given = {k: v if isinstance(v, Unscaled) else torch.as_tensor(v, device="cpu") for k, v in found.items()}
        return TokenizedPrompt(ids, given, len(pictures), time.perf_counter() - started)

    def _video_arguments(self, pictures: Sequence[Any], clips: Sequence[Any], fps: float) -> dict[str, Any]:
        """What the processor takes for videos whose frames have been chosen already."""
        kind, family = self.hf.config.model_type, self.family
        if not family.videos or getattr(self.processor, "video_processor", None) is None:
            raise InvalidArgumentError(f"videos is given; this {kind} model's processor takes pictures only")
        if pictures and family.videos == "alone":
            raise InvalidArgumentError(f"images and videos are given; a {kind} model's prompt takes either")
        if family.tiles and len({len(c) for c in clips}) > 1:
            given = f"videos of one prompt have {', '.join(str(len(c)) for c in clips)} frames"
            raise InvalidArgumentError(f"{given}; a {kind} model's processor takes equally many")
        metadata = [dict(total_num_frames=len(c), fps=fps, frames_indices=list(range(len(c)))) for c in clips]
        options = dict(do_sample_frames=False, video_metadata=metadata, fps=fps)
        return dict(videos=[list(clips)], videos_kwargs=options)

    @torch.inference_mode()
    def prepare(
        self,
        prompts: Sequence[TokenizedPrompt],
        policy: VisualTokenPolicy | None = None,
        ahead: LookAhead | None = None,
    ) -> list[PreparedPrompt]:
        """Run vision tower, projector and embedding (all pictures as one batch) up to the decoder's entry.

        A `policy` (bound to this model) that acts in the tower shortens the pictures and closes the gaps. `ahead`: what
        `look_ahead` gave for the prompts and has run since.
        """
        if _of_several_lengths(prompts):  # which no batch can hold
            return [one for p in prompts for one in self.prepare([p], policy)]
        known = ahead is not None and list(ahead.prompts) == list(prompts)  # not of others, nor of some of them
        with VisionRun(self.hf.model):  # nobody else's run comes between
            pictures = {} if known else self._pictures(prompts)
            inside = policy if policy is not None and policy.acts_in_tower else None
            graphs = self._graphs_with(inside)
            if graphs is not None and "pixel_values" in pictures:
                graphs.begin(pictures["pixel_values"], self._graph_key(inside))
            n_images, lengths = sum(p.n_images for p in prompts), [len(p.input_ids) for p in prompts]
            ids = _padded([p.input_ids for p in prompts])
            visual = self.visual(ids)
            if ahead is not None and known:
                return self.prepare_inputs(ahead.inputs, lengths, n_images, policy, visual, ahead.blocks)
            return self.prepare_inputs(self._batch(prompts, ids, pictures), lengths, n_images, policy, visual)

    @torch.inference_mode()
    def look_ahead(
        self, prompts: Sequence[TokenizedPrompt], policy: VisualTokenPolicy | None = None
    ) -> LookAhead | None:
        """The blocks that the pictures pass in the tower, to be run in slices before `prepare`.

        None where there are no pictures, or the tower can only run as a whole: its blocks are none of `TowerLayers`, a
        policy acts in it, or somebody hooked it, who would be called twice.
        """
        inside = policy is not None and policy.acts_in_tower
        if self.tower_layers is None or inside or not any(p.inputs for p in prompts) or _of_several_lengths(prompts):
            return None
        if any(addresses(part) is None for part in self._vision_parts):
            return None
        with VisionRun(self.hf.model) as run:
            self._arrange(run, None, 0)
            if not self.tower_layers.stop_before(run, self._unused_blocks, self.decoder.layer_weights):
                return None
            inputs = self._batch(prompts, _padded([p.input_ids for p in prompts]), self._pictures(prompts))
            try:
                run.to_entry(self.language_model, inputs)
            except AtBlocks as stopped:
                return LookAhead(prompts, inputs, stopped.ahead)
        return None

    @torch.no_grad()  # not inference_mode: what the model's own code keeps must remain of use for its training
    def prepare_inputs(
        self,
        inputs: dict[str, Any],
        lengths: Sequence[int],
        n_images: int,
        policy: VisualTokenPolicy | None = None,
        visual: Tensor | None = None,
        ahead: BlocksAhead | None = None,
    ) -> list[PreparedPrompt]:
        """As `prepare`, of what transformers' forward takes: ids, mask and all by token padded on the right.

        `lengths` of the B prompts; `n_images` of all of them, looked at where every picture has equally many rows;
        `visual`: bool, which ids mark a visual row, on the host, if that is known there.
        """
        visual = self.visual(inputs["input_ids"]).cpu() if visual is None else visual
        full = int(visual.sum()) // max(n_images, 1)  # rows of a picture
        inside = policy if policy is not None and policy.acts_in_tower and n_images > 0 else None
        with VisionRun(self.hf.model) as run:
            seen = self._arrange(run, inside, full, ahead)
            if self.family.one_mask:
                count_on_host(run, inputs["input_ids"], visual, self.visual_ids[0])
            entry = run.to_entry(self.language_model, inputs)
        kept = seen[0]
        positions = self._positions(entry, len(lengths))
        added = _additions(entry)
        out = []
        for b, length in enumerate(lengths):
            marks, rows = visual[b, :length], None
            if kept < full:  # the first rows of each picture, which padding follows
                rows = (~(marks & ((marks.cumsum(0) - 1) % full >= kept))).nonzero()[:, 0]
                marks, rows = marks[rows], to_device(rows, self.device, torch.int64)
            plain, turns = self.place(positions[..., b, : len(marks)])
            same = self.family.same_rows and n_images > 0
            prepared = PreparedPrompt(
                inputs_embeds=_part(entry["inputs_embeds"], b, length, rows),
                visual=marks,
                positions=plain,
                pictures=[kept] * (int(marks.sum()) // kept) if same else runs(marks),
                rotations=turns,
                additions=tuple(_part(a, b, length, rows) for a in added),
            )
            out.append(prepared)
        return out

    @torch.inference_mode(False)  # so that a change in place counts (`TowerGraphs.begin`)
    @torch.no_grad()
    def _pictures(self, prompts: Sequence[TokenizedPrompt]) -> dict[str, Tensor]:
        """On the device, of the model's inputs for all prompts those of their pictures."""
        inputs = dict[str, Tensor]()
        for name in self.family.inputs:
            parts = [p.inputs[name] for p in prompts if name in p.inputs]
            if name.startswith("pixel_values") and parts:
                inputs[name] = self._pixels(parts)
            elif parts:
                whole = join(_tensors(parts))
                inputs[name] = to_device(whole, self.device, whole.dtype)
        return inputs

    def _batch(self, prompts: Sequence[TokenizedPrompt], ids: Tensor, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's inputs for all prompts; ids: int64 [B, n] on the host.

        Right padding: true rows come first, so neither embeddings nor positions depend on it.
        """
        longest, inputs = ids.shape[1], dict(pictures)
        ends = torch.tensor([len(p.input_ids) for p in prompts], device="cpu")
        mask = torch.arange(longest, device="cpu") < ends[:, None]
        both = to_device_together([(ids, torch.int64), (mask, torch.int64)], self.device)
        inputs["input_ids"], inputs["attention_mask"] = both
        for name in self.family.token_inputs:
            if any(name in p.inputs for p in prompts):
                numbers = [[n for t in _tensors([p.inputs.get(name)]) for n in t[0].tolist()] for p in prompts]
                inputs[name] = to_device(_padded(numbers, longest), self.device, torch.int64)
        return inputs

    def _pixels(self, parts: Sequence[Tensor | Unscaled]) -> Tensor:
        """On the device in its dtype. Bytes are copied as bytes, a quarter of what they stand for."""
        if len({part.dtype if isinstance(part, Tensor) else Unscaled for part in parts}) > 1:
            return join([self._pixels([part]) for part in parts])  # the processor was changed in between, for one
        left, tensors = [part for part in parts if isinstance(part, Unscaled)], _tensors(parts)
        if self._values is not None and left:
            return picture_values(self._values, scaled(left, self.device))
        whole = tensors[0] if len(tensors) == 1 else join(tensors)
        if self._values is not None and whole.dtype is torch.uint8:
            return picture_values(self._values, to_device(whole, self.device, torch.uint8))
        return to_device(whole, self.device, whole.dtype).to(self.dtype)

    @property
    def _unused_blocks(self) -> list[Any]:
        return unused_blocks(self.hf)

    @property
    def _vision_parts(self) -> list[Any]:
        return [m for m in self.hf.model.children() if m is not self.language_model]

    @cached_property
    def _attention_configs(self) -> list[Any]:
        return attention_configs(self._vision_parts)

    def _graphs_with(self, inside: VisualTokenPolicy | None) -> TowerGraphs | None:
        """What runs the tower captured while this policy acts in it, if that can be."""
        return self.tower_graphs if inside is None or inside.tower_key is not None else None

    def _graph_key(self, inside: VisualTokenPolicy | None) -> Hashable:
        """What the policy does in the tower; without one the graphs are of the blocks that are not skipped."""
        return tuple(map(id, self._unused_blocks)) if inside is None else inside.tower_key

    def _arrange(
        self, run: VisionRun, inside: VisualTokenPolicy | None, full: int, ahead: BlocksAhead | None = None
    ) -> list[int]:
        """All that changes what the vision side does; the list holds the rows of each picture after the run."""
        graphs = self._graphs_with(inside)
        if graphs is not None:
            graphs.arrange(run, self._graph_key(inside))
        tell_states(run, getattr(self.hf.model, "vision_tower", None))
        if self.device.type == "cpu":
            arrange_attention(run, self._attention_configs)
        if inside is None:  # before the others are arranged: to `skip` those would look like somebody's own
            skip(run, self._unused_blocks)
        if self.packed_vision is not None and self.tower_layers is not None:
            self.packed_vision.arrange(run, set() if inside is not None else self.tower_layers.arrange(run, ahead))
        if inside is None:
            return [full]
        inside.in_tower(self.vision, run)
        return run.pad(self.vision.projector, full)

    def place(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """positions [n], or [3, n] -> a `PreparedPrompt`'s `positions` and `rotations`.

        The next token follows the largest of three axes; transformers 5 continues from those of the last row, which
        differs after slow videos.
        """
        if positions.dim() == 1:
            return positions.to(torch.int32), None
        plain = positions[0].to(torch.int32, copy=True)
        from_last = hasattr(self.hf, "_prepare_position_ids_for_generation")
        plain[-1] = (positions[:, -1] if from_last else positions).max()
        return plain, rotations(self.language_model, positions)

    def _positions(self, entry: dict[str, Any], batch: int) -> Tensor:
        """[B, n], or [3, B, n] where they have several axes."""
        positions = entry.get("position_ids")
        if positions is None:
            n = entry["inputs_embeds"].shape[1]
            return torch.arange(n, dtype=torch.int32, device=self.device).expand(batch, -1)
        if positions.dim() == 3:
            return positions[-3:]  # some versions put the row numbers before the three axes
        return positions.expand(batch, -1)


def _padded(values: Sequence[Sequence[int]], length: int = 0) -> Tensor:
    """int64 [B, n], zeros on the right, as long as the longest, or `length`; on the host."""
    longest = max(length, *map(len, values))
    flat = array("q")  # torch takes three times as long over lists
    for numbers in values:
        flat.fromlist([*numbers, *[0] * (longest - len(numbers))])
    return torch.frombuffer(flat, dtype=torch.int64).view(len(values), longest)


def _part(whole: Tensor, b: int, length: int, rows: Tensor | None) -> Tensor:
    """[B, n, d] -> the first rows of sequence b, or those listed; nothing is copied of one that is alone."""
    if rows is not None:
        return whole[b, rows]
    return whole[b, :length] if len(whole) == 1 else whole[b, :length].clone()


def _of_several_lengths(prompts: Sequence[TokenizedPrompt]) -> bool:
    """Whether their videos have different numbers of frames."""
    clips = _tensors([p.inputs.get("pixel_values_videos") for p in prompts])
    return len({c.shape[1:] for c in clips}) > 1


def _tensors(parts: Sequence[Tensor | Unscaled | None]) -> list[Tensor]:
    return [part for part in parts if isinstance(part, Tensor)]


def _tiles(pixels: Tensor | Unscaled) -> int:
    """Pictures in [..., C, H, W]; those all zero fill the shorter rows up."""
    if isinstance(pixels, Unscaled) or pixels.dim() == 4:
        return len(pixels)
    return int(pixels.flatten(0, -4).flatten(1).any(dim=1).sum())


def _additions(entry: dict[str, Any]) -> list[Tensor]:
    """What deepstack adds after the first layers, [B, n, d] each, zero in text rows."""
    where = entry.get("visual_pos_masks")
    if where is None:
        return []
    out = []
    for features in entry["deepstack_visual_embeds"]:
        whole = torch.zeros_like(entry["inputs_embeds"])
        whole[where] = features.to(whole.dtype)
        out.append(whole)
    return out


def _check_finite(module: torch.nn.Module) -> None:
    """Parameters and buffers, those too that no checkpoint stores (rotations, from the config's numbers)."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"weight {name!r} is on the meta device: no value was loaded")
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
