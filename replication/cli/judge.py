"""`replicate judge ACTION`: make a panel, hand out links, serve the page, ask models, lock, export."""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Column, Table

from replication.cli.arguments import COUNT, NATURAL, actions, folder, number, takes, whole
from replication.console import plural, say, table, utc
from replication.errors import UserError, install

if TYPE_CHECKING:
    from replication.judging.database import Database
    from replication.judging.folder import PanelFolder
    from replication.judging.progress import Fill, Overview

MOVED = {"rehearse": "load", "blinding": "blinding"}
"""Earlier actions that a checkout has as a test of the page: their names there."""
BASE_URL = "http://127.0.0.1:8765"
PACKAGES = "sqlalchemy psycopg fastapi starlette uvicorn python_multipart openai httpx aiohttp sklearn"
"""Of the extra `judge`."""
DIR = takes("dir", "output folder of a suite", folder, metavar="DIR")
DATABASE = takes(
    "--database",
    "panel in another database: a file, or a URL such as postgresql://user@host/name (default: "
    "DIR/judging/judging.sqlite)",
    metavar="URL",
)
KEY = takes("--key", "folder of the sealed key (default: DIR/sealed)", folder, metavar="FOLDER")
DASH = "–"
WIDEST_NAME = 14  # that 80 columns hold beside the counts; a longer one goes on in the next line


def judge(argv: Sequence[str]) -> int:
    """The verb: the actions below, and one line for a package that is missing or a database that refuses."""
    if argv and argv[0] in MOVED:
        raise UserError(
            f"replicate judge {argv[0]}: is `python tests/load_test {MOVED[argv[0]]}` now, in a checkout of the project"
        )
    try:
        from replication.cli.judge_models import model, sheet

        acts = (prepare, invite, serve, status, model, sheet, reclaim, lock, withdraw, export)
        return actions("judge", "People and models compare completions of two arms, blind.", *acts)(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PACKAGES.split():
            raise
        raise UserError(f"replicate judge: the package {error.name} is missing; {install('judge')}") from None
    except Exception as error:
        if type(error).__module__ != "sqlalchemy.exc" or not hasattr(error, "orig"):
            raise
        line = str(error.orig).strip().splitlines()[0]
        raise UserError(
            f"--database: refused what was asked of it ({line}); fix that there, or name another"
        ) from error


_console = partial(Console, highlight=False, soft_wrap=True)


def open_panel(args: Namespace, only_reads: bool = False) -> tuple[PanelFolder, Database]:
    from replication.judging.folder import find_panel

    folder = find_panel(args.dir)
    folder.sealed = vars(args).get("key") or folder.sealed
    return folder, folder.open(args.database, only_reads)


def _command(*words: object) -> str:
    return shlex.join(["replicate", "judge", *map(str, words)])


def _fact(console: Console, name: str, text: object, style: str = "") -> None:
    """One line of a name and what is to be said of it, in two columns."""
    say(console, (f"{name}:".ljust(14), style), str(text))


def _warn(console: Console, text: str) -> None:
    say(console, text, style="yellow")


@DIR
@takes("--pair", "baseline and treatment (default: those of the suite's analysis)", metavar="A,B", either=False)
@takes("--arms", "three arms or more, each compared with each at the same seed", metavar="A,B,C", either=False)
@takes("--pairs", "all: as --arms with every arm of the suite", choices=["all"], either=False)
@takes("--setting", "completions of a named way of sampling (default: those that the suite asks for)", metavar="NAME")
@takes("--judges", "people, each with a set of pairs (default: the suite's analysis)", NATURAL)
@takes("--votes", "first votes of a set (default: the suite's analysis)", COUNT)
@takes("--repeats", "share of a set that comes again, sides swapped (default 0.1)", number("[0, 0.5]"), 0.1)
@takes("--attention", "attention items of a set (default 0)", NATURAL, 0)
@takes("--no-survey", "ask people nothing about themselves", bool)
@takes("--invite-only", "no open link: each judge needs a link of their own", bool)
@takes(
    "--import",
    "completions that the published A/B tool exports, in place of a suite's",
    Path,
    dest="file",
    metavar="FILE",
)
@takes("--study", "what judges are told and asked (default: the plan's, or studies/default.yaml)", metavar="FILE")
@takes("--key-to", "seal the key in this folder, such as a custodian's (default: DIR/sealed)", Path, metavar="FOLDER")
@DATABASE
def prepare(args: Namespace) -> None:
    """Make a panel from the completions of two arms or more: items, sealed key, a set of pairs for each judge."""
    from replication.config.study import load_study
    from replication.judging.completions import deviations, from_file, from_suite
    from replication.judging.database import Database
    from replication.judging.folder import PanelFolder
    from replication.judging.panel import PanelOptions, create_panel
    from replication.judging.store import Store
    from replication.runs.layout import SuiteDir
    from replication.runs.ledger import append

    console, folder = _console(), PanelFolder(args.dir, SuiteDir(args.dir).judging)
    if args.file is None and not args.dir.is_dir():
        raise UserError(f"{args.dir}: no such folder; give the output folder of `replicate grid run`")
    for flag in ("pair", "arms", "pairs", "setting"):
        if args.file is not None and getattr(args, flag):
            raise UserError(f"--{flag}: does not act with --import; the file names its two models")
    asked = (args.dir, args.pair, args.arms or args.pairs, args.setting or "")
    chosen = from_file(args.file) if args.file is not None else from_suite(*asked)
    for line in chosen.left_out:
        _warn(console, line)
    n_judges = chosen.analysis.judges if args.judges is None else args.judges
    votes, n_pairs = args.votes or chosen.analysis.votes_per_judge, chosen.n_pairs
    if args.votes is None and args.file is not None and n_pairs < votes:
        _warn(console, f"the file has {n_pairs} pairs of completions: a set is all of them, not {votes}")
        votes = n_pairs
    layers = [name for name in ("imported" if args.file is not None else None, args.study) if name]
    planned = chosen.plan.study if chosen.plan and not args.study else None
    options = PanelOptions(
        judges=n_judges,
        votes_per_judge=votes,
        repeat_share=args.repeats,
        attention=args.attention,
        survey=not args.no_survey,
        open_link=not args.invite_only and n_judges > 0,
        study=planned or load_study(*layers),
    )
    folder.sealed = args.key_to or folder.sealed
    database = Database(args.database or folder.database_file)
    sources = (chosen.suite, chosen.completions, chosen.arms)
    tokens = create_panel(database, folder.sealed, *sources, options, keep=folder.keep_tokens)
    folder.write_facts(database, options, is_named=bool(args.database), setting=chosen.setting)
    about = Store(database).panel()
    append(folder.suite, "panel", panel_id=about.panel_id, key_sha256=about.key_sha256)
    for line in deviations(chosen, options.judges, options.votes_per_judge, options.study):
        _warn(console, line)
    known = (options.attention, "attention item"), (len(options.study.gold), "gold pair")
    more = [plural(n, one) for n, one in ((options.n_repeats, "repeat"), *known) if n]
    parts = [plural(votes, "pair"), *more]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if more else parts[0]
    seeds = plural(len(chosen.completions), "seed")
    _fact(console, "panel", f"{plural(n_judges, 'set')} of {listed}, {seeds}, in {database.name}")
    _fact(console, "sealed key", f"{folder.sealed / 'key.json'}; the page neither needs nor reads it")
    if not n_judges:
        _fact(console, "judges", f"models, {_command('model', args.dir)} ...; people by `replicate judge invite`")
    elif tokens.join is None:
        _fact(console, "links", _command("invite", args.dir, "--judges", n_judges))
    _fact(console, "next", f"{_command('serve', args.dir)}   (opens the page, prints its links)")


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, half a bracket
        is_one = False
    if not is_one or parts.query or parts.fragment or any(c.isspace() for c in text):
        raise argparse.ArgumentTypeError(f"'{text}' is no address such as https://judge.example.org")
    return text.rstrip("/")


@DIR
@takes("--judges", "links for so many people", COUNT, metavar="N")
@takes("--judge-id", "a new link for each; the old one stops working", nargs="+", metavar="NAME")
@takes("--test", "links to try the page: votes by them enter no record and no count", bool)
@takes("--base-url", f"where the page is reached (default: where it is served, or {BASE_URL})", _base_url)
@takes("--csv", "print judge_id,link instead of a table", bool)
@KEY
@DATABASE
def invite(args: Namespace) -> None:
    """Links for people: to sets that nobody has yet, then to further ones; or a new link for a judge."""
    from replication.judging import panel

    if (args.judges is None) == (args.judge_id is None):
        raise UserError("replicate judge invite: give --judges N, or --judge-id NAME")
    if args.test and args.judge_id:
        raise UserError("--test: goes with --judges N; a judge stays what they were made as")
    folder, database = open_panel(args)
    further = 0
    if args.judge_id:
        tokens = panel.invite(database, args.judge_id)
    elif args.test:
        tokens, _ = panel.invite_people(database, folder.sealed, args.judges, test=True)
    else:
        tokens, further = panel.invite_people(database, folder.sealed, args.judges)
    base = args.base_url or folder.served_at()
    if base is None:
        base = BASE_URL
        _warn(
            Console(stderr=True),
            f"the page is not served from here now: the links name {base}, where `replicate judge serve` opens it "
            "unless told otherwise; --base-url names another address",
        )
    links = [(name, f"{base}/j/{token}") for name, token in tokens.items()]
    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([("judge_id", "link"), *links])
        return
    shown = table("Links; each is a judge's own and is shown this once", ["judge_id", "link"], links)
    Console(width=max(_console().width, 110)).print(shown)
    if further:
        say(_console(), f"{further} of them are further sets: every planned one has its judge")


@DIR
@takes("--host", "address to listen on (default 127.0.0.1: this machine alone)", default="127.0.0.1")
@takes("--port", "(default 8765; 0: any free one)", whole(0, 65535), 8765)
@takes("--base-url", "where judges reach the page, if not there: that of a proxy in front of it", _base_url)
@takes("--allowed-host", "a further name that the page answers to", default=[], action="append")
@takes("--preview", "try the page on a copy: votes there are thrown away", bool)
@takes("--log", "print a line for each request, without its link", bool)
@DATABASE
def serve(args: Namespace) -> None:
    """Open the page on which people vote."""
    from replication.judging.page import server
    from replication.judging.panel import preview
    from replication.judging.store import Store, hash_token

    console, base = _console(), args.base_url
    allowed = [*args.allowed_host, *([str(urlsplit(base).hostname)] if base else [])]
    log = console.print if args.log else None
    folder, database = open_panel(args, only_reads=args.preview)
    if args.preview:
        with TemporaryDirectory() as temporary:
            copy, link = preview(database, Path(temporary) / "preview.sqlite")

            def say_preview(address: str) -> None:
                say(console, "Ctrl-C ends it, and what was voted in it is thrown away; the panel is not touched")
                say(console, f"preview:       {base or address}/join/{link}")

            server.serve(copy, args.host, args.port, log, allowed_hosts=allowed, ready=say_preview, preview=True)
            copy.database.close()
        return
    store = Store(database)
    hashed = store.panel().join_sha256
    served = ""

    def say_where(address: str) -> None:
        nonlocal served
        join = folder.read_join_token()
        served, where = address, base or address
        folder.note_serving(address, where)
        if store.panel().is_locked:
            _warn(console, "the panel is locked: the page says so and takes no more votes")
        say(console, "Ctrl-C ends it; a vote that is acknowledged is on the disk")
        say(console, f"administrator: {where}/admin   (token: {folder.admin_token})")
        command = _command("invite", args.dir, "--judges", "N")
        if hashed is None:
            links = f"by invitation, {command}"
        elif join is None or hash_token(join) != hashed:
            what = "the rest of the link was in" if join is None else "its end is not what stands in"
            links = f"{where}/join/...   ({what} {folder.join_token.name}; by invitation: {command})"
        else:
            links = f"{where}/join/{join}"
        say(console, f"judges:        {links}")

    try:
        server.serve(store, args.host, args.port, log, allowed_hosts=allowed, ready=say_where)
    finally:
        folder.forget_serving(served)


@DIR
@DATABASE
def status(args: Namespace) -> None:
    """How far each judge is, and the panel from its plan; no arm is known."""
    print_state(*open_panel(args, only_reads=True), _console())


def print_state(folder: PanelFolder, database: Database, console: Console) -> None:
    """Judges, votes, sides, coverage, and how far from the plan; no arm."""
    from replication.judging.progress import fill, gather
    from replication.judging.store import Store

    o = gather(database)
    console.print(_judges(o), soft_wrap=False)
    if o.n_unclaimed:
        _fact(console, "not taken", f"{o.n_unclaimed} sets")
    _fact(console, "votes", f"{o.votes.part} of {o.votes.whole}, repeats and attention items included")
    if o.left.value is not None and (chance := o.left.chance()) is not None:
        low, high = chance
        share = f"{100 * o.left.value:.1f} % of {o.left.whole} decisive first votes"
        _fact(console, "left", f"{share}; by chance {100 * low:.1f} to {100 * high:.1f} %")
    if o.n_test_judges:
        _fact(console, "left out", f"{o.n_test_votes} votes of {o.n_test_judges} test judges, here and everywhere")
    cast = [sum(share.part for share in prompt.votes.values()) for prompt in o.coverage]
    none = f"; {cast.count(0)} with none" if 0 in cast else ""
    each = f"{len(cast)} prompts, each with {min(cast)} to {max(cast)} first votes{none}" if cast else "no prompts"
    _fact(console, "coverage", each)
    _fact(console, "plan", fill(database, folder.rules(Store(database).panel())).sentence)
    if at := o.panel.locked_at:
        early = f", early: {o.panel.lock_note}" if o.panel.lock_note else ""
        _fact(console, "locked", utc(at, "minutes") + early)


def _judges(o: Overview) -> Table:
    names = [j.judge_id + (f" ({j.vendor or 'model'})" if j.kind == "model" else "") for j in o.judges]
    widest = max([len("judge"), *(len(word) for name in names for word in name.split())])
    column = Column("judge", overflow="fold", min_width=min(widest, WIDEST_NAME))
    heads = [">votes", ">ties", ">both bad", ">left", ">median s", ">attention", ">repeats alike"]
    rows = [
        (
            name,
            f"{j.votes.part}/{j.votes.whole}",
            *(DASH if p.value is None else f"{100 * p.value:.0f} %" for p in (j.ties, j.both_bad, j.left)),
            DASH if j.median_seconds is None else f"{j.median_seconds:.1f}",
            *(f"{p.part}/{p.whole}" if p.whole else DASH for p in (j.attention, j.repeats_alike)),
        )
        for name, j in zip(names, o.judges, strict=True)
    ]
    return table(f"{o.panel.suite}: judges", [column, *heads], rows)


@DIR
@takes("--early", "lock before all planned votes are in; the reason is kept", metavar="WHY")
@takes("--yes", "ask nothing; without a terminal it is needed", bool)
@KEY
@DATABASE
def lock(args: Namespace) -> None:
    """Close the panel for good, open the seal, write votes.csv for the report."""
    from replication.judging.completions import IMPORTED
    from replication.judging.panel import lock_panel
    from replication.judging.progress import fill
    from replication.judging.record import check_record, check_votes_file, iso, write_votes_record
    from replication.judging.seal import read_by_others
    from replication.judging.store import Store
    from replication.runs.ledger import append

    console, early = _console(), (args.early or "").strip()
    if args.early is not None and not early:
        raise UserError("--early: is empty; say why, in words that are kept")
    folder, database = open_panel(args)
    panel = Store(database).panel()
    rules = folder.rules(panel)
    check_votes_file(folder, panel.panel_id)
    if panel.locked_at is None:
        filled = fill(database, rules)
        if filled.n_short:
            _warn(
                console,
                f"{filled.n_short} judges gave fewer than the {filled.votes} planned votes: where a plan was "
                "registered, the report names that as a deviation from it",
            )
        _confirm(filled, bool(early), args.yes, console)
        if filled.is_full and early:
            _warn(console, "nothing planned is missing: the reason is not taken")
            early = ""  # it would be read as if votes had been missing
    elif early:
        _warn(console, f"the panel is locked already, since {utc(panel.locked_at)} UTC: the reason is not taken")
    key_read_at = read_by_others(folder.sealed) if panel.locked_at is None else None
    lock_panel(database, folder.sealed, early, check_record)
    note = write_votes_record(folder, database, rules, iso(key_read_at) if key_read_at else None)
    facts = {"panel_id": note.panel_id, "key_sha256": note.key_sha256, "votes_sha256": note.votes_sha256}
    append(folder.suite, "lock", **facts, early=note.locked_early_because, key_read_at=note.key_read_at)
    counts = f"{note.n_votes} first votes of {note.n_judges} judges, {note.n_repeats} repeats"
    _fact(console, "votes", f"{folder.suite.votes}: {counts}")
    _fact(console, "SHA-256", note.votes_sha256)
    _fact(console, "sealed key", f"{note.key_sha256}, as the panel has named it since it was made")
    if note.key_read_at:
        _fact(console, "key read", f"at {note.key_read_at}, by something else than these commands", style="yellow")
    if note.locked_early_because:
        _fact(console, "locked early", note.locked_early_because, style="yellow")
    if note.n_repeats_without_first_vote:
        _fact(console, "left out", f"{note.n_repeats_without_first_vote} repeats of pairs without a first vote")
    if note.n_test_votes:
        _fact(console, "left out", f"{note.n_test_votes} votes of test judges")
    for name, why in (note.excluded or {}).items():
        _fact(console, "excluded", f"{name}, by the study's rule: {why}")
    _fact(console, "counts", folder.marginals)
    if folder.suite.suite.is_file() or note.suite == IMPORTED:
        _fact(console, "next", shlex.join(["replicate", "report", str(folder.root)]))


def _confirm(filled: Fill, has_reason: bool, yes: bool, console: Console) -> None:
    """Raise UserError unless the panel is full or a reason is given, and whoever asks has confirmed."""
    if not filled.is_full and not has_reason:
        raise UserError(f'{filled.sentence}; wait for the others, or give the reason: --early "why", which is kept')
    if yes:
        return
    console.print(f"{filled.sentence}. The lock is for good: no vote is taken after it, and the arms become known.")
    if not sys.stdin.isatty():
        raise UserError("replicate judge lock: no terminal to ask on; --yes says that it is meant")
    if input("Lock the panel? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not locked; nothing has changed")


@DIR
@takes("--export", "a CSV of submissions: those returned or timed out there", Path, metavar="FILE", either=True)
@takes("--judge-id", "these, named by `replicate judge status`", nargs="+", metavar="NAME", either=True)
@DATABASE
def reclaim(args: Namespace) -> None:
    """Give the places of those who left to whoever comes next; the votes of a returned one are withdrawn."""
    from replication.judging import recruits
    from replication.runs.withdrawn import read_withdrawals
    from replication.runs.withdrawn import withdraw as withdraw_from

    folder, database = open_panel(args)
    gone = recruits.gave_up(database, args.export) if args.export else dict.fromkeys(args.judge_id, "left")
    for name, why in gone.items():
        successor = recruits.reclaim(database, name)
        if successor:
            _fact(_console(), why, f"{name}; {successor} has the same pairs, and is free")
        if why == recruits.RETURNED and name not in read_withdrawals(folder.suite).of("judge"):
            withdraw_from(folder.suite, "judge", name, "returned the place, and with it the consent")
    say(_console(), f"{len(gone)} who left; the open link and `{_command('invite', args.dir)}` give free places")


@DIR
@takes("judge", "its name in votes.csv, or in `replicate judge status`", metavar="JUDGE")
@takes("--why", "the reason, which the report quotes", required=True)
@DATABASE
def withdraw(args: Namespace) -> None:
    """Leave a judge out of every statistic, for good; the votes are kept, and the report says so."""
    from sqlalchemy import select

    from replication.judging.schema import judges
    from replication.runs.layout import SuiteDir
    from replication.runs.withdrawn import withdraw as withdraw_from
    from replication.votes.record import read_votes

    suite_dir = SuiteDir(args.dir)
    if args.judge not in {vote.judge_id for vote in read_votes(suite_dir.votes)}:
        with open_panel(args, only_reads=True)[1].read() as c:
            if c.execute(select(judges.c.judge_id).where(judges.c.judge_id == args.judge)).first() is None:
                raise UserError(f"{args.judge}: is no judge of this panel; `replicate judge status` names them")
    withdraw_from(suite_dir, "judge", args.judge, args.why)
    _fact(_console(), "withdrawn", f"{args.judge}; `replicate report {args.dir}` leaves the votes out, and says why")


@DIR
@takes("--out", "folder for the files (default: DIR/judging, votes.csv in DIR)", Path)
@takes("--dataset", "the votes with prompt and texts too: Parquet, JSONL and a card, for datasets.load_dataset", Path)
@takes("--license", "of the dataset, for its card (default: unknown)", default="unknown", metavar="NAME")
@DATABASE
def export(args: Namespace) -> None:
    """After the lock: votes, counts, judges and models' answers as files."""
    from replication.judging.dataset import write_dataset
    from replication.judging.folder import PanelFolder
    from replication.judging.record import write_export, write_votes_record
    from replication.judging.store import Store
    from replication.runs.records import read_record
    from replication.votes.record import VotesNote

    console = _console()
    folder, database = open_panel(args, only_reads=True)
    rules = folder.rules(Store(database).panel())
    target = folder if args.out is None else PanelFolder(args.out, args.out)
    known = read_record(folder.suite.votes_note, VotesNote) or VotesNote()
    n_test_votes = write_votes_record(target, database, rules, known.key_read_at).n_test_votes
    if n_test_votes:
        _fact(console, "left out", f"{n_test_votes} votes of test judges")
    written = [target.suite.votes, target.marginals, *write_export(target, database)]
    if args.dataset:
        written += write_dataset(folder, database, args.dataset, args.license)
    for path in written:
        say(console, f"wrote {path}")
