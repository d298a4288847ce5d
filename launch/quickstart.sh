#!/usr/bin/env bash
# The whole path on one machine: set up, prepare data, train four arms at two seeds, generate, report, open the page.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/quickstart.sh [--out DIR] [--no-serve] [-h]

Sets up a virtual environment, then runs the suite ablation_2x2: a tiny model, four arms, two seeds, on the CPU. Makes a
panel of its completions and, on a terminal, opens the page on which people judge them, until Ctrl-C.
A second call continues where the first one stopped, and repeats nothing.

  --out DIR   folder of the results (default: ./out/quickstart)
  --no-serve  do not open the page, print the command that does
  -h, --help  this text

REPLICATION_VENV and REPLICATION_PYTHON choose the environment and its Python (see launch/install.sh).
TEXT
}

refuse() {
  printf '%s\n' "quickstart: $*; try launch/quickstart.sh --help" >&2
  exit 2
}

out=./out/quickstart
serves=yes
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
    --no-serve)
      serves=""
      shift
      ;;
    *) refuse "unknown argument '$1'" ;;
  esac
done
[[ -n $out ]] || refuse "--out needs a folder"

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_environment judge

replicate=$venv/bin/replicate

# Should this shell be killed while it waits, what it waits for is told to end too.
tethered() {
  if setpriv --pdeathsig TERM true 2>/dev/null; then
    setpriv --pdeathsig TERM "$@"
  else
    "$@"
  fi
}

# A plan is registered before the first cell, or not at all: a folder that a call before this one began is left as it is.
[[ -e $out/plan.json || -e $out/suite.yaml ]] || "$replicate" preregistration register ablation_2x2 --out "$out"
cores=$(getconf _NPROCESSORS_ONLN)
tethered "$replicate" grid run ablation_2x2 --out "$out" --jobs "$((cores < 8 ? cores : 8))"
[[ -e $out/judging/judging.sqlite ]] || "$replicate" judge prepare "$out"

if [[ $serves && -t 0 && -t 1 ]]; then
  exec "$replicate" judge serve "$out"
fi
printf 'judging:      %q judge serve %q   (opens the page on this machine and prints the link for judges)\n' \
  "$replicate" "$out"
