"""Judges whom a recruiting site sends: one set each, their names apart from votes, and places that are given up."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import httpx
import pytest
from judging_setup import MadePanel, at_once, at_random, make_panel, vote_all
from small_panel import SmallPanel, served, small_panel

from replication.errors import UserError
from replication.judging.design import Design
from replication.judging.panel import add_judges
from replication.judging.record import judges_csv
from replication.judging.recruits import gave_up, reclaim
from replication.judging.schema import items, recruits
from replication.judging.seal import read_key
from replication.judging.store import Recruit, claim_once
from replication.votes.record import CHOICES


@pytest.fixture(params=["sqlite", "postgres"])
def panel(request: pytest.FixtureRequest, tmp_path: Path):
    url = (
        tmp_path / "judging.sqlite" if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()
    )
    made = make_panel(url, tmp_path / "sealed", judges=3, attention=1)
    yield made
    made.database.close()


def places(panel: MadePanel, judge: str) -> list[tuple[object, ...]]:
    """The set of a judge as it is shown, a repeat by the place of its first vote."""
    rows = [row for row in panel.rows() if row.judge_id == judge]
    at = {row.assignment_id: row.position for row in rows}
    return sorted(
        (row.position, row.item_id, row.first_is_left, row.expected, row.repeats and at[row.repeats]) for row in rows
    )


def test_a_set_that_is_given_up_is_somebody_else_s_from_the_first_pair_on(panel: MadePanel) -> None:
    store = panel.store
    assert claim_once(store, "first") == "judge-001"
    vote_all(store, "judge-001", at_random(1), most=3)
    before = panel.standing()
    assert reclaim(panel.database, "judge-001") == "judge-001.2"
    assert places(panel, "judge-001.2") == places(panel, "judge-001") and panel.standing() == before
    visit = store.visit("first")
    assert visit is not None and visit.has_left
    assert claim_once(store, "second") == "judge-001.2", "it is free, and the next one's"
    assert len(vote_all(store, "judge-001.2", at_random(2))) == 8
    assert reclaim(panel.database, "judge-001.2") is None, "whoever finished keeps the place"
    assert reclaim(panel.database, "judge-001") is None and reclaim(panel.database, "judge-003") is None
    assert claim_once(store, "third") == "judge-002"
    assert reclaim(panel.database, "judge-002") == "judge-002.2"
    assert claim_once(store, "fourth") == "judge-002.2"
    assert reclaim(panel.database, "judge-002.2") == "judge-002.2.2"
    add_judges(panel.database, panel.sealed, ["further"])  # after three planned sets
    key = read_key(panel.sealed, store.panel().key_sha256)
    design = Design(len(key.prompts), len(key.seeds), 2, 2, key.secret, 2)
    dealt = [*design.deal([6] * 4)][3]
    prompt = {row.item_id: row.prompt_id for row in panel.rows(items)}
    mine = [row.item_id for row in panel.rows() if (row.judge_id, row.repeats, row.expected) == ("further", None, None)]
    found = set()
    for item in mine:
        behind = key.items[item]
        of = {behind.arm_first: behind.sample_first, behind.arm_second: behind.sample_second}
        found.add((behind.seed, prompt[item], of["baseline"], of["both"]))
    baseline, both = key.by_arm["baseline"], key.by_arm["both"]
    assert found == {
        (key.seeds[c.seed], key.prompts[c.prompt], baseline[c.sample_baseline], both[c.sample_treatment]) for c in dealt
    }, "the next set is the next of the design: none is skipped"
    panel.lock()
    with pytest.raises(UserError, match="locked"):
        reclaim(panel.database, "judge-003")


def test_of_many_who_reclaim_a_place_while_its_judge_votes_one_does(panel: MadePanel) -> None:
    claim_once(panel.store, "first")

    def act(n: int) -> object:
        if n:
            return reclaim(panel.database, "judge-001")
        return [shown.impression for shown, _ in vote_all(panel.store, "judge-001", at_random(1), most=4)]

    cast, *successors = at_once(5, act)
    assert [name for name in successors if name] == ["judge-001.2"]
    assert [row.showing for row in panel.standing()] == cast, "each vote that was acknowledged is there, once"


def test_the_site_s_export_says_who_left(tmp_path: Path) -> None:
    made = make_panel(tmp_path / "judging.sqlite", tmp_path / "sealed", judges=4)
    for n in range(4):
        claim_once(made.store, f"token {n}", Recruit(f"{n:024x}", "", ""))
    export = tmp_path / "export.csv"
    states = ("RETURNED", "APPROVED", "TIMED-OUT", "AWAITING REVIEW")
    lines = [f"s{n},{n:024x},{state}" for n, state in enumerate(states)]
    export.write_text("\n".join(["\ufeffSubmission id,Participant id,Status", *lines, "s9,somebody-else,RETURNED", ""]))
    assert gave_up(made.database, export) == {"judge-001": "returned", "judge-003": "timed out"}
    export.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="`Participant id` and `Status`"):
        gave_up(made.database, export)
    with pytest.raises(UserError, match="cannot be read"):
        gave_up(made.database, tmp_path)


# ---------------------------------------------------------------- the page


@pytest.fixture
def small(tmp_path: Path) -> SmallPanel:
    return small_panel(tmp_path)


def test_a_participant_has_one_set_in_any_browser(small: SmallPanel) -> None:
    def come(browser: httpx.Client, participant: str) -> httpx.Response:
        link = f"/join/{small.join}?PROLIFIC_PID={participant}&STUDY_ID=st&SESSION_ID=se"
        page = browser.get(link)
        return page if page.status_code != 200 else browser.post(link, data={"nonce": "x" * 32})

    with served(small.store) as address, httpx.Client(base_url=address) as one, httpx.Client(base_url=address) as other:
        own = come(one, "5f" * 12).headers["location"]
        assert come(other, "5f" * 12).headers["location"] == come(one, "5f" * 12).headers["location"] == own
        assert come(one, "60" * 12).headers["location"] != own, "another participant at the same browser"
        assert come(one, "61" * 12).status_code == 409
        for odd in ("{{%PROLIFIC_PID%}}", "a b", "x" * 65):
            assert come(one, odd).status_code == 422
        rows = small.contents()
        assert [(row.judge_id, row.participant, row.study, row.session) for row in rows["judging_recruits"]] == [
            ("judge-003", "5f" * 12, "st", "se"),
            ("judge-004", "60" * 12, "st", "se"),
        ]
        shown = small.store.show("judge-003")
        assert shown is not None
        assert reclaim(small.database, "judge-003") == "judge-003.2"
        gone = one.post(f"{own}/vote", data={"impression": shown.impression, "choice": CHOICES[0]})
        assert gone.status_code == one.get(own).status_code == 410 and "This place was given up" in gone.text
        assert small.contents()["judging_votes"] == []
        assert come(one, "61" * 12).status_code == 303, "the place is free again"
    vote_all(small.store, "judge-004", at_random(1))
    small.lock()
    table = judges_csv(small.database)
    (row,) = csv.DictReader(io.StringIO(table))
    assert len(row["participant"]) == 64 and "60" * 12 not in table


def test_older_panels_have_no_recruits(small: SmallPanel) -> None:
    with small.database.write() as c:
        recruits.drop(c)
    small.lock()
    assert judges_csv(small.database).startswith("judge_id,kind,vendor,participant")
