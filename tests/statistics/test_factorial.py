"""Main effects and interaction of preference: against dense matrices, a t test over seeds, panels of known truth."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from replication.simulation.factorial import ARMS, CONTRASTS, PAIRS, FactorialStudy, factorial_row
from replication.simulation.power import ASSUMED, Study
from replication.statistics.factorial import contrast, effects_t

NEITHER, LAYER, TOKEN, BOTH = ARMS


def panel(rng, n=150, seeds=5, prompts=6, judges=8):
    """Votes scattered over pairs, seeds, prompts and judges as chance has it, unbalanced."""
    pair = rng.integers(len(PAIRS), size=n)
    factors = [rng.integers(k, size=n) for k in (seeds, prompts, judges)]
    return (rng.random(n) < 0.6).astype(float), CONTRASTS[pair], factors


def test_what_the_contrasts_mean():
    assert contrast(LAYER, BOTH) - contrast(NEITHER, TOKEN) == pytest.approx([0, 0, 1]), "the interaction alone"
    assert (contrast(LAYER, BOTH) + contrast(NEITHER, TOKEN)) / 2 == pytest.approx([1, 0, 0])
    assert (contrast(TOKEN, BOTH) + contrast(NEITHER, LAYER)) / 2 == pytest.approx([0, 1, 0])
    for a, b in itertools.permutations(ARMS, 2):
        assert (contrast(a, b) == -contrast(b, a)).all()


def dense(score, x, factors, k):
    """(estimate, standard error) of effect k by matrices of V x V."""
    n, y = len(score), score - 0.5
    beta = np.linalg.lstsq(x, y, rcond=None)[0]
    e = y - x @ beta
    z = beta[k] + np.array([n * (np.linalg.pinv(x.T @ x) @ x[v])[k] * e[v] for v in range(n)])
    seed, prompt, judge = factors
    groups = [seed, prompt, judge, seed * 1000 + prompt]
    alike = [(g[:, None] == g[None, :]).astype(float) for g in groups] + [np.eye(n)]
    level = np.full((n, n), 1 / n)
    squares = [same / same.sum(1, keepdims=True) - level for same in alike]
    expected = np.array([[(q * same).sum() for same in alike] for q in squares])
    found = np.array([z @ q @ z for q in squares])
    share = np.array([same.sum() / n**2 for same in alike])
    variance = share @ np.linalg.solve(expected, found)
    alone = max(share[i] * found[i] / expected[i, i] for i in range(3))
    return z.mean(), np.sqrt(max(variance, alone))


@pytest.mark.parametrize("seed", range(2))
def test_estimates_and_errors_equal_those_of_dense_matrices(seed):
    score, x, factors = panel(np.random.default_rng(seed))
    t = effects_t(score, x, factors, 0.05)
    for k in range(3):
        assert (t.mean[k], t.se[k]) == pytest.approx(dense(score, x, factors, k))
    assert t.low == pytest.approx(t.mean - scipy_stats.t.ppf(0.975, t.df) * t.se)
    flipped = np.random.default_rng(9).choice([-1, 1], len(score))
    same = effects_t((score - 0.5) * flipped + 0.5, x * flipped[:, None], factors, 0.05)
    assert (same.mean, same.p) == (pytest.approx(t.mean), pytest.approx(t.p)), "whichever arm is named first"


def test_seeds_that_alone_vary_give_the_t_test_over_each_seeds_own_effects():
    slopes = np.random.default_rng(3).normal(0.1, 0.1, (6, 3))
    seed, pair = (a.ravel() for a in np.meshgrid(range(6), range(6), indexing="ij"))
    score = 0.5 + (CONTRASTS[pair] * slopes[seed]).sum(1)
    t = effects_t(score, CONTRASTS[pair], (seed, 0 * seed, 0 * seed), 0.05)
    theirs = scipy_stats.ttest_1samp(slopes, 0.0)
    assert (t.mean, t.p) == (pytest.approx(slopes.mean(0)), pytest.approx(theirs.pvalue))
    assert t.conditional_on == ("prompt", "judge")


def test_without_all_four_arms_there_is_no_answer():
    score, x, factors = panel(np.random.default_rng(0))
    reached = (x == contrast(NEITHER, BOTH)).all(1) | (x == contrast(NEITHER, TOKEN)).all(1)
    kept = [index[reached] for index in factors]
    assert effects_t(score[reached], x[reached], kept, 0.05) is None
    assert effects_t([], np.empty((0, 3)), [[], [], []], 0.05) is None
    with_layer = reached | (x == contrast(LAYER, BOTH)).all(1)
    assert effects_t(score[with_layer], x[with_layer], [index[with_layer] for index in factors], 0.05) is not None


def voters(rng, effects, n_seeds, n_judges, votes):
    """Decisive votes by judges who see random pairs: each text has a quality, and the better one often wins."""
    spread = {"seed": 0.05, "prompt": 0.2, "judge": 0.1, "both": 0.15}
    quality = (np.array(ARMS) - 0.5) @ effects[:2] + np.prod(np.array(ARMS) - 0.5, axis=1) * effects[2]
    arm = {
        "seed": rng.normal(0, spread["seed"], (n_seeds, 4)), "prompt": rng.normal(0, spread["prompt"], (32, 4)),
        "judge": rng.normal(0, spread["judge"], (n_judges, 4)), "both": rng.normal(0, spread["both"], (n_seeds, 32, 4)),
    }  # fmt: skip
    rows = []
    for judge, place in itertools.product(range(n_judges), range(votes)):
        if rng.random() < 0.336:
            continue
        prompt, seed, pair = place % 32, rng.integers(n_seeds), rng.integers(6)
        of_arm = arm["seed"][seed] + arm["prompt"][prompt] + arm["judge"][judge] + arm["both"][seed, prompt]
        better = (quality + of_arm / np.sqrt(2))[list(PAIRS[pair])]
        rows.append((rng.random() < 0.5 + better[1] - better[0], pair, seed, prompt, judge))
    chosen, pair, *factors = np.array(rows).T
    return chosen.astype(float), CONTRASTS[pair], factors


def test_planted_effects_are_found_with_the_stated_power_and_covered():
    """60 panels of other voters than those of `replicate power`; limits are three standard errors of both."""
    planted, n = np.array([0.1, 0.0, 0.1]), 60
    stated = factorial_row(FactorialStudy(Study(6, 32, 40, replace(ASSUMED, seed=0.05), 0.6, 0.336), 32), 200, 0)
    rng = np.random.default_rng(5)
    panels = [effects_t(*voters(rng, planted, 6, 40, 32), 0.05) for _ in range(n)]
    found = np.mean([(t.p < 0.05) & (t.mean > 0) for t in panels], axis=0)
    for power, share in ((stated["main_effect"], found[0]), (stated["interaction"], found[2])):
        assert abs(share - power) < 3 * np.sqrt(power * (1 - power) * (1 / n + 1 / 200))
    assert found[0] > 0.5 > found[2], "an interaction takes more votes"
    covered = np.mean([(t.low <= planted) & (planted <= t.high) for t in panels], axis=0)
    assert min(covered) > 0.86
    assert min(stated["coverage"]) > 0.9 and stated["absent"] < 0.1


def test_effects_that_are_not_there_are_found_in_one_panel_of_twenty():
    """The short form of the 2,000 panels in simulation/README.md: three standard errors of 200 above 5 %."""
    null = Study(5, 32, 40, replace(ASSUMED, seed=0.1), 0.5, 0.336)
    row = factorial_row(FactorialStudy(null, 32), 200, 0)
    assert max(row["main_effect"], row["absent"], row["interaction"]) < 0.097
    assert min(row["coverage"]) > 0.903
