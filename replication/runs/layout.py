"""The files of an output folder, its cells and their locks; README.md draws the floor plan. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from replication.errors import UserError
from replication.runs.files import HELD, file_sha256, hold_lock, remove_temporaries, remove_tree

STATE = "trainer.ckpt"
WEIGHTS = "weights.pt"
"""Of a checkpoint folder: the consolidated weights by name."""
KEPT = ("step", "tokens", "data_chain", "final_weights_sha256")
"""Fields of the manifest that COMPLETE repeats."""


class _Inside:
    """A file or folder of a folder, as a path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: RunDir | SuiteDir, owner: object = None) -> Path:
        return folder.root / self.name


class _OfSetting(_Inside):
    """One of a cell's completions: where a sampling setting is named, in a folder of its own."""

    def __get__(self, folder: RunDir | SuiteDir, owner: object = None) -> Path:
        assert isinstance(folder, RunDir)
        return (folder.root / "sampled" / folder.setting if folder.setting else folder.root) / self.name


@dataclass(frozen=True)
class RunDir:
    """The files of one cell."""

    root: Path
    setting: str = ""  # of `samples`: "" are the completions that its config asks for; see generation/settings.py

    config = _Inside("config.yaml")
    manifest = _Inside("manifest.json")
    patch = _Inside("code.patch")  # of the latest start, where its code had changes that no commit holds
    metrics = _Inside("metrics.jsonl")
    tensorboard = _Inside("tensorboard")
    checkpoints = _Inside("checkpoints")
    times = _Inside("times.json")  # see processes/preemption.py
    start = _Inside("start.json")  # meeting point of the ranks of the latest start; see training/ranks.py
    samples = _OfSetting("samples.jsonl")
    samples_part = _OfSetting("samples.part")  # folder of completions while they are sampled; see completions.py
    sampling = _OfSetting("sampling.json")  # how those of a named setting were sampled; of the others the manifest says
    evaluation = _Inside("evaluation.json")  # scores on tasks and texts; see evaluation/record.py
    complete = _Inside("COMPLETE")
    failed = _Inside("FAILED")  # present where the last attempt failed; see runs/failures.py
    jobs = _Inside("jobs.jsonl")  # a line for each thing that happened to a SLURM job of the cell, by launch/job.sh
    log = _Inside("log.txt")  # standard output and error of every attempt that the grid started

    def checkpoint_folders(self) -> list[Path]:
        """checkpoints/step-<n>, damaged ones too, by step; a person's copy under another name is none of them."""
        found = [p for p in self.checkpoints.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
        return sorted(found, key=step_of)

    def newest_marked(self) -> Path | None:
        """The newest checkpoint that says it is complete; its files are not checked."""
        return next((f for f in reversed(self.checkpoint_folders()) if (f / "COMPLETE").is_file()), None)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the cell for one process. Raises UserError where another live one holds it."""
        with hold_lock(self.root, "another process is running this cell; wait for it, or end it"):
            remove_temporaries(self.root, held=True)
            yield

    def is_locked(self) -> bool:
        """Whether a live process on a machine that shares these locks holds the cell; an error is no yes."""
        try:
            file = open(self.root / ".lock", "rb")  # noqa: SIM115  (closed below; only flock's answer says a lock is held)
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
    key: Path | None = None  # folder of the sealed key, where it is not sealed/: a custodian's

    suite = _Inside("suite.yaml")
    plan = _Inside("plan.json")  # the frozen analysis plan; see replication.protocol.preregistration
    plan_md = _Inside("plan.md")
    anchor = _Inside("anchor")  # what an outside clock is asked, and answers; see protocol/anchor.py
    ledger = _Inside("ledger.jsonl")  # what was done to the folder, in order; see runs/ledger.py
    plugins = _Inside("plugins")  # copies of the files with gains and scales; see objectives/plugins.py
    data = _Inside("data")
    prompts = _Inside("prompts")  # prompt files that the package does not ship
    runs = _Inside("runs")
    launch = _Inside("launch")  # jobs submitted to SLURM; see grid/submit.py
    tensorboard = _Inside("tensorboard")
    votes = _Inside("votes.csv")  # the vote record; see votes/record.py
    votes_note = _Inside("votes.json")  # the panel's lock on the vote record; see votes/record.py
    judging = _Inside("judging")  # the panel's database, and what is handed to judges
    withdrawn = _Inside("withdrawn.json")  # seeds and judges that enter no statistic; see runs/withdrawn.py
    noise = _Inside("noise.json")  # effect of rounding alone on the loss, as `replicate bench noise` measured it
    certificate = _Inside("certificate.json")
    report_html = _Inside("report.html")
    report_md = _Inside("report.md")
    results = _Inside("results.json")
    figures = _Inside("figures")
    tables = _Inside("tables")  # of `replicate report --tables`

    @property
    def sealed(self) -> Path:
        """Where the key of sides and arms is, which the server neither needs nor reads."""
        return self.key or self.root / "sealed"

    @classmethod
    def of(cls, run: RunDir) -> SuiteDir:
        """The output folder that a cell lies in."""
        return cls(run.root.parent.parent.parent)

    @classmethod
    def around(cls, run: RunDir) -> SuiteDir | None:
        """As `of`; None where a cell lies in no output folder."""
        return cls.of(run) if run.root.parent.parent.name == "runs" else None

    def cell(self, arm: str, seed: int, setting: str = "") -> RunDir:
        return RunDir(self.runs / arm / f"seed-{seed}", setting)

    def data_folder(self, named: str | None) -> Path:
        """The corpus of a cell: the folder that its data.dir names (UserError: it is not there), or our own."""
        if named is None:
            return self.data
        path = Path(named).expanduser()
        if path.is_dir():
            return path
        how = f"prepare it first, with the --config files of this run: `replicate prepare --config ... --out {path}`"
        raise UserError(f"data.dir: {path} does not exist; {how}")

    def inputs_sha256(self, cells: Iterable[RunDir]) -> str:
        """Of what a report is made from, whatever the times of files: suite, plans, anchors, ledger (but for looks,
        which it writes itself), votes, noise, withdrawals; and of each cell: end, manifest, completions, scores."""
        paths = [self.suite, self.plan, self.votes, self.votes_note, self.noise, self.withdrawn]
        paths += sorted([*self.root.glob("plan-*.json"), *self.anchor.glob("*.tsr"), *self.anchor.glob("*.pem")])
        for cell in cells:
            paths += [cell.complete, cell.manifest, cell.evaluation, cell.samples]
            paths += sorted(cell.root.glob("sampled/*/*.json*"))
        parts = [f"{path.relative_to(self.root)} {file_sha256(path)}" for path in paths if path.is_file()]
        ledgers = b"".join(path.read_bytes() for path in sorted(self.root.glob("ledger*.jsonl")))
        kept = b"".join(line for line in ledgers.splitlines() if not line.startswith(b'{"event":"look"'))
        return hashlib.sha256(kept + "\n".join(parts).encode()).hexdigest()

    def cells(self) -> list[tuple[str, int, RunDir]]:
        """(arm, seed, cell) of every folder runs/<arm>/seed-<n>; a person's copy under another name is none of them."""
        return cells_in(self.runs)

    def link_tensorboard(self, arm: str, seed: int) -> str:
        """DIR/tensorboard/<arm>/seed-<n> -> the cell's folder, relative, so that DIR can move.

        A copy that followed links holds a folder there: it is replaced where the cell's own has all of its files.
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
    # neighbours are as far from their place in the order
    groups = groupby(enumerate(sorted(numbers)), key=lambda place_and_n: place_and_n[1] - place_and_n[0])
    runs = [[n for _, n in group] for _, group in groups]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))
