"""Compiles every CUDA kernel and reports registers, shared memory and register spills; a spill is an error.

python csrc/tests/check_spills.py [arch ...]     (default: 80 90a; needs nvcc, no GPU)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{CSRC / 'include'}", "-Xptxas", "-v", "-cubin", "-o", "/dev/null"]
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def check(source: Path, arch: str) -> bool:
    run = subprocess.run(["nvcc", f"-arch=sm_{arch}", *FLAGS, str(source)], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    log = run.stdout + run.stderr
    registers, shared = ([int(n) for n in pattern.findall(log)] for pattern in (USED, SHARED))
    spilled = sum(found != ("0", "0", "0") for found in SPILLS.findall(log))
    print(
        f"sm_{arch:4} {source.name:22} {len(registers):3} kernels, at most {max(registers):3} registers and "
        f"{max(shared, default=0):5} bytes shared; {spilled} with spills",
        flush=True,
    )
    return not spilled


def main() -> None:
    archs = sys.argv[1:] or ["80", "90a"]
    passed = [check(source, arch) for arch in archs for source in sorted((CSRC / "cuda").glob("*.cu"))]
    sys.exit(0 if all(passed) else "register spills")


if __name__ == "__main__":
    main()
