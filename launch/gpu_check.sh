#!/usr/bin/env bash
# What a GPU has to show, in parts of less than ten minutes each. train, variants and ablation go on where they were when
# they are called again; a step or head that was measured is not measured again.
#
#   launch/gpu_check.sh [--small] PART [OUT]      (default OUT: out/gpu_check)
#
#   tests       the tests that need a GPU
#   rates       what the time model assumes, measured: products, experts, attention, memory, launches; seconds
#   head        the three heads at the published size: peak memory and time, eager and compiled
#   step        a step of the 1.2B model, both interventions on: tokens/s, utilisation, memory, the four arms against
#               the baseline, and where the time goes; compiled, chunked head
#   logits      the same with all logits at once
#   flash       the same with the flash kernel
#   cudnn       the same with cuDNN's
#   in-backward the same with the scale applied in backward
#   eager       the same without torch.compile
#   train       twenty steps of 1.2B training as published, checkpoint and generation included
#   variants    five gains at 50 million parameters, 3 seeds, with their report
#   ablation    the 2x2 at 50 million parameters, 3 seeds, with its report
#   summary     every figure so far, and the fastest of the steps
#   all         every part in turn
#
# --small runs the same commands on tiny models on the CPU: what a machine without a GPU can try.
set -euo pipefail

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

seconds=540
parts=(tests rates head step logits flash cudnn in-backward eager train variants ablation summary)

usage() { sed --quiet '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

small=""
if [[ ${1:-} == --small ]]; then
  small=yes
  shift
fi
if [[ ${1:-} == -h || ${1:-} == --help || $# == 0 ]]; then
  usage
  exit
fi
part=$1
out=${2:-out/gpu_check}
[[ " ${parts[*]} all " == *" $part "* ]] || fail "gpu_check: no part '$part'; the parts are ${parts[*]} all"
[[ -n $small ]] || has_nvidia_driver || fail "gpu_check: nvidia-smi finds no GPU; --small tries the commands on the CPU"
# An environment that has everything is taken as it is, that of REPLICATION_VENV or the current one: a machine that is
# lent for an hour may reach no package index.
needed="import torch, lightning, deepspeed, datasets, torchmetrics, tensorboard, yaml, pytest"
current=$(python3 -c 'import sys; print(sys.prefix)' 2>/dev/null || true)
ready=""
for candidate in "$venv" "$current"; do
  if [[ -z $ready && -x $candidate/bin/python ]] && "$candidate/bin/python" -c "$needed" >/dev/null 2>&1; then
    ready=$candidate
  fi
done
if [[ -n $ready ]]; then
  venv=$ready
elif has_nvidia_driver; then
  install_environment test liger
else
  install_environment test
fi
if [[ -f $checkout/pyproject.toml ]]; then
  export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
else # the tests are in a checkout alone
  parts=("${parts[@]:1}")
fi
replicate=("$venv/bin/replicate")
[[ -x ${replicate[0]} ]] || replicate=("$venv/bin/python" -m replication)
mkdir -p "$out"

# What is measured: the published model and batch, or its tiny twin.
if [[ -n $small ]]; then
  layers=(--config model/tiny.yaml --config cluster/cpu.yaml --config arms/both.yaml)
  step=(--blocks 1 --block-steps 2 --logging.log_every_steps=2)
  rates=(--repeats 1)
  head=(--tokens 512 --vocabulary 2000 --width 64 --accelerator cpu --repeats 1)
  run=(--model.vocab_size=2048 --training.steps=4 --training.warmup_steps=2 --training.batch_tokens=2048
    --validation.every_steps=2 --validation.sequences=16 --checkpoints.every_steps=2 --cluster.accelerator=cpu
    --generation.max_new_tokens=4 --generation.samples_per_prompt=1 --logging.log_every_steps=2)
  tiny=(--model.n_blocks=2 --model.d_model=64 --model.d_ff=64 --cluster.micro_batch_sequences=null
    --data.tokenizer.vocab_size=2048 --data.block_size_tokens=128 --data.token_budget=300000
    --training.precision=32-true --seeds 1)
  published=(--config model/tiny.yaml --config data/python.yaml --config arms/both.yaml)
  flash=math cudnn=math # the one kernel that computes in fp32 on a CPU
else
  flash=flash cudnn=cudnn
  layers=(--config model/1b2.yaml --config training/phase3.yaml --config cluster/one_gpu.yaml --config arms/both.yaml
    --training.gain_group_sequences=2)
  step=(--blocks 8 --block-steps 2 --logging.log_every_steps=2)
  rates=()
  head=()
  run=(--training.steps=20 --training.warmup_steps=10 --validation.every_steps=10 --validation.sequences=64
    --checkpoints.every_steps=10 --generation.max_new_tokens=50 --generation.samples_per_prompt=1)
  tiny=()
  published=(--config model/1b2.yaml --config training/phase3.yaml --config cluster/one_gpu.yaml
    --config data/packages.yaml --config arms/both.yaml --data.block_size_tokens=2048 --model.vocab_size=32768)
fi

# Run a command for at most the time of a part; 124 from timeout means that the time was up.
bounded() {
  local code=0
  timeout --signal=INT --kill-after=30 "$seconds" "$@" || code=$?
  if ((code == 124)); then
    say "gpu_check: the time of this part is up; call it again"
    exit 75
  fi
  return "$code"
}

bench_step() {
  local name=$1
  shift
  if [[ -f $out/step-$name.json ]] && ! grep --quiet '"unfinished"' "$out/step-$name.json"; then
    return
  fi
  bounded "${replicate[@]}" bench step "${layers[@]}" "${step[@]}" "$@" --out "$out/step-$name.json"
}

suite() {
  bounded "${replicate[@]}" grid run "$1" --out "$out/$1" "${tiny[@]}" ${small:+"${run[@]}"}
}

summary() {
  "$venv/bin/python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

results = {path.stem: json.loads(path.read_text()) for path in Path(sys.argv[1]).glob("step-*.json")}
for name, result in results.items():
    if "unfinished" in result:
        print(f"{name:17} cut off after {len(result['blocks'])} blocks")
found = {name: result["interleaved"] for name, result in results.items() if "interleaved" in result}
speed = {name: one["tokens_per_second"]["both"] for name, one in found.items()}
for name in sorted(speed, key=speed.get, reverse=True):
    cost = found[name]["time_over_reference"]["both"]
    bound = f"{cost['upper_bound_95']:.4f}" if cost["upper_bound_95"] else "unknown, too few blocks"
    print(f"{name:17} {speed[name]:9,.0f} tokens/s; both over baseline {cost['median']:.4f}, 95 % upper bound {bound}")
print("fastest:", max(speed, key=speed.get) if speed else "nothing measured yet")
PYTHON
}

act() {
  case $1 in
    tests) bounded "$venv/bin/python" -m pytest -m gpu "$checkout/tests" -q ;;
    rates) bounded "${replicate[@]}" bench rates "${layers[@]}" "${rates[@]}" --out "$out/rates.json" ;;
    head)
      [[ -f $out/head.json ]] || bounded "${replicate[@]}" bench head "${head[@]}" --out "$out/head.json"
      [[ -f $out/head-compiled.json ]] ||
        bounded "${replicate[@]}" bench head "${head[@]}" --compile --out "$out/head-compiled.json"
      ;;
    step) bench_step chunked ;;
    logits) bench_step logits --cluster.head=logits ;;
    flash) bench_step flash --cluster.attention="$flash" ;;
    cudnn) bench_step cudnn --cluster.attention="$cudnn" ;;
    in-backward) bench_step in-backward --layer_gain.apply=micro_batch ;;
    eager) bench_step eager --cluster.compile=false ;;
    train)
      [[ -f $out/data/manifest.json ]] ||
        bounded "${replicate[@]}" prepare "${published[@]}" --out "$out/data"
      bounded "${replicate[@]}" train "${published[@]}" "${run[@]}" --data.dir="$out/data" --out "$out/train"
      ;;
    variants) suite packages_gain_variants_50m ;;
    ablation) suite packages_2x2_50m ;;
    summary) summary ;;
  esac
}

if [[ $part == all ]]; then
  for each in "${parts[@]}"; do
    say "gpu_check: $each"
    act "$each"
  done
else
  act "$part"
fi
