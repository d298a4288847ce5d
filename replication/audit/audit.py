"""Claims + published files -> every printed figure beside the recomputed one; then the same votes with clusters.

Imports no torch. What differs is a finding, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from replication.audit.claims import Claim, check_number, load_claims, same, shown
from replication.audit.published import Judge, Published, Question, Sums, Votes, load_published, side_of
from replication.audit.recompute import Figures, call
from replication.audit.recompute_votes import OF_TALLY, select
from replication.protocol.paper import LATE_CHECKPOINTS
from replication.statistics import format as formats
from replication.statistics.preference import binomial_p
from replication.votes.tally import Tally, total

RESAMPLES, SEED = 20_000, 1
SAME, DIFFERS, CANNOT = "same", "differs", "not recomputable"
RUN_PAIR = ("gain", "baseline")


@dataclass(frozen=True)
class Row:
    """One figure, printed and recomputed."""

    id: str
    entry: str
    """The entry of the claims file that it is a cell of."""
    what: str
    where: str
    printed: str
    recomputed: str
    """Two digits more than printed; empty where it cannot be recomputed."""
    verdict: str
    """SAME, DIFFERS or CANNOT."""
    is_sentence: bool
    """Whether words are checked, as the note reads them, and not a printed figure."""
    note: str
    """The reading of a sentence, or the data that are not published."""


@dataclass(frozen=True)
class Stated:
    """A sum that the file of votes states, beside the sum of its rows."""

    what: str
    stated: float
    recomputed: float
    verdict: str


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


@dataclass(frozen=True)
class LateLoss:
    """The difference of two runs' late validation means."""

    run: str
    minus: str
    checkpoints: int
    difference: float
    """nats."""
    standard_error: float
    """Checkpoints taken as independent."""
    one_earlier: float
    """The same difference, one checkpoint before the end."""


@dataclass(frozen=True)
class Audit:
    """All that an audit found."""

    paper: str
    rows: tuple[Row, ...]
    stated: tuple[Stated, ...]
    clusters: tuple[Clustered, ...]
    """Over all prompts, over all judges, then over the prompts of each category."""
    late_loss: LateLoss | None
    """None without the curves of both runs."""
    cannot_answer: tuple[str, ...]

    def of(self, verdict: str, is_sentence: bool | None = None) -> list[Row]:
        """The rows with a verdict, of figures and sentences or of one of them."""
        return [r for r in self.rows if r.verdict == verdict and is_sentence in (None, r.is_sentence)]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for audit.json; NaN becomes null."""
        counts = {verdict: len(self.of(verdict)) for verdict in (SAME, DIFFERS, CANNOT)}
        bootstrap = {"resamples": RESAMPLES, "seed": SEED, "confidence": 0.95}
        return formats.clean({**asdict(self), "counts": counts, "bootstrap": bootstrap})


def audit(folder: Path, claims_file: Path) -> Audit:
    """Recompute every claim of a file from the data in a folder.

    Raises:
        UserError: a file is missing or invalid, or a claim names what there is not.
    """
    claims = load_claims(claims_file)
    data = load_published(folder, claims.files)
    return Audit(
        paper=claims.paper,
        rows=tuple(_row(claim, data) for claim in claims.claims),
        stated=tuple(_stated(data)),
        clusters=tuple(_clusters(data.votes)),
        late_loss=_late_loss(data),
        cannot_answer=claims.cannot_answer,
    )


def _row(claim: Claim, data: Published) -> Row:
    recomputed, verdict = "", CANNOT
    if claim.recompute is not None:
        place = f"{claim.place}: {claim.id}"
        value = call(claim.recompute, claim.args, data, place)
        check_number(claim.printed, value, place)
        recomputed = shown(value, claim.printed)
        verdict = SAME if same(claim.printed, value) else DIFFERS
    note = claim.why_not or claim.reading
    return Row(
        claim.id, claim.entry, claim.what, claim.where, claim.printed, recomputed, verdict, claim.is_sentence, note
    )


# ---------------------------------------------------------------- the file's own sums


def _stated(data: Published) -> Iterator[Stated]:
    """Each sum that the file of votes states of itself, from its judges or its prompts."""
    votes = data.votes
    yield from _sums("headline, from the judges", votes.headline, votes.judges)
    yield from _sums("headline, from the prompts", votes.headline, votes.questions)
    for entry in votes.sensitivity_filters:
        if entry.excluded is not None:
            kept = [judge for judge in votes.judges if judge.name not in entry.excluded]
            yield from _sums(f"filter {entry.label}", entry, kept)
    for name, entry in votes.category_breakdown.items():
        yield from _sums(f"category {name}", entry, [q for q in votes.questions if q.category == name])
    for name, entry in votes.human_by_background.items():
        kept = select(votes.judges, {"type": "Human", "background": name})
        yield from _sums(f"background {name}", entry, kept)
    majorities = votes.question_majorities
    for key, side in (("gain_majority", "gain"), ("baseline_majority", "baseline"), ("tied", "even")):
        found = sum(side_of(q.tally) == side for q in votes.questions)
        yield from _compare(f"prompts: {key}", getattr(majorities, key), found)


def _sums(what: str, entry: Sums, rows: Iterable[Judge | Question]) -> Iterator[Stated]:
    tally = total(row.tally for row in rows)
    for key, count in (("n", tally.n), ("a", tally.baseline), ("b", tally.treatment), ("t", tally.ties)):
        yield from _compare(f"{what}: {key}", getattr(entry, key), count)
    yield from _compare(f"{what}: p", entry.p_value, OF_TALLY["p"](tally))


def _compare(what: str, stated: float | None, recomputed: float) -> Iterator[Stated]:
    """Nothing where nothing is stated."""
    if stated is not None:
        yield Stated(what, stated, recomputed, SAME if math.isclose(stated, recomputed, rel_tol=1e-9) else DIFFERS)


# ---------------------------------------------------------------- the same questions with clusters


def _clusters(votes: Votes) -> Iterator[Clustered]:
    yield cluster("prompts", [q.tally for q in votes.questions])
    yield cluster("judges", [j.tally for j in votes.judges])
    for category in votes.categories:
        yield cluster(f"prompts of {category}", [q.tally for q in votes.questions if q.category == category])


def cluster(unit: str, tallies: Sequence[Tally], confidence: float = 0.95, resamples: int = RESAMPLES) -> Clustered:
    """Treat each tally as one observation.

    Args:
        unit: name of a cluster, for the table.
        tallies: votes of each of K clusters; all of a cluster's votes are resampled together.
        confidence: coverage of the interval.
        resamples: R, drawn with the seed SEED.
    """
    gain_K = np.array([t.treatment for t in tallies], dtype=np.float64)
    decisive_K = np.array([t.decisive for t in tallies], dtype=np.float64)
    low, high = _interval(gain_K, decisive_K, confidence, resamples)
    leans = [side_of(t) for t in tallies]
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


def _late_loss(data: Published) -> LateLoss | None:
    run, minus = RUN_PAIR
    if not {run, minus} <= set(data.losses):
        return None
    k = min(LATE_CHECKPOINTS, *(len(data.losses[name].steps) - 1 for name in RUN_PAIR))
    if k < 2:
        return None
    figures = Figures(data)
    earlier = [float(data.losses[name].validation[-k - 1 : -1].mean()) for name in RUN_PAIR]
    return LateLoss(
        run=run,
        minus=minus,
        checkpoints=k,
        difference=figures.late_loss(run, minus, k),
        standard_error=figures.late_loss_error(run, minus, k),
        one_earlier=earlier[0] - earlier[1],
    )


# ---------------------------------------------------------------- text


def markdown(found: Audit) -> str:
    """The whole audit as Markdown, from its dictionary alone."""
    environment = Environment(
        loader=PackageLoader("replication.audit"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": formats.markdown_cell, "percent": formats.percent, "signed": formats.signed}
    environment.filters |= {"number": formats.number, "p": formats.p_value}
    return environment.get_template("audit.md.j2").render(a=found.to_dict())
