#!/usr/bin/env bash
# Builds for the GPU of this machine, runs every test on it, then memcheck and racecheck over the kernels.
#
#   bash integration_tests/run_gpu.sh [summary file] [directory of logs]
#
# Needs python3 with torch, transformers, pytest, pybind11, wrapt; nvcc and compute-sanitizer on the PATH.
# EET_TEST_WORKERS sets the number of pytest processes where pytest-xdist is there; EET_TEST_PARTS
# names what is run, for when a GPU is there for a few minutes only: "ops end_to_end at_size sanitize".
set -uo pipefail
cd "$(dirname "$0")/.."
summary=${1:-gpu_tests.txt}
logs=${2:-$(mktemp -d)}
mkdir -p "$logs"
summary=$(realpath -m "$summary")
export PATH="$PATH:/usr/local/cuda/bin" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0
parts=" ${EET_TEST_PARTS:-ops end_to_end at_size sanitize} "
# Tests that fill the GPU, or limit its memory: one after the other, with nothing beside them.
alone=(generation/test_answers_at_size.py generation/test_large.py generation/test_stress.py)

wanted() { [[ $parts == *" $1 "* ]]; }

EET_CUDA=1 EET_CUDA_ARCHS=native python3 setup.py -q build_ext --inplace > "$logs/build.log" 2>&1 \
  || { tail -40 "$logs/build.log"; exit 1; }

parallel=()
python3 -c "import xdist" 2> /dev/null && parallel=(-n "${EET_TEST_WORKERS:-8}")

# name, then the arguments of pytest
tests() {
  local name=$1
  shift
  (cd integration_tests && EET_TEST_DEVICES=cuda timeout "${EET_TEST_TIMEOUT:-300}" \
    python3 -m pytest -q -p no:cacheprovider "${parallel[@]}" "$@" > "$logs/$name.log" 2>&1) || failed=1
  echo "$name: $(grep -E '[0-9]+ (passed|failed|error)' "$logs/$name.log" | tail -1 | tr -d '=' | xargs)"
  grep -E '^(FAILED|ERROR)' "$logs/$name.log" | cut -c1-200 | head -40
}

# Every kernel through the Python ops, small cases in one process; torch's own kernels are left out.
memcheck() {
  local log="$logs/memcheck.log"
  (cd integration_tests && EET_TEST_DEVICES=cuda timeout "${EET_SANITIZE_TIMEOUT:-200}" compute-sanitizer \
    --tool memcheck --kernel-name kns=9eet_patch --error-exitcode 9 \
    python3 -m pytest -q -p no:cacheprovider -m sanitize ops > "$log" 2>&1) || failed=1
  echo "memcheck of the ops: $(grep 'SUMMARY' "$log" | tail -1 | tr -d '=' | xargs);" \
    "$(grep -E '[0-9]+ (passed|failed|error)' "$log" | tail -1 | tr -d '=' | xargs)"
}

# Every kernel without torch in the process: racecheck itself fails on cuBLAS ("Internal Sanitizer
# Error"), with or without us. A sanitizer takes one core: the parts run side by side.
kernels() {
  local tool=$1 part log
  for part in generation rows linear attention blocks walking tiles; do
    timeout "${EET_SANITIZE_TIMEOUT:-200}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$logs/sanitize_kernels" "${@:2}" "$part" > "$logs/$1_$part.log" 2>&1 &
  done
  wait
  for part in generation rows linear attention blocks walking tiles; do
    log="$logs/$1_$part.log"
    grep -q 'sanitize_kernels: .* 0 errors' "$log" \
      && grep -qE '(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)' "$log" || failed=1
    echo "$tool of the kernels alone, ${*:2} $part: $(grep 'SUMMARY' "$log" | tail -1 | tr -d '=' | xargs);" \
      "$(grep 'sanitize_kernels:' "$log" | xargs)"
  done
}

{
  echo "GPU tests of eet_patch, commit ${EET_COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}"
  python3 - << 'PY'
import platform, torch, transformers
from eet_patch.ops._extension import extension
print(f"{torch.cuda.get_device_name(0)}, sm_{''.join(map(str, torch.cuda.get_device_capability(0)))}")
print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
print("extension:", extension().build_info())
PY
  wanted ops && tests ops ops
  wanted end_to_end && tests end_to_end patching transformers generation models "${alone[@]/#/--ignore=}"
  # Its commands are tested on the CPU, on models that take minutes to train.
  if wanted end_to_end && python3 -c "import importlib.metadata as m; m.version('ve-fairseq')" 2> /dev/null; then
    tests fairseq fairseq/test_layers.py fairseq/test_search.py fairseq/test_whole_encoder.py
  fi
  parallel=()
  wanted at_size && for file in "${alone[@]}"; do
    name=$(basename "$file" .py)
    tests "${name#test_}" "$file" --durations=5
  done
  if ! wanted sanitize; then
    echo "compute-sanitizer not asked for"
  elif command -v compute-sanitizer > /dev/null; then
    memcheck
    nvcc -std=c++17 -O2 -Icsrc -arch=native integration_tests/sanitize_kernels.cu \
      $(find build -path '*cuda/*.cuda.o') -o "$logs/sanitize_kernels" || failed=1
    kernels memcheck
    kernels racecheck small
  else
    echo "compute-sanitizer is not there: memcheck and racecheck not run"
    failed=1
  fi
  [ "$failed" = 0 ] && echo "all passed" || echo "NOT all passed"
} 2>&1 | tee "$summary"
grep -qx "all passed" "$summary"
