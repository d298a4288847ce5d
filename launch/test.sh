#!/usr/bin/env bash
# Set up the virtual environment with the test tools, then lint, type-check and test. Without arguments four files of
# tests run side by side, since many of them wait; arguments go to pytest, which runs in the checkout:
#
#   launch/test.sh tests/config -k unknown
#   launch/test.sh --python 3.13 tests/config      with another Python, in .venv-3.13: uv's, else python3.13 of the PATH
set -euo pipefail

if [[ ${1:-} == --python ]]; then
  version=${2:-}
  shift 2 || shift
  if ! REPLICATION_PYTHON=$(uv python find "$version" 2>/dev/null); then
    REPLICATION_PYTHON=python$version
  fi
  if ! "$REPLICATION_PYTHON" -P --version >/dev/null 2>&1; then
    echo "test: neither uv nor the PATH has Python '$version'; \`uv python install $version\` brings it" >&2
    exit 2
  fi
  export REPLICATION_PYTHON REPLICATION_VENV=.venv-$version
fi

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_environment test

# Tests start processes side by side: one thread each keeps them from fighting over the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if ! has_nvidia_driver; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

cd "$checkout"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
if (($#)); then
  "$venv/bin/mypy"
else # types are a test among the others
  set -- -n 4 --dist loadfile --no-loadscope-reorder # in the order of tests/conftest.py
fi
exec "$venv/bin/python" -m pytest "$@"
