"""A claims file: each printed figure, where it stands, and the function that recomputes it; and when two are the same.

Printed figures are kept as text, because their digits are part of the claim. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replication.audit.recompute import Value
from replication.config.reading import read_yaml, untyped
from replication.errors import UserError

PRINTED = re.compile(
    r"(?P<about>~)?\s*(?P<bound><=|>=|<|>)?\s*(?P<number>[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<unit>%|points)?",
    re.IGNORECASE,
)
ROUNDING_ROOM = 1e-9  # of half a unit: 46.25 may be printed as 46.2 or 46.3, whichever way ties go


@dataclass(frozen=True)
class Claim:
    """One printed figure."""

    id: str
    entry: str
    """Id of the entry of the file; the same for all cells of a table."""
    what: str
    """In our words."""
    where: str
    """Section, table and row, or several places that print the same."""
    printed: str
    """As printed: `59.9 %`, `2.80e-8`, `~0.2`, `< 0.005`, `yes`, or a name."""
    function: str | None
    """Of `recompute`; None where the files cannot tell."""
    arguments: Mapping[str, Any]
    why_not: str
    """What is not published; empty where there is a function."""
    reading: str
    """How a sentence is read as a figure; empty where there is nothing to choose."""

    @property
    def is_sentence(self) -> bool:
        """Whether words are checked, not a printed figure: what is printed is a bound or a truth of our reading."""
        return self.printed in ("yes", "no", "none") or self.printed.startswith(("<", ">"))


@dataclass(frozen=True)
class Claims:
    """A claims file."""

    path: Path
    paper: str
    files: Mapping[str, Any]
    """Role -> file name, see `published.ROLES`."""
    claims: tuple[Claim, ...]
    cannot_answer: tuple[str, ...] = field(default=())
    """Questions that no recomputation of these files settles."""


KEYS = {"id", "what", "where", "printed", "recompute", "args", "why_not", "reading", "columns", "rows"}
TEXTS = ("id", "what", "where", "recompute", "why_not", "reading")
ROW = {"args", "printed", "reading"}
TOP = {"paper", "files", "filters", "claims", "cannot_answer"}
FORM = "see configs/claims for the form"


def load_claims(path: Path) -> Claims:
    """Read a claims file; an entry with `rows` is a table and becomes one claim a cell.

    Raises:
        UserError: no such file, no YAML, a key that is unknown, comes twice or holds another type, an id that comes
            twice, or an entry without a function and without the reason why not.
    """
    content = _read(path)
    _check_top(content, path)
    claims = tuple(claim for i, entry in enumerate(content["claims"]) for claim in _expand(entry, f"{path}: [{i}]"))
    seen: set[str] = set()
    for claim in claims:
        if claim.id in seen:
            raise UserError(f"{path}: id {claim.id} comes twice; give each claim its own")
        seen.add(claim.id)
    listed = tuple(content.get("cannot_answer", ()))
    return Claims(path, content.get("paper", path.stem), content["files"], claims, listed)


def _read(path: Path) -> Any:
    try:
        return untyped(read_yaml(path).tree)
    except FileNotFoundError:
        raise UserError(f"{path}: no such claims file; name one with --claims") from None


def _check_top(content: Any, path: Path) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("claims"), list):
        raise UserError(f"{path}: key claims must be a list; {FORM}")
    _refuse_unknown(content, TOP, str(path))
    files = content.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{path}: key files must map roles to file names; {FORM}")
    for role, names in files.items():
        if not (isinstance(names, str) or (_is_texts(names) and names)):
            raise UserError(f"{path}: files.{role} must be a file name or a list of them, not {names!r}; {FORM}")
    if not isinstance(content.get("paper", ""), str):
        raise UserError(f"{path}: key paper must be text, not {content['paper']!r}; {FORM}")
    if not _is_texts(content.get("cannot_answer", [])):
        raise UserError(f"{path}: key cannot_answer must be a list of texts; leave it out where there is none")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _refuse_unknown(entry: Mapping[Any, Any], keys: set[str], place: str) -> None:
    unknown = sorted(set(entry) - keys, key=str)
    if unknown:
        raise UserError(f"{place}: unknown key {unknown[0]}; the keys are {', '.join(sorted(keys))}")


def _mapping(entry: Mapping[str, Any], key: str, place: str) -> dict[str, Any]:
    """A mapping of an entry; empty where the key is absent or has no value."""
    value = entry.get(key)
    if not isinstance(value, dict | None):
        raise UserError(f"{place}: {key} must be a mapping of names, not {value!r}; {FORM}")
    return value or {}


def _expand(entry: Any, place: str) -> Iterator[Claim]:
    if not isinstance(entry, dict) or not {"id", "what", "where"} <= set(entry):
        raise UserError(f"{place}: a claim needs the keys id, what, where, printed, recompute")
    for key in TEXTS:
        if key in entry and not isinstance(entry[key], str):
            raise UserError(f"{place}: {key} must be text, not {entry[key]!r}; {FORM}")
    place = f"{place[: place.rindex('[')]}{entry['id']}"
    _refuse_unknown(entry, KEYS, place)
    if "rows" in entry:
        yield from _cells(entry, place)
    else:
        yield _claim(entry, entry["id"], place)


def _cells(entry: Mapping[str, Any], place: str) -> Iterator[Claim]:
    """The claims of a table; a cell that is empty in the paper is none."""
    columns, common = _mapping(entry, "columns", place), _mapping(entry, "args", place)
    for row, cells in _mapping(entry, "rows", place).items():
        printed = cells.get("printed") if isinstance(cells, dict) else None
        if not isinstance(printed, list) or len(printed) != len(columns):
            raise UserError(f"{place}: row {row} needs a list `printed` of {len(columns)} figures, one a column")
        at = f"{place}.{row}"
        _refuse_unknown(cells, ROW, at)
        if not isinstance(cells.get("reading", ""), str):
            raise UserError(f"{at}: reading must be text, not {cells['reading']!r}; {FORM}")
        for column, figure in zip(columns, printed, strict=True):
            if figure is None:
                continue
            merged = {**common, **_mapping(columns, column, f"{place}: columns"), **_mapping(cells, "args", at)}
            names = {"id": f"{entry['id']}.{row}.{column}", "what": f"{entry['what']}: {row}, {column}"}
            own = {key: cells[key] for key in ("reading",) if key in cells}
            yield _claim({**entry, **own, **names, "printed": figure, "args": merged}, entry["id"], place)


def _claim(entry: Mapping[str, Any], parent: str, place: str) -> Claim:
    function, why_not = entry.get("recompute"), entry.get("why_not", "")
    if (function is None) == (not why_not):
        raise UserError(f"{place}: give either `recompute`, a function, or `why_not`, what is not published")
    if not isinstance(entry.get("printed"), str):
        raise UserError(
            f"{place}: printed must be text in quotes, which keeps its digits, not {entry.get('printed')!r}"
        )
    return Claim(
        id=entry["id"],
        entry=parent,
        what=entry["what"],
        where=entry["where"],
        printed=entry["printed"],
        function=function,
        arguments=_mapping(entry, "args", place),
        why_not=why_not,
        reading=entry.get("reading", ""),
    )


# ---------------------------------------------------------------- printed and recomputed


def same(printed: str, value: Value) -> bool:
    """Whether a recomputed value, rounded to the printed digits, is what is printed.

    Args:
        printed: a number with its digits (`%` and `points` are hundredths; after `~` trailing zeros of a whole number
            are no digits), a number after `<`, `<=`, `>` or `>=`, `yes` or `no`, or a text.
        value: what was recomputed. A tie may be rounded either way; NaN is `none`.
    """
    if isinstance(value, (bool, str)) or math.isnan(value):
        return printed == shown(value, printed)
    match = PRINTED.fullmatch(printed.strip())
    if match is None:
        return False
    scaled, number = value * _times(match), float(match["number"].replace(",", ""))
    bounds = {"<": scaled < number, "<=": scaled <= number, ">": scaled > number, ">=": scaled >= number}
    if match["bound"]:
        return bounds[match["bound"]]
    return abs(scaled - number) <= 0.5 * unit_in_last_place(match) * (1 + ROUNDING_ROOM)


def check_number(printed: str, value: Value, place: str) -> None:
    """Refuse a printed text that no number can be compared with: a slip of the claims file, not of the paper.

    Raises:
        UserError: a number was recomputed, and what is printed is neither a number nor `none`.
    """
    if isinstance(value, (bool, str)) or printed == "none":
        return
    match = PRINTED.fullmatch(printed.strip())
    if match is None or not math.isfinite(float(match["number"].replace(",", ""))):
        raise UserError(
            f"{place}: printed {printed!r} is no number, but one is recomputed; write 12, 1.5 %, 3e-8 or < 5"
        )


def unit_in_last_place(match: re.Match[str]) -> float:
    """What one step of the last printed digit is worth: 0.1 for 59.9, 1e-10 for 2.80e-8."""
    mantissa, _, exponent = match["number"].lower().replace(",", "").partition("e")
    _, _, decimals = mantissa.partition(".")
    zeros = len(mantissa) - len(mantissa.rstrip("0")) if match["about"] and not decimals else 0
    return 10.0 ** (int(exponent or 0) - len(decimals) + zeros)


def _times(match: re.Match[str]) -> int:
    return 100 if match["unit"] else 1


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
    scaled = value * _times(match)
    unit = f" {match['unit']}" if match["unit"] else ""
    mantissa, _, exponent = match["number"].lower().partition("e")
    digits = len(mantissa.partition(".")[2]) + 2
    if exponent:
        return re.sub(r"e([+-])0*", r"e\1", f"{scaled:.{digits}e}").replace("e+", "e") + unit
    if float(scaled).is_integer() and digits == 2:
        return f"{round(scaled):,}{unit}"
    sign = "+" if mantissa.startswith("+") else ""
    return f"{scaled:{sign},.{digits}f}{unit}"
