"""Processes that this one starts, which end with it; the ranks of a run, started here or by srun or torchrun. No torch.

Every rank has its place from the variables of torch's launcher (PLACE): `run_ranks` sets them for what it starts,
torchrun does, and `adopt_place` reads them from SLURM's. Those that neither set are a login shell's, and are dropped.
Where the ranks of a training meet, the first of them says (training/ranks.py); MASTER_PORT is for what else needs one.
Unlike torchrun, `run_ranks` adds nothing to what a rank says, unless a rank was killed and could say nothing, and it
ends with that rank's code.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from replication.errors import UserError
from replication.processes.preemption import PREEMPTED, hold

if TYPE_CHECKING:
    from replication.config import RunConfig

PLACE = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
START = "REPLICATION_START"  # set by `run_ranks` for its ranks: a name that no other start has
GRACE_SECONDS = 10.0  # that processes have to end by themselves once told to, before they are killed
SETTLE_SECONDS = 0.5  # that ranks have to end by themselves after the first has: the cause is told from its effects

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_owner: int | None = None  # identity of the thread inside tethered()
_forked_by_owner = False


def _before_fork() -> None:
    global _forked_by_owner
    _forked_by_owner = _owner == threading.get_ident()


def _after_fork() -> None:
    # Linux sends the signal when the forking *thread* ends. A pool replaces a dead worker from a thread that ends
    # before the pool does, and a worker killed while it waits for work takes a lock with it that the pool's end needs.
    if _forked_by_owner and _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


@contextmanager
def tethered() -> Iterator[None]:
    """Processes that this thread forks inside the block are killed when it dies (Linux; elsewhere nothing changes).

    A pool's workers, and the manager process that `datasets` starts beside them, outlive a killed parent for good, and
    with them the memory and the disk space of the files that they hold open.
    """
    global _owner
    before, _owner = _owner, threading.get_ident()
    try:
        yield
    finally:
        _owner = before


def end(processes: Sequence[subprocess.Popen[bytes]], seconds: float | None = None) -> None:
    """Tell every process that is left to end, and kill what has not within `seconds` (default GRACE_SECONDS)."""
    for process in processes:  # SIGTERM acts as Ctrl-C, but is heard in the background too, where SIGINT is ignored
        process.send_signal(signal.SIGTERM)  # does nothing to one that has ended
    for process in still_running(processes, GRACE_SECONDS if seconds is None else seconds):
        process.kill()
        process.wait()


def still_running(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[subprocess.Popen[bytes]]:
    """Wait for processes to end by themselves; those that have not in time."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if process.poll() is None]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def run_ranks(command: Sequence[str], n_ranks: int, stop_signal: str = "USR2") -> int:
    """Run `command` once for each rank and wait; what ends one rank badly ends all. The stop signal is passed on.

    Returns 0, or the code of the first rank that failed (128 + the signal's number for a killed one).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {START: secrets.token_hex(8)}
    places = [shared | {"RANK": r, "LOCAL_RANK": r} for r in range(n_ranks)]
    ranks = [start(command, {k: str(v) for k, v in place.items()}, stop_signal) for place in places]

    def hand_on(received: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(received)

    signum = signal.Signals[f"SIG{stop_signal}"]
    try:
        before = signal.signal(signum, hand_on)
        try:
            return _wait(ranks)
        finally:
            signal.signal(signum, before)
    except BaseException:
        end(ranks)
        raise


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """0 once all have ended well; else, all being ended, the code of the rank that was the cause."""
    while not any(codes := [rank.poll() for rank in ranks]):
        if None not in codes:
            return 0
        time.sleep(0.05)
    if PREEMPTED in codes:  # they end together, each at its own speed
        still_running(ranks, GRACE_SECONDS)
    time.sleep(SETTLE_SECONDS)
    failed = {r: code for r, rank in enumerate(ranks) if (code := rank.poll())}
    end(ranks)
    for r, code in failed.items():
        if code < 0:  # it could not speak, so it is named here
            print(f"rank {r}: {how_it_was_ended(code)}", file=sys.stderr)
            return 128 - code
    # a mistake that a rank explained comes before being told to stop, and that before the first
    return next((code for code in (2, PREEMPTED) if code in failed.values()), next(iter(failed.values())))


def start(
    command: Sequence[str], environment: Mapping[str, str], stop_signal: str, log: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that a killed parent does not leave behind, and that hears the stop signal once it listens.

    The environment is added to this process's own; without a log it speaks where this process does.
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


def how_it_was_ended(code: int) -> str:
    """The end of a process by a signal, in words, from its negative return code."""
    return f"ended by {signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"


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

    Raises UserError where it started another number of processes than the config says.
    """
    forget_place_of_the_shell()
    e, cluster = os.environ, config.cluster
    if "RANK" not in e and int(e.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        per_node = e.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x4), or 8,7
        if per_node not in (str(cluster.devices), f"{cluster.devices}(x{cluster.nodes})"):
            raise UserError(
                f"cluster.devices: the config asks for {cluster.devices} processes on each of {cluster.nodes} node(s), "
                f"srun started {per_node or 'an unknown number'}; start it with --nodes={cluster.nodes} "
                f"--ntasks-per-node={cluster.devices}"
            )
        e.update(
            RANK=e["SLURM_PROCID"],
            LOCAL_RANK=e["SLURM_LOCALID"],
            NODE_RANK=e["SLURM_NODEID"],
            WORLD_SIZE=e["SLURM_STEP_NUM_TASKS"],
            LOCAL_WORLD_SIZE=str(cluster.devices),
            MASTER_ADDR=e.get("SITE_MASTER_ADDR") or _first_node(e["SLURM_STEP_NODELIST"]),
        )
    if "RANK" not in e:
        return False
    started = int(e.get("WORLD_SIZE", "1"))
    if started != config.world_size:
        raise UserError(
            f"cluster.devices x cluster.nodes: the config asks for {cluster.devices} x {cluster.nodes} processes, the "
            f"launcher started {started}; start as many tasks as the config says"
        )
    return True


def _first_node(nodes: str) -> str:
    """Address of the first of a compressed list of nodes (node[03-06,9]), as SLURM itself reaches it."""

    def show(*what: str) -> list[str]:
        command = ["scontrol", "show", *what]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=True).stdout.split()

    try:
        name = show("hostnames", nodes)[0]
        facts = dict(word.partition("=")[::2] for word in show("node", "--oneliner", name))
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"SITE_MASTER_ADDR: scontrol does not tell the first node's address ({error}); set it in the site file, or "
            "before srun"
        ) from None
    return facts.get("NodeAddr", name)
