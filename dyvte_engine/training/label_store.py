"""Labels of a whole data set on disk: made in shards by `label`, read by `load_labels`.

A folder holds `labels.json` (what was labelled, and how) and `shard-NNNNN.safetensors` with a fixed part of the samples
each. A shard appears whole or not at all, so a killed run continues where it stopped and ends in the same bytes. Each
says which samples of which run it holds and has a checksum; both are checked when a run continues and on reading.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from dyvte_engine.checks import is_whole
from dyvte_engine.config import EngineConfig
from dyvte_engine.engine import Engine
from dyvte_engine.errors import DataError, InvalidArgumentError, PromptError
from dyvte_engine.files import parse_json, write_bytes
from dyvte_engine.flops import leaving_flops, vision_flops
from dyvte_engine.heads.exit_head import STATE_BITS, ordered
from dyvte_engine.inputs.prompts import render
from dyvte_engine.models import PreparedPrompt, VisionLanguageModel
from dyvte_engine.policies import KeepAll
from dyvte_engine.runtime.picture_cache import PictureCache
from dyvte_engine.training.answers import branch_answers, own_answers
from dyvte_engine.training.files import read_tensors, write_tensors
from dyvte_engine.training.head_data import Example, fingerprint
from dyvte_engine.training.labels import Sample, exit_outcomes
from dyvte_engine.training.metrics import normalised

Mode = Literal["reference", "self", "free-running"]
Rule = Literal["auto", "paper", "argmax", "text"]
AGREEMENT, CE_SCALE = 0.99, 1.03  # docs/method.md section 3: tau and scale as the paper's code reads them
REPORT_SECONDS = 10.0
PICTURE_BYTES = 1 << 28  # of rows that the tower made of a batch's pictures


@dataclass(frozen=True)
class LabelInfo:
    """What a folder of labels is of. A folder is only continued by a run with the same.

    Raises:
        ValueError: a count below 1, or of another type.
    """

    mode: Mode
    samples: int
    data_fingerprint: str
    model_name: str
    model_fingerprint: str
    dtype: str
    hidden_size: int
    num_layers: int
    batch: int
    shard: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name in ("samples", "hidden_size", "num_layers", "batch", "shard", "max_new_tokens"):
            value = getattr(self, name)
            if not (is_whole(value) and value >= 1):
                raise ValueError(f"{name} is {value!r}; accepted: whole numbers above 0")

    @property
    def shard_count(self) -> int:
        return -(-self.samples // self.shard)

    @property
    def shards(self) -> list[str]:
        return [f"shard-{number:05d}.safetensors" for number in range(self.shard_count)]

    def header(self, number: int) -> dict[str, Any]:
        """What shard `number` says about itself."""
        first = number * self.shard
        return {"run": asdict(self), "first": first, "samples": min(self.shard, self.samples - first)}

    @classmethod
    def read(cls, folder: Path) -> LabelInfo:
        """Raises DataError when the folder holds no labels."""
        try:
            return cls(**parse_json((folder / "labels.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder} is not a folder of labels (`dyvte-engine label` writes one): {error}") from error


@dataclass
class HeadData:
    """What heads learn from and are judged by.

    pooled: [N, L, S*d], the heads' inputs; label: bool [N, L], the rule's verdict; agree: bool [N, L], whether the
    answer stays what the full model says; flops: float64 [N, L], of a prefill with the exit after each layer (the
    paper's count); right: bool [N, L], whether the generated answer is the reference, where both are known, else None.
    """

    pooled: Tensor
    label: Tensor
    agree: Tensor
    flops: Tensor
    right: Tensor | None = None

    def rows(self, index: Tensor) -> HeadData:
        right = None if self.right is None else self.right[index]
        return HeadData(self.pooled[index], self.label[index], self.agree[index], self.flops[index], right)


def label(
    model: VisionLanguageModel,
    examples: Sequence[Example],
    out: str | Path,
    mode: Mode = "reference",
    batch: int = 16,
    shard: int = 512,
    max_new_tokens: int = 32,
) -> LabelInfo:
    """Labels every exit of every example into the folder `out`, or finishes what a killed run left there.

    mode: `reference` needs an answer in every example; `self` takes the model's own greedy answer instead;
    `free-running` also generates the answer under every exit and compares the strings.
    batch: samples computed at once; shard: samples of one file.

    Raises:
        DataError: an example without a usable picture or answer, or too long, by name; NaN or infinity among the
            labels; or `out` holds other labels or a damaged shard.
    """
    out = Path(out)
    check_mode(mode, examples)
    for name, value in (("batch", batch), ("shard", shard), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise InvalidArgumentError(f"{name} is {value}; accepted: at least 1")
    info = LabelInfo(
        mode=mode,
        samples=len(examples),
        data_fingerprint=fingerprint(examples),
        model_name=Path(model.name).name,
        model_fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        hidden_size=model.shape.hidden_size,
        num_layers=model.shape.num_layers,
        batch=batch,
        shard=shard,
        max_new_tokens=max_new_tokens,
    )
    labeller = _Labeller(model, info)  # first: where it does not fit into memory, no run has begun in `out`
    _begin(out, info)
    there = [number for number, name in enumerate(info.shards) if (out / name).exists()]
    for number in there:
        _read_shard(out, info, number)
    progress = _Progress(len(examples), sum(info.header(number)["samples"] for number in there))
    for number in sorted(set(range(len(info.shards))) - set(there)):
        first = number * shard
        mine, parts = examples[first : first + shard], []
        for start in range(0, len(mine), batch):
            parts.append(labeller(mine[start : start + batch]))
            progress.add(len(parts[-1]["ce_full"]))
        columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        _check_finite(columns, out / info.shards[number])
        write_tensors(out / info.shards[number], columns, info.header(number))
    return info


def check_mode(mode: str, examples: Sequence[Example]) -> None:
    """Raises InvalidArgumentError or DataError where these examples cannot be labelled in this mode."""
    if mode not in ("reference", "self", "free-running"):
        raise InvalidArgumentError(f"mode is {mode!r}; accepted: reference, self, free-running")
    if not examples:
        raise DataError("examples is empty; accepted: at least one")
    missing = [e.name for e in examples if e.answer is None] if mode == "reference" else ()
    if missing:
        raise DataError(f"mode 'reference' needs answers; {len(missing)} examples have none, first {missing[0]}")


def _read_shard(folder: Path, info: LabelInfo, number: int) -> dict[str, Tensor]:
    """The columns of a shard; DataError when it is damaged or holds something else."""
    path, wanted = folder / info.shards[number], info.header(number)
    columns, found = read_tensors(path)
    if found != wanted:
        raise DataError(f"{path} does not hold samples {wanted['first']} and on of this run; remove it to label anew")
    return columns


def _check_finite(columns: dict[str, Tensor], path: Path) -> None:
    for name, column in columns.items():
        bad = int((~torch.isfinite(column)).view(len(column), -1).any(1).sum())
        if bad and name != "kl":  # infinite where a model rules tokens out; nothing learns from it
            given = f"{path}: {name} holds NaN or infinity in {bad} of {len(column)} samples"
            raise DataError(f"{given}; heads cannot learn from them (does the model overflow in its dtype?)")


def _begin(out: Path, info: LabelInfo) -> None:
    if (out / "labels.json").exists():
        found, wanted = asdict(LabelInfo.read(out)), asdict(info)
        other = {key: f"{found[key]} there, {wanted[key]} asked" for key in wanted if found[key] != wanted[key]}
        if other:
            different = "; ".join(f"{key}: {what}" for key, what in other.items())
            raise DataError(f"out {out} holds labels of another run ({different}); give another folder")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "labels.json", json.dumps(asdict(info), indent=1).encode() + b"\n")


def load_labels(folder: str | Path, states: Sequence[str], rule: Rule = "auto") -> tuple[HeadData, LabelInfo]:
    """All samples of a finished folder, in order, with the pooled `states` side by side.

    rule: `paper` (docs/method.md section 3: more than 99 % of the argmax tokens stay and CE_exit < 1.03 CE_full),
    `argmax` (all of them stay), `text` (the generated strings are equal; needs free-running labels), or `auto`: text,
    argmax or paper for labels of mode free-running, self or reference.

    Raises:
        DataError: shards are missing, damaged, swapped or hold NaN, or the rule needs what these labels do not hold.
        InvalidArgumentError: an unknown state or rule.
    """
    states, folder = ordered(states), Path(folder)
    info = LabelInfo.read(folder)
    there = sum(1 for _ in folder.glob("shard-*.safetensors"))
    if there < info.shard_count:
        given = f"{folder} holds {there} of {info.shard_count} shards"
        raise DataError(f"{given}; the same `dyvte-engine label` command again makes the rest")
    parts = []
    for number, name in enumerate(info.shards):
        columns = _read_shard(folder, info, number)
        _check_finite(columns, folder / name)
        pooled = {s: columns.pop(f"pooled.{s}") for s in STATE_BITS}
        parts.append(columns | {"pooled": torch.cat([pooled[s] for s in states], -1)})
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    chosen = {"free-running": "text", "self": "argmax", "reference": "paper"}[info.mode] if rule == "auto" else rule
    same = joined["agreement"] == 1
    agree = joined.get("same_text", same)
    right = joined["right"] if "right" in joined and joined["answered"].all() else None
    return HeadData(joined["pooled"], _verdicts(joined, chosen), agree, joined["flops"], right), info


def _verdicts(columns: dict[str, Tensor], rule: str) -> Tensor:
    if rule == "paper":
        stays = columns["agreement"] > AGREEMENT
        return stays & (columns["ce_exit"] < CE_SCALE * columns["ce_full"][:, None])
    if rule == "argmax":
        return columns["agreement"] == 1
    if rule == "text":
        if "same_text" not in columns:
            raise DataError("rule 'text' needs labels of mode free-running")
        return columns["same_text"]
    raise InvalidArgumentError(f"rule is {rule!r}; accepted: auto, paper, argmax, text")


class _Progress:
    """Lines on stderr: samples done, and how long the rest takes at this run's pace."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.before = total, done, done
        self.started = self.said = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < REPORT_SECONDS and self.done < self.total:
            return
        self.said = now
        left = (now - self.started) / (self.done - self.before) * (self.total - self.done)
        print(f"labels: {self.done}/{self.total} samples, {left / 60:.1f} min left", file=sys.stderr, flush=True)


class _Labeller:
    """Examples -> the columns of a shard. Knows the model; knows nothing of files."""

    def __init__(self, model: VisionLanguageModel, info: LabelInfo):
        self.model, self.info = model, info
        self.pictures = PictureCache(model, PICTURE_BYTES)
        if info.mode != "reference":
            self.engine = Engine(model, EngineConfig(model.device, model.dtype, max_batch=info.batch))

    @torch.inference_mode()
    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The columns: pooled.STATE [n, L, d] in the model's dtype; agreement, ce_exit, kl float32 and flops float64
        [n, L]; ce_full float32 [n]; free-running: same_text, right, bool [n, L], and answered, bool [n]."""
        texts, pictures = [self._text(e) for e in examples], [e.load() for e in examples]
        tokenized = self.model.tokenize(texts, [[picture] for picture in pictures])
        self.pictures.clear()  # what a batch is does not depend on those before, so a run may be continued
        prompts = [seen.prompt for seen in self.pictures.prepare(tokenized, KeepAll())]
        for example, prompt in zip(examples, prompts, strict=True):
            if self.info.mode != "reference":
                self._check_room(example, len(prompt.visual) + self.info.max_new_tokens)
        answers, more = self._answers(examples, texts, pictures)
        samples = [self._sample(e, p, ids) for e, p, ids in zip(examples, prompts, answers, strict=True)]
        outcomes = exit_outcomes(self.model.language_model, self.model.hf.get_output_embeddings(), samples)
        columns = {f"pooled.{name}": state.to(self.model.dtype) for name, state in outcomes.pooled.items()}
        columns |= {name: getattr(outcomes, name) for name in ("agreement", "ce_exit", "ce_full", "kl")}
        columns["flops"] = torch.tensor(
            [self._flops(p, self.model.tower_passes(t)) for p, t in zip(prompts, tokenized, strict=True)],
            dtype=torch.float64,
        )
        return {name: column.cpu() for name, column in (columns | more).items()}

    def _text(self, example: Example) -> str:
        try:
            return render(example.prompt, 1, self.model.processor)
        except PromptError as error:
            raise DataError(f"{example.name}: {error}") from error

    def _answers(
        self, examples: Sequence[Example], prompts: Sequence[str], pictures: Sequence[Image.Image]
    ) -> tuple[list[list[int]], dict[str, Tensor]]:
        """Token ids of the references, and the columns that only generation knows."""
        tokenizer, budget = self.model.processor.tokenizer, self.info.max_new_tokens
        if self.info.mode == "reference":
            end = tokenizer.eos_token_id
            return [[*tokenizer(e.answer, add_special_tokens=False).input_ids, end] for e in examples], {}
        self.engine.forget()
        if self.info.mode == "self":
            return own_answers(self.engine, prompts, pictures, budget), {}
        branches = branch_answers(self.engine, prompts, pictures, budget)
        texts = [[normalised(t) for t in tokenizer.batch_decode(b, skip_special_tokens=True)] for b in branches]
        references = [None if e.answer is None else normalised(e.answer) for e in examples]
        right = [[text == reference for text in row] for row, reference in zip(texts, references, strict=True)]
        return [b[-1] for b in branches], {
            "same_text": torch.tensor([[text == row[-1] for text in row] for row in texts]),
            "right": torch.tensor(right),
            "answered": torch.tensor([reference is not None for reference in references]),
        }

    def _sample(self, example: Example, prompt: PreparedPrompt, answer: list[int]) -> Sample:
        self._check_room(example, len(prompt.visual) + len(answer))
        ids = torch.tensor(answer, device=self.model.device)
        embeds = torch.cat([prompt.inputs_embeds, self.model.hf.get_input_embeddings()(ids)])
        positions = torch.cat(
            [prompt.positions, prompt.positions[-1] + 1 + torch.arange(len(ids)).to(prompt.positions)]
        )
        visual, rotations = torch.cat([prompt.visual, torch.zeros(len(ids), dtype=torch.bool)]), None
        if prompt.rotations is not None:
            turns = self.model.decoder.cos_sin[positions[-len(ids) :].long()]
            rotations = torch.cat([prompt.rotations, turns])
        additions = [torch.cat([added, added.new_zeros(len(ids), added.shape[1])]) for added in prompt.additions]
        try:
            return Sample(embeds, visual, positions, ids, rotations, additions)
        except InvalidArgumentError as error:
            raise DataError(f"{example.name}: {error}") from error

    def _check_room(self, example: Example, length: int) -> None:
        if length > self.model.decoder.max_len:
            given = f"{length} tokens of prompt and answer"
            raise DataError(f"{example.name}: {given}; accepted: at most max_len {self.model.decoder.max_len}")

    def _flops(self, prompt: PreparedPrompt, passes: int) -> list[float]:
        """A prefill with the exit after each layer, the paper's count."""
        tower = passes * vision_flops(self.model.hf.config.vision_config)
        n, leave = len(prompt.visual), int(prompt.visual.sum())
        layers = range(self.model.shape.num_layers)
        return [leaving_flops(self.model.shape, n, leave, layer, tower) for layer in layers]
