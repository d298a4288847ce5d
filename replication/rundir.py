"""The floor plan of an output folder: names, manifest, journal, COMPLETE markers, the lock. Imports no torch.

DIR/suite.yaml                      the resolved suite
DIR/plan.json plan.md               the frozen analysis plan; earlier ones are plan-1.json, plan-2.json, ...
DIR/data/                           the prepared corpus (unless data.dir points elsewhere)
DIR/runs/<arm>/seed-<n>/            one cell: RunDir below
DIR/tensorboard/<arm>/seed-<n>      links to the cells' tensorboard folders, so that TensorBoard's run names are short
DIR/tensorboard/over-seeds difference   means, bands and paired differences, where `replicate tensorboard` wrote them
DIR/launch/<n>-<what>/               what was submitted to SLURM
DIR/judging/ sealed/                the panel of judges: judging.sqlite, and apart from it the key of sides and arms
DIR/certificate.json                the pair certificate of every seed
DIR/report.html report.md results.json figures/*.png
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from replication.errors import Diverged, UserError

# ---------------------------------------------------------------- small files, written whole


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it: a temporary neighbour is synced, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The parsed file, or None where it does not exist.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it, or remove it and run again") from None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- a folder that is complete or not


def mark_complete(folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write folder/COMPLETE: every file's size and SHA-256, so that damage is found by name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "COMPLETE")
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # the marker must not reach the disk before what it vouches for
    listed = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
    write_json(folder / "COMPLETE", {**(extra or {}), "files": listed})


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that mark_complete closed, in words; None where all is well."""
    if not (folder / "COMPLETE").is_file():
        return "has no COMPLETE marker (it was interrupted while being written)"
    try:
        marker = json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))
        listed = marker["files"]
    except (ValueError, KeyError):
        return "has an unreadable COMPLETE marker"
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            return f"lacks the file {name}"
        if path.stat().st_size != expected["bytes"]:
            return f"has {name} with {path.stat().st_size} bytes instead of {expected['bytes']}"
        if file_sha256(path) != expected["sha256"]:
            return f"has {name} with another checksum"
    return None


# ---------------------------------------------------------------- a folder that one process holds


@contextmanager
def hold_lock(folder: Path, message: str) -> Iterator[None]:
    """Hold a folder for one process, by folder/.lock.

    Raises:
        UserError: another live process holds it; says `message`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab+") as file:
        for attempt in range(20):  # a status table probes the lock for an instant; a run holds it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 19:
                    raise UserError(f"{folder}: {message}") from None
                time.sleep(0.05)
        yield


# ---------------------------------------------------------------- one cell


@dataclass(frozen=True)
class RunDir:
    """The files of one cell."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def times(self) -> Path:
        """The longest save and step so far: {"save_seconds": s, "step_seconds": s}."""
        return self.root / "times.json"

    @property
    def start(self) -> Path:
        """Which checkpoint the latest start on several ranks goes on from; see training.start."""
        return self.root / "start.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def samples_part(self) -> Path:
        """Folder of completions while they are being sampled; see preference.parts."""
        return self.root / "samples.part"

    @property
    def complete(self) -> Path:
        return self.root / "COMPLETE"

    @property
    def failed(self) -> Path:
        """Present where the last attempt failed: {"error": first line, "diverged": whether the training was lost,
        "log": path, "step": n, "time": iso}."""
        return self.root / "FAILED"

    @property
    def jobs(self) -> Path:
        """One line for each thing that happened to a SLURM job of the cell; written by launch/job.sh."""
        return self.root / "jobs.jsonl"

    @property
    def log(self) -> Path:
        """Standard output and error of every attempt that the grid started."""
        return self.root / "log.txt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the cell for one process.

        Raises:
            UserError: another live process holds it.
        """
        with hold_lock(self.root, "another process is running this cell; wait for it, or end it"):
            yield

    def is_locked(self) -> bool:
        """Whether a live process on a machine that shares this file system's locks holds the cell."""
        try:
            with open(self.root / ".lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def state(self) -> str:
        """complete, running, failed, interrupted or pending; read from the files alone."""
        if self.complete.is_file():
            return "complete"
        if self.is_locked():
            return "running"
        if self.failed.is_file():
            return "failed"
        return "interrupted" if self.manifest.is_file() else "pending"


@dataclass(frozen=True)
class SuiteDir:
    """The files of one suite: one output folder."""

    root: Path

    @property
    def suite(self) -> Path:
        return self.root / "suite.yaml"

    @property
    def plan(self) -> Path:
        """The frozen analysis plan; see replication.plan."""
        return self.root / "plan.json"

    @property
    def plan_md(self) -> Path:
        return self.root / "plan.md"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def launch(self) -> Path:
        """What was submitted to SLURM; see grid.submit."""
        return self.root / "launch"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def votes(self) -> Path:
        """The vote record; see votes.py."""
        return self.root / "votes.csv"

    @property
    def votes_note(self) -> Path:
        """What the lock of the panel says of the vote record; see votes_note.py."""
        return self.root / "votes.json"

    @property
    def judging(self) -> Path:
        """The panel's database, and what is handed to judges."""
        return self.root / "judging"

    @property
    def sealed(self) -> Path:
        """The key of sides and arms, which the server neither needs nor reads."""
        return self.root / "sealed"

    @property
    def certificate(self) -> Path:
        return self.root / "certificate.json"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @property
    def report_md(self) -> Path:
        return self.root / "report.md"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    def cell(self, arm: str, seed: int) -> RunDir:
        return RunDir(self.runs / arm / f"seed-{seed}")

    def link_tensorboard(self, arm: str, seed: int) -> None:
        """DIR/tensorboard/<arm>/seed-<n> -> the cell's folder, relative, so that DIR can move."""
        link = self.tensorboard / arm / f"seed-{seed}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(self.cell(arm, seed).tensorboard, link.parent))


# ---------------------------------------------------------------- the journal


class Journal:
    """Append-only metrics.jsonl: one object a line, each with its `step`.

    A training line has step, tokens, wall_seconds, data_hash, every scalar that goes to TensorBoard, and `per_step`
    with one value a step since the line before. A validation line has step and the val/ scalars. Readers merge by
    step. Numbers that are not finite are stored as null: missing is missing.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Open for appending; lines after resume_step, and a torn last line, are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_journal(path) if line["step"] <= resume_step]
        write_text(path, "".join(_dump(line) for line in kept))
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def append(self, line: dict[str, Any]) -> None:
        self._file.write(_dump(line))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(_finite(line), separators=(",", ":")) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; a torn line is passed over; no file is no lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [line for line in parse_objects(text) if _has_step(line)]


def read_tail(path: Path, n_bytes: int = 16384) -> dict[str, Any] | None:
    """The last training line (one with `tokens`) of a journal, reading its end alone; None where there is none."""
    lines, is_whole = _end_of_journal(path, n_bytes)
    if not lines and not is_whole:
        return read_tail(path, n_bytes * 8)
    return lines[-1] if lines else None


def read_last_losses(path: Path, n_steps: int, n_bytes: int = 16384) -> tuple[int, list[float | None]]:
    """(last logged step, training losses in nats of at most n_steps steps up to it), reading a journal's end alone.

    A loss that was not finite is None.
    """
    lines, is_whole = _end_of_journal(path, n_bytes)
    losses = [loss for line in lines for loss in line.get("per_step", {}).get("train/loss_nats", [])]
    if len(losses) < n_steps and not is_whole:
        return read_last_losses(path, n_steps, n_bytes * 8)
    return (lines[-1]["step"] if lines else 0), losses[-n_steps:]


def _end_of_journal(path: Path, n_bytes: int) -> tuple[list[dict[str, Any]], bool]:
    """The training lines among the last bytes of a journal, and whether these are all of its bytes."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            size = file.tell()
            file.seek(max(0, size - n_bytes))
            text = file.read().decode("utf-8", errors="ignore")
    except FileNotFoundError:
        return [], True
    return [line for line in parse_objects(text) if _has_step(line) and "tokens" in line], size <= n_bytes


def _has_step(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int)


def parse_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text with one a line; what is torn, or something else, is passed over."""
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


# ---------------------------------------------------------------- how long a stop takes


def record_times(run: RunDir, save_seconds: float, step_seconds: float) -> None:
    """Keep the longest save and the longest step (a validation included) that a cell has taken."""
    kept = read_json(run.times) or {}
    now = {"save_seconds": save_seconds, "step_seconds": step_seconds}
    write_json(run.times, {k: round(max(v, kept.get(k, 0.0)), 3) for k, v in now.items()})


def lead_seconds_needed(run: RunDir) -> int | None:
    """How long before a time limit a run must be told to stop: half as much again as its longest step and save.

    None where it has saved nothing yet.
    """
    times = read_json(run.times)
    return math.ceil(1.5 * (times["save_seconds"] + times["step_seconds"])) if times else None


def is_trained(run: RunDir) -> bool:
    """Whether a cell has been trained to its last step, completions or not."""
    return "finished_at" in (read_json(run.manifest) or {})


# ---------------------------------------------------------------- failures


def record_failure(run: RunDir, error: BaseException) -> None:
    tail = read_tail(run.metrics)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    label = first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
    write_json(
        run.failed,
        {
            "error": label,
            "diverged": isinstance(error, Diverged),
            "log": str(run.log),
            "step": tail["step"] if tail else 0,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


ERROR_LINES = (re.compile(r" job \S+: error: "), re.compile(r"error: |Error: |: Killed|ended by SIG"))
"""What the job script says of its own, then anything that says error."""


def first_error(log: Path, n_bytes: int = 65536) -> str:
    """The line of a job's log that says why it ended, among those of its latest start; else the last line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - n_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    start = max((i for i, line in enumerate(lines) if re.search(r" job \S+: (train|generate) in ", line)), default=-1)
    errors = (line.strip() for form in ERROR_LINES for line in lines[start + 1 :] if form.search(line))
    return next(errors, last_line(log))


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; "" where there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1].strip() if lines else ""


def remove_tree(path: Path) -> None:
    """Remove a folder that may not exist."""
    shutil.rmtree(path, ignore_errors=True)
