"""Shared by all tests: no hub is ever asked, few threads, GPU tests only where there is a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(min(torch.get_num_threads(), 4))
torch.backends.cudnn.allow_tf32 = False  # float32 on a GPU is compared with the CPU's; matmuls have no TF32 by default
NOT_RUN = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def _threads_as_before():
    """`serve` limits torch's, for the rest of its process; sums of other parts would have other last bits."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if torch.cuda.is_available() or config.option.collectonly or not gpu:
        return
    config.stash[NOT_RUN] = len(gpu)
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(NOT_RUN, 0):
        terminalreporter.write_line(f"{config.stash[NOT_RUN]} GPU tests not run: torch finds no CUDA device")
