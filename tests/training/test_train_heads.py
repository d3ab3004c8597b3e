"""The head trainer: first exits and calibration by hand, learning a rule that is there, a whole run on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from dyvte_engine.exit_head import ExitHeadConfig, ExitHeads
from dyvte_engine.models.adapters import load_model
from dyvte_engine.training import train_heads
from dyvte_engine.training.head_data import HeadData
from dyvte_engine.training.metrics import wilson
from dyvte_engine.training.nano import scenes
from dyvte_engine.training.nano.model import build_config, build_model, build_processor, build_tokenizer, save
from dyvte_engine.training.train_heads import HeadSettings, agreement, calibrate, exit_probabilities, first_exits, train


def test_the_first_layer_over_the_threshold_exits() -> None:
    p_exit = torch.tensor([[0.1, 0.6, 0.9, 0.2], [0.7, 0.8, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1]])
    assert first_exits(p_exit, 0.5).tolist() == [1, 0, 3]
    assert first_exits(p_exit, 0.75).tolist() == [2, 1, 3]
    agree = torch.tensor([[False, False, True, True], [False, True, True, True], [False, False, False, True]])
    assert agreement(p_exit, agree, 0.5) == (1, pytest.approx(4 / 3))
    assert agreement(p_exit, agree, 0.75) == (3, 2.0)
    assert 0.69 < calibrate(p_exit, agree, 1.0) < 0.8


def test_calibration_without_a_good_threshold_never_exits() -> None:
    p_exit = torch.full((4, 3), 0.99999)
    agree = torch.tensor([[False, False, True]] * 4)
    assert calibrate(p_exit, agree, 0.99) == 1.0


def test_heads_learn_a_rule_that_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(600, 3, 16, generator=generator)
    label = pooled[..., 0] > torch.tensor([1.0, 0.0, -1.0])
    label[:, -1] = True
    data = HeadData(pooled, label, label, [])
    heads = ExitHeads(ExitHeadConfig(8, 3, head_hidden=32), seed=0)
    train(heads, data, HeadSettings(epochs=30, batch=32, lr=3e-3))
    fresh = torch.randn(400, 3, 16, generator=generator)
    expected = fresh[..., 0] > torch.tensor([1.0, 0.0, -1.0])
    expected[:, -1] = True
    assert ((exit_probabilities(heads, fresh) > 0.5) == expected).float().mean() > 0.93


def test_wilson_interval_against_published_values() -> None:
    # Newcombe (1998), table I: 81/263 and 0/20
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize("extra", [[], ["--paper", "--rule", "paper"]])
def test_a_whole_run_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]) -> None:
    tokenizer = build_tokenizer()
    folder = tmp_path / "tiny"
    save(build_model(build_config(tokenizer, tiny=True), seed=0), build_processor(tokenizer), folder)
    lines = []
    for index in range(12):
        scenes.render(scenes.sample_scene(0, "train", index)).save(tmp_path / f"{index}.png")
        lines.append(
            json.dumps(
                {"image": f"{index}.png", "prompt": "Is there a star?", **({"answer": "no"} if index % 2 else {})}
            )
        )
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    out, report = tmp_path / "heads.safetensors", tmp_path / "report.json"
    paths = ["--data", str(tmp_path / "list.jsonl"), "--report", str(tmp_path / "list.jsonl"), "--out", str(out)]
    options = ["--report-out", str(report), "--head-hidden", "8", "--dtype", "float32", "--label-batch", "5", *extra]
    monkeypatch.setattr(sys, "argv", ["train_heads", "--model", str(folder), *paths, *options])
    train_heads.main()
    heads = ExitHeads.load(out)
    model = load_model(folder, torch.float32, torch.device("cpu"), None, False)
    assert heads.metadata["model_fingerprint"] == model.fingerprint
    written = json.loads(report.read_text())
    assert written["threshold"] == heads.metadata["threshold"]
    assert written["report"]["agreement"]["n"] == 12
    assert written["report"]["fixed_exit_agreement"][-1] == 1.0
