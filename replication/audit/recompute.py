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

    The first five take printed figures; YAML reads 2e9 as text, hence float().
    """

    def __init__(self, data: Published) -> None:
        self.data = data

    def difference(self, of: float, minus: float) -> float:
        return float(of) - float(minus)

    def ratio(self, of: float, to: float) -> float:
        return float(of) / float(to)

    def product(self, of: Sequence[float]) -> float:
        return math.prod(map(float, of))

    def total(self, of: Sequence[float]) -> float:
        return sum(map(float, of))

    def orders_of_magnitude(self, of: float, to: float) -> float:
        return math.log10(float(of) / float(to))

    def stated(self, role: str, path: str) -> Value:
        """The value at dotted keys, which a file states itself, where nothing published allows to recompute it."""
        value: Any = self.data.raw[role][0]
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                raise LookupError(f"key {path} in the file of {role}")
            value = value[key]
        return value if isinstance(value, (int, float, str)) else len(value)

    def holds(self, keys: Sequence[str], role: str | None = None, within: str = "") -> bool:
        """Whether a key that begins with one of some texts occurs in a file, or in any, perhaps only below one key."""

        def found(value: Any, within: str) -> bool:
            if isinstance(value, list):
                return any(found(entry, within) for entry in value)
            if not isinstance(value, dict):
                return False
            if not within and any(key.startswith(tuple(keys)) for key in value):
                return True
            return any(found(entry, "" if key == within else within) for key, entry in value.items())

        return found(list(self.data.raw.values()) if role is None else self.data.raw[role], within)


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
