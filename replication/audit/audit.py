"""Claims + published files -> every printed figure beside the recomputed one; then the same votes with clusters.

Imports no torch. What differs is a finding, never an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from scipy import stats

from replication.audit.claims import Claim, load_claims, same, shown
from replication.audit.published import Judge, Published, Question, Sums, Votes, load_published, side_of
from replication.audit.recompute import OF_TALLY, Figures, call, select
from replication.protocol.paper import LATE_CHECKPOINTS
from replication.statistics import format as formats
from replication.statistics.preference import binomial_p
from replication.statistics.seeds import t_p
from replication.votes.tally import Tally, total

RESAMPLES, SEED, CONFIDENCE = 20_000, 1, 0.95
SAME, DIFFERS, CANNOT = "same", "differs", "not recomputable"


@dataclass(frozen=True)
class Row:
    """One figure, printed and recomputed."""

    id: str
    entry: str  # the entry of the claims file that it is a cell of
    what: str
    where: str
    printed: str
    recomputed: str  # two digits more than printed; empty where it cannot be recomputed
    verdict: str  # SAME, DIFFERS or CANNOT
    is_sentence: bool  # whether words are checked, as the note reads them, and not a printed figure
    note: str  # the reading of a sentence, or the data that are not published


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
    n_decisive: int  # clusters with a decisive vote
    share: float
    low: float
    high: float  # percentile interval over resampled clusters; NaN below two clusters with a decisive vote
    for_gain: int
    for_baseline: int
    even: int
    sign_p: float  # exact two-sided sign test over the clusters that lean; NaN without one
    t_p: float  # t test of the clusters' shares against one half; NaN below two, and where all are alike
    wilcoxon_p: float  # signed-rank test of the same shares; NaN without one that leans


@dataclass(frozen=True)
class LateLoss:
    """The difference of two runs' late validation means, in nats."""

    run: str
    minus: str
    checkpoints: int
    difference: float
    standard_error: float  # checkpoints taken as independent
    autocorrelation: float  # of neighbouring checkpoints' differences, over the last 2 x `checkpoints`
    standard_error_correlated: float  # of the same mean, with it
    one_earlier: float  # the same difference, one checkpoint before the end


@dataclass(frozen=True)
class Audit:
    """All that an audit found."""

    paper: str
    rows: tuple[Row, ...]
    stated: tuple[Stated, ...]
    clusters: tuple[Clustered, ...]  # over all prompts, over all judges, then over the prompts of each category
    late_loss: LateLoss | None  # None without the curves of both runs
    cannot_answer: tuple[str, ...]

    def of(self, verdict: str, is_sentence: bool | None = None) -> list[Row]:
        """The rows with a verdict, of figures and sentences or of one of them."""
        return [r for r in self.rows if r.verdict == verdict and is_sentence in (None, r.is_sentence)]

    @property
    def claims(self) -> Counter[str]:
        """Number of claims by verdict: an entry of the claims file is one, however many cells its table has.

        It differs where a cell does, and is the same where all cells are that can be recomputed.
        """
        of_entry: dict[str, set[str]] = {}
        for row in self.rows:
            of_entry.setdefault(row.entry, set()).add(row.verdict)
        return Counter(next(v for v in (DIFFERS, SAME, CANNOT) if v in found) for found in of_entry.values())

    @property
    def largest_table(self) -> tuple[str, int]:
        """(what, cells) of the table with most cells that are the same."""
        (entry, n), *_ = Counter(row.entry for row in self.of(SAME)).most_common(1) or [("", 0)]
        return next((row.what for row in self.rows if row.entry == entry), "").partition(":")[0], n

    def to_dict(self) -> dict[str, Any]:
        """Everything, for audit.json; NaN becomes null."""
        counts: dict[str, Any] = {verdict: len(self.of(verdict)) for verdict in (SAME, DIFFERS, CANNOT)}
        counts |= {"claims": dict(self.claims), "largest_table": self.largest_table}
        bootstrap = {"resamples": RESAMPLES, "seed": SEED, "confidence": CONFIDENCE}
        return formats.clean({**asdict(self), "counts": counts, "bootstrap": bootstrap})


def audit(folder: Path, claims_file: Path) -> Audit:
    """Recompute every claim of a file from the data in a folder.

    Raises UserError where a file is missing or invalid, or a claim names what there is not.
    """
    claims = load_claims(claims_file)
    data = load_published(folder, claims.files)
    votes = data.votes
    units: dict[str, Sequence[Judge | Question]] = {"prompts": votes.questions, "judges": votes.judges}
    units |= {f"prompts of {name}": [q for q in votes.questions if q.category == name] for name in votes.categories}
    return Audit(
        paper=claims.paper,
        rows=tuple(_row(claim, data) for claim in claims.claims),
        stated=tuple(_stated(votes)),
        clusters=tuple(cluster(unit, [row.tally for row in rows]) for unit, rows in units.items()),
        late_loss=_late_loss(data),
        cannot_answer=claims.cannot_answer,
    )


def _row(claim: Claim, data: Published) -> Row:
    recomputed, verdict = "", CANNOT
    if claim.recompute is not None:
        place = f"{claim.place}: {claim.id}"
        value = call(claim.recompute, claim.args, data, place)
        verdict = SAME if same(claim.printed, value, place) else DIFFERS
        recomputed = shown(value, claim.printed)
    c, note = claim, claim.why_not or claim.reading
    return Row(c.id, c.entry, c.what, c.where, c.printed, recomputed, verdict, c.is_sentence, note)


def _stated(votes: Votes) -> Iterator[Stated]:
    """Each sum that the file of votes states of itself, from its judges or its prompts."""
    sums: list[tuple[str, Sums, Iterable[Judge | Question]]] = [
        ("headline, from the judges", votes.headline, votes.judges),
        ("headline, from the prompts", votes.headline, votes.questions),
    ]
    for entry in votes.sensitivity_filters:
        if entry.excluded is not None:
            sums.append((f"filter {entry.label}", entry, [j for j in votes.judges if j.name not in entry.excluded]))
    for name, entry in votes.category_breakdown.items():
        sums.append((f"category {name}", entry, [q for q in votes.questions if q.category == name]))
    for name, entry in votes.human_by_background.items():
        sums.append((f"background {name}", entry, select(votes.judges, {"type": "Human", "background": name})))
    figures: list[tuple[str, float | None, float]] = []
    for what, entry, rows in sums:
        t = total(row.tally for row in rows)
        found = {"n": t.n, "a": t.baseline, "b": t.treatment, "t": t.ties, "p": OF_TALLY["p"](t)}
        stated = (entry.n, entry.a, entry.b, entry.t, entry.p_value)
        figures += [(f"{what}: {key}", value, found[key]) for key, value in zip(found, stated, strict=True)]
    leans = [side_of(q.tally) for q in votes.questions]
    for key, side in (("gain_majority", "gain"), ("baseline_majority", "baseline"), ("tied", "even")):
        figures.append((f"prompts: {key}", getattr(votes.question_majorities, key), leans.count(side)))
    for what, value, recomputed in figures:
        if value is not None:
            is_same = math.isclose(value, recomputed, rel_tol=1e-9)
            yield Stated(what, value, recomputed, SAME if is_same else DIFFERS)


def cluster(unit: str, tallies: Sequence[Tally]) -> Clustered:
    """Treat each tally of K as one observation: all of a cluster's votes are resampled together, R times."""
    k = len(tallies)
    gain_K = np.array([t.treatment for t in tallies], dtype=np.float64)
    decisive_K = np.array([t.decisive for t in tallies], dtype=np.float64)
    n_decisive, low, high = int((decisive_K > 0).sum()), math.nan, math.nan
    if n_decisive >= 2:
        times_RK = np.random.default_rng(SEED).multinomial(k, np.full(k, 1 / k), size=RESAMPLES)
        decisive_R = times_RK @ decisive_K
        shares_R = np.divide(times_RK @ gain_K, decisive_R, out=np.full(RESAMPLES, np.nan), where=decisive_R > 0)
        low, high = np.nanquantile(shares_R, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2]).tolist()
    shares_K = gain_K[decisive_K > 0] / decisive_K[decisive_K > 0] - 0.5
    leaning_K = shares_K[shares_K != 0]
    wilcoxon = float(stats.wilcoxon(leaning_K).pvalue) if len(leaning_K) else math.nan
    leans = [side_of(t) for t in tallies]
    ahead, behind = leans.count("gain"), leans.count("baseline")
    return Clustered(
        unit=unit,
        n_clusters=k,
        n_decisive=n_decisive,
        share=total(tallies).share,
        low=low,
        high=high,
        for_gain=ahead,
        for_baseline=behind,
        even=leans.count("even"),
        sign_p=float(binomial_p(ahead, ahead + behind)),
        t_p=float(t_p(shares_K)),
        wilcoxon_p=wilcoxon,
    )


def _late_loss(data: Published) -> LateLoss | None:
    if not {"gain", "baseline"} <= set(data.losses):
        return None
    gain, baseline = data.losses["gain"], data.losses["baseline"]
    k = min(LATE_CHECKPOINTS, len(gain.steps) - 1, len(baseline.steps) - 1)
    if k < 2:
        return None
    series = ("gain", "baseline", int(gain.steps[-min(2 * k, len(gain.steps))]))
    return LateLoss(
        run="gain",
        minus="baseline",
        checkpoints=k,
        difference=Figures(data).late_loss("gain", "baseline", k),
        standard_error=Figures(data).late_loss_error("gain", "baseline", k),
        autocorrelation=Figures(data).checkpoint_autocorrelation(*series),
        standard_error_correlated=Figures(data).smoothed_error(*series, window=k),
        one_earlier=float(gain.validation[-k - 1 : -1].mean()) - float(baseline.validation[-k - 1 : -1].mean()),
    )


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
