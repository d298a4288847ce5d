"""The small statistics, against numbers worked by hand and against scipy; and the loading of run folders."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats
from synthetic_runs import build_suite, edit_journal

from replication.report.load import load_cells
from replication.statistics.seeds import (
    budget_departure,
    differences_to_first,
    last_share_mean,
    late_mean,
    mean_over_seeds,
    smallest_sign_flip_p,
    summarize_paired,
    window_means,
)

NAN = float("nan")


def test_differences_are_to_the_first_arm_seed_by_seed() -> None:
    values = [[4.0, 5.0, NAN], [4.5, 4.0, 1.0], [NAN, 5.0, 2.0]]
    np.testing.assert_array_equal(differences_to_first(values), [[0.5, -1.0, NAN], [NAN, 0.0, NAN]])
    assert differences_to_first([[1.0, 2.0]]).shape == (0, 2)


def test_paired_by_hand() -> None:
    """1, 2, 3: mean 2, sd 1, t(2) at 0.975 is 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    paired = summarize_paired([1.0, 2.0, 3.0])
    assert (paired.n, paired.mean, paired.sd, paired.note) == (3, 2.0, 1.0, "")
    assert paired.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert paired.high == pytest.approx(2 + 2.484138, abs=1e-6)
    assert (paired.n_positive, paired.n_negative) == (3, 0)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.1, 1, n)
    paired = summarize_paired(np.append(values, NAN), confidence=0.9)
    expected = scipy_stats.ttest_rel(values, np.zeros(n)).confidence_interval(0.9)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert paired.n == n


def test_one_seed_has_no_interval() -> None:
    paired = summarize_paired([0.25, NAN])
    assert (paired.n, paired.mean, paired.note) == (1, 0.25, "one seed: no interval")
    assert math.isnan(paired.sd) and math.isnan(paired.low) and math.isnan(paired.high)


def test_no_seed_is_nothing_and_not_zero() -> None:
    paired = summarize_paired([NAN, NAN])
    assert paired.n == 0 and math.isnan(paired.mean) and paired.note == "no seed has both values"


def test_equal_values_have_an_interval_of_no_width() -> None:
    paired = summarize_paired([0.0, 0.0])
    assert (paired.low, paired.high, paired.n_positive, paired.n_negative) == (0.0, 0.0, 0, 0)


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 0.5), (3, 0.25), (6, 0.03125)])
def test_smallest_sign_flip_p_is_reached_by_enumeration(n: int, p: float) -> None:
    signs = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1)
    means = np.abs(signs.mean(0))  # differences that are all 1: the most extreme sample there is
    assert smallest_sign_flip_p(n) == p == (means >= 1).mean()


def test_smallest_p_without_seeds_is_missing() -> None:
    assert math.isnan(smallest_sign_flip_p(0))


def test_late_mean_is_of_all_where_there_are_fewer() -> None:
    assert late_mean(range(1, 21)) == 15.5
    assert late_mean([1.0, 3.0]) == 2.0
    assert math.isnan(late_mean([]))


def test_late_mean_does_not_skip_a_missing_value() -> None:
    assert math.isnan(late_mean([1.0, NAN, 3.0]))
    assert late_mean([NAN, 2.0], k=1) == 2.0


def test_last_share_mean() -> None:
    assert last_share_mean(range(1, 31)) == 29.0
    assert last_share_mean([7.0]) == 7.0
    assert math.isnan(last_share_mean([]))


def test_budget_departure_counts_beyond_one_percent() -> None:
    budget = budget_departure([1.99, 1.02, 1.009, 0.995, 0.98, NAN])
    assert (budget.n_failing, budget.n_measured, budget.share) == (3, 5, 0.6)
    nothing = budget_departure([NAN])
    assert nothing.n_measured == 0 and math.isnan(nothing.share)


def test_window_means_by_hand() -> None:
    ends, means = window_means([1.0, 3.0, NAN, 5.0, NAN, NAN, 7.0], 2)
    np.testing.assert_array_equal(ends, [2, 4, 6, 7])
    np.testing.assert_array_equal(means, [2.0, 5.0, NAN, 7.0])
    assert len(window_means([], 3)[0]) == 0


def test_mean_over_seeds_keeps_to_common_steps() -> None:
    steps, mean = mean_over_seeds([([10, 20, 30], [1.0, 2.0, NAN]), ([10, 30, 40], [3.0, 5.0, 7.0])])
    np.testing.assert_array_equal(steps, [10, 30])
    np.testing.assert_array_equal(mean, [2.0, NAN])
    assert len(mean_over_seeds([])[0]) == 0


# ---------------------------------------------------------------- loading


def test_cells_come_with_their_state_and_arrays(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(
        tmp_path / "out", arms=("baseline", "both"), failed={("both", 1): 20}, missing=[("both", 2)]
    )
    cells = {(c.arm, c.seed): c for c in load_cells(suite_dir, suite.arms, suite.seeds)}
    done, failed, missing = cells["baseline", 1], cells["both", 1], cells["both", 2]
    assert [c.state for c in (done, failed, missing)] == ["complete", "failed", "pending"]
    assert done.train.steps.tolist() == list(range(5, 61, 5))
    assert done.validation.steps.tolist() == list(range(3, 61, 3))
    assert done.per_step["train/grad_norm"].shape == (60,)
    assert np.isfinite(done.per_step["train/loss_nats"]).all()
    assert (done.step, done.tokens, done.config["training.steps"]) == (60, 60 * 2048, 60)
    assert len(done.samples) == 14
    assert failed.failure is not None and failed.failure.error == "UserError: the loss was not finite"
    assert failed.step == 20
    assert missing.step == 0 and math.isnan(missing.tokens) and not len(missing.train.steps)
    assert math.isnan(missing.validation.last("val/loss_nats"))


def test_missing_numbers_are_nan_and_not_zero(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline",), seeds=(1,))
    run = suite_dir.cell("baseline", 1)
    edit_journal(run, 10, **{"gain/mean": None, "per_step": {"train/grad_norm": [1.0, None]}})
    with open(run.metrics, "a") as file:
        file.write('{"step": 65, "tok')  # a torn last line
    (cell,) = load_cells(suite_dir, suite.arms, suite.seeds)
    gain = cell.train.column("gain/mean")
    assert math.isnan(gain[1]) and np.isfinite(np.delete(gain, 1)).all()
    norms = cell.per_step["train/grad_norm"]
    assert norms[8] == 1.0 and np.isnan(norms[[5, 6, 7, 9]]).all()
    assert np.isnan(cell.train.column("never/logged")).all()


def test_a_later_line_of_the_same_step_wins(tmp_path: Path) -> None:
    suite_dir, suite = build_suite(tmp_path / "out", arms=("baseline",), seeds=(1,))
    run = suite_dir.cell("baseline", 1)
    with open(run.metrics, "a") as file:
        file.write('{"step": 60, "val/loss_nats": 1.25}\n')
    (cell,) = load_cells(suite_dir, suite.arms, suite.seeds)
    assert cell.validation.last("val/loss_nats") == 1.25
    assert cell.validation.last("val/entropy_predictive_nats") > 2
