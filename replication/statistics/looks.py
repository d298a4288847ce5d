"""Levels for p where results are looked at before all seeds are in, so that all looks together keep one level.

Test statistics Z_k at information t_k, here the share of the seeds, make a walk Z_k sqrt(t_k) with independent normal
steps. Its density among the experiments that have not ended is carried from look to look by quadrature (Armitage,
McPherson & Rowe 1969, JRSS A 132:235; Jennison & Turnbull 2000, chapter 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats

NODES = 120
DEEPEST = 8.0
"""Standard deviations below zero at which the walk's density is cut off."""


@cache
def look_levels(looks: tuple[int, ...], alpha: float, boundaries: str, sides: int) -> tuple[float, ...]:
    """The level that p is held against at each look.

    haybittle_peto: alpha / 50 before the last look, and there what is left of alpha, rounded down to a multiple of
    that: .001, .001, .049 of .05 (Haybittle 1971; Peto et al. 1976, Br J Cancer 34:585). obrien_fleming: by information
    t, 2 - 2 Phi(z(alpha / 2) / sqrt(t)) is spent (Lan & DeMets 1983, Biometrika 70:659), half of it on either side
    where the test has two.

    Args:
        looks: numbers of seeds, ascending; the last one is all.
        alpha: of all looks together.
        sides: of the test, 1 or 2.
    """
    information, own = [n / looks[-1] for n in looks], alpha / sides
    if boundaries == "obrien_fleming":
        spent = 2 * scipy_stats.norm.sf(scipy_stats.norm.isf(own / 2) / np.sqrt(information))
        return tuple(sides * level for level in _levels(information, (), spent))
    early = (own / 50,) * (len(looks) - 1)
    last = _levels(information, early, [own] * len(looks))[-1]
    return *(sides * level for level in early), alpha / 50 * float(np.floor(50 * last / own + 1e-9))


def alpha_for(p: float, looks: tuple[int, ...], at: int, boundaries: str, sides: int) -> float:
    """The smallest alpha of all looks together at which p would reject at look `at`: what Holm's correction is of.

    His steps divide alpha, and a part of it has boundaries of its own, which by O'Brien and Fleming are not parts of
    alpha's (sequential p-values: Liu & Anderson 2008, JASA 103:1621; with Holm: Maurer & Bretz 2013, SBR 5:311).
    """

    def below(log_alpha: float) -> float:
        return look_levels(looks, float(np.exp(log_alpha)), boundaries, sides)[at] - p

    most = np.log(0.9)
    if p <= 0 or below(most) < 0:
        return float(p > 0)
    return float(np.exp(optimize.brentq(below, min(np.log(p), most) - 1, most, xtol=1e-9)))


def _levels(information: Sequence[float], given: Sequence[float], spent: Sequence[float]) -> list[float]:
    """One-sided levels: the first ones as given, at each later look what spends alpha up to its entry of `spent`."""
    unit, weights = np.polynomial.legendre.leggauss(NODES)
    walk, density = np.zeros(1), np.ones(1)  # nodes, and density times weight at each
    levels, crossed, before = list[float](), 0.0, 0.0
    for k, now in enumerate(information):
        step, root = np.sqrt(now - before), np.sqrt(now)

        def crossing(z: float) -> float:
            return float(density @ scipy_stats.norm.sf((z * root - walk) / step))  # noqa: B023  (called within the round)

        if k < len(given):
            z = float(scipy_stats.norm.isf(given[k]))
        else:
            z = optimize.brentq(lambda z, left=spent[k] - crossed: crossing(z) - left, -DEEPEST, 5 * DEEPEST)
        levels.append(float(scipy_stats.norm.sf(z)))
        crossed += crossing(z)
        half = (z + DEEPEST) * root / 2
        nodes = half * (unit + 1) - DEEPEST * root
        density = weights * half * (scipy_stats.norm.pdf((nodes[:, None] - walk) / step) @ density) / step
        walk, before = nodes, now
    return levels
