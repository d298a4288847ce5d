"""A real PostgreSQL on this machine: a cluster in a temporary folder, on 127.0.0.1 at a free port, as any user.

For the tests of the judging store. It runs with fsync on, as a judging server would, and ends with this process,
however that ends. Where this process is root, which PostgreSQL refuses to run as, it is `postgres` or `nobody`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from required import do_without

DEBIAN = Path("/usr/lib/postgresql")
PACKAGE = "Debian, Ubuntu: apt-get install postgresql"
PR_SET_PDEATHSIG = 1


def binaries() -> Path | None:
    """The folder of the newest installed server's programs; None without one."""
    found = [path.parent for path in DEBIAN.glob("*/bin/postgres")]
    if found:
        return max(found, key=lambda path: float(path.parent.name))
    elsewhere = shutil.which("postgres")
    return Path(elsewhere).resolve().parent if elsewhere else None


@dataclass
class PostgresServer:
    """The running server."""

    root: Path
    bin: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def admin_url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        import psycopg  # here: conftest.py imports this file for every test there is

        data, log = self.root / "data", self.root / "log"
        self._run("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.port = _free_port()
        command = [
            str(self.bin / "postgres"), "-D", str(data), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1",
            "-c", "unix_socket_directories=", "-c", "fsync=on", "-c", "max_connections=150",
        ]  # fmt: skip
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=self.root, preexec_fn=_tether,
                start_new_session=True, **_account(),
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.admin_url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"PostgreSQL did not start:\n{log.read_text(errors='replace')[-3000:]}"
                    ) from None
                time.sleep(0.05)

    def new_database(self) -> str:
        """The URL of an empty schema, which is as good as a database of its own, and made ten times faster."""
        import psycopg

        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self.admin_url}?options=-csearch_path%3D{name}"

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGQUIT)  # at once: what it holds is thrown away
        self.process.wait()

    def _run(self, program: str, *args: str) -> None:
        done = subprocess.run(
            [str(self.bin / program), *args], capture_output=True, text=True, cwd=self.root, timeout=120, **_account()
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")


def _account() -> dict[str, Any]:
    """How to start a program as somebody who is not root."""
    if os.geteuid() != 0:
        return {}
    account = _somebody()
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _somebody() -> pwd.struct_passwd:
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _tether() -> None:
    # after the change of user, which would take it back
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server for the time of the block."""
    found = binaries()
    assert found is not None
    root = Path(tempfile.mkdtemp(prefix="postgres-"))
    if os.geteuid() == 0:
        os.chown(root, _somebody().pw_uid, _somebody().pw_gid)
    server = PostgresServer(root, found)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server a session; a test that needs it is skipped, or fails where it is required, if there is none."""
    if binaries() is None:
        reason = f"no PostgreSQL server ({PACKAGE})"
        do_without("postgres", reason)
    with postgres_server() as server:
        yield server
