"""Hands the native build to CMake; metadata is in pyproject.toml, every build decision in CMakeLists.txt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def run(self) -> None:
        # In the source tree for an editable install, else where the wheel is put together. Each has its own build
        # folder: ninja removes what it wrote before when its outputs move.
        output = ROOT / "dyvte_engine" if self.inplace else Path(self.build_lib).resolve() / "dyvte_engine"
        build = ROOT / "build" / f"{'editable' if self.inplace else 'wheel'}-{sys.implementation.cache_tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDYVTE_OUTPUT_DIR={output}",
            f"-DDYVTE_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        for option in ("DYVTE_CUDA", "DYVTE_CUDA_ARCHS", "DYVTE_NO_SPILLS"):
            configure.append(f"-D{option}={os.environ[option]}" if option in os.environ else f"-U{option}")
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("dyvte_engine._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
