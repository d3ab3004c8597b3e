"""What was built is what it says it is, asks little of the system, and carries one version number."""

import ast
import contextlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import packaging.tags
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dyvte_engine
from dyvte_engine import _C
from dyvte_engine.kernels import ops

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module", autouse=True)
def tools_on_the_path():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def audit():
    import audit_symbols

    return audit_symbols


def libraries() -> list[Path]:
    return [ROOT / "dyvte_engine" / "libdyvte.so", Path(_C.__file__)]


def test_one_version():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert dyvte_engine.__version__ == declared
    assert ops.build_info()["version"] == declared


def test_every_public_name_is_there_at_first_use():
    """In a fresh interpreter, so that no other test has imported the submodules."""
    code = "import dyvte_engine as d\nassert d.hf.generate and [getattr(d, name) for name in d.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_ops_passes_on_what_the_python_module_says():
    assert ops.build_info() == _C.build_info()


def test_the_environments_of_compat_have_what_the_tests_import():
    import compat

    homes, there = packages_distributions(), set()
    try:
        waiting = [*compat.other_requirements(), *compat.RELEASES]
    except PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    while waiting:  # what these ask for comes with them
        name = canonicalize_name(Requirement(waiting.pop()).name)
        if name not in there:
            there.add(name)
            with contextlib.suppress(PackageNotFoundError):  # of another system
                waiting += [text for text in requires(name) or [] if "extra ==" not in text]
    for file in sorted((ROOT / "tests").rglob("*.py")):
        nodes = ast.parse(file.read_text()).body
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        for name in names:
            found = set(map(canonicalize_name, homes.get(name.partition(".")[0], ()))) - {"dyvte-engine"}
            assert not found or found & there, f"{file}: {name}"


def test_build_info_matches_the_machine_code():
    """The library says it has CUDA exactly if it holds device code; cudart is linked in statically."""
    code = b"".join(path.read_bytes() for path in libraries())
    assert ops.build_info()["cuda"] == (b".nv_fatbin" in code)


def test_audit_passes(audit, capsys):
    assert all(audit.audit(path) for path in libraries()), capsys.readouterr().out


def test_audit_sees_what_must_not_be_there(audit):
    """torch's own Python library uses C++ symbols of torch and links to libraries that a stable extension must not."""
    found = audit.problems(audit.elf.read(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
    assert any(problem.startswith("undefined symbol _ZN3c10") for problem in found)
    assert "links to libc10.so" in found


def test_symbol_reader_agrees_with_nm(audit):
    assert shutil.which("nm"), "nm (binutils) is needed, as it is for building"
    for path in libraries():
        lines = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout.splitlines()
        undefined = {line.split()[-1] for line in lines if line.split()[-2] in "Uwv"}
        library = audit.elf.read(path)
        assert {f"{s.name}@{s.version}" if s.version else s.name for s in library.undefined} == undefined
        defined = {line.split()[-1].split("@")[0] for line in lines if line.split()[-2] not in "Uwv"}
        assert set(library.exported) == defined


def test_no_library_holds_the_path_of_its_build():
    for path in libraries():
        assert str(ROOT).encode() not in path.read_bytes(), path.name


def test_the_source_archive_holds_all_that_a_build_needs(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        there = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    listed = ["git", "ls-files", "dyvte_engine", "csrc", "python_bindings"]
    kept = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {*kept, "CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} - there == set()
    assert [name for name in there if name.startswith(("tests/", "benchmarks/")) or name.endswith(".so")] == []


def test_a_wheel_is_tagged_with_the_glibc_its_libraries_need(tmp_path, audit):
    """They load here, so that pip must take the tag here; a symbol of a newer glibc moves the tag."""
    import elf
    import tag_wheel

    found = [elf.read(path) for path in libraries()]
    major, minor = tag_wheel.oldest_glibc(found)
    here = {tag.platform for tag in packaging.tags.sys_tags()}
    assert f"manylinux_{major}_{minor}_{platform.machine()}" in here
    newer = replace(found[0], undefined=[*found[0].undefined, elf.Symbol("f", "GLIBC_2.38", False)])
    assert tag_wheel.oldest_glibc([newer]) == (2, 39)
    with pytest.raises(SystemExit, match="no distribution"):
        tag_wheel.oldest_glibc([replace(newer, undefined=[elf.Symbol("f", "GLIBCXX_3.4.99", False)])])
    wheel = tmp_path / "x-1-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(Path(torch.__file__).parent / "lib" / "libtorch_python.so", "x/x.so")
    with pytest.raises(SystemExit, match="gets no tag: undefined symbol"):
        tag_wheel.tag(wheel)


def test_a_function_is_measured_without_its_docstring():
    import function_length

    body = "    x = 1\n" * (function_length.LIMIT - 1)
    text = '    """' + "word\n" * 20 + '"""\n'
    assert list(function_length.too_long(f"def f():\n{text}{body}")) == []
    assert list(function_length.too_long(f"def f():\n{text}{body}    y = 2\n")) == [(1, "f", function_length.LIMIT + 1)]
