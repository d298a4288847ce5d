"""The design's balance, the sealed key, what a panel gives away before its lock, and the record after it."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections import Counter, defaultdict
from itertools import groupby, pairwise
from pathlib import Path
from random import Random

import pytest
from judging_setup import ARMS, at_random, completions, last_vote, make_panel, vote_all
from scipy import stats as scipy_stats
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from replication.audit.published import load_published
from replication.config import AnalysisConfig
from replication.errors import UserError
from replication.judging.design import Cell, Design, session
from replication.judging.folder import PanelFolder
from replication.judging.progress import judge_progress
from replication.judging.record import (
    answers_jsonl,
    judges_csv,
    marginals_json,
    unsealed_votes,
    vote_id,
    votes_csv,
    write_votes_record,
)
from replication.judging.schema import answers, assignments, items, judges, metadata, votes
from replication.judging.seal import read_key
from replication.judging.store import Cast, Store
from replication.runs.records import from_json
from replication.simulation.power import Marginals, fit_marginals
from replication.votes.record import read_votes

SIZES = [  # prompts, seeds, baseline and treatment completions
    (1, 1, 1, 1), (2, 1, 1, 1), (5, 3, 2, 2), (6, 4, 3, 3), (7, 5, 1, 3), (8, 2, 2, 3), (4, 6, 4, 2), (9, 4, 2, 1),
    (32, 6, 3, 3), (31, 5, 3, 3), (3, 7, 2, 2),
]  # fmt: skip


def rows_of(design: Design, n: int) -> list[list[Cell]]:
    cells = design.cells(0, n * design.n_prompts)
    return [cells[i : i + design.n_prompts] for i in range(0, len(cells), design.n_prompts)]


# ---------------------------------------------------------------- the design


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("secret", ["a", "b"])
def test_every_claim_of_balance(size: tuple[int, int, int, int], secret: str) -> None:
    n_prompts, n_seeds, n_a, n_b = size
    design = Design(*size, secret=secret)
    rows = rows_of(design, n_seeds * n_a * n_b)
    for row in rows:
        assert sorted(c.prompt for c in row) == list(range(n_prompts))
        per_seed = [sum(c.seed == seed for c in row) for seed in range(n_seeds)]
        assert max(per_seed) - min(per_seed) <= 1
        n_left = sum(c.treatment_left for c in row)
        assert abs(2 * n_left - n_prompts) <= n_prompts % 2
    for start in range(0, len(rows), n_seeds):
        block = [c for row in rows[start : start + n_seeds] for c in row]
        assert Counter((c.prompt, c.seed) for c in block) == Counter(
            (p, s) for p in range(n_prompts) for s in range(n_seeds)
        )
    sides = defaultdict(list)
    for row in rows:
        for c in row:
            sides[c.prompt, c.seed].append(c.treatment_left)
    if n_a * n_b > 1:
        n_turns = n_a * n_b
        assert all(a != b for turns in sides.values() for a, b in pairwise(turns[:n_turns]))
    distinct = {(c.prompt, c.seed, c.sample_baseline, c.sample_treatment) for row in rows for c in row}
    assert len(distinct) == design.n_distinct == n_prompts * n_seeds * n_a * n_b


@pytest.mark.parametrize("size", [s for s in SIZES if s[2] == s[3]], ids=str)
def test_every_completion_is_used_before_any_comes_again(size: tuple[int, int, int, int]) -> None:
    n_prompts, n_seeds, n, _ = size
    rows = rows_of(Design(*size, secret="x"), n_seeds * n)
    for arm in ("sample_baseline", "sample_treatment"):
        used = Counter((c.prompt, c.seed, getattr(c, arm)) for row in rows for c in row)
        assert set(used.values()) == {1} and len(used) == n_prompts * n_seeds * n


@pytest.mark.parametrize(
    ("size", "votes"),
    [((32, 1, 1, 1), 20), ((32, 1, 1, 1), 32),
     ((8, 1, 3, 3), 72), ((8, 5, 1, 1), 39), ((7, 2, 1, 3), 41), ((5, 1, 2, 2), 3)],
    ids=str,
)  # fmt: skip
def test_no_judge_gets_a_pair_twice_and_none_is_left_out(size: tuple[int, int, int, int], votes: int) -> None:
    design = Design(*size, secret="s")
    sizes = [3, *[votes] * 12, 1, 2]  # the first one shifts the others off the rows
    hands = list(design.deal(sizes))
    assert [len({cell.pair for cell in hand}) for hand in hands] == [len(hand) for hand in hands] == sizes
    dealt = [cell for hand in hands for cell in hand]
    order = design.cells(0, sum(sizes) + design.n_distinct)
    assert Counter(dealt) <= Counter(order)
    met = Counter(cell.pair for cell in dealt)
    assert max(met.values()) - min(met[cell.pair] for cell in order) <= 2  # of one that waits, the next judge takes one
    if votes <= design.n_distinct - design.n_prompts:
        assert dealt == order[: sum(sizes)]


def test_judges_with_parts_of_rows_go_on_where_the_last_ended() -> None:
    design = Design(7, 3, 2, 2, "s")
    whole = design.cells(0, 100)
    rng, at = Random(0), 0
    while at < 90:
        n = rng.randint(1, 9)
        assert design.cells(at, n) == whole[at : at + n]
        at += n
    assert Design(7, 3, 2, 2, "t").cells(0, 100) != whole


def test_a_cell_that_comes_round_again_changes_sides() -> None:
    design = Design(4, 2, 2, 2, "s")
    period = 2 * 4
    first, second = (
        {(c.prompt, c.seed, c.sample_baseline, c.sample_treatment): c.treatment_left for row in part for c in row}
        for part in (rows_of(design, period), rows_of(design, 2 * period)[period:])
    )
    assert first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("n_repeats", [0, 1, 4, 100])
@pytest.mark.parametrize("n_attention", [0, 1, 3])
def test_a_session(n: int, n_repeats: int, n_attention: int) -> None:
    cells = Design(max(n, 1), 2, 2, 2, "s").cells(0, n)
    for draw in range(20):
        places = session(cells, n_repeats, n_attention, Random(draw))
        first = [p for p in places if p.cell is not None and p.repeats is None]
        again = [(i, p) for i, p in enumerate(places) if p.repeats is not None]
        asked = [p for p in places if p.cell is None]
        assert sorted(map(str, (p.cell for p in first))) == sorted(map(str, cells))
        assert all(p.cell is not None and p.treatment_left == p.cell.treatment_left for p in first)
        half = (n + 1) // 2
        assert len(again) == min(n_repeats, half) == len({p.repeats for _, p in again})
        for i, p in again:
            original = places[p.repeats]
            assert original.repeats is None and original.cell == p.cell
            assert original.treatment_left != p.treatment_left
            before = places[:i]
            assert sum(q.cell is not None and q.repeats is None for q in before) >= half
        assert len(asked) == min(n_attention, n + len(again)) and places[0].cell is not None
        expected = Counter(p.expected for p in asked)
        assert abs(expected["left"] - expected["right"]) <= 1
        assert all(p.expected is None for p in places if p.cell is not None)


def test_sides_and_order_of_sessions_are_even_over_many() -> None:
    """Over judges neither place tells the side, nor which places repeat."""
    design = Design(8, 3, 2, 2, "s")
    left = [0] * 8
    for judge in range(400):
        for i, p in enumerate(session(design.cells(judge * 8, 8), 0, 0, Random(judge))):
            left[i] += p.treatment_left
    assert all(scipy_stats.binomtest(k, 400).pvalue > 1e-4 for k in left)


# ---------------------------------------------------------------- the seal


def test_the_key_is_its_owners_alone_and_is_committed_to(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "judging.sqlite", tmp_path / "sealed")
    path = tmp_path / "sealed" / "key.json"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
    assert set(read_key(panel.sealed, panel.store.panel().key_sha256).items) == {r.item_id for r in panel.rows(items)}


def test_a_key_that_was_changed_opens_nothing(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "judging.sqlite", tmp_path / "sealed")
    path = tmp_path / "sealed" / "key.json"
    original = path.read_text()
    swapped = json.loads(original)
    one = next(iter(swapped["items"].values()))
    one["arm_first"], one["arm_second"] = one["arm_second"], one["arm_first"]
    path.write_text(json.dumps(swapped, indent=1))
    with pytest.raises(UserError, match="not the key that this panel was made with"):
        panel.lock()
    assert not panel.store.panel().is_locked
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        panel.lock()
    path.write_text(original)
    panel.lock()
    assert panel.store.panel().is_locked


def test_a_key_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    make_panel(tmp_path / "a.sqlite", tmp_path / "sealed")
    before = (tmp_path / "sealed" / "key.json").read_bytes()
    with pytest.raises(UserError, match="written once"):
        make_panel(tmp_path / "b.sqlite", tmp_path / "sealed")
    assert (tmp_path / "sealed" / "key.json").read_bytes() == before


def test_the_database_names_no_arm_before_the_lock(tmp_path: Path) -> None:
    arms = ("untreated", "gained")
    panel = make_panel(
        tmp_path / "judging" / "judging.sqlite", tmp_path / "sealed", arms=arms, repeat_share=0.2, attention=2
    )
    vote_all(panel.store, "judge-001", at_random(1))
    key = json.loads((tmp_path / "sealed" / "key.json").read_text())

    def on_disk(word: str) -> bool:
        return any(word.encode() in path.read_bytes() for path in (tmp_path / "judging").iterdir())

    assert on_disk("both_bad") and not any(map(on_disk, [*arms, key["secret"], key["secret"][:12]]))
    panel.lock()
    assert on_disk("gained")


def test_nothing_that_can_be_seen_goes_with_the_arm(tmp_path: Path) -> None:
    """Place in the table, id and assignment against the arm that is first or left: as chance would have it."""
    panel = make_panel(
        tmp_path / "judging.sqlite", tmp_path / "sealed", completions(16, range(1, 7), (3, 3)), judges=24,
        votes_per_judge=32,
    )  # fmt: skip
    key = read_key(panel.sealed, panel.store.panel().key_sha256)
    first = [key.items[row.item_id].arm_first == "both" for row in panel.rows(items)]
    assert len(first) == 16 * 6 * 9
    assert scipy_stats.binomtest(sum(first), len(first)).pvalue > 1e-4
    with panel.database.read() as c:
        in_rowid_order = c.exec_driver_sql("SELECT item_id FROM judging_items ORDER BY rowid").scalars().all()
    by_rowid = [key.items[item].arm_first == "both" for item in in_rowid_order]
    for order in (first, by_rowid):
        quarters = [order[i::4] for i in range(4)] + [order[i * 216 : (i + 1) * 216] for i in range(4)]
        for table in (quarters[:4], quarters[4:]):
            counts = [[sum(q), len(q) - sum(q)] for q in table]
            assert scipy_stats.chi2_contingency(counts).pvalue > 1e-4
        runs = sum(1 for _ in groupby(order))
        assert abs(runs - len(order) / 2) < 4 * len(order) ** 0.5 / 2  # neither alternating nor in blocks
    shown = panel.rows(assignments)
    left = [(key.items[row.item_id].arm_first == "both") == row.first_is_left for row in shown]
    flags = [row.first_is_left for row in shown]
    together = [[sum(f == a and x == b for f, x in zip(flags, left, strict=True)) for a in (0, 1)] for b in (0, 1)]
    assert scipy_stats.chi2_contingency(together).pvalue > 1e-4
    unrepeated = [is_left for row, is_left in zip(shown, left, strict=True) if row.repeats is None]
    assert sum(unrepeated) == len(unrepeated) / 2  # the design's, exactly


def test_a_judge_meets_each_pair_once_and_its_repeat_with_sides_swapped(tmp_path: Path) -> None:
    panel = make_panel(
        tmp_path / "judging.sqlite", tmp_path / "sealed", judges=6, votes_per_judge=12, repeat_share=0.25, attention=2
    )
    rows = {row.assignment_id: row for row in panel.rows()}
    for name in panel.names:
        mine = [row for row in rows.values() if row.judge_id == name]
        first = [r.item_id for r in mine if r.repeats is None and r.expected is None]
        assert len(first) == 12 == len(set(first))
        again = [row for row in mine if row.repeats is not None]
        assert len(again) == 3
        for row in again:
            original = rows[row.repeats]
            assert (original.judge_id, original.item_id) == (name, row.item_id)
            assert original.first_is_left != row.first_is_left and original.position < row.position
        assert sum(row.expected is not None for row in mine) == 2


def test_a_model_gets_neither_repeats_nor_attention_items(tmp_path: Path) -> None:
    from replication.judging.panel import add_judges

    panel = make_panel(tmp_path / "judging.sqlite", tmp_path / "sealed", repeat_share=0.5, attention=2)
    add_judges(panel.database, panel.sealed, ["m"], kind="model", vendor="v", votes=5)
    mine = [row for row in panel.rows() if row.judge_id == "m"]
    assert len(mine) == 5 and all(row.repeats is None and row.expected is None for row in mine)


@pytest.mark.parametrize(("votes", "first"), [(20, 0), (32, 10)])
def test_a_set_that_is_near_all_pairs_holds_none_twice(tmp_path: Path, votes: int, first: int) -> None:
    """More votes than are left of the round, from the middle of a row: the record must be one that is read."""
    from replication.judging.panel import add_judges

    made_of = completions(32, (0,), (1, 1))
    panel = make_panel(tmp_path / "x.sqlite", tmp_path / "sealed", made_of, judges=0, votes_per_judge=votes)
    if first:
        add_judges(panel.database, panel.sealed, ["m"], kind="model", vendor="v", votes=first)
    for name in ("a", "b", "c"):  # each command goes on where the last one ended
        add_judges(panel.database, panel.sealed, [name])
        mine = [row.item_id for row in panel.rows() if row.judge_id == name and row.repeats is None]
        assert len(set(mine)) == len(mine) == votes
        vote_all(panel.store, name, at_random(1))
    panel.lock()
    (tmp_path / "votes.csv").write_text(votes_csv(panel.database))
    assert sum(not vote.repeat_of for vote in read_votes(tmp_path / "votes.csv")) == 3 * votes


def test_the_database_refuses_a_second_first_vote_on_a_pair(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "x.sqlite", tmp_path / "sealed")
    one = panel.rows()[0]
    row = {"judge_id": one.judge_id, "item_id": one.item_id, "first_is_left": True, "position": 99}
    with pytest.raises(IntegrityError), panel.database.write() as c:
        c.execute(assignments.insert().values(row))
    with panel.database.write() as c:
        c.execute(assignments.insert().values(row | {"repeats": one.assignment_id}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {}, "no seed has completions of both baseline and both"),
        (lambda c: {**c, 2: {"baseline": c[2]["baseline"]}}, "both/seed-2: has completions of other prompts"),
        (lambda c: {**c, 2: {**c[2], "baseline": c[2]["baseline"][:-1]}}, "baseline/seed-2: has completions of other"),
        (lambda c: {s: {**a, "both": a["both"][2:]} for s, a in c.items()}, "other prompts than baseline"),
        (lambda c: {s: {**a, "both": a["both"][1:]} for s, a in c.items()}, "both: prompt 0 lacks some of the samples"),
    ],
)
def test_completions_that_do_not_match_are_refused_by_name(tmp_path: Path, change, said: str) -> None:
    from replication.judging.database import Database
    from replication.judging.panel import PanelOptions, create_panel

    with pytest.raises(UserError, match=said):
        create_panel(
            Database(tmp_path / "x.sqlite"), tmp_path / "sealed", "s", change(completions()), ARMS, PanelOptions(1, 1)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"judges": -1}, "judges: -1 must be at least 0"),
        ({"judges": 100_001}, "judges: 100001 must be at most 100000"),
        ({"votes_per_judge": 0}, "votes_per_judge: 0 must be at least 1"),
        ({"attention": -1}, "attention: -1 must be at least 0"),
        ({"repeat_share": 0.6}, r"repeat_share: 0\.6 must lie in \[0, 0\.5\]"),
        ({"votes_per_judge": 10, "attention": 12}, "--attention: 12 is more than the 11 other places"),
        ({"votes_per_judge": 33}, "--votes: 33 is more than the 32 pairs"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_panel(tmp_path / "x.sqlite", tmp_path / "sealed", **options)


# ---------------------------------------------------------------- the record


def voted_panel(tmp_path: Path, seed: int, **options):
    rng = Random(seed)
    made_of = completions(rng.randint(2, 9), range(1, rng.randint(2, 5)), (rng.randint(1, 3), rng.randint(1, 3)))
    n_pairs = (
        len(made_of)
        * len(made_of[1]["baseline"])
        * len(made_of[1]["both"])
        // len({c.prompt_id for c in made_of[1]["both"]})
    )
    chosen = {"judges": 4, "votes_per_judge": min(n_pairs, rng.randint(2, 10)), "repeat_share": 0.3, "attention": 1}
    panel = make_panel(tmp_path / f"{seed}.sqlite", tmp_path / f"sealed-{seed}", made_of, **(chosen | options))
    for number, name in enumerate(panel.names):
        cast = vote_all(panel.store, name, at_random(100 * seed + number), most=rng.choice([3, 100]))
        if cast and rng.random() < 0.5:
            last = last_vote(panel.store, name)
            assert last is not None and panel.store.undo(name, last)
    return panel


@pytest.mark.parametrize("seed", range(8))
def test_the_record_says_what_was_chosen_whatever_the_sides(tmp_path: Path, seed: int) -> None:
    """Wins by arm, recomputed from the texts that were shown: the record's own path is not used."""
    panel = voted_panel(tmp_path, seed)
    made_by = {}
    key = json.loads((panel.sealed / "key.json").read_text())
    texts = completions(9, range(1, 5), (3, 3))
    for seed_, of_arm in texts.items():
        for arm, listed in of_arm.items():
            made_by |= {one.text: (arm, seed_, one.prompt_id, one.sample) for one in listed}
    item = {row.item_id: row for row in panel.rows(items)}
    expected = {}
    assigned = {row.assignment_id: row for row in panel.rows()}
    for vote in panel.standing():
        row = assigned[vote.assignment_id]
        if row.expected is not None:
            continue
        both = [item[row.item_id].first, item[row.item_id].second]
        left, right = both if row.first_is_left else both[::-1]
        chosen = {"left": made_by[left][0], "right": made_by[right][0]}.get(vote.choice, "neither")
        expected[vote_id(key["panel_id"], row.assignment_id)] = (made_by[left], made_by[right], chosen)
    panel.lock()
    (tmp_path / "votes.csv").write_text(votes_csv(panel.database))
    found = {}
    for vote in read_votes(tmp_path / "votes.csv"):
        chosen = {"left": vote.arm_left, "right": vote.arm_right}.get(vote.choice, "neither")
        left = (vote.arm_left, vote.seed, vote.prompt_id, vote.sample_left)
        right = (vote.arm_right, vote.seed, vote.prompt_id, vote.sample_right)
        found[vote.vote_id] = (left, right, chosen)
        assert vote.judge_kind == "human" and vote.vendor == "" and vote.shown_at.endswith("+00:00")
    assert found == expected and found
    counts = json.loads(marginals_json(panel.database))["headline"]
    first = {v.vote_id for v in unsealed_votes(panel.database).votes if not v.repeat_of}
    wins = Counter(chosen for id, (_, _, chosen) in expected.items() if id in first)
    assert (counts["a"], counts["b"], counts["t"]) == (wins["baseline"], wins["both"], wins["neither"])


def test_repeats_name_their_first_vote(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "x.sqlite", tmp_path / "sealed", repeat_share=0.5, attention=2)
    cast = {name: vote_all(panel.store, name, at_random(1)) for name in panel.names}
    assert all(len(one) == 6 + 3 + 2 for one in cast.values())
    panel.lock()
    found = unsealed_votes(panel.database)
    assert len(found.votes) == 2 * 9 and found.lone_repeats == 0
    by_id = {vote.vote_id: vote for vote in found.votes}
    repeats = [vote for vote in found.votes if vote.repeat_of]
    assert len(repeats) == 6
    for vote in repeats:
        original = by_id[vote.repeat_of]
        assert (original.arm_left, original.sample_left) == (vote.arm_right, vote.sample_right)


def test_a_repeat_without_its_first_vote_is_left_out_and_counted(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "x.sqlite", tmp_path / "sealed", repeat_share=0.5)
    vote_all(panel.store, "judge-001", at_random(1))
    original = next(row.repeats for row in panel.rows() if row.judge_id == "judge-001" and row.repeats is not None)
    with panel.database.write() as c:
        c.execute(update(votes).where(votes.c.assignment_id == original).values(undone_at=1.0))
    panel.lock()
    found = unsealed_votes(panel.database)
    assert found.lone_repeats == 1 and len(found.votes) == 9 - 2
    (tmp_path / "votes.csv").write_text(votes_csv(panel.database))
    assert len(read_votes(tmp_path / "votes.csv")) == 7


def test_models_answers_and_judges_are_exported_by_id(tmp_path: Path) -> None:
    from replication.judging.panel import add_judges

    panel = make_panel(tmp_path / "x.sqlite", tmp_path / "sealed", attention=2)
    store = panel.store
    store.answer_survey("judge-001", {"background": "ml", "native_english": "no"})
    asked = iter(["wrong"])

    def choose(shown) -> str:
        if shown.question.startswith("Nothing is to be compared"):
            says_left = "Left" in shown.question
            return ("right" if says_left else "left") if next(asked, None) else ("left" if says_left else "right")
        return "left"

    vote_all(store, "judge-001", choose)
    add_judges(panel.database, panel.sealed, ["m 1"], kind="model", vendor="v, w", votes=1)
    (mine,) = [row.assignment_id for row in panel.rows() if row.judge_id == "m 1"]
    said = {"prompt": "p", "reply": "“A”\n", "model": "m", "endpoint": "sheet", "asked_at": 0.0}
    with panel.database.write() as c:
        row = {"assignment_id": mine, "swapped": False, "status": "choice", "choice": "left", **said}
        c.execute(answers.insert().values(row))
        c.execute(votes.insert().values(assignment_id=mine, showing="s", choice="left", cast_at=1.0))
    for blind in (judges_csv, answers_jsonl, marginals_json, votes_csv):
        with pytest.raises(UserError, match="not locked"):
            blind(panel.database)
    panel.lock()
    folder = PanelFolder(tmp_path / "out", tmp_path / "out" / "judging")
    note = write_votes_record(folder, panel.database, AnalysisConfig())
    assert (note.n_attention_passed, note.n_attention_asked) == (1, 2)
    assert judges_csv(panel.database).splitlines() == [
        "judge_id,kind,vendor,participant,votes,repeats,attention_passed,attention_asked,background,native_english",
        "judge-001,human,,,6,1,1,2,ml,no",
        'm 1,model,"v, w",,1,0,0,0,,',
    ]
    (line,) = map(json.loads, answers_jsonl(panel.database).splitlines())
    assert line["reply"] == "“A”\n" and line["judge_id"] == "m 1"
    assert line["vote_id"] in {vote.vote_id for vote in unsealed_votes(panel.database).votes}
    model = next(v for v in unsealed_votes(panel.database).votes if v.judge_kind == "model")
    assert model.vendor == "v, w" and model.shown_at == "" and model.seconds != model.seconds


# ---------------------------------------------------------------- counts in the published form


def test_the_counts_are_read_as_the_published_ones_are(tmp_path: Path) -> None:
    panel = make_panel(
        tmp_path / "x.sqlite", tmp_path / "sealed", completions(8), judges=6, votes_per_judge=8, repeat_share=0.25
    )
    panel.store.answer_survey("judge-001", {"background": "ml"})
    for number, name in enumerate(panel.names):
        vote_all(panel.store, name, at_random(number), most=4 if number == 3 else 100)
    panel.lock()
    rules = AnalysisConfig(fast_seconds=1e9, experimenters=("judge-002",))
    text = marginals_json(panel.database, rules)
    (tmp_path / "marginals.json").write_text(text)
    found = json.loads(text)
    first = [v for v in unsealed_votes(panel.database).votes if not v.repeat_of]
    data = load_published(tmp_path, {"votes": ["marginals.json"]})
    assert sum(j.tally.n for j in data.votes.judges) == sum(q.tally.n for q in data.votes.questions) == len(first)
    assert found["n_judgments"] == found["headline"]["n"] == len(first) and found["n_judges"] == 6
    head = found["headline"]
    assert head["decisive"] == head["a"] + head["b"]
    assert head["b_pct_decisive"] == round(100 * head["b"] / head["decisive"], 2)
    assert head["p_value"] == pytest.approx(scipy_stats.binomtest(head["b"], head["decisive"]).pvalue, rel=1e-12)
    assert sum(c["n"] for c in found["category_breakdown"].values()) == head["n"]
    for key, lean in (("gain_majority", "treatment"), ("baseline_majority", "baseline"), ("tied", "even")):
        assert found["question_majorities"][key] == sum(q.tally.leans == lean for q in data.votes.questions)
    by_label = {row["label"]: row for row in found["sensitivity_filters"]}
    assert by_label["all judges"]["n"] == head["n"] and by_label["models only"]["n_judges"] == 0
    assert by_label["without people faster than 1e+09 s a vote (median)"]["n"] == 0
    assert by_label["without those who run the experiment"]["excluded"] == ["judge-002"]
    assert "judge-004" in by_label["without judges of fewer than 8 votes"]["excluded"]
    assert by_label["without all of these judges"]["p_value"] is None
    assert found["human_by_background"]["ml"]["n_judges"] == 1
    assert "no test of the arms" in found["note"]
    fitted = fit_marginals(from_json(Marginals, found), "ours")
    assert fitted.ties == pytest.approx(head["t"] / head["n"])


def test_attendance_knows_no_arm(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "x.sqlite", tmp_path / "sealed", repeat_share=0.5)
    vote_all(panel.store, "judge-001", at_random(0))
    one, other = judge_progress(panel.database)
    assert (one.first.part, one.n_repeats, other.first.part) == (6, 3, 0)
    assert {field.name for field in dataclasses.fields(one)}.isdisjoint({"arm", "seed"})


def test_every_table_is_of_this_panel_alone(tmp_path: Path) -> None:
    """The tables that a dump of the database holds, so that a new one is looked at for what it tells."""
    names = "panel study items judges recruits assignments votes remarks model_judges answers unsealed"
    assert set(metadata.tables) == {f"judging_{name}" for name in names.split()}
    panel = make_panel(tmp_path / "x.sqlite", tmp_path / "sealed")
    with panel.database.read() as c:
        assert c.execute(select(metadata.tables["judging_unsealed"])).all() == []
        assert {row.baseline for row in c.execute(select(metadata.tables["judging_panel"]))} == {None}
    assert Store(panel.database).vote("judge-001", "x", "left") is Cast.UNKNOWN
    assert {row.kind for row in panel.rows(judges)} == {"human"}
