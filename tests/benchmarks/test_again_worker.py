"""What the worker for llama.cpp evaluates again, against a stand-in for its library."""

import ctypes
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("again_worker")
    for name in ("again_worker", "versus_worker"):
        sys.modules.pop(name, None)


def test_a_known_picture_is_not_evaluated_again(worker):
    log, sizes = [], (2, 5, 3)  # text, picture, text

    def evaluate(pictures, context, chunk, at, seq, batch, last, end):
        log.append((chunk, at.value, last))
        ctypes.cast(end, ctypes.POINTER(ctypes.c_int32))[0] = at.value + sizes[chunk]
        return 0

    llama = worker.LlamaCppAgain.__new__(worker.LlamaCppAgain)
    llama.mtmd = SimpleNamespace(
        mtmd_input_chunks_size=lambda chunks: 3,
        mtmd_input_chunks_get=lambda chunks, i: i,
        mtmd_input_chunk_get_type=lambda chunk: int(chunk == 1),
        mtmd_helper_eval_chunk_single=evaluate,
        mtmd_input_chunks_free=lambda chunks: None,
    )
    llama.llama = SimpleNamespace(
        llama_pos=ctypes.c_int32,
        llama_get_memory=lambda context: None,
        llama_memory_seq_rm=lambda memory, seq, first, end: log.append(("forget", first, end)),
    )
    llama.model, llama.context, llama.pictures = SimpleNamespace(n_batch=8), None, None
    llama.chunks = lambda picture, text: None
    red, blue = (Image.new("RGB", (2, 2), color) for color in ("red", "blue"))
    whole = [("forget", 0, -1), (0, 0, False), (1, 2, False), (2, 7, True)]
    for picture, want in ((red, whole), (red, [("forget", 7, -1), (2, 7, True)]), (blue, whole), (red, whole)):
        log.clear()
        llama.prefill(picture, "a question")
        assert log == want
