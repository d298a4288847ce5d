"""Records in JSON files as frozen dataclasses: one writer, and one reader that checks their form once.

By hand, because `replicate grid status` must answer at once, and pydantic alone takes 0.1 s to load.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from replication.errors import UserError
from replication.runs.files import read_json, write_json

T = TypeVar("T")
Reader = Callable[[Any, str, bool], Any]
"""(value, its dotted key, lenient) -> the typed value."""
SCALARS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class WrongForm(ValueError):
    """A value of another form than its field's; says key and form."""


def from_json(cls: type[T], value: Any, lenient: bool = False) -> T:
    """A dataclass from parsed JSON: scalars, None, Literal, tuples, dicts and dataclasses, also nested.

    Args:
        cls: the dataclass. Keys that it lacks are passed over.
        value: the parsed JSON.
        lenient: whether what has a wrong form counts as missing: a field has its default, a list lacks the entry.

    Raises:
        WrongForm: no object, or a field without a default is missing; if not lenient, a value of a wrong form.
    """
    return typing.cast(T, _record(cls, value, "", lenient))


def to_json(record: Any) -> Any:
    """Plain dicts and lists, in field order."""
    if dataclasses.is_dataclass(record):
        return {field.name: to_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, Sequence) and not isinstance(record, str):
        return [to_json(value) for value in record]
    return record


def read_record(path: Path, cls: type[T]) -> T | None:
    """The record in a JSON file, strictly; None where there is no file.

    Raises:
        UserError: the file is damaged, or holds a record of another form; names file, key and remedy.
    """
    value = read_json(path)
    try:
        return None if value is None else from_json(cls, value)
    except WrongForm as error:
        raise UserError(f"{path}: {error}; restore it, or remove it and run again") from None


def write_record(path: Path, record: Any) -> None:
    write_json(path, to_json(record))


@functools.cache
def _reader(hint: Any) -> Reader:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return functools.partial(_scalar, hint)
    if dataclasses.is_dataclass(hint):
        return functools.partial(_record, hint)
    if origin in (typing.Union, types.UnionType):
        return _optional(*(_reader(argument) for argument in arguments if argument is not types.NoneType))
    if origin is Literal:
        return functools.partial(_literal, arguments)
    if origin in (tuple, list, Sequence):
        return functools.partial(_list, list if origin is list else tuple, _reader(arguments[0]))
    if origin in (dict, Mapping):
        return functools.partial(_dict, _reader(arguments[1]))
    if hint in (Any, object):
        return lambda value, key, lenient: value
    raise TypeError(f"{hint}: no form of JSON")


def _scalar(hint: type, value: Any, key: str, lenient: bool) -> Any:
    if type(value) is int and hint in (int, float) and abs(value) < 2**63:
        return hint(value)
    if type(value) is hint and hint is not int and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    raise WrongForm(f"{key} must be {SCALARS[hint]}, not {str(value)[:60]!r}")


def _optional(read: Reader) -> Reader:
    return lambda value, key, lenient: None if value is None else read(value, key, lenient)


def _literal(choices: Sequence[Any], value: Any, key: str, lenient: bool) -> Any:
    if value in choices:
        return value
    raise WrongForm(f"{key} must be one of {', '.join(map(str, choices))}, not {str(value)[:60]!r}")


def _list(made: type, read: Reader, value: Any, key: str, lenient: bool) -> Any:
    if not isinstance(value, list):
        raise WrongForm(f"{key} must be a list, not {str(value)[:60]!r}")
    entries = (_entry(read, entry, f"{key}[{i}]", lenient) for i, entry in enumerate(value))
    return made(entry for entry in entries if entry is not _NOTHING)


def _dict(read: Reader, value: Any, key: str, lenient: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WrongForm(f"{key} must have keys of its own, not {str(value)[:60]!r}")
    entries = {name: _entry(read, entry, f"{key}.{name}", lenient) for name, entry in value.items()}
    return {name: entry for name, entry in entries.items() if entry is not _NOTHING}


def _record(cls: Any, value: Any, key: str, lenient: bool) -> Any:
    if not isinstance(value, dict):
        raise WrongForm(f"{key} must have keys of its own" if key else "holds no JSON object")
    found: dict[str, Any] = {}
    for name, (read, required) in _fields(cls).items():
        inner = f"{key}.{name}" if key else name
        entry = _entry(read, value[name], inner, lenient) if name in value else _NOTHING
        if entry is not _NOTHING:
            found[name] = entry
        elif required:
            raise WrongForm(f"{inner} is missing")
    return cls(**found)


_NOTHING = object()


def _entry(read: Reader, value: Any, key: str, lenient: bool) -> Any:
    try:
        return read(value, key, lenient)
    except WrongForm:
        if not lenient:
            raise
        return _NOTHING


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Reader, bool]]:
    """Name -> its reader, and whether it has no default."""
    hints, missing = typing.get_type_hints(cls), dataclasses.MISSING
    return {
        field.name: (_reader(hints[field.name]), field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(cls)
        if field.init
    }
