"""`replicate judge ACTION`: make a panel, hand out links, serve the page, ask models, lock, export."""

from __future__ import annotations

import argparse
import csv
import importlib
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from replication.cli.arguments import COUNT, NATURAL, Parser, folder, number, whole
from replication.errors import UserError

if TYPE_CHECKING:
    from replication.judging.attendance import Fill
    from replication.judging.chosen import Chosen
    from replication.judging.database import Database
    from replication.judging.folder import PanelFolder
    from replication.judging.options import PanelOptions

TEXTS = {
    "prepare": "make a panel from the completions of two arms: items, sealed key, a set of pairs for each judge",
    "invite": "links for people: to sets that nobody has yet, then to further ones; or a new link for a judge",
    "serve": "open the page on which people vote",
    "status": "how far each judge is, and the panel from its plan; no arm is known",
    "model": "let a model behind an OpenAI-compatible endpoint judge",
    "sheet": "let a chat model judge by hand: write a sheet of questions, read the filled one",
    "lock": "close the panel for good, open the seal, write votes.csv for the report",
    "export": "after the lock: votes, counts, judges and models' answers as files",
}
ELSEWHERE = {
    "model": "replication.judging.models.run",
    "sheet": "replication.judging.models.sheets",
}
"""Actions whose flags and work lie in a module of their own: add_arguments(parser), run(args, console) -> int."""

BASE_URL = "http://127.0.0.1:8765"
PACKAGES = "sqlalchemy psycopg fastapi starlette uvicorn python_multipart openai httpx tenacity aiohttp sklearn"
"""Of the extra `judge`."""


def judge(argv: list[str]) -> int:
    """The verb: parse, then act."""
    try:
        return _act(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PACKAGES.split():
            raise
        raise UserError(
            f"replicate judge: the package {error.name} is missing; launch/install.sh judge, or pip install "
            "'replication[judge]'"
        ) from None
    except Exception as error:
        if type(error).__module__ != "sqlalchemy.exc" or not hasattr(error, "orig"):
            raise
        line = str(error.orig).strip().splitlines()[0]
        raise UserError(
            f"--database: refused what was asked of it ({line}); mend that there, or name another"
        ) from error


def _act(argv: list[str]) -> int:
    parser = Parser(prog="replicate judge", description="People and models compare completions of two arms, blind.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(TEXTS), parser_class=Parser)
    wanted = next((word for word in argv if word in TEXTS), None)
    for name, text in TEXTS.items():
        sub = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name in ELSEWHERE:
            if name == wanted:  # its module loads packages that the others do without
                _module(name).add_arguments(sub)
            continue
        sub.add_argument("dir", type=folder, metavar="DIR", help="output folder of a suite")
        if name in ARGUMENTS:
            ARGUMENTS[name](sub)
        sub.add_argument("--database", metavar="URL", help="panel in another database: a file, or a URL such as "
                         "postgresql://user@host/name (default: DIR/judging/judging.sqlite)")  # fmt: skip
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    if args.action in ELSEWHERE:
        run: Callable[[argparse.Namespace, Console], int] = _module(args.action).run
        return run(args, console)
    return ACTIONS[args.action](args, console)


def _module(action: str) -> Any:
    return importlib.import_module(ELSEWHERE[action])


def _open(args: argparse.Namespace, only_reads: bool = False) -> tuple[PanelFolder, Database]:
    from replication.judging.folder import find_panel

    folder = find_panel(args.dir)
    return folder, folder.open(args.database, only_reads)


def _command(*words: object) -> str:
    return escape(shlex.join(["replicate", "judge", *map(str, words)]))


# ---------------------------------------------------------------- a new panel


def _prepare_arguments(sub: Parser) -> None:
    sub.add_argument("--pair", metavar="A,B", help="baseline and treatment (default: those of the suite's analysis)")
    sub.add_argument("--judges", type=NATURAL, help="people, each with a set of pairs (default: the suite's analysis)")
    sub.add_argument("--votes", type=COUNT, help="first votes of a set (default: the suite's analysis)")
    sub.add_argument("--repeats", type=number("[0, 0.5]"), default=0.1, help="share of a set that comes again, "
                     "sides swapped (default 0.1)")  # fmt: skip
    sub.add_argument("--attention", type=NATURAL, default=0, help="attention items of a set (default 0)")
    sub.add_argument("--no-survey", action="store_true", help="ask people nothing about themselves")
    sub.add_argument("--invite-only", action="store_true", help="no open link: each judge needs a link of their own")
    sub.add_argument("--import", dest="file", type=Path, metavar="FILE", help="completions that the published A/B tool "
                     "exports, in place of a suite's")  # fmt: skip


def _prepare(args: argparse.Namespace, console: Console) -> int:
    from replication.judging.chosen import departures, from_file, from_suite
    from replication.judging.database import Database
    from replication.judging.folder import PanelFolder
    from replication.judging.options import PanelOptions
    from replication.judging.panel import create_panel
    from replication.runs.layout import SuiteDir

    folder = PanelFolder(args.dir, SuiteDir(args.dir).judging)
    if args.file is None and not args.dir.is_dir():
        raise UserError(f"{args.dir}: no such folder; give the output folder of `replicate grid run`")
    if args.file is not None and args.pair:
        raise UserError("--pair: does not act with --import; the file names its two models")
    chosen = from_file(args.file) if args.file is not None else from_suite(args.dir, args.pair)
    for line in chosen.left_out:
        console.print(f"[yellow]{escape(line)}[/yellow]")
    n_judges = chosen.analysis.judges if args.judges is None else args.judges
    options = PanelOptions(
        judges=n_judges,
        votes_per_judge=_votes(args, chosen, console),
        repeat_share=args.repeats,
        attention=args.attention,
        survey=not args.no_survey,
        open_link=not args.invite_only and n_judges > 0,
    )
    database = Database(args.database or folder.database_file)
    sources = (chosen.suite, chosen.completions, chosen.arms)
    tokens = create_panel(database, folder.sealed, *sources, options, keep=folder.keep_tokens)
    folder.write_facts(database, options, is_named=bool(args.database))
    for line in departures(chosen, options.judges, options.votes_per_judge):
        console.print(f"[yellow]{escape(line)}[/yellow]")
    n_seeds = len(chosen.completions)
    console.print(
        f"panel:        {_sets(options)}, {n_seeds} {'seed' if n_seeds == 1 else 'seeds'}, in {escape(database.name)}"
    )
    console.print(f"sealed key:   {escape(str(folder.sealed / 'key.json'))}; the page neither needs nor reads it")
    if not options.judges:
        console.print(f"judges:       models, {_command('model', args.dir)} ...; people by `replicate judge invite`")
    elif tokens.join is None:
        console.print(f"links:        {_command('invite', args.dir, '--judges', options.judges)}")
    console.print(f"next:         {_command('serve', args.dir)}   (opens the page, prints its links)")
    return 0


def _votes(args: argparse.Namespace, chosen: Chosen, console: Console) -> int:
    """First votes of a set: --votes, or the analysis'; of a file that has fewer pairs, all of them."""
    votes, n_pairs = chosen.analysis.votes_per_judge, chosen.n_pairs
    if args.votes is not None:
        return int(args.votes)
    if args.file is None or n_pairs >= votes:
        return votes
    console.print(f"[yellow]the file has {n_pairs} pairs of completions: a set is all of them, not {votes}[/yellow]")
    return n_pairs


def _sets(options: PanelOptions) -> str:
    """Such as '40 sets of 32 pairs, 4 repeats and 2 attention items'."""

    def some(n: int, one: str) -> str:
        return f"{n} {one}" if n == 1 else f"{n} {one}s"

    more = [some(n, one) for n, one in ((options.n_repeats, "repeat"), (options.attention, "attention item")) if n]
    parts = [some(options.votes_per_judge, "pair"), *more]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if more else parts[0]
    return f"{some(options.judges, 'set')} of {listed}"


# ---------------------------------------------------------------- links


def _invite_arguments(sub: Parser) -> None:
    sub.add_argument("--judges", type=COUNT, metavar="N", help="links for so many people")
    sub.add_argument("--judge-id", nargs="+", metavar="NAME", help="a new link for each; the old one stops working")
    sub.add_argument("--test", action="store_true", help="links for trials: votes by them enter no record and no count")
    sub.add_argument("--base-url", help=f"where the page is reached (default: where it is served, or {BASE_URL})")
    sub.add_argument("--csv", action="store_true", help="print judge_id,link instead of a table")


def _invite(args: argparse.Namespace, console: Console) -> int:
    from replication.judging.panel import invite, invite_people, invite_tests

    base = None if args.base_url is None else _base_url(args.base_url)
    if (args.judges is None) == (args.judge_id is None):
        raise UserError("replicate judge invite: give --judges N, or --judge-id NAME")
    if args.test and args.judge_id:
        raise UserError("--test: goes with --judges N; a judge stays what they were made as")
    folder, database = _open(args)
    if args.judge_id:
        tokens, further = invite(database, args.judge_id), 0
    elif args.test:
        tokens, further = invite_tests(database, folder.sealed, args.judges), 0
    else:
        tokens, further = invite_people(database, folder.sealed, args.judges)
    if base is None and (base := folder.served_at()) is None:
        base = BASE_URL
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[yellow]the page is not served from here now: the links name {base}, where `replicate judge serve` opens "
            "it unless told otherwise; --base-url names another address[/yellow]"
        )
    links = [(name, f"{base}/j/{token}") for name, token in tokens.items()]
    if args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([("judge_id", "link"), *links])
        return 0
    table = Table("judge_id", "link", title="Links; each is a judge's own and is shown this once")
    for row in links:
        table.add_row(*map(escape, row))
    Console(width=max(console.width, 110)).print(table)
    if further:
        console.print(f"{further} of them are further sets: every planned one has its judge")
    return 0


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, half a bracket
        is_one = False
    if not is_one or parts.query or parts.fragment or any(c.isspace() for c in text):
        raise UserError(f"--base-url: '{text}' is no address such as https://judge.example.org")
    return text.rstrip("/")


# ---------------------------------------------------------------- the page


def _serve_arguments(sub: Parser) -> None:
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    sub.add_argument("--port", type=whole(0, 65535), default=8765, help="(default 8765; 0: any free one)")
    sub.add_argument("--base-url", help="where judges reach the page, if not there: that of a proxy in front of it")
    sub.add_argument("--allowed-host", action="append", default=[], help="a further name that the page answers to")
    sub.add_argument("--preview", action="store_true", help="try the page on a copy: votes there are thrown away")
    sub.add_argument("--log", action="store_true", help="print a line for each request, without its link")


def _serve(args: argparse.Namespace, console: Console) -> int:
    from replication.judging.page.server import serve
    from replication.judging.store import Store, hash_token

    base = _base_url(args.base_url) if args.base_url else None
    allowed = [*args.allowed_host, *([str(urlsplit(base).hostname)] if base else [])]
    folder, database = _open(args, only_reads=args.preview)
    if args.preview:
        with TemporaryDirectory() as temporary:
            return _preview(args, database, Path(temporary), base, allowed, console)
    store = Store(database)
    hashed = store.panel().join_sha256
    served = ""

    def say(address: str) -> None:
        nonlocal served
        join = folder.read_secret(folder.join_token)
        served, where = address, base or address
        folder.note_serving(address, where)
        if store.panel().is_locked:
            console.print("[yellow]the panel is locked: the page says so and takes no more votes[/yellow]")
        console.print("Ctrl-C ends it; a vote that is acknowledged is on the disk")
        console.print(f"administrator: {where}/admin   (token: {escape(str(folder.admin_token))})")
        if hashed is None:
            console.print(f"judges:        by invitation, {_command('invite', args.dir, '--judges', 'N')}")
        elif join is None or hash_token(join) != hashed:
            what = "the rest of the link was in" if join is None else "its end is not what stands in"
            console.print(f"judges:        {where}/join/...   ({what} {folder.join_token.name}; by invitation: "
                          f"{_command('invite', args.dir, '--judges', 'N')})")  # fmt: skip
        else:
            console.print(f"judges:        {where}/join/{join}")

    log = console.print if args.log else None
    try:
        serve(store, args.host, args.port, log, allowed_hosts=allowed, ready=say)
    finally:
        folder.forget_serving(served)
    return 0


def _preview(
    args: argparse.Namespace,
    database: Database,
    temporary: Path,
    base: str | None,
    allowed: list[str],
    console: Console,
) -> int:
    from replication.judging.page.server import serve
    from replication.judging.preview import preview

    store, join = preview(database, temporary / "preview.sqlite")

    def say(address: str) -> None:
        console.print("Ctrl-C ends it, and what was voted in it is thrown away; the panel is not touched")
        console.print(f"preview:       {base or address}/join/{join}")

    log = console.print if args.log else None
    serve(store, args.host, args.port, log, allowed_hosts=allowed, ready=say, preview=True)
    store.database.close()
    return 0


# ---------------------------------------------------------------- looking


def _status(args: argparse.Namespace, console: Console) -> int:
    from replication.judging.state import print_state

    folder, database = _open(args, only_reads=True)
    print_state(folder, database, console)
    return 0


# ---------------------------------------------------------------- the lock


def _lock_arguments(sub: Parser) -> None:
    sub.add_argument("--early", metavar="WHY", help="lock before all planned votes are in; the reason is kept")
    sub.add_argument("--yes", action="store_true", help="ask nothing; without a terminal it is needed")


def _lock(args: argparse.Namespace, console: Console) -> int:
    from replication.judging.attendance import fill
    from replication.judging.chosen import IMPORTED
    from replication.judging.export import check_record, check_votes_file, write_record
    from replication.judging.folder import utc
    from replication.judging.panel import lock_panel
    from replication.judging.state import rules_of
    from replication.judging.store import Store

    early = (args.early or "").strip()
    if args.early is not None and not early:
        raise UserError("--early: is empty; say why, in words that are kept")
    folder, database = _open(args)
    rules, planned = rules_of(folder, database)
    panel = Store(database).panel()
    check_votes_file(folder, panel.panel_id)
    if panel.locked_at is not None and early:
        since = utc(panel.locked_at)
        console.print(f"[yellow]the panel is locked already, since {since} UTC: the reason is not taken[/yellow]")
    if not panel.is_locked:
        filled = fill(database, *planned, rules.judge_kinds)
        if filled.n_short:
            console.print(f"[yellow]{filled.n_short} judges gave fewer than the {filled.votes} planned votes: where a "
                          "plan was frozen, the report names that as a departure from it[/yellow]")  # fmt: skip
        _may_be_locked(args, filled, console)
        if filled.is_full and early:
            console.print("[yellow]nothing planned is missing: the reason is not taken[/yellow]")
        early = "" if filled.is_full else early  # it would be read as if votes had been missing
    lock_panel(database, folder.sealed, early, check_record)
    note = write_record(folder, database, rules)
    counts = f"{note['n_votes']} first votes of {note['n_judges']} judges, {note['n_repeats']} repeats"
    console.print(f"votes:        {escape(str(folder.votes))}: {counts}")
    console.print(f"SHA-256:      {note['votes_sha256']}")
    console.print(f"sealed key:   {note['key_sha256']}, as the panel has named it since it was made")
    if note["locked_early_because"]:
        console.print(f"[yellow]locked early:[/yellow] {escape(note['locked_early_because'])}")
    if note["n_repeats_without_first_vote"]:
        console.print(f"left out:     {note['n_repeats_without_first_vote']} repeats of pairs without a first vote")
    _say_test_votes(note, console)
    console.print(f"counts:       {escape(str(folder.marginals))}")
    if folder.has_suite or note["suite"] == IMPORTED:
        console.print(f"next:         {escape(shlex.join(['replicate', 'report', str(folder.root)]))}")
    return 0


def _may_be_locked(args: argparse.Namespace, filled: Fill, console: Console) -> None:
    """Raise UserError unless the panel is full or a reason is given, and whoever asks has confirmed."""
    if not filled.is_full and not (args.early or "").strip():
        raise UserError(f'{filled.sentence}; wait for the others, or give the reason: --early "why", which is kept')
    if args.yes:
        return
    console.print(f"{filled.sentence}. The lock is for good: no vote is taken after it, and the arms become known.")
    if not sys.stdin.isatty():
        raise UserError("replicate judge lock: no terminal to ask on; --yes says that it is meant")
    if input("Lock the panel? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not locked; nothing has changed")


def _export_arguments(sub: Parser) -> None:
    sub.add_argument("--out", type=Path, help="folder for the files (default: DIR/judging, votes.csv in DIR)")


def _export(args: argparse.Namespace, console: Console) -> int:
    from replication.judging.export import write_export, write_record
    from replication.judging.state import rules_of

    folder, database = _open(args, only_reads=True)
    rules, _ = rules_of(folder, database)
    target = folder if args.out is None else replace(folder, root=args.out, judging=args.out)
    _say_test_votes(write_record(target, database, rules), console)
    for path in (target.votes, target.marginals, *write_export(target, database)):
        console.print(f"wrote {escape(str(path))}")
    return 0


def _say_test_votes(note: Mapping[str, Any], console: Console) -> None:
    if note["n_test_votes"]:
        console.print(f"left out:     {note['n_test_votes']} votes of test judges")


ARGUMENTS: dict[str, Callable[[Parser], None]] = {
    "prepare": _prepare_arguments,
    "invite": _invite_arguments,
    "serve": _serve_arguments,
    "lock": _lock_arguments,
    "export": _export_arguments,
}
ACTIONS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "prepare": _prepare,
    "invite": _invite,
    "serve": _serve,
    "status": _status,
    "lock": _lock,
    "export": _export,
}
