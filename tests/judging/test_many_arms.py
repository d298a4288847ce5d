"""Panels of more than two arms: each compared with each, balanced, as blind as those of two; which have not changed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from judging_setup import completions, make_panel, vote_all
from scipy import stats as scipy_stats

from replication.cli.main import main
from replication.errors import UserError
from replication.judging.completions import Chosen
from replication.judging.design import Design
from replication.judging.record import marginals_json, votes_csv
from replication.judging.schema import assignments, items
from replication.judging.seal import read_key
from replication.votes.record import parse_votes

FOUR = ("untreated", "gained", "scaled", "gained_and_scaled")


@pytest.mark.parametrize(
    ("size", "digest"),
    [((32, 6, 3, 3), "560a9ddc04dbe7c9"), ((7, 5, 1, 3), "697d6e2e0028fa5b"), ((5, 2, 2, 2), "0da191e3251c5fca")],
)
def test_the_design_of_two_arms_is_what_it_has_always_been(size: tuple[int, int, int, int], digest: str) -> None:
    cells = Design(*size, "a secret").cells(0, 3 * int(np.prod(size)) + 5)
    text = repr([(c.prompt, c.seed, c.sample_baseline, c.sample_treatment, c.treatment_left) for c in cells])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("n_arms", [3, 4])
@pytest.mark.parametrize("size", [(32, 3, 2), (7, 2, 1), (6, 1, 3)], ids=str)
def test_every_pair_of_arms_is_equally_frequent_and_half_left(size: tuple[int, int, int], n_arms: int) -> None:
    n_prompts, n_seeds, n = size
    design, pairs = Design(n_prompts, n_seeds, n, n, "s", n_arms), list(combinations(range(n_arms), 2))
    n_rows = n_seeds * len(pairs)  # of one round
    met, sides = Counter(), defaultdict(list)
    for number in range(2 * n**2 * n_rows):
        row = design.cells(number * n_prompts, n_prompts)
        assert sorted(c.prompt for c in row) == list(range(n_prompts))
        for pair in pairs:
            left = [c.treatment_left for c in row if c.arms == pair]
            assert abs(2 * sum(left) - len(left)) <= len(left) % 2
        met.update((c.prompt, c.seed, c.arms) for c in row)
        if (number + 1) % n_rows == 0:
            assert len(met) == n_prompts * n_seeds * len(pairs) and len(set(met.values())) == 1
        for c in row:
            sides[c.prompt, c.seed, c.arms].append(c.treatment_left)
    assert all(sum(of) == n**2 for of in sides.values()), "of each prompt, seed and pair of arms half are left"
    distinct = {c.pair for c in design.cells(0, n**2 * n_rows * n_prompts)}
    assert len(distinct) == design.n_distinct == n_prompts * n_rows * n**2


def test_what_is_compared_at_one_prompt_and_seed_says_nothing_of_another() -> None:
    """Over many secrets, the pair of arms that one prompt and seed meets first, by that of another."""
    together = np.zeros((6, 6))
    for secret in range(1500):
        design = Design(6, 2, 1, 1, str(secret), 4)
        together[design._order(0, 0)[0], design._order(5, 1)[0]] += 1
        assert sorted(design._order(3, 1)) == list(range(6))
    assert scipy_stats.chi2_contingency(together).pvalue > 1e-4
    assert scipy_stats.chisquare(together.sum(0)).pvalue > 1e-4


def test_rows_of_later_rounds_give_no_further_equation() -> None:
    """As of two arms: the unknown is which text of a pair of arms is whose, at each prompt and seed."""
    n_prompts, n_seeds, n = 8, 2, 2
    design, rng = Design(n_prompts, n_seeds, n, n, "s", 4), np.random.default_rng(0)
    column: dict[tuple[object, ...], tuple[int, int]] = {}
    equations = np.zeros((3 * n**2 * n_seeds * 6 * 6, n_prompts * n_seeds * 6))
    for row in range(len(equations) // 6):
        for cell in design.cells(row * n_prompts, n_prompts):
            what = cell.prompt, cell.seed, cell.arms
            at, sign = column.setdefault(what, (len(column), rng.choice([-1, 1])))
            pair = list(combinations(range(4), 2)).index(cell.arms)
            equations[6 * row + pair, at] = sign if cell.treatment_left else -sign
    first_round = equations[: n_seeds * 6 * 6]
    assert np.linalg.matrix_rank(equations) == np.linalg.matrix_rank(first_round) < equations.shape[1] / 1.5


def test_nothing_that_is_stored_tells_an_arm_and_the_record_has_both_of_each_vote(tmp_path: Path) -> None:
    made_of = completions(12, range(1, 4), (2,) * 4, FOUR)
    panel = make_panel(
        tmp_path / "judging" / "x.sqlite", tmp_path / "sealed", made_of, FOUR, judges=6, votes_per_judge=24,
        repeat_share=0.25,
    )  # fmt: skip
    arm_of = {one.text: arm for of_arm in made_of.values() for arm, listed in of_arm.items() for one in listed}
    rank = {arm: FOUR.index(arm) for arm in FOUR}
    for name in panel.names:  # the later of the four wins, whatever the side
        vote_all(panel.store, name, lambda s: "left" if rank[arm_of[s.left]] > rank[arm_of[s.right]] else "right")
    key = read_key(panel.sealed, panel.store.panel().key_sha256)

    def on_disk(word: str) -> bool:
        return any(word.encode() in path.read_bytes() for path in (tmp_path / "judging").iterdir())

    assert on_disk("right") and not any(map(on_disk, [*FOUR, key.secret]))
    shown_as = Counter(text for row in panel.rows(items) for text in (row.first, row.second))
    assert set(shown_as.values()) == {3 * 2}, "each text is in as many pairs as any other"
    behind = [key.items[row.item_id] for row in panel.rows(items)]
    later_first = [rank[b.arm_first] > rank[b.arm_second] for b in behind]
    assert scipy_stats.binomtest(sum(later_first), len(later_first)).pvalue > 1e-4
    dealt = [row for row in panel.rows(assignments) if row.repeats is None]
    later_left = [
        (rank[b.arm_first] > rank[b.arm_second]) == row.first_is_left
        for row, b in ((row, key.items[row.item_id]) for row in dealt)
    ]
    flags = [row.first_is_left for row in dealt]
    table = [[sum(f == a and x == b for f, x in zip(flags, later_left, strict=True)) for a in (0, 1)] for b in (0, 1)]
    assert scipy_stats.chi2_contingency(table).pvalue > 1e-4

    panel.lock()
    assert on_disk(FOUR[3])
    votes = parse_votes(votes_csv(panel.database), "votes.csv")
    assert len(votes) == 6 * (24 + 6)
    first = [vote for vote in votes if not vote.repeat_of]
    assert {frozenset((v.arm_left, v.arm_right)) for v in first} == {frozenset(p) for p in combinations(FOUR, 2)}
    for vote in votes:
        chosen, other = (vote.arm_left, vote.arm_right) if vote.choice == "left" else (vote.arm_right, vote.arm_left)
        assert rank[chosen] > rank[other]
    on_pair = [vote for vote in first if {vote.arm_left, vote.arm_right} == set(FOUR[:2])]
    counts = json.loads(marginals_json(panel.database))
    assert counts["model_b"] == FOUR[1] and counts["n_judgments"] == counts["headline"]["b"] == len(on_pair) > 0


def test_what_arms_cannot_be_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", "prepare", str(tmp_path), "--arms", "a,b,c", "--pair", "a,b"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main(["judge", "prepare", str(tmp_path), "--pairs", "all", "--import", "x.json"]) == 2
    assert "--pairs: does not act with --import" in capsys.readouterr().err
    uneven = completions(3, (1,), (2, 2, 2, 1), FOUR)
    with pytest.raises(UserError, match="gained_and_scaled: has 1 completions of each prompt and untreated 2"):
        assert Chosen("s", FOUR, uneven, (), None, None).n_pairs  # type: ignore[arg-type]
