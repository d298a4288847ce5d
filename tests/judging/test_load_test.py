"""The load test: a crowd on the real server, which is killed; and a comparison that finds what was lost or made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import load_test
import numpy as np
import pytest
from browsing import PageReader
from durability import Comparison, compare
from judging_setup import make_panel
from latency import TURN, Latency, corrected, latencies, quiet
from load_report import LoadTest, Outcome
from postgres_server import PostgresServer
from rich.console import Console
from sqlalchemy import delete, insert, select, text, update
from starlette.testclient import TestClient
from virtual_users import Request, Said, _told

from replication.cli.arguments import Parser
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.page.server import create_app
from replication.judging.panel import invite
from replication.judging.schema import votes
from replication.judging.store import Store, hash_token
from replication.runs.files import read_json

SHORT = ["--judges=20", "--think-seconds=.2", "--votes-per-judge=5", "--kills=1", "--p99-ms=60000"]


def loaded(*flags: str) -> int:
    parser = Parser()
    load_test.add_arguments(parser)
    return load_test.run(parser.parse_args([*SHORT, *flags]), Console(quiet=True))


def test_nothing_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    assert loaded(f"--out={tmp_path}") == 0
    found = read_json(tmp_path / "load_test.json")
    assert found["verdict"]["holds"]
    assert len(found["kills"]) == 1
    assert found["finished"] == 20
    assert found["left"] == 6
    # 5 first votes, a repeat and an attention item each; undone ones come again; and those of the six who left
    assert 20 * 7 <= found["votes"]["standing"] <= 20 * 7 + 6 * 7
    assert found["votes"]["undone"] > 0
    assert found["votes"]["acknowledged"] >= found["votes"]["standing"]
    assert found["server_cpu_ms_per_request"] > 0
    assert {row["kind"] for row in found["overall"]} >= {
        "page",
        "vote",
        "undo",
        "join",
        "start",
        "survey",
        "static",
        TURN,
    }


def test_on_postgresql_too(tmp_path: Path, postgres: PostgresServer) -> None:
    url = postgres.new_database()
    flags = ["--judges=8", "--votes-per-judge=4", f"--database={url}", f"--out={tmp_path}"]
    assert loaded(*flags) == 0
    assert read_json(tmp_path / "load_test.json")["database"] == "postgresql"
    with pytest.raises(UserError, match="panel"):  # never into a database that is in use
        loaded(*flags[:3], f"--out={tmp_path / 'again'}")


def test_mistakes_are_one_line() -> None:
    for flag in ("--judges=0", "--votes-per-judge=0", "--kills=-1", "--think-seconds=0"):
        with pytest.raises(UserError, match=flag.split("=")[0]):
            loaded(flag)


# ---------------------------------------------------------------- the comparison


@pytest.fixture
def voted(tmp_path: Path) -> tuple[Database, list[Said]]:
    """A panel with votes, one of them undone, and what their judges were told."""
    made = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", judges=2, votes_per_judge=4)
    store, said = Store(made.database), []
    for name, token in invite(made.database, made.names).items():
        for choice in ("left", "right", "tie"):
            shown = store.show(name)
            assert shown is not None
            store.vote(name, shown.impression, choice)
            said.append(Said("vote", hash_token(token), shown.impression, choice, "stored", 1))
    assert store.undo(name, shown.impression)
    said.append(Said("undo", hash_token(token), shown.impression, "", "stored", 1))
    return made.database, said


def faults(voted: tuple[Database, list[Said]]) -> str:
    database, said = voted
    return "\n".join(compare(said, database).faults)


def test_a_true_record_has_no_fault(voted: tuple[Database, list[Said]]) -> None:
    found = compare(voted[1], voted[0])
    assert found == Comparison(sent=6, acknowledged=6, told_twice=0, undone=1, in_database=6, standing=5, faults=[])


def test_a_lost_vote_is_found(voted: tuple[Database, list[Said]]) -> None:
    with voted[0].write() as c:
        c.execute(delete(votes).where(votes.c.showing == voted[1][0].impression))
    assert faults(voted).endswith("is lost")
    voted[1][0].told = "stored already"  # these words are no better than the record
    assert faults(voted).endswith("is lost")
    voted[1][0].told = "nothing"  # an answer that never came promises nothing
    assert faults(voted) == ""


def test_a_changed_vote_is_found(voted: tuple[Database, list[Said]]) -> None:
    with voted[0].write() as c:
        c.execute(update(votes).where(votes.c.showing == voted[1][0].impression).values(choice="both_bad"))
    assert faults(voted).endswith("stands there as both_bad")


def test_a_doubled_vote_is_found(voted: tuple[Database, list[Said]]) -> None:
    with voted[0].write() as c:
        c.execute(text("DROP INDEX judging_one_vote_an_assignment"))  # else the database refuses it
        row = c.execute(select(votes).where(votes.c.showing == voted[1][0].impression)).one()
        again = {**row._mapping, "vote_id": 99, "showing": "another"}
        c.execute(insert(votes).values(again))
    assert "was sent by nobody" in faults(voted)
    assert "has 2 standing votes" in faults(voted)


def test_another_judge_s_vote_is_found(voted: tuple[Database, list[Said]]) -> None:
    voted[1][0].token_sha256 = voted[1][-1].token_sha256
    assert "as another judge's" in faults(voted)


def test_wrong_undos_are_found(voted: tuple[Database, list[Said]]) -> None:
    database, said = voted
    undone = said[-1].impression
    with database.write() as c:
        c.execute(update(votes).where(votes.c.showing == said[0].impression).values(undone_at=1.0))
    assert faults(voted).endswith("was undone by nobody")
    with database.write() as c:
        c.execute(update(votes).where(votes.c.showing == said[0].impression).values(undone_at=None))
        c.execute(update(votes).where(votes.c.showing == undone).values(undone_at=None))
    assert faults(voted).endswith("stands, though its undo was acknowledged")
    said[-1].told, said[-1].tries = "refused", 2  # the first answer was lost: either may be
    assert faults(voted) == ""


def test_a_refused_vote_must_not_be_there(voted: tuple[Database, list[Said]]) -> None:
    voted[1][0].told = "refused"
    assert faults(voted).endswith("though it was refused")


def test_an_answer_that_was_lost_is_understood_when_it_comes_again(tmp_path: Path) -> None:
    made = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", survey=False)
    token = made.link()
    made.store.start("judge-001")
    shown = made.store.show("judge-001")
    assert shown is not None
    with TestClient(create_app(made.store), "http://127.0.0.1", follow_redirects=False) as browser:
        told = [
            _told(browser.post(f"/j/{token}/vote", data={"impression": shown.impression, "choice": choice}))
            for choice in ("tie", "tie", "left")
        ]
    assert told == ["stored", "stored already", "refused"]


# ---------------------------------------------------------------- latency


def test_a_stall_counts_the_presses_that_it_prevented() -> None:
    assert corrected([0.1, 7.0], 3.0) == [0.1, 7.0, 4.0, 1.0]
    requests = [Request("vote", k, k + 0.01, 303, 1) for k in range(99)] + [Request("vote", 100, 400, 303, 9)]
    row = latencies(requests, seconds_between=3)[0]
    assert row.n == 100
    assert row.p50 > 1000  # 100 presses of 10 ms are outnumbered by the 100 that one stall of 300 s prevented
    assert row.max == pytest.approx(300_000)


def test_what_a_kill_touches_is_not_quiet() -> None:
    requests = [Request("vote", meant, meant + 1, 303, 1) for meant in (0.0, 4.5, 6.0, 9.5, 12.0)]
    assert [r.meant for r in quiet(requests, [(5.0, 10.0)])] == [0.0, 12.0]


@pytest.mark.parametrize("kind", ["page", "vote", "all requests"])
def test_a_slow_page_fails(kind: str) -> None:
    asked = LoadTest(1, 1.0, 1, 0, 0, p99_ms=250)
    rows = [Latency(name, 9, 1, 1, 251.0 if name == kind else 9.0, 1) for name in ("all requests", "page", "vote")]
    turn = Latency(TURN, 9, 1, 1, 251.0, 1)  # two requests
    outcome = Outcome(asked, "sqlite", 1, [], [*rows, turn], [], 1, 1, 1, 1, 1, 1, Comparison(), [])
    assert outcome.holds
    assert not outcome.is_fast
    quick = [replace(row, p99=9.0) for row in rows]
    assert replace(outcome, quiet=[*quick, turn]).is_fast
    assert not replace(outcome, finished=0).holds
    assert not replace(outcome, votes=Comparison(faults=["lost"])).holds


def test_kills_come_in_the_middle() -> None:
    moments = load_test._moments(LoadTest(200, 3.0, 30, 5, 0, 250))
    assert len(moments) == 5
    assert np.all(np.diff(moments) > 0)
    assert moments[0] >= 9
    assert moments[-1] <= 0.85 * 90


def test_a_showing_does_not_wait_for_the_disk_and_a_vote_does(tmp_path: Path) -> None:
    made = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", durable=True)
    for durable, level in ((True, 2), (False, 1), (True, 2)):
        with made.database.write(durable=durable) as c:
            assert c.execute(text("PRAGMA synchronous")).scalar_one() == level


# ---------------------------------------------------------------- the browser


def test_a_page_is_read_as_a_browser_reads_it() -> None:
    page = PageReader(
        '<link rel="stylesheet" href="/a.css"><script src="/b.js"></script>'
        '<form action="/j/t/undo"><input type="hidden" name="impression" value="old"></form>'
        '<form action="/j/t/vote"><input type=hidden name=impression value="new">'
        '<input type="radio" name="q" value="1"><input type="radio" name="q" value="2">'
        '<button name="choice" value="left">L</button><button>other</button></form>'
    )
    assert page.files == ["/a.css", "/b.js"]
    form = page.form("/vote")
    assert form is not None
    assert (form.hidden, form.choices, form.buttons) == ({"impression": "new"}, {"q": ["1", "2"]}, [("choice", "left")])
