#!/usr/bin/env bash
# Train one cell without SLURM: the arguments are those of `replicate train`, which starts one process a device.
#
#   launch/local.sh --config model/tiny.yaml --config data/python.yaml --config arms/both.yaml \
#     --config cluster/cpu_zero2.yaml --data.dir=corpus --out out/mine
#
# On several machines call it on each, with the same arguments, through torchrun:
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=first-machine DEVICES=8 launch/local.sh --config cluster/nodes_zero3.yaml ...
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed --quiet '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit
fi

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install_environment

if ((${NNODES:-1} == 1)); then
  exec "$venv/bin/replicate" train "$@"
fi
[[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} && -n ${DEVICES:-} ]] ||
  fail "NNODES is $NNODES: set NODE_RANK (from 0), MASTER_ADDR (the first machine) and DEVICES (processes on each) too"
port=${MASTER_PORT:-29500}
if ((NODE_RANK == 0)) && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  fail "MASTER_PORT: another program listens at $port on this machine; set another port, the same one on every machine"
fi
exec "$venv/bin/torchrun" --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$DEVICES" \
  --master-addr="$MASTER_ADDR" --master-port="$port" -m replication train "$@"
