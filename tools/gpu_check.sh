#!/usr/bin/env bash
# GPU tests and compute-sanitizer on the machine's own Python: needs torch >= 2.11, transformers, pytest, pybind11, cmake,
# ninja, nvcc and a GPU; asks for no network and no virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/gpu_build.sh

cd "$stage"
"$PYTHON" -m dyvte_engine.commands.doctor
# Only files with GPU tests: others import what training and drawing need, which this Python may lack.
"$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/ops tests/engine/test_gpu.py tests/engine/test_graphs.py tests/policies tests/analysis/test_attention.py tests/test_doctor.py
# Without torch's caching allocator each tensor is its own allocation, so that a step over its end is seen.
for tool in memcheck racecheck synccheck; do
  echo "compute-sanitizer $tool"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/ops/test_sanitizer.py
done
