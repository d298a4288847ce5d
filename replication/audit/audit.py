"""Claims + published files -> every printed figure beside the recomputed one; then the same votes with clusters.

Imports no torch. What differs is a finding, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from replication.audit import recompute_training, recompute_votes
from replication.audit.claims import Claim, Claims, check_number, load_claims, same, shown
from replication.audit.clusters import RESAMPLES, SEED, Clustered, cluster
from replication.audit.published import Published, Tally, load_published
from replication.audit.recompute import call
from replication.statistics import format as formats

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
    """How a sentence was read, or what is not published."""


@dataclass(frozen=True)
class Stated:
    """A sum that the file of votes states, beside the sum of its rows."""

    what: str
    stated: float
    recomputed: float
    verdict: str


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
        rows=tuple(_row(claim, claims, data) for claim in claims.claims),
        stated=tuple(_stated(data)),
        clusters=tuple(_clusters(data)),
        late_loss=_late_loss(data),
        cannot_answer=claims.cannot_answer,
    )


def _row(claim: Claim, claims: Claims, data: Published) -> Row:
    recomputed, verdict = "", CANNOT
    if claim.function is not None:
        place = f"{claims.path}: {claim.id}"
        value = call(claim.function, claim.arguments, data, place)
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
    votes = data.raw["votes"][0]
    everyone = recompute_votes.add_up(j.tally for j in data.judges)
    yield from _sums("headline, from the judges", votes.get("headline"), everyone)
    yield from _sums("headline, from the prompts", votes.get("headline"), _of_prompts(data))
    for entry in votes.get("sensitivity_filters", ()):
        if "excluded" in entry:
            kept = [j.tally for j in data.judges if j.name not in entry["excluded"]]
            yield from _sums(f"filter {entry['label']}", entry, recompute_votes.add_up(kept))
    for name, entry in (votes.get("category_breakdown") or {}).items():
        yield from _sums(f"category {name}", entry, _of_prompts(data, name))
    for name, entry in (votes.get("human_by_background") or {}).items():
        kept = [j.tally for j in data.judges if j.type == "Human" and j.background == name]
        yield from _sums(f"background {name}", entry, recompute_votes.add_up(kept))
    for key, side in (("gain_majority", "gain"), ("baseline_majority", "baseline"), ("tied", "even")):
        if key in votes["question_majorities"]:
            found = sum(q.tally.leans == side for q in data.questions)
            yield _compare(f"prompts: {key}", votes["question_majorities"][key], found)


def _of_prompts(data: Published, category: str | None = None) -> Tally:
    return recompute_votes.add_up(q.tally for q in data.questions if category in (None, q.category))


def _sums(what: str, entry: Any, tally: Tally) -> Iterator[Stated]:
    for key, count in (("n", tally.n), ("a", tally.baseline), ("b", tally.gain), ("t", tally.ties)):
        if isinstance(entry, dict) and key in entry:
            yield _compare(f"{what}: {key}", entry[key], count)
    if isinstance(entry, dict) and entry.get("p_value") is not None:  # null: no decisive vote
        yield _compare(f"{what}: p", entry["p_value"], recompute_votes.OF_TALLY["p"](tally))


def _compare(what: str, stated: float, recomputed: float) -> Stated:
    return Stated(what, stated, recomputed, SAME if math.isclose(stated, recomputed, rel_tol=1e-9) else DIFFERS)


# ---------------------------------------------------------------- the same questions with clusters


def _clusters(data: Published) -> Iterator[Clustered]:
    yield cluster("prompts", [q.tally for q in data.questions])
    yield cluster("judges", [j.tally for j in data.judges])
    for category in dict.fromkeys(q.category for q in data.questions):
        yield cluster(f"prompts of {category}", [q.tally for q in data.questions if q.category == category])


def _late_loss(data: Published) -> LateLoss | None:
    run, minus = RUN_PAIR
    if not {run, minus} <= set(data.curves):
        return None
    k = min(recompute_training.LATE, *(len(data.curves[name].steps) - 1 for name in RUN_PAIR))
    if k < 2:
        return None
    earlier = [float(data.curves[name].validation[-k - 1 : -1].mean()) for name in RUN_PAIR]
    return LateLoss(
        run=run,
        minus=minus,
        checkpoints=k,
        difference=recompute_training.late_loss(data, run, minus, k),
        standard_error=recompute_training.late_loss_error(data, run, minus, k),
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
