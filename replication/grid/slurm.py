"""The words that are exchanged with SLURM: sbatch, squeue, sacct, scancel. Knows nothing of cells."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from replication.errors import UserError

SECONDS = 60  # a scheduler under load answers slowly
LOST_ANSWER = re.compile(r"timed out|unable to contact|socket|communication|zero bytes", re.IGNORECASE)
_COLUMNS = ("JobArrayID:40", "ArrayTaskID:40", "State:24", "Reason:60", "RestartCnt:12", "UserName:40", "Name:200")
HIDDEN = "HIDDEN"  # in place of a state: another user's job, on a cluster that does not show it
UNFINISHED = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "RESIZING")  # of accounts that lag behind the queue


class Refused(UserError):
    """A job was not taken, for certain."""


@dataclass(frozen=True)
class Queued:
    """One job, or one element of an array, that is in the queue."""

    id: str  # as scancel takes it: 123, or 123_4
    index: int | None  # of an element
    name: str
    state: str  # PENDING, RUNNING, SUSPENDED, COMPLETING, ...
    reason: str  # why it is pending; "" where there is none
    restarts: int  # how often it was requeued
    user: str = ""  # whose it is


def is_here() -> bool:
    """Whether this machine can ask a SLURM cluster."""
    return shutil.which("squeue") is not None


def submit(script: Path, arguments: Sequence[str], options: Sequence[str] = ()) -> str:
    """Submit a script; the job's id.

    Raises:
        Refused: sbatch is missing, or refuses; names what it said.
        UserError: no answer came, so the job may be in the queue or not.
    """
    done = _run(submit_command(script, arguments, options))
    if done.returncode:
        said = " ".join(_said(done.stderr).split())
        if LOST_ANSWER.search(said):
            raise UserError(
                f"{script}: no answer from the scheduler ({said}); call this again, it looks into the queue"
            )
        raise Refused(f"{script}: sbatch refuses it ({said}){_remedy(said)}")
    return done.stdout.strip().split(";")[0]  # 123, or 123;cluster


def submit_command(script: Path, arguments: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    return ["sbatch", "--parsable", *options, str(script), *arguments]


def _remedy(said: str) -> str:
    """Remedy of the refusals that beginners meet."""
    if "account" in said or "qos" in said.lower():
        return "; set SITE_ACCOUNT and SITE_QOS in the site file"
    if "partition" in said:
        return f"; set SITE_PARTITION in the site file to one of: {', '.join(partitions()) or 'none is up'}"
    if "node configuration" in said or "memory" in said or "generic resource" in said:
        return "; no node has that: see cluster.devices and cluster.slurm of the cluster file, and SITE_GPUS"
    return "; read the script, fix the site or cluster file"


def queue() -> list[Queued]:
    """Every job in the queue, whoever submitted it, each element of an array on its own.

    Raises:
        UserError: squeue is missing, or fails.
    """
    done = _run(["squeue", "--all", "--array", "--noheader", f"--Format={','.join(_COLUMNS)}"])
    if done.returncode:
        raise UserError(f"squeue does not answer ({_said(done.stderr)[-200:]}); is the scheduler up?")
    widths = [int(column.split(":")[1]) for column in _COLUMNS]
    return [_parse(line, widths) for line in done.stdout.splitlines() if line.strip()]


def _parse(line: str, widths: Sequence[int]) -> Queued:
    values, start = [], 0
    for width in widths:
        values.append(line[start : start + width].strip())
        start += width
    id, index, state, reason, restarts, user, name = values
    return Queued(
        id=id,
        index=int(index) if index.isdigit() else None,
        name=name,
        state=state,
        reason="" if reason == "None" else reason,
        restarts=int(restarts) if restarts.isdigit() else 0,
        user=user,
    )


def user_name(uid: int | None = None) -> str:
    """The name by which the scheduler knows a user, or who calls."""
    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def hides_others() -> bool:
    """Whether this cluster shows a user only his own jobs."""
    return os.geteuid() != 0 and "jobs" in (setting("PrivateData") or "").split(",")


def history(elements: Iterable[str]) -> dict[str, str]:
    """The end of elements (123_4) that have left the queue, in the scheduler's words; empty without accounts.

    Such as FAILED, TIMEOUT, NODE_FAIL, CANCELLED (by the scheduler itself) or CANCELLED by alice.
    """
    elements = list(elements)
    jobs = ",".join(sorted({element.split("_")[0] for element in elements}))
    if not jobs or not shutil.which("sacct"):
        return {}
    command = ["sacct", "--allusers", "--noheader", "--parsable2", "--allocations", f"--jobs={jobs}"]
    done = _run([*command, "--format=JobID,State"])
    if done.returncode:
        return {}
    said = re.sub(r"(?<=CANCELLED by )\d+", lambda uid: user_name(int(uid[0])), done.stdout)
    rows = [line.partition("|") for line in said.splitlines()]
    # elements that never began share a line, 123_[0-6,9%2], which in the end is that of 123; of those that were
    # cancelled one by one nothing else is kept
    words = {id.partition("_[")[0]: word for id, _, word in rows if word}
    known = {id.split("_")[0] for id in words}
    found = {e: words.get(e, words.get(e.split("_")[0], "CANCELLED")) for e in elements if e.split("_")[0] in known}
    last = {e: "CANCELLED" if word == "PENDING" and e not in words else word for e, word in found.items()}
    return {e: word for e, word in last.items() if word.split()[0] not in UNFINISHED}


def cancel(ids: Sequence[str]) -> None:
    """Take jobs or elements out of the queue; running ones are ended.

    Raises:
        UserError: scancel is missing, or fails.
    """
    done = _run(["scancel", *ids])
    if done.returncode:
        raise UserError(f"scancel: {_said(done.stderr)}")


def partitions() -> list[str]:
    """Names of the partitions, the default one first."""
    names = _run(["sinfo", "--noheader", "--format=%P"]).stdout.split()
    return [n.removesuffix("*") for n in sorted(names, key=lambda n: not n.endswith("*"))]


def node_lines(partition: str) -> list[str]:
    """For each node of a partition: name|cores|memory in MiB|generic resources, such as n1|64|515000|gpu:8."""
    command = ["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%c|%m|%G"]
    return _run(command).stdout.split()


def time_limit_minutes(partition: str) -> float | None:
    """The longest time of a job of a partition; None for any."""
    said = _run(["sinfo", "--noheader", f"--partition={partition}", "--format=%l"]).stdout.split()
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", said[0]) if said else None
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60


def setting(name: str) -> str | None:
    """A line of the cluster's configuration, such as JobRequeue; None where it is not told."""
    for line in _run(["scontrol", "show", "config"]).stdout.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=SECONDS)
    except FileNotFoundError:
        raise Refused(
            f"{command[0]}: not found on this machine; call this on a login node of the cluster, or run the cells here "
            "with `replicate grid run`"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {SECONDS} seconds; is the scheduler up?") from None


def _said(stderr: str) -> str:
    lines = [re.sub(r"^(\w+: )?(error|fatal): ", "", line) for line in stderr.strip().splitlines()]
    return "; ".join(lines) or "no message"
