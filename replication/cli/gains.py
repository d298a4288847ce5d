"""`replicate check-gain`: the functions of a plugin under the checks that our own gains pass."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console

from replication.cli.arguments import takes, takes_keys, verb
from replication.config import Keys, find_plugin
from replication.config.reading import Plain, untyped
from replication.console import say
from replication.errors import UserError
from replication.objectives.plugins import read_functions


@verb
@takes("file", "Python file with gains or scales, or the name under which a package registers it")
@takes_keys("A parameter may follow as --FUNCTION.PARAMETER=VALUE; others have their defaults.")
def check_gain(args: Namespace) -> int:
    """Check the gains and scales of a plugin as our own are checked: pure, whatever the cut."""
    from replication.objectives.check_gain import faults, spread

    console, found, given = Console(), read_functions(find_plugin(args.file)), dict[str, Keys]()
    for word in args.keys:
        key, equals, value = word.removeprefix("--").partition("=")
        name, _, parameter = key.partition(".")
        if not (equals and parameter and name in found):
            raise UserError(f"{word}: give a parameter as --FUNCTION.PARAMETER=VALUE; functions: {', '.join(found)}")
        given.setdefault(name, {})[parameter] = untyped(Plain(value))
    failed = False
    for function in [f.with_parameters(given.get(name, {}), name) for name, f in found.items()]:
        for check, fault in faults(function):
            word = ("FAILS", "red") if fault else ("holds", "green")
            say(console, word, f"  {function.name}: {fault or check}")
            failed = failed or fault != ""
        say(console, f"       {function.name}: {spread(function)}")
    return int(failed)
