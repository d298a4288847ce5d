"""The functions that a claims file may name, and how one is called.

A function takes the claim's arguments and returns a number, a truth value or a text. Shares are fractions: the printed
percent sign says that the paper prints a hundred times as much.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from replication.audit.published import Published
from replication.audit.recompute_training import TrainingFigures
from replication.audit.recompute_votes import Value, VoteFigures
from replication.errors import UserError


class Figures(VoteFigures, TrainingFigures):
    """Every public method is a function of a claims file; here those that read no votes or curves.

    YAML reads 2e9 as text: hence float() of what is printed elsewhere.
    """

    def __init__(self, data: Published) -> None:
        self.data = data

    def difference(self, of: float, minus: float) -> float:
        """of - minus, of two printed figures."""
        return float(of) - float(minus)

    def ratio(self, of: float, to: float) -> float:
        """of / to, of two printed figures."""
        return float(of) / float(to)

    def product(self, of: Sequence[float]) -> float:
        """The product of printed figures."""
        return math.prod(float(value) for value in of)

    def total(self, of: Sequence[float]) -> float:
        """The sum of printed figures."""
        return sum(float(value) for value in of)

    def orders_of_magnitude(self, of: float, to: float) -> float:
        """log10(of / to) of two printed figures."""
        return math.log10(float(of) / float(to))

    def stated(self, role: str, path: str) -> Value:
        """A value that a file states itself, where nothing published allows to recompute it.

        Args:
            role: of the file.
            path: dotted keys.
        """
        value: Any = self.data.raw[role][0]
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                raise LookupError(f"key {path} in the file of {role}")
            value = value[key]
        return value if isinstance(value, (int, float, str)) else len(value)

    def holds(self, keys: Sequence[str], role: str | None = None, within: str = "") -> bool:
        """Whether a key that starts with one of the names occurs anywhere in a file, or in any.

        Args:
            keys: beginnings of keys.
            role: of the file; none: all files.
            within: only below this key of the file.
        """
        contents = self.data.raw.values() if role is None else [self.data.raw[role]]
        return any(_holds(content, tuple(keys), within) for content in contents)


def _holds(value: Any, keys: tuple[str, ...], within: str) -> bool:
    if isinstance(value, list):
        return any(_holds(entry, keys, within) for entry in value)
    if not isinstance(value, dict):
        return False
    if not within and any(key.startswith(keys) for key in value):
        return True
    return any(_holds(entry, keys, "" if key == within else within) for key, entry in value.items())


FUNCTIONS: dict[str, Callable[..., Value]] = {
    name: function for name, function in inspect.getmembers(Figures, inspect.isfunction) if not name.startswith("_")
}


def call(name: str, arguments: Mapping[str, Any], data: Published, place: str) -> Value:
    """Call the function of a claim; NaN where it divides by nothing.

    Raises:
        UserError: no such function, arguments that it does not take or cannot read, or names that the data do not hold.
    """
    if name not in FUNCTIONS:
        raise UserError(f"{place}: no function '{name}' recomputes a figure; there are {', '.join(sorted(FUNCTIONS))}")
    figures, function = Figures(data), FUNCTIONS[name]
    try:
        inspect.signature(function).bind(figures, **arguments)
    except TypeError as error:
        raise UserError(f"{place}: {name}: {error}; see replication/audit/recompute*.py for its arguments") from None
    try:
        return function(figures, **arguments)
    except LookupError as error:
        raise UserError(f"{place}: {name}: the data hold no {error}; fix the claim's arguments") from None
    except ArithmeticError:  # a share of nothing
        return math.nan
    except (TypeError, ValueError, AttributeError) as error:  # a text for a number, one name for a list
        raise UserError(f"{place}: {name}: {error}; an argument has the wrong type or value, fix it there") from None
