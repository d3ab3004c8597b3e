"""The native libraries themselves: what was built, what they say when missing, every CPU instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyvte_engine import _C
from dyvte_engine.errors import NativeLibraryError
from dyvte_engine.kernels import ops

ISAS = ["generic", "avx2", "avx512", "avx512_bf16"]


def test_build_info() -> None:
    info = ops.build_info()
    assert info["cpu_isa"] in ISAS
    assert info["torch_target"] == "2.11"
    assert bool(info["cuda_version"]) == info["cuda"]
    assert bool(info["cuda_reason"]) != info["cuda"]


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "kernels" / "ops.py"))
    with pytest.raises(NativeLibraryError, match=r"libdyvte.so is missing from .*make build"):
        ops.load_library()
    (tmp_path / "libdyvte.so").write_text("no library")
    with pytest.raises(NativeLibraryError, match="does not load into torch"):
        ops.load_library()


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(ops.build_info()["cpu_isa"])])
def test_lower_instruction_sets(isa: str) -> None:
    """Every kernel of an instruction set again, with those of an older processor."""
    if os.environ.get("DYVTE_CPU_ISA"):
        pytest.skip("already running with DYVTE_CPU_ISA")
    here = Path(__file__).parent
    names = ("test_fusions.py", "test_linear.py", "test_rope_append.py", "test_decode_attention.py")
    names += ("test_varlen_attention.py", "test_paged_attention.py", "test_exit_head.py", "test_token_score.py")
    files = [str(here / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *files]
    command += ["-k", "not opcheck and not full_size"]  # what a kernel says of itself is the same in each
    run = subprocess.run(command, env=os.environ | {"DYVTE_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]


def test_threads_do_not_change_results() -> None:
    threads = torch.get_num_threads()
    q, pool = torch.randn(3, 8, 64), torch.randn(3, 1600, 2, 64)
    args = (q, pool, pool, ops.contiguous_block_table(1, 3)[0], torch.tensor([1600, 900, 3], dtype=torch.int32), 0.125)
    w1, w2, ranges = torch.randn(512, 1024), torch.randn(2, 512), torch.tensor([[0, 40]], dtype=torch.int32)
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(
                (ops.decode_attention(*args), ops.exit_head(torch.ones(40, 512), ranges, None, None, w1, w2)[0])
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_mixed_devices_and_meta() -> None:
    x = torch.empty(3, 64, device="meta")
    assert ops.rms_norm(x, torch.empty(64, device="meta"), 1e-5).shape == (3, 64)
    assert ops.exit_head(x, torch.empty(5, 2, device="meta"), None, None, x, x)[1].dtype == torch.bool


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without CUDA devices")
def test_compiles() -> None:
    """torch.compile traces the ops through their fake kernels."""

    def block(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.silu_mul(ops.add_rms_norm_(residual, x, w, 1e-5)) * 2

    x, residual, w = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    expected = block(x, residual.clone(), w)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, residual, w), expected)


class TestPageAllocator:
    def test_lowest_pages_first_and_reuse(self) -> None:
        pages = ops.PageAllocator(5)
        assert pages.alloc(3) == [0, 1, 2]
        pages.free([1])
        assert pages.alloc(2) == [1, 3]
        assert (pages.used_count, pages.free_count) == (4, 1)

    def test_all_or_nothing(self) -> None:
        pages = ops.PageAllocator(3)
        with pytest.raises(MemoryError, match="asked for 4 pages, 3 of 3 are free") as raised:
            pages.alloc(4)
        assert raised.type is _C.OutOfPagesError
        assert pages.alloc(0) == [] and pages.free_count == 3

    @pytest.mark.parametrize("freed", [[0, 0], [1], [-1], [3], [0, 7]])
    def test_bad_free_changes_nothing(self, freed: list[int]) -> None:
        pages = ops.PageAllocator(3)
        pages.alloc(1)
        with pytest.raises(ValueError, match="pages must hold"):
            pages.free(freed)
        assert pages.used_count == 1 and pages.alloc(2) == [1, 2]

    def test_bad_counts(self) -> None:
        with pytest.raises(ValueError, match="n_pages must not be negative, got -1"):
            ops.PageAllocator(-1)
        with pytest.raises(ValueError, match="n must not be negative, got -2"):
            ops.PageAllocator(1).alloc(-2)
        assert ops.PageAllocator(0).alloc(0) == []
