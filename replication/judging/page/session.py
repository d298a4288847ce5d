"""The routes of a judge: their page, and the four things it sends. Knows no arm, and no item beyond what is shown."""

from __future__ import annotations

import secrets
from hmac import compare_digest
from typing import Annotated, Final

from fastapi import APIRouter, Form
from starlette.responses import Response

from replication.judging.page.rendering import judge_path, page, problem, see_other
from replication.judging.store import Cast, Store, Visit, hash_token
from replication.votes import CHOICES

SURVEY: Final = {
    "chat_models": ("never", "sometimes", "weekly", "daily"),
    "background": ("none", "technical", "ml"),
    "native_english": ("yes", "no"),
    "took_part_before": ("yes", "no"),
}
"""Questions about the judge and the answers they may have; the words are in the template."""

ShowingField = Annotated[str, Form(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
SurveyField = Annotated[str | None, Form(max_length=32)]


def judge_routes(store: Store) -> APIRouter:
    """The page of a judge, and the open link."""
    routes = APIRouter()

    # Written as plain functions: the server runs them in its threads.

    @routes.get("/j/{token}")
    def look(token: str) -> Response:
        visit = store.visit(token)
        return problem(404) if visit is None else _page_of(store, token, visit)

    @routes.post("/j/{token}/start")
    def start(token: str) -> Response:
        visit = store.visit(token)
        if visit is None or visit.is_locked:
            return _refused(token, visit)
        store.start(visit.judge.judge_id)
        return see_other(judge_path(token))

    @routes.post("/j/{token}/survey")
    def survey(
        token: str,
        chat_models: SurveyField = None,
        background: SurveyField = None,
        native_english: SurveyField = None,
        took_part_before: SurveyField = None,
        skip: SurveyField = None,
    ) -> Response:
        visit = store.visit(token)
        if visit is None or visit.is_locked:
            return _refused(token, visit)
        given = {
            "chat_models": chat_models,
            "background": background,
            "native_english": native_english,
            "took_part_before": took_part_before,
        }
        answers = {question: answer for question, answer in given.items() if answer}
        if any(answer not in SURVEY[question] for question, answer in answers.items()):
            return problem(422, back=judge_path(token))
        if visit.asks_survey and visit.judge.survey is None:
            store.answer_survey(visit.judge.judge_id, {} if skip else answers)
        return see_other(judge_path(token))

    @routes.post("/j/{token}/vote")
    def vote(token: str, showing: ShowingField, choice: Annotated[str, Form()]) -> Response:
        visit = store.visit(token)
        if visit is None:
            return problem(404)
        if choice not in CHOICES:
            return problem(422, back=judge_path(token))
        return _after_vote(token, visit, store.vote(visit.judge.judge_id, showing, choice))

    @routes.post("/j/{token}/undo")
    def undo(token: str, showing: ShowingField) -> Response:
        visit = store.visit(token)
        if visit is None or visit.is_locked:
            return _refused(token, visit)
        if not store.undo(visit.judge.judge_id, showing):
            title = "That vote is not your last one"
            return problem(409, title=title, text="Only the last vote can be undone, once.", back=judge_path(token))
        return see_other(judge_path(token))

    @routes.get("/join/{token}")
    def invite(token: str) -> Response:
        panel = store.panel()
        if not _opens(token, panel.join_sha256):
            return problem(404)
        return page("closed", n_voted=None) if panel.is_locked else page("join")

    @routes.post("/join/{token}")
    def join(token: str) -> Response:
        panel = store.panel()
        if not _opens(token, panel.join_sha256):
            return problem(404)
        if panel.is_locked:
            return page("closed", 409, n_voted=None)
        own = secrets.token_urlsafe(24)
        if store.claim(own) is None:
            return problem(
                409, title="All places are taken", text="Thank you for coming. Enough people take part already."
            )
        return see_other(judge_path(own))

    return routes


def _page_of(store: Store, token: str, visit: Visit) -> Response:
    judge, path = visit.judge, judge_path(token)
    if visit.is_locked:
        return page("closed", n_voted=judge.n_voted)
    if not judge.has_started:
        return page("start", path=path, n_assigned=judge.n_assigned)
    if visit.asks_survey and judge.survey is None:
        return page("survey", path=path, survey=SURVEY)
    shown = store.show(judge.judge_id)
    if shown is not None:
        return page("item", path=path, shown=shown, n_assigned=judge.n_assigned, last_vote=visit.last_vote)
    after = store.visit(token)  # another window may have voted, or the panel may have been locked, since `visit`
    if after is None or after.is_locked:
        return page("closed", n_voted=judge.n_voted)
    return page("finished", path=path, n_voted=after.judge.n_voted, last_vote=after.last_vote)


def _after_vote(token: str, visit: Visit, cast: Cast) -> Response:
    path = judge_path(token)
    if cast is Cast.STORED:
        return see_other(path)
    if cast is Cast.LOCKED:
        return page("closed", 409, n_voted=visit.judge.n_voted)
    if cast is Cast.UNKNOWN:
        return problem(403, title="This pair was not shown to you", back=path)
    if cast is Cast.REPEATED:
        title, text = "This vote is stored already", "It counts once. The next pair comes by itself in a moment."
    else:
        title = "There is a vote on this pair already"
        text = "The first one counts. To change it, go on and undo your last vote."
    return problem(409, title=title, text=text, back=path, goes_on=True)


def _refused(token: str, visit: Visit | None) -> Response:
    """For a link that nobody has, or a panel that is locked."""
    return problem(404) if visit is None else page("closed", 409, n_voted=visit.judge.n_voted)


def _opens(token: str, hashed: str | None) -> bool:
    return hashed is not None and compare_digest(hash_token(token), hashed)
