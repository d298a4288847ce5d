"""Run folders as plain arrays. Missing is missing: what a journal lacks, or holds as null, is NaN here, never 0."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from types import NoneType

import numpy as np
from numpy.typing import NDArray

from replication.config import flatten
from replication.config.reading import read_yaml, untyped
from replication.errors import UserError
from replication.evaluation.battery import battery
from replication.evaluation.record import Part, read_parts
from replication.runs.failures import Failure, read_failure
from replication.runs.files import number, parse_objects
from replication.runs.journal import Line, Logged, logged_steps, read_journal
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import Manifest, find_manifest
from replication.runs.records import WrongForm, from_json

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NAN = float("nan")
NOT_READ = ("experts/",)
"""Of a line, what is no column here. The loads of experts are half of it, and for TensorBoard."""
MANY_CELLS, MOST_READERS = 32, 4
"""From so many cells on, journals are read by so many processes, unless the caller asks for fewer."""


@dataclass(frozen=True, eq=False)
class Series:
    """Scalars of one kind of journal line, merged by step, of which there are T."""

    steps: Ints
    """[T], ascending."""
    columns: dict[str, Floats]
    """Tag -> [T]; NaN where a line lacks the tag."""

    def column(self, tag: str) -> Floats:
        """[T]; all NaN for a tag that was never logged."""
        return self.columns.get(tag, np.full(len(self.steps), NAN))

    def last(self, tag: str) -> float:
        """The value at the last step; NaN where there is none."""
        values = self.column(tag)
        return float(values[-1]) if len(values) else NAN

    def tags(self, prefix: str) -> list[str]:
        return sorted(tag for tag in self.columns if tag.startswith(prefix))


@dataclass(frozen=True)
class Sample:
    """One completion, in whatever form its line has."""

    completion: str
    prompt_id: object = None
    category: object = None
    question: object = ""
    sample: object = 0
    tokens: int | None = None
    stopped: bool | None = None

    @property
    def text(self) -> str:
        return self.completion


@dataclass(frozen=True, eq=False)
class CellData:
    """One arm at one seed, in whatever state it is."""

    arm: str
    seed: int
    state: str
    """complete, running, failed, interrupted or pending."""
    failure: Failure | None
    step: int
    """Last optimizer step that the journal or the manifest knows of; 0 before the first."""
    tokens: float
    """Predicted tokens consumed up to then; NaN where unknown."""
    wall_seconds: float
    """Training time up to then; NaN where unknown."""
    manifest: Manifest | None
    """None where it is missing or damaged."""
    config: dict[str, object]
    """Dotted keys of config.yaml; empty where there is none."""
    train: Series
    validation: Series
    sequence_losses: Floats
    """[T, Q] of the validations: each sequence's part of val/loss_nats; Q is 0 where none has them."""
    per_step: dict[str, Floats]
    """Tag -> a value for every optimizer step; entry k is step k + 1, NaN where the journal has none."""
    samples: tuple[Sample, ...]
    """In file order."""
    completions: Mapping[str, float | None]
    """What evaluation.battery counts in them."""
    logged: Logged
    """What the certificate checks at every logged step."""
    evaluation: tuple[Part, ...] = ()
    """Scores of the weights and completions that the cell has now."""
    pooled: bool = True
    """Whether means over seeds may take it in: not, where its data or config are not those of the other seeds."""

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def complete(self) -> bool:
        return self.state == "complete"


def load_cells(
    suite_dir: SuiteDir, arms: Sequence[str], seeds: Sequence[int], readers: int = MOST_READERS
) -> list[CellData]:
    """Every cell of arms x seeds, seed by seed, those without a folder too. Unreadable files count as missing."""
    places = [(suite_dir.cell(arm, seed), arm, seed) for seed in seeds for arm in arms]
    if len(places) < MANY_CELLS or readers < 2:
        return [load_cell_files(*place) for place in places]
    context = get_context("forkserver")  # a fork of a process that holds threads may hang
    with ProcessPoolExecutor(min(readers, os.cpu_count() or 1), context) as pool:
        return list(pool.map(load_cell_files, *zip(*places, strict=True), chunksize=4))


def load_cell_files(run: RunDir, arm: str, seed: int) -> CellData:
    """Read the files of one cell; the names come from the caller, not from the files."""
    try:
        lines = read_journal(run.metrics)
    except (OSError, ValueError):  # such as a file of bytes that are no text
        lines = []
    try:
        config = untyped(read_yaml(run.config).tree)
    except (OSError, UserError):
        config = None
    try:
        scored = read_parts(run)
    except UserError:
        scored = {}
    training = [line for line in lines if line.is_training]
    validations = [
        line
        for line in lines
        if "val/loss_nats" in line.values
        or (not line.is_training and any(tag.startswith("val/") for tag in line.values))
    ]
    samples = tuple(samples_of(run))
    last, manifest = training[-1] if training else None, find_manifest(run)
    ended, keys = manifest or Manifest(), flatten(config) if isinstance(config, dict) else {}
    every = keys.get("validation.every_steps")
    # at the end that a cell had before it was extended: no other cell of its steps has it in its late mean
    extra = {e.from_steps for e in ended.extensions if isinstance(every, int) and e.from_steps % every}
    validations = [line for line in validations if line.step not in extra]
    return CellData(
        arm=arm,
        seed=seed,
        state=run.state(),
        # a FAILED file that a later, complete attempt left behind is not a failure any more
        failure=None if run.complete.is_file() else read_failure(run),
        step=last.step if last else ended.step or 0,
        tokens=_number(last.values.get("tokens") if last else ended.tokens),
        wall_seconds=_number(last.values.get("wall_seconds", ended.wall_seconds) if last else ended.wall_seconds),
        manifest=manifest,
        config=keys,
        train=_series(training),
        validation=_series(validations, "val/"),
        sequence_losses=_sequence_losses(validations),
        per_step=_per_step(training),
        samples=samples,
        completions=battery(samples) if samples else {},
        logged=logged_steps(lines),
        evaluation=tuple(part for part in scored.values() if part.is_current(ended)),
    )


def _number(value: object) -> float:
    found = number(value)
    return NAN if found is None else found


def _numbers(values: Sequence[object]) -> Floats:
    if set(map(type, values)) <= {float, NoneType}:
        return np.array(values, dtype=np.float64)
    return np.array([_number(value) for value in values], dtype=np.float64)


def _series(lines: Sequence[Line], prefix: str = "") -> Series:
    """Lines merged by step (a later line wins) into columns; one without any number is left out."""
    by_step: dict[int, Mapping[str, object]] = {}
    for line in lines:
        by_step[line.step] = {**by_step[line.step], **line.values} if line.step in by_step else line.values
    merged = [by_step[step] for step in sorted(by_step)]
    seen: set[str] = set().union(*merged)
    tags = sorted(tag for tag in seen if tag.startswith(prefix) and not tag.startswith(NOT_READ))
    columns = {tag: _numbers([values.get(tag) for values in merged]) for tag in tags}
    kept = {tag: values for tag, values in columns.items() if not np.isnan(values).all()}
    return Series(np.array(sorted(by_step), dtype=np.int64), kept)


def _sequence_losses(lines: Sequence[Line]) -> Floats:
    """[T, Q] in the order of the validations' steps; NaN where one has no losses, or of another number of sequences."""
    by_step = {line.step: line.per_sequence for line in lines}
    size = len(by_step[max(by_step)]) if by_step else 0
    rows = [_numbers(by_step[step]) for step in sorted(by_step)]
    return np.array([row if len(row) == size else np.full(size, NAN) for row in rows]).reshape(len(rows), size)


def _per_step(lines: Sequence[Line]) -> dict[str, Floats]:
    """The lists of every line end to end: a line's last entry belongs to the line's own step."""
    n_steps = max((line.step for line in lines), default=0)
    arrays: dict[str, Floats] = {}
    for line in lines:
        for tag, values in line.per_step.items():
            array = arrays.setdefault(tag, np.full(n_steps, NAN))
            row = _numbers(values)[-line.step :] if line.step else np.empty(0)
            array[line.step - len(row) : line.step] = row
    return arrays


def samples_of(run: RunDir) -> Iterator[Sample]:
    """The completions of a cell that can be read."""
    with suppress(OSError):
        for line in parse_objects(run.samples.read_bytes()):
            with suppress(WrongForm):  # such as a line without a completion
                yield from_json(Sample, line)
