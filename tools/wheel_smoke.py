"""Installs the newest wheel of dist/ into an empty virtual environment and uses it from an empty folder.

    python tools/wheel_smoke.py [--torch VERSION]

torch is installed first, at the version given, so that the wheel's own requirement (a range) does not fetch another.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = ("tests/", "csrc/", "python_bindings/", "benchmarks/", "tools/", "build/")

EXAMPLE = str(ROOT / "dyvte_engine" / "assets" / "examples" / "7_color.png")

# Run inside the new environment: a kernel against its reference, and the Python module.
USE = """
import torch
import dyvte_engine
from dyvte_engine import _C
from dyvte_engine.kernels import ops
assert "site-packages" in dyvte_engine.__file__, dyvte_engine.__file__
x, weight = torch.randn(3, 64), torch.randn(64)
torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), ops.rms_norm_ref(x, weight, 1e-5))
assert _C.PageAllocator(4).alloc(2) == [0, 1]
print("kernels and page allocator work")
"""


def contents(wheel: Path) -> None:
    """Prints size and contents by kind; raises SystemExit for files that do not belong into a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
    names = [f.filename for f in files]
    stray = [name for name in names if name.startswith(FORBIDDEN) or name.endswith((".o", ".cu", ".cpp"))]
    if stray:
        raise SystemExit(f"{wheel.name} holds files that do not belong there: {stray}")
    for suffix in (".so", ".safetensors", ".py"):
        sizes = [f.file_size for f in files if f.filename.endswith(suffix)]
        print(f"  {len(sizes):3d} {suffix} files, {sum(sizes) / 1e6:.1f} MB")
        if not sizes:
            raise SystemExit(f"{wheel.name} holds no {suffix} file")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(files)} files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="2.13.0", help="version of torch to install first")
    options = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda p: p.stat().st_mtime)
    if not wheels:
        raise SystemExit("no wheel in dist/; run `make wheel`")
    contents(wheels[-1])

    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        environment, elsewhere = Path(folder, "venv"), Path(folder, "elsewhere")
        elsewhere.mkdir()
        venv.create(environment, with_pip=True)
        python = str(environment / "bin" / "python")

        def run(*command: str) -> None:
            subprocess.run(command, cwd=elsewhere, check=True, stdin=subprocess.DEVNULL)

        pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
        run(*pip, f"torch=={options.torch}")
        run(*pip, str(wheels[-1]))
        run(python, "-c", USE)
        run(python, "-m", "dyvte_engine.commands.doctor")
        run(str(environment / "bin" / "dyvte-engine"), "--help")
        run(python, "-m", "dyvte_engine", "generate", "--image", EXAMPLE, "--prompt", "What color is the rectangle?")
        run(*pip, f"{wheels[-1]}[eval]")  # with matplotlib, which only what draws needs
        run(python, "-m", "dyvte_engine.commands.demo")
        print("demo wrote:", *(p.name for p in elsewhere.rglob("*.png")))
    print("wheel smoke test passed")


if __name__ == "__main__":
    sys.exit(main())
