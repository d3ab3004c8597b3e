"""What was built is what it says it is, asks little of the system, and carries one version number."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dyvte_engine
from dyvte_engine import _C
from dyvte_engine.kernels import ops

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def audit():
    sys.path.insert(0, str(TOOLS))
    try:
        import audit_symbols

        yield audit_symbols
    finally:
        sys.path.remove(str(TOOLS))


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
