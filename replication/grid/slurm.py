"""The words that are exchanged with SLURM: sbatch, squeue, sacct, scancel. Knows nothing of cells."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from replication.errors import UserError

SECONDS = 60  # a scheduler under load answers slowly
LOST_ANSWER = re.compile(r"timed out|unable to contact|socket|communication|zero bytes", re.IGNORECASE)
_COLUMNS = ("JobArrayID:40", "ArrayTaskID:40", "State:24", "Reason:60", "RestartCnt:12", "Name:200")


class Refused(UserError):
    """A job was not taken, for certain."""


@dataclass(frozen=True)
class Queued:
    """One job, or one element of an array, that is in the queue."""

    id: str  # as scancel takes it: 123, or 123_4
    index: int | None  # of an element
    name: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it is pending; "" where there is none
    restarts: int  # how often it was requeued


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
    """What to do about the refusals that beginners meet."""
    if "account" in said or "qos" in said.lower():
        return "; set SITE_ACCOUNT and SITE_QOS in the site file"
    if "partition" in said:
        return f"; set SITE_PARTITION in the site file to one of: {', '.join(partitions()) or 'none is up'}"
    if "node configuration" in said or "memory" in said or "generic resource" in said:
        return "; no node has that: see cluster.devices and cluster.slurm of the cluster file, and SITE_GPUS"
    return "; read the script, mend the site or cluster file"


def queue() -> list[Queued]:
    """Every job of this user that is in the queue, each element of an array on its own.

    Raises:
        UserError: squeue is missing, or fails.
    """
    done = _run(["squeue", "--me", "--array", "--noheader", f"--Format={','.join(_COLUMNS)}"])
    if done.returncode:
        raise UserError(f"squeue does not answer ({_said(done.stderr)[-200:]}); is the scheduler up?")
    widths = [int(column.split(":")[1]) for column in _COLUMNS]
    return [_parse(line, widths) for line in done.stdout.splitlines() if line.strip()]


def _parse(line: str, widths: Sequence[int]) -> Queued:
    values, start = [], 0
    for width in widths:
        values.append(line[start : start + width].strip())
        start += width
    id, index, state, reason, restarts, name = values
    return Queued(
        id=id,
        index=int(index) if index.isdigit() else None,
        name=name,
        state=state,
        reason="" if reason == "None" else reason,
        restarts=int(restarts) if restarts.isdigit() else 0,
    )


def history(ids: Iterable[str]) -> dict[str, str]:
    """Last known state of jobs and elements that have left the queue, by id; empty where accounting is off."""
    wanted = ",".join(ids)
    if not wanted or not shutil.which("sacct"):
        return {}
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={wanted}", "--format=JobID,State"])
    if done.returncode:
        return {}
    rows = (line.split("|") for line in done.stdout.splitlines())
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1]}


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
