"""The administrator's page: how the judging goes, blind until the lock; then results by arm and the exports."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from hmac import compare_digest
from typing import Annotated, Any, Final

from fastapi import APIRouter, Form, Request
from sqlalchemy import Connection, func, select
from starlette.responses import Response

from replication.judging import numbers
from replication.judging.database import Database
from replication.judging.pages import page, problem, see_other
from replication.judging.schema import answers, assignments, items, judges, panel, unsealed
from replication.judging.store import Store, hash_token, standing_votes

COOKIE: Final = "judging_admin"
NO_EXPORT_YET: Final = "Votes can be exported by arm once the panel is locked. Until then nobody sees the arms."


@dataclass(frozen=True)
class JudgeState:
    """A judge as the administrator sees them."""

    kind: str
    vendor: str
    state: str
    numbers: numbers.JudgeNumbers


@dataclass(frozen=True)
class Overview:
    """All that the administrator's page shows."""

    suite: str
    created_at: str
    locked_at: str | None
    lock_note: str | None
    planned_judges: int
    votes: numbers.Share
    left: numbers.Share
    judges: list[JudgeState]
    n_unclaimed: int
    coverage: list[numbers.PromptNumbers]
    agreement: dict[str, numbers.Share]
    answers: list[tuple[str, dict[str, int]]]
    """Model judge -> status -> requests."""
    n_surveyed: int
    survey: dict[str, dict[str, int]]
    results: list[numbers.Tally]


def admin_routes(store: Store) -> APIRouter:
    """Sign-in, the page, the exports."""
    routes = APIRouter(prefix="/admin")

    @routes.get("")
    def overview(request: Request) -> Response:
        if not _is_signed_in(request, store):
            return _sign_in_form()
        return page("admin", o=gather(store.database), minute=_minute)

    @routes.post("/sign-in")
    def sign_in(request: Request, token: Annotated[str, Form(max_length=200)]) -> Response:
        if not _is_token(token.strip(), store):
            return _sign_in_form(was_wrong=True)
        answer = see_other("/admin")
        is_https = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token.strip(), path="/admin", httponly=True, samesite="strict", secure=is_https)
        return answer

    @routes.post("/sign-out")
    def sign_out() -> Response:
        answer = see_other("/admin")
        answer.delete_cookie(COOKIE, path="/admin", httponly=True, samesite="strict")
        return answer

    @routes.get("/votes.csv")
    def votes_csv(request: Request) -> Response:
        return _export(request, store, "votes.csv", "text/csv; charset=utf-8")

    @routes.get("/marginals.json")
    def marginals_json(request: Request) -> Response:
        return _export(request, store, "marginals.json", "application/json")

    return routes


def gather(database: Database) -> Overview:
    """Everything in one consistent view."""
    with database.read() as c:
        the_panel = c.execute(select(panel)).one()
        rows = c.execute(standing_votes()).all()
        people = c.execute(select(judges).order_by(judges.c.kind, judges.c.judge_id)).all()
        n_assigned = _assigned_by_judge(c)
        planned = _assigned_by_prompt(c)
        replies = _replies(c)
        truth = {row.item_id: row for row in c.execute(select(unsealed))} if the_panel.locked_at else {}
    taken = [judge for judge in people if judge.kind == "model" or judge.token_sha256 is not None]
    of_judges = numbers.by_judge(rows, {judge.judge_id: n_assigned.get(judge.judge_id, 0) for judge in taken})
    n_surveyed, survey = numbers.survey_counts(judge.survey for judge in taken)
    return Overview(
        suite=the_panel.suite,
        created_at=_minute(the_panel.created_at),
        locked_at=_minute(the_panel.locked_at) if the_panel.locked_at else None,
        lock_note=the_panel.lock_note,
        planned_judges=the_panel.planned_judges,
        votes=numbers.Share(len(rows), sum(n_assigned.values())),
        left=numbers.left_share(rows),
        judges=[
            JudgeState(judge.kind, judge.vendor, _state(judge, n.votes), n)
            for judge, n in zip(taken, of_judges, strict=True)
        ],
        n_unclaimed=len(people) - len(taken),
        coverage=numbers.coverage(rows, planned),
        agreement=numbers.agreement(rows),
        answers=replies,
        n_surveyed=n_surveyed,
        survey={question: dict(counts) for question, counts in survey.items()},
        results=numbers.results(rows, truth),
    )


def _assigned_by_judge(c: Connection) -> dict[str, int]:
    query = select(assignments.c.judge_id, func.count().label("n")).group_by(assignments.c.judge_id)
    return {row.judge_id: row.n for row in c.execute(query)}


def _assigned_by_prompt(c: Connection) -> dict[tuple[int, str, str], int]:
    by = (items.c.prompt_id, items.c.category, judges.c.kind)
    query = select(*by, func.count()).join_from(assignments, items).join(judges)
    first = query.where(items.c.prompt_id.is_not(None), assignments.c.repeats.is_(None)).group_by(*by)
    return {(prompt_id, category, kind): n for prompt_id, category, kind, n in c.execute(first)}


def _replies(c: Connection) -> list[tuple[str, dict[str, int]]]:
    by = (assignments.c.judge_id, answers.c.status)
    query = select(*by, func.count()).join_from(answers, assignments).group_by(*by).order_by(*by)
    counts: dict[str, dict[str, int]] = {}
    for judge_id, status, n in c.execute(query):
        counts.setdefault(judge_id, {})[status] = n
    return list(counts.items())


def _state(judge: Any, votes: numbers.Share) -> str:
    if votes.whole and votes.part == votes.whole:
        return "finished"
    if votes.part:
        return "voting"
    return "started" if judge.started_at is not None else "not started"


def _minute(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _is_signed_in(request: Request, store: Store) -> bool:
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    token = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")
    return bool(token) and _is_token(token, store)


def _is_token(token: str, store: Store) -> bool:
    return compare_digest(hash_token(token), store.panel().admin_sha256)


def _sign_in_form(was_wrong: bool = False) -> Response:
    answer = page("sign_in", 401, was_wrong=was_wrong)
    answer.headers["www-authenticate"] = "Bearer"
    return answer


def _export(request: Request, store: Store, name: str, media_type: str) -> Response:
    if not _is_signed_in(request, store):
        return _sign_in_form()
    if not store.panel().is_locked:
        return problem(409, title="Not before the lock", text=NO_EXPORT_YET, back="/admin", word="Back to the overview")
    from replication.judging.export import marginals_json, votes_csv

    write = {"votes.csv": votes_csv, "marginals.json": marginals_json}[name]
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(write(store.database), media_type=media_type, headers=headers)
