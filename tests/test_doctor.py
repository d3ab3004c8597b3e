"""The doctor tells the truth about this machine, and never fails itself."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dyvte_engine import DeviceError
from dyvte_engine.commands import doctor
from dyvte_engine.kernels import ops
from tests.engine.conftest import build


@pytest.fixture(scope="module")
def report():
    return doctor.collect()


def test_this_build_is_usable(report):
    assert report["usable"], report["problems"]
    assert report["native"]["build"] == ops.build_info()
    assert report["native"]["runs"]["cpu"] is None


def test_every_backend_works_or_says_why(report):
    named = {(record["name"], record["device"]): record["reason"] for record in report["attention"]}
    assert named["sdpa", "cpu"] is None and named["native", "cpu"] is None
    assert (
        named["torch varlen_attn with pages", "cuda"] is None or len(named["torch varlen_attn with pages", "cuda"]) > 5
    )
    if not report["gpu"]["devices"]:
        assert "finds no CUDA device" in report["gpu"]["reason"]
        assert report["native"]["runs"]["cuda"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_packed_weights_are_there_for_an_engine_or_not(report, dtype):
    reason = report["packed_weights"][dtype]
    with nullcontext() if reason is None else pytest.raises(DeviceError, match=re.escape(reason)):
        build(dtype=getattr(torch, dtype), pack_weights=True)


@pytest.mark.gpu
def test_kernels_run_on_the_gpu(report):
    assert report["native"]["runs"]["cuda"] is None
    assert report["gpu"]["devices"]


def test_json_on_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "dyvte_engine.commands.doctor", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usable"] is True


def test_table_holds_every_finding(report, capsys):
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    for key, value in report["native"]["build"].items():
        assert value == "" or (key in shown and str(value) in shown)
    assert "The engine can run here." in shown


def test_unknown_argument():
    assert doctor.main(["--yaml"]) == 2


def test_before_the_native_build(tmp_path):
    """A fresh clone without its libraries: a report with the way to build, and exit code 1."""
    package = Path(doctor.__file__).parents[1]
    shutil.copytree(package, tmp_path / "dyvte_engine", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-m", "dyvte_engine.commands.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["usable"] is False
    assert "make build" in found["native"]["reason"]
    assert found["source_commit"] is None
    reasons = {record["name"]: record["reason"] for record in found["attention"] if record["device"] == "cpu"}
    assert reasons["sdpa"] is None and "make build" in reasons["native"]


@pytest.mark.parametrize("module", ["torch", "transformers", "dyvte_engine.kernels.ops"])
def test_a_missing_package_is_reported(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert doctor.run() == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"import of {module} halted" in shown or "cannot import name" in shown


def test_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.run() == 0
    assert "packages: torch:" in capsys.readouterr().out
