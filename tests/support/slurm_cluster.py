"""A real SLURM cluster of two nodes on this one machine: munge, slurmctld and two slurmd, as any user, on free ports.

With accounts, as most sites keep them: slurmdbd and a MariaDB of its own.

For the tests of the launch scripts, and to try them by hand:

    python tests/support/slurm_cluster.py        starts it, prints what points SLURM's commands to it, waits for Ctrl-C

Everything lies in one temporary folder. The daemons are children of this process and end with it, however it ends;
nothing else on the machine is touched.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from replication.processes.launcher import tethered

PROGRAMS = (
    "munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "slurmdbd", "sacct",
    "sacctmgr", "mariadbd", "mariadb",
)  # fmt: skip
PACKAGES = "Debian, Ubuntu: apt-get install slurm-wlm munge slurmdbd mariadb-server"
NODES = ("n1", "n2")
USER = pwd.getpwuid(os.geteuid()).pw_name
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian puts daemons

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={root}/munge/socket
JobCompType=jobcomp/none
ReturnToService=2
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
"""

ACCOUNTS = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=root
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class SlurmCluster:
    """The running cluster; `environment` points SLURM's commands to it."""

    def __init__(self, root: Path, cpus: int = 1) -> None:
        self.root, self.cpus = root, cpus
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": PATH}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._waits_ended = 0.0
        self._waiting: set[str] = set()  # jobs that the last call found held back

    def start(self) -> None:
        """Write the configuration, start the daemons, wait until both nodes are idle."""
        ctld_port, dbd_port, database_port, *node_ports = _free_ports(3 + len(NODES))
        places = {"ctld_port": ctld_port, "dbd_port": dbd_port, "database_port": database_port}
        places |= {"host": socket.gethostname(), "user": USER, "root": self.root}
        text = CONFIG.format(**places)
        for node, port in zip(NODES, node_ports, strict=True):
            text += f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory=4000\n"
        text += f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
        (self.root / "slurm.conf").write_text(text)
        accounts = self.root / "slurmdbd.conf"  # SLURM's programs look for it beside slurm.conf
        accounts.touch(mode=0o600)
        accounts.write_text(ACCOUNTS.format(**places))
        for folder in ("munge", "state", "database", *(f"spool/{node}" for node in NODES)):
            (self.root / folder).mkdir(parents=True, mode=0o755 if folder != "munge" else 0o711)
        key = self.root / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={self.root}/munge/socket", f"--key-file={key}",
            f"--pid-file={self.root}/munge/pid", f"--seed-file={self.root}/munge/seed",
            f"--log-file={self.root}/munge/log",
        )  # fmt: skip
        database = self.root / "database"
        self._daemon(  # without its tables of users, which take seconds to make; it listens to this machine alone
            "mariadbd", "--no-defaults", f"--user={USER}", "--skip-grant-tables", f"--datadir={database}",
            f"--tmpdir={database}", f"--socket={self.root}/database.socket", f"--port={database_port}",
            "--bind-address=127.0.0.1", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=64M",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        _wait_for((self.root / "munge" / "socket").exists, "munged to listen")
        query = ("mariadb", "--no-defaults", f"--socket={self.root}/database.socket", "-e", "SELECT 1")
        _wait_for(lambda: self.run(*query), "MariaDB to listen")
        self._daemon("slurmdbd", "-D")
        enter = ("sacctmgr", "--immediate", "add", "cluster", "test")
        _wait_for(lambda: "Adding Cluster" in self.run(*enter), "slurmdbd to listen", pause=0.3)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        _wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(NODES), "both nodes")

    def _daemon(self, *command: str) -> None:
        with tethered(), open(self.root / f"{command[0]}-{len(self._daemons)}.log", "ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=lambda: None,
                )
            )

    def run(self, *command: str) -> str:
        """What one of SLURM's commands prints; "" where it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def stop(self) -> None:
        """End the jobs, then the daemons, newest first."""
        if len(self._daemons) > 1:
            self.run("scancel", "--user", USER)
            with contextlib.suppress(TimeoutError):
                _wait_for(lambda: not self.run("squeue", "-h"), "jobs to end", seconds=30)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    # ------------------------------------------------------------ what tests do to jobs

    def queue(self) -> list[str]:
        """A line for each job and element: id, state, name."""
        return self.run("squeue", "--array", "-h", "-o", "%i %T %j").splitlines()

    def node_of(self, job: str) -> str:
        """The node of a job or element that runs on one; "" where none runs."""
        return self.run("squeue", "-h", "-j", job, "-o", "%N").strip()

    def steps(self) -> list[Path]:
        """What slurmstepd listens at for each step of a job, whether or not SLURM still knows of it."""
        return [path for path in self.root.glob("spool/*/*_*.*") if path.is_socket()]

    @contextlib.contextmanager
    def lost_node(self, job: str) -> Iterator[None]:
        """Inside the block the node of a job is lost to SLURM, while the job's processes on it live."""
        node = self.node_of(job)
        slurmd = self._daemons[NODES.index(node) - len(NODES)]
        slurmd.send_signal(signal.SIGSTOP)
        try:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
            yield
        finally:
            slurmd.send_signal(signal.SIGCONT)
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def end_waits(self) -> None:
        """Let requeued jobs start now: SLURM holds them back for two minutes.

        At most every few seconds: each time puts the job off to the scheduler's next round. And not before a job was
        waiting the time before too: a node refuses one that starts in the second in which its last life ended.
        """
        if time.monotonic() < self._waits_ended + 4:
            return
        self._waits_ended = time.monotonic()
        lines = self.run("squeue", "--array", "-h", "-t", "PENDING", "-o", "%i %r").splitlines()
        waiting = {id for id, reason in (line.split(maxsplit=1) for line in lines) if reason == "BeginTime"}
        for id in waiting & self._waiting:
            self.run("scontrol", "update", f"JobId={id}", "StartTime=now")
        self._waiting = waiting

    def drain(self, seconds: float = 600) -> None:
        """Wait until the queue is empty."""

        def is_empty() -> bool:
            self.end_waits()
            return not self.queue()

        _wait_for(is_empty, f"the queue to empty: {self.queue()}", seconds, pause=0.5)


def _free_ports(n: int) -> list[int]:
    """Ports below those that the system gives out to other programs, and above those of our jobs."""
    found: list[int] = []
    while len(found) < n:
        port = random.SystemRandom().randrange(30_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            if port not in found:
                found.append(port)
    return found


def _wait_for(holds, what: str, seconds: float = 60, pause: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} seconds for {what}")
        time.sleep(pause)


@contextlib.contextmanager
def slurm_cluster(cpus: int = 1) -> Iterator[SlurmCluster]:
    """A cluster for the time of the block, each node of so many CPUs (the machine may have fewer)."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 108 characters
    root.chmod(0o755)
    cluster = SlurmCluster(root, cpus)
    try:
        try:
            cluster.start()
        except TimeoutError as error:
            logs = [f"== {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in sorted(root.glob("*.log"))]
            raise RuntimeError("\n".join([str(error), cluster.run("sinfo", "-N", "-l"), *logs])) from None
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    missing = missing_programs()
    if missing:
        sys.exit(f"missing: {', '.join(missing)} ({PACKAGES})")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a script started it with &, which ignores the first
        signal.signal(number, signal.default_int_handler)
    with slurm_cluster(cpus=2) as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.root}/slurm.conf", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
