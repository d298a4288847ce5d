"""OUT/ledger.jsonl: a line for each thing that was done to an output folder, each with the hash of the line before it.

A line that was changed, put in or taken out breaks the chain. Whoever may write the folder can write all of it anew, to
which the hashes that manifests, COMPLETE and votes.json have of it are witnesses, and an outside clock is a better one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from replication.console import timestamp
from replication.errors import UserError
from replication.runs.files import hold_lock, naming, sync
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.records import WrongForm, from_json, to_json

Event = Literal["registration", "amendment", "start", "retry", "removal", "complete", "withdrawal",
                "panel", "lock", "look", "extension"]  # fmt: skip
LOCK, LOCK_SECONDS = ".ledger.lock", 120.0  # every cell of a large grid may start at once, on a shared file system


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line."""

    event: Event
    at: str
    cell: str | None = None  # arm/seed-n
    facts: Mapping[str, Any] = field(default_factory=dict)
    before: str = ""  # SHA-256 of the line before; of the first ""


@dataclass(frozen=True)
class Ledger:
    """What a folder's file holds."""

    entries: tuple[Entry, ...] = ()
    hashes: tuple[str, ...] = ()  # SHA-256 of every line, readable or not
    faults: tuple[str, ...] = ()  # where the chain is broken, in words

    @property
    def head(self) -> str:
        """The hash of the last line; "" where there is none."""
        return self.hashes[-1] if self.hashes else ""

    def of(self, *events: Event) -> list[Entry]:
        return [entry for entry in self.entries if entry.event in events]


def append(suite_dir: SuiteDir, event: Event, cell: str | None = None, **facts: Any) -> str:
    """Add a line and bring it to the disk; returns its SHA-256, a witness of all lines up to it.

    Processes on any machine that shares the folder's locks may call it at once; of several ranks the first one calls
    it. A last line that a killed writer tore is cut off. UserError where no lock can be had.
    """
    assert event in get_args(Event), event
    path = suite_dir.ledger
    with hold_lock(suite_dir.root, "other processes write its ledger; run again", LOCK, LOCK_SECONDS), naming(path):
        is_new = not path.exists()
        with open(path, "ab+") as file:  # opened under the lock, when NFS looks anew at what others wrote
            file.seek(0)
            whole, newline, torn = file.read().rpartition(b"\n")
            if torn:
                file.truncate(len(whole + newline))
            before = _sha256(whole.rpartition(b"\n")[2]) if newline else ""
            entry = Entry(event=event, at=timestamp(), cell=cell, facts=facts, before=before)
            line = json.dumps(to_json(entry), separators=(",", ":")).encode()
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(suite_dir.root)
    return _sha256(line)


def append_of_cell(run: RunDir, event: Event, **facts: Any) -> None:
    """`append` of a cell; nothing where it lies in no output folder."""
    if suite_dir := SuiteDir.around(run):
        append(suite_dir, event, f"{run.root.parent.name}/{run.root.name}", **facts)


def read_ledger(suite_dir: SuiteDir) -> Ledger:
    """All lines, in order, and each place where a chain is broken; empty where there is no file.

    Before them come those of ledger-*.jsonl, of copies of the folder that were merged into it: a chain that parts from
    this one where the folder was copied.
    """
    entries, hashes, faults = list[Entry](), list[str](), list[str]()
    for path in (*sorted(suite_dir.root.glob("ledger-*.jsonl")), suite_dir.ledger):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
        known, before, of = {*hashes}, "", "" if path == suite_dir.ledger else f" of {path.name}"
        for n, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows is being written, or was torn
            try:
                entry = from_json(Entry, json.loads(line))
            except (ValueError, RecursionError) as error:
                what = error if isinstance(error, WrongForm) else "no JSON"
                faults.append(f"line {n}{of} cannot be read ({what})")
            else:
                if entry.before != before:
                    faults.append(f"line {n}{of} ({entry.event}, {entry.at}) does not follow from the line before it")
                if _sha256(line) not in known:
                    entries.append(entry)
            hashes.append(before := _sha256(line))
    return Ledger(tuple(entries), tuple(hashes), tuple(faults))


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
