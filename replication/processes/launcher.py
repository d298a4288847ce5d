"""The processes of one run: started here on one machine, or started by srun or torchrun. Imports no torch.

Every process has its place from the variables of torch's launcher (PLACE): `run_ranks` sets them for what it starts,
torchrun does, and `adopt_place` reads them from SLURM's. Those that neither set are a login shell's, and are dropped.
Where the ranks of a training meet, the first of them says (training/start.py); MASTER_PORT is for what else needs one.
Unlike torchrun, `run_ranks` adds nothing to what a rank says, unless a rank was killed and could say nothing, and it
ends with that rank's code.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from replication.errors import UserError
from replication.processes.children import GRACE_SECONDS, end, still_running, tethered
from replication.processes.preemption import PREEMPTED, hold

if TYPE_CHECKING:
    from replication.config import RunConfig

PLACE: tuple[str, ...] = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
PLACE += ("MASTER_ADDR", "MASTER_PORT")
START = "REPLICATION_START"
"""Set by `run_ranks` for its ranks: a name that no other start has."""
SETTLE_SECONDS = 0.5
"""Time that the ranks have to end by themselves after the first has, so that the cause is told from its effects."""


def run_ranks(command: Sequence[str], n_ranks: int, stop_signal: str = "USR2") -> int:
    """Run `command` once for each rank and wait; what ends one rank badly ends all. The stop signal is passed on.

    Returns:
        0, or the code of the first rank that failed (128 + the signal's number for a killed one).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": n_ranks,
        "LOCAL_WORLD_SIZE": n_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        START: secrets.token_hex(8),
    }
    places = [shared | {"RANK": r, "LOCAL_RANK": r} for r in range(n_ranks)]
    ranks = [start(command, {k: str(v) for k, v in place.items()}, stop_signal) for place in places]
    try:
        with _passing_on(signal.Signals[f"SIG{stop_signal}"], ranks):
            return _wait(ranks)
    except BaseException:
        end(ranks)
        raise


def start(
    command: Sequence[str], environment: Mapping[str, str], stop_signal: str, log: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that a killed parent does not leave behind, and that hears the stop signal once it listens.

    Args:
        command: and its arguments.
        environment: added to this process's own.
        stop_signal: held back until then.
        log: for what it says; none: where this process says it.
    """
    with tethered():
        return subprocess.Popen(
            list(command),
            env=os.environ | dict(environment),
            stdin=None if log is None else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which tells them all
            preexec_fn=lambda: hold(stop_signal),  # and with one, Popen runs the hooks that tether
        )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            if PREEMPTED in codes:  # they end together, each at its own speed
                still_running(ranks, GRACE_SECONDS)
            time.sleep(SETTLE_SECONDS)
            failed = {r: code for r, rank in enumerate(ranks) if (code := rank.poll())}
            end(ranks)
            return _code_of(failed)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _code_of(failed: dict[int, int]) -> int:
    """The code of the rank that was the cause: killed, a mistake it explained (2), or told to stop; else the first.

    A killed rank could not speak, so it is named here.
    """
    for r, code in failed.items():
        if code < 0:
            print(f"rank {r}: {how_it_was_ended(code)}", file=sys.stderr)
            return 128 - code
    codes = list(failed.values())
    return next((code for code in (2, PREEMPTED) if code in codes), codes[0])


def how_it_was_ended(code: int) -> str:
    """The end of a process by a signal, in words, from its negative return code."""
    return f"ended by {signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"


@contextmanager
def _passing_on(signum: signal.Signals, ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside the block, hand a signal to this process on to every rank."""

    def hand_on(received: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(received)

    before = signal.signal(signum, hand_on)
    try:
        yield
    finally:
        signal.signal(signum, before)


# ---------------------------------------------------------------- started by others


def forget_place_of_the_shell() -> None:
    """Drop the place variables that no launcher set: a login shell's would make a run wait for strangers."""
    if START in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if "RANK" in os.environ:
        print(f"RANK={os.environ['RANK']} is ignored: neither srun nor torchrun set it", file=sys.stderr)
    for name in PLACE:
        os.environ.pop(name, None)


def start_name() -> str:
    """Name that all processes of one start, and no others, have in common."""
    e = os.environ
    if START in e:
        return f"start {e[START]}"
    if "TORCHELASTIC_RUN_ID" in e:
        return f"torchrun {e['TORCHELASTIC_RUN_ID']} restart {e.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return f"job {e.get('SLURM_JOB_ID')} step {e.get('SLURM_STEP_ID')} restart {e.get('SLURM_RESTART_COUNT', 0)}"


def adopt_place(config: RunConfig) -> bool:
    """Whether a launcher started this process as a rank of the run; where that was srun, set torch's variables.

    Raises:
        UserError: it started another number of processes than the config says.
    """
    forget_place_of_the_shell()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(_slurm_place(config))
    if "RANK" not in os.environ:
        return False
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != config.world_size:
        raise UserError(
            f"cluster.devices x cluster.nodes: the config asks for {config.cluster.devices} x {config.cluster.nodes} "
            f"processes, the launcher started {started}; start as many tasks as the config says"
        )
    return True


def _slurm_place(config: RunConfig) -> dict[str, str]:
    """This process's place in a step of srun, in the words of torch's launcher.

    Raises:
        UserError: another number of tasks on a node than cluster.devices.
    """
    step = {name: os.environ[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "NODEID")}
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x4), or 8,7
    if per_node not in (str(config.cluster.devices), f"{config.cluster.devices}(x{config.cluster.nodes})"):
        raise UserError(
            f"cluster.devices: the config asks for {config.cluster.devices} processes on each of "
            f"{config.cluster.nodes} node(s), srun started {per_node or 'an unknown number'}; start it with "
            f"--nodes={config.cluster.nodes} --ntasks-per-node={config.cluster.devices}"
        )
    return {
        "RANK": step["PROCID"],
        "LOCAL_RANK": step["LOCALID"],
        "NODE_RANK": step["NODEID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(config.cluster.devices),
        "MASTER_ADDR": os.environ.get("SITE_MASTER_ADDR") or _first_node(os.environ["SLURM_STEP_NODELIST"]),
    }


def _first_node(nodes: str) -> str:
    """Address of the first of a compressed list of nodes (node[03-06,9]), as SLURM itself reaches it."""
    names = _scontrol("show", "hostnames", nodes).split()
    facts = dict(word.partition("=")[::2] for word in _scontrol("show", "node", "--oneliner", names[0]).split())
    return facts.get("NodeAddr", names[0])


def _scontrol(*args: str) -> str:
    try:
        return subprocess.run(["scontrol", *args], capture_output=True, encoding="utf-8", timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"SITE_MASTER_ADDR: scontrol does not tell the first node's address ({error}); set it in the site file, or "
            "before srun"
        ) from None
