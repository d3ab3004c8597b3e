"""Tests and measures on a machine with a GPU, in parts of at most 8 minutes each: `python tools/gpu.py run a b`.

A part needs torch, transformers, pytest, rich and matplotlib, and no network. The native libraries are those that
`make gpu-prebuild` made elsewhere (copy `build/gpu/native` over), else they are built here, which needs cmake, ninja,
pybind11 and nvcc too. After every step the part's archive in --out is written anew, so a part that is stopped loses
one step; unpacked in `outputs`, it is where `make bench-docs` looks. Without git, DYVTE_COMMIT is what the records
name as their commit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
NATIVE = BUILD / "native"  # the two libraries and what they were built from
MINUTES = 8.0
LARGE = ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "qwen2.5-vl-7b")
GPU_TESTS = (  # other test files import what training and drawing need, which this Python may lack
    "tests/ops",
    "tests/engine/test_gpu.py",
    "tests/engine/test_graphs.py tests/engine/test_fused.py tests/engine/test_tower_layers.py",
    "tests/policies",
    "tests/analysis/test_attention.py tests/test_doctor.py",
    "tests/families/test_quick_processor.py tests/families/test_picture_scaling.py",
)


@dataclass(frozen=True)
class Step:
    """One command: the interpreter's arguments, and those of its rehearsal on a CPU."""

    name: str
    command: Sequence[str]
    rehearsal: Sequence[str]
    before: Sequence[str] = ()  # what the interpreter runs under
    environment: dict[str, str] = field(default_factory=dict)


def gpu_tests(files: str) -> list[str]:
    return ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files.split()]


def tests(files: str) -> Step:
    """The GPU tests of some files, in several processes where pytest-xdist is there; the rehearsal collects them."""
    command = gpu_tests(files)
    together = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    return Step(f"tests {files}", [*command, *together], [*command, "--collect-only"])


def sanitizer(tool: str) -> Step:
    """Without torch's caching allocator each tensor is its own allocation, so that a step over its end is seen."""
    command = gpu_tests("tests/ops/test_sanitizer.py")
    before = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
    around = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(f"sanitizer {tool}", command, [*command, "--collect-only"], before, around)


def bench(module: str, model: str, options: str, rehearsal: str = "--seconds 0", suffix: str = "") -> Step:
    """A benchmark at a published size; the rehearsal's options come after its own, on a tiny checkpoint."""
    name = "-".join(filter(None, ("gpu", module, model, suffix)))
    command = ["-m", f"benchmarks.{module}", "--out", "{results}/benchmarks", "--name", name]
    size = ["--model", model] if model else []
    real = [*command, "--device", "cuda", "--dtype", "bfloat16", *size, *options.split()]
    tiny = [*real, "--device", "cpu", "--dtype", "float32", *(["--model", "{tiny}"] if model else [])]
    return Step(name, real, [*tiny, *rehearsal.split()])


def policies(model: str, batch: str, new_tokens: str = "1 3 16 128", suffix: str = "") -> Step:
    options = f"--batch {batch} --new-tokens {new_tokens} --seconds 8 --least 1"
    return bench("policies", model, options, "--batch 1 --new-tokens 2 --seconds 0", suffix)


def decoding(model: str) -> Step:
    return bench("decoding", model, "--batch 1 2 4 8 --seconds 2", "--batch 1 --rows 20 --seconds 0")


def kernels(options: str) -> Step:
    sizes = f"--sizes {' '.join(LARGE)} --batch 1 8 32 {options}"
    return bench("kernels", "", sizes, "--sizes nano --batch 1 --compile --seconds 0")


def capacity(model: str, options: str = "") -> Step:
    small = "--budget 0.5 --questions 2 --sets 1 --new-tokens 2 --group 2 --methods FastV --seconds 0 --least 1"
    return bench("capacity", model, options, small)


def serving(model: str) -> Step:
    """Half of it in two minutes; the command's own defaults but for what it says of `max_stall`."""
    small = "--clients 1 2 --rates 4 --requests 2 --new-tokens 2 4 --slots 2 --max-len 128 --kv-memory 1 --max-stall 64"
    late = "--engines static transformers --transformers-clients 2 --seconds 0 --least 1"
    return bench("serving", model, "--max-stall 2048 4096 16384", f"{small} {late}")


def smol(minutes: float) -> Step:
    """All of it in one stage (docs/smol.md), in outputs/smol."""
    command = ["-m", "dyvte_engine.training.smol.train"]
    pictures = "--fresh --naming 0.12 --pictures 10000000 --workers 14"
    options = f"--stage tower --fit --minutes {minutes} --batch 32 --rate 3 {pictures}".split()
    return Step("smol", [*command, *options, "--out", str(ROOT / "outputs" / "smol")], [*command, "--help"])


def smol_heads() -> list[Step]:
    """Labels, heads and their curve, of the smol that ships, in outputs/smol-heads."""
    out, command = ROOT / "outputs" / "smol-heads", ["-m", "dyvte_engine.commands.main"]
    small = "--kind default --hidden 64 --rms-eps 1e-6"
    kinds = {"light": "--kind light", "small": small, "by-layer": f"{small} --by-layer"}
    label = f"label smol --data smol --samples 4608 --mode self --batch 64 --max-len 512 --out {out / 'labels'}"
    trained = {n: f"train-heads {out / 'labels'} {o} --out {out / n}.safetensors" for n, o in kinds.items()}
    curve = f"sweep smol --source emoji --limit 100 --answers {out / 'sweep.jsonl'} --page {out / 'curve.md'}"
    heads = "".join(f" --heads {name}={out / name}.safetensors" for name in kinds)
    calls = {
        "label": label,
        **trained,
        "sweep": f"{curve} --plot {out / 'curve.png'} --out {out / 'curve.json'}{heads}",
    }
    return [Step(f"smol {n}", [*command, *c.split()], [*command, c.split()[0], "--help"]) for n, c in calls.items()]


def smol_findings() -> list[Step]:
    """The paper's figures and tables of the smol that ships (docs/findings.md), in outputs/findings-smol."""
    common = f"smol --source emoji --limit 100 --batch 64 --out {ROOT / 'outputs' / 'findings-smol'}"
    tasks = "pope,gqa,vqav2,textvqa,sqa,mmb,seed,mme,mmvet"
    analyze = f"analyze {common} --data {tasks} --attention 24 --examples 0"
    calls = {"analyze": analyze, "reproduce": f"reproduce {common}"}
    command = ["-m", "dyvte_engine.commands.main"]
    return [Step(f"smol {n}", [*command, *c.split()], [*command, n, "--help"]) for n, c in calls.items()]


@dataclass(frozen=True)
class Part:
    what: str
    steps: Sequence[Step]
    minutes: float = MINUTES


PARTS = {
    "a": Part(
        "the doctor and the GPU tests",
        [Step("doctor", ["-m", "dyvte_engine.commands.doctor"], ["-m", "dyvte_engine.commands.doctor"])]
        + [tests(files) for files in GPU_TESTS],
    ),
    "b": Part("compute-sanitizer", [sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck")]),
    "c": Part(
        "13B: all methods, where the time goes, exit decisions, decoding steps; every kernel",
        [
            policies("llava-1.5-13b", "1"),
            bench("breakdown", "llava-1.5-13b", "--exit 11 --new-tokens 3 --seconds 5", "--exit 1 --seconds 0"),
            bench("decisions", "llava-1.5-13b", "--batch 1 8 --seconds 3", "--batch 1 --seconds 0"),
            decoding("llava-1.5-13b"),
            kernels("--seconds 0.2"),
        ],
    ),
    "d": Part(
        "7B, batches of 1 and 8: all methods; decoding steps",
        [policies("llava-1.5-7b", "1 8"), decoding("llava-1.5-7b"), policies("llava-next-7b", "1", "1 3 16")],
    ),
    "e": Part(
        "7B in batches of 32; how many sequences fit, 13B",
        [
            policies("llava-1.5-7b", "32", suffix="batch-32"),
            capacity("llava-1.5-13b", "--budget 16384 --questions 16 --seconds 0 --least 1"),
        ],
    ),
    "f": Part(
        "training of smol (needs peft and smol's parts, docs/smol.md)",
        [smol(5)],
    ),
    "g": Part("exit heads of smol (needs smol's parts)", smol_heads()),
    "h": Part("the paper's figures and tables of smol (needs smol's parts)", smol_findings()),
    "s": Part("continuous batching, 7B", [serving("llava-1.5-7b")]),
    "full": Part(
        "every size at every batch size, longer answers, growth; about an hour",
        [
            step
            for model in LARGE[:3]
            for step in (
                policies(model, "1 8 32", "1 3 16 128 512"),
                bench("breakdown", model, ""),
                bench("decisions", model, "--batch 1 8 32", "--batch 1 --seconds 0"),
                capacity(model),
            )
        ]
        + [
            bench("growth", "", "--model llava-1.5-7b --layers 8 16 32 --base 576 32 1 16", "--help"),
            kernels(f"--compile {' '.join(LARGE)}"),
        ],
        minutes=120.0,
    ),
}


def sources() -> str:
    """A hash of everything the native libraries are built from."""
    files = [p for folder in ("csrc", "python_bindings") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    digest = hashlib.sha256()
    for path in [*files, ROOT / "CMakeLists.txt"]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(arch: str, module_python: str) -> None:
    """Both libraries into NATIVE: for GPUs of `arch`, `_C` for another Python if one is named."""
    shutil.rmtree(NATIVE, ignore_errors=True)
    NATIVE.mkdir(parents=True)
    options = [f"-DDYVTE_CUDA_ARCHS={arch}", f"-DDYVTE_OUTPUT_DIR={NATIVE}", f"-DDYVTE_MODULE_PYTHON={module_python}"]
    cmake = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DDYVTE_CUDA=ON"]
    subprocess.run([*cmake, f"-DPython_EXECUTABLE={sys.executable}", *options], check=True, env=environment())
    subprocess.run(["cmake", "--build", str(BUILD)], check=True, env=environment())
    (NATIVE / "built.json").write_text(json.dumps({"sources": sources(), "archs": arch.split(";")}))


def environment() -> dict[str, str]:
    """This one's, with CUDA's tools and those of this Python's environment in PATH."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], str(cuda)))}


def why_not(arch: str) -> str | None:
    """Why the libraries in NATIVE cannot be used here, or None."""
    record = NATIVE / "built.json"
    if not record.is_file():
        return "nothing was built before"
    built = json.loads(record.read_text())
    if built["sources"] != sources():
        return "the sources have changed since"
    if arch not in built["archs"]:
        return f"it is for {', '.join(built['archs'])}, this GPU is {arch}"
    module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return None if (NATIVE / module).is_file() else f"it has no {module}"


def gpu_arch() -> str:
    """The architecture of the GPU, as nvcc names it; exits where torch finds none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    major, minor = torch.cuda.get_device_capability()
    return {(9, 0): "90a"}.get((major, minor), f"{major}{minor}")


def stage() -> Path:
    """A copy of the package with the libraries for this GPU, so that a build in the source tree stays as it is."""
    arch = gpu_arch()
    reason = why_not(arch)
    if reason is not None:
        print(f"building: {reason}")
        build(arch, "")
    package = BUILD / "package"
    shutil.rmtree(package, ignore_errors=True)
    for name in ("dyvte_engine", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", package)
    for library in NATIVE.glob("*.so"):
        shutil.copy(library, package / "dyvte_engine")
    return package


class Call:
    """One part on its way: its folder of results, its archive, its deadline."""

    def __init__(self, name: str, out: Path, dry: bool, package: Path):
        self.name, self.part, self.dry, self.package = name, PARTS[name], dry, package
        self.results, self.archive = BUILD / "results" / name, out / f"gpu-{name}.tar.gz"
        shutil.rmtree(self.results, ignore_errors=True)
        (self.results / "logs").mkdir(parents=True)
        out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * self.part.minutes

    def run(self) -> list[str]:
        """Every step, and what became of those that did not succeed."""
        print(f"=== {self.name}: {self.part.what}", flush=True)
        failed = []
        for step in self.part.steps:
            start = time.monotonic()
            problem = self._step(step) if start < self.end else "not begun: the time is up"
            print(f"{step.name}: {problem or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
            failed += [f"{step.name}: {problem}"] if problem else []
            self._pack()
        return failed

    def _step(self, step: Step) -> str | None:
        log = self.results / "logs" / f"{step.name.replace(' ', '-').replace('/', '-')}.txt"
        # Relative, since records keep the command they were made by.
        places = {"{results}": os.path.relpath(self.results, self.package), "{tiny}": str(BUILD / "tiny")}
        arguments = list(step.rehearsal if self.dry else step.command)
        for mark, place in places.items():
            arguments = [a.replace(mark, place) for a in arguments]
        before = [] if self.dry else list(step.before)
        around = {**environment(), **step.environment, "PYTHONPATH": str(self.package), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as file:
            problem = _within(self.end, [*before, sys.executable, *arguments], self.package, around, file)
        print("".join(log.read_text().splitlines(keepends=True)[-40 if problem else -12 :]), flush=True)
        return problem

    def _pack(self) -> None:
        new = self.archive.with_suffix(".new")
        with tarfile.open(new, "w:gz") as tar:
            for path in sorted(self.results.iterdir()):
                tar.add(path, arcname=path.name)
        new.replace(self.archive)


def _within(end: float, command: Sequence[str], folder: Path, around: dict[str, str], log: IO[str]) -> str | None:
    """Run a command until `end` at most; why it did not succeed, or None."""
    try:
        process = subprocess.Popen(command, cwd=folder, env=around, stdout=log, stderr=log, start_new_session=True)
    except FileNotFoundError as error:
        return str(error)
    try:
        code = process.wait(end - time.monotonic())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
        return "stopped: the time is up"
    return f"exit code {code}" if code else None


def tiny_checkpoint() -> None:
    """What rehearsals run in place of a published size."""
    code = f"from tests import tiny; tiny.save({str(BUILD / 'tiny')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    prebuild = verbs.add_parser("prebuild", help="the libraries for a machine with a GPU, made on one without")
    prebuild.add_argument("--arch", default="90a", help="its architecture, as nvcc names it; several with semicolons")
    prebuild.add_argument("--module-python", default="", help="one of its version, with headers; default: this one")
    run = verbs.add_parser("run", help="; ".join(f"{name}: {part.what}" for name, part in PARTS.items()))
    run.add_argument("parts", nargs="+", choices=list(PARTS))
    run.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="folder of the archives")
    run.add_argument("--dry", action="store_true", help="rehearse on the CPU: tests are collected, models are tiny")
    args = parser.parse_args(argv)
    if args.verb == "prebuild":
        build(args.arch, args.module_python)
        return
    if args.dry:
        tiny_checkpoint()
    package = ROOT if args.dry else stage()
    failed = [f for name in args.parts for f in Call(name, args.out.resolve(), args.dry, package).run()]
    if failed:
        sys.exit("\n".join(("failed:", *failed)))


if __name__ == "__main__":
    main()
