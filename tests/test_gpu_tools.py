"""What runs on a machine with a GPU, as far as a machine without one can tell."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USUAL = ["torch", "transformers", "numpy", "pillow", "safetensors", "typer", "rich", "matplotlib", "pytest"]
# What follows it finds no module but those of these distributions, and of what they ask for.
BLOCKED = """
import importlib.metadata, sys
from importlib.machinery import PathFinder
from packaging.requirements import Requirement

def plain(name):
    return name.lower().replace("_", "-")

allowed, waiting = set(), [*USUAL]
while waiting:
    name = plain(waiting.pop())
    if name in allowed:
        continue
    allowed.add(name)
    try:
        asked = map(Requirement, importlib.metadata.requires(name) or [])
    except importlib.metadata.PackageNotFoundError:
        continue
    waiting += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
homes = importlib.metadata.packages_distributions()

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = homes.get(name.partition(".")[0], ())
        if found and not {plain(home) for home in found} & {*allowed, "dyvte-engine"}:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
""".replace("USUAL", repr(USUAL))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")


def blocked(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_parts_run_every_gpu_test():
    listed = [ROOT / path for files in gpu.GPU_TESTS for path in files.split()]
    marked = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"mark\.gpu\b", path.read_text())]
    assert marked and all(path.exists() for path in listed)
    assert [path for path in marked if not any(path.is_relative_to(there) for there in listed)] == []


def test_the_block_blocks():
    assert "No module named 'easy_vqa'" in blocked("import easy_vqa").stderr


def test_benchmarks_import_little():
    """What parts f, g and h run with needs more, and they say so."""
    commands = [step.command for name, part in gpu.PARTS.items() if name not in "fgh" for step in part.steps]
    modules = sorted({command[1] for command in commands} - {"pytest"})
    assert "benchmarks.policies" in modules and "dyvte_engine.commands.doctor" in modules
    done = blocked(f"import importlib\nfor name in {modules}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr[-2000:]


def test_gpu_tests_import_little():
    files = [path for files in gpu.GPU_TESTS for path in files.split()]
    options = ["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    done = blocked(f"import pytest; sys.exit(pytest.main({options + files}))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    collected = int(re.search(r"(\d+)/\d+ tests collected", done.stdout).group(1))
    assert collected > 300


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Steps of which the second fails, the third hangs and the fourth is never begun."""
    programs = ["print('fine')", "raise SystemExit(3)", "import time; time.sleep(60)", "print('never')"]
    steps = [gpu.Step(f"step {n}", ["-c", code], []) for n, code in enumerate(programs)]
    steps.insert(2, gpu.Step("tool", [], [], before=["no-such-tool"]))
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setitem(gpu.PARTS, "x", gpu.Part("a test", steps, minutes=1 / 20))
    return gpu.Call("x", tmp_path / "out", False, tmp_path)


def test_a_part_runs_all_its_steps_within_its_time(part, monkeypatch, tmp_path):
    packed, pack = [], gpu.Call._pack

    def counted(call):
        pack(call)
        with tarfile.open(tmp_path / "out" / "gpu-x.tar.gz") as tar:
            packed.append([name for name in tar.getnames() if name.endswith(".txt")])

    monkeypatch.setattr(gpu.Call, "_pack", counted)
    failed = part.run()
    assert failed == [
        "step 1: exit code 3",
        "tool: [Errno 2] No such file or directory: 'no-such-tool'",
        "step 2: stopped: the time is up",
        "step 3: not begun: the time is up",
    ]
    logs = ["logs/step-0.txt", "logs/step-1.txt", "logs/step-2.txt", "logs/tool.txt"]
    assert packed[0] == logs[:1] and packed[1] == logs[:2] and packed[-1] == logs
    with tarfile.open(tmp_path / "out" / "gpu-x.tar.gz") as tar:
        assert tar.extractfile("logs/step-0.txt").read() == b"fine\n"


def test_libraries_made_elsewhere_are_used_if_they_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "NATIVE", tmp_path)
    assert "nothing was built" in gpu.why_not("90a")
    record = tmp_path / "built.json"
    record.write_text('{"sources": "other", "archs": ["90a"]}')
    assert "sources have changed" in gpu.why_not("90a")
    record.write_text(json.dumps({"sources": gpu.sources(), "archs": ["90a", "100"]}))
    assert gpu.why_not("80") == "it is for 90a, 100, this GPU is 80"
    assert "it has no _C.cpython" in gpu.why_not("90a")
    (tmp_path / f"_C{gpu.sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert gpu.why_not("90a") is None


def test_parts_fit_into_their_calls():
    for name, part in gpu.PARTS.items():
        names = [step.name for step in part.steps]
        assert len(set(names)) == len(names), "one would write over the other's results"
        assert name == "full" or part.minutes <= 8


def test_no_rehearsal_asks_for_a_gpu():
    rehearsals = [step.rehearsal for part in gpu.PARTS.values() for step in part.steps]
    chosen = [[after for option, after in itertools.pairwise(r) if option == "--device"] for r in rehearsals]
    assert {devices[-1] for devices in chosen if devices} == {"cpu"}
