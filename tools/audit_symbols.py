"""Audits what the native libraries ask of the system they are loaded on.

    python tools/audit_symbols.py [LIBRARY ...]     default: those in dyvte_engine/

A library passes when every undefined symbol belongs to libc, libm, libstdc++ or libgcc (these carry a version), to
the C shim of torch's stable ABI, or, in the Python module alone, to CPython; when it links to nothing else; when it
carries no path of the machine that built it; and when it exports no CUDA symbol, which another CUDA runtime in the
process could bind to.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import elf

PACKAGE = Path(__file__).resolve().parent.parent / "dyvte_engine"
SYSTEM_VERSION = re.compile(r"^(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")
STABLE_SHIM = re.compile(r"^(aoti_)?torch_[a-z0-9_]+$")
CPYTHON = re.compile(r"^_?Py[A-Z_]")
TOOLCHAIN_HOOKS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
SYSTEM_LIBRARIES = re.compile(r"^(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)|ld-linux-[a-z0-9-]+)\.so(\.\d+)?$")
TORCH_LIBRARIES = {"libtorch.so", "libtorch_cpu.so"}
CUDA_NAMES = re.compile(r"^_{0,3}(cu[A-Z]|cuda|nv[A-Z])")


def is_python_module(library: elf.SharedLibrary) -> bool:
    return any(name.startswith("PyInit_") for name in library.exported)


def foreign_symbol(symbol: elf.Symbol, python_module: bool) -> bool:
    if symbol.version is not None:
        return SYSTEM_VERSION.match(symbol.version) is None
    if symbol.name in TOOLCHAIN_HOOKS:
        return False
    allowed = CPYTHON if python_module else STABLE_SHIM
    return allowed.match(symbol.name) is None


def problems(library: elf.SharedLibrary) -> list[str]:
    """Sentences that say what is wrong with `library`; empty when it passes."""
    python_module = is_python_module(library)
    torch_libraries = set() if python_module else TORCH_LIBRARIES
    found = [f"undefined symbol {s.name}" for s in library.undefined if foreign_symbol(s, python_module)]
    found += [
        f"links to {name}"
        for name in library.needed
        if name not in torch_libraries and SYSTEM_LIBRARIES.match(name) is None
    ]
    found += [f"run path {path}" for path in library.run_paths if not path.startswith("$ORIGIN")]
    found += [f"exports {name}" for name in library.exported if CUDA_NAMES.match(name)]
    return found


def newest_versions(library: elf.SharedLibrary) -> dict[str, str]:
    """The newest version asked of each versioned system library: {"GLIBC": "2.34", ...}."""
    newest: dict[str, tuple[int, ...]] = {}
    for symbol in library.undefined:
        if symbol.version and SYSTEM_VERSION.match(symbol.version):
            family, number = symbol.version.rsplit("_", 1)
            newest[family] = max(newest.get(family, ()), tuple(map(int, number.split("."))))
    return {family: ".".join(map(str, number)) for family, number in sorted(newest.items())}


def audit(path: Path) -> bool:
    library = elf.read(path)
    found = problems(library)
    shim = sum(s.version is None and STABLE_SHIM.match(s.name) is not None for s in library.undefined)
    wants = ", ".join(f"{family} {number}" for family, number in newest_versions(library).items())
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {len(library.exported)} symbols exported")
    print(f"  undefined: {len(library.undefined)}, of them {shim} of the torch C shim; needs {wants}")
    print(f"  links to: {' '.join(library.needed)}")
    for problem in found:
        print(f"  NOT ALLOWED: {problem}")
    return not found


def main() -> int:
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(PACKAGE.rglob("*.so"))
    if len(paths) < 2 and not sys.argv[1:]:
        print(f"audit: expected the ops library and the Python module in {PACKAGE}; build them first (make build)")
        return 1
    passed = [audit(path) for path in paths]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
