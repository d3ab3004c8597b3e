"""Gives the wheels of dist/ that are tagged for this machine's Linux the manylinux tag that they deserve.

    python tools/tag_wheel.py [WHEEL ...]

The tag names the oldest glibc that the libraries inside load on, read from the versions of their symbols; that of
libstdc++ counts as the glibc of the first long-lived distributions that have it. torch is a requirement of the wheel
and is not copied into it, which is why auditwheel, which would do that, is not used. A library that the audit refuses
gets no tag.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import audit_symbols
import elf

ROOT = Path(__file__).resolve().parent.parent
Version = tuple[int, ...]

# The newest symbols of libstdc++ in distributions of a glibc, after the policies of PEP 600's manylinux tags.
DISTRIBUTIONS: dict[Version, dict[str, Version]] = {
    (2, 28): {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)},
    (2, 31): {"GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12)},
    (2, 34): {"GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)},
    (2, 35): {"GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)},
    (2, 39): {"GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15)},
}


def oldest_glibc(libraries: list[elf.SharedLibrary]) -> Version:
    """The oldest glibc of DISTRIBUTIONS that has every symbol; raises SystemExit where none has."""
    wanted = [(family, _numbers(v)) for lib in libraries for family, v in audit_symbols.newest_versions(lib).items()]
    for glibc, newest in DISTRIBUTIONS.items():
        there = {"GLIBC": glibc, **newest}
        if all(version <= there.get(family, version) for family, version in wanted):
            return glibc
    raise SystemExit(f"no distribution that is known here has all of {wanted}")


def _numbers(version: str) -> Version:
    return tuple(map(int, version.split(".")))


def libraries_of(wheel: Path) -> list[elf.SharedLibrary]:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        return [elf.read(Path(archive.extract(name, folder))) for name in names]


def tag(wheel: Path) -> None:
    libraries = libraries_of(wheel)
    if refused := [problem for library in libraries for problem in audit_symbols.problems(library)]:
        raise SystemExit(f"{wheel.name} gets no tag: {'; '.join(refused)}")
    major, minor = oldest_glibc(libraries)
    platform = wheel.stem.rsplit("-", 1)[1].replace("linux", f"manylinux_{major}_{minor}", 1)
    subprocess.run([sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, wheel], check=True)


def main() -> None:
    for wheel in [Path(argument) for argument in sys.argv[1:]] or sorted((ROOT / "dist").glob("*-linux_*.whl")):
        tag(wheel)


if __name__ == "__main__":
    main()
