"""Start the processes of one run on this machine, and end them together. Imports no torch.

Every process gets the variables of torch's launcher (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so that
the same command runs under torchrun as well. Unlike torchrun it adds nothing to what a rank says, unless a rank was
killed and could say nothing, and it ends with that rank's code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from replication.data.workers import tethered

LAUNCHED = "REPLICATION_LAUNCHED"
"""Set in every rank that run_ranks starts: its place comes from RANK, whatever a scheduler around it says."""
SETTLE_SECONDS = 0.5
"""How long the ranks have to end by themselves after the first has, so that the cause is told from its effects."""
GRACE_SECONDS = 10.0
"""How long the other ranks have after one has ended badly, or after a signal, before they are killed."""


def run_ranks(command: Sequence[str], n_ranks: int) -> int:
    """Run `command` once for each rank and wait; what ends one rank badly ends all.

    Returns:
        0, or the code of the first rank that failed (128 + the signal's number for a killed one).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        LAUNCHED: 1,
        "WORLD_SIZE": n_ranks,
        "LOCAL_WORLD_SIZE": n_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    with tethered():  # a killed launcher must not leave ranks behind that hold the cell
        ranks = [
            subprocess.Popen(
                list(command),
                env=os.environ | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
                start_new_session=True,  # Ctrl-C reaches this process alone, which tells them all
                preexec_fn=lambda: None,  # without one, Popen does not run the hooks that tether
            )
            for r in range(n_ranks)
        ]
    try:
        return _wait(ranks)
    except BaseException:
        _end(ranks, signal.SIGTERM)  # as an interrupt, but heard in the background too, where SIGINT is ignored
        raise


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            time.sleep(SETTLE_SECONDS)
            failed = {r: code for r, rank in enumerate(ranks) if (code := rank.poll())}
            _end(ranks, signal.SIGTERM)
            return _code_of(failed)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _code_of(failed: dict[int, int]) -> int:
    """The code of the rank that was the cause: killed, or a mistake it explained (2), before what others made of it.

    A killed rank could not speak, so it is named here.
    """
    for r, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name
            print(f"rank {r}: ended by {name}{' (out of memory?)' if code == -signal.SIGKILL else ''}", file=sys.stderr)
            return 128 - code
    return 2 if 2 in failed.values() else next(iter(failed.values()))


def _end(ranks: Sequence[subprocess.Popen[bytes]], first: signal.Signals) -> None:
    """Signal every rank that is left, and kill what has not ended in time."""
    left = [rank for rank in ranks if rank.poll() is None]
    for rank in left:
        rank.send_signal(first)
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in left:
        try:
            rank.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
