"""Submissions of an output folder to SLURM, their jobs in the queue and out of it, and the notes of jobs.

README.md says what OUT/launch holds. The notes are the cell's jobs.jsonl, a line for each beginning and end of a job,
by launch/job.sh.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from replication.console import say, timestamp
from replication.errors import UserError
from replication.grid import slurm
from replication.runs.files import parse_objects, read_object, write_json
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import is_trained
from replication.runs.records import from_json

JobStage = Literal["train", "generate", "report"]
Jobs = dict[JobStage, slurm.Queued]


@dataclass(frozen=True)
class Note:
    """One line of a cell's jobs.jsonl."""

    event: str = ""  # started, preempted, ended, cancelled or extended
    job: str = ""
    code: int = 0  # with which the job's step ended
    restarts: int = 0


def read_notes(run: RunDir) -> list[Note]:
    """The lines of jobs.jsonl, torn ones left out."""
    try:
        return [from_json(Note, line, lenient=True) for line in parse_objects(run.jobs.read_bytes())]
    except OSError:
        return []


def note(runs: Sequence[RunDir], event: str) -> None:
    """Add to each cell's jobs.jsonl what we did: that it was taken out of the queue, or is to go on."""
    for run in runs:
        with open(run.jobs, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "at": timestamp()}) + "\n")


@dataclass(frozen=True)
class Submission:
    """One numbered folder of OUT/launch."""

    folder: Path
    name: str  # the job's
    stage: JobStage
    cells: tuple[str, ...]
    job_id: str | None
    user: str = ""  # who submitted it
    out: str | None = None  # the output folder, as the job knows it


def submissions(suite_dir: SuiteDir) -> list[Submission]:
    """Every submission of an output folder, oldest first; where it is a copy of another folder, not that one's."""
    found = []
    for path in _records(suite_dir):
        facts, answer = read_object(path), read_object(path.with_name("submitted.json"))
        if not {"name", "stage", "cells"} <= facts.keys():
            raise UserError(f"{path}: does not say what was submitted; restore it, or remove {path.parent}")
        out, user = facts.get("out"), facts.get("user") or slurm.user_name(path.stat().st_uid)
        there = Path(out or "", "launch", path.parent.name)
        elsewhere = out is not None and there.is_dir() and not suite_dir.root.samefile(out)
        if elsewhere and read_object(there / "submitted.json") == answer:  # else another suite in our old place
            continue
        cells = tuple(facts["cells"])
        found.append(Submission(path.parent, facts["name"], facts["stage"], cells, answer.get("id"), user, out))
    return found


def _records(suite_dir: SuiteDir) -> list[Path]:
    """job.json of every numbered folder; a person's copy under another name is none of them."""
    paths = sorted(suite_dir.launch.glob("*/job.json"))
    return [path for path in paths if re.fullmatch(r"\d+-[\w.-]+", path.parent.name)]


def next_number(suite_dir: SuiteDir) -> int:
    """Of the next submission: after all that are there, a copied folder's too."""
    return max((int(p.parent.name.split("-")[0]) for p in _records(suite_dir)), default=0) + 1


def moved_from(waiting: Sequence[Submission]) -> list[str]:
    """Folders in which jobs look for their output folder in vain, because it was moved since."""
    return sorted({s.out for s in waiting if s.out and not Path(s.out, "launch").is_dir()})


def queue_of(suite_dir: SuiteDir, console: Console, needed: bool = False) -> list[slurm.Queued] | None:
    """The jobs of an output folder in the queue; says whose they are, and where they look for the folder in vain.

    None, with a line, where the scheduler does not answer and is not needed.
    """
    if not needed and not shutil.which("squeue"):
        return None
    try:
        queue = slurm.queue()
    except UserError as error:
        if needed:
            raise
        say(console, (str(error), "yellow"), "; what follows is from the run folders")
        return None
    earlier = submissions(suite_dir)
    queue = [job for job, _ in own_jobs(earlier, queue)] + hidden_jobs(suite_dir, earlier)
    for user, n in Counter(job.user for job in queue).items():
        if user not in ("", slurm.user_name()):
            say(console, f"{n} job(s) or elements of this suite in the queue are {user}'s")
    for out in moved_from(still_queued(earlier, queue)):
        where = f"jobs in the queue look for this folder at {out}, where it is no more"
        say(console, (where, "yellow"), "; move it back, or `replicate grid cancel` and then `retry`")
    return queue


def own_jobs(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> Iterator[tuple[slurm.Queued, Submission]]:
    """The jobs of an output folder in the queue, links of chains included, each with its submission."""
    by_name = {s.name: s for s in earlier}
    for job in queue:
        submission, link_of = by_name.get(job.name), by_name.get(job.name.removesuffix(f".{job.index}"))
        if submission is not None and submission.job_id in (None, job.id.split("_")[0]):
            yield job, submission
        elif submission is None and link_of is not None:
            yield job, link_of


def jobs_of_cells(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> dict[str, Jobs]:
    """The jobs in the queue for each cell (a folder relative to OUT), by stage; links of chains included."""
    found: dict[str, Jobs] = {}
    for job, submission in own_jobs(earlier, queue):
        if job.index is not None:
            found.setdefault(submission.cells[job.index], {})[submission.stage] = job
    return found


def still_queued(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> list[Submission]:
    """The submissions of which something is in the queue, links of chains included."""
    found = {submission for _, submission in own_jobs(earlier, queue)}
    return [s for s in earlier if s in found]


def hidden_jobs(suite_dir: SuiteDir, earlier: Sequence[Submission]) -> list[slurm.Queued]:
    """Jobs without an end that other users submitted, where the cluster hides those: they may be in the queue."""
    me, found = slurm.user_name(), []
    if all(s.user in ("", me) for s in earlier) or not slurm.hides_others():
        return []
    for cell, stages in last_elements(earlier).items():
        run = RunDir(suite_dir.root / cell)
        over = run.complete.is_file() or (read_notes(run) or [Note()])[-1].event in ("ended", "cancelled")
        for stage, (id, s) in stages.items():
            if s.user != me and not over and not (stage == "train" and is_trained(run)):
                why = f"hidden: this cluster shows only {s.user} what became of job {id}"
                found.append(slurm.Queued(id, int(id.split("_")[1]), s.name, slurm.HIDDEN, why, 0, s.user))
    return found


def adopt_unanswered(earlier: Sequence[Submission], queue: Sequence[slurm.Queued]) -> list[Submission]:
    """Settle submissions whose call of sbatch ended without an answer: by name in the queue, or never taken."""
    ids, settled = {job.name: job.id.split("_")[0] for job in reversed(queue)}, []
    for s in earlier:
        if s.job_id is None and s.name in ids:
            s = replace(s, job_id=ids[s.name])
            write_json(s.folder / "submitted.json", {"id": s.job_id, "found_in_queue": True})
        settled.append(s)
    return settled


@dataclass(frozen=True)
class Left:
    """The latest job of a stage of a cell, once it has left the queue."""

    id: str  # as it was submitted: 123_4
    job: str  # as it went on, where the site chains
    word: str | None  # the scheduler's last, see slurm.history; None where it keeps no accounts
    output: Path  # what its batch shell said before it found the cell's log


def last_elements(earlier: Sequence[Submission]) -> dict[str, dict[JobStage, tuple[str, Submission]]]:
    """For each cell and stage the element (123_4) of the latest array that worked on it."""
    found: dict[str, dict[JobStage, tuple[str, Submission]]] = {}
    for s in earlier:
        for i, cell in enumerate(s.cells):
            if s.job_id is not None:
                found.setdefault(cell, {})[s.stage] = f"{s.job_id}_{i}", s
    return found


def left_of_cells(
    earlier: Sequence[Submission], queued: Collection[str], runs: Mapping[str, RunDir]
) -> dict[str, dict[JobStage, Left]]:
    """The latest jobs of cells that are not complete and have none queued, with the scheduler's word on each."""
    latest: list[tuple[str, JobStage, Left]] = []
    for cell, stages in last_elements(earlier).items():
        if cell not in runs or cell in queued or runs[cell].complete.is_file():
            continue
        notes, ids = read_notes(runs[cell]), {id for id, _ in stages.values()}
        for stage, (id, s) in stages.items():
            output = s.folder / f"output-{id.split('_')[1]}.txt"
            latest.append((cell, stage, Left(id, last_link(id, notes, ids - {id}), None, output)))
    words = slurm.history([left.job for _, _, left in latest])
    found: dict[str, dict[JobStage, Left]] = {}
    for cell, stage, left in latest:
        found.setdefault(cell, {})[stage] = replace(left, word=words.get(left.job))
    return found


def last_link(id: str, notes: Sequence[Note], others: Collection[str]) -> str:
    """The latest job that an element went on as, where a site chains; `others`, the other stage's, do not count."""
    jobs = [note.job for note in notes if note.job]
    links = [job for job in jobs[jobs.index(id) :] if job not in others] if id in jobs else [id]
    return links[-1]
