#!/usr/bin/env bash
# Benchmarks at published model sizes with random weights made on the GPU; no network, no virtual environment. Needs what
# gpu_check.sh needs, rich and matplotlib, and 60 GiB of GPU memory. Sized for 10 minutes on an H100 beside the build; with
# FULL=1 every batch size, 512-token answers and the growth curves too (about an hour). Results: outputs/benchmarks; then
# `make bench-docs` puts them into docs/benchmarks.md. Without a git checkout DYVTE_COMMIT tells the records their commit.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/gpu_build.sh

out=$PWD/outputs/benchmarks
cd "$stage"
run() { # run BENCHMARK NAME [options]: one that fails does not keep the others from running
  "$PYTHON" -m "benchmarks.$1" --device cuda --dtype bfloat16 --out "$out" --name "$2" "${@:3}" || failed+=("$2")
}
failed=()
large=(llava-1.5-7b llava-1.5-13b llava-next-7b qwen2.5-vl-7b)
if [[ ${FULL:-} ]]; then
  for model in llava-1.5-7b llava-1.5-13b llava-next-7b; do
    run policies "gpu-policies-$model" --model "$model" --batch 1 8 32 --new-tokens 1 3 16 128 512 --seconds 30
    run breakdown "gpu-breakdown-$model" --model "$model"
    run decisions "gpu-decisions-$model" --model "$model" --batch 1 8 32
    run capacity "gpu-capacity-$model" --model "$model"
  done
  run growth gpu-growth --model llava-1.5-7b --layers 8 16 32 --base 576 32 1 16
  run kernels gpu-kernels --sizes "${large[@]}" --batch 1 8 32 --compile "${large[@]}"
else
  run policies gpu-policies-llava-1.5-13b --model llava-1.5-13b --batch 1 --new-tokens 1 3 16 128 --seconds 8 --least 1
  run policies gpu-policies-llava-1.5-7b --model llava-1.5-7b --batch 1 8 32 --new-tokens 1 3 16 128 --seconds 8 --least 1
  run policies gpu-policies-llava-next-7b --model llava-next-7b --batch 1 --new-tokens 1 3 16 --seconds 8 --least 1
  run breakdown gpu-breakdown-llava-1.5-13b --model llava-1.5-13b --exit 11 --new-tokens 3 --seconds 5
  run decisions gpu-decisions-llava-1.5-13b --model llava-1.5-13b --batch 1 8 --seconds 3
  run capacity gpu-capacity-llava-1.5-13b --model llava-1.5-13b --budget 16384 --questions 16 --seconds 0 --least 1
  run kernels gpu-kernels --sizes "${large[@]}" --batch 1 8 32 --seconds 0.2
fi
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
