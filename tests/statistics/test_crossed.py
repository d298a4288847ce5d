"""The mean over seeds, prompts and judges, against a worked example, statsmodels, scipy and a plain simulation."""

import itertools

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats as scipy_stats

from replication.protocol.questions import CROSSED
from replication.report.preference import MIN_VENDORS
from replication.simulation.simulate import Spread, draw_scores, vote_pattern
from replication.statistics.alike import ALIKE_LEVEL, ALIKE_SHARE
from replication.statistics.crossed import MOST_DEGREES, CrossedDesign, decisive_share_t


def crossed(n_seeds, n_prompts, n_judges):
    """Every seed, prompt and judge together, once."""
    return np.array(list(itertools.product(range(n_seeds), range(n_prompts), range(n_judges)))).T


def test_a_worked_example():
    # 2 seeds x 2 prompts x 2 judges. Votes by (seed, prompt): 1 1 | 1 0 || 1 0 | 0 0; grand mean 4/8.
    # Seed means .75, .25: sum of squares 4(.0625 + .0625) = .5. Prompt means .75, .25: .5. Judge means .75, .25: .5.
    # Cell means 1, .5, .5, 0: 2(.25 + .25) = 1 = seeds + prompts, so the interaction has none. In all 8 x .25 = 2,
    # so the rest has 2 - .5 - .5 - .5 - 0 = .5 on 7 - 4 = 3 degrees of freedom: 1/6.
    # Mean squares .5, .5, .5, 0, 1/6. Variances: rest 1/6; seed x prompt (0 - 1/6)/2 = -1/12;
    # seed (.5 - 0)/4 = 1/8; prompt 1/8; judge (.5 - 1/6)/4 = 1/12.
    # Variance of the mean: 1/16 + 1/16 + 1/24 - 1/48 + 1/48 = 1/6. Each factor alone: .5/8 = 1/16 on 1 degree;
    # Satterthwaite with each square 1 + 2/1 = 3 times: (1/36)/(9/256) = 64/81, but not fewer than a factor has: 1.
    seed, prompt, judge = crossed(2, 2, 2)
    t = CrossedDesign(seed, prompt, judge).t([1, 1, 1, 0, 1, 0, 0, 0])
    expected = {"seed": 1 / 8, "prompt": 1 / 8, "judge": 1 / 12, "seed x prompt": -1 / 12, "rest": 1 / 6}
    assert t.components == pytest.approx(expected)
    assert (t.mean, t.se**2, t.df) == pytest.approx((0.5, 1 / 6, 1))
    assert t.p == pytest.approx(1.0)


@pytest.mark.parametrize(("seed_sd", "capped"), [(3.0, False), (0.02, True)])
def test_degrees_of_freedom_restated(seed_sd, capped):
    n_seeds, n_prompts, n_judges = 4, 7, 6
    rng = np.random.default_rng(8)
    y = seed_sd * rng.normal(size=(n_seeds, 1, 1)) + 0.5 * rng.normal(size=(1, n_prompts, 1))
    y = y + 0.4 * rng.normal(size=(1, 1, n_judges)) + 0.3 * rng.normal(size=(n_seeds, n_prompts, n_judges))
    t = CrossedDesign(*crossed(n_seeds, n_prompts, n_judges)).t(y.ravel())
    alone = [y.mean(axis).var(ddof=1) / n for axis, n in (((1, 2), n_seeds), ((0, 2), n_prompts), ((0, 1), n_judges))]
    squares = sum(v**2 * (1 + 2 / df) / df for v, df in zip(alone, (3, 6, 5), strict=True))
    assert (t.se**4 / squares > 6) == capped
    assert t.df == pytest.approx(min(6, max(3, t.se**4 / squares)))


def test_the_words_of_a_plan_are_enough_to_redo_the_test():
    rng = np.random.default_rng(5)
    kept = rng.random(4 * 9 * 6) < 0.4
    labels = crossed(4, 9, 6)[:, kept]
    y, n = rng.normal(0.6, 0.5, kept.sum()) + 0.4 * rng.normal(size=9)[labels[1]], kept.sum()
    t = CrossedDesign(*labels).t(y)
    counts = [np.bincount(of) for of in (*labels, labels[0] * 9 + labels[1])]
    alone = [(c @ (np.bincount(of, y) / c - y.mean()) ** 2) * (c @ c) / (n**2 - c @ c) / n
             for of, c in zip(labels, counts, strict=False)]  # fmt: skip
    shares = [c @ c / n**2 for c in counts] + [1 / n]
    v = max(
        *alone,
        np.dot(shares, [float(t.components[name]) for name in ("seed", "prompt", "judge", "seed x prompt", "rest")]),
    )
    levels = [3, 8, 5]
    df = np.clip(v**2 / sum(own**2 * (1 + 2 / d) / d for own, d in zip(alone, levels, strict=True)), 3, 6)
    p = 2 * scipy_stats.t.sf(abs(y.mean() - 0.5) / np.sqrt(v), df)
    assert (t.se**2, t.df, t.p) == pytest.approx((v, df, p)) and 3 < df < 6
    for formula in ("SS_f sum(n_k^2) / (N^2 - sum(n_k^2)) / N", "v^2 / sum_f(v_f^2 (1 + 2 / d_f) / d_f)"):
        assert formula in CROSSED
    assert (ALIKE_LEVEL, ALIKE_SHARE, MOST_DEGREES, MIN_VENDORS) == (0.01, 0.8, 2, 4), "as the words say"
    for words in ("at 1 %", "in 80 %", "at most twice", "fewer than four vendors"):
        assert words in CROSSED


def test_components_equal_those_of_statsmodels_restricted_likelihood():
    # In balanced data both are the same where no estimate is negative.
    seed, prompt, judge = crossed(5, 8, 6)
    rng = np.random.default_rng(4)
    y = rng.normal(size=5)[seed] + 0.8 * rng.normal(size=8)[prompt] + 0.6 * rng.normal(size=6)[judge]
    y = y + 0.5 * rng.normal(size=(5, 8))[seed, prompt] + 0.7 * rng.normal(size=len(y))
    ours = CrossedDesign(seed, prompt, judge).t(y).components
    assert min(ours.values()) > 0
    frame = pd.DataFrame({"y": y, "s": seed, "p": prompt, "j": judge, "sp": seed * 8 + prompt, "one": 1})
    formula = {name: f"0 + C({name})" for name in ("s", "p", "j", "sp")}
    model = smf.mixedlm("y ~ 1", frame, groups="one", vc_formula=formula)
    fit = model.fit(reml=True)
    theirs = dict(zip(model.exog_vc.names, fit.vcomp, strict=True)) | {"rest": fit.scale}
    named = {"seed": "s", "prompt": "p", "judge": "j", "seed x prompt": "sp", "rest": "rest"}
    assert {name: float(ours[name]) for name in named} == pytest.approx(
        {name: theirs[key] for name, key in named.items()}, rel=2e-3
    )


def test_seeds_that_alone_vary_give_the_t_test_over_seed_means():
    rng = np.random.default_rng(0)
    effect = rng.normal(0.6, 0.1, 6)
    seed, prompt, judge = crossed(6, 8, 7)
    t = CrossedDesign(seed, prompt, judge).t(effect[seed])
    theirs = scipy_stats.ttest_1samp(effect, 0.5)
    interval = theirs.confidence_interval(0.95)
    assert (t.df, t.p, t.low, t.high) == pytest.approx((5, theirs.pvalue, interval.low, interval.high))


def test_the_variance_is_unbiased_whatever_votes_are_missing():
    rng = np.random.default_rng(1)
    who = vote_pattern(5, 12, 10)
    kept = rng.random(len(who)) < 0.6
    seed, prompt, judge = (index[kept] for index in who.factors)
    design, n = CrossedDesign(seed, prompt, judge), 4000
    y = 0.3 * rng.normal(size=(n, 5))[:, seed] + 0.4 * rng.normal(size=(n, 12))[:, prompt]
    y = y + 0.2 * rng.normal(size=(n, 10))[:, judge] + 0.3 * rng.normal(size=(n, 60))[:, seed * 12 + prompt]
    t = design.t(y + 0.5 * rng.normal(size=y.shape))
    means = {name: float(value.mean()) for name, value in t.components.items()}
    truth = {"seed": 0.09, "prompt": 0.16, "judge": 0.04, "seed x prompt": 0.09, "rest": 0.25}
    assert means == pytest.approx(truth, abs=0.008)
    assert (t.se**2).mean() == pytest.approx(t.mean.var(), rel=0.1)  # conservative by the floor, which is small here


def test_one_level_is_not_generalised_beyond():
    seed, prompt, judge = crossed(1, 6, 5)
    t = CrossedDesign(seed, prompt, judge).t(np.random.default_rng(0).random(30))
    assert t.conditional_on == ("seed",)
    assert "seed" not in t.components and np.isfinite(t.se)


def test_judges_who_voted_once_are_part_of_the_rest():
    rng = np.random.default_rng(0)
    y = rng.random(20)
    seed, prompt = np.arange(20) % 4, np.arange(20) % 5
    t = CrossedDesign(seed, prompt, np.arange(20)).t(y)
    assert "judge" not in t.components and "rest" in t.components
    assert np.isfinite(t.se)


def test_votes_that_do_not_vary_have_no_interval():
    seed, prompt, judge = crossed(3, 4, 2)
    t = CrossedDesign(seed, prompt, judge).t(np.full(24, 0.5))
    assert t.mean == 0.5
    assert np.isnan([t.se, t.p, t.low, t.high]).all()


def test_experiments_at_once_equal_one_by_one():
    rng = np.random.default_rng(0)
    who = vote_pattern(3, 8, 6)
    design, y = CrossedDesign(*who.factors), rng.random((2, 4, len(who)))
    at_once = design.t(y)
    assert at_once.se[1, 2] == pytest.approx(design.t(y[1, 2]).se)
    assert at_once.p.shape == (2, 4)


def test_ties_are_no_evidence_of_the_share():
    """Seeds of nothing but ties must not make the share surer: the decision is that of the decisive votes alone."""
    rng = np.random.default_rng(2)
    who = vote_pattern(6, 8, 10)
    scores = (rng.random(len(who)) < 0.8).astype(float)
    scores[np.isin(who.seed, (2, 3, 4, 5))] = 0.5
    t = decisive_share_t(scores[None], who.factors)
    kept = who.seed < 2
    alone = CrossedDesign(who.seed[kept], who.prompt[kept], who.judge[kept]).t(scores[kept])
    assert (t.mean[0], t.se[0], t.df[0], t.p[0]) == pytest.approx((alone.mean, alone.se, alone.df, alone.p))
    assert np.isnan(decisive_share_t(np.full((2, len(who)), 0.5), who.factors).p).all()


def test_what_has_one_level_decides_nothing():
    who = vote_pattern(5, 8, 6)
    scores = (np.random.default_rng(0).random((2, len(who))) < 0.9).astype(float)
    t = decisive_share_t(scores, (who.seed, who.prompt, np.zeros(len(who))))
    assert np.isnan([t.p, t.low, t.high]).all() and np.isfinite(t.mean).all()


def test_the_level_holds_where_ties_lie_unevenly():
    """Three of five seeds nearly all ties; 600 experiments without any preference."""
    rng = np.random.default_rng(3)
    who = vote_pattern(5, 16, 20)
    scores = draw_scores(0.5, Spread(seed=0.1), 0.0, who, 600, rng)
    uneven = np.where(who.seed < 3, 0.9, 0.1)
    scores[rng.random(scores.shape) < uneven] = 0.5
    t = decisive_share_t(scores, who.factors)
    assert (t.p < 0.05).mean() <= 0.08
