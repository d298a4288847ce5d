"""A SLURM cluster: what its site file says, and the words exchanged with sbatch, squeue, sacct, scancel. No cells."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from replication.errors import CHECKOUT, SHIPPED, UserError

EXAMPLE = "launch/site.env.example" if CHECKOUT else SHIPPED / "launch" / "site.env.example"
SECONDS = 60  # a scheduler under load answers slowly
LOST_ANSWER = re.compile(r"timed out|unable to contact|socket|communication|zero bytes", re.IGNORECASE)
HIDDEN = "HIDDEN"  # in place of a state: another user's job, on a cluster that does not show it
UNFINISHED = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "RESIZING")  # of accounts that lag behind the queue
CHOICES = {"on_preemption": ("requeue", "chain", "end"), "gpus": ("gpus-per-node", "gres")}


@dataclass(frozen=True)
class Site:
    """What is true of one cluster, whatever runs there: launch/site.env.example's variables, without SITE_."""

    path: Path | None = None
    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    sbatch: str = ""
    gpus: str = "gpus-per-node"
    on_preemption: str = "requeue"
    modules: str = ""
    container: str = ""
    master_addr: str = ""
    scratch: str = ""


def load_site(path: Path | None) -> Site:
    """Read a site file as bash does; none: launch/site.env (of the checkout), else one that asks for nothing.

    Raises UserError where the file is missing or fails, or sets an unknown SITE_ variable, or one to what it cannot be.
    """
    default = (CHECKOUT or Path()) / "launch" / "site.env"
    if path is None and not default.is_file():
        return Site()
    path = path or default
    if not path.is_file():
        raise UserError(f"--site: {path} does not exist; copy {EXAMPLE} there and fill it in")
    # every SITE_ variable that it sets, null-terminated; what the file itself prints goes elsewhere
    read = 'source "$1" >&2; for name in ${!SITE_@}; do printf "%s=%s\\0" "$name" "${!name}"; done'
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SITE_")}
    command = ["bash", "-e", "-c", read, "bash", str(path.resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=60)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{path}: bash cannot read it ({reason}); fix it, {EXAMPLE} shows the form")
    values = dict(item.partition("=")[::2] for item in done.stdout.split("\0") if item)
    known = {f"SITE_{name.upper()}": name for name in Site.__dataclass_fields__ if name != "path"}
    for variable in values:
        if variable not in known:
            raise UserError(f"{path}: unknown {variable}; the site's variables are {', '.join(known)}")
    given = {known[variable]: value for variable, value in values.items() if value}
    for name, choices in CHOICES.items():
        if given.get(name, choices[0]) not in choices:
            raise UserError(f"{path}: SITE_{name.upper()} is '{given[name]}'; it must be one of {', '.join(choices)}")
    return Site(path=path.resolve(), **given)


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


class Refused(UserError):
    """A job was not taken, for certain."""


def submit(script: Path, command: list[str]) -> str:
    """Submit a script; the job's id. Refused: no sbatch, or it says no. UserError: no answer, the job may be there."""
    done = ask(*command)
    if not done.returncode:
        return done.stdout.strip().split(";")[0]  # 123, or 123;cluster
    said = " ".join(_said(done.stderr).split())
    if LOST_ANSWER.search(said):
        raise UserError(f"{script}: no answer from the scheduler ({said}); call this again, it looks into the queue")
    remedy = "read the script, fix the site or cluster file"
    if "account" in said or "qos" in said.lower():
        remedy = "set SITE_ACCOUNT and SITE_QOS in the site file"
    elif "partition" in said:
        remedy = f"set SITE_PARTITION in the site file to one of: {', '.join(partitions()) or 'none is up'}"
    elif "node configuration" in said or "memory" in said or "generic resource" in said:
        remedy = "no node has that: see cluster.devices and cluster.slurm of the cluster file, and SITE_GPUS"
    raise Refused(f"{script}: sbatch refuses it ({said}); {remedy}")


def queue() -> list[Queued]:
    """Every job in the queue, whoever submitted it, each element of an array on its own (UserError: squeue fails)."""
    names = ("JobArrayID", "ArrayTaskID", "State", "Reason", "RestartCnt", "UserName", "Name")
    widths = (40, 40, 24, 60, 12, 40, 200)
    columns = ",".join(f"{name}:{width}" for name, width in zip(names, widths, strict=True))
    done = ask("squeue", "--all", "--array", "--noheader", f"--Format={columns}")
    if done.returncode:
        raise UserError(f"squeue does not answer ({_said(done.stderr)[-200:]}); is the scheduler up?")
    jobs = []
    for line in filter(str.strip, done.stdout.splitlines()):
        id, index, state, reason, restarts, user, name = (
            line[end - width : end].strip() for width, end in zip(widths, accumulate(widths), strict=True)
        )
        element, n = int(index) if index.isdigit() else None, int(restarts) if restarts.isdigit() else 0
        jobs.append(Queued(id, element, name, state, "" if reason == "None" else reason, n, user))
    return jobs


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
    rows = ("--allusers", "--noheader", "--parsable2", "--allocations", f"--jobs={jobs}")
    done = ask("sacct", *rows, "--format=JobID,State")
    if done.returncode:
        return {}
    said = re.sub(r"(?<=CANCELLED by )\d+", lambda uid: user_name(int(uid[0])), done.stdout)
    # elements that never began share a line, 123_[0-6,9%2], which in the end is that of 123; of those that were
    # cancelled one by one nothing else is kept
    words = {id.partition("_[")[0]: word for id, _, word in (row.partition("|") for row in said.splitlines()) if word}
    known = {id.split("_")[0] for id in words}
    found = {e: words.get(e, words.get(e.split("_")[0], "CANCELLED")) for e in elements if e.split("_")[0] in known}
    last = {e: "CANCELLED" if word == "PENDING" and e not in words else word for e, word in found.items()}
    return {e: word for e, word in last.items() if word.split()[0] not in UNFINISHED}


def cancel(ids: Sequence[str]) -> None:
    """Take jobs or elements out of the queue; running ones are ended. Raises UserError where scancel fails."""
    done = ask("scancel", *ids)
    if done.returncode:
        raise UserError(f"scancel: {_said(done.stderr)}")


def partitions() -> list[str]:
    """Names of the partitions, the default one first."""
    names = ask("sinfo", "--noheader", "--format=%P").stdout.split()
    return [n.removesuffix("*") for n in sorted(names, key=lambda n: not n.endswith("*"))]


def setting(name: str) -> str | None:
    """A line of the cluster's configuration, such as JobRequeue; None where it is not told."""
    match = re.search(rf"^{name}[ \t]*=(.*)$", ask("scontrol", "show", "config").stdout, re.MULTILINE)
    return match[1].strip() if match else None


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM. Refused: it is not on this machine. UserError: it does not answer in time."""
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
    lines = (re.sub(r"^(\w+: )?(error|fatal): ", "", line) for line in stderr.strip().splitlines())
    return "; ".join(lines) or "no message"
