"""Records in JSON files as frozen dataclasses: one writer, and one reader that checks their form once.

By hand, because `replicate grid status` must answer at once, and pydantic alone takes 0.1 s to load.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from replication.errors import UserError
from replication.runs.files import read_json, write_json

T = TypeVar("T")
SCALARS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_NOTHING = object()


class WrongForm(ValueError):
    """A value of another form than its field's; says key and form."""


def to_json(record: Any) -> Any:
    """Plain dicts and lists, in field order."""
    if dataclasses.is_dataclass(record):
        return {field.name: to_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, Sequence) and not isinstance(record, str):
        return [to_json(value) for value in record]
    return record


def write_record(path: Path, record: Any) -> None:
    write_json(path, to_json(record))


def read_record(path: Path, cls: type[T]) -> T | None:
    """The record in a JSON file, strictly; None: no file. UserError, with key and remedy: damage, or another form."""
    value = read_json(path)
    try:
        return None if value is None else from_json(cls, value)
    except WrongForm as error:
        raise UserError(f"{path}: {error}; restore it, or remove it and run again") from None


def from_json(cls: type[T], value: Any, lenient: bool = False) -> T:
    """A dataclass from parsed JSON: scalars, None, Literal, tuples, dicts and dataclasses, also nested.

    Keys that it lacks are passed over. If lenient, what has a wrong form counts as missing: a field has its default, a
    list lacks the entry. WrongForm: no object, no value of a field without a default, or, if not lenient, a wrong form.
    """
    return typing.cast(T, _read(cls, value, "", lenient))


def _read(hint: Any, value: Any, key: str, lenient: bool) -> Any:
    """A value, checked against the type hint of its field; `key` is its dotted name."""
    origin, arguments = _parts(hint)
    if origin in (typing.Union, types.UnionType):
        (form,) = arguments  # of X | None the X
        return None if value is None else _read(form, value, key, lenient)
    if hint in SCALARS:
        if type(value) is int and hint in (int, float) and abs(value) < 2**63:
            return hint(value)
        if type(value) is hint and hint is not int and (hint is not float or math.isfinite(value)):
            return value
        form = f"be {SCALARS[hint]}"
    elif origin is Literal:
        if value in arguments:
            return value
        form = f"be one of {', '.join(map(str, arguments))}"
    elif origin in (tuple, list, Sequence):
        if isinstance(value, list):
            entries = [_entry(arguments[0], entry, f"{key}[{i}]", lenient) for i, entry in enumerate(value)]
            return (list if origin is list else tuple)(entry for entry in entries if entry is not _NOTHING)
        form = "be a list"
    elif origin in (dict, Mapping):
        if isinstance(value, dict):
            named = {name: _entry(arguments[1], entry, f"{key}.{name}", lenient) for name, entry in value.items()}
            return {name: entry for name, entry in named.items() if entry is not _NOTHING}
        form = "have keys of its own"
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _record(hint, value, key, lenient)
        form = "have keys of its own"
    elif hint in (Any, object):
        return value
    else:
        raise TypeError(f"{hint}: no form of JSON")
    raise WrongForm(f"{key} must {form}, not {str(value)[:60]!r}" if key else "holds no JSON object")


def _record(cls: Any, value: Mapping[str, Any], key: str, lenient: bool) -> Any:
    found = {}
    for name, hint, required in _fields(cls):
        inner = f"{key}.{name}" if key else name
        entry = _entry(hint, value[name], inner, lenient) if name in value else _NOTHING
        if entry is not _NOTHING:
            found[name] = entry
        elif required:
            raise WrongForm(f"{inner} is missing")
    return cls(**found)


def _entry(hint: Any, value: Any, key: str, lenient: bool) -> Any:
    try:
        return _read(hint, value, key, lenient)
    except WrongForm:
        if not lenient:
            raise
        return _NOTHING


@functools.cache
def _parts(hint: Any) -> tuple[Any, Sequence[Any]]:
    """Origin and arguments of a type hint, without None."""
    return typing.get_origin(hint), [a for a in typing.get_args(hint) if a is not types.NoneType]


@functools.cache
def _fields(cls: Any) -> list[tuple[str, Any, bool]]:
    """(name, type hint, whether it has no default)."""
    hints, missing = typing.get_type_hints(cls), dataclasses.MISSING
    return [
        (field.name, hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(cls)
        if field.init
    ]
