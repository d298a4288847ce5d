"""The assignments alone, which lie on the judging server, do not tell which arm is first: an attack by linear algebra.

Each judge's set is one equation in the unknown signs "the first text is the treatment's", if the design makes it half
left. The attack solves for them; it must do no better than a guess, and does far better on a design that balances every
part of a row.
"""

from __future__ import annotations

from itertools import islice, zip_longest
from pathlib import Path
from random import Random

import numpy as np
import pytest
from judging_setup import MadePanel, completions, make_panel
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from replication.judging.design import Cell, Design, session
from replication.judging.panel import add_judges
from replication.judging.schema import assignments
from replication.judging.seal import read_key

Layout = tuple[int, int, int, int, int]
PARTS: list[Layout] = [  # prompts, seeds, samples of each arm, votes, judges: each solved where parts are half left
    (32, 1, 1, 8, 100), (32, 1, 1, 4, 200), (32, 3, 1, 8, 160), (31, 1, 1, 8, 100), (16, 1, 2, 4, 250),
]  # fmt: skip
OTHERS: list[Layout] = [
    (32, 1, 1, 32, 40),
    (16, 2, 2, 24, 60),
    (32, 1, 1, 20, 60),
    (8, 2, 2, 16, 60),
    (33, 2, 1, 13, 60),
]


def alternating(self: Design, row: int) -> list[Cell]:
    """A row in which left and right take turns: half left in every part."""
    cells = [self._cell(row, prompt) for prompt in range(self.n_prompts)]
    self._rng("row", row).shuffle(cells)
    left, right = ([c for c in cells if c.treatment_left is side] for side in (True, False))
    return [c for both in zip_longest(*sorted((left, right), key=len, reverse=True)) for c in both if c is not None]


def agreement(guess: np.ndarray, truth: np.ndarray, component: np.ndarray) -> float:
    """Share of signs that are right, up to one sign for each component."""
    right = np.bincount(component, guess == truth)
    size = np.bincount(component)
    return float(np.maximum(right, size - right).sum() / len(truth))


def attack(panel: MadePanel) -> tuple[float, float, float]:
    """(agreement with the key, that of a blind guess, standard deviation of the latter), up to a sign a component."""
    rows = [row for row in panel.rows(assignments) if row.expected is None]  # what is in the database
    items, judges = sorted({row.item_id for row in rows}), sorted({row.judge_id for row in rows})
    at = {name: i for names in (items, judges) for i, name in enumerate(names)}
    where = [at[row.judge_id] for row in rows], [at[row.item_id] for row in rows]
    shape = len(judges), len(items)
    sign = np.array([1.0 if row.first_is_left else -1.0 for row in rows])
    is_first = np.array([row.repeats is None for row in rows])
    equations = coo_array((sign * is_first, where), shape).toarray()
    with_repeats = coo_array((sign, where), shape).toarray()
    # a repeat takes its first vote's term out of the equation, and brings no other
    assert set(np.unique(with_repeats - equations)) <= {-1.0, 0.0, 1.0}
    assert not with_repeats[(with_repeats - equations) != 0].any()
    met = np.abs(equations)
    _, component = connected_components(met.T @ met, directed=False)
    guess = np.zeros(len(items))
    for part in range(component.max() + 1):
        mine = component == part
        guess[mine] = np.sign(np.linalg.svd(equations[:, mine])[2][-1])
    key = read_key(panel.sealed, panel.store.panel().key_sha256)
    truth = np.array([1.0 if key.items[item].arm_first == key.treatment else -1.0 for item in items])
    rng = np.random.default_rng(0)
    blind = [agreement(rng.choice([-1.0, 1.0], len(items)), truth, component) for _ in range(400)]
    return agreement(guess, truth, component), float(np.mean(blind)), float(np.std(blind))


def made(tmp_path: Path, layout: Layout) -> MadePanel:
    prompts, seeds, samples, votes, judges = layout
    texts = completions(prompts, range(seeds), (samples, samples))
    panel = make_panel(
        tmp_path / "x.sqlite", tmp_path / "sealed", texts, judges=judges, votes_per_judge=votes, repeat_share=0.2,
        attention=1,
    )  # fmt: skip
    add_judges(panel.database, panel.sealed, ["a model"], kind="model", vendor="v", votes=5)
    return panel


@pytest.mark.parametrize("layout", [*PARTS, *OTHERS], ids=str)
def test_the_assignments_do_not_tell_the_key(tmp_path: Path, layout: Layout) -> None:
    found, blind, spread = attack(made(tmp_path, layout))
    assert found < blind + 6 * spread, (found, blind, spread)


@pytest.mark.parametrize("layout", PARTS, ids=str)
def test_the_attack_solves_a_design_whose_parts_are_half_left(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Design, "_row", alternating)
    found, blind, spread = attack(made(tmp_path, layout))
    assert found > 0.9 and found > blind + 6 * spread, (found, blind, spread)


@pytest.mark.parametrize("size", [(8, 2, 2, 2), (7, 3, 1, 1), (6, 1, 3, 3), (5, 2, 1, 3)], ids=str)
def test_rows_that_come_again_give_no_further_equation(size: tuple[int, int, int, int]) -> None:
    """Whoever knows where each row begins has as many equations as rows in one round, however many judges there are."""
    design = Design(*size, secret="s")
    n_rows = design.n_distinct // design.n_prompts
    rng, first = Random(1), {}
    equations = np.zeros((5 * n_rows, design.n_distinct))
    for i in range(len(equations)):
        for cell in design.cells(i * design.n_prompts, design.n_prompts):
            column, sign = first.setdefault(cell.pair, (len(first), rng.choice([-1, 1])))
            equations[i, column] = sign if cell.treatment_left else -sign
    assert np.linalg.matrix_rank(equations) == n_rows


def test_neither_parts_nor_order_nor_repeats_know_a_side() -> None:
    """All sides are changed at will: every judge gets the same pairs, in the same order, with the same repeats."""

    def places(design: Design) -> list[list[object]]:
        hands = islice(design.deal([5, 8, 20, 3, 32, 9, 9]), 7)
        sessions = [session(hand, 2, 1, Random(i)) for i, hand in enumerate(hands)]
        return [[(p.cell.pair if p.cell else p.expected, p.repeats) for p in one] for one in sessions]

    plain, changed = Design(8, 2, 2, 2, "s"), Design(8, 2, 2, 2, "s")
    changed.__dict__["_first_side"] = [[0] * 8, [1, 0] * 4]
    assert plain._first_side != changed._first_side
    assert places(plain) == places(changed)
