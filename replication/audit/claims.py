"""A claims file: each printed figure, where it stands, and the function that recomputes it; and when two are the same.

Printed figures are kept as text, because their digits are part of the claim. Imports no torch.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replication.config.reading import Layer, build, read_yaml
from replication.errors import UserError

PRINTED = re.compile(
    r"(?P<about>~)?\s*(?P<bound><=|>=|<|>)?\s*(?P<number>[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<unit>%|points)?",
    re.IGNORECASE,
)
BOUNDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
ROUNDING_ROOM = 1e-9  # of half a unit: 46.25 may be printed as 46.2 or 46.3, whichever way ties go
Value = float | int | bool | str
Arguments = dict[str, Any]  # of a function of `recompute`, by name


@dataclass(frozen=True)
class TableRow:
    """A row of a table of claims."""

    printed: tuple[Any, ...]  # one figure a column; null where the paper's cell is empty
    args: Arguments = field(default_factory=dict)
    reading: str | None = None


@dataclass(frozen=True)
class Entry:
    """One figure, or with `rows` a table of them."""

    id: str
    what: str  # in our words
    where: str  # section, table and row, or several places that print the same
    printed: Any = None  # as printed: `59.9 %`, `2.80e-8`, `~0.2`, `< 0.005`, `yes`, or a name; text in quotes
    recompute: str | None = None  # function of `recompute`; None where the files cannot tell
    args: Arguments = field(default_factory=dict)
    why_not: str = ""  # the data that are not published; empty where there is a function
    reading: str = ""  # the figure as which a sentence is read; empty where there is nothing to choose
    columns: dict[str, Arguments] = field(default_factory=dict)
    rows: dict[str, TableRow] | None = None


@dataclass(frozen=True)
class ClaimsFile:
    claims: tuple[Entry, ...]
    files: dict[str, Any]  # role -> file name, or several; see `published.ROLES`
    paper: str = ""
    filters: Any = None  # of no meaning: a place for YAML anchors
    cannot_answer: tuple[str, ...] = ()  # questions that no recomputation of these files settles


@dataclass(frozen=True)
class Claim(Entry):
    """One printed figure: an entry without rows, or a cell of one with."""

    entry: str = ""  # id of the entry of the file; the same for all cells of a table
    place: str = ""  # file and line, for messages

    @property
    def is_sentence(self) -> bool:
        """Whether words are checked, not a printed figure: what is printed is a bound or a truth of our reading."""
        return self.printed in ("yes", "no", "none") or self.printed.startswith(("<", ">"))


@dataclass(frozen=True)
class Claims:
    """A claims file, its tables taken apart."""

    paper: str
    files: Mapping[str, tuple[str, ...]]
    claims: tuple[Claim, ...]
    cannot_answer: tuple[str, ...]


def load_claims(path: Path) -> Claims:
    """Read a claims file; an entry with `rows` is a table and becomes one claim a cell.

    Raises UserError for no such file, no YAML, a key that is unknown, comes twice or holds another type, an id that
    comes twice, or an entry without a function and without the reason why not.
    """
    try:
        layer = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such claims file; name one with --claims") from None
    content = build(ClaimsFile, [layer])
    files = {role: (names,) if isinstance(names, str) else names for role, names in content.files.items()}
    for role, names in files.items():
        if not names or not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise layer.error(f"files.{role}", f"must be a file name or a list of them, not {content.files[role]!r}")
    claims: dict[str, Claim] = {}
    for i, entry in enumerate(content.claims):
        for claim in _expand(entry, f"claims[{i}]", layer):
            if claims.setdefault(claim.id, claim) is not claim:
                raise UserError(f"{claim.place}: id {claim.id} comes twice; give each claim its own")
    return Claims(content.paper or path.stem, files, tuple(claims.values()), content.cannot_answer)


def _expand(entry: Entry, key: str, layer: Layer) -> Iterator[Claim]:
    """The claims of an entry; a cell that is empty in the paper is none."""

    def claim(key: str, printed: Any, **of_cell: Any) -> Claim:
        if not isinstance(printed, str):
            raise layer.error(f"{key}.printed", f"must be text in quotes, which keep its digits, not {printed!r}")
        place = f"{layer.where} line {layer.lines.get(key, 1)}"
        return Claim(**vars(entry) | of_cell | {"printed": printed, "entry": entry.id, "place": place})

    if (entry.recompute is None) == (not entry.why_not):
        raise layer.error(key, f"{entry.id}: give either `recompute`, a function, or `why_not`, what is not published")
    if entry.rows is None:
        yield claim(key, entry.printed)
        return
    for name, row in entry.rows.items():
        at = f"{key}.rows.{name}"
        if len(row.printed) != len(entry.columns):
            raise layer.error(at, f"needs a list `printed` of {len(entry.columns)} figures, one a column")
        for (column, arguments), figure in zip(entry.columns.items(), row.printed, strict=True):
            if figure is not None:
                yield claim(
                    at,
                    figure,
                    id=f"{entry.id}.{name}.{column}",
                    what=f"{entry.what}: {name}, {column}",
                    args={**entry.args, **arguments, **row.args},
                    reading=entry.reading if row.reading is None else row.reading,
                )


def same(printed: str, value: Value, place: str = "") -> bool:
    """Whether a recomputed value, rounded to the printed digits, is what is printed.

    Printed is a number with its digits (`%` and `points` are hundredths; after `~` trailing zeros of a whole number are
    no digits), a number after `<`, `<=`, `>` or `>=`, `yes` or `no`, or a text. A tie may be rounded either way; NaN is
    `none`. Raises UserError, with the place of the claim, where a number was recomputed and what is printed is neither
    a number nor `none`: a slip of the claims file, not of the paper.
    """
    if isinstance(value, (bool, str)) or printed == "none":
        return printed == shown(value, printed)
    match = PRINTED.fullmatch(printed.strip())
    number = float(match["number"].replace(",", "")) if match else math.nan
    if match is None or not math.isfinite(number):
        raise UserError(
            f"{place}: printed {printed!r} is not a number, but one is recomputed; write 12, 1.5 %, 3e-8 or < 5"
        )
    scaled = value * 100 if match["unit"] else value
    if match["bound"]:
        return bool(BOUNDS[match["bound"]](scaled, number))
    mantissa, _, exponent = match["number"].lower().replace(",", "").partition("e")
    decimals = mantissa.partition(".")[2]
    zeros = len(mantissa) - len(mantissa.rstrip("0")) if match["about"] and not decimals else 0
    last_place = 10.0 ** (int(exponent or 0) - len(decimals) + zeros)  # 0.1 for 59.9, 1e-10 for 2.80e-8
    return abs(scaled - number) <= 0.5 * last_place * (1 + ROUNDING_ROOM)


def shown(value: Value, printed: str) -> str:
    """A recomputed value as the paper would print it, with two digits more than it prints."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    match = PRINTED.fullmatch(printed.strip())
    if math.isnan(value):
        return "none"
    if match is None:
        return f"{value:.4g}"
    scaled = value * 100 if match["unit"] else value
    unit = f" {match['unit']}" if match["unit"] else ""
    mantissa, _, exponent = match["number"].lower().partition("e")
    digits = len(mantissa.partition(".")[2]) + 2
    if exponent:
        return re.sub(r"e([+-])0*", r"e\1", f"{scaled:.{digits}e}").replace("e+", "e") + unit
    if float(scaled).is_integer() and digits == 2:
        return f"{round(scaled):,}{unit}"
    sign = "+" if mantissa.startswith("+") else ""
    return f"{scaled:{sign},.{digits}f}{unit}"
