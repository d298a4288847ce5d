"""The same votes with prompts, or judges, as the unit: bootstrap intervals and exact sign tests. Pure functions.

Shapes: K clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from replication.audit.published import Tally
from replication.statistics.preference import binomial_p

RESAMPLES = 20_000
SEED = 1


@dataclass(frozen=True)
class Clustered:
    """The share of decisive votes for gain, with an interval that treats clusters as the unit."""

    unit: str
    n_clusters: int
    n_decisive: int
    """Clusters with a decisive vote."""
    share: float
    low: float
    high: float
    """Percentile interval over resampled clusters; NaN below two clusters with a decisive vote."""
    for_gain: int
    for_baseline: int
    even: int
    sign_p: float
    """Exact two-sided sign test over the clusters that lean; NaN without one."""


def cluster(unit: str, tallies: Sequence[Tally], confidence: float = 0.95, resamples: int = RESAMPLES) -> Clustered:
    """Treat each tally as one observation.

    Args:
        unit: name of a cluster, for the table.
        tallies: votes of each of K clusters; all of a cluster's votes are resampled together.
        confidence: coverage of the interval.
        resamples: R, drawn with the seed SEED.
    """
    gain_K = np.array([t.gain for t in tallies], dtype=np.float64)
    decisive_K = np.array([t.decisive for t in tallies], dtype=np.float64)
    low, high = _interval(gain_K, decisive_K, confidence, resamples)
    leans = [t.leans for t in tallies]
    ahead, behind = leans.count("gain"), leans.count("baseline")
    return Clustered(
        unit=unit,
        n_clusters=len(tallies),
        n_decisive=int((decisive_K > 0).sum()),
        share=float(gain_K.sum() / decisive_K.sum()) if decisive_K.sum() else float("nan"),
        low=low,
        high=high,
        for_gain=ahead,
        for_baseline=behind,
        even=leans.count("even"),
        sign_p=float(binomial_p(ahead, ahead + behind)),
    )


def _interval(gain_K: np.ndarray, decisive_K: np.ndarray, confidence: float, resamples: int) -> tuple[float, float]:
    if (decisive_K > 0).sum() < 2:
        return float("nan"), float("nan")
    k = len(gain_K)
    times_RK = np.random.default_rng(SEED).multinomial(k, np.full(k, 1 / k), size=resamples)
    decisive_R = times_RK @ decisive_K
    shares_R = np.divide(times_RK @ gain_K, decisive_R, out=np.full(resamples, np.nan), where=decisive_R > 0)
    low, high = np.nanquantile(shares_R, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
