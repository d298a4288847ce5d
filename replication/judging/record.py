"""What a locked panel becomes: votes with their arms, their counts in the form of the published vote file, and files.

An attention item is in no vote record. A repeat is there for self-consistency alone, and not without its first vote.
What makes a text of a panel raises UserError where the panel is not locked.
"""

from __future__ import annotations

import csv
import hmac
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, inspect, select

from replication.config import AnalysisConfig
from replication.config.study import Exclusions
from replication.console import utc
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.folder import PanelFolder
from replication.judging.models.answers import ModelJudge
from replication.judging.progress import JudgeProgress, judge_progress
from replication.judging.schema import answers, assignments, items, judges, panel, recruits, remarks, unsealed
from replication.judging.store import PanelFacts, Store, panel_facts, panel_study, standing_votes, test_votes
from replication.runs.files import file_sha256, write_text
from replication.runs.records import read_record, write_record
from replication.statistics.preference import binomial_p
from replication.votes import tally
from replication.votes.record import FURTHER, SCHEMA_VERSION, Vote, VotesNote, parse_votes, read_votes, votes_text

MARGINALS_VERSION = 3
WINNERS = {"treatment": "gain", "baseline": "baseline", "even": "tied", "ties": "tied"}  # by Tally.leans
NOTE = (
    "p_value is binomial, as if every vote were independent: votes share judges, prompts and trained models, so it is "
    "no test of the arms. The unit is the training seed; see the report."
)


@dataclass(frozen=True)
class Unsealed:
    """Everything that was voted, with what stood behind it. Times are seconds since 1970."""

    panel: PanelFacts
    arms: tuple[str, str]  # (baseline, treatment)
    votes: tuple[Vote, ...]  # first votes and repeats, in order of casting
    cast_at: tuple[float, ...]  # of each vote
    category: Mapping[int, str]  # by prompt id
    surveys: Mapping[str, Mapping[str, Any]]  # by judge id, of those who answered
    lone_repeats: int  # repeats whose first vote was never cast: left out
    test_votes: int  # of test judges: left out

    @property
    def first(self) -> list[tuple[Vote, float]]:
        """First votes, and when each was cast."""
        return [(vote, at) for vote, at in zip(self.votes, self.cast_at, strict=True) if not vote.repeat_of]


def locked_panel(c: Connection) -> PanelFacts:
    """Raises UserError where the panel is not locked."""
    about = panel_facts(c)
    if about.locked_at is None:
        raise UserError("the panel is not locked, so its votes are blind; `replicate judge lock` comes first")
    return about


def unsealed_votes(database: Database) -> Unsealed:
    """Raises UserError where the panel is not locked, or its lock was interrupted."""
    with database.read() as c:
        return unsealed_within(c)


def unsealed_within(c: Connection) -> Unsealed:
    """unsealed_votes within a transaction: also of a panel that is about to be locked."""
    about = locked_panel(c)
    behind = {row.item_id: row for row in c.execute(select(unsealed))}
    if not behind:
        raise UserError("the lock was interrupted before the key was opened; call `replicate judge lock` again")
    rows = [row for row in c.execute(standing_votes()).all() if row.item_id in behind]
    voted = {row.assignment_id for row in rows}
    recorded = [row for row in rows if row.repeats is None or row.repeats in voted]
    surveys = c.execute(select(judges.c.judge_id, judges.c.survey)).all()
    prompts = c.execute(select(items.c.prompt_id, items.c.category).where(items.c.prompt_id.is_not(None)))
    baseline, treatment = c.execute(select(panel.c.baseline, panel.c.treatment)).one()
    told, asked = panel_study(c), select(remarks.c.about, remarks.c.said)
    beside = {row.about: row.said for row in c.execute(asked)} if told.further or told.ask_reason else {}
    return Unsealed(
        panel=about,
        arms=(baseline, treatment),
        votes=tuple(_vote(row, behind[row.item_id], about, beside.get(row.showing, {})) for row in recorded),
        cast_at=tuple(row.cast_at for row in recorded),
        category=dict(sorted((row.prompt_id, row.category) for row in prompts)),
        surveys={row.judge_id: row.survey for row in surveys if row.survey},
        lone_repeats=len(rows) - len(recorded),
        test_votes=test_votes(c)[1],
    )


def _vote(row: Row[Any], behind: Row[Any], about: PanelFacts, beside: Mapping[str, str]) -> Vote:
    shown = [(behind.arm_first, behind.sample_first), (behind.arm_second, behind.sample_second)]
    left, right = shown if row.first_is_left else reversed(shown)
    return Vote(
        vote_id=vote_id(about.panel_id, row.assignment_id),
        suite=about.suite,
        seed=behind.seed,
        arm_left=left[0],
        arm_right=right[0],
        prompt_id=row.prompt_id,
        sample_left=left[1],
        sample_right=right[1],
        judge_id=row.judge_id,
        judge_kind=row.kind,
        vendor=row.vendor if row.kind == "model" else "",
        choice=row.choice,
        shown_at="" if row.shown_at is None else iso(row.shown_at),
        seconds=math.nan if row.seconds is None else round(row.seconds, 3),
        repeat_of="" if row.repeats is None else vote_id(about.panel_id, row.repeats),
        criteria=" ".join(f"{name}:{choice}" for name, choice in beside.items() if name not in FURTHER),
        strength=beside.get("strength", ""),
        reason=beside.get("reason", ""),
    )


def vote_id(panel_id: str, assignment_id: int) -> str:
    return f"{panel_id}-{assignment_id}"


def iso(seconds: float) -> str:
    """Seconds since 1970 as an ISO 8601 time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def marginals(found: Unsealed, rules: AnalysisConfig) -> dict[str, object]:
    """Counts of first votes by judge, prompt, category, background and filter, so that `audit` and `power` read both.

    a is the baseline and b the treatment; votes on other pairs of arms are not counted. The filters go by the rules,
    but a full set is the panel's.
    """
    on_pair = [vote for vote, _ in found.first if {vote.arm_left, vote.arm_right} == {*found.arms}]
    by_prompt = tally.count_by(on_pair, lambda vote: vote.prompt_id, *found.arms)
    by_judge = tally.count_by(on_pair, lambda vote: vote.judge_id, *found.arms)
    prompts = {prompt: by_prompt.get(prompt, tally.Tally()) for prompt in found.category}
    of_judge: dict[str, list[tuple[Vote, float]]] = defaultdict(list)
    for vote, at in found.first:
        of_judge[vote.judge_id].append((vote, at))
    background = {name: found.surveys.get(name, {}).get("background") for name in of_judge}
    voted = []
    for name, cast in sorted(of_judge.items()):
        won = by_judge.get(name, tally.Tally())
        is_timed = all(vote.shown_at for vote, _ in cast)  # a sheet that was filled elsewhere is not
        # to 0.1 s, as the paper publishes it
        pace = round(tally.seconds_between_votes(at for _, at in cast), 1) if is_timed else math.nan
        voted.append(tally.JudgeVotes(name, cast[0][0].judge_kind == "human", won, pace, len(cast)))
    people = [judge for judge in voted if judge.is_human]
    rules = replace(rules, votes_per_judge=found.panel.votes_per_judge)
    leans = [t.leans for t in prompts.values()]  # of ties alone is no majority, nor an even one
    return {
        "schema_version": MARGINALS_VERSION,
        "snapshot_date": time.strftime("%Y-%m-%d", time.gmtime(found.panel.locked_at)),
        "note": NOTE,
        "panel_id": found.panel.panel_id,
        "model_a": found.arms[0],
        "model_b": found.arms[1],
        "n_questions": len(prompts),
        "n_judges": len(voted),
        "n_judgments": len(on_pair),
        "headline": _sums(prompts.values()),
        "judges": [
            {
                "name": judge.name,
                "type": "Human" if judge.is_human else "FM",
                "background": background[judge.name],
                **_counts(judge.tally, "ties"),
                "median_seconds_between_votes": None if math.isnan(judge.pace_seconds) else judge.pace_seconds,
                "first_ts": utc(min(at for _, at in of_judge[judge.name])),
                "last_ts": utc(max(at for _, at in of_judge[judge.name])),
            }
            for judge in voted
        ],
        "sensitivity_filters": [
            {
                "label": row.label,
                **({} if row.by_kind else {"excluded": sorted(row.excluded)}),
                **_sums_of(tally.kept(voted, row)),
            }
            for row in tally.published_filters(voted, rules, "a vote (median)")
        ],
        "category_breakdown": {
            name: _sums(t for prompt, t in prompts.items() if found.category[prompt] == name)
            for name in dict.fromkeys(found.category.values())
        },
        "question_majorities": {
            "gain_majority": leans.count("treatment"),
            "baseline_majority": leans.count("baseline"),
            "tied": leans.count("even"),
            "details": [
                {
                    "question_id": prompt,
                    "category": found.category[prompt],
                    "a": t.baseline,
                    "b": t.treatment,
                    "tie": t.ties,
                    "winner": WINNERS[t.leans],
                }
                for prompt, t in prompts.items()
            ],
        },
        "human_by_background": {
            name: _sums_of([judge for judge in people if background[judge.name] == name])
            for name in sorted(filter(None, {background[judge.name] for judge in people}))
        },
    }


def _counts(t: tally.Tally, ties: str) -> dict[str, float | None]:
    """The numbers of a tally, with that of its ties under this key."""
    return {
        "n": t.n,
        "a": t.baseline,
        "b": t.treatment,
        ties: t.ties,
        "decisive": t.decisive,
        "b_pct_decisive": round(100 * t.treatment / t.decisive, 2) if t.decisive else None,
        "tie_pct": round(100 * t.ties / t.n, 2) if t.n else None,
    }


def _sums(tallies: Iterable[tally.Tally]) -> dict[str, float | None]:
    t = tally.total(tallies)
    return {**_counts(t, "t"), "p_value": float(binomial_p(t.treatment, t.decisive)) if t.decisive else None}


def _sums_of(some: list[tally.JudgeVotes]) -> dict[str, float | None]:
    return {"n_judges": len(some), **_sums(judge.tally for judge in some)}


def votes_csv(database: Database) -> str:
    """The vote record, as DIR/votes.csv holds it; see replication.votes.record."""
    return votes_text(unsealed_votes(database).votes)


def check_record(c: Connection) -> None:
    """Raise UserError where the record of a panel that is about to be locked holds what no vote record may."""
    parse_votes(votes_text(unsealed_within(c).votes), "the panel's votes")


def marginals_json(database: Database, rules: AnalysisConfig | None = None) -> str:
    """Counts by judge, prompt, category, background and filter; the filters go by `rules`, or the defaults."""
    found = marginals(unsealed_votes(database), rules or AnalysisConfig())
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def judges_csv(database: Database) -> str:
    """A row a judge who voted: kind, vendor, counts, attention items passed of those asked, answers of the survey; and
    of whom a recruiting site sent, a hash of its name for them that only this panel's database can make again.
    """
    came = {}
    with database.read() as c:
        secret = locked_panel(c).admin_sha256.encode()
        if inspect(c).has_table(recruits.name):  # a panel of an earlier version has none
            came = {row.judge_id: row.participant for row in c.execute(select(recruits))}
    hashed = {judge: hmac.digest(secret, name.encode(), "sha256").hex() for judge, name in came.items()}
    rows = [row for row in judge_progress(database) if row.votes.part]
    questions = sorted({question for row in rows for question in row.survey})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    counts = ["votes", "repeats", "attention_passed", "attention_asked"]
    writer.writerow(["judge_id", "kind", "vendor", "participant", *counts, *questions])
    for row in rows:
        numbers = [row.first.part, row.n_repeats, row.attention.part, row.attention.whole]
        said = [row.survey.get(question, "") for question in questions]
        writer.writerow([row.judge_id, row.kind, row.vendor, hashed.get(row.judge_id, ""), *numbers, *said])
    return text.getvalue()


def answers_jsonl(database: Database) -> str:
    """Every answer of the model judges, word for word, one JSON object a line; vote_id is that of the vote record."""
    query = select(answers, assignments.c.judge_id).join(assignments).order_by(answers.c.answer_id)
    with database.read() as c:
        panel_id = locked_panel(c).panel_id
        rows = [dict(row._mapping) for row in c.execute(query)]
    lines = []
    for said in rows:
        ids = {"vote_id": vote_id(panel_id, said.pop("assignment_id")), "judge_id": said.pop("judge_id")}
        said["asked_at"] = iso(said["asked_at"])
        lines.append(json.dumps(ids | said, ensure_ascii=False) + "\n")
    return "".join(lines)


def check_votes_file(folder: PanelFolder, panel_id: str) -> None:
    """Raise UserError where DIR/votes.csv holds votes of something else than this panel: it is not written over."""
    if any(not vote.vote_id.startswith(f"{panel_id}-") for vote in read_votes(folder.suite.votes)):
        raise UserError(f"{folder.suite.votes}: holds votes of something else than this panel; move it away first")


def broken_rules(rules: Exclusions, judge: JudgeProgress) -> str:
    """The study's rules by which a judge enters no statistic, in words; "" for one who broke none."""
    is_fast = judge.kind == "human" and (judge.median_seconds or math.inf) < (rules.fast_seconds or 0)
    over = {
        "failed_attention": judge.attention.whole - judge.attention.part,
        "failed_gold": judge.gold.whole - judge.gold.part,
        "tie_share": judge.ties.value or 0.0,
    }
    limits = vars(rules)
    broken = [key for key in rules.rules if (is_fast if key == "fast_seconds" else over[key] > limits[key])]
    return ", ".join(rules.rules[key] for key in broken)


def write_votes_record(
    folder: PanelFolder, database: Database, rules: AnalysisConfig, key_read_at: str | None = None
) -> VotesNote:
    """Write votes.csv, votes.json (which is returned) and marginals.json; the same again for the same panel.

    `key_read_at` is what seal.read_by_others said before the lock; later calls for the folder keep what was said.
    """
    found = unsealed_votes(database)
    about, n_first, per_judge = found.panel, len(found.first), tally.votes_per_judge(found.votes)
    assert about.locked_at is not None
    check_votes_file(folder, about.panel_id)
    before = read_record(folder.suite.votes_note, VotesNote) or VotesNote()
    write_text(folder.suite.votes, votes_text(found.votes))
    told, progress = Store(database).study, judge_progress(database)
    attention = [judge.attention for judge in progress if judge.kind == "human"]
    said = {name: ModelJudge(database, name).counts() for name in (j.judge_id for j in progress if j.kind == "model")}
    with database.read() as c:
        query = select(answers.c.status, func.count().label("n")).group_by(answers.c.status)
        replies = {row.status: row.n for row in c.execute(query)}
    note = VotesNote(
        panel_id=about.panel_id,
        suite=about.suite,
        arms=sorted({arm for vote in found.votes for arm in (vote.arm_left, vote.arm_right)}),
        locked_at=iso(about.locked_at),
        locked_early_because=about.lock_note or None,
        key_sha256=about.key_sha256,
        key_read_at=key_read_at or before.key_read_at,
        votes_sha256=file_sha256(folder.suite.votes),
        n_votes=n_first,
        n_repeats=len(found.votes) - n_first,
        n_repeats_without_first_vote=found.lone_repeats,
        n_judges=len(per_judge),
        n_judges_short=sum(n < about.votes_per_judge for n in per_judge.values()),
        n_test_votes=found.test_votes,
        n_refusals=replies.get("refusal", 0),
        n_garbage=replies.get("garbage", 0),
        n_attention_asked=sum(part.whole for part in attention),
        n_attention_passed=sum(part.part for part in attention),
        n_gold_asked=sum(judge.gold.whole for judge in progress),
        n_gold_passed=sum(judge.gold.part for judge in progress),
        study_sha256=told.sha256,
        excluded={judge.judge_id: why for judge in progress if (why := broken_rules(told.exclude, judge))},
        surveys={name: dict(said) for name, said in found.surveys.items()},
        first_chosen={name: [t.n_a, t.n_a + t.n_b] for name, t in said.items()},
        schema_version=SCHEMA_VERSION,
    )
    write_record(folder.suite.votes_note, note)
    write_text(folder.marginals, marginals_json(database, rules))
    return note


def write_export(folder: PanelFolder, database: Database) -> list[Path]:
    """Write judges.csv and answers.jsonl of a locked panel; returns their paths."""
    texts = {"judges.csv": judges_csv(database), "answers.jsonl": answers_jsonl(database)}
    for name, text in texts.items():
        write_text(folder.judging / name, text)
    return [folder.judging / name for name in texts]
