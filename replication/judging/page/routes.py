"""The routes of the page: a judge's, the open link's, and the administrator's, who is blind until the lock.

Nothing here knows an arm before the lock, nor an item beyond what is shown. What a route needs before it answers (the
store, a judge's visit, the administrator) is a FastAPI dependency. The routes that ask the store are plain functions:
the server runs them in its threads.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Collection, Mapping
from hmac import compare_digest
from typing import Annotated, Final
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, HTTPException, Request
from starlette.responses import PlainTextResponse, Response

from replication.judging.page.rendering import BANNER, STATIC, STATIC_TYPES, judge_path, page, problem, see_other
from replication.judging.progress import gather, minutes
from replication.judging.schema import NOT_STORABLE
from replication.judging.store import Cast, PanelFacts, Recruit, Store, Visit, claim_once, hash_token
from replication.votes.record import CHOICES

SITE: Final = ("PROLIFIC_PID", "STUDY_ID", "SESSION_ID")
SITE_NAME: Final = re.compile(r"[A-Za-z0-9_-]{0,64}")
NONCE: Final = re.compile(r"[A-Za-z0-9_-]{16,64}")
COOKIE_SECONDS: Final = 60 * 24 * 3600  # longer than a panel is open
ADMIN_COOKIE: Final = "judging_admin"
LONGEST_REASON: Final = 1000  # characters

ImpressionField = Annotated[str, Form(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
ChoiceField = Annotated[str, Form(pattern=f"^({'|'.join(CHOICES)})$")]

routes = APIRouter()


class Answered(Exception):
    """A need is not met, and this answer says so."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer


async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


Stored = Annotated[Store, Depends(_store)]


@routes.get("/")
async def home() -> Response:
    return page("home")


@routes.get("/healthz")
async def healthz() -> Response:
    return PlainTextResponse("ok")


@routes.get("/static/{name}")
async def static(name: str) -> Response:
    if name not in STATIC:  # two files in memory: no path leads anywhere else
        return problem(404)
    kept = {"cache-control": "public, max-age=31536000, immutable"}  # pages name them by their hash
    return Response(STATIC[name], media_type=STATIC_TYPES[name], headers=kept)


def _visit(token: str, store: Stored) -> Visit:
    if (visit := store.visit(token)) is None:
        raise HTTPException(404)
    if visit.has_left:
        raise Answered(problem(410, "reclaimed"))
    return visit


Visited = Annotated[Visit, Depends(_visit)]
"""The judge whose link it is."""


async def _open_visit(visit: Visited) -> Visit:
    if visit.is_locked:
        raise Answered(page("closed", 409, n_voted=visit.n_voted))
    return visit


OpenVisit = Annotated[Visit, Depends(_open_visit)]
"""The same, while the panel takes votes."""


@routes.get("/j/{token}")
def look(request: Request, token: str, visit: Visited, store: Stored) -> Response:
    study, path, link = store.study, judge_path(token), str(request.base_url).rstrip("/") + judge_path(token)
    if visit.is_test:
        BANNER.set(BANNER.get() or "test")
    if visit.is_locked:
        return page("closed", n_voted=visit.n_voted)
    if not visit.has_started:
        n_minutes = minutes(store.database, visit.judge_id, study)
        return page("start", path=path, link=link, visit=visit, minutes=n_minutes, study=study)
    if study.check and True not in (tries := store.tries(visit.judge_id)):
        is_over = len(tries) >= study.check_tries
        return page("screened_out" if is_over else "check", path=path, study=study, attempt=len(tries))
    if visit.asks_survey and visit.survey is None:
        return page("survey", path=path, study=study)
    if (shown := store.show(visit.judge_id)) is not None:
        return page("item", path=path, shown=shown, visit=visit, study=study)
    after = store.visit(token)  # another window may have voted, or the panel may have been locked, since `visit`
    if after is None or after.is_locked:
        return page("closed", n_voted=visit.n_voted)
    return page("finished", path=path, link=link, visit=after, study=study)


async def _sent(request: Request) -> dict[str, str]:
    return {name: value for name, value in (await request.form()).items() if isinstance(value, str)}


Sent = Annotated[dict[str, str], Depends(_sent)]
"""The fields of the form, whatever a study has in it."""


def _answers(sent: Mapping[str, str], asked: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Question -> answer, of those that are answered; 422 where one is none of those that it may have."""
    given = {name: sent[name] for name in asked if name in sent}
    if any(answer not in asked[name] for name, answer in given.items()):
        raise HTTPException(422)
    return given


@routes.post("/j/{token}/start")
def start(token: str, visit: OpenVisit, store: Stored, sent: Sent) -> Response:
    if store.study.consent and "consent" not in sent:
        raise HTTPException(422)
    store.start(visit.judge_id)
    return see_other(judge_path(token))


@routes.post("/j/{token}/check")
def check(token: str, visit: OpenVisit, store: Stored, sent: Sent, attempt: Annotated[int, Form()]) -> Response:
    tries, study = store.tries(visit.judge_id), store.study
    if study.check and visit.has_started and True not in tries and attempt == len(tries) < study.check_tries:
        store.check(visit.judge_id, attempt, [sent.get(f"q{i}") for i in range(len(study.check))])
    return see_other(judge_path(token))


@routes.post("/j/{token}/survey")
def survey(token: str, visit: OpenVisit, store: Stored, sent: Sent) -> Response:
    answers = _answers(sent, {name: asked.answers for name, asked in store.study.survey.items()})
    if visit.asks_survey and visit.survey is None:
        store.answer_survey(visit.judge_id, {} if sent.get("skip") else answers)
    return see_other(judge_path(token))


@routes.post("/j/{token}/vote")
def vote(
    token: str, visit: Visited, store: Stored, impression: ImpressionField, choice: ChoiceField, sent: Sent
) -> Response:
    said = _answers(sent, store.study.further)
    if store.study.ask_reason and (reason := sent.get("reason", "").strip()):
        said["reason"] = NOT_STORABLE.sub("\ufffd", reason[:LONGEST_REASON])
    cast = store.vote(visit.judge_id, impression, choice, said)
    if cast is Cast.STORED:
        return see_other(judge_path(token))
    if cast is Cast.LOCKED:
        return page("closed", 409, n_voted=visit.n_voted)
    return problem(403 if cast is Cast.UNKNOWN else 409, cast.value, judge_path(token))


@routes.post("/j/{token}/undo")
def undo(token: str, visit: OpenVisit, store: Stored, impression: ImpressionField) -> Response:
    if not store.undo(visit.judge_id, impression):
        return problem(409, "not_last", judge_path(token))
    return see_other(judge_path(token))


def _join_panel(token: str, store: Stored) -> PanelFacts:
    panel = store.panel()
    if panel.join_sha256 is None or not compare_digest(hash_token(token), panel.join_sha256):
        raise HTTPException(404)
    return panel


JoinPanel = Annotated[PanelFacts, Depends(_join_panel)]
"""The panel whose open link it is."""


def _cookie(join: str) -> str:
    """Its name: one for each panel, as panels of one host share their cookies."""
    return f"judging_{hash_token(join)[:12]}"


def _recruit(request: Request) -> Recruit | None:
    """Whom a recruiting site sent, by its parameters; 422 where they are none of its names."""
    names = [request.query_params.get(key, "") for key in SITE]
    if not all(map(SITE_NAME.fullmatch, names)):
        raise HTTPException(422)
    return Recruit(*names) if names[0] else None


def _link(join: str, secret: str) -> str:
    """The same link for the same secret, however often it is asked for; as hard to guess as the secret."""
    return base64.urlsafe_b64encode(hashlib.sha256(f"{join}/{secret}".encode()).digest()[:24]).decode()


def _own(request: Request, token: str, store: Stored) -> str | None:
    """The link that this participant or browser was given before; None where there is none, or it works no more."""
    recruit = _recruit(request)
    own = _link(token, f"participant/{recruit.participant}") if recruit else request.cookies.get(_cookie(token), "")
    return own if own and store.judge_by_token(own) is not None else None


Own = Annotated[str | None, Depends(_own)]


@routes.get("/join/{token}")
def invite(panel: JoinPanel, own: Own) -> Response:
    if own is not None:
        return see_other(judge_path(own))
    return page("closed", n_voted=None) if panel.is_locked else page("join", nonce=secrets.token_urlsafe(24))


@routes.post("/join/{token}")
def join(
    request: Request, token: str, panel: JoinPanel, own: Own, store: Stored, nonce: Annotated[str, Form()] = ""
) -> Response:
    if own is None and panel.is_locked:
        return page("closed", 409, n_voted=None)
    if own is None:
        recruit = _recruit(request)
        if not recruit and not NONCE.fullmatch(nonce):
            return problem(422, back=f"/join/{quote(token, safe='')}")
        # a nonce stands on one page that nobody else was sent, and is never kept; a participant's name is the site's
        own = _link(token, f"participant/{recruit.participant}" if recruit else nonce)
        if claim_once(store, own, recruit) is None:
            return problem(409, "no_place")
    answer = see_other(judge_path(own))
    # lax, not strict: whoever follows the link in a letter again is to come back to their own page
    is_https = request.url.scheme == "https"
    answer.set_cookie(_cookie(token), own, COOKIE_SECONDS, path="/join", httponly=True, samesite="lax", secure=is_https)
    return answer


def _is_admin(token: str, store: Store) -> bool:
    return compare_digest(hash_token(token), store.panel().admin_sha256)


def _sign_in_form(was_wrong: bool = False) -> Response:
    answer = page("sign_in", 401, was_wrong=was_wrong)
    answer.headers["www-authenticate"] = "Bearer"
    return answer


def _signed_in(request: Request, store: Stored) -> None:
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    token = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(ADMIN_COOKIE, "")
    if not token or not _is_admin(token, store):
        raise Answered(_sign_in_form())


def _locked(store: Stored) -> None:
    if not store.panel().is_locked:
        raise Answered(problem(409, "not_locked", "/admin"))


SIGNED_IN: Final = Depends(_signed_in)
LOCKED: Final = Depends(_locked)


@routes.get("/admin", dependencies=[SIGNED_IN])
def overview(store: Stored) -> Response:
    return page("admin", o=gather(store.database), study=store.study)


@routes.post("/admin/sign-in")
def sign_in(request: Request, store: Stored, token: Annotated[str, Form(max_length=200)]) -> Response:
    if not _is_admin(token.strip(), store):
        return _sign_in_form(was_wrong=True)
    answer = see_other("/admin")
    is_https = request.url.scheme == "https"
    answer.set_cookie(ADMIN_COOKIE, token.strip(), path="/admin", httponly=True, samesite="strict", secure=is_https)
    return answer


@routes.post("/admin/sign-out")
def sign_out() -> Response:
    answer = see_other("/admin")
    answer.delete_cookie(ADMIN_COOKIE, path="/admin", httponly=True, samesite="strict")
    return answer


@routes.get("/admin/votes.csv", dependencies=[SIGNED_IN, LOCKED])
@routes.get("/admin/marginals.json", dependencies=[SIGNED_IN, LOCKED])
def export(request: Request, store: Stored) -> Response:
    from replication.judging.record import marginals_json, votes_csv  # scipy: only once there are votes

    name = request.url.path.rpartition("/")[2]
    make, kind = (votes_csv, "text/csv; charset=utf-8") if name == "votes.csv" else (marginals_json, "application/json")
    return Response(make(store.database), 200, {"content-disposition": f'attachment; filename="{name}"'}, kind)
