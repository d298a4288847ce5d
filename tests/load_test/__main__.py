"""Load test and blinding test of the judging page: `python tests/load_test load|blinding [flags]`, from a checkout.

Two children have actions of their own: `server` and `virtual-users`.
"""

from __future__ import annotations

import sys

import blinding
import load_test
import server_child
import virtual_users
from rich.console import Console

from replication.cli.arguments import Parser
from replication.errors import UserError

ACTIONS = {"load": load_test, "blinding": blinding}
CHILDREN = {"server": server_child.main, "virtual-users": virtual_users.main}


def main(argv: list[str]) -> int:
    if argv and argv[0] in CHILDREN:
        CHILDREN[argv[0]](argv[1:])
        return 0
    parser = Parser(prog="python tests/load_test", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    for name, module in ACTIONS.items():
        text = (module.__doc__ or "").split(": ", 1)[1].splitlines()[0]
        module.add_arguments(actions.add_parser(name, help=text))
    try:
        args = parser.parse_args(argv)
        return ACTIONS[args.action].run(args, Console(highlight=False, soft_wrap=True))
    except UserError as error:
        print(f"load_test: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
