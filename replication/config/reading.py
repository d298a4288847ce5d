"""YAML, JSON and flags, read by the type of each key: what a text means is the key's to say, not the format's.

YAML guesses at what stands without quotes: 010 is eight, 12:30 is 750, `no` is false, 1e-6 is text, and the first of
two equal keys is dropped. Here a scalar stays as it is written until the type of its key is known, and a key that
comes twice is refused. Messages name the file, the line and the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from replication.errors import UserError

T = TypeVar("T")
WHOLE = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)", re.ASCII)
NUMBER = re.compile(r"[-+]?(((0|[1-9]\d*(_\d+)*)(\.\d*)?|\.\d+)(e[-+]?\d+)?|\.?(inf|nan))", re.ASCII | re.IGNORECASE)
NULLS = ("", "~", "null", "Null", "NULL")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LARGEST_FLOAT = 3.4028234663852886e38  # of 32 bits, which is what a tensor holds
MOST_KEYS = 1_000_000
LONGEST_WHOLE = 40  # digits; no key takes a number that is anywhere near


# ---------------------------------------------------------------- ranges


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


# ---------------------------------------------------------------- texts


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

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}


def parse_yaml(text: str, where: str) -> Layer:
    """Read YAML text, scalars as they are written.

    Raises:
        UserError: no YAML, more than one document, a tag, a key that comes twice, or a node that holds itself.
    """
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(str(text), Loader=_Composer)
        tree = None if node is None else _Tree(where, lines).value(node, "")
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        end, start = (getattr(error, name, None) for name in ("problem_mark", "context_mark"))
        words = f"line {end.line + 1}: {problem}" if end else str(problem)
        if getattr(error, "context", None):
            words += f" {error.context}" + (f" from line {start.line + 1} on" if start else "")  # type: ignore[union-attr]
        raise UserError(f"{where}: not valid YAML ({' '.join(words.split())}); fix it there") from None
    return Layer(tree, where, lines)


def read_yaml(path: Path) -> Layer:
    """parse_yaml of a file in UTF-8, whatever the locale.

    Raises:
        UserError: see parse_yaml; also where it is not UTF-8.
        OSError: it cannot be read.
    """
    return parse_yaml(read_utf8(path), str(path))


def read_utf8(path: Path) -> str:
    """A text file, with or without the mark that some editors put in front.

    Raises:
        UserError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


class _Tree:
    """Nodes as dicts, lists and texts."""

    def __init__(self, where: str, lines: dict[str, int]) -> None:
        self.where, self.lines = where, lines
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: str) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if len(self.lines) > MOST_KEYS:
            raise UserError(f"{self.where}: its aliases multiply to more than {MOST_KEYS} values; write fewer")
        if id(node) in self._open:
            raise UserError(f"{self.where} line {line}: an alias stands inside of what it names; write it out")
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag[18:] not in ("str", "map", "seq"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{self.where} line {line}: the tag {tag} means nothing here; remove it")
        if isinstance(node, yaml.ScalarNode):
            return str(node.value) if node.style else Plain(node.value)
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found: Any = self._mapping(node, path)
        else:
            found = [self.value(child, f"{path}[{i}]") for i, child in enumerate(node.value)]
        self._open.remove(id(node))
        return found

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        seen: set[str] = set()
        for key, child in node.value:
            at = f"{self.where} line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{at}: a key must be a word, not a list or a mapping")
            if key.value in seen:
                raise UserError(f"{at}: key '{key.value}' comes twice; keep one")
            seen.add(key.value)
            name = f"{path}.{key.value}" if path else key.value
            self.lines[name] = key.start_mark.line + 1
            value = self.value(child, name)
            if key.style or key.value != "<<":
                own[key.value] = value
                continue
            for taken in value if isinstance(value, list) else [value]:
                if not isinstance(taken, dict):
                    raise UserError(f"{at}: << takes over the keys of a mapping, and this is none")
                merged = {**taken, **merged}  # the first one that has a key gives it
        return {**merged, **own}


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
    return float(value.replace(".inf", "inf").replace(".nan", "nan")) if _is_number(value) else str(value)


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None and text.lower().strip("+-") not in ("inf", "nan")


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what would be read back as something else than text, such as '1e-6'."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = "'" if untyped(Plain(text)) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


_Dumper.add_representer(str, _text)


def dump_yaml(tree: Any) -> str:
    """YAML that reads back as it was."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_json(text: str) -> Any:
    """JSON, strictly.

    Raises:
        ValueError: no JSON, a key that comes twice, NaN or Infinity, or nesting too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
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


# ---------------------------------------------------------------- types


class _Problem(Exception):
    """A fault of the value of a key; whoever knows where it stands makes a UserError of it."""

    def __init__(self, key: str, words: str) -> None:
        super().__init__(key, words)
        self.key, self.words = key, words


def build(cls: type[T], layers: Sequence[Layer]) -> T:
    """A dataclass from layers of its keys; later ones win, what none sets is the default.

    Keys may be nested or dotted. Every value is held against the type and the Range of its field, also one that a later
    layer replaces.

    Raises:
        UserError: an unknown key, one that comes twice in a layer, a wrong type or a number out of range.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= check_layer(cls, layer)
    try:
        return _assemble(cls, values, "")
    except _Problem as problem:
        raise layers[-1].error(problem.key, problem.words) from None


def check_layer(cls: type, layer: Layer) -> dict[str, Any]:
    """A layer's own dotted keys with their typed values; raises as `build` does."""
    try:
        return _keys(cls, {} if _is_null(layer.tree) else layer.tree, "")
    except _Problem as problem:
        raise layer.error(problem.key, problem.words) from None


def check_values(config: Any, prefix: str = "") -> None:
    """Hold the values of a dataclass that was made in code against their types and Ranges; raises UserError."""
    try:
        for name, hint in hints(type(config)).items():  # type: ignore[arg-type]
            value = getattr(config, name)
            if dataclasses.is_dataclass(value):
                check_values(value, f"{prefix}{name}.")
            else:
                _typed(hint, value, f"{prefix}{name}")
    except _Problem as problem:
        raise UserError(f"{problem.key}: {problem.words}") from None


def flag_layers(flags: Sequence[str], read: typing.Callable[[str], Layer]) -> Iterator[Layer]:
    """Layers of flags such as `--training.steps=20` or `--training.steps 20`; `--config FILE` is one that is read.

    Raises:
        UserError: a word that is no flag, or a flag without its value.
    """
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--":
            raise UserError(
                f"{word}: is not a flag; a key of a run is given as --KEY=VALUE, such as --training.steps=20"
            )
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"{name}: has no value; write {name}=VALUE")
        yield read(value) if name == "--config" else Layer({name[2:]: Plain(value)}, "", {})


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(cls, include_extras=True)


def _keys(cls: type, tree: Any, prefix: str) -> dict[str, Any]:
    """{dotted key: typed value} of what a tree sets."""
    if isinstance(tree, Plain) and tree.startswith("{"):
        tree = _flow(tree, prefix[:-1])
    if not isinstance(tree, dict):
        raise _Problem(prefix[:-1], f"must have keys of its own, not {_shown(tree)}")
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name, dot, rest = str(key).partition(".")
        hint = hints(cls).get(name)
        if hint is None or (dot and not dataclasses.is_dataclass(hint)):
            close = difflib.get_close_matches(str(key), hints(cls), 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"the keys are {', '.join(hints(cls))}"
            raise _Problem(f"{prefix}{key}", f"no such key; {hint}")
        if dataclasses.is_dataclass(hint):
            more = _keys(hint, {rest: value} if dot else value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            more = {f"{prefix}{name}": _typed(hint, value, f"{prefix}{name}")}
        for dotted in more.keys() & found.keys():
            raise _Problem(dotted, "comes twice; keep one")
        found |= more
    return found


def _assemble(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    arguments: dict[str, Any] = {}
    types_of = hints(cls)  # type: ignore[arg-type]
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, hint = f"{prefix}{entry.name}", types_of[entry.name]
        if dataclasses.is_dataclass(hint):
            arguments[entry.name] = _assemble(hint, values, f"{name}.")  # type: ignore[arg-type]
        elif name in values:
            arguments[entry.name] = values[name]
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise _Problem(name, "is missing, and has no default")
    return cls(**arguments)


def number_of(hint: Any, text: str) -> Any:
    """A number as its type, which may be Annotated with a Range.

    Raises:
        ValueError: it is none, or out of range; the message says what it must be.
    """
    try:
        return _typed(hint, Plain(text), "")
    except _Problem as problem:
        raise ValueError(problem.words) from None


def _typed(hint: Any, value: Any, key: str) -> Any:
    """A value as its type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = _typed(arguments[0], value, key)
        if problem := arguments[1].problem(number):
            raise _Problem(key, f"{number} {problem}")
        return number
    if origin in (typing.Union, types.UnionType):  # of a type and None
        return None if _is_null(value) else _typed(arguments[0], value, key)
    if hint is Any:
        return untyped(value)
    if isinstance(value, Plain) and value[:1] in ("[", "{") and (origin or dataclasses.is_dataclass(hint)):
        value = _flow(value, key)  # of a flag; in a file these begin no scalar
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _Problem(key, f"must be a list such as [a, b], not {_shown(value)}")
        return tuple(_typed(arguments[0], entry, f"{key}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _Problem(key, f"must have keys of its own, not {_shown(value)}")
        return {str(name): _typed(arguments[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            check_values(value, f"{key}.")
            return value
        return _assemble(hint, _keys(hint, value, f"{key}."), f"{key}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value not in arguments:
            raise _Problem(key, f"must be one of {', '.join(arguments)}, not {_shown(value)}")
        return str(value)
    scalar = {bool: _switch, int: _whole, float: _number, str: _words}[hint]
    return scalar(value, key)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Plain) and value in NULLS)


def _shown(value: Any) -> str:
    return "null" if _is_null(value) else repr(str(value)) if isinstance(value, str) else str(untyped(value))


def _flow(text: str, key: str) -> Any:
    """A list or mapping that was given as a flag."""
    return parse_yaml(text, f"--{key}").tree


def _switch(value: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in SWITCH:
        raise _Problem(key, f"must be true or false, not {_shown(value)}")
    return SWITCH[value.lower()]


def _whole(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and WHOLE.fullmatch(value):
        number = int(value.replace("_", "")[:LONGEST_WHOLE])
    else:
        raise _Problem(key, f"must be a whole number such as 20, not {_shown(value)}")
    if abs(number) >= 2**63:
        raise _Problem(key, f"{str(value)[:LONGEST_WHOLE]} is too large a number")
    return number


def _number(value: Any, key: str) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        number = float(re.sub(r"\.(?=inf|nan)", "", value.lower()))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) < 2**63 or isinstance(value, float) else float("inf")
    else:
        raise _Problem(key, f"must be a number such as 0.5, not {_shown(value)}")
    if not abs(number) <= LARGEST_FLOAT:
        raise _Problem(key, f"{number} must be a finite number{' in 32 bits' if math.isfinite(number) else ''}")
    return number


def _words(value: Any, key: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or _is_null(value):
        raise _Problem(key, f"must be text, not {_shown(value)}; put it into quotes")
    if problem := unfit(value):
        raise _Problem(key, problem)
    return str(value)


def unfit(text: str) -> str | None:
    """Why a text can be neither stored, sent nor written to a file, in words; None where it can."""
    if "\x00" in text:
        return "holds a NUL character; remove it"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "holds half a character (one surrogate of two, as a cut emoji leaves it); fix or remove it"
    return None
