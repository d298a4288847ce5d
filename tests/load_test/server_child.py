"""The page's own server as a child process: started, killed, started again on the same port.

`python -m server_child PORT` serves the panel whose database the environment
names (an address may hold a password, which has no place in a list of processes).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import psutil
from sqlalchemy import event

from replication.judging.database import Database
from replication.judging.store import Store

VARIABLE = "REPLICATION_JUDGING_DATABASE"
NOT_DURABLE = "--not-durable"
START_SECONDS = 60.0
# below the ports that the system gives to clients: with no server there, such a client could connect to itself
PORTS = range(20000, 32000)


class ServerChild:
    """The server in a process of its own.

    Args:
        database: as `Database` takes it, password included.
        log: what it prints goes there.
        durable: whether an SQLite file's votes wait for the disk, as they do for judges; times are less noisy without.
    """

    def __init__(self, database: str, log: Path, durable: bool = True) -> None:
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.cpu_seconds = 0.0
        """Of all its lives together, from when each answered."""
        self._environment = os.environ | {VARIABLE: database}
        self._flags = [] if durable else [NOT_DURABLE]
        self._log = log
        self._process: psutil.Popen | None = None
        self._cpu_at_start = 0.0

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as log:
            command = [sys.executable, str(Path(__file__).parent), "server", str(self.port), *self._flags]
            self._process = psutil.Popen(command, env=self._environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.base):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the server did not start:\n{self._log.read_text(encoding='utf-8', errors='replace')[-2000:]}"
                )
            time.sleep(0.05)
        self._cpu_at_start = self._cpu()

    def kill(self) -> None:
        """SIGKILL, without a word before."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM; SIGKILL where that does not help."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self.cpu_seconds += self._cpu() - self._cpu_at_start
            self._process.send_signal(number)
        try:
            self._process.wait(timeout=20)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process = None

    def _cpu(self) -> float:
        assert self._process is not None
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def __enter__(self) -> ServerChild:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def answers(base: str) -> bool:
    try:
        return httpx.get(f"{base}/healthz", timeout=2, trust_env=False, verify=False).status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    while True:
        port = random.SystemRandom().choice(PORTS)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue


def main(argv: list[str]) -> None:
    from replication.judging.page.server import serve  # only the child needs it

    database = Database(os.environ[VARIABLE])
    if NOT_DURABLE in argv:
        event.listen(database.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
    serve(Store(database), "127.0.0.1", int(argv[0]), None)
