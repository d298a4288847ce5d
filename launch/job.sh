# shellcheck shell=bash
# What every .sbatch script of this folder shares; they source it. It reads the site file, runs one step under srun,
# passes the stop signal on to it, and does what the site allows when the step was told to stop before its end.
#
#   REPLICATION_CHECKOUT       where this repository lies        (default: the folder in which sbatch was called)
#   REPLICATION_SITE           the site file                     (default: launch/site.env in the checkout)
#   REPLICATION_PYTHON         Python of the environment         (default: .venv/bin/python in the checkout)
#   REPLICATION_STOP_SIGNAL    cluster.stop_signal               (default: USR2)
#   REPLICATION_LEAD_SECONDS   cluster.slurm.lead_seconds        (default: 300)
#   REPLICATION_MAX_REQUEUES   cluster.slurm.max_requeues        (default: 100)

: "${REPLICATION_CHECKOUT:=$SLURM_SUBMIT_DIR}"
: "${REPLICATION_SITE:=$REPLICATION_CHECKOUT/launch/site.env}"
: "${REPLICATION_PYTHON:=$REPLICATION_CHECKOUT/.venv/bin/python}"
: "${REPLICATION_STOP_SIGNAL:=USR2}"
: "${REPLICATION_LEAD_SECONDS:=300}"
: "${REPLICATION_MAX_REQUEUES:=100}"

PREEMPTED=75 # exit code of a run that saved and stopped because it was told to
REFUSED='disabled|denied|not supported|[Ii]nvalid|not permitted|violates|not available' # the controller says no

arguments=("$@") # of the script that sources this
job=$SLURM_JOB_ID  # the name by which scontrol knows this job
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
restarts=$((${SLURM_RESTART_COUNT:-0} + ${REPLICATION_LINKS:-0})) # requeues, and links of a chain
told=""                                                         # second of this shell in which it was told to stop
step=""                                                         # process of the srun that runs
events=${events:-/dev/null}                                     # where notes go: a cell's jobs.jsonl
ended=""                                                        # set when a note says how this job ended

say() { printf '%s job %s: %s\n' "$(date +%FT%T)" "$job" "$*" >&2 || true; } # a full disk stops no requeue

# note EVENT CODE: one line of JSON in the cell's jobs.jsonl, from which `replicate grid status` tells what became of it.
note() {
  [[ $1 == started ]] || ended=yes
  printf '{"event": "%s", "code": %d, "job": "%s", "restarts": %d, "nodes": "%s", "at": "%s"}\n' \
    "$1" "$2" "$job" "$restarts" "$SLURM_JOB_NODELIST" "$(date +%FT%T%z)" >>"$events" || say "cannot write to $events"
}

refuse() {
  say "error: $*"
  note ended 2
  exit 2
}

# However the script ends, it says so: what stops it between its own lines is told too, unless that was a signal.
tell_end() {
  local code=$?
  if [[ -z $ended ]] && ((code && code < 128 && code != PREEMPTED)); then
    say "error: the job script ended with code $code before its step; what it said last stands above"
    note ended "$code"
  fi
}
trap tell_end EXIT

# All that the site file sets reaches the processes, and nothing that a login shell had set in its place. Code of the
# site's runs as there: neither an unset variable nor a failed command in the middle ends the job.
unset "${!SITE_@}" MASTER_ADDR MASTER_PORT RANK LOCAL_RANK NODE_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE
if [[ -f $REPLICATION_SITE ]]; then
  set -a +u +o pipefail
  # shellcheck source=/dev/null
  source "$REPLICATION_SITE" || refuse "$REPLICATION_SITE: its last line ended with code $?; mend it"
  set +a -euo pipefail
fi

# Modules, container, threads and scratch, as the site file says.
set_up_nodes() {
  local path
  if [[ -n ${SITE_MODULES:-} ]]; then
    read -ra modules <<<"$SITE_MODULES"
    set +u +o pipefail
    module load "${modules[@]}" || refuse "SITE_MODULES: cannot load $SITE_MODULES; mend $REPLICATION_SITE"
    set -euo pipefail
  fi
  if [[ -n ${SITE_SCRATCH:-} ]]; then
    export TMPDIR=$SITE_SCRATCH/replication-$SLURM_JOB_ID
    on_every_node mkdir -p "$TMPDIR" || refuse "SITE_SCRATCH: cannot write to $SITE_SCRATCH; make room, or mend $REPLICATION_SITE"
  fi
  # Caches of torch's compilers lie on each node's own disk: on one that nodes share, they race.
  local compiled=/tmp/replication-$UID
  if [[ -n ${SITE_SCRATCH:-} ]]; then
    compiled=$TMPDIR
  fi
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$compiled/inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$compiled/triton}
  read -ra container <<<"${SITE_CONTAINER:-}"
  if [[ -z ${SITE_MASTER_ADDR:-} ]]; then
    SITE_MASTER_ADDR=$(find_first_node) ||
      refuse "SITE_MASTER_ADDR: scontrol does not tell the address of the first node; set it in $REPLICATION_SITE"
    export SITE_MASTER_ADDR
  fi
  path=:${PYTHONPATH:-}: # without empty entries: they are the current folder
  while [[ $path == *::* ]]; do
    path=${path//::/:}
  done
  path=${path#:}
  export PYTHONPATH=${path%:}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job by itself
  fi
}

# The first node's address, as SLURM itself reaches it; asked here, because a container may not hold SLURM's commands.
find_first_node() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines=1)
  scontrol --oneliner show node "$first" | grep --only-matching 'NodeAddr=[^ ]*' | cut --delimiter== --fields=2
}

on_every_node() {
  ${patience:+timeout "$patience"} srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "$@"
}

stop() {
  told=${told:-$SECONDS}
  if [[ -n $step ]]; then
    kill -s "$REPLICATION_STOP_SIGNAL" "$step" || true # srun passes it on to every task
  fi
}
trap stop "$REPLICATION_STOP_SIGNAL"

# replicate ARGUMENTS: run it once for every task of the job; replicate_alone: on one task. They return where it ended
# well. Tasks that are told to stop end one after another with one code, so none may be killed because another has ended
# (--kill-on-bad-exit=0); tasks that a dead one leaves hanging are (--wait, in seconds).
replicate() { run_step "" "$@"; }
replicate_alone() { run_step "--nodes=1 --ntasks=1" "$@"; }

run_step() {
  local code=$PREEMPTED options again
  read -ra options <<<"$1"
  shift
  note started 0
  if [[ -z $told ]]; then
    code=0
    srun --kill-on-bad-exit=0 --wait=30 "${options[@]}" "${container[@]}" "$REPLICATION_PYTHON" -P -m replication "$@" </dev/null &
    step=$!
    if [[ -n $told ]]; then # between the two lines above
      stop
    fi
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # a signal cut the wait short
      code=0
      wait "$step" || code=$?
    done
    if [[ -n $told ]] && ((code > 128)); then # the last wait may have been cut short as well: bash keeps the step's code
      again=0
      wait "$step" || again=$?
      ((again == 127)) || code=$again
    fi
    step=""
  fi
  # a task that was told to stop before it listened died of the signal: the stop signal, or what a scheduler sends
  if ((code == PREEMPTED || code == 128 + $(kill -l "$REPLICATION_STOP_SIGNAL") || code == 128 + $(kill -l TERM))); then
    tidy
    go_on_later
  fi
  note ended "$code"
  if ((code != 0)); then
    tidy
    exit "$code"
  fi
}

tidy() {
  if [[ -n ${SITE_SCRATCH:-} ]]; then
    patience=30 on_every_node rm -rf "$TMPDIR" || true # a controller that does not answer must not hold up what follows
  fi
}

# ask COMMAND...: what SLURM answers, in `answer`. A controller that does not answer is asked again, with growing pauses,
# as long as the job was promised after it is told to stop; returns 1 where it says no, 2 where it says nothing.
ask() {
  local pause=1 until=$((${told:-$SECONDS} + REPLICATION_LEAD_SECONDS))
  until answer=$("$@" 2>&1); do
    if [[ $answer =~ $REFUSED ]]; then
      return 1
    elif ((SECONDS + pause > until)); then
      return 2
    fi
    say "$1: no answer from the controller ($answer); asked again in $pause s, for another $((until - SECONDS)) s"
    sleep "$pause"
    pause=$((pause < 30 ? 2 * pause : 60))
  done
}

# The run has saved, or had not begun: leave the rest to a later job, in the way that the site allows.
go_on_later() {
  local how=${SITE_ON_PREEMPTION:-requeue} answer code=0
  if [[ $(tail --lines=1 "$events") == *'"cancelled"'* ]]; then # by `replicate grid cancel`
    exit "$PREEMPTED"
  fi
  note preempted "$PREEMPTED"
  if ((restarts >= REPLICATION_MAX_REQUEUES)); then
    say "told to stop $((restarts + 1)) times, cluster.slurm.max_requeues is $REPLICATION_MAX_REQUEUES: \`replicate grid retry\` goes on"
    exit "$PREEMPTED"
  fi
  case $how in
    requeue)
      ask scontrol requeue "$job" || code=$?
      case $code in
        0) say "requeued" ;;
        1)
          say "SITE_ON_PREEMPTION: this site does not requeue ($answer); set it to chain or end in $REPLICATION_SITE;" \
            "\`replicate grid retry\` goes on"
          ;;
        *) say "not requeued: the controller did not answer in time ($answer); \`replicate grid retry\` goes on" ;;
      esac
      exit "$PREEMPTED"
      ;;
    chain)
      chain "--dependency=singleton,afterany:$job"
      exit 0
      ;;
    end)
      say "ended, as SITE_ON_PREEMPTION says: \`replicate grid retry\` goes on"
      exit "$PREEMPTED"
      ;;
    *) refuse "SITE_ON_PREEMPTION: '$how' is none of requeue, chain, end; mend $REPLICATION_SITE" ;;
  esac
}

# chain OPTION...: submit what this job runs once more, under a name of its own, with sbatch's OPTIONs. The #SBATCH lines
# come along; options that stood on the command line of the first sbatch do not, so write them into the script.
chain() {
  local index=${SLURM_ARRAY_TASK_ID:-} name=$SLURM_JOB_NAME options=("$@") answer
  if [[ -n $index ]]; then
    name=${name%".$index"}.$index
    options+=("--array=$index")
  elif [[ -z ${REPLICATION_LINKS:-} && $name != *-report ]]; then
    name=$name.$SLURM_JOB_ID # of this chain alone: singleton waits for every job of a name
  fi
  ask submit_link "$name" "${options[@]}" ||
    refuse "SITE_ON_PREEMPTION: sbatch does not take the next link of the chain ($answer); \`replicate grid retry\` goes on"
  say "goes on as job $answer"
}

# submit_link NAME OPTION...: unless an earlier call, whose answer was lost, did.
submit_link() {
  local there
  there=$(squeue --noheader --name="$1" --format='%A') || return
  if grep --invert-match --line-regexp "$SLURM_JOB_ID" <<<"${there:-$SLURM_JOB_ID}"; then
    return
  fi
  env --unset=SLURM_RESTART_COUNT REPLICATION_LINKS=$((restarts + 1)) \
    sbatch --parsable --job-name="$1" "${@:2}" "$0" "${arguments[@]}"
}

# Where cells go on in chains, what depends on them is let go when their first links end: wait for the last ones.
# after NAME: where jobs of that name, or whose names begin with it and a dot, are in the queue (reports aside), submit
# this job again behind them, and end.
after() {
  local waiting answer
  if [[ ${SITE_ON_PREEMPTION:-} != chain ]]; then
    return
  fi
  ask squeue --noheader --format='%A %j' ||
    refuse "squeue does not answer, so it is unknown whether what this job waits for has ended ($answer); submit it again"
  waiting=$(awk -v name="$1" '$2 !~ /-report$/ && ($2 == name || index($2, name ".") == 1) {print $1}' <<<"$answer")
  if [[ -n $waiting ]]; then
    chain "--dependency=afterany:${waiting//$'\n'/:}"
    exit 0
  fi
}
