"""The functions that a claims file may name, and how one is called; those of votes and of training stand beside.

A function takes the published data and the claim's arguments and returns a number, a truth value or a text. Shares are
fractions: the printed percent sign says that the paper prints a hundred times as much.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from replication.audit.published import Published
from replication.errors import UserError

Value = float | int | bool | str
Function = Callable[..., Value]
F = TypeVar("F", bound=Function)

FUNCTIONS: dict[str, Function] = {}


def recomputes(function: F) -> F:
    """Enter a function under its own name."""
    FUNCTIONS[function.__name__] = function
    return function


def call(name: str, arguments: Mapping[str, Any], data: Published, place: str) -> Value:
    """Call the function of a claim; NaN where it divides by nothing.

    Raises:
        UserError: no such function, arguments that it does not take or cannot read, or names that the data do not hold.
    """
    if name not in FUNCTIONS:
        raise UserError(f"{place}: no function '{name}' recomputes a figure; there are {', '.join(sorted(FUNCTIONS))}")
    function = FUNCTIONS[name]
    try:
        inspect.signature(function).bind(data, **arguments)
    except TypeError as error:
        raise UserError(f"{place}: {name}: {error}; see replication/analysis for its arguments") from None
    try:
        return function(data, **arguments)
    except LookupError as error:
        raise UserError(f"{place}: {name}: the data hold no {error}; mend the claim's arguments") from None
    except ArithmeticError:  # a share of nothing
        return math.nan
    except (TypeError, ValueError, AttributeError) as error:  # a text for a number, one name for a list
        raise UserError(f"{place}: {name}: {error}; an argument has the wrong type or value, mend it there") from None


# ---------------------------------------------------------------- from what is printed elsewhere
# YAML reads 2e9 as text: hence the float().


@recomputes
def difference(data: Published, of: float, minus: float) -> float:
    """of - minus, of two printed figures."""
    return float(of) - float(minus)


@recomputes
def ratio(data: Published, of: float, to: float) -> float:
    """of / to, of two printed figures."""
    return float(of) / float(to)


@recomputes
def product(data: Published, of: Sequence[float]) -> float:
    """The product of printed figures."""
    return math.prod(float(value) for value in of)


@recomputes
def total(data: Published, of: Sequence[float]) -> float:
    """The sum of printed figures."""
    return sum(float(value) for value in of)


@recomputes
def orders_of_magnitude(data: Published, of: float, to: float) -> float:
    """log10(of / to) of two printed figures."""
    return math.log10(float(of) / float(to))


# ---------------------------------------------------------------- what the files state or hold


@recomputes
def stated(data: Published, role: str, path: str) -> Value:
    """What a file says itself, where nothing published allows to recompute it.

    Args:
        role: of the file.
        path: dotted keys.
    """
    value: Any = data.raw[role][0]
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise LookupError(f"key {path} in the file of {role}")
        value = value[key]
    return value if isinstance(value, (int, float, str)) else len(value)


@recomputes
def holds(data: Published, keys: Sequence[str], role: str | None = None, within: str = "") -> bool:
    """Whether a key that starts with one of the names occurs anywhere in a file, or in any.

    Args:
        keys: beginnings of keys.
        role: of the file; none: all files.
        within: only below this key of the file.
    """
    contents = data.raw.values() if role is None else [data.raw[role]]
    return any(_holds(content, tuple(keys), within) for content in contents)


def _holds(value: Any, keys: tuple[str, ...], within: str) -> bool:
    if isinstance(value, list):
        return any(_holds(entry, keys, within) for entry in value)
    if not isinstance(value, dict):
        return False
    if not within and any(key.startswith(keys) for key in value):
        return True
    return any(_holds(entry, keys, "" if key == within else within) for key, entry in value.items())
