"""Results of a bench: one typed record each, written as one JSON object and shown as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rich.table import Column, Table

from replication.config import RunConfig, to_dict
from replication.console import table


def plain(value: object) -> Any:
    """JSON of a record: its fields, then the properties that its class names in `figures`; a config as its YAML."""
    if isinstance(value, RunConfig):
        return to_dict(value)
    if dataclasses.is_dataclass(value):
        names = [*(f.name for f in dataclasses.fields(value)), *getattr(value, "figures", ())]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class Result:
    """Findings of one bench; a subclass is a frozen dataclass."""

    bench: ClassVar[str]
    figures: ClassVar[Sequence[str]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The file that --out names."""
        return {"bench": self.bench, **plain(self)}

    def tables(self) -> list[Table]:
        """The result on a terminal of 80 columns."""
        raise NotImplementedError


def facts(title: str, rows: Mapping[str, object]) -> Table:
    """A table of names and what is to be said of them."""
    return table(title, [Column(no_wrap=True), Column(overflow="fold")], list(rows.items()), header=False)
