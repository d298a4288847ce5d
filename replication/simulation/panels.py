"""Panels that are not as the test's model assumes: votes drawn on the logit scale, related judges, copied votes, few or
skewed seeds, unequal sets. Independent of `simulate.draw_scores`, which draws chances as that model has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special
from scipy import stats as scipy_stats

from replication.console import plural
from replication.simulation.simulate import VotePattern
from replication.statistics.alike import alike_judges, as_one
from replication.statistics.crossed import decisive_share_t
from replication.statistics.preference import VENDOR, Ballots

Floats = NDArray[np.float64]

JUDGES = 40
PROMPT, JUDGE, SEED_PROMPT, FAMILY, FAMILY_PROMPT = 0.8, 0.4, 0.6, 0.6, 0.4
"""Standard deviations on the logit scale; near one half a chance moves by a fourth of that."""
TIES = 1 / 3
SKEW = 1.0
"""Standard deviation of the logarithm of skewed seeds' effects: a skewness of 6."""
FEWEST_VOTES = 8
"""The fewest votes of a judge in an unequal panel."""


@dataclass(frozen=True)
class Panel:
    """Who votes, and how the seeds vary."""

    name: str
    seeds: int = 5
    seed_spread: float = 0.4
    is_skewed: bool = False
    vendors: tuple[int, ...] = ()
    """Models of each vendor; the other judges are people."""
    copies: tuple[int, int] = (0, 1)
    """So many judges copy the votes of the first so many, in turn."""
    is_unequal: bool = False
    """Whether sets go from all prompts down to FEWEST_VOTES votes."""

    def pattern(self, prompts: int) -> VotePattern:
        """A set begins where the last one's judge would go on; seeds in rotation; a copied set is the same set."""
        fewest = min(FEWEST_VOTES, prompts) if self.is_unequal else prompts
        most = np.geomspace(prompts, fewest, JUDGES).round()
        own = np.arange(JUDGES)
        copying, copied = self.copies
        own[JUDGES - copying :] = np.arange(copying) % copied
        judge = np.repeat(np.arange(JUDGES), np.asarray(most, dtype=np.int64)[own])
        place = np.concatenate([np.arange(int(most[k])) for k in own])
        of = own[judge]
        prompt = (7 * of + place) % prompts
        return VotePattern((prompt + of + of // self.seeds) % self.seeds, prompt, judge)

    def vendor(self) -> NDArray[np.int64]:
        """Of each judge; -1: a person."""
        models = np.repeat(np.arange(len(self.vendors)), self.vendors)
        return np.concatenate([np.full(JUDGES - len(models), -1), models])

    def seed_effects(self, normal: Floats) -> Floats:
        """Effects of mean 0 from standard normal draws, or quantiles."""
        if self.is_skewed:
            variance = np.expm1(SKEW**2) * np.exp(SKEW**2)
            normal = (np.exp(SKEW * normal) - np.exp(SKEW**2 / 2)) / np.sqrt(variance)
        return self.seed_spread * normal

    def intercept(self, share: float) -> float:
        """The logit at which the mean chance over all seeds, prompts and judges is this share."""
        if share == 0.5 and not self.is_skewed:
            return 0.0
        quantiles = scipy_stats.norm.ppf((np.arange(400) + 0.5) / 400)
        models = (self.vendor() >= 0).mean()
        families = np.sqrt(FAMILY**2 + FAMILY_PROMPT**2)
        person = np.sqrt(PROMPT**2 + JUDGE**2 + SEED_PROMPT**2)
        parts = ((1 - models, person), (models, np.hypot(person, families)))

        def excess(logit: float) -> float:
            chances = (
                weight * special.expit(logit + self.seed_effects(quantiles)[:, None] + sd * quantiles).mean()
                for weight, sd in parts
            )
            return float(sum(chances)) - share

        return float(optimize.brentq(excess, -5, 5))

    def scores(self, share: float, who: VotePattern, prompts: int, n: int, generator: np.random.Generator) -> Floats:
        """Votes of n experiments, [R, V], as of simulate.draw_scores."""

        def normal(*size: int) -> Floats:
            return generator.standard_normal((n, *size))

        vendor = self.vendor()
        logit = self.intercept(share) + self.seed_effects(normal(self.seeds))[:, who.seed]
        logit += PROMPT * normal(prompts)[:, who.prompt] + JUDGE * normal(JUDGES)[:, who.judge]
        logit += SEED_PROMPT * normal(self.seeds, prompts)[:, who.seed, who.prompt]
        if self.vendors:
            family = FAMILY * normal(len(self.vendors), 1) + FAMILY_PROMPT * normal(len(self.vendors), prompts)
            of_vote = vendor[who.judge]
            logit += np.where(of_vote >= 0, family[:, of_vote, who.prompt], 0.0)
        scores = (generator.random(logit.shape) < special.expit(logit)).astype(np.float64)
        scores[generator.random(logit.shape) < TIES] = 0.5
        copying, copied = self.copies
        for k in range(copying):
            scores[:, who.judge == JUDGES - copying + k] = scores[:, who.judge == k % copied]
        return scores

    def test(self, scores: Floats, who: VotePattern, generator: np.random.Generator) -> tuple[Floats, Floats, Floats]:
        """(p, low, high), [R], of the report's primary decision: a vendor, or judges who are alike, are a cluster."""
        vendor, judge = self.vendor()[who.judge], who.judge.astype(np.str_)
        cluster = np.where(vendor >= 0, np.char.add(VENDOR, vendor.astype(np.str_)), judge)
        if not self.copies[0]:
            t = decisive_share_t(scores, (who.seed, who.prompt, cluster))
            return t.p, t.low, t.high
        left = generator.random(len(who)) < 0.5
        tests = []
        for row in scores:
            b = Ballots(row, who.seed, who.prompt, judge, vendor < 0, left, cluster)
            t = decisive_share_t(row[None], (b.seed, b.prompt, as_one(b, alike_judges(b)).cluster))
            tests.append((t.p[0], t.low[0], t.high[0]))
        p, low, high = np.array(tests).T
        return p, low, high


VENDORS = ((40,), (14, 13, 13), (7, 7, 7, 7, 6, 6))
PANELS = (
    *(Panel(f"40 people, seed spread {spread:g}", seed_spread=spread) for spread in (0.2, 0.4, 0.8)),
    *(Panel(f"40 people, {n} seeds", seeds=n) for n in (3, 6, 8, 12)),
    Panel("40 people, 3 seeds of spread 0.8", seeds=3, seed_spread=0.8),
    *(Panel(f"40 people, {n} skewed seeds of spread 0.8", n, 0.8, is_skewed=True) for n in (3, 5, 8)),
    *(Panel(f"40 models of {plural(len(of), 'vendor')}", vendors=of) for of in VENDORS),
    Panel("40 models of 6 unequal vendors", vendors=(15, 10, 7, 4, 2, 2)),
    Panel("27 people, 13 models of one vendor", vendors=(13,)),
    Panel("20 people, 20 models of 4 unequal vendors", vendors=(11, 5, 2, 2)),
    Panel("8 of 40 people are one", copies=(7, 1)),
    Panel("20 people, each under two names", copies=(20, 20)),
    Panel("40 people, 8 to 32 votes each", is_unequal=True),
)
