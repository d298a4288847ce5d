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
DIR/noise.json noise/               how far rounding alone moves the loss, and the runs of `replicate bench noise`
DIR/report.html report.md results.json figures/*.png
.NAME.<pid>                         beside NAME: a file that is being written, or was when its writer died
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from replication.errors import Diverged, UserError

# ---------------------------------------------------------------- small files, written whole


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none of it: a temporary neighbour is synced, then renamed into place, and so is its name.

    What is no file, such as /dev/stdout, is written to as it is.

    Raises:
        OSError: with the name of the file; the temporary is gone.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it, as UTF-8; half a surrogate pair, which is no text, as its escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError the name of the file that a person knows: that of fsync has none, that of a temporary is gone."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; a file system that cannot sync folders is let be."""
    with naming(path):
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
                raise


def remove_temporaries(folder: Path, held: bool = False) -> None:
    """Remove what writers that were killed have left of write_bytes.

    Args:
        folder: where.
        held: this process alone writes there; else what a live process of this machine may be writing stays.
    """
    for path in folder.glob(".*.*"):
        pid = path.name.rpartition(".")[2]
        if pid.isdecimal() and path.is_file() and (held or not _is_alive(int(pid))):
            with suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return pid > 0


def read_json(path: Path) -> Any:
    """The parsed file, or None where it does not exist.

    Raises:
        UserError: the file is not JSON, or cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it, or move it away") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it, or remove it and run again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where it does not exist.

    Raises:
        UserError: the file holds something else.
    """
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; restore it, or remove it and run again")
    return value or {}


def number(value: Any) -> float | None:
    """What a file gives for a number, as a float; None for whatever is none, NaN and infinity included."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:  # a whole number beyond what a float holds
        return None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- a folder that is complete or not


def mark_complete(folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write folder/COMPLETE: every file's size and SHA-256, so that damage is found by name.

    The marker must not reach the disk before what it vouches for: files first, then the names in each folder.
    """
    inside = sorted(p for p in folder.rglob("*") if not p.name.startswith(".") and p.name != "COMPLETE")
    files = [p for p in inside if p.is_file()]
    for path in [*files, *(p for p in inside if p.is_dir()), folder]:
        sync(path)
    listed = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
    marker = {**(extra or {}), "files": listed}
    write_json(folder / "COMPLETE", {**marker, "marker_sha256": _marker_sha256(marker)})


def _marker_sha256(marker: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(marker, sort_keys=True, default=str).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that mark_complete closed, in words; None where all is well."""
    if not (folder / "COMPLETE").is_file():
        return "has no COMPLETE marker (it was interrupted while being written)"
    try:
        marker = read_object(folder / "COMPLETE")
        recorded = marker.pop("marker_sha256", None)  # checkpoints of earlier versions have none
        listed = {name: (facts["bytes"], facts["sha256"]) for name, facts in marker["files"].items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return "has an unreadable COMPLETE marker"
    if recorded is not None and recorded != _marker_sha256(marker):
        return "has a COMPLETE marker with another checksum"
    for name, (n_bytes, sha256) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"lacks the file {name}"
        if path.stat().st_size != n_bytes:
            return f"has {name} with {path.stat().st_size} bytes instead of {n_bytes}"
        try:
            if file_sha256(path) != sha256:
                return f"has {name} with another checksum"
        except OSError as error:
            return f"has {name}, which cannot be read ({error.strerror})"
    return None


# ---------------------------------------------------------------- a folder that one process holds


HELD = (errno.EAGAIN, errno.EACCES)
"""What the system answers where another process has the lock; anything else says nothing about one."""


@contextmanager
def hold_lock(folder: Path, message: str, name: str = ".lock") -> Iterator[None]:
    """Hold a folder for one process, by the file `name` in it.

    Raises:
        UserError: another live process holds it; says `message`. Or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "ab+") as file:
        for attempt in range(20):  # a status table probes the lock for an instant; a run holds it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in HELD:
                    raise UserError(without_locks(folder, error)) from None
                if attempt == 19:
                    raise UserError(f"{folder}: {message}") from None
                time.sleep(0.05)
        yield


def without_locks(folder: Path, error: OSError) -> str:
    """What to say where a lock can be neither had nor refused."""
    return (
        f"{folder}: this file system has no locks ({error.strerror}), and without one two processes could write the "
        "same files; mount it with them (Lustre: -o flock; NFS: with its lock daemon), or choose another --out"
    )


# ---------------------------------------------------------------- one cell

KEPT = ("step", "tokens", "data_chain", "final_weights_sha256")
"""What COMPLETE repeats of the manifest."""


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
        """Where the processes of the latest start on several ranks meet; see training.start."""
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

    def checkpoint_folders(self) -> list[Path]:
        """checkpoints/step-<n>, damaged ones too, by step; a person's copy under another name is none of them."""
        found = [p for p in self.checkpoints.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
        return sorted(found, key=step_of)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the cell for one process.

        Raises:
            UserError: another live process holds it.
        """
        with hold_lock(self.root, "another process is running this cell; wait for it, or end it"):
            remove_temporaries(self.root, held=True)
            yield

    def is_locked(self) -> bool:
        """Whether a live process on a machine that shares this file system's locks holds the cell.

        An error is no yes: where there are no locks, nobody has one.
        """
        try:
            file = open(self.root / ".lock", "rb")  # noqa: SIM115  (closed below; only what flock answers is a word on a lock)
        except OSError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno in HELD
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
    def noise(self) -> Path:
        """How far rounding alone moves the loss, where `replicate bench noise` measured it in DIR/noise."""
        return self.root / "noise.json"

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

    def inputs_sha256(self, cells: Iterable[RunDir]) -> str:
        """Of what a report is made from: suite, plan, votes, noise, and the marker and manifest of each cell.

        Copies and clocks of other nodes change the times of files, and not this.
        """
        paths = [
            self.suite,
            self.plan,
            self.votes,
            self.votes_note,
            self.noise,
            *(p for c in cells for p in (c.complete, c.manifest)),
        ]
        parts = [file_sha256(path) if path.is_file() else "-" for path in paths]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def cells(self) -> list[tuple[str, int, RunDir]]:
        """(arm, seed, cell) of every folder runs/<arm>/seed-<n>; a person's copy under another name is none of them."""
        return cells_in(self.runs)

    def link_tensorboard(self, arm: str, seed: int) -> str:
        """DIR/tensorboard/<arm>/seed-<n> -> the cell's folder, relative, so that DIR can move.

        A copy that followed links holds a folder there: it is replaced where the cell's own has all of its files.

        Returns:
            "", or a line where there is no link: it is a convenience, and no cell fails for want of it.
        """
        link, own = self.tensorboard / arm / f"seed-{seed}", self.cell(arm, seed).tensorboard
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(own.resolve(), link.parent.resolve())  # either may lie on another disk
            if link.is_symlink() and os.readlink(link) == target:
                return ""
            if link.is_symlink():
                link.unlink()
            elif link.is_dir() and all((own / p.name).exists() for p in link.iterdir()):
                remove_tree(link)
            link.symlink_to(target)
        except OSError as error:
            return f"{link}: no link to the cell's curves ({error.strerror}); they are in {own}"
        return ""


def cells_in(runs: Path) -> list[tuple[str, int, RunDir]]:
    """See SuiteDir.cells."""
    found = [(p.parent.name, p.name.removeprefix("seed-"), RunDir(p)) for p in sorted(runs.glob("*/seed-*"))]
    return [(arm, int(seed), run) for arm, seed, run in found if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", seed)]


def name_cells(names: Sequence[str]) -> str:
    """Names of cells on one line; of more than eight, by arm: baseline/seed-[1-4, 7], both/seed-1."""
    if len(names) <= 8:
        return ", ".join(names)
    seeds: dict[str, list[int]] = {}
    for name in names:
        stem, _, seed = name.rpartition("-")
        if seed.isdecimal():
            seeds.setdefault(stem, []).append(int(seed))
        else:
            seeds[name] = []
    lists = {stem: f"[{', '.join(spans(n))}]" if n[1:] else "".join(map(str, n)) for stem, n in seeds.items()}
    return ", ".join(f"{stem}-{found}" if found else stem for stem, found in lists.items())


def spans(numbers: Iterable[int]) -> list[str]:
    """Whole numbers in ascending order, neighbours as one: 1-4, 7."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return [str(a) if a == b else f"{a}-{b}" for a, b in runs]


# ---------------------------------------------------------------- the journal


MOST_STEPS = 10_000_000


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
        self.path = path
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115  (lives as long as the run)

    def append(self, line: dict[str, Any]) -> None:
        with naming(self.path):
            self._file.write(_dump(line).encode())
            self._file.flush()

    def sync(self) -> None:
        """Bring every line to the disk: before a checkpoint that stands for them."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # on a full disk, what append has said already
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
    """Every whole line, in order; a torn or damaged line is passed over; no file is no lines.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    return [line for line in parse_objects(content) if has_step(line)]


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
    losses = [loss for line in lines for loss in step_losses(line) if loss is None or number(loss) is not None]
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
            content = file.read()
    except FileNotFoundError:
        return [], True
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    return [line for line in parse_objects(content) if has_step(line) and "tokens" in line], size <= n_bytes


def has_step(line: Mapping[str, Any]) -> bool:
    """Whether a journal's line says of which step it is; a number that no training reaches is damage."""
    step = line.get("step")
    return type(step) is int and 0 <= step <= MOST_STEPS


def step_losses(line: Mapping[str, Any]) -> list[Any]:
    """The training losses of a line, one a step since the line before, as they stand there."""
    per_step = line.get("per_step")
    losses = per_step.get("train/loss_nats") if isinstance(per_step, dict) else None
    return losses if isinstance(losses, list) else []


def parse_objects(content: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one a line; what is torn, damaged or something else is passed over."""
    for line in content.splitlines():
        try:
            value = json.loads(line.strip(b"\0"))
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


# ---------------------------------------------------------------- whether a journal is whole

Logged = dict[int, dict[str, Any]]
"""Step -> what checks read of its lines: LOGGED_KEYS alone, so that many journals fit in memory."""
LOGGED_KEYS = ("tokens", "data_hash", "train/learning_rate", "train/loss_nats", "val/loss_nats")


def logged_steps(lines: Iterable[dict[str, Any]]) -> Logged:
    """What the checks need of a journal's lines, and as n_losses of how many steps a line has the losses.

    A later line of the same step wins.
    """
    found: Logged = {}
    for line in lines:
        entry = found.setdefault(line["step"], {})
        entry |= {key: line[key] for key in LOGGED_KEYS if key in line}
        if "tokens" in line:
            entry["n_losses"] = sum(loss is None or number(loss) is not None for loss in step_losses(line))
    return found


def due_validations(config: Mapping[str, Any]) -> set[int]:
    """The steps that a whole training validates at, of a config's dotted keys: every so many, and the last."""
    steps, every = config["training.steps"], config["validation.every_steps"]
    return {*range(every, steps, every), steps}


def journal_gaps(logged: Logged, steps: int, validations: Iterable[int]) -> list[str]:
    """What a journal lacks of the losses of steps up to `steps` and of the validations at those steps, a line each.

    Each training line has the losses of the steps since the line before, whatever the interval of lines was: together
    they have every step once.
    """
    times = [0] * (steps + 1)
    for step, entry in logged.items():
        for k in range(max(1, step - entry.get("n_losses", 0) + 1), min(step, steps) + 1):
            times[k] += 1
    odd = {
        "metrics.jsonl lacks the losses of": [k for k in range(1, steps + 1) if not times[k]],
        "metrics.jsonl has more than once": [k for k in range(1, steps + 1) if times[k] > 1],
        "metrics.jsonl lacks the validation of": [
            k for k in sorted(validations) if number(logged.get(k, {}).get("val/loss_nats")) is None
        ],
    }
    return [f"{what} {_steps(found)}" for what, found in odd.items() if found]


def _steps(found: list[int]) -> str:
    """`step 5` or `steps 6-20, 25`: runs of neighbours in brief, five of them."""
    runs = spans(found)
    return f"step{'s' if len(found) > 1 else ''} {', '.join(runs[:5] + (['...'] if len(runs) > 5 else []))}"


# ---------------------------------------------------------------- how long a stop takes


def record_times(run: RunDir, save_seconds: float, step_seconds: float) -> None:
    """Keep the longest save and the longest step (a validation included) that a cell has taken.

    It is a convenience: a file that cannot be read is begun anew, one that cannot be written is let be.
    """
    kept = _times(run) or (0.0, 0.0)
    now = [round(max(pair), 3) for pair in zip(kept, (save_seconds, step_seconds), strict=True)]
    with suppress(OSError):
        write_json(run.times, dict(zip(TIMES, now, strict=True)))


TIMES = ("save_seconds", "step_seconds")


def _times(run: RunDir) -> tuple[float, float] | None:
    try:
        save, step = (number(read_object(run.times).get(key)) for key in TIMES)
    except UserError:
        return None
    return None if save is None or step is None else (save, step)


def lead_seconds_needed(run: RunDir) -> int | None:
    """How long before a time limit a run must be told to stop: half as much again as its longest step and save.

    None where it has saved nothing yet, or what it noted cannot be read.
    """
    times = _times(run)
    return math.ceil(1.5 * sum(times)) if times else None


def is_trained(run: RunDir) -> bool:
    """Whether a cell has been trained to its last step, completions or not (UserError: its manifest is damaged)."""
    return "finished_at" in read_object(run.manifest)


# ---------------------------------------------------------------- failures


def record_failure(run: RunDir, error: BaseException | str) -> None:
    """Write FAILED; where even that cannot be written, what is raised or printed beside it says why."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = isinstance(error, (UserError, str))
    with suppress(OSError, UserError):
        tail = read_tail(run.metrics)
        write_json(
            run.failed,
            {
                "error": lines[0] if named else f"{type(error).__name__}: {lines[0]}",
                "diverged": isinstance(error, Diverged),
                "log": str(run.log),
                "step": tail["step"] if tail else 0,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
        )


def read_failure(run: RunDir) -> dict[str, Any] | None:
    """What FAILED says, with an `error` of one line in any case; None where there is none."""
    try:
        found = read_object(run.failed) if run.failed.exists() else None
    except UserError as error:
        found = {"error": str(error)}
    if found is None:
        return None
    lines = str(found.get("error") or "").strip().splitlines() or ["no error was recorded; see log.txt"]
    return found | {"error": lines[0][:500]}


_ERROR = r"error: |Error: |: Killed|ended by SIG"
ERROR_LINES = (
    re.compile(r" job \S+: error: "),
    re.compile(rf"^(?!srun: .*Exited with exit code).*(?:{_ERROR})"),
    re.compile(_ERROR),
)
"""What the job script says of its own; anything that says error; srun's word on a code, which may come before that."""


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


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def remove_tree(path: Path) -> None:
    """Remove a folder that may not exist."""
    shutil.rmtree(path, ignore_errors=True)
