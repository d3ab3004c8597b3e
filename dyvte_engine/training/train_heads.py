"""Trains exit heads on the labels of a frozen model (docs/method.md sections 3 and 6), and calibrates their threshold.

Three disjoint parts of the samples: most train, a tenth chooses the best epoch and the path of thresholds, a fifth
calibrates.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dyvte_engine.checks import is_real, is_whole
from dyvte_engine.errors import DataError, DyvteError, InvalidArgumentError
from dyvte_engine.heads.calibration import (
    THRESHOLDS,
    Calibration,
    Threshold,
    check_flops,
    check_risk,
    check_target,
)
from dyvte_engine.heads.exit_head import ExitHeadConfig, ExitHeads
from dyvte_engine.heads.rule import ExitRule
from dyvte_engine.heads.stopping import refined, stopping_path
from dyvte_engine.training.files import read_tensors, write_tensors
from dyvte_engine.training.label_store import HeadData, LabelInfo, Rule, load_labels
from dyvte_engine.training.regret import loss_of_exits, regret_loss, regrets

Kind = Literal["paper", "default", "light"]
Targets = Literal["label", "regret"]
DEFAULT_STATES = ("mean_text", "last_text")
SELECT, CALIBRATE = 0.1, 0.2  # of all samples
SEEDS = 2**40  # torch's generator takes 64 bits, and each step has its own
FIRST_BY_LABEL = 0.25  # of the epochs: regrets need heads that say something


@dataclass(frozen=True)
class HeadSettings:
    """What a training run is. `paper`: the recipe of docs/method.md section 3, one random layer a step, threshold 0.5.

    target_agreement or target_flops: what the stored threshold promises; neither: 0.5. min_layer, every_k and
    hysteresis are `ExitRule`'s and belong to the calibration. targets: the rule's verdict at each layer, or what
    leaving there is worth more than staying (`training.regret`); not with `paper`. by_layer: a threshold for each layer
    (`heads.stopping`), else one for all.
    """

    kind: Kind = "default"
    states: tuple[str, ...] = DEFAULT_STATES
    rule: Rule = "auto"
    seed: int = 0
    lr: float = 1e-3
    epochs: int = 20
    batch: int = 128
    warmup: float = 0.03
    hidden: int = 2048
    rms_eps: float | None = None
    class_weights: bool = False
    target_agreement: float | None = 0.99
    target_flops: float | None = None
    delta: float = 0.05
    min_layer: int = 0
    every_k: int = 1
    hysteresis: int = 1
    targets: Targets = "label"
    by_layer: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError for what would fail later, in the midst of training."""
        for name in ("epochs", "batch", "hidden"):
            value = getattr(self, name)
            if not (is_whole(value) and value >= 1):
                raise InvalidArgumentError(f"{name} is {value!r}; accepted: whole numbers, at least 1")
        if not (is_real(self.lr) and 0 < self.lr <= 1):
            raise InvalidArgumentError(f"lr is {self.lr!r}; accepted: above 0, at most 1")
        if not (is_whole(self.seed) and abs(self.seed) <= SEEDS):
            raise InvalidArgumentError(f"seed is {self.seed!r}; accepted: whole numbers from -2**40 to 2**40")
        if self.target_agreement is not None and self.target_flops is not None:
            raise InvalidArgumentError("target_agreement and target_flops were given; accepted: one of them")
        check_risk("delta", self.delta)
        if self.target_agreement is not None:
            check_risk("target_agreement", self.target_agreement)
        if self.target_flops is not None:
            check_flops(self.target_flops)
        accepted = ("label",) if self.kind == "paper" else ("label", "regret")
        if self.targets not in accepted:
            given = f"targets is {self.targets!r} for kind {self.kind}"
            raise InvalidArgumentError(f"{given}; accepted: {', '.join(accepted)}")
        if self.by_layer and self.target_agreement is None and self.target_flops is None:
            raise InvalidArgumentError(
                "by_layer is given without a target; accepted: with target_agreement or target_flops"
            )
        ExitRule(0.5, **self.exit_options)
        self.config(1, 1)

    @classmethod
    def of(cls, kind: Kind, **given: Any) -> HeadSettings:
        """The settings of a kind; what is given and not None replaces them."""
        kinds: dict[str, dict[str, Any]] = {
            "paper": {"lr": 4e-5, "epochs": 1, "target_agreement": None},
            "default": {},
            "light": {"hidden": 256, "rms_eps": 1e-6},
        }
        if kind not in kinds:
            raise InvalidArgumentError(f"kind is {kind!r}; accepted: {', '.join(kinds)}")
        given = {name: value for name, value in given.items() if value is not None}
        if "target_flops" in given and "target_agreement" not in given:
            given["target_agreement"] = None
        return replace(cls(kind=kind), **(kinds[kind] | given))

    @property
    def exit_options(self) -> dict[str, int]:
        return {"min_layer": self.min_layer, "every_k": self.every_k, "hysteresis": self.hysteresis}

    def config(self, hidden_size: int, num_layers: int) -> ExitHeadConfig:
        return ExitHeadConfig(
            hidden_size, num_layers, self.hidden, self.states, self.rms_eps, shared=self.kind == "light"
        )


@dataclass
class Parts:
    """The three parts of the samples, by index."""

    train: Tensor
    select: Tensor
    calibrate: Tensor

    @classmethod
    def of(cls, count: int, seed: int) -> Parts:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        select, calibrate = max(1, round(SELECT * count)), max(1, round(CALIBRATE * count))
        return cls(order[select + calibrate :], order[:select], order[select : select + calibrate])


@torch.inference_mode()
def exit_probabilities(heads: ExitHeads, pooled: Tensor) -> Tensor:
    """pooled [N, L, S*d] -> p_exit float32 [N, L], as inference computes it: in float32."""
    device = heads.w1.device
    parts = [heads.all_layers(p.to(device).float()).softmax(-1)[..., 1].cpu() for p in pooled.split(256)]
    return torch.cat(parts)


class Trainer:
    """One run: weights, optimiser and the best epoch so far. `state`: the file that a killed run continues from."""

    def __init__(self, config: ExitHeadConfig, data: HeadData, parts: Parts, settings: HeadSettings, accelerator: Any):
        self.settings, self.data, self.parts, self.accelerator = settings, data, parts, accelerator
        self.heads = ExitHeads(config, seed=settings.seed).to(accelerator.device)
        self.one_layer = settings.kind == "paper"
        # One leaf for each layer's weights, so that a step leaves the moments of layers that were not asked alone.
        leaves = [torch.nn.Parameter(w.data[layer]) for w in (self.heads.w1, self.heads.w2) for layer in range(len(w))]
        self.parameters = leaves if self.one_layer else list(self.heads.parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.step = 0
        self.best: dict[str, Tensor] = {}  # the weights, none before the first epoch ends
        self.history: list[float] = []
        self.said: Tensor | None = None  # f32 [N, L - 1], what the heads said of all samples when the epoch began
        positive = float(data.label[parts.train].float().mean().clamp(0.01, 0.99))
        weights = [0.5 / (1 - positive), 0.5 / positive] if settings.class_weights else [1.0, 1.0]
        self.class_weights = torch.tensor(weights, device=accelerator.device)

    @property
    def steps_of_epoch(self) -> int:
        return math.ceil(len(self.parts.train) / self.settings.batch)

    def train(self, state: Path | None, header: Any, save_every: int, log: Callable[[str, float, int], None]) -> None:
        """To the end, from `state` if it is there; the best epoch's weights are then in `heads`."""
        if state is not None and state.exists():
            self._load(state, header)
        total = self.settings.epochs * self.steps_of_epoch
        while self.step < total:
            loss = self._one_step(total)
            self.step += 1
            log("loss", loss, self.step)
            if self.step % self.steps_of_epoch == 0:
                self._end_epoch(log)
            if state is not None and (self.step % save_every == 0 or self.step % self.steps_of_epoch == 0):
                self._save(state, header)
        self.heads.load_state_dict(self.best)

    def _one_step(self, total: int) -> float:
        """One batch, split over the processes; the order depends on seed and step alone."""
        epoch, at = divmod(self.step, self.steps_of_epoch)
        if self.settings.targets == "regret" and at == 0 and epoch >= FIRST_BY_LABEL * self.settings.epochs:
            self.said = exit_probabilities(self.heads, self.data.pooled)[:, :-1].logit()
        order = torch.randperm(len(self.parts.train), generator=self._generator(epoch, 0))
        rows = self.parts.train[order[at * self.settings.batch : (at + 1) * self.settings.batch]]
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        pooled = self.data.pooled[mine].to(self.accelerator.device).float()
        label = self.data.label[mine].to(self.accelerator.device).long()
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * self._schedule(total)
        self.heads.zero_grad()
        self.optimiser.zero_grad()
        if self.said is not None:
            loss = self._regret_loss(pooled, self.said[mine], mine) / len(rows)
        else:
            loss = self._random_layer_loss(pooled, label) if self.one_layer else self._loss(pooled, label, len(rows))
        loss.backward()
        self._share_gradients()
        self.optimiser.step()
        return float(self.accelerator.reduce(loss.detach(), "sum"))

    def _loss(self, pooled: Tensor, label: Tensor, count: int) -> Tensor:
        """This process's part of the mean over `count` samples and all layers."""
        logits = self.heads.all_layers(pooled).flatten(0, 1)
        total = F.cross_entropy(logits, label.flatten(), self.class_weights, reduction="sum")
        return total / (count * label.shape[1])

    def _regret_loss(self, pooled: Tensor, said: Tensor, rows: Tensor) -> Tensor:
        """The sum over this process's samples."""
        flops = self.data.flops[rows]
        regret = regrets(said, self.data.label[rows], (flops / flops[:, -1:]).float())
        keep, leave = self.heads.all_layers(pooled)[:, :-1].unbind(-1)
        return regret_loss(leave - keep, regret.to(leave.device)).sum()

    def _random_layer_loss(self, pooled: Tensor, label: Tensor) -> Tensor:
        """The mean over this process's samples at its own random layer, in bf16 (the paper's recipe)."""
        layer = self._drawn_layers()[self.accelerator.process_index]
        with torch.autocast(self.accelerator.device.type, torch.bfloat16):
            logits = self.heads(pooled[:, layer], layer)
        total = F.cross_entropy(logits.float(), label[:, layer], self.class_weights, reduction="sum")
        return total / max(len(label), 1) / self.accelerator.num_processes

    def _drawn_layers(self) -> list[int]:
        shape = (self.accelerator.num_processes,)
        return torch.randint(self.heads.config.num_layers, shape, generator=self._generator(self.step, 1)).tolist()

    def _share_gradients(self) -> None:
        """Sums the gradients of all processes; with one layer a step, hands them to the layers drawn."""
        for weight in self.heads.parameters():
            weight.grad = self.accelerator.reduce(weight.grad, "sum")
        if not self.one_layer:
            return
        layers = self.heads.config.num_layers
        for number, weight in enumerate((self.heads.w1, self.heads.w2)):
            for layer in self._drawn_layers():
                self.parameters[number * layers + layer].grad = weight.grad[layer]

    def _generator(self, number: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.settings.seed + 2 * number + stream)

    def _schedule(self, total: int) -> float:
        warmup = max(1, round(self.settings.warmup * total))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, total - warmup)))

    def _end_epoch(self, log: Callable[[str, float, int], None]) -> None:
        """Keeps these weights if they do better than before on held-out samples."""
        held = self.data.rows(self.parts.select)
        found, said = self._held_out(exit_probabilities(self.heads, held.pooled), held)
        log(f"held-out {said.partition(' at ')[0]}", found, self.step)
        if not self.history or found < min(self.history):
            self.best = {name: weight.detach().clone() for name, weight in self.heads.state_dict().items()}
        self.history.append(found)
        if self.accelerator.is_main_process:
            epoch = f"epoch {len(self.history)}/{self.settings.epochs}"
            print(f"heads: {epoch}, {found:.3f} {said} on {len(held.agree)} samples", file=sys.stderr, flush=True)

    def _held_out(self, p_exit: Tensor, held: HeadData) -> tuple[float, str]:
        """The less the better, and what it is: the exit layer at the agreement asked for, or what exits lose."""
        if self.settings.targets == "regret":
            return loss_of_exits(p_exit, held.label, held.flops / held.flops[:, -1:]), "lost at all prices"
        curve = Calibration.measure(p_exit, held.agree, held.flops, self.settings.delta, self.settings.exit_options)
        wanted = self.settings.target_agreement or 0.99
        holds = [m for m, c in zip(curve.mean_layer, curve.changed, strict=True) if c <= (1 - wanted) * curve.samples]
        return min(holds), f"mean exit layer at {100 * wanted:g} % agreement"

    def _save(self, path: Path, header: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = {f"heads.{name}": weight for name, weight in self.heads.state_dict().items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        tensors |= {} if self.said is None else {"said": self.said}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"optimiser.{i}.{name}": value for name, value in self.optimiser.state[parameter].items()}
        write_tensors(path, tensors, {"run": header, "step": self.step, "history": self.history})

    def _load(self, path: Path, header: Any) -> None:
        tensors, found = read_tensors(path)
        if found["run"] != json.loads(json.dumps(header)):
            raise DataError(f"{path} belongs to a run with other settings or labels; remove it or give another --out")
        self.step, self.history, self.said = found["step"], found["history"], tensors.pop("said", None)
        named = {
            kind: {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(kind)}
            for kind in ("heads.", "best.")
        }
        self.heads.load_state_dict(named["heads."])
        self.best = {name: tensor.to(self.accelerator.device) for name, tensor in named["best."].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, number, field = name.split(".")
                parameter = self.parameters[int(number)]
                self.optimiser.state[parameter][field] = tensor if field == "step" else tensor.to(parameter.device)


def train_heads(
    labels: str | Path,
    out: str | Path,
    settings: HeadSettings,
    tensorboard: str | Path | None = None,
    save_every: int = 100,
) -> ExitHeads:
    """Trains heads on a folder of labels and writes them, with their calibration, to `out` (one safetensors file).

    A killed run continues from `out`.state and ends in the same bytes. Several processes (`accelerate launch`) share
    the batches. tensorboard: a folder for the curves.

    Raises:
        DataError: the labels are unfinished, or the state is of another run.
        CalibrationError: too few samples for `settings.target_agreement`; before anything is trained.
        InvalidArgumentError: settings under which no layer of this model could ever be left.
    """
    if not (is_whole(save_every) and save_every >= 1):
        raise InvalidArgumentError(f"save_every is {save_every!r}; accepted: whole numbers, at least 1")
    accelerator = _accelerator()
    _check_layers(settings, LabelInfo.read(Path(labels)).num_layers)
    data, info = load_labels(labels, settings.states, settings.rule)
    parts = Parts.of(info.samples, settings.seed)
    if len(parts.train) == 0:
        raise DataError(f"{labels} holds {info.samples} samples; accepted: at least 3")
    if settings.target_agreement is not None:
        check_target(settings.target_agreement, len(parts.calibrate), settings.delta)
    header = {"settings": asdict(settings), "labels": asdict(info)}
    out, state = Path(out), Path(f"{out}.state")
    out.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings.config(info.hidden_size, info.num_layers), data, parts, settings, accelerator)
    trainer.train(state, header, save_every, _logger(tensorboard, accelerator.is_main_process))
    heads = trainer.heads
    heads.metadata = _calibrated(heads, data, parts, settings, info) | {"history": trainer.history}
    if accelerator.is_main_process:
        heads.save(out, **heads.metadata)
        state.unlink(missing_ok=True)
    return heads


def _check_layers(settings: HeadSettings, num_layers: int) -> None:
    asked = len(ExitRule(0.5, **settings.exit_options).layers(num_layers))
    if asked < settings.hysteresis:
        given = f"min_layer is {settings.min_layer}, every_k {settings.every_k}, hysteresis {settings.hysteresis}"
        raise InvalidArgumentError(f"{given}: of {num_layers} layers {asked} are asked; accepted: at least hysteresis")


def _calibrated(
    heads: ExitHeads, data: HeadData, parts: Parts, settings: HeadSettings, info: LabelInfo
) -> dict[str, Any]:
    """What the heads' file says besides the weights."""
    path: Sequence[Threshold] = THRESHOLDS
    if settings.by_layer:
        seen = data.rows(parts.select)
        said = exit_probabilities(heads, seen.pooled)
        path = refined(stopping_path(said, seen.agree, seen.flops, settings.exit_options))
    held = data.rows(parts.calibrate)
    p_exit = exit_probabilities(heads, held.pooled)
    curve = Calibration.measure(p_exit, held.agree, held.flops, settings.delta, settings.exit_options, path)
    threshold: Threshold = 0.5
    if settings.target_agreement is not None:
        threshold = curve.for_agreement(settings.target_agreement)
    elif settings.target_flops is not None:
        threshold = curve.for_flops(settings.target_flops)
    return {
        "model_fingerprint": info.model_fingerprint,
        "model_name": info.model_name,
        "data_fingerprint": info.data_fingerprint,
        "labels": {"mode": info.mode, "samples": info.samples, "dtype": info.dtype},
        "settings": asdict(settings),
        "threshold": threshold,
        "calibration": asdict(curve),
    }


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise DyvteError("training needs the package accelerate: pip install 'dyvte-engine[train]'") from error
    return Accelerator(mixed_precision="no")


def _logger(folder: str | Path | None, is_main: bool) -> Callable[[str, float, int], None]:
    if folder is None or not is_main:
        return lambda name, value, step: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidArgumentError(
            f"tensorboard {folder} was asked for, but not installed: pip install tensorboard"
        ) from error
    writer = SummaryWriter(str(folder))
    return lambda name, value, step: writer.add_scalar(name, value, step)
