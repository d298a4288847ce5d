"""The processes of one run: how they meet at a start, and collectives once their process group stands.

At a start the first rank listens at a port that the system gives it, and writes the port into the cell's folder, signed
with what is unique to this start: so no port can be taken, none is used twice, and no variable of a login shell leads
two runs together. With one process each collective is the identity and touches no network.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore

from replication.errors import UserError, first_line
from replication.objectives.layer_gain import gather as gather  # with the other collectives
from replication.processes.launcher import start_name
from replication.processes.preemption import Preempted, stop_requested
from replication.runs.files import read_object, write_json
from replication.runs.layout import RunDir


def launched_rank() -> int:
    """This process's rank as its launcher set it, before any process group exists; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave_group() -> None:
    """End the process group after a success, when all have arrived; after a failure it is left to the launcher."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(local: Tensor) -> None:
    """Replace a contiguous tensor by its sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(local)


def gather_objects(local: Any) -> list[Any]:
    """Every rank's picklable object, in rank order."""
    if not dist.is_initialized():
        return [local]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, local)
    return out


def device() -> str:
    """Device of the tensors of collectives."""
    return f"cuda:{torch.cuda.current_device()}" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


MEET_SECONDS = 120.0  # a process waits so long for the others to come
WORK_SECONDS = 3600.0  # and so long for what another one reads or builds; a line says so every MEET_SECONDS
CONNECT_SECONDS = 5.0
LINGER_SECONDS = 20.0  # one that was told to stop waits so long to tell the others; below the --wait of launch/job.sh
_starts = itertools.count()
_kept: list[TCPStore] = []  # to the end: a process group may be a client of it


class Meeting:
    """The processes of one start. Every wait hears the request to stop, also where another process got it (Preempted),
    and has an end (UserError, which says who did not come, or who answers in their place)."""

    def __init__(self, run: RunDir, n_ranks: int) -> None:
        """Wait until all are there, and point torch's variables at the place."""
        self.run, self.rank, self.n_ranks = run, launched_rank(), n_ranks
        self.cell = f"{run.root.parent.name}/{run.root.name}"
        self.name = f"{self.cell}, {start_name()}, training {next(_starts)}"
        self._store = self._open() if self.rank == 0 else self._join()
        _kept.append(self._store)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = self._store.host, str(self._store.port)
        self.wait_for_all("come", MEET_SECONDS)

    def _open(self) -> TCPStore:
        host, secret = os.environ["MASTER_ADDR"], secrets.token_hex(8)
        try:
            store = _store(host, 0, first=True)
        except RuntimeError as error:
            raise UserError(
                f"MASTER_ADDR: the first rank cannot be reached at {host} ({first_line(error)}); set SITE_MASTER_ADDR "
                "in the site file to the name by which nodes reach each other"
            ) from None
        store.set("start", f"{self.name} {secret}")
        write_json(self.run.start, {"start": self.name, "secret": secret, "host": host, "port": store.port})
        return store

    def _join(self) -> TCPStore:
        found = f"{self.run.start} does not say where it listens; do all nodes see this folder?"
        began = time.monotonic()
        while time.monotonic() < began + MEET_SECONDS:
            if stop_requested() and time.monotonic() > began + LINGER_SECONDS:
                raise self._preempted()
            word = {}
            with suppress(UserError):  # an earlier start's, damaged: this one's replaces it
                word = read_object(self.run.start)
            if word.get("start") == self.name:
                place = f"{word['host']}:{word['port']}"
                try:
                    store = _store(word["host"], word["port"], first=False)
                    answer = store.get("start").decode() if store.check(["start"]) else "another program"
                except RuntimeError:
                    found = f"{place}, where it said it listens, does not answer; may nodes reach each other there?"
                else:
                    if answer == f"{self.name} {word['secret']}":
                        return store
                    found = f"at {place} answers {answer.rpartition(' ')[0] or answer}, and this is {self.name}"
            time.sleep(0.05)
        raise UserError(f"rank {self.rank}: no first rank of this start within {MEET_SECONDS:.0f} seconds: {found}")

    def wait_for_all(self, done: str, seconds: float = WORK_SECONDS) -> None:
        """Say that this process has done something (a past participle), and wait until all say so."""
        self._store.set(f"{done} {self.rank}", socket.gethostname())
        self._wait([f"{done} {r}" for r in range(self.n_ranks)], seconds)

    def tell(self, key: str, value: str = "") -> str:
        """The first rank's value under a key: it sets it, and the others wait for it."""
        if self.rank == 0:
            self._store.set(key, f"={value}")  # a store takes no empty value
        self._wait([key], WORK_SECONDS)
        return self._store.get(key).decode()[1:]

    def _wait(self, keys: list[str], seconds: float) -> None:
        began, due = time.monotonic(), MEET_SECONDS
        while True:
            self._hear()
            if self._store.check(keys):
                return
            waited = time.monotonic() - began
            if waited > min(seconds, due):
                missing = [key for key in keys if not self._store.check([key])]
                line = f"rank {self.rank}: still without {', '.join(missing[:8])} after {waited:.0f} seconds"
                if waited > seconds:
                    raise UserError(f"{line}; {self.n_ranks} processes are to start together: see what those say")
                due += MEET_SECONDS
                print(line, flush=True)
            time.sleep(0.05)

    def _hear(self) -> None:
        """Raise Preempted on every process where one of them was told to stop.

        They leave together, as srun kills those that go on after one has left: who has come is waited for, whatever it
        reads or builds, who has not for LINGER_SECONDS.
        """
        if stop_requested():
            self._store.set("stop", "=")
        if not self._store.check(["stop"]):
            return
        began = time.monotonic()
        with suppress(RuntimeError):  # the first one, whose store it is, has left
            self._store.set(f"stopped {self.rank}", "=")
            for r in range(self.n_ranks):
                patience = WORK_SECONDS if self._store.check([f"come {r}"]) else LINGER_SECONDS
                while not self._store.check([f"stopped {r}"]) and time.monotonic() < began + patience:
                    time.sleep(0.05)
        raise self._preempted()

    def _preempted(self) -> Preempted:
        return Preempted(f"{self.cell}: told to stop before it trained; nothing was to be saved")


def _store(host: str, port: int, first: bool) -> TCPStore:
    patience = timedelta(seconds=CONNECT_SECONDS)
    # multi_tenant: torch's own store, at this port in this process, is then the same one
    return TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=patience, multi_tenant=True)
