"""`python tests/load_test load`: the page's server under a crowd of judges, killed in the middle; its votes counted.

The panel is thrown away: synthetic texts, a database of its own. The server is the product's own, in a process of its
own; so are the judges. SIGKILL comes at moments drawn at random, the server is started again at once, and the judges
press again where no answer came. Some leave for good, and their places are reclaimed by what the recruiting site says
of them while the others vote; there are as many sets as judges, so that whoever comes instead has to get one of those.
In the end every vote that a judge was told is stored must be in the database, once, and every set must be whole.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from durability import compare
from latency import TURN, latencies, quiet
from load_report import Kill, LoadTest, Outcome, as_json, print_outcome
from rich.console import Console
from server_child import ServerChild
from synthetic import ARMS, PROMPTS, SAMPLES, completions
from virtual_users import LEFT, Crowd, Notes, Request, Said

from replication.cli.arguments import COUNT, NATURAL, POSITIVE, number
from replication.data.prompts import load_prompts
from replication.judging.database import Database
from replication.judging.panel import PanelOptions, create_panel, invite
from replication.judging.progress import judge_progress
from replication.judging.recruits import gave_up, reclaim
from replication.judging.schema import LEFT as LEFT_THE_SET
from replication.runs.files import read_json, write_json
from replication.runs.layout import SuiteDir

SETTLING_SECONDS = 3.0
"""After a killed server answers again: what the crowd needs to come to rest, and is not counted as quiet."""
JOIN_SHARE = 0.5
"""Of the judges, by the open link; the others by their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `load`."""
    parser.add_argument("--judges", type=COUNT, default=200, help="people at once (default 200)")
    parser.add_argument("--think-seconds", type=POSITIVE, default=3.0, help="mean time before a choice (default 3)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--votes-per-judge", type=COUNT, default=30, help="first votes of each (default 30)")
    length.add_argument("--minutes", type=POSITIVE, help="about how long, instead of a number of votes")
    parser.add_argument("--kills", type=NATURAL, default=5, help="times the server is killed and restarted (default 5)")
    parser.add_argument("--drop-out", type=number(f"[0, {JOIN_SHARE}]"), default=0.3, metavar="SHARE",
                        help="of the judges who leave for good before the end (default 0.3)")  # fmt: skip
    parser.add_argument("--database", metavar="URL", help="an empty database, such as postgresql://user@host/name "
                        "(default: SQLite in DIR)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the panel, the judges' notes and "
                        "load_test.json there (default: a folder that is removed)")  # fmt: skip
    parser.add_argument("--seed", type=NATURAL, default=0, help="of texts, choices and kills (default 0)")
    parser.add_argument("--p99-ms", type=POSITIVE, help="milliseconds that 99 of 100 requests must stay under, outside "
                        "of the seconds around a kill (default 250 on SQLite, 400 elsewhere)")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> int:
    """The command: 0 where nothing was lost and the page was fast."""
    votes = (
        args.votes_per_judge if args.minutes is None else math.ceil(60 * args.minutes / max(args.think_seconds, 0.1))
    )
    p99_ms = args.p99_ms or (400.0 if args.database else 250.0)
    asked = LoadTest(args.judges, args.think_seconds, votes, args.kills, args.seed, p99_ms, args.drop_out)
    with _folder(args.out) as folder:
        outcome = run_load_test(asked, folder, args.database, console)
        if args.out:
            write_json(folder / "load_test.json", as_json(outcome))
    print_outcome(outcome, console)
    if args.out:
        console.print(f"every figure: {args.out / 'load_test.json'}", soft_wrap=True)
    return 0 if outcome.holds and outcome.is_fast else 1


def run_load_test(asked: LoadTest, folder: Path, url: str | None, console: Console) -> Outcome:
    """Make a panel, let the crowd in, kill the server, count.

    Args:
        asked: see LoadTest.
        folder: for the panel, what the judges were told and the server's log.
        url: of an empty database; None: SQLite in the folder.
        console: for progress.

    Raises:
        UserError: the database holds a panel already, or does not answer.
    """
    suite = SuiteDir(folder)
    suite.judging.mkdir(parents=True, exist_ok=True)
    address = url or str(suite.judging / "panel.sqlite")
    database, server = Database(address), ServerChild(address, folder / "server.log")
    try:
        with console.status("making a panel of synthetic texts") as status:
            crowd = _make_panel(asked, suite, database, server.base)
            write_json(folder / "crowd.json", asdict(crowd))
            (folder / "virtual_users.json").unlink(missing_ok=True)
            server.start()
            began = time.monotonic()
            site = RecruitingSite(folder / "submissions.csv", database)
            kills = _let_in(asked, folder, server, site, status.update)
            seconds = time.monotonic() - began
            server.stop()
        return _outcome(asked, database, _read_notes(folder), site, kills, seconds, server.cpu_seconds)
    finally:
        server.stop()
        database.close()


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="load-test-") as name:
        yield Path(name)


def _make_panel(asked: LoadTest, suite: SuiteDir, database: Database, base: str) -> Crowd:
    """A panel of synthetic texts with links for all; who comes, and by which link."""
    n_pairs = len(load_prompts(PROMPTS)) * SAMPLES * SAMPLES
    n_seeds = max(3, math.ceil(asked.votes_per_judge / n_pairs))
    n_join = round(JOIN_SHARE * asked.judges)
    options = PanelOptions(asked.judges, asked.votes_per_judge, attention=1)
    tokens = create_panel(database, suite.sealed, "load test", completions(n_seeds, asked.seed), ARMS, options)
    names = [f"judge-{n:03d}" for n in range(1, asked.judges - n_join + 1)]
    links = list(invite(database, names).values())
    return Crowd(
        base,
        links,
        tokens.join,
        n_join,
        asked.think_seconds,
        asked.n_leave,
        max(0, asked.votes_per_judge - 2),
        seed=asked.seed,
    )


class RecruitingSite:
    """What a site knows of those it sent: its list of submissions, and a researcher who reclaims places by it."""

    def __init__(self, export: Path, database: Database) -> None:
        self.export, self.database = export, database
        self.left: list[str] = []
        self.n_reclaimed = 0

    def note(self, participant: str) -> None:
        """Somebody left, by returning the place or by letting its time run out."""
        self.left.append(participant)
        rows = [f"{name},{('RETURNED', 'TIMED-OUT')[n % 2]}" for n, name in enumerate(self.left)]
        self.export.write_text("\n".join(["Participant id,Status", *rows, ""]))
        for judge in gave_up(self.database, self.export):
            self.n_reclaimed += reclaim(self.database, judge) is not None


def _let_in(
    asked: LoadTest, folder: Path, server: ServerChild, site: RecruitingSite, say: Callable[[str], None]
) -> list[Kill]:
    """Start the crowd, kill the server at the drawn moments, wait for the last judge."""
    command = [sys.executable, str(Path(__file__).parent), "virtual-users", str(folder)]
    kills: list[Kill] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as crowd:
        try:
            began = time.monotonic()
            lines = threading.Thread(target=_pass_on, args=(crowd, kills, site, say), daemon=True)
            lines.start()
            for moment in _moments(asked):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    crowd.wait(max(0.0, began + moment - time.monotonic()))
                if crowd.poll() is not None:
                    break
                at = time.monotonic()
                server.kill()
                server.start()
                kills.append(Kill(at, time.monotonic()))
            if crowd.wait() != 0:
                raise RuntimeError("the judges' own process failed; its words stand above")
            lines.join()
        finally:
            if crowd.poll() is None:
                crowd.kill()
    return kills


def _pass_on(crowd: subprocess.Popen[str], kills: list[Kill], site: RecruitingSite, say: Callable[[str], None]) -> None:
    assert crowd.stdout is not None
    for line in crowd.stdout:
        if line.startswith(LEFT):
            site.note(line.split()[1])
            continue
        say(f"{line.strip()} votes acknowledged, {len(kills)} kills")


def _moments(asked: LoadTest) -> list[float]:
    """Seconds from the start: one in each part of the middle of the load test."""
    rng = random.Random(f"{asked.seed}/kills")
    length = asked.votes_per_judge * asked.think_seconds
    part = 0.75 * length / max(1, asked.kills)
    return [0.1 * length + part * (k + rng.random()) for k in range(asked.kills)]


def _read_notes(folder: Path) -> Notes:
    values = read_json(folder / "virtual_users.json")
    requests, said = [Request(**r) for r in values["requests"]], [Said(**s) for s in values["said"]]
    return Notes(**(values | {"requests": requests, "said": said}))


def _outcome(
    asked: LoadTest,
    database: Database,
    notes: Notes,
    site: RecruitingSite,
    kills: list[Kill],
    seconds: float,
    cpu_seconds: float,
) -> Outcome:
    faults = list(notes.faults)
    if not len(site.left) == site.n_reclaimed == asked.n_leave:
        faults.append(f"{asked.n_leave} were to leave, {len(site.left)} left, {site.n_reclaimed} places were reclaimed")
    # a set that nobody finished must be one that was given up
    short = [row for row in judge_progress(database) if row.votes.part < row.votes.whole and row.vendor != LEFT_THE_SET]
    faults += [f"{row.judge_id}: the set was not finished, and nobody left it" for row in short]
    if len(kills) < asked.kills:
        faults.append(f"only {len(kills)} of {asked.kills} kills came before the last judge had finished")
    votes = compare(notes.said, database)
    windows = [(kill.at, kill.up_at + SETTLING_SECONDS) for kill in kills]
    n_requests = sum(r.tries for r in notes.requests if r.kind != TURN)
    return Outcome(
        asked=asked,
        database=database.engine.dialect.name,
        seconds=seconds,
        kills=kills,
        quiet=latencies(quiet(notes.requests, windows), asked.think_seconds),
        overall=latencies(notes.requests, asked.think_seconds),
        votes_per_second=votes.acknowledged / seconds,
        requests=n_requests,
        server_cpu_ms_per_request=1000 * cpu_seconds / n_requests,
        server_cpu_share=cpu_seconds / seconds,
        lag_ms_p99=float(1000 * np.percentile(notes.lags, 99)),
        finished=notes.finished,
        left=len(site.left),
        votes=votes,
        faults=faults,
    )
