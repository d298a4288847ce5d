#!/usr/bin/env bash
# The whole path on one machine: set up, prepare data, train four arms at two seeds, generate, report.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/quickstart.sh [--out DIR] [-h]

Sets up a virtual environment, then runs the suite ablation_2x2: a tiny model, four arms, two seeds, on the CPU.
A second call continues where the first one stopped, and repeats nothing.

  --out DIR   folder of the results (default: ./out/quickstart)
  -h, --help  this text

REPLICATION_VENV and REPLICATION_PYTHON choose the environment and its Python (see launch/install.sh).
TEXT
}

refuse() {
  printf '%s\n' "quickstart: $*; try launch/quickstart.sh --help" >&2
  exit 2
}

out=./out/quickstart
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --out)
      (($# >= 2)) || refuse "--out needs a folder"
      out=$2
      shift 2
      ;;
    --out=*)
      out=${1#--out=}
      shift
      ;;
    *) refuse "unknown argument '$1'" ;;
  esac
done
[[ -n $out ]] || refuse "--out needs a folder"

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_environment

# A plan is frozen before the first cell, or not at all: a folder that a call before this one began is left as it is.
[[ -e $out/plan.json || -e $out/suite.yaml ]] || "$venv/bin/replicate" plan freeze ablation_2x2 --out "$out"
cores=$(getconf _NPROCESSORS_ONLN)
exec "$venv/bin/replicate" grid run ablation_2x2 --out "$out" --jobs "$((cores < 8 ? cores : 8))"
