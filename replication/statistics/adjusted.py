"""Preference between texts that are equal in what judges are known to reward, such as their length. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
MOST_STEPS, CLOSE = 50, 1e-10


def equal_texts_logit(chosen_V: Floats, covariates_VC: Floats) -> Floats:
    """Votes as parts of an estimate: float64 [V], whose mean is the logit of the share where all C differences are 0.

    logit P(treatment) = a + b' (difference of the two texts), by maximum likelihood. Each value is a plus the vote's
    influence on it, so a variance of their mean that allows for clusters is one of a (a sandwich; Liang & Zeger 1986,
    Biometrika 73:13). NaN where there is no estimate: a covariate that does not vary, or that tells every vote.

    Args:
        chosen_V: decisive votes: 1 for the treatment, 0 for the baseline.
        covariates_VC: treatment less baseline of what was shown.
    """
    x_VP = np.column_stack([np.ones(len(chosen_V)), covariates_VC])
    b_P = np.zeros(x_VP.shape[1])
    for _ in range(MOST_STEPS):
        p_V = special.expit(x_VP @ b_P)
        information_PP = (x_VP * (p_V * (1 - p_V))[:, None]).T @ x_VP
        if np.linalg.cond(information_PP) > 1 / CLOSE:
            break
        step_P = np.linalg.solve(information_PP, x_VP.T @ (chosen_V - p_V))
        b_P += step_P
        if np.abs(step_P).max() < CLOSE:
            influence_VP = np.linalg.solve(information_PP, (x_VP * (chosen_V - p_V)[:, None]).T).T
            return np.asarray(b_P[0] + len(chosen_V) * influence_VP[:, 0], dtype=np.float64)
    return np.full(len(chosen_V), np.nan)
