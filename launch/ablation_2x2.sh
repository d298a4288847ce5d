#!/usr/bin/env bash
# Register the analysis plan, then submit the 2x2 ablation to SLURM: four arms at many seeds, seed block by seed block, then
# completions and the report.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/ablation_2x2.sh SITE CLUSTER [--out DIR] [--seeds 1,2,...] [--dry-run] [KEY FLAGS]

  SITE       the site file: launch/site.env.example, copied and filled in
  CLUSTER    a file of configs/cluster, or its name: node_8gpu_zero2
  --out DIR  folder of the results (default: out/ablation_2x2)
  --seeds    training seeds (default: 1 to 8)
  --dry-run  print every script and command, and submit nothing

The analysis plan is registered first, in DIR/plan.json; where another one is there, nothing is submitted (`replicate
preregistration register --amend` replaces it, with a reason). A folder that was begun without a plan is left without
one. SUITE names another suite than ablation_2x2. Any key of a run may follow as a flag, such as --training.steps=600.
A second call submits only what is neither in the queue nor done. Then:

  replicate grid status DIR      what became of each cell
  replicate grid retry DIR       submit failed cells again
  replicate grid cancel DIR      take everything out of the queue
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
if (($# < 2)); then
  usage >&2
  exit 2
fi
site=$1 cluster=$2
shift 2

suite=${SUITE:-ablation_2x2} seeds=(--seeds "1,2,3,4,5,6,7,8") dry=
for argument in "$@"; do
  case $argument in
    --seeds | --seeds=*) seeds=() ;;
    --dry-run) dry=1 ;;
  esac
done

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_environment
if [[ -z $dry ]]; then
  "$venv/bin/replicate" preregistration register "$suite" --unless-begun --cluster "$cluster" "${seeds[@]}" "$@"
fi
exec "$venv/bin/replicate" grid submit "$suite" --site "$site" --cluster "$cluster" "${seeds[@]}" "$@"
