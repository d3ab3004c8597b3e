"""Policies named by the heads that came with a model."""

import shutil

import pytest

from dyvte_engine import NANO, NANO_HEADS, DynamicExit, Engine, HeadsError, InvalidArgumentError, KeepAll
from dyvte_engine.policies.auto import policy_for
from dyvte_engine.policies.notation import parse


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("auto", f"dynamic:{NANO_HEADS}"),
        ("dynamic:auto", f"dynamic:{NANO_HEADS}"),
        ("dynamic:auto,0.5", f"dynamic:{NANO_HEADS},0.5"),
        ("dynamic:auto,0.5,min_layer=4", f"dynamic:{NANO_HEADS},0.5,min_layer=4"),
        ("fastv:2,0.5+dynamic:auto", f"fastv:2,0.5+dynamic:{NANO_HEADS}"),
        ("fastv:2,0.5 + dynamic: auto ,0.4", f"fastv:2,0.5+dynamic:{NANO_HEADS},0.4"),
    ],
)
def test_auto_is_the_heads_of_the_model(text, wanted):
    engine = Engine.from_pretrained("nano", device="cpu", max_batch=1)
    example = NANO.parent / "examples" / "4_color.png"
    got, written, same = (
        engine.generate("what color is it?", example, policy=p) for p in (policy_for(text, "nano"), text, parse(wanted))
    )
    for result in (got, written):
        assert result.stats.tokens_per_layer == same.stats.tokens_per_layer and result.text == same.text
        assert result.stats.exit_layer is not None


def test_an_engine_knows_the_heads_of_its_model(tmp_path, monkeypatch):
    shutil.copytree(NANO, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    engine = Engine.from_pretrained("model", "auto", device="cpu", max_batch=1)
    monkeypatch.chdir("/")
    assert isinstance(engine.policy, DynamicExit) and engine.bind("auto") is engine.policy
    (tmp_path / "model" / NANO_HEADS.name).unlink()
    assert isinstance(engine.bind("auto"), KeepAll)
    with pytest.raises(HeadsError):
        engine.bind("dynamic:auto")


def test_files_whose_names_begin_so_are_themselves(tmp_path):
    for text in ("dynamic:automatic.safetensors", "dynamic:auto.safetensors", f"dynamic:{tmp_path}/auto"):
        with pytest.raises(HeadsError, match=r"automatic|auto\.safetensors|/auto"):
            policy_for(text, "nano")


def test_without_heads_in_the_folder(tmp_path):
    assert isinstance(policy_for("auto", tmp_path), KeepAll)
    with pytest.raises(HeadsError):
        policy_for("dynamic:auto", tmp_path)
    with pytest.raises(InvalidArgumentError):
        policy_for("dynamic:", tmp_path)
    assert isinstance(policy_for("dynamic:auto", "nano"), DynamicExit)
