import json
import subprocess
import sys

import pytest

from dyvte_engine import doctor, ops


@pytest.fixture(scope="module")
def report():
    return doctor.collect()


def doctor_process(*arguments: str, preamble: str = "") -> subprocess.CompletedProcess:
    code = f"import sys; {preamble}; from dyvte_engine import doctor; sys.exit(doctor.main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_this_build_is_usable(report):
    assert report["usable"], report["problems"]
    assert report["native"]["build"] == ops.build_info()
    assert report["native"]["runs"]["cpu"] is None


def test_every_backend_works_or_says_why(report):
    named = {(record["name"], record["device"]): record["reason"] for record in report["attention"]}
    assert named["sdpa", "cpu"] is None
    assert (
        named["torch varlen_attn with pages", "cuda"] is None or len(named["torch varlen_attn with pages", "cuda"]) > 5
    )
    if not report["gpu"]["devices"]:
        assert "finds no CUDA device" in report["gpu"]["reason"]
        assert report["native"]["runs"]["cuda"]


@pytest.mark.gpu
def test_kernels_run_on_the_gpu(report):
    assert report["native"]["runs"]["cuda"] is None
    assert report["gpu"]["devices"]


def test_json_on_the_command_line():
    done = subprocess.run([sys.executable, "-m", "dyvte_engine.doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usable"] is True


def test_table_holds_every_finding(report, capsys):
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    for key in report["native"]["build"]:
        assert key in shown
    assert "The engine can run here." in shown


def test_unknown_argument():
    assert doctor.main(["--yaml"]) == 2


@pytest.mark.parametrize("module", ["dyvte_engine.ops", "transformers"])
def test_a_missing_part_is_reported(module):
    done = doctor_process("--json", preamble=f"sys.modules[{module!r}] = None")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["usable"] is False
    assert any("ModuleNotFoundError" in problem or "ImportError" in problem for problem in found["problems"])


def test_a_library_that_does_not_load(monkeypatch, capsys):
    def broken():
        raise ops.NativeLibraryError("libdyvte.so: cannot open shared object file")

    monkeypatch.setattr(ops, "load_library", broken)
    assert doctor.run() == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "cannot open shared object file" in shown
    assert "make build" in shown


def test_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.run() == 0
    assert "packages: torch:" in capsys.readouterr().out
