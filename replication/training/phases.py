"""Each rank's present phase, in a memory-mapped file that outlives a SIGKILL: how `replicate drill` aims.

Off unless the environment names a file; then each rank writes its process id, step, micro-batch and phase into a slot
of its own, a few machine words at each change. A reader in another process sees the last thing that was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

VARIABLE = "REPLICATION_PHASE_BOARD"

PHASES = ("start", "forward", "accumulate", "update", "save", "validate", "end")
"""start: before the first step of this process. forward: the first micro-batch of a step, whose gradient nothing
holds yet. accumulate: later micro-batches, when a part of the gradient is there. update: from the optimizer boundary to
the end of the step. save, validate: a checkpoint (its copy, where a thread writes it beside the next steps), a
validation. end: after the last step."""


@dataclass(frozen=True)
class Reading:
    """One rank's slot."""

    rank: int
    pid: int
    step: int  # 0-based, the one under way
    micro_batch: int
    phase: str
    is_writing: bool = False  # a checkpoint, beside what the phase says


class Board:
    """The file with one slot for each rank."""

    def __init__(self, path: Path, n_ranks: int, create: bool = False) -> None:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._slots = np.memmap(path, np.int64, "w+" if create else "r+", shape=(n_ranks, 5))

    def write(self, now: Reading) -> None:
        self._slots[now.rank, :4] = now.pid, now.step, now.micro_batch, PHASES.index(now.phase)

    def write_writing(self, rank: int, is_writing: bool) -> None:
        """Of its own, since another thread of the rank writes it."""
        self._slots[rank, 4] = is_writing

    def read(self) -> list[Reading]:
        """Every rank that has written; a rank of an earlier start stays until its successor writes."""
        slots = enumerate(self._slots.tolist())
        return [Reading(r, pid, step, m, PHASES[phase], bool(w)) for r, (pid, step, m, phase, w) in slots if pid]


_board: Board | None = None  # this process's, where the environment names one
_now = Reading(int(os.environ.get("RANK", "0")), os.getpid(), 0, 0, "start")
if VARIABLE in os.environ:
    _board = Board(Path(os.environ[VARIABLE]), int(os.environ.get("WORLD_SIZE", "1")))
    _board.write(_now)


def enter(phase: str, step: int, micro_batch: int = 0) -> None:
    """Say what this rank does from now on; does nothing where nobody watches."""
    global _now
    if _board is not None:
        _now = replace(_now, phase=phase, step=step, micro_batch=micro_batch)
        _board.write(_now)


@contextmanager
def during(phase: str) -> Iterator[None]:
    """Say it for the time of the block, then what was said before."""
    before = _now
    enter(phase, before.step, before.micro_batch)
    try:
        yield
    finally:
        enter(before.phase, before.step, before.micro_batch)


@contextmanager
def writing() -> Iterator[None]:
    """Say that a checkpoint is written for the time of the block, from any thread."""
    if _board is not None:
        _board.write_writing(_now.rank, True)
    try:
        yield
    finally:
        if _board is not None:
            _board.write_writing(_now.rank, False)
