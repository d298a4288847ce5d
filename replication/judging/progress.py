"""Progress of the judging: by judge, by prompt, and against the plan. Blind until the lock.

The counts are pure functions over the rows of `standing_votes()`; `gather` reads a panel in one consistent view. A
first vote is one on an item that the judge had not seen before and that is no attention item.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from sqlalchemy import Connection, func, select

from replication.config import AnalysisConfig
from replication.config.study import Study
from replication.judging.database import Database
from replication.judging.schema import COUNTS, IS_FIRST, LEFT, answers, assignments, items, judges, panel, unsealed
from replication.judging.store import PanelFacts, check_tries, panel_facts, panel_study, standing_votes, test_votes
from replication.votes.tally import Tally, count, winner

WORDS_A_MINUTE = 240  # silent reading, of Chinese as many characters: Brysbaert 2019, doi:10.1016/j.jml.2019.104047
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]{1,15}")


@dataclass(frozen=True)
class Part:
    """A part of a whole."""

    part: int
    whole: int

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.part / self.whole if self.whole else None

    def chance(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """The range in which a share that is .5 in truth lies so often; None of nothing."""
        from replication.statistics.preference import chance_range  # scipy: only once there are votes

        return chance_range(self.whole, confidence) if self.whole else None


@dataclass(frozen=True)
class JudgeProgress:
    """One judge's votes; no arm."""

    judge_id: str
    kind: str
    vendor: str
    survey: Mapping[str, str]
    has_link: bool  # a person's: whether anybody has the set
    has_started: bool
    votes: Part  # of what is assigned, repeats and attention items included
    first: Part  # first votes, of those assigned
    n_no_choice: int  # pairs without a vote because a model answered both orders for good, and not both with a choice
    n_repeats: int  # repeats cast
    ties: Part  # of first votes, as both_bad
    both_bad: Part
    left: Part  # of the decisive first votes
    attention: Part  # answered as expected, of those answered
    gold: Part  # likewise
    repeats_alike: Part  # answered alike with the sides swapped, of those whose first vote is there
    median_seconds: float | None
    last_vote_at: float | None
    failed_check: bool = False  # the study's, at every try

    @property
    def is_done(self) -> bool:
        """Whether no vote is to come any more, and some came."""
        return self.first.part > 0 and self.first.part + self.n_no_choice >= self.first.whole

    @property
    def state(self) -> str:
        if self.votes.whole and self.votes.part == self.votes.whole:
            return "finished"
        if self.kind == "human" and self.vendor == LEFT:
            return "gave up"
        if self.failed_check:
            return "screened out"
        return "voting" if self.votes.part else "started" if self.has_started else "not started"

    def flags(self, usual_seconds: float) -> list[str]:
        """What in this judge's votes asks for a look; fewer than eight say nothing of how a judge votes."""
        low, high = self.left.chance(0.99) or (0.0, 1.0)
        enough = self.first.part >= 8
        signs = {
            "failed check": self.attention.part + self.gold.part < self.attention.whole + self.gold.whole,
            "fast": enough and self.kind == "human" and 3 * (self.median_seconds or 0) < usual_seconds,
            "one-sided": enough and self.left.value is not None and not low <= self.left.value <= high,
            "all ties": enough and self.left.value is None,
        }
        return [sign for sign, shows in signs.items() if shows]


@dataclass(frozen=True)
class PromptNumbers:
    """First votes on one prompt, of those assigned."""

    prompt_id: int
    category: str
    votes: Mapping[str, Part]  # by kind of judge


@dataclass(frozen=True)
class ArmResult:
    """First votes of a kind of judge between the two arms."""

    kind: str
    seed: int | None  # None: all seeds
    baseline: str
    treatment: str
    tally: Tally


@dataclass(frozen=True)
class Overview:
    """All that the administrator's page, and `judge status`, show."""

    panel: PanelFacts
    votes: Part
    left: Part
    judges: list[JudgeProgress]  # those who have a link, and models
    n_unclaimed: int
    usual_seconds: float  # median over people of their median seconds; 0: no vote
    pace: tuple[float, float] | None  # see `pace`
    coverage: list[PromptNumbers]  # every prompt that has an item, whether or not any is in a set
    agreement: dict[str, Part]
    answers: dict[str, dict[str, int]]  # model judge -> status -> requests
    n_surveyed: int
    survey: dict[str, Counter[str]]
    results: list[ArmResult]  # empty before the lock
    n_test_judges: int
    n_test_votes: int  # in no other number


@dataclass(frozen=True)
class Fill:
    """The panel against its plan."""

    judges: int  # planned
    votes: int  # planned first votes of each
    n_voted: int  # judges of the kinds that count who voted at all
    n_full: int  # of them, those from whom no vote is to come any more
    n_short: int  # of these, those who gave fewer than planned: models that were assigned fewer, or gave no choice
    n_people: int | None  # people among n_voted; None where the plan counts one kind alone

    @property
    def is_full(self) -> bool:
        return self.n_full >= self.judges

    @property
    def sentence(self) -> str:
        all_votes = "their votes" if self.n_short else f"{self.votes} votes"
        who = "planned judges" if self.n_people is None else "planned judges, people and models together,"
        short = f"; {self.n_short} of them fewer than the {self.votes} planned" if self.n_short else ""
        voted = f"{self.n_voted} have voted"
        if self.n_people == 0 and self.n_voted:
            voted = f"0 people have voted, {self.n_voted} {'model has' if self.n_voted == 1 else 'models have'}"
        return f"{self.n_full} of {self.judges} {who} have given all {all_votes} ({voted}){short}"


def gather(database: Database) -> Overview:
    """Everything in one consistent view."""
    with database.read() as c:
        about = panel_facts(c)
        rows = c.execute(standing_votes()).all()
        everybody = _judges(c, rows)
        n_test_judges, n_test_votes = test_votes(c)
        by = (items.c.prompt_id, items.c.category, judges.c.kind)
        query = select(*by, func.count()).join_from(assignments, items).join(judges).where(COUNTS)
        query = query.where(items.c.prompt_id.is_not(None), assignments.c.repeats.is_(None)).group_by(*by)
        assigned = {(prompt, category, kind): n for prompt, category, kind, n in c.execute(query)}
        every = select(items.c.prompt_id, items.c.category).where(items.c.prompt_id.is_not(None)).distinct()
        in_no_set = {(prompt, category, "human"): 0 for prompt, category in c.execute(every)}
        asked = (assignments.c.judge_id, answers.c.status)
        query = select(*asked, func.count()).join_from(answers, assignments).group_by(*asked).order_by(*asked)
        replies: dict[str, dict[str, int]] = defaultdict(dict)
        for judge_id, status, n in c.execute(query):
            replies[judge_id][status] = n
        truth = {row.item_id: row for row in c.execute(select(unsealed))} if about.is_locked else {}
        baseline, treatment = c.execute(select(panel.c.baseline, panel.c.treatment)).one()
    # a set that nobody has is a person's without a link
    taken = sorted((j for j in everybody if j.kind == "model" or j.has_link), key=lambda judge: judge.kind)
    people = [judge for judge in everybody if judge.kind == "human"]
    n_to_come = sum(judge.votes.whole - judge.votes.part for judge in people)
    n_surveyed, survey = survey_counts(judge.survey for judge in taken)
    return Overview(
        panel=about,
        votes=Part(len(rows), sum(judge.votes.whole for judge in everybody)),
        left=left_share(rows),
        judges=taken,
        n_unclaimed=len(everybody) - len(taken),
        usual_seconds=median([judge.median_seconds for judge in people if judge.median_seconds] or [0.0]),
        pace=pace([row.cast_at for row in rows if row.kind == "human"], n_to_come, time.time()),
        coverage=coverage(rows, in_no_set | assigned),
        agreement=agreement(rows),
        answers=replies,
        n_surveyed=n_surveyed,
        survey=survey,
        results=results(rows, truth, (baseline, treatment)),
        n_test_judges=n_test_judges,
        n_test_votes=n_test_votes,
    )


def pace(cast_at: Sequence[float], n_to_come: int, now: float) -> tuple[float, float] | None:
    """Votes an hour over the last day, or since the first vote, and when the rest is in at that pace; None: no vote."""
    since = max(now - 24 * 3600, min(cast_at, default=now))
    n_votes = sum(since <= at < now for at in cast_at)
    return (3600 * n_votes / (now - since), now + n_to_come * (now - since) / n_votes) if n_votes else None


def minutes(database: Database, judge_id: str, told: Study) -> int:
    """How long a judge's set takes: its words at the speed of silent reading, and twelve choices a minute.

    A choice is the vote, and what else the study asks of each pair.
    """
    query = select(items.c.question, items.c.first, items.c.second).join_from(assignments, items)
    with database.read() as c:
        pairs = c.execute(query.where(assignments.c.judge_id == judge_id)).all()
    n_choices = len(pairs) * (1 + len(told.further) + told.ask_reason)
    n_words = sum(len(WORD.findall(text)) for pair in pairs for text in pair)
    return max(1, round(n_words / WORDS_A_MINUTE + n_choices / 12))


def judge_progress(database: Database) -> list[JudgeProgress]:
    """Every judge of a panel, locked or not, in order of name; no test judge."""
    with database.read() as c:
        return _judges(c, c.execute(standing_votes()).all())


def fill(database: Database, rules: AnalysisConfig) -> Fill:
    """Those who have voted, and those who are done, against the planned judges, votes_per_judge and judge_kinds."""
    voted = [judge for judge in judge_progress(database) if judge.kind in rules.judge_kinds and judge.first.part]
    done = [judge for judge in voted if judge.is_done]
    return Fill(
        judges=rules.judges,
        votes=rules.votes_per_judge,
        n_voted=len(voted),
        n_full=len(done),
        n_short=sum(judge.first.part < rules.votes_per_judge for judge in done),
        n_people=sum(judge.kind == "human" for judge in voted) if len(rules.judge_kinds) > 1 else None,
    )


def _judges(c: Connection, rows: Sequence[Any]) -> list[JudgeProgress]:
    by = assignments.c.judge_id
    assigned = {
        name: (n_all, n_first)
        for name, n_all, n_first in c.execute(select(by, func.count(), func.count().filter(IS_FIRST)).group_by(by))
    }
    # pairs that are answered in both orders, at least once by a refusal or garbage
    pairs = select(by).join_from(answers, assignments).where(IS_FIRST).group_by(by, assignments.c.assignment_id)
    pairs = pairs.having(func.count() == 2, func.count(answers.c.choice) < 2)
    no_choice = Counter(c.execute(pairs).scalars())
    everybody = {row.judge_id: row for row in c.execute(select(judges).where(COUNTS).order_by(judges.c.judge_id))}
    told = panel_study(c)
    tries = check_tries(c, told)
    failed = {name for name, of in tries.items() if len(of) >= told.check_tries and True not in of}
    cast: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        cast[row.judge_id].append(row)
    return [
        of_judge(person, cast[name], *assigned.get(name, (0, 0)), no_choice[name], name in failed)
        for name, person in everybody.items()
    ]


def is_first(row: Any) -> bool:
    return row.expected is None and row.repeats is None


def chosen_text(row: Any) -> str | None:
    """The one of the item's two texts that a vote is for, first or second, whatever the sides; None: neither."""
    return winner(row.choice, *(("first", "second") if row.first_is_left else ("second", "first")))


def left_share(rows: Iterable[Any]) -> Part:
    """Left among decisive first votes; .5 is expected, for sides are drawn at random."""
    sides = [winner(row.choice, "left", "right") for row in rows if is_first(row)]
    return Part(sides.count("left"), len(sides) - sides.count(None))


def of_judge(
    person: Any, rows: Sequence[Any], n_assigned: int, n_first: int, n_no_choice: int = 0, failed_check: bool = False
) -> JudgeProgress:
    """The progress of a judge; n_first: assignments without repeats and attention items."""
    first = [row.choice for row in rows if is_first(row)]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    known = [(row.category == "gold", row.choice == row.expected) for row in rows if row.expected is not None]
    attention, gold = ([is_so for is_gold, is_so in known if is_gold is of] for of in (False, True))
    earlier = {row.assignment_id: chosen_text(row) for row in rows}
    alike = [earlier[row.repeats] == chosen_text(row) for row in rows if row.repeats in earlier]
    return JudgeProgress(
        judge_id=person.judge_id,
        kind=person.kind,
        vendor=person.vendor,
        survey=person.survey or {},
        has_link=person.token_sha256 is not None,
        has_started=person.started_at is not None,
        failed_check=failed_check,
        votes=Part(len(rows), n_assigned),
        first=Part(len(first), n_first),
        n_no_choice=n_no_choice,
        n_repeats=sum(row.repeats is not None for row in rows),
        ties=Part(first.count("tie"), len(first)),
        both_bad=Part(first.count("both_bad"), len(first)),
        left=left_share(rows),
        attention=Part(sum(attention), len(attention)),
        gold=Part(sum(gold), len(gold)),
        repeats_alike=Part(sum(alike), len(alike)),
        median_seconds=median(seconds) if seconds else None,
        last_vote_at=max((row.cast_at for row in rows), default=None),
    )


def coverage(rows: Iterable[Any], n_assigned: Mapping[tuple[int, str, str], int]) -> list[PromptNumbers]:
    """One entry a prompt, in order of their numbers; n_assigned: (prompt_id, category, kind) -> without repeats."""
    cast = Counter((row.prompt_id, row.category, row.kind) for row in rows if is_first(row))
    by_prompt: dict[tuple[int, str], dict[str, Part]] = defaultdict(dict)
    for key in sorted(n_assigned):
        by_prompt[key[:2]][key[2]] = Part(cast[key], n_assigned[key])
    return [PromptNumbers(prompt_id, category, of) for (prompt_id, category), of in by_prompt.items()]


def agreement(rows: Iterable[Any]) -> dict[str, Part]:
    """Pairs of judges of the same item that chose the same text, or both none, of all such pairs.

    Keys: "human", "model" for pairs within a kind, "human and model" for those across; a judge's first vote counts.
    """
    of_item: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for row in rows:
        if is_first(row):
            of_item[row.item_id].append((row.kind, chosen_text(row)))
    pairs: Counter[tuple[str, bool]] = Counter()
    for said in of_item.values():
        for (kind, one), (other_kind, other) in combinations(said, 2):
            pairs[kind if kind == other_kind else "human and model", one == other] += 1
    names = ("human", "model", "human and model")
    return {name: Part(pairs[name, True], pairs[name, True] + pairs[name, False]) for name in names}


def survey_counts(surveys: Iterable[Mapping[str, str] | None]) -> tuple[int, dict[str, Counter[str]]]:
    """Judges who answered any question, and question -> answer -> judges."""
    answered = [survey for survey in surveys if survey]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for survey in answered:
        for question, answer in survey.items():
            counts[question][answer] += 1
    return len(answered), dict(counts)


def results(rows: Iterable[Any], truth: Mapping[str, Any], arms: tuple[str, str]) -> list[ArmResult]:
    """First votes by arm: for each pair of arms and kind of judge all seeds together, then each seed.

    `truth` is item_id -> row of the table `unsealed`, and empty before the lock.
    """
    chosen: dict[tuple[tuple[str, str], str, int | None], list[str | None]] = defaultdict(list)
    for row in rows:
        if is_first(row) and row.item_id in truth:
            behind = truth[row.item_id]
            arm = {"first": behind.arm_first, "second": behind.arm_second, None: None}[chosen_text(row)]
            low, high = sorted((behind.arm_first, behind.arm_second))
            pair = arms if {low, high} == {*arms} else (low, high)
            chosen[pair, row.kind, None].append(arm)
            chosen[pair, row.kind, behind.seed].append(arm)
    in_order = sorted(chosen, key=lambda key: (key[0] != arms, *key[:2], key[2] is not None, key[2] or 0))
    return [ArmResult(kind, seed, *pair, count(chosen[pair, kind, seed], *pair)) for pair, kind, seed in in_order]
