"""Accuracy against FLOPs: DyVTE at every threshold, an exit at every fixed layer, and Random at equal FLOPs.

An exit layer determines the answer exactly. So one run for each layer and one of the heads give every sample's outcome
under every threshold of the heads' rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import flops
from ..checks import check_names
from ..errors import InvalidArgumentError
from ..heads.calibration import Calibration, Threshold
from ..heads.rule import ExitRule
from ..policies import DynamicExit, FixedExit, KeepAll, LayerState, Random, VisualTokenPolicy
from . import metrics
from .run import Answer, AnswerFile, answer_all
from .task import Sample

if TYPE_CHECKING:
    from ..engine import Engine

RESAMPLES = 1000


@dataclass
class Outcomes:
    """What N samples come to under an exit after each of L layers; the last column is the full model.

    credit: f64 [N, L], 0 to 1; same: bool [N, L], the answer is the full model's; flops, flops_true: f64 [N, L].
    p: {heads: f32 [N, L - 1]}, what each set of heads says after each layer but the last; rules: {heads: their rule},
    of which a sweep replaces the threshold; paths: {heads: thresholds for each layer, from "never" on}, where they were
    calibrated along such a path.
    """

    samples: Sequence[Sample]
    tasks: np.ndarray  # [N], the task each sample belongs to
    texts: list[list[str]]  # [N][L]
    credit: np.ndarray
    same: np.ndarray
    flops: np.ndarray
    flops_true: np.ndarray
    p: dict[str, np.ndarray] = field(default_factory=dict)
    rules: dict[str, ExitRule] = field(default_factory=dict)
    paths: dict[str, list[Threshold]] = field(default_factory=dict)

    @property
    def weights(self) -> np.ndarray:
        """[N], summing to 1, so that every task counts alike."""
        names, which, counts = np.unique(self.tasks, return_inverse=True, return_counts=True)
        return 1.0 / (len(names) * counts[which])


@dataclass(frozen=True, eq=False)
class Probe(VisualTokenPolicy):
    """Keeps everything and writes down what each set of heads says after each layer."""

    heads: tuple[DynamicExit, ...]
    said: list[list[np.ndarray]] = field(default_factory=list)  # of each call of `decide`: [B] of each set

    def bind(self, model: Any) -> Probe:
        return replace(self, heads=tuple(h.bind(model) for h in self.heads))

    @property
    def all_or_none(self) -> bool:
        return True

    def layers(self, num_layers: int) -> set[int]:
        return set(range(num_layers - 1))

    def decide(self, state: LayerState) -> list[None]:
        self.said.append([h.ask(state).cpu().numpy() for h in self.heads])
        return [None] * len(state.rows.n_visual)


def heads_named(files: Sequence[str]) -> dict[str, DynamicExit]:
    """[NAME=]HEADS_FILE each -> the heads by name, the file's without one.

    Raises:
        InvalidArgumentError: two have one name; HeadsError: a file is none of heads.
    """
    parts = [entry.rpartition("=") for entry in files]
    names = [name or Path(file).stem for name, _, file in parts]
    check_names("heads", names)
    return {name: DynamicExit.from_file(file, threshold=0.5) for name, (_, _, file) in zip(names, parts, strict=True)}


def probe(engine: Engine, samples: Sequence[Sample], heads: Sequence[DynamicExit]) -> np.ndarray:
    """p_exit f32 [H, N, L - 1] of each set of heads for each sample after each layer but the last."""
    size, parts = engine.config.max_batch, []
    for start in range(0, len(samples), size):
        chosen = samples[start : start + size]
        watching = Probe(tuple(heads))
        prompts, pictures = [s.prompt for s in chosen], [s.picture for s in chosen]
        engine.generate(prompts, pictures, policy=watching, max_new_tokens=1, do_sample=False)
        parts.append(np.stack([np.stack(layer) for layer in watching.said], axis=-1))  # [H, B, L - 1]
    return np.concatenate(parts, axis=1)


def record(
    engine: Engine,
    tasks: Mapping[str, Sequence[Sample]],
    heads: dict[str, DynamicExit],
    file: AnswerFile | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcomes:
    """Runs every sample under an exit at every layer and under none, and asks the heads.

    A few samples at a time under all policies, so that their pictures are computed once (docs/again.md).
    Raises InvalidArgumentError for a model of one layer, which nothing can leave early.
    """
    if engine.model.shape.num_layers < 2:
        raise InvalidArgumentError("model has 1 layer; accepted: at least 2")
    samples = [s for part in tasks.values() for s in part]
    names = np.array([name for name, part in tasks.items() for _ in part])
    last, size, asked = engine.model.shape.num_layers - 1, engine.config.max_batch, list(heads.values())
    policies: dict[str, VisualTokenPolicy] = {f"fixed:{layer}": FixedExit(layer) for layer in range(last)}
    policies["keep-all"] = KeepAll()
    runs: list[list[Answer]] = [[] for _ in policies]
    parts = [np.empty((len(asked), 0, last))]
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        for run, (name, policy) in zip(runs, policies.items(), strict=True):
            run += answer_all(engine, some, policy, name, file, progress)
        parts += [probe(engine, some, asked)] if asked else []
    said = np.concatenate(parts, axis=1)
    rules = {name: policy.rule for name, policy in heads.items()}
    found = outcomes(samples, names, runs, dict(zip(heads, said, strict=True)), rules)
    for name, policy in heads.items():
        path = Calibration.of_metadata(policy.heads.metadata)
        if path is not None and isinstance(path.thresholds[0], tuple):
            found.paths[name] = path.thresholds
    return found


def outcomes(
    samples: Sequence[Sample],
    names: np.ndarray,
    runs: Sequence[Sequence[Answer]],
    p: dict[str, np.ndarray],
    rules: dict[str, ExitRule],
) -> Outcomes:
    """Puts the answers of the runs, one for each layer, side by side."""
    texts = [[a.text for a in each] for each in zip(*runs, strict=True)]
    credit = [[metrics.credit(s, text) for text in each] for s, each in zip(samples, texts, strict=True)]
    same = [[text == each[-1] for text in each] for each in texts]
    counted, true = (
        np.array([[getattr(a, name) for a in each] for each in zip(*runs)]) for name in ("flops", "flops_true")
    )
    return Outcomes(samples, names, texts, np.array(credit), np.array(same), counted, true, p, rules)


def exit_layers(p: np.ndarray, rule: ExitRule) -> np.ndarray:
    """p [N, L - 1] -> int64 [N], the layer each sample exits after, L - 1 where nothing ever leaves."""
    never_asked = np.pad(p, ((0, 0), (0, 1)))  # the last layer
    return rule.first_exits(torch.from_numpy(never_asked)).numpy()


def thresholds(o: Outcomes, name: str, count: int = 80) -> list[Threshold]:
    """From "always" to "never": the heads' path, else about `count` at quantiles of all that they said."""
    if name in o.paths:
        return o.paths[name][::-1]
    spread = np.quantile(o.p[name], np.linspace(0, 1, count))
    found: list[Threshold] = np.unique(np.concatenate([[0.0], spread, [1.0]])).tolist()
    return found


def point(o: Outcomes, layers: np.ndarray) -> dict[str, float]:
    """Means over tasks (each counts alike) when sample i exits after layers[i]."""
    rows, w = np.arange(len(layers)), o.weights
    return {
        "exit_layer": float(w @ layers),
        **{name: float(w @ getattr(o, name)[rows, layers]) for name in ("credit", "same", "flops", "flops_true")},
    }


def dealt(o: Outcomes, layers: np.ndarray) -> dict[str, float]:
    """The same exit layers dealt to the samples of each task at random: the expectation over all deals."""
    total = dict.fromkeys(("exit_layer", "credit", "same", "flops", "flops_true"), 0.0)
    names = np.unique(o.tasks)
    for name in names:
        rows = o.tasks == name
        share = np.bincount(layers[rows], minlength=o.credit.shape[1]) / rows.sum()
        total["exit_layer"] += float(share @ np.arange(len(share))) / len(names)
        for key in ("credit", "same", "flops", "flops_true"):
            total[key] += float(share @ getattr(o, key)[rows].mean(0)) / len(names)
    return total


def curve(o: Outcomes, name: str) -> list[dict[str, Any]]:
    """DyVTE's points from the lowest threshold to the highest, each with its control, "dealt"."""
    points: list[dict[str, Any]] = []
    for threshold in thresholds(o, name):
        layers = exit_layers(o.p[name], replace(o.rules[name], threshold=threshold))
        points.append({"threshold": threshold, **point(o, layers), "dealt": dealt(o, layers)})
    return points


def fixed(o: Outcomes) -> list[dict[str, float]]:
    """A point for every layer; the last is the full model."""
    n, layers = o.credit.shape
    return [point(o, np.full(n, layer)) for layer in range(layers)]


def oracle(o: Outcomes) -> dict[str, float]:
    """Every sample leaves after the first layer with the full model's answer; no rule keeps all answers for less."""
    return point(o, o.same.argmax(1))


def against_fixed(o: Outcomes, name: str) -> list[dict[str, Any]]:
    """DyVTE less the fixed exit, at each layer, never with more FLOPs.

    "credit" and "same" are differences with a 95 % interval: samples resampled in pairs within each task. "by_task"
    has DyVTE's mean exit layer in each task, and what it and the fixed layer keep there.
    """
    compared = []
    for layer, (t, layers) in at_fixed_cost(o, name).items():
        costs = point(o, layers)["flops"], float(o.weights @ o.flops[:, layer])
        entry: dict[str, Any] = {"layer": layer, "threshold": t, "flops": costs[0], "flops_fixed": costs[1]}
        for key in ("credit", "same"):
            difference = _less_fixed(o, key, layers, layer)
            entry[key] = {"difference": float(o.weights @ difference), "ci95": _paired(difference, o.tasks)}
        entry["by_task"] = {str(task): _of_task(o, o.tasks == task, layers, layer) for task in np.unique(o.tasks)}
        compared.append(entry)
    return compared


def at_fixed_cost(o: Outcomes, name: str) -> dict[int, tuple[Threshold, np.ndarray]]:
    """By layer: the threshold, and exit layers [N], with the most FLOPs that are no more than the fixed exit's."""
    rules = [replace(o.rules[name], threshold=t) for t in thresholds(o, name)]
    layers = {rule.threshold: exit_layers(o.p[name], rule) for rule in rules}
    cost = {t: point(o, chosen)["flops"] for t, chosen in layers.items()}
    found = {}
    for layer, goal in enumerate(fixed(o)[:-1]):
        within = [t for t, c in cost.items() if c <= goal["flops"] * (1 + 1e-9)]
        if within:
            t = max(within, key=lambda t: cost[t])
            found[layer] = t, layers[t]
    return found


def middle_of_the_curve(o: Outcomes, name: str) -> dict[str, Any]:
    """DyVTE less the fixed exit, at no more FLOPs, mean over the layers of the second and third quarter.

    Of all tasks together ("all"), and of each alone at the FLOPs that the fixed layer costs there: "credit" and "same"
    as differences with a 95 % interval, samples resampled in pairs.
    """
    parts = {"all": o, **{str(task): _part(o, str(task)) for task in np.unique(o.tasks)}}
    return {label: _middle(part, name) for label, part in parts.items()}


def _middle(o: Outcomes, name: str) -> dict[str, Any]:
    count = o.credit.shape[1]
    found = {n: layers for n, (_, layers) in at_fixed_cost(o, name).items() if count // 4 <= n < 3 * count // 4}
    entry: dict[str, Any] = {"samples": len(o.tasks), "layers": list(found)}
    for key in ("credit", "same") if found else ():
        difference = np.mean([_less_fixed(o, key, layers, n) for n, layers in found.items()], axis=0)
        entry[key] = {"difference": float(o.weights @ difference), "ci95": _paired(difference, o.tasks)}
    return entry


def _less_fixed(o: Outcomes, key: str, layers: np.ndarray, layer: int) -> np.ndarray:
    """[N], what exits after `layers` [N] give more than one after `layer`."""
    values = getattr(o, key).astype(float)
    return np.asarray(values[np.arange(len(layers)), layers] - values[:, layer])


def _of_task(o: Outcomes, rows: np.ndarray, layers: np.ndarray, layer: int) -> dict[str, float]:
    chosen = np.flatnonzero(rows), layers[rows]
    return {
        "exit_layer": float(layers[rows].mean()),
        **{key: float(getattr(o, key)[chosen].mean()) for key in ("credit", "same")},
        **{f"{key}_fixed": float(getattr(o, key)[rows, layer].mean()) for key in ("credit", "same")},
    }


def _paired(difference: np.ndarray, tasks: np.ndarray) -> list[float]:
    rng = np.random.default_rng(0)
    parts = [difference[tasks == name] for name in np.unique(tasks)]
    drawn = [np.mean([p[rng.integers(0, len(p), len(p))].mean() for p in parts]) for _ in range(RESAMPLES)]
    return [float(x) for x in np.percentile(drawn, (2.5, 97.5))]


def separation(o: Outcomes, name: str) -> list[float | None]:
    """How well p_exit after each layer tells samples whose answer stays from the others: area under the ROC curve.

    None where all samples are of one sort.
    """
    areas: list[float | None] = []
    for layer in range(o.credit.shape[1] - 1):
        stays, said = o.same[:, layer], o.p[name][:, layer]
        if stays.all() or not stays.any():
            areas.append(None)
            continue
        above = said[stays][:, None] - said[~stays][None, :]
        areas.append(float((above > 0).mean() + 0.5 * (above == 0).mean()))
    return areas


def equal_cost_ratio(engine: Engine, goal: float, n: float, visual: int, vision: float) -> float:
    """Share of visual tokens to leave out before the language model for a prefill of `goal` FLOPs (paper's count)."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        dearer = flops.leaving_flops(engine.model.shape, n, middle * visual, -1, vision) > goal
        low, high = (middle, high) if dearer else (low, middle)
    return low


def random_points(
    engine: Engine,
    o: Outcomes,
    layers: Sequence[int],
    file: AnswerFile | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, float]]:
    """Random visual tokens left out before the language model, as many as cost what an exit at each layer costs."""
    vision = flops.vision_flops(engine.model.hf.config.vision_config)
    n = flops.prompt_length(float(o.weights @ o.flops[:, -1]), engine.model.shape, vision)
    first, points = o.samples[0], []
    asked = engine.generate(first.prompt, first.picture, policy=KeepAll(), max_new_tokens=1)
    assert not isinstance(asked, list)
    visual = asked.stats.visual_tokens
    for layer in layers:
        ratio = round(equal_cost_ratio(engine, point(o, np.full(len(o.tasks), layer))["flops"], n, visual, vision), 4)
        answers = answer_all(engine, o.samples, Random(0, ratio), f"random:0,{ratio}", file, progress)
        credit = np.array([metrics.credit(s, a.text) for s, a in zip(o.samples, answers)])
        same = np.array([a.text == texts[-1] for a, texts in zip(answers, o.texts)])
        costs = {name: float(o.weights @ [getattr(a, name) for a in answers]) for name in ("flops", "flops_true")}
        shares = {"credit": float(o.weights @ credit), "same": float(o.weights @ same)}
        points.append({"ratio": ratio, "as_layer": layer, **shares, **costs})
    return points


def sweep_report(
    engine: Engine,
    o: Outcomes,
    random_layers: Sequence[int],
    file: AnswerFile | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """All of it as one JSON-able record; "by_task" repeats curve and fixed layers for each task alone."""
    names = [str(name) for name in dict.fromkeys(o.tasks)]
    whole = {
        "samples": len(o.samples),
        "tasks": names,
        "fixed": fixed(o),
        "oracle": oracle(o),
        "random": random_points(engine, o, random_layers, file, progress),
        "heads": {
            name: {
                "curve": curve(o, name),
                "against_fixed": against_fixed(o, name),
                "middle": middle_of_the_curve(o, name),
                "separation": separation(o, name),
            }
            for name in o.p
        },
        "by_task": {name: _alone(o, name) for name in names},
    }
    return _rounded(whole)


def _rounded(value: Any) -> Any:
    """Floats to six digits: the record is read by people and kept in a repository."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _alone(o: Outcomes, task: str) -> dict[str, Any]:
    part = _part(o, task)
    curves = {name: curve(part, name) for name in part.p}
    return {"samples": len(part.tasks), "fixed": fixed(part), "oracle": oracle(part), "curves": curves}


def _part(o: Outcomes, task: str) -> Outcomes:
    """The samples of one task."""
    rows = np.flatnonzero(o.tasks == task)
    return replace(
        o,
        samples=[o.samples[int(i)] for i in rows],
        texts=[o.texts[int(i)] for i in rows],
        p={name: p[rows] for name, p in o.p.items()},
        **{name: getattr(o, name)[rows] for name in ("tasks", "credit", "same", "flops", "flops_true")},
    )
