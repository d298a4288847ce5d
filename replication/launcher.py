"""Start the processes of one run on this machine, and end them together. Imports no torch.

Every process gets the variables of torch's launcher (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so that
the same command runs under torchrun or srun as well. Unlike torchrun it adds no lines of its own to what a rank says,
and it ends with that rank's code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from replication.data.workers import tethered

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
    shared = {"WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
        _end(ranks, signal.SIGINT)
        raise


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes):
            _end(ranks, signal.SIGTERM)
            return _code_of([code for code in codes if code])
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _code_of(failed: Sequence[int]) -> int:
    """The first failed rank's code; a mistake that one rank explained (2) before what others made of its end."""
    code = 2 if 2 in failed else failed[0]
    return code if code > 0 else 128 - code


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
