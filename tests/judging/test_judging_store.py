"""The store while judges vote, on SQLite and on a real PostgreSQL: every outcome of a vote, undoing, many at once."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from judging_setup import MadePanel, at_once, at_random, completions, last_vote, make_panel, vote_all
from sqlalchemy import String, event, func, literal, select, update
from sqlalchemy import cast as cast_to
from sqlalchemy.exc import IntegrityError

from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.panel import add_judges, invite, invite_people, lock_panel
from replication.judging.record import check_record, unsealed_votes, vote_id, votes_csv
from replication.judging.schema import assignments, items, judges, unsealed, votes
from replication.judging.store import _LAST_VOTE, _VISIT, CURRENT, Cast, Store, claim_once, hash_token
from replication.votes.record import read_votes


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty database is."""
    if request.param == "sqlite":
        return str(tmp_path / "a folder?" / "judging.sqlite")
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def panel(url: str, tmp_path: Path):
    made = make_panel(url, tmp_path / "sealed", durable=True)
    yield made
    made.database.close()


J = "judge-001"

# ---------------------------------------------------------------- one judge


def test_a_session_from_first_to_last(panel: MadePanel) -> None:
    store = panel.store
    link = panel.link()
    before = store.visit(link)
    assert before is not None and (before.n_voted, before.n_assigned, before.has_started) == (0, 7, False)
    store.start(J)
    cast = vote_all(store, J, at_random(1))
    assert [shown.position for shown, _ in cast] == list(range(7))
    after = store.visit(link)
    assert after is not None and (after.n_voted, after.has_started) == (7, True)
    standing = panel.standing()
    assert [row.choice for row in standing] == [choice for _, choice in cast]
    assert all(row.cast_at - row.shown_at == pytest.approx(row.seconds) and row.seconds >= 0 for row in standing)


def test_sides_are_as_assigned(panel: MadePanel) -> None:
    by_id = {row.item_id: row for row in panel.rows(items)}
    by_position = {row.position: row for row in panel.rows() if row.judge_id == J}
    for shown, _ in vote_all(panel.store, J, at_random(2)):
        assigned = by_position[shown.position]
        item = by_id[assigned.item_id]
        both = (item.first, item.second) if assigned.first_is_left else (item.second, item.first)
        assert (shown.left, shown.right) == both and shown.question == item.question


def test_a_page_that_is_loaded_again_shows_the_same(panel: MadePanel) -> None:
    first, second = panel.store.show(J), panel.store.show(J)
    assert first is not None and second is not None
    assert (first.impression, first.left, first.right) == (second.impression, second.left, second.right)


def test_every_outcome_of_a_vote(panel: MadePanel) -> None:
    store = panel.store
    shown, other = store.show(J), store.show("judge-002")
    assert shown is not None and other is not None
    assert store.vote(J, "made up", "left") is Cast.UNKNOWN
    assert store.vote(J, other.impression, "left") is Cast.UNKNOWN  # another judge's
    assert store.vote("nobody", shown.impression, "left") is Cast.UNKNOWN
    assert panel.rows(votes) == []
    assert store.vote(J, shown.impression, "left") is Cast.STORED
    assert store.vote(J, shown.impression, "left") is Cast.REPEATED
    assert store.vote(J, shown.impression, "right") is Cast.CONFLICT
    assert [row.choice for row in panel.rows(votes)] == ["left"]
    following = store.show(J)
    assert following is not None and following.position == 1
    panel.lock()
    assert store.show(J) is None
    assert store.vote(J, following.impression, "left") is Cast.LOCKED
    assert len(panel.rows(votes)) == 1


def test_the_last_vote_is_undone_and_no_other(panel: MadePanel) -> None:
    store = panel.store
    (first, _), (second, _) = vote_all(store, J, lambda shown: "left", most=2)
    assert last_vote(store, J) == second.impression
    assert not store.undo(J, first.impression)
    assert not store.undo("judge-002", second.impression)
    assert store.undo(J, second.impression)
    assert not store.undo(J, second.impression)
    again = store.show(J)
    assert again is not None and again.position == 1 and again.impression != second.impression
    assert store.vote(J, second.impression, "left") is Cast.CONFLICT  # a window that was left open
    assert store.vote(J, again.impression, "right") is Cast.STORED
    kept = panel.rows(votes)
    assert [(row.choice, row.undone_at is None) for row in kept] == [("left", True), ("left", False), ("right", True)]


def test_a_chain_of_undoing_goes_back_to_the_start(panel: MadePanel) -> None:
    store = panel.store
    vote_all(store, J, lambda shown: "left", most=4)
    for left in (3, 2, 1, 0):
        last = last_vote(store, J)
        assert last is not None and store.undo(J, last)
        assert len(panel.standing()) == left
    assert last_vote(store, J) is None
    shown = store.show(J)
    assert shown is not None and shown.position == 0
    assert len(panel.rows(votes)) == 4


def test_nothing_is_undone_after_the_lock(panel: MadePanel) -> None:
    ((shown, _),) = vote_all(panel.store, J, lambda shown: "left", most=1)
    panel.lock()
    assert not panel.store.undo(J, shown.impression)
    assert len(panel.standing()) == 1


def test_links_and_tokens_are_kept_as_hashes(panel: MadePanel) -> None:
    token = panel.link()
    assert panel.store.judge_by_token(token) == J
    assert panel.store.judge_by_token(hash_token(token)) is None
    newer = panel.link()
    assert panel.store.judge_by_token(token) is None and panel.store.judge_by_token(newer) is not None
    assert panel.store.panel().admin_sha256 == hash_token(panel.admin)
    assert panel.join is not None and panel.store.panel().join_sha256 == hash_token(panel.join)


def test_what_is_read_is_one_view(panel: MadePanel) -> None:
    with panel.database.read() as c:
        before = c.execute(select(func.count()).select_from(votes)).scalar_one()
        at_once(1, lambda i: vote_all(panel.store, J, at_random(i), most=1))
        assert c.execute(select(func.count()).select_from(votes)).scalar_one() == before
    assert len(panel.standing()) == before + 1


# ---------------------------------------------------------------- many at once


def test_two_windows_with_one_showing_store_one_vote(panel: MadePanel) -> None:
    for _ in range(3):
        shown = panel.store.show(J)
        assert shown is not None
        before = len(panel.standing())
        same = at_once(4, lambda i, impression=shown.impression: panel.store.vote(J, impression, "left"))
        assert Counter(same) == {Cast.STORED: 1, Cast.REPEATED: 3}
        assert len(panel.standing()) == before + 1
    shown = panel.store.show(J)
    assert shown is not None
    other = at_once(2, lambda i: panel.store.vote(J, shown.impression, ("left", "right")[i]))
    assert sorted(outcome.name for outcome in other) == ["CONFLICT", "STORED"]


def test_two_windows_are_shown_the_same(panel: MadePanel) -> None:
    for _ in range(3):
        shown = at_once(4, lambda i: panel.store.show(J))
        assert len({one.impression for one in shown}) == 1
        assert panel.store.vote(J, shown[0].impression, "tie") is Cast.STORED


def test_an_undo_that_comes_second_leaves_what_is_shown_since(postgres, tmp_path: Path) -> None:
    """PostgreSQL lets two windows look at once; the other one undoes, and goes on, between our look and our undoing."""
    panel = make_panel(postgres.new_database(), tmp_path / "sealed")
    vote_all(panel.store, J, lambda shown: "left", most=2)
    last, store, fresh = last_vote(panel.store, J), Store(panel.database), []
    assert last is not None

    @event.listens_for(panel.database.engine, "before_cursor_execute")
    def other_window(connection, cursor, statement: str, *_) -> None:
        if statement.startswith("UPDATE judging_votes") and not fresh:
            fresh.append(None)
            assert store.undo(J, last)
            fresh[0] = store.show(J)

    assert not panel.store.undo(J, last)
    (shown,) = fresh
    assert panel.store.show(J).impression == shown.impression
    assert panel.store.vote(J, shown.impression, "right") is Cast.STORED
    panel.database.close()


def test_two_windows_undo_one_vote_once(panel: MadePanel) -> None:
    vote_all(panel.store, J, lambda shown: "left", most=3)
    last = last_vote(panel.store, J)
    assert last is not None
    assert sorted(at_once(4, lambda i: panel.store.undo(J, last))) == [False, False, False, True]
    assert len(panel.standing()) == 2


def test_forty_judges_at_once(url: str, tmp_path: Path) -> None:
    panel = make_panel(
        url, tmp_path / "sealed", completions(8), durable=True, judges=40, votes_per_judge=4, repeat_share=0.25
    )
    cast = at_once(40, lambda i: vote_all(panel.store, f"judge-{i + 1:03d}", at_random(i)))
    expected = {(shown.impression, choice) for by_one in cast for shown, choice in by_one}
    assert {(row.showing, row.choice) for row in panel.standing()} == expected
    assert len(expected) == 40 * 5
    panel.database.close()


def test_an_open_link_gives_each_set_once(url: str, tmp_path: Path) -> None:
    panel = make_panel(url, tmp_path / "sealed", judges=10)
    found = at_once(20, lambda i: panel.store.claim(f"token {i}"))
    taken = [name for name in found if name is not None]
    assert sorted(taken) == panel.names and len(taken) == 10
    assert panel.store.claim("one more") is None
    panel.database.close()


def test_a_further_set_has_its_judge_from_the_start(url: str, tmp_path: Path) -> None:
    """Those who press the open link while further people are invited: nobody shares a set."""
    panel = make_panel(url, tmp_path / "sealed", judges=1, votes_per_judge=4)

    def act(i: int) -> str | None:
        if i % 2:
            return panel.store.claim(f"token {i}")
        (name,), _ = invite_people(panel.database, panel.sealed, 1)
        return name

    for _ in range(3):
        names = [name for name in at_once(8, act) if name is not None]
        assert len(set(names)) == len(names) >= 4
    panel.database.close()


def test_nobody_comes_between_a_further_set_and_its_link(panel: MadePanel) -> None:
    """Whatever is committed on the way to the links, there is no set to claim."""
    seen = []

    @event.listens_for(panel.database.engine, "commit")
    def look(connection) -> None:
        free = select(func.count()).where(judges.c.kind == "human", judges.c.token_sha256.is_(None))
        seen.append(connection.execute(free).scalar_one())

    _, further = invite_people(panel.database, panel.sealed, 4)
    assert further == 2 and set(seen) == {0}


def test_without_the_key_no_link_is_given_at_all(panel: MadePanel, tmp_path: Path) -> None:
    (tmp_path / "sealed" / "key.json").rename(tmp_path / "away")
    with pytest.raises(UserError, match="sealed key is needed"):
        invite_people(panel.database, panel.sealed, 3)
    assert all(row.token_sha256 is None for row in panel.rows(judges))
    assert len(invite_people(panel.database, panel.sealed, 2)[0]) == 2


def test_one_form_that_is_sent_at_once_gives_one_set(url: str, tmp_path: Path) -> None:
    made = make_panel(url, tmp_path / "sealed", judges=6)
    for form in ("a form", "another"):
        given = at_once(4, lambda i, form=form: claim_once(Store(made.database), form))
        assert len(set(given)) == 1 and None not in given
    with made.database.read() as c:
        taken = select(func.count()).select_from(judges).where(judges.c.token_sha256.is_not(None))
        assert c.execute(taken).scalar_one() == 2


def test_judges_who_are_added_at_once_get_other_cells(url: str, tmp_path: Path) -> None:
    panel = make_panel(url, tmp_path / "sealed", judges=0, votes_per_judge=4, repeat_share=0.0)
    at_once(4, lambda i: add_judges(panel.database, panel.sealed, [f"m{i}"], kind="model", vendor="v"))
    per_item = Counter(row.item_id for row in panel.rows())
    assert sum(per_item.values()) == 16 and set(per_item.values()) == {1}  # four rows of four prompts
    panel.database.close()


def test_no_vote_is_acknowledged_after_the_record_was_written(url: str, tmp_path: Path) -> None:
    """Threads vote as fast as they can while the panel is locked; what each was told is compared with the record."""
    panel = make_panel(url, tmp_path / "sealed", completions(16), durable=True, judges=8, votes_per_judge=64)
    acknowledged: set[tuple[int, str]] = set()
    chosen: list[str] = []

    def judge(i: int) -> None:
        choose = at_random(i)
        for shown, choice in vote_all(
            panel.store, f"judge-{i + 1:03d}", lambda shown: chosen.append(choose(shown)) or chosen[-1]
        ):
            acknowledged.add((shown.assignment_id, choice))

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    while len(chosen) < 40:
        assert any(thread.is_alive() for thread in threads)
        time.sleep(0.001)
    other = Database(url)  # the command is another process than the page, with connections of its own
    lock_panel(other, panel.sealed)
    (tmp_path / "votes.csv").write_text(votes_csv(other))
    other.close()
    for thread in threads:
        thread.join()
    panel_id = panel.store.panel().panel_id
    recorded = {(vote.vote_id, vote.choice) for vote in read_votes(tmp_path / "votes.csv")}
    assert 0 < len(recorded) < 8 * 71, "the lock came before or after all voting: the test tested nothing"
    assert recorded == {(vote_id(panel_id, assignment), choice) for assignment, choice in acknowledged}
    panel.database.close()


# ---------------------------------------------------------------- judges and the lock


def test_links_for_free_sets_come_before_further_sets(panel: MadePanel) -> None:
    assert panel.store.claim("walked in") is not None
    links, further = invite_people(panel.database, panel.sealed, 3)
    assert list(links) == ["judge-002", "judge-003", "judge-004"] and further == 2
    for name, token in links.items():
        assert panel.store.judge_by_token(token) == name
    assert len({row.item_id for row in panel.rows() if row.judge_id == "judge-004"}) == 6
    assert panel.store.claim("another") is None
    add_judges(panel.database, panel.sealed, ["judge-005"])
    assert list(invite_people(panel.database, panel.sealed, 1)[0]) == ["judge-005"]
    for name, what in (("judge-003", "is taken"), (" ", "must be letters"), ("x" * 201, "at most 200")):
        with pytest.raises(UserError, match=what):
            add_judges(panel.database, panel.sealed, [name])
    with pytest.raises(UserError, match="'x' is taken"):
        add_judges(panel.database, panel.sealed, ["x", "x"])
    assert "x" not in panel.names
    with pytest.raises(UserError, match="'nobody' is no person of this panel"):
        invite(panel.database, ["judge-001", "nobody"])
    assert panel.store.judge_by_token("walked in") is not None  # the whole call came to nothing


def test_the_lock_is_for_good_and_may_be_repeated(panel: MadePanel) -> None:
    vote_all(panel.store, J, at_random(3))
    panel.lock("one is enough")
    first = panel.store.panel()
    record = votes_csv(panel.database)
    panel.lock("another reason")
    assert panel.store.panel() == first and first.lock_note == "one is enough"
    assert votes_csv(panel.database) == record
    for act in (
        lambda: invite(panel.database, [J]),
        lambda: invite_people(panel.database, panel.sealed, 1),
        lambda: add_judges(panel.database, panel.sealed, ["late"]),
    ):
        with pytest.raises(UserError, match="locked"):
            act()


def test_a_record_that_could_not_be_read_keeps_the_panel_open(panel: MadePanel) -> None:
    vote_all(panel.store, J, lambda shown: "left")
    one, other = (row for row in panel.rows() if row.judge_id == J and row.position in (0, 1))
    index = next(i for i in assignments.indexes if i.name == "judging_one_first_vote_an_item")
    with panel.database.write() as c:
        index.drop(c)
        both = update(assignments).where(assignments.c.assignment_id == other.assignment_id)
        c.execute(both.values(item_id=one.item_id))
    with pytest.raises(UserError, match=r"the panel's votes: vote .* is on the same completions by the same judge"):
        lock_panel(panel.database, panel.sealed, "why", check_record)
    about = panel.store.panel()
    assert not about.is_locked and about.lock_note is None and panel.rows(unsealed) == []
    with panel.database.write() as c:
        c.execute(both.values(item_id=other.item_id))
    lock_panel(panel.database, panel.sealed, "why", check_record)
    assert panel.store.panel().is_locked


def test_numbers_of_64_bits(url: str, tmp_path: Path) -> None:
    """Seeds, prompts and samples as large as the vote record takes them."""
    made_of = {
        seed + 2**40: {
            arm: [
                replace(one, seed=seed + 2**40, prompt_id=one.prompt_id + 2**40, sample=one.sample + 2**40)
                for one in of
            ]
            for arm, of in by_arm.items()
        }
        for seed, by_arm in completions().items()
    }
    panel = make_panel(url, tmp_path / "sealed", made_of)
    vote_all(panel.store, J, lambda shown: "left")
    lock_panel(panel.database, panel.sealed, "", check_record)
    found = unsealed_votes(panel.database).votes
    assert {vote.seed for vote in found} <= {2**40 + 1, 2**40 + 2} and len(found) == 7
    assert all(min(vote.prompt_id, vote.sample_left, vote.sample_right) >= 2**40 for vote in found)
    panel.database.close()


@pytest.mark.parametrize("odd", ["\0", "\ud83d", "\udfff"], ids=ascii)
def test_characters_that_no_database_keeps_are_replaced(url: str, tmp_path: Path, odd: str) -> None:
    made_of = {
        seed: {
            arm: [
                replace(one, question=f"Why{odd}?", category=f"c{odd}", text=f"{odd}{one.text}😀\n{odd}") for one in of
            ]
            for arm, of in by_arm.items()
        }
        for seed, by_arm in completions().items()
    }
    panel = make_panel(url, tmp_path / "sealed", made_of)
    shown = panel.store.show(J)
    assert shown is not None and shown.question == "Why\ufffd?"
    for text in (shown.left, shown.right):
        assert text.startswith("\ufffd") and text.endswith("😀\n\ufffd") and len(text) == 64 + 4
    assert {row.category for row in panel.rows(items)} == {"c\ufffd"}
    panel.database.close()


def test_a_vote_waits_for_the_disk_whatever_the_default(postgres, tmp_path: Path) -> None:
    database = Database(f"{postgres.new_database()}%20-csynchronous_commit%3Doff")
    with database.read() as c:
        assert c.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "off"
    for durable, said in ((True, "on"), (False, "off")):
        with database.write(durable) as c:
            assert c.exec_driver_sql("SHOW synchronous_commit").scalar_one() == said
    database.close()


def test_other_tables_in_the_database_are_in_nobodys_way(url: str, tmp_path: Path) -> None:
    database = Database(url)
    with database.write() as c:
        for name in ("panel", "items", "votes", "judges"):
            c.exec_driver_sql(f"CREATE TABLE {name} (x INTEGER)")
    database.close()
    panel = make_panel(url, tmp_path / "sealed")
    assert len(vote_all(panel.store, J, lambda shown: "left")) == 7
    panel.database.close()


def test_an_error_shows_nothing_that_was_to_be_stored(panel: MadePanel) -> None:
    row = panel.rows(items)[0]
    with pytest.raises(IntegrityError) as error, panel.database.write() as c:
        c.execute(items.insert().values(dict(row._mapping) | {"question": "to be kept from logs"}))
    assert "to be kept from logs" not in str(error.value)


def test_nothing_is_unsealed_before_the_lock(panel: MadePanel) -> None:
    with pytest.raises(UserError, match="not locked"):
        unsealed_votes(panel.database)


def test_a_second_panel_in_one_database_is_refused(panel: MadePanel, url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a panel already"):
        make_panel(url, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert J in panel.names


def test_a_panel_that_fails_leaves_neither_tables_nor_key(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--votes: 99 is more than the 32 pairs"):
        make_panel(url, tmp_path / "sealed", votes_per_judge=99)
    assert not (tmp_path / "sealed" / "key.json").exists()
    panel = make_panel(url, tmp_path / "sealed")
    assert len(panel.rows(judges)) == 2 and len(panel.rows(assignments)) == 14
    panel.database.close()


# ---------------------------------------------------------------- SQLite alone


def test_looking_creates_no_file(tmp_path: Path) -> None:
    assert not Database(tmp_path / "no" / "judging.sqlite").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "judging.sqlite").write_text("no database at all, and long enough to be read as a header" * 40)
    with pytest.raises(UserError, match=r"judging\.sqlite cannot be read"):
        Database(tmp_path / "judging.sqlite").exists()


def test_a_vote_is_on_the_disk_when_it_is_acknowledged(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "judging.sqlite", tmp_path / "sealed", durable=True)
    vote_all(panel.store, J, lambda shown: "left", most=1)
    with panel.database.read() as c:
        assert c.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
        assert c.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
    other = sqlite3.connect(tmp_path / "judging.sqlite")  # another process's view
    assert other.execute("SELECT choice FROM judging_votes").fetchall() == [("left",)]
    other.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://somebody:secret@host/name", "--database: mysql://...@host/name cannot be used"),
        ("nonsense://x", "--database: nonsense://x cannot be used"),
        ("postgresql://u:secret@127.0.0.1:1/x", r"--database: .*127\.0\.0\.1:1/x does not answer"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line_without_its_password(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        Database(url).exists()
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_the_address_that_is_kept_has_no_password() -> None:
    assert Database("postgres://u:secret@h/x").address == "postgresql+psycopg://u@h/x"


@pytest.mark.parametrize("key", ["password", "sslpassword"])
def test_a_password_in_the_query_is_shown_nowhere(key: str) -> None:
    database = Database(f"postgresql://u@h/db?{key}=secret&sslmode=require")
    assert database.address == "postgresql+psycopg://u@h/db?sslmode=require"
    assert "secret" not in database.name and f"{key}=..." in database.name and "sslmode=require" in database.name
    assert database.engine.url.query[key] == "secret"  # the driver needs it
    with pytest.raises(UserError, match=rf"mysql://\.\.\.@h/db\?{key}=\.\.\.&x=1 cannot be used") as error:
        Database(f"mysql://u@h/db?{key}=secret&x=1")
    assert "secret" not in str(error.value)


def test_store_is_one_object_for_many_threads(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "judging.sqlite", tmp_path / "sealed")
    store, link = Store(panel.database), panel.link()
    assert {visit.judge_id for visit in at_once(8, lambda i: store.visit(link))} == {J}


def test_a_visit_reads_no_vote_of_others(postgres, tmp_path: Path) -> None:
    """Of a table that was just filled PostgreSQL has no statistics, and may plan a join that reads all of it."""
    made = make_panel(postgres.new_database(), tmp_path / "sealed", completions(n_prompts=16), judges=60)
    link = made.link()
    with made.database.write() as c:
        columns = ["assignment_id", "showing", "choice", "cast_at"]
        number = assignments.c.assignment_id
        cast = select(number, cast_to(number, String), literal("tie"), literal(1.0)).where(assignments.c.judge_id != J)
        c.execute(votes.insert().from_select(columns, cast))
    with made.database.read() as c:
        for query in (_VISIT, CURRENT, _LAST_VOTE):
            c.execute(query, {"hashed": hash_token(link)} if query is _VISIT else {"judge": J}).all()
        read = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'judging_votes'"
        n_read = c.exec_driver_sql(f"{read} AND schemaname = current_schema()").scalar_one()
    assert n_read == 0, "the judge has none"
    made.database.close()
