"""Classifier two-sample test: the treatment's side from what the server sent, on prompts and judges not learned from.

Train and test share no prompt: a completion, or its prompt, seen in training would tell which arm writes so. They share
no judge either, because sides are balanced within a judge (and within a prompt): they are drawn without replacement, so
that whoever knows the other labels of a judge knows something about the one that is left. A classifier that can tell
judges apart (the link stands on the page) would then look better than chance, or, having learned each judge's
majority, worse, and neither is a leak. So prompts and judges are both cut into folds, and the items of (prompt fold,
judge fold) are classified by a model that has seen neither. For the same reason items are compared only within such a
block: the models of two blocks have different intercepts, which the labels that they were taught, short of the others,
move the wrong way.

The interval is Obuchowski's (1997) for clustered data: the AUC is a mean of placements, and those of a cluster are
added up before they are squared. Clusters are the prompts. All completions of a prompt are alike, and a completion is
shown several times, so that its items fall right or wrong together: counting items as independent (DeLong) would be too
sure. Judges need no clusters of their own: their sides are balanced, which makes a judge's items differ more than
independent ones, not less. Prompts are few, so each prompt fold loses a degree of freedom and the interval is t's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fetched_pages import Truth
from scipy import sparse
from scipy.stats import rankdata, t
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import SGDClassifier
from threadpoolctl import threadpool_limits

CONFIDENCE = 0.95
PASSES = 10
"""Of stochastic gradient descent over the items: the logistic regression."""


@dataclass(frozen=True)
class Auc:
    """How often an item with the treatment on the left is scored above one without, and its interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_chance(self) -> bool:
        return self.low <= 0.5 <= self.high


@dataclass(frozen=True)
class Blocks:
    """Which items are tested together.

    Attributes:
        prompt_fold, judge_fold: [item], from 0.
        prompt: [item], numbered.
        n_folds: of each.
    """

    prompt_fold: np.ndarray
    judge_fold: np.ndarray
    prompt: np.ndarray
    n_folds: int

    @property
    def block(self) -> np.ndarray:
        return self.prompt_fold * self.n_folds + self.judge_fold


def blocks(behind: Sequence[Truth], n_folds: int, seed: int) -> Blocks:
    """Deal prompts and judges into folds, at random, as evenly as their numbers allow."""
    rng = np.random.default_rng(seed)
    prompt = np.unique([b.prompt for b in behind], return_inverse=True)[1]
    judge = np.unique([b.judge for b in behind], return_inverse=True)[1]
    folds = [rng.permutation(np.arange(unit.max() + 1) % n_folds)[unit] for unit in (prompt, judge)]
    return Blocks(folds[0], folds[1], prompt, n_folds)


def scores(
    columns: sparse.csr_matrix, ranks: np.ndarray, labels: np.ndarray, where: Blocks, boosting: bool = True
) -> dict[str, np.ndarray]:
    """[item] of each classifier: how much it looks as if the treatment were on the left, in units of its block alone.

    Args:
        columns: [item, column] everything.
        ranks: [item, number] what can be measured.
        labels: [item] 1 where the treatment was on the left.
        where: what is learned from what.
        boosting: whether the second classifier is wanted too.
    """
    found = {name: np.full(len(labels), np.nan) for name in ("everything", *(("numbers",) if boosting else ()))}
    for p in range(where.n_folds):
        for j in range(where.n_folds):
            test = np.flatnonzero((where.prompt_fold == p) & (where.judge_fold == j))
            train = np.flatnonzero((where.prompt_fold != p) & (where.judge_fold != j))
            linear = SGDClassifier(loss="log_loss", alpha=1e-4, max_iter=PASSES, tol=None, average=True, random_state=0)
            linear.fit(columns[train], labels[train])
            found["everything"][test] = linear.decision_function(columns[test])
            if boosting:
                trees = HistGradientBoostingClassifier(max_iter=30, learning_rate=0.1, max_leaf_nodes=8, random_state=0)
                with threadpool_limits(1):  # several wait for each other where others use the machine too
                    trees.fit(ranks[train], labels[train])
                    found["numbers"][test] = trees.predict_proba(ranks[test])[:, 1]
    return found


def auc(score: np.ndarray, labels: np.ndarray, where: Blocks) -> Auc:
    """Over all pairs of items of one block, with its interval.

    Args:
        score: [item].
        labels: [item] 0 or 1.
        where: blocks and prompts.
    """
    total, pairs = 0.0, 0.0
    influence = np.zeros(len(labels))
    for block in np.unique(where.block):
        inside = np.flatnonzero(where.block == block)
        ones, zeros = inside[labels[inside] == 1], inside[labels[inside] == 0]
        if not len(ones) or not len(zeros):
            continue
        n_pairs = len(ones) * len(zeros)
        of_ones, of_zeros = _placements(score[ones], score[zeros])
        value = of_ones.mean()
        total, pairs = total + n_pairs * value, pairs + n_pairs
        influence[ones] = n_pairs * (of_ones - value) / len(ones)
        influence[zeros] = n_pairs * (of_zeros - value) / len(zeros)
    mean = total / pairs
    variance, freedom = 0.0, 0
    for fold in np.unique(where.prompt_fold):
        inside = where.prompt_fold == fold
        sums = np.bincount(where.prompt[inside], influence[inside] / pairs)[np.unique(where.prompt[inside])]
        variance += len(sums) / max(1, len(sums) - 1) * float(np.sum(sums**2))
        freedom += len(sums) - 1
    half = float(t.ppf(0.5 + CONFIDENCE / 2, max(1, freedom))) * variance**0.5
    return Auc(float(mean), float(mean - half), float(mean + half))


def _placements(ones: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each one the share of zeros below it, for each zero the share of ones above it; ties count half."""
    both = rankdata(np.concatenate((ones, zeros)))
    of_ones = (both[: len(ones)] - rankdata(ones)) / len(zeros)
    of_zeros = 1 - (both[len(ones) :] - rankdata(zeros)) / len(ones)
    return of_ones, of_zeros


def permuted(labels: np.ndarray, behind: Sequence[Truth], rng: np.random.Generator) -> np.ndarray:
    """The labels of each judge in another order: so the sides stay balanced within judges."""
    judge = np.unique([b.judge for b in behind], return_inverse=True)[1]
    by_judge = np.argsort(judge, kind="stable")
    shuffled = np.lexsort((rng.random(len(labels)), judge))
    result = np.empty_like(labels)
    result[by_judge] = labels[shuffled]
    return result
