"""The record of a cell that failed, and the line of its log that says why."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from replication.console import timestamp
from replication.errors import Diverged, UserError
from replication.runs.files import read_object
from replication.runs.journal import read_tail
from replication.runs.layout import RunDir
from replication.runs.ledger import append_of_cell
from replication.runs.records import from_json, write_record

_ERROR = r"error: |Error: |: Killed|ended by SIG"
ERROR_LINES = (
    re.compile(r" job \S+: error: "),
    re.compile(r"slurmstepd\S*: .* CANCELLED AT "),
    re.compile(rf"^(?!srun: .*Exited with exit code).*(?:{_ERROR})"),
    re.compile(_ERROR),
)
"""The job script's own words; SLURM's on why it ended the step; any error; srun's on a code, which may come first."""


@dataclass(frozen=True)
class Failure:
    """FAILED: what the last attempt of a cell left behind."""

    error: str = ""  # one line
    diverged: bool = False  # whether the training was lost
    log: str | None = None
    step: int = 0  # last logged before it
    time: str | None = None


def record_failure(run: RunDir, error: BaseException | str) -> None:
    """Write FAILED; where even that cannot be written, what is raised or printed beside it says why."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0] if isinstance(error, (UserError, str)) else f"{type(error).__name__}: {lines[0]}"
    with suppress(OSError, UserError):
        tail = read_tail(run.metrics)
        step = tail.step if tail else 0
        write_record(run.failed, Failure(line, isinstance(error, Diverged), str(run.log), step, timestamp()))


def read_failure(run: RunDir) -> Failure | None:
    """FAILED, with an error of one line in any case; None where there is none."""
    if not run.failed.exists():
        return None
    try:
        found = from_json(Failure, read_object(run.failed), lenient=True)
    except UserError as error:
        found = Failure(str(error))
    lines = found.error.strip().splitlines() or ["no error was recorded; see log.txt"]
    return replace(found, error=lines[0][:500])


def clear_failure(run: RunDir) -> None:
    """Remove FAILED before another attempt, of which the ledger keeps what it said."""
    if failure := read_failure(run):
        append_of_cell(run, "retry", error=failure.error, diverged=failure.diverged, step=failure.step)
        run.failed.unlink(missing_ok=True)


def first_error(log: Path, n_bytes: int = 65536) -> str:
    """The line of a job's log that says why it ended, among those of its latest start; "" where none does."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - n_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    start = max((i for i, line in enumerate(lines) if re.search(r" job \S+: (train|generate) in ", line)), default=-1)
    errors = (line.strip() for form in ERROR_LINES for line in lines[start + 1 :] if form.search(line))
    return next(errors, "")


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; "" where there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip("\0 \n").splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
