#!/usr/bin/env bash
# GPU tests and compute-sanitizer on the machine's own Python: needs torch >= 2.11, transformers, pytest, pybind11, cmake,
# ninja, nvcc and a GPU; asks for no network and no virtual environment. Builds for the GPU present into build/gpu and
# runs a copy of the package there, so that a build in the source tree stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

arch=$("$PYTHON" - <<'PY'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu-check: torch {torch.__version__} finds no CUDA device")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", file=sys.stderr)
major, minor = torch.cuda.get_device_capability()
print({(9, 0): "90a"}.get((major, minor), f"{major}{minor}"))
PY
)

stage=$PWD/build/gpu/package
rm -rf "$stage" && mkdir -p "$stage"
cp -r dyvte_engine tests pyproject.toml "$stage" && rm -f "$stage"/dyvte_engine/*.so
cmake -S . -B build/gpu -G Ninja -DDYVTE_CUDA=ON "-DDYVTE_CUDA_ARCHS=$arch" "-DPython_EXECUTABLE=$PYTHON" \
  "-DDYVTE_OUTPUT_DIR=$stage/dyvte_engine"
cmake --build build/gpu

cd "$stage"
"$PYTHON" -m dyvte_engine.doctor
"$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
# Without torch's caching allocator each tensor is its own allocation, so that a step over its end is seen.
for tool in memcheck racecheck synccheck; do
  echo "compute-sanitizer $tool"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/ops/test_sanitizer.py
done
