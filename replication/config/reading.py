"""YAML, JSON and flags, read by the type of each key: what a text means is the key's to say, not the format's.

YAML guesses at what stands without quotes: 010 is eight, 12:30 is 750, `no` is false, 1e-6 is text, and the first of
two equal keys is dropped. Here a scalar stays as it is written until the type of its key is known, and a key that
comes twice is refused. Messages name the file, the line and the key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from replication.errors import UserError, did_you_mean

T = TypeVar("T")
Keys = dict[str, Any]
"""Dotted keys of a config with their values as JSON has them; in places also nested."""
WHOLE = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)", re.ASCII)
NUMBER = re.compile(r"[-+]?(((0|[1-9]\d*(_\d+)*)(\.\d*)?|\.\d+)(e[-+]?\d+)?|\.?(inf|nan))", re.ASCII | re.IGNORECASE)
NULLS = ("", "~", "null", "Null", "NULL")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LARGEST_FLOAT = 3.4028234663852886e38  # of 32 bits, which is what a tensor holds
MOST_KEYS = 1_000_000
LONGEST_WHOLE = 40  # digits; no key takes a number that is anywhere near


class Range:
    """The numbers that a key takes, in the notation of intervals: `Annotated[float, Range("[0, 1)")]`."""

    def __init__(self, interval: str) -> None:
        self.interval = interval
        self.low, self.high = (float(end) for end in interval[1:-1].split(","))

    def problem(self, value: float) -> str | None:
        """The fault of a number, in words; None where it lies within."""
        above = self.low < value if self.interval[0] == "(" else self.low <= value
        if above and (value < self.high if self.interval[-1] == ")" else value <= self.high):
            return None
        if self.high <= 1:
            return f"must lie in {self.interval}"
        if above:
            return f"must be {'less than' if self.interval[-1] == ')' else 'at most'} {self.high:.17g}"
        return f"must be {'more than' if self.interval[0] == '(' else 'at least'} {self.low:g}"


class Plain(str):
    """A scalar without quotes, as it is written."""


@dataclass(frozen=True)
class Layer:
    """Keys from one place, still as they are written."""

    tree: Any
    """Dicts, lists and texts; of a dict that was not read from a file also numbers and None."""
    where: str
    lines: Mapping[str, int] = field(default_factory=dict)
    """Line of each dotted key."""

    def error(self, key: str, problem: str) -> UserError:
        """The mistake, with the place of the key, or of the nearest one that it belongs to."""
        near = key
        while near and near not in self.lines:
            near = re.sub(r"(^|\.|\[)[^.\[]*$", "", near)
        place = f"{self.where} line {self.lines[near]}: " if near else f"{self.where}: " if self.where else "--"
        return UserError(f"{place}{key}: {problem}" if key else f"{place}{problem}")


class _Composer(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C one is ten times as fast
    """Composes nodes and guesses at no scalar."""

    yaml_implicit_resolvers: typing.ClassVar[Keys] = {}


def parse_yaml(text: str, where: str) -> Layer:
    """Read YAML text, scalars as they are written.

    Raises UserError: no YAML, more than one document, a tag, a key that comes twice, or a node that holds itself.
    """
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(str(text), Loader=_Composer)
        return Layer(None if node is None else _as_written(node, "", where, lines), where, lines)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        end, start = (getattr(error, name, None) for name in ("problem_mark", "context_mark"))
        words = f"line {end.line + 1}: {problem}" if end else str(problem)
        if getattr(error, "context", None):
            words += f" {error.context}" + (f" from line {start.line + 1} on" if start else "")  # type: ignore[union-attr]
        raise UserError(f"{where}: not valid YAML ({' '.join(words.split())}); fix it there") from None


def _as_written(
    node: yaml.Node, path: str, where: str, lines: dict[str, int], around: frozenset[int] = frozenset()
) -> Any:
    """A node as dicts, lists and texts; notes the line of each dotted key. `around` are the nodes that it lies in."""
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if len(lines) > MOST_KEYS:
        raise UserError(f"{where}: its aliases multiply to more than {MOST_KEYS} values; write fewer")
    if id(node) in around:
        raise UserError(f"{where} line {line}: an alias stands inside of what it names; write it out")
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag[18:] not in ("str", "map", "seq"):
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(f"{where} line {line}: the tag {tag} means nothing here; remove it")
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) if node.style else Plain(node.value)
    around |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_as_written(child, f"{path}[{i}]", where, lines, around) for i, child in enumerate(node.value)]
    own, merged, seen = Keys(), Keys(), set()
    for key, child in node.value:
        at = f"{where} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{at}: a key must be a word, not a list or a mapping")
        if key.value in seen:
            raise UserError(f"{at}: key '{key.value}' comes twice; keep one")
        seen.add(key.value)
        name = f"{path}.{key.value}" if path else key.value
        lines[name] = key.start_mark.line + 1
        value = _as_written(child, name, where, lines, around)
        if key.style or key.value != "<<":
            own[key.value] = value
            continue
        for taken in value if isinstance(value, list) else [value]:
            if not isinstance(taken, dict):
                raise UserError(f"{at}: << takes over the keys of a mapping, and this is none")
            merged = {**taken, **merged}  # the first one that has a key gives it
    return {**merged, **own}


def read_yaml(path: Path) -> Layer:
    """parse_yaml of a file in UTF-8, whatever the locale; raises as read_utf8 does too."""
    return parse_yaml(read_utf8(path), str(path))


def read_utf8(path: Path) -> str:
    """A text file, with or without the mark that some editors put in front.

    Raises UserError where it is not UTF-8, and OSError where it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


def untyped(value: Any) -> Any:
    """The values of a tree where no type says: null, true, false and numbers as in JSON, all else text."""
    if isinstance(value, dict):
        return {key: untyped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [untyped(entry) for entry in value]
    if not isinstance(value, Plain):
        return value
    if value in NULLS:
        return None
    if value.lower() in ("true", "false"):
        return SWITCH[value.lower()]
    if WHOLE.fullmatch(value) and len(value) <= LONGEST_WHOLE:
        return int(value) if value == str(int(value)) else str(value)  # 2024_10 may be a name: its key says
    is_number = NUMBER.fullmatch(value) and value.lower().strip("+-") not in ("inf", "nan")
    return float(value.replace(".inf", "inf").replace(".nan", "nan")) if is_number else str(value)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what would be read back as something else than text, such as '1e-6'."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        quoted = "'" if untyped(Plain(text)) != text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump_yaml(tree: Any) -> str:
    """YAML that reads back as it was."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_json(text: str) -> Any:
    """JSON, strictly; raises ValueError also for a key that comes twice, NaN or Infinity, and nesting too deep."""

    def once(pairs: list[tuple[str, Any]]) -> Keys:
        found = Keys()
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key '{key}' comes twice")
            found[key] = value
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


class _Problem(Exception):
    """A key, and the fault of its value; whoever knows where it stands makes a UserError of it."""


def build(cls: type[T], layers: Sequence[Layer]) -> T:
    """A dataclass from layers of its keys; later ones win, what none sets is the default.

    Keys may be nested or dotted. Every value is held against the type and the Range of its field, also one that a later
    layer replaces. Raises UserError: an unknown key, one that comes twice in a layer, a wrong type or a number out of
    range.
    """
    values = Keys()
    for layer in layers:
        values |= check_layer(cls, layer)
    try:
        return _assemble(cls, values, "")
    except _Problem as problem:
        raise layers[-1].error(*problem.args) from None


def check_layer(cls: type, layer: Layer) -> Keys:
    """A layer's own dotted keys with their typed values; raises as `build` does."""
    try:
        return _keys(cls, {} if _is_null(layer.tree) else layer.tree, "")
    except _Problem as problem:
        raise layer.error(*problem.args) from None


def check_values(config: Any, prefix: str = "") -> None:
    """Hold the values of a dataclass that was made in code against their types and Ranges; raises UserError."""
    try:
        for name, hint in hints(type(config)).items():  # type: ignore[arg-type]
            _typed(hint, getattr(config, name), f"{prefix}{name}")
    except _Problem as problem:
        raise UserError(": ".join(problem.args)) from None


def number_of(hint: Any, text: str) -> Any:
    """A number as its type, which may be Annotated with a Range; raises ValueError that says what it must be."""
    try:
        return _typed(hint, Plain(text), "")
    except _Problem as problem:
        raise ValueError(problem.args[1]) from None


@functools.cache
def hints(cls: Any) -> Keys:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(cls, include_extras=True)


def _keys(cls: type, tree: Any, prefix: str) -> Keys:
    """{dotted key: typed value} of what a tree sets."""
    if isinstance(tree, Plain) and tree.startswith("{"):  # of a flag; in a file it begins no scalar
        tree = parse_yaml(tree, f"--{prefix[:-1]}").tree
    if not isinstance(tree, dict):
        raise _Problem(prefix[:-1], f"must have keys of its own, not {_shown(tree)}")
    found = Keys()
    for key, value in tree.items():
        name, dot, rest = str(key).partition(".")
        hint = hints(cls).get(name)
        if hint is None or (dot and not dataclasses.is_dataclass(hint)):
            meant = did_you_mean(str(key), hints(cls), prefix) or f"; the keys are {', '.join(hints(cls))}"
            raise _Problem(f"{prefix}{key}", f"no such key{meant}")
        if dataclasses.is_dataclass(hint):
            more = _keys(hint, {rest: value} if dot else value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            more = {f"{prefix}{name}": _typed(hint, value, f"{prefix}{name}")}
        for dotted in more.keys() & found.keys():
            raise _Problem(dotted, "comes twice; keep one")
        found |= more
    return found


def _assemble(cls: type[T], values: Keys, prefix: str) -> T:
    """A dataclass, and those in it, of {dotted key: typed value}."""
    arguments, types_of = Keys(), hints(cls)  # type: ignore[arg-type]
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, hint = f"{prefix}{entry.name}", types_of[entry.name]
        if dataclasses.is_dataclass(hint):
            arguments[entry.name] = _assemble(hint, values, f"{name}.")  # type: ignore[arg-type]
        elif name in values:
            arguments[entry.name] = values[name]
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise _Problem(name, "is missing, and has no default")
    return cls(**arguments)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """A value as its type."""
    origin, arguments, is_config = typing.get_origin(hint), typing.get_args(hint), dataclasses.is_dataclass(hint)
    if origin is Annotated:
        number = _typed(arguments[0], value, key)
        if problem := arguments[1].problem(number):
            raise _Problem(key, f"{number} {problem}")
        return number
    if origin in (typing.Union, types.UnionType):  # of a type and None
        return None if _is_null(value) else _typed(arguments[0], value, key)
    if hint is Any:
        return untyped(value)
    if isinstance(value, Plain) and value[:1] in ("[", "{") and (origin or is_config):
        value = parse_yaml(value, f"--{key}").tree  # of a flag; in a file these begin no scalar
    if is_config and isinstance(value, hint):
        check_values(value, f"{key}.")
        return value
    if is_config:
        return _assemble(hint, _keys(hint, value, f"{key}."), f"{key}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _Problem(key, f"must be a list such as [a, b], not {_shown(value)}")
        return tuple(_typed(arguments[0], entry, f"{key}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _Problem(key, f"must have keys of its own, not {_shown(value)}")
        return {str(name): _typed(arguments[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise _Problem(key, f"must be one of {', '.join(arguments)}, not {_shown(value)}")
        return str(value)
    return _scalar(hint, value, key)


def _scalar(kind: type, value: Any, key: str) -> bool | int | float | str:
    is_text, is_bool, is_whole = (isinstance(value, t) for t in (str, bool, int))
    if kind is bool and (is_bool or (is_text and value.lower() in SWITCH)):
        return SWITCH[str(value).lower()]
    if kind is int and ((is_whole and not is_bool) or (is_text and WHOLE.fullmatch(value))):
        whole = int(value.replace("_", "")[:LONGEST_WHOLE]) if is_text else int(value)
        if abs(whole) >= 2**63:
            raise _Problem(key, f"{str(value)[:LONGEST_WHOLE]} is too large a number")
        return whole
    if kind is float and ((isinstance(value, int | float) and not is_bool) or (is_text and NUMBER.fullmatch(value))):
        if is_text:
            number = float(re.sub(r"\.(?=inf|nan)", "", value.lower()))
        else:
            number = float("inf") if is_whole and abs(value) >= 2**63 else float(value)
        if not abs(number) <= LARGEST_FLOAT:
            raise _Problem(key, f"{number} must be a finite number{' in 32 bits' if math.isfinite(number) else ''}")
        return number
    if kind is str and ((is_whole and not is_bool) or (is_text and not _is_null(value))):
        if problem := unfit(str(value)):
            raise _Problem(key, problem)
        return str(value)
    what, more = {
        bool: ("true or false", ""),
        int: ("a whole number such as 20", ""),
        float: ("a number such as 0.5", ""),
        str: ("text", "; put it into quotes"),
    }[kind]
    raise _Problem(key, f"must be {what}, not {_shown(value)}{more}")


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Plain) and value in NULLS)


def _shown(value: Any) -> str:
    return "null" if _is_null(value) else repr(str(value)) if isinstance(value, str) else str(untyped(value))


def unfit(text: str) -> str | None:
    """Why a text can be neither stored, sent nor written to a file, in words; None where it can."""
    if "\x00" in text:
        return "holds a NUL character; remove it"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "holds half a character (one surrogate of two, as a cut emoji leaves it); fix or remove it"
    return None
