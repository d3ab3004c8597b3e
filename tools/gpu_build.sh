# To be sourced: builds for the GPU present with the python3 in PATH into build/gpu. Sets PYTHON and `stage`, a copy of
# the package there, so that a build in the source tree stays as it is.
PYTHON=$(command -v "${PYTHON:-python3}")
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

arch=$("$PYTHON" - <<'PY'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} finds no CUDA device")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", file=sys.stderr)
major, minor = torch.cuda.get_device_capability()
print({(9, 0): "90a"}.get((major, minor), f"{major}{minor}"))
PY
)

stage=$PWD/build/gpu/package
rm -rf "$stage" && mkdir -p "$stage"
cp -r dyvte_engine tests benchmarks pyproject.toml "$stage" && rm -f "$stage"/dyvte_engine/*.so
cmake -S . -B build/gpu -G Ninja -DDYVTE_CUDA=ON "-DDYVTE_CUDA_ARCHS=$arch" "-DPython_EXECUTABLE=$PYTHON" \
  "-DDYVTE_OUTPUT_DIR=$stage/dyvte_engine"
cmake --build build/gpu
