#!/usr/bin/env bash
# Renew the locked requirements: every version that the base and the extras test, judge, export and liger resolve to, with
# the hashes of all its files on the index; needs uv. The lock is for Linux and every Python from 3.11 to 3.14.
#
#   launch/requirements/lock.sh                   what must change, changes
#   launch/requirements/lock.sh --upgrade         the newest versions in pyproject.toml's ranges
#
# cuda.txt is all of it. cpu.txt is the same without torch and what only its CUDA build needs: builds for CPUs have the
# same version, but their files, and so their hashes, differ from index to index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed --quiet '2,/^set/{/^set/!s/^# \{0,1\}//p}' "launch/requirements/lock.sh"
  exit
fi

compile() {
  local lock=launch/requirements/$1
  shift
  uv pip compile pyproject.toml --quiet --universal --generate-hashes --no-annotate --no-header --no-emit-index-url \
    --output-file "$lock" --extra test --extra judge --extra export "$@"
  sed --in-place '1i # Made by launch/requirements/lock.sh' "$lock"
}

compile cuda.txt --extra liger "$@"
without=()
for package in torch triton $(grep --only-matching --extended-regexp '^(nvidia|cuda)-[a-z0-9-]+' launch/requirements/cuda.txt); do
  without+=(--no-emit-package "$package")
done
compile cpu.txt "${without[@]}" "$@"
