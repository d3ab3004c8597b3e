"""Runs tests against the built library in two throw-away environments: the oldest supported releases and the newest.

    python tools/compat.py [floor|newest ...]

All tests run on the oldest torch and transformers. On the newest torch those of kernels, engine and families do:
the newest transformers is what every other test run has. The library is not rebuilt: what is tried is the one that
`make build` made against its own torch. An environment takes about 6 GB, most of it the CUDA packages that torch asks
for, and is kept in .cache/compat for the next call.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "compat"
RELEASES = ("torch", "transformers")  # which of them, each environment says
GIB_PER_ENVIRONMENT = 8  # installed size plus what pip unpacks on the way


@dataclass(frozen=True)
class Releases:
    name: str
    torch: str
    transformers: str
    tests: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # what cannot be installed next to it; tests that need it are skipped


ENVIRONMENTS = (
    Releases("floor", "torch==2.11.0", "transformers==4.57.*", ("tests",), left_out=("gradio",)),
    Releases(
        "newest",
        "torch",
        "transformers<6",
        ("tests/ops", "tests/test_doctor.py", "tests/engine", "tests/families"),
    ),
)


def other_requirements(left_out: tuple[str, ...] = ()) -> list[str]:
    """What the installed package declares for use and, as its extra "dev", for its tests; without `RELEASES`."""
    declared = list(map(Requirement, importlib.metadata.requires("dyvte-engine") or []))
    extras, wanted = ["dev"], set()
    for extra in extras:  # one may name others
        for r in declared:
            if r.marker is not None and not r.marker.evaluate({"extra": extra}):
                continue
            if r.name == "dyvte-engine":
                extras += sorted(r.extras.difference(extras))
            elif r.name not in (*RELEASES, *left_out):
                wanted.add(str(r).partition(";")[0])
    return sorted(wanted)


def environment(releases: Releases) -> Path:
    """The Python of the environment, which is created or, for "newest", brought up to date."""
    folder = CACHE / releases.name
    python = folder / "bin" / "python"
    if not python.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(CACHE).free / 2**30
        if free < GIB_PER_ENVIRONMENT:
            raise SystemExit(f"compat: {free:.1f} GiB free, {GIB_PER_ENVIRONMENT} are needed for {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir", "--upgrade"]
    subprocess.run([*pip, releases.torch], check=True, stdin=subprocess.DEVNULL)
    subprocess.run(
        [*pip, releases.transformers, *other_requirements(releases.left_out)], check=True, stdin=subprocess.DEVNULL
    )
    return python


def check(releases: Releases) -> bool:
    start = time.monotonic()
    python = environment(releases)
    versions = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
    shown = subprocess.run([python, "-c", versions], capture_output=True, text=True, check=True).stdout.strip()
    print(f"compat {releases.name}: {shown} (environment ready after {time.monotonic() - start:.0f} s)", flush=True)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *releases.tests]
    passed = subprocess.run(pytest, cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0
    print(
        f"compat {releases.name}: {'passed' if passed else 'FAILED'} after {time.monotonic() - start:.0f} s", flush=True
    )
    return passed


def main() -> int:
    known = {releases.name: releases for releases in ENVIRONMENTS}
    wanted = sys.argv[1:] or list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"compat: {unknown[0]!r} is not known; accepted: {', '.join(known)}")
    passed = [check(known[name]) for name in wanted]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
