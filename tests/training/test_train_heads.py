"""The head trainer: against a plain loop, on rules that are there, killed, in two processes; and its commands."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from dyvte_engine.commands.main import app
from dyvte_engine.errors import CalibrationError, DataError, InvalidArgumentError
from dyvte_engine.heads.exit_head import STATE_BITS, ExitHeads
from dyvte_engine.training import train_heads as module
from dyvte_engine.training.files import write_tensors
from dyvte_engine.training.heads_report import ablate, combinations_of_states, evaluate_heads
from dyvte_engine.training.label_store import LabelInfo, load_labels
from dyvte_engine.training.metrics import wilson
from dyvte_engine.training.train_heads import HeadSettings, Parts, exit_probabilities, train_heads
from tests import tiny

LAYERS, WIDTH = 4, 8


def write_labels(folder: Path, count: int, seed: int = 0, model: str = "made-up") -> Path:
    """Labels without a model: layer l is safe for a sample whose mean_text[0] exceeds 1 - l; last_visual is noise."""
    generator = torch.Generator().manual_seed(seed)
    columns = {f"pooled.{s}": torch.randn(count, LAYERS, WIDTH, generator=generator) for s in STATE_BITS}
    safe = columns["pooled.mean_text"][..., 0] > torch.tensor([1.0, 0.0, -1.0, -99.0])
    columns |= {
        "agreement": safe.float(),
        "ce_exit": torch.where(safe, 1.0, 2.0),
        "ce_full": torch.ones(count),
        "kl": (~safe).float(),
        "flops": torch.tensor([40.0, 60.0, 80.0, 100.0], dtype=torch.float64).repeat(count, 1),
        "same_text": safe,
        "right": safe.clone(),
        "answered": torch.ones(count, dtype=torch.bool),
    }
    info = LabelInfo("free-running", count, "data", model, f"{model}-0", "float32", WIDTH, LAYERS, 1, count, 1)
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(asdict(info)))
    write_tensors(folder / info.shards[0], columns, info.header(0))
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("heads") / "labels", 1200)


def test_wilson_interval_against_published_values() -> None:
    # Newcombe (1998), table I: 81/263 and 0/20
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize("kind", ["default", "light"])
def test_heads_learn_a_rule_that_is_there(labels: Path, tmp_path: Path, kind) -> None:
    settings = HeadSettings.of(kind, hidden=32, lr=1e-2, epochs=30, batch=32, target_agreement=0.9, rms_eps=None)
    settings = replace(settings, rms_eps=None)  # the rule is in the size of the state
    heads = train_heads(labels, tmp_path / "h.safetensors", settings)
    fresh, _ = load_labels(write_labels(tmp_path / "fresh", 400, seed=1), settings.states)
    assert ((exit_probabilities(heads, fresh.pooled) > 0.5) == fresh.label).float().mean() > 0.93
    stored = ExitHeads.load(tmp_path / "h.safetensors")
    assert stored.config.shared == (kind == "light")
    torch.testing.assert_close(exit_probabilities(stored, fresh.pooled), exit_probabilities(heads, fresh.pooled))
    assert stored.metadata["model_fingerprint"] == "made-up-0"
    assert stored.metadata["data_fingerprint"] == "data"
    assert stored.metadata["calibration"]["samples"] == 240
    report = evaluate_heads(tmp_path / "fresh", [tmp_path / "h.safetensors"])[str(tmp_path / "h.safetensors")]
    assert report["agreement"]["share"] >= 0.88 and report["mean_exit_layer"] < 2
    assert report["agreement"] == report["accuracy"] and report["accuracy_without_exit"]["share"] == 1
    assert not (tmp_path / "h.safetensors.state").exists()


def plain_paper_loop(data, rows: torch.Tensor, drawn: list[int], orders: list[torch.Tensor]) -> list:
    """Spec section 3 written out: a pair of Linear layers for each decoder layer, its own optimiser state."""
    start = ExitHeads(HeadSettings.of("paper", hidden=16).config(WIDTH, LAYERS), seed=0)
    weights = [[torch.nn.Parameter(w.data[layer].clone()) for w in (start.w1, start.w2)] for layer in range(LAYERS)]
    optimiser = torch.optim.AdamW([w for pair in weights for w in pair], lr=4e-5, weight_decay=0.0)
    steps = math.ceil(len(rows) / 128)
    for step in range(steps):
        warmup = max(1, round(0.03 * steps))
        progress = (step - warmup) / (steps - warmup)
        rate = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        optimiser.param_groups[0]["lr"] = 4e-5 * rate
        batch, layer = rows[orders[0][step * 128 : step * 128 + 128]], drawn[step]
        with torch.autocast("cpu", torch.bfloat16):
            w1, w2 = weights[layer]
            logits = F.linear(F.gelu(F.linear(data.pooled[batch, layer], w1)), w2)
        optimiser.zero_grad()
        F.cross_entropy(logits.float(), data.label[batch, layer].long()).backward()
        optimiser.step()
    return weights


def test_paper_mode_is_the_papers_recipe(labels: Path, tmp_path: Path, monkeypatch) -> None:
    drawn, orders = [], []
    draw, permute = module.Trainer._drawn_layers, torch.randperm
    monkeypatch.setattr(
        module.Trainer, "_drawn_layers", lambda self: drawn.append((self.step, draw(self)[0])) or draw(self)
    )
    monkeypatch.setattr(torch, "randperm", lambda n, **k: orders.append(permute(n, **k)) or orders[-1])
    settings = HeadSettings.of("paper", hidden=16)
    heads = train_heads(labels, tmp_path / "p.safetensors", settings)
    data, info = load_labels(labels, settings.states)
    by_step = dict(drawn)
    assert len(by_step) == 7 and len(set(by_step.values())) > 1
    rows = Parts.of(info.samples, 0).train
    want = plain_paper_loop(data, rows, [by_step[s] for s in range(7)], orders[1:])
    for layer, (w1, w2) in enumerate(want):
        torch.testing.assert_close(heads.w1[layer], w1, rtol=0, atol=1e-7)
        torch.testing.assert_close(heads.w2[layer], w2, rtol=0, atol=1e-7)
    assert heads.metadata["threshold"] == 0.5


def test_the_best_epoch_is_kept(labels: Path, tmp_path: Path, monkeypatch) -> None:
    kept = []
    end = module.Trainer._end_epoch
    monkeypatch.setattr(
        module.Trainer, "_end_epoch", lambda self, log: (end(self, log), kept.append(self.heads.w1.detach().clone()))
    )
    heads = train_heads(
        labels, tmp_path / "h", HeadSettings.of("default", hidden=8, lr=0.2, epochs=6, target_agreement=0.9)
    )
    history = heads.metadata["history"]
    assert len(set(history)) > 1
    assert torch.equal(heads.w1, kept[history.index(min(history))])


def test_class_weights_give_both_verdicts_half_of_the_loss(tmp_path: Path) -> None:
    """The first step's loss, all samples in one batch: the mean over "exit" and the mean over "stay", halved."""
    data, info = load_labels(write_labels(tmp_path / "labels", 100), STATE_BITS)
    data.label = torch.rand(100, LAYERS, generator=torch.Generator().manual_seed(0)) < 0.15
    settings = HeadSettings.of("default", hidden=16, epochs=1, batch=100, states=tuple(STATE_BITS), class_weights=True)
    config, parts = settings.config(WIDTH, LAYERS), Parts.of(info.samples, 0)
    start, losses = ExitHeads(config, seed=0).requires_grad_(False), []
    trainer = module.Trainer(config, data, parts, settings, module._accelerator())
    trainer.train(None, None, 100, lambda name, value, step: losses.append(value) if name == "loss" else None)
    given = data.rows(parts.train)
    said = torch.stack([start(given.pooled[:, n], n) for n in range(LAYERS)], 1).log_softmax(-1)
    exits, stays = -said[given.label][:, 1].mean(), -said[~given.label][:, 0].mean()
    assert 0.1 < given.label.float().mean() < 0.2 and abs(exits - stays) > 0.05
    torch.testing.assert_close(torch.tensor(losses), (exits + stays)[None] / 2)


def test_too_few_samples_for_the_promise(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"0.999 cannot be guaranteed with 240 .* at least 2995"):
        train_heads(labels, tmp_path / "h", HeadSettings.of("light", target_agreement=0.999))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidArgumentError, match="accepted: one of them"):
        HeadSettings.of("light", target_agreement=0.9, target_flops=0.6)
    with pytest.raises(InvalidArgumentError, match="targets is 'regret' for kind paper; accepted: label"):
        HeadSettings.of("paper", targets="regret")
    with pytest.raises(InvalidArgumentError, match="kind is 'heavy'; accepted: paper, default, light"):
        HeadSettings.of("heavy")


RUN = """
import sys
from dyvte_engine.training.train_heads import HeadSettings, train_heads
labels, out, kind, targets = sys.argv[1:]
settings = HeadSettings.of(kind, hidden=16, epochs=3, batch=16, target_agreement=0.5, targets=targets)
print("begin", flush=True)
train_heads(labels, out, settings, save_every=2)
print("end", flush=True)
"""


@pytest.mark.parametrize(("kind", "targets"), [("light", "regret"), ("paper", "label")])
def test_killed_at_any_moment_it_ends_in_the_same_bytes(labels: Path, tmp_path: Path, kind, targets) -> None:
    settings = HeadSettings.of(kind, hidden=16, epochs=3, batch=16, target_agreement=0.5, targets=targets)
    started = time.monotonic()
    train_heads(labels, tmp_path / "whole", settings, save_every=2)
    whole = time.monotonic() - started
    rng, kills = random.Random(1), 0
    for attempt in range(20):
        command = [sys.executable, "-c", RUN, str(labels), str(tmp_path / "killed"), kind, targets]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"begin\n"
            while attempt < 2 and not (tmp_path / "killed.state").exists() and process.poll() is None:
                time.sleep(0.001)
            try:
                process.wait(rng.uniform(0, whole / 2) if attempt < 2 else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
                continue
        assert process.returncode == 0
        break
    assert kills >= 1
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_state_is_saved_every_so_many_steps_and_after_an_epoch(labels: Path, tmp_path: Path, monkeypatch) -> None:
    saved, save = [], module.Trainer._save
    monkeypatch.setattr(module.Trainer, "_save", lambda self, *args: saved.append(self.step) or save(self, *args))
    settings = HeadSettings.of("light", hidden=4, epochs=2, batch=200, target_agreement=0.9)
    train_heads(labels, tmp_path / "h", settings, save_every=2)
    epoch = math.ceil(len(Parts.of(1200, 0).train) / 200)
    assert epoch % 2 == 1 and saved == [n for n in range(1, 2 * epoch + 1) if n % 2 == 0 or n % epoch == 0]


def test_a_state_of_another_run_is_refused(labels: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_calibrated", stop)
    settings = HeadSettings.of("light", hidden=8, epochs=1, target_agreement=0.9)
    with pytest.raises(KeyboardInterrupt):
        train_heads(labels, tmp_path / "h", settings)
    with pytest.raises(DataError, match=r"h.state belongs to a run with other settings"):
        train_heads(labels, tmp_path / "h", replace(settings, lr=1e-4))


def test_two_processes_do_what_one_does(labels: Path, tmp_path: Path) -> None:
    """Under regrets, whose first epoch learns from labels."""
    targets = "regret"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", RUN, str(labels), str(tmp_path / "two"), "light", targets]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE)
        for r in ("0", "1")
    ]
    errors = [rank.communicate()[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert errors[1].count("epoch") == 0 < errors[0].count("epoch"), "one process reports"
    settings = HeadSettings.of("light", hidden=16, epochs=3, batch=16, target_agreement=0.5, targets=targets)
    train_heads(labels, tmp_path / "one", settings, save_every=2)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_tensorboard(labels: Path, tmp_path: Path, monkeypatch) -> None:
    settings = HeadSettings.of("light", hidden=8, epochs=1, target_agreement=0.9)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(InvalidArgumentError, match="pip install tensorboard"):
            train_heads(labels, tmp_path / "h", settings, tensorboard=tmp_path / "curves")
    pytest.importorskip("tensorboard")
    heads = train_heads(labels, tmp_path / "h", settings, tensorboard=tmp_path / "curves")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    curves = accumulator.EventAccumulator(str(tmp_path / "curves")).Reload()
    held = [event.value for event in curves.Scalars("held-out mean exit layer")]
    assert held == pytest.approx(heads.metadata["history"])


def test_ablation_trains_the_fifteen_combinations(labels: Path, tmp_path: Path) -> None:
    assert len(set(combinations_of_states())) == 15
    settings = HeadSettings.of("default", hidden=16, epochs=8, lr=1e-2, target_agreement=0.9)
    shown: list[str] = []
    rows = ablate(labels, tmp_path / "a", settings, shown.append)
    assert list(rows)[:5] == ["MV", "LV", "MT", "LT", "MV+LV"] and len(rows) == 15
    for name, row in rows.items():  # only mean_text knows
        assert ("MT" in name.split("+")) == (row["mean_exit_layer"] < 2), (name, row["mean_exit_layer"])
    assert re.match(r"heads +agreement % +accuracy % +exit layer +FLOPs %\nMV +9\d\.\d ", shown[0])
    before = (tmp_path / "a" / "MT.safetensors").stat().st_mtime_ns
    assert ablate(labels, tmp_path / "a", settings, lambda _: None) == rows
    assert (tmp_path / "a" / "MT.safetensors").stat().st_mtime_ns == before


def test_heads_of_another_model_are_measured_with_a_warning(labels: Path, tmp_path: Path) -> None:
    train_heads(labels, tmp_path / "h", HeadSettings.of("light", hidden=8, epochs=1, target_agreement=0.9))
    other = write_labels(tmp_path / "other", 50, seed=5, model="cousin")
    with pytest.warns(UserWarning, match=r"heads of made-up \(made-up-0\) on labels of cousin \(cousin-0\)"):
        rows = evaluate_heads(other, [tmp_path / "h"])
    assert rows[str(tmp_path / "h")]["heads_of"] == "made-up" and rows[str(tmp_path / "h")]["model"] == "cousin"
    assert rows[str(tmp_path / "h")]["agreement"]["n"] == 50


def test_commands_on_a_tiny_model(tmp_path: Path) -> None:
    """label, train-heads and test-heads as they are called; then the heads of one seed on the other's labels."""
    rng = random.Random(2)
    lines = []
    for number in range(30):
        tiny.picture(rng).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": f"w{number} w{rng.randrange(90)}"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    for seed in ("0", "1"):
        tiny.save(tmp_path / f"m{seed}", seed=int(seed))
        here = ["--data", tmp_path / "data.jsonl", "--out", tmp_path / f"l{seed}", "--device", "cpu"]
        said = call("label", tmp_path / f"m{seed}", *here, "--mode", "self", "--max-new-tokens", 3)
        assert f"30 samples of m{seed} labelled" in said
    options = ["--kind", "light", "--target-agreement", "0.5", "--epochs", "2", "--hysteresis", "2"]
    said = call("train-heads", tmp_path / "l0", "--out", tmp_path / "h.safetensors", "--by-layer", *options)
    assert len(ExitHeads.load(tmp_path / "h.safetensors").metadata["threshold"]) == 4
    assert len(said.split("threshold ")[1].split(", ")) == 4
    said = call("train-heads", tmp_path / "l0", "--out", tmp_path / "h.safetensors", *options)
    assert "at most 50 % of answers change, at a confidence of 95 %" in said
    assert ExitHeads.load(tmp_path / "h.safetensors").metadata["calibration"]["hysteresis"] == 2
    said = call("test-heads", tmp_path / "l0", tmp_path / "h.safetensors", "--out", tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())[str(tmp_path / "h.safetensors")]["agreement"]["n"] == 30
    with pytest.warns(UserWarning, match="exit heads of m0 .* on labels of m1"):
        call("test-heads", tmp_path / "l1", tmp_path / "h.safetensors")


def test_the_learning_rate_rises_and_falls_as_a_cosine() -> None:
    """From its peak on as transformers' schedule; before, step 0 learns too."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_cosine_schedule_with_warmup(optimiser, 10, 100).lr_lambdas[0]
    settings = HeadSettings(warmup=0.1)
    ours = [module.Trainer._schedule(SimpleNamespace(step=step, settings=settings), 100) for step in range(100)]
    assert ours[:10] == [(step + 1) / 10 for step in range(10)]
    assert ours[10:] == pytest.approx([theirs(step) for step in range(10, 100)])
    assert module.Trainer._schedule(SimpleNamespace(step=0, settings=settings), 1) == 1.0


NO_COUNT, NO_SHARE = (0, -1, True, 1.5, "x", None), (0, 1.5, -1, math.nan, math.inf, "x", True)
REFUSED = {
    "epochs": NO_COUNT,
    "batch": NO_COUNT,
    "hidden": NO_COUNT,
    "lr": (0, -1, 1.5, math.nan, math.inf, "x", None),
    "seed": (2**70, -(2**70), 1.5, True, None),
    "delta": (*NO_SHARE, None),
    "target_agreement": NO_SHARE,
    "target_flops": NO_SHARE,
    "states": ((), ("x",), ("mean_text", "x")),
    "rms_eps": (-1, math.nan, "x"),
    "hysteresis": NO_COUNT,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_out_of_range_are_refused_by_name(name: str) -> None:
    for value in REFUSED[name]:
        with pytest.raises(InvalidArgumentError, match=f"{name} is .*; accepted: "):
            HeadSettings(**{"target_agreement": None, name: value})
    with pytest.raises(InvalidArgumentError, match="target_agreement and target_flops were given"):
        HeadSettings(target_agreement=0.9, target_flops=0.5)
    with pytest.raises(InvalidArgumentError, match="by_layer is given without a target; accepted: "):
        HeadSettings.of("paper", by_layer=True)  # a threshold of 0.5 for all is what it has


@pytest.mark.parametrize("never", [dict(min_layer=LAYERS - 1), dict(hysteresis=LAYERS), dict(every_k=9, hysteresis=2)])
def test_heads_under_which_nothing_could_leave_are_not_trained(never: dict, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"min_layer is .* layers \d are asked; accepted: at least hysteresis"
    ):
        train_heads(labels, tmp_path / "h", HeadSettings.of("light", target_agreement=0.5, **never))
    assert not list(tmp_path.iterdir())


def test_what_comes_with_the_settings_is_refused_by_name(labels: Path, tmp_path: Path) -> None:
    few = HeadSettings(hidden=4, epochs=1, target_agreement=0.5)
    for save_every in (0, -1, True, 1.5):
        with pytest.raises(InvalidArgumentError, match=r"save_every is .*; accepted: whole numbers, at least 1"):
            train_heads(labels, tmp_path / "h", few, save_every=save_every)
    for states in ((), ("x",), ("mean_text", "x")):
        with pytest.raises(InvalidArgumentError, match=r"states is .*; accepted: a non-empty subset of"):
            load_labels(labels, states)


def test_a_batch_may_be_larger_than_all_samples(labels: Path, tmp_path: Path) -> None:
    made = [
        train_heads(labels, tmp_path / str(batch), HeadSettings(hidden=4, epochs=2, batch=batch, target_agreement=0.5))
        for batch in (1200, 2**70)
    ]
    assert made[0].w1.equal(made[1].w1)


def test_kinds_are_as_documented() -> None:
    paper, default, light = (HeadSettings.of(kind) for kind in ("paper", "default", "light"))
    assert (paper.lr, paper.epochs, paper.hidden, paper.target_agreement) == (4e-5, 1, 2048, None)
    assert (default.lr, default.epochs, default.hidden, default.rms_eps, default.target_agreement) == (
        1e-3, 20, 2048, None, 0.99,
    )  # fmt: skip
    assert (light.hidden, light.rms_eps, light.epochs) == (256, 1e-6, 20)
