"""Whether the records of a folder agree with one another: journals, event files, clocks, the ledger, the plan.

A part of deviations.py. Every record can be edited by whoever may write the folder; to edit one is to be found out by
the others. What lacks the record, as older folders do, contradicts nothing. Reads files, writes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from replication.errors import UserError
from replication.protocol.certificate import unlike_complete
from replication.protocol.preregistration import Preregistration
from replication.runs.events import Events, read_events
from replication.runs.files import file_sha256
from replication.runs.journal import read_journal
from replication.runs.layout import SuiteDir, name_cells
from replication.runs.ledger import Ledger, read_ledger
from replication.runs.manifest import PlanStamp
from replication.runs.starts import LoggedCell, lasting_starts, removed_cells
from replication.runs.withdrawn import read_withdrawals

BESIDE = "; where copies of the folder were merged, the other's belongs beside it as ledger-2.jsonl"
CLOCK_SECONDS = 300.0  # by which clocks of two machines may differ


@dataclass(frozen=True)
class Contradictions:
    """A line each."""

    withholding: tuple[str, ...]  # no verdict is given beside these
    told: tuple[str, ...]  # beside these it is
    began: tuple[float, ...] = ()  # clocks of the cells' first logged lines, or of their starts

    @property
    def lines(self) -> tuple[str, ...]:
        return (*self.withholding, *self.told)


def grouped(faults: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each fault, with the names of all cells that have it."""
    cells: dict[str, list[str]] = {}
    for fault, name in faults:
        cells.setdefault(fault, []).append(name)
    return [f"{fault}: {name_cells(names)}" for fault, names in cells.items()]


def contradictions(
    suite_dir: SuiteDir, cells: Mapping[str, LoggedCell], record: Preregistration | None
) -> Contradictions:
    """Of a folder with the cells that have logged a step, by arm/seed-n, and its plan, where it has one."""
    try:
        ledger = read_ledger(suite_dir)
    except UserError as error:
        ledger = Ledger(faults=(str(error),))
    events = {name: read_events(cell.run) for name, cell in cells.items()}
    withholding = grouped((fault, name) for name, cell in cells.items() for fault in _of_records(cell, events[name]))
    withholding += [*_of_ledger(suite_dir, ledger, cells, record), *grouped(_of_cells(ledger, cells))]
    removed = list(removed_cells(suite_dir, ledger))
    withholding += grouped((fault, name) for fault, name, had_result in removed if had_result)
    told = grouped((fault, name) for fault, name, had_result in removed if not had_result)
    if (panels := ledger.of("panel"))[1:]:
        told.append(f"{len(panels)} panels were prepared, one after another: the votes are of one of them")
    began = (_began(cell, events[name]) for name, cell in cells.items())
    return Contradictions(tuple(withholding), tuple(told), tuple(began))


def _began(cell: LoggedCell, events: Events) -> float:
    """Clock of a cell's first logged line; without event files of its first start, and 0 where that is not known."""
    if events.began is not None:
        return events.began
    try:
        return datetime.fromisoformat(str(cell.manifest.started_at)).timestamp()
    except ValueError:
        return 0.0


def _of_records(cell: LoggedCell, events: Events) -> Iterator[str]:
    """Of a cell's journal beside COMPLETE and the event files, at each step that both have; and of its clocks."""
    if cell.run.complete.is_file():
        yield from unlike_complete(cell.run, cell.manifest)
    logged = dict[tuple[str, int], float | None]()
    with suppress(UserError):  # a journal that cannot be read is the certificate's to name
        lines = read_journal(cell.run.metrics) if events.losses else []
        logged = {(tag, line.step): line.number(tag) for line in lines for tag in line.values if "loss" in tag}
    unlike: dict[str, list[int]] = {}
    for (tag, step), there in events.losses.items():
        here = logged.get((tag, step), there[-1])  # a start that died may have logged a step that no later one did
        if np.isfinite(there).all() if here is None else all(np.float32(here) != np.float32(x) for x in there):
            unlike.setdefault(tag, []).append(step)
    for tag, steps in unlike.items():
        more = f" and {len(steps) - 1} more" if steps[1:] else ""
        yield f"metrics.jsonl has another {tag} than TensorBoard's event files, at step {min(steps)}{more}"
    stamps = [(start.at, start.plan) for start in cell.manifest.starts]
    if events.began is not None:
        stamps.append((datetime.fromtimestamp(events.began).astimezone().isoformat(), cell.manifest.plan))
    if any(_is_later(stamp, at) for at, stamp in stamps):
        yield "cells that began before the plan that they carry was registered, by their own clocks"


def _is_later(stamp: PlanStamp | None, at: str | None) -> bool:
    """Whether a plan was registered later than at a time, by more than clocks differ; a time that is none is not."""
    try:
        frozen, began = (datetime.fromisoformat(time or "") for time in (stamp and stamp.frozen_at, at))
        return (frozen - began).total_seconds() > CLOCK_SECONDS
    except (ValueError, TypeError):
        return False


def _of_ledger(
    suite_dir: SuiteDir, ledger: Ledger, cells: Mapping[str, LoggedCell], record: Preregistration | None
) -> Iterator[str]:
    """Where the chain is broken, and where plan, votes and withdrawals are not those that it has."""
    witnesses = {name: {s.ledger for s in c.manifest.all_starts if s.ledger is not None} for name, c in cells.items()}
    if not ledger.hashes and not ledger.faults:
        if recorded := [name for name, hashes in witnesses.items() if hashes]:
            yield f"ledger.jsonl is gone, which has the starts of these cells: {name_cells(recorded)}"
        return
    yield from (f"the chain of ledger.jsonl is broken: {fault}" for fault in ledger.faults)
    if lacking := [name for name, hashes in witnesses.items() if not hashes <= {*ledger.hashes, ""}]:
        yield f"ledger.jsonl is not the one that these cells began under: {name_cells(lacking)}{BESIDE}"
    plans = {e.facts.get("sha256"): e.facts.get("frozen_at") for e in ledger.of("registration", "amendment")}
    if record is not None and plans:
        if record.sha256 not in plans:
            yield f"plan.json {record.sha256[:16]} is in no line of ledger.jsonl, which has other plans"
        elif plans[record.sha256] != record.frozen_at:
            yield f"plan.json says it was registered at {record.frozen_at}, ledger.jsonl at {plans[record.sha256]}"
    locks = ledger.of("lock")
    if locks and suite_dir.votes.is_file() and locks[-1].facts.get("votes_sha256") != file_sha256(suite_dir.votes):
        yield "votes.csv is not the file that the lock wrote, by ledger.jsonl"
    withdrawn = {(entry.kind, entry.name) for entry in read_withdrawals(suite_dir).entries}
    for entry in ledger.of("withdrawal"):
        if (entry.facts.get("kind"), entry.facts.get("name")) not in withdrawn:
            what = f"{entry.facts.get('kind')} {entry.facts.get('name')}"
            yield f"{what} was withdrawn at {entry.at}, by ledger.jsonl, and withdrawn.json has that no more"


def _of_cells(ledger: Ledger, cells: Mapping[str, LoggedCell]) -> Iterator[tuple[str, str]]:
    """(fault, name) of complete cells that are not as the ledger has them."""
    registered = dict[object, int]()  # plan's hash -> its first line
    for i, entry in enumerate(ledger.entries):
        if entry.event in ("registration", "amendment"):
            registered.setdefault(entry.facts.get("sha256"), i)
    for name, cell in cells.items():
        if not cell.run.complete.is_file():
            continue
        own = [(i, entry) for i, entry in enumerate(ledger.entries) if entry.cell == name]
        starts = {entry.facts.get("started_at"): i for i, entry in own if entry.event == "start"}
        lasting = [start for start in lasting_starts(cell.manifest) if start.ledger is not None]
        if ledger.entries and any(start.at not in starts for start in lasting):
            yield f"ledger.jsonl lacks a start of a cell{BESIDE}", name
        if any(starts.get(s.at, 0) < registered.get(s.plan.sha256, 0) for s in lasting if s.plan and s.at in starts):
            yield "cells that started before the plan that they carry was registered, by ledger.jsonl", name
        ends = [entry.facts.get("journal_sha256") for _, entry in own if entry.event == "complete"]
        if ends and cell.run.metrics.is_file() and ends[-1] != file_sha256(cell.run.metrics):
            yield "metrics.jsonl is not the file that was complete, by ledger.jsonl", name
        if any(entry.event == "retry" and entry.facts.get("diverged") for _, entry in own):
            yield "cells that diverged, and were tried again until they did not", name
