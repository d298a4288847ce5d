"""OUT/withdrawn.json: seeds and judges that are kept and listed, and enter no statistic, each with the reason given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from replication.console import timestamp
from replication.errors import UserError
from replication.runs.layout import SuiteDir
from replication.runs.ledger import append
from replication.runs.records import read_record, write_record

Kind = Literal["seed", "judge"]


@dataclass(frozen=True)
class Withdrawal:
    kind: Kind
    name: str
    why: str
    at: str

    def __str__(self) -> str:
        return f"withdrawn at {self.at}: {self.why}"


@dataclass(frozen=True)
class Withdrawals:
    entries: tuple[Withdrawal, ...] = ()

    def of(self, kind: Kind) -> dict[str, Withdrawal]:
        """By name."""
        return {entry.name: entry for entry in self.entries if entry.kind == kind}


def read_withdrawals(suite_dir: SuiteDir) -> Withdrawals:
    """Those of a folder; UserError where the file is damaged."""
    return read_record(suite_dir.withdrawn, Withdrawals) or Withdrawals()


def withdraw(suite_dir: SuiteDir, kind: Kind, name: str, why: str) -> None:
    """Add one, for good: a withdrawal that could be taken back would let results choose the data.

    Raises UserError where it is withdrawn already, or no reason is given.
    """
    there, why = read_withdrawals(suite_dir), " ".join(why.split())
    if not why:
        raise UserError("--why: is empty; the report quotes the reason, so give one")
    if name in there.of(kind):
        raise UserError(f"{suite_dir.withdrawn}: {kind} {name} is {there.of(kind)[name]}")
    append(suite_dir, "withdrawal", kind=kind, name=name, why=why)
    write_record(suite_dir.withdrawn, Withdrawals((*there.entries, Withdrawal(kind, name, why, timestamp()))))
