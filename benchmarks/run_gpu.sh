#!/usr/bin/env bash
# Measures parts of what the README shows of GPT-2 and fairseq, one after the other on one GPU, within a time.
#
#   CUDA_VISIBLE_DEVICES=0 EET_RESULTS=out/0 bash benchmarks/run_gpu.sh 480 compile generate sizes
#   CUDA_VISIBLE_DEVICES=1 EET_RESULTS=out/1 bash benchmarks/run_gpu.sh 480 context options first_call
#   python benchmarks/merge_results.py out/0 out/1
#
# Each case's rows are written as soon as it ends; what doesn't fit the seconds is left out and said.
# The extension must have been built in place. TORCHINDUCTOR_CACHE_DIR, if set, keeps what `compile`
# makes for the calls after it.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
seconds=$1
shift
started=$(date +%s)
logs=${EET_RESULTS:-benchmarks/results}
mkdir -p "$logs"
few=(--slow-runs 3 --runs 5 --seconds 0)

run() {
  local name=$1 left=$((seconds - ($(date +%s) - started)))
  shift
  if [ "$left" -lt 10 ]; then
    echo "$name: no time left"
    return
  fi
  timeout "$left" "$@" > "$logs/$name.log" 2>&1
  echo "$name: exit status $?, $(($(date +%s) - started)) s after the start"
  grep -E ' / |the best other|wrong|fell back|more$' "$logs/$name.log"
}

compile_all() {
  local model
  for model in small xl 8b h1024 h1536 h2048 h2560 h4096 h5120; do
    OMP_NUM_THREADS=2 python3 benchmarks/compile_static.py "$model" &
  done
  wait
}
export -f compile_all

for part in "$@"; do
  case $part in
    compile) run compile bash -c compile_all ;;
    generate) run generate python3 benchmarks/gpt2_generate.py --models small,xl,8b --only '\(4,' --compile "${few[@]}" ;;
    sizes) run sizes python3 benchmarks/gpt2_generate.py --models small,medium,large,xl,2.7b,5b,8b,10b \
      --only '^(medium|large|2.7b|5b|10b) |\(16,' --providers eet_patch "${few[@]}" ;;
    context) run context python3 benchmarks/gpt2_context.py --providers eet_patch,transformers-static-compile "${few[@]}" ;;
    context_sdpa) run context_sdpa python3 benchmarks/gpt2_context.py --providers transformers --only '960|768|^h12288' "${few[@]}" ;;
    options) run options python3 benchmarks/gpt2_options.py --models small,xl "${few[@]}" ;;
    prefill) run prefill python3 benchmarks/gpt2_prefill.py "${few[@]}" ;;
    first_call) run first_call python3 benchmarks/gpt2_first_call.py ;;
    fairseq) run fairseq python3 benchmarks/fairseq_beam.py "${few[@]}" ;;
    memory) run memory python3 benchmarks/gpt2_first_call.py --models small,8b --runs 1 ;;
    *) echo "run_gpu.sh knows no part $part" && exit 2 ;;
  esac
done
