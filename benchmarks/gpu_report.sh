#!/usr/bin/env bash
# All that one GPU can say of this code's speed, beside PyTorch, in about ten minutes; JSON and tables into a folder:
#
#   bash benchmarks/gpu_report.sh docs/gpu
#
# What fails, or takes longer than it should, is left out and named at the end. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?name a folder for the results}
python=${PYTHON:-python}
mkdir -p "$out"
trace=$(mktemp -d)
gpu="--device=gpu --dtype=bfloat16"
failed=""

measure() {  # seconds it may take, name, command
  local limit=$1 name=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || failed="$failed $name"
  tail -n 3 "$out/$name.log"
}

# shellcheck disable=SC2086 # of $gpu
{
measure 240 train $python -m benchmarks.train_step $gpu --batch=256 --steps=10 --output="$out/train.json"
measure 150 train_1024 $python -m benchmarks.train_step $gpu --batch=1024 --remat=dots --steps=5 --peer_modes \
  --trace="$trace" --output="$out/train_1024.json"
measure 30 trace_1024 $python -m benchmarks.trace_summary "$trace" --steps=3 --json="$out/trace_1024.json"
measure 150 windows $python -m benchmarks.windows $gpu --batch=64 --steps=10 --output="$out/windows.json"
measure 150 inference $python -m benchmarks.inference $gpu --batch=256 --steps=10 --output="$out/inference.json"
measure 120 tests env JAX_PLATFORMS=cuda $python -m pytest -m gpu tests/test_gpu.py
measure 100 growth_512 $python -m benchmarks.train_step $gpu --batch=512 --remat=dots --steps=5 --peer_modes \
  --output="$out/train_512.json"
}
echo "failed or too long:${failed:- none}"
