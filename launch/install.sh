#!/usr/bin/env bash
# Set up the virtual environment: launch/install.sh [EXTRA...], for instance `launch/install.sh test`.
#
#   REPLICATION_VENV     folder of the environment             (default: .venv in the checkout)
#   REPLICATION_PYTHON   the Python to build it with           (default: the newest found, 3.11 or later)
#   REPLICATION_NEWEST   set: the newest versions in pyproject.toml's ranges, not those of launch/requirements
#
# A second call returns at once while pyproject.toml and launch/requirements are unchanged; an interrupted call is simply
# repeated. The other launch scripts source this file and call `install_environment`. In an installed wheel that does
# nothing: the environment is the one that the package lies in.
set -euo pipefail

export PYTHONSAFEPATH=1 # no module of the folder that a script is called in passes for a library's

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${REPLICATION_VENV:-$checkout/.venv}
if [[ ! -f $checkout/pyproject.toml ]]; then # .../lib/python3.x/site-packages/replication/launch
  venv=${REPLICATION_VENV:-$(cd "$checkout/../../../.." && pwd)}
fi
if [[ $venv != /* ]]; then
  venv=$PWD/$venv
fi

say() { printf '%s\n' "install: $*" >&2; }

# Print one line and end with the code of a mistake that the user can mend.
fail() {
  say "$*"
  exit 2
}

has_nvidia_driver() { nvidia-smi >/dev/null 2>&1; }

# Print the first Python that is new enough and can build an environment. Each candidate is run, because a name on the
# PATH may be a version manager's placeholder.
find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) candidate without_venv=""
  if [[ -n ${REPLICATION_PYTHON:-} ]]; then
    candidates=("$REPLICATION_PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    without_venv=$candidate
  done
  if [[ -n $without_venv ]]; then
    fail "$without_venv has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
  fi
  fail "no Python 3.11 or newer among: ${candidates[*]}; install one (Debian, Ubuntu: apt-get install python3" \
    "python3-venv), or name it with REPLICATION_PYTHON=/path/to/python"
}

# Create the environment, or complete one whose creation was interrupted.
create_venv() {
  local python
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  if [[ -d $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    fail "$venv is a folder with other files in it; choose another one with REPLICATION_VENV"
  fi
  python=$(find_python)
  say "creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
}

# Print the version of torch that is locked; or, with REPLICATION_NEWEST, the range of pyproject.toml, where alone it is.
torch_requirement() {
  if [[ -z ${REPLICATION_NEWEST:-} ]]; then
    grep --only-matching --max-count=1 '^torch==[0-9.]*' "$checkout/launch/requirements/cuda.txt"
    return
  fi
  "$venv/bin/python" - "$checkout/pyproject.toml" <<'PYTHON'
import re, sys, tomllib
with open(sys.argv[1], "rb") as file:
    requirements = tomllib.load(file)["project"]["dependencies"]
print(next(r for r in requirements if re.match(r"torch\s*[<>=~!]", r)))
PYTHON
}

has_torch() { "$venv/bin/python" -c 'import torch' >/dev/null 2>&1; }

install_uv() { "$venv/bin/python" -m uv --version >/dev/null 2>&1 || "$venv/bin/python" -m pip install --quiet uv; }

# The locked versions, hashes checked, of the package with the extras $1, which may be empty. uv takes from the lock what
# the extras need; pip could only install all of it.
install_locked() {
  local lock=$checkout/launch/requirements/cpu.txt
  install_uv || return 1
  if has_nvidia_driver; then
    lock=$checkout/launch/requirements/cuda.txt
  elif ! has_torch; then # of whichever index pip is set up for; the lock leaves the build for CPUs open
    "$venv/bin/python" -m pip install --quiet --no-deps "$(torch_requirement)" || return 1
  fi
  timeout 1800 "$venv/bin/python" -m uv pip install --python "$venv/bin/python" --constraint "$lock" \
    --editable "$checkout${1:+[$1]}"
}

# Install torch's CPU build with uv, which knows where each build is published. Every step may fail, and does so early:
# the plan is read before anything is downloaded, because a CUDA build is gigabytes that this machine cannot use.
install_cpu_torch() {
  local requirement plan
  local uv=(timeout 600 env UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=1 "$venv/bin/python" -m uv pip install
    --python "$venv/bin/python" --torch-backend=cpu)
  requirement=$(torch_requirement) || return 1
  install_uv || return 1
  plan=$("${uv[@]}" --dry-run "$requirement" 2>&1) || return 1
  [[ $plan == *"+ torch=="*"+cpu"* ]] || return 1
  "${uv[@]}" "$requirement" || return 1
  if ! has_torch; then
    "$venv/bin/python" -m pip uninstall --quiet --yes torch || true
    return 1
  fi
}

# One stamp for each set of extras: the hash of everything that decides what is installed.
stamp_file() { printf '%s\n' "$venv/.installed-$1"; }
stamp_of() {
  printf '%s\n' "$checkout" "$1" "${REPLICATION_NEWEST:+newest}" |
    cat - "$checkout/pyproject.toml" "$checkout/launch/requirements/"*.txt | sha256sum
}

is_installed() {
  [[ -x $venv/bin/python && -x $venv/bin/replicate ]] &&
    [[ $(cat "$(stamp_file "$1")" 2>/dev/null) == "$(stamp_of "$1")" ]]
}

# install_environment [EXTRA...]: the package, editable, with the extras, in $venv.
install_environment() {
  local extras
  extras=$(IFS=,; printf '%s' "$*")
  if [[ ! -f $checkout/pyproject.toml ]] || is_installed "$extras"; then
    return
  fi
  create_venv
  if has_nvidia_driver; then
    say "downloading about 3 GB (with the CUDA build of torch), once"
  else
    say "downloading about 480 MB (with the CPU build of torch; 2 GB on disk), once;" \
      "about 3 GB if only the CUDA build can be had"
    if [[ $(uname -s) == Linux ]] && ! has_torch && ! install_cpu_torch; then
      say "could not get torch's CPU build through uv; going on with plain pip, which takes what its index offers"
    fi
  fi
  if [[ -n ${REPLICATION_NEWEST:-} ]] || ! install_locked "$extras"; then
    [[ -n ${REPLICATION_NEWEST:-} ]] ||
      say "could not install the locked versions; going on with the newest in the ranges of pyproject.toml"
    "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar on \
      --editable "$checkout${extras:+[$extras]}"
  fi
  stamp_of "$extras" >"$(stamp_file "$extras")"
  stamp_of "" >"$(stamp_file "")" # every set of extras includes the package itself
  say "ready in $venv"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
  fi
  install_environment "$@"
fi
