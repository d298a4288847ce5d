"""The routes of a judge: their page, and the four things it sends. Knows no arm, and no item beyond what is shown."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from typing import Annotated, Final
from urllib.parse import quote

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from replication.judging.page.needs import JoinPanel, OpenVisit, Stored, Visited
from replication.judging.page.rendering import BANNER, TEST, judge_path, page, problem, see_other
from replication.judging.store import Cast, Store, claim_once, hash_token
from replication.votes.record import CHOICES

SURVEY: Final = {
    "chat_models": ("never", "sometimes", "weekly", "daily"),
    "background": ("none", "technical", "ml"),
    "native_english": ("yes", "no"),
    "took_part_before": ("yes", "no"),
}
"""Questions about the judge and the answers they may have; the words are in the template."""

NONCE: Final = re.compile(r"[A-Za-z0-9_-]{16,64}")
COOKIE_SECONDS: Final = 60 * 24 * 3600  # longer than a panel is open

ImpressionField = Annotated[str, Form(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
SurveyField = Annotated[str | None, Form(max_length=32)]

routes = APIRouter()
"""The page of a judge, and the open link. Written as plain functions: the server runs them in its threads."""


@routes.get("/j/{token}")
def look(request: Request, token: str, visit: Visited, store: Stored) -> Response:
    judge, path, link = visit.judge, judge_path(token), str(request.base_url).rstrip("/") + judge_path(token)
    if judge.is_test:
        BANNER.set(BANNER.get() or TEST)
    if visit.is_locked:
        return page("closed", n_voted=judge.n_voted)
    if not judge.has_started:
        return page("start", path=path, link=link, n_assigned=judge.n_assigned)
    if visit.asks_survey and judge.survey is None:
        return page("survey", path=path, survey=SURVEY)
    shown = store.show(judge.judge_id)
    if shown is not None:
        return page("item", path=path, shown=shown, n_assigned=judge.n_assigned, last_vote=visit.last_vote)
    after = store.visit(token)  # another window may have voted, or the panel may have been locked, since `visit`
    if after is None or after.is_locked:
        return page("closed", n_voted=judge.n_voted)
    return page("finished", path=path, link=link, n_voted=after.judge.n_voted, last_vote=after.last_vote)


@routes.post("/j/{token}/start")
def start(token: str, visit: OpenVisit, store: Stored) -> Response:
    store.start(visit.judge.judge_id)
    return see_other(judge_path(token))


@routes.post("/j/{token}/survey")
def survey(
    token: str,
    visit: OpenVisit,
    store: Stored,
    chat_models: SurveyField = None,
    background: SurveyField = None,
    native_english: SurveyField = None,
    took_part_before: SurveyField = None,
    skip: SurveyField = None,
) -> Response:
    given = dict(zip(SURVEY, (chat_models, background, native_english, took_part_before), strict=True))
    answers = {question: answer for question, answer in given.items() if answer}
    if any(answer not in SURVEY[question] for question, answer in answers.items()):
        return problem(422, back=judge_path(token))
    if visit.asks_survey and visit.judge.survey is None:
        store.answer_survey(visit.judge.judge_id, {} if skip else answers)
    return see_other(judge_path(token))


@routes.post("/j/{token}/vote")
def vote(
    token: str, visit: Visited, store: Stored, impression: ImpressionField, choice: Annotated[str, Form()]
) -> Response:
    path = judge_path(token)
    if choice not in CHOICES:
        return problem(422, back=path)
    cast = store.vote(visit.judge.judge_id, impression, choice)
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


@routes.post("/j/{token}/undo")
def undo(token: str, visit: OpenVisit, store: Stored, impression: ImpressionField) -> Response:
    if not store.undo(visit.judge.judge_id, impression):
        title = "That vote is not your last one"
        return problem(409, title=title, text="Only the last vote can be undone, once.", back=judge_path(token))
    return see_other(judge_path(token))


@routes.get("/join/{token}")
def invite(request: Request, token: str, panel: JoinPanel, store: Stored) -> Response:
    if (own := _own(request, token, store)) is not None:
        return see_other(judge_path(own))
    return page("closed", n_voted=None) if panel.is_locked else page("join", nonce=secrets.token_urlsafe(24))


@routes.post("/join/{token}")
def join(request: Request, token: str, panel: JoinPanel, store: Stored, nonce: Annotated[str, Form()] = "") -> Response:
    own = _own(request, token, store)
    if own is None and panel.is_locked:
        return page("closed", 409, n_voted=None)
    if own is None:
        if not NONCE.fullmatch(nonce):
            return problem(422, back=f"/join/{quote(token, safe='')}")
        own = _derived(token, nonce)
        if claim_once(store, own) is None:
            text = "Thank you for coming. Enough people take part already."
            return problem(409, title="All places are taken", text=text)
    answer = see_other(judge_path(own))
    # lax, not strict: whoever follows the link in a letter again is to come back to their own page
    is_https = request.url.scheme == "https"
    answer.set_cookie(_cookie(token), own, COOKIE_SECONDS, path="/join", httponly=True, samesite="lax", secure=is_https)
    return answer


def _derived(join: str, nonce: str) -> str:
    """The link that one form of the open link gives: the same form gives the same, however often it is sent.

    As secret as the form's nonce, which stands on one page that nobody else was sent, and is never kept.
    """
    return base64.urlsafe_b64encode(hashlib.sha256(f"{join}/{nonce}".encode()).digest()[:24]).decode()


def _cookie(join: str) -> str:
    """Its name: one for each panel, as panels of one host share their cookies."""
    return f"judging_{hash_token(join)[:12]}"


def _own(request: Request, join: str, store: Store) -> str | None:
    """The link that this browser was given before; None where it was given none, or the link works no more."""
    own = request.cookies.get(_cookie(join), "")
    return own if own and store.judge_by_token(own) is not None else None
