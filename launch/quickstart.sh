#!/usr/bin/env bash
# Set up the environment of a checkout, then `replicate quickstart`: the whole path on one machine, from the analysis plan
# over four arms at two seeds of a tiny model to the report and the page on which people judge.
#
#   launch/quickstart.sh [--out DIR] [--no-serve]      (default: ./out/quickstart)
#
# A second call continues where the first one stopped. REPLICATION_VENV and REPLICATION_PYTHON choose the environment and
# its Python (see launch/install.sh).
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed --quiet '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit
fi

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_environment judge
exec "$venv/bin/replicate" quickstart "$@"
