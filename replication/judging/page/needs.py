"""Needs of a route before it answers, as FastAPI dependencies: the store, a judge's visit, the administrator."""

from __future__ import annotations

from hmac import compare_digest
from typing import Annotated, Final

from fastapi import Depends, HTTPException, Request
from starlette.responses import Response

from replication.judging.page.rendering import page, problem
from replication.judging.store import PanelFacts, Store, Visit, hash_token

ADMIN_COOKIE: Final = "judging_admin"
NO_EXPORT_YET: Final = "Votes can be exported by arm once the panel is locked. Until then nobody sees the arms."


class Answered(Exception):
    """A need is not met, and this answer says so."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer


async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


Stored = Annotated[Store, Depends(_store)]


def _visit(token: str, store: Stored) -> Visit:
    if (visit := store.visit(token)) is None:
        raise HTTPException(404)
    return visit


Visited = Annotated[Visit, Depends(_visit)]
"""The judge whose link it is."""


async def _open_visit(visit: Visited) -> Visit:
    if visit.is_locked:
        raise Answered(page("closed", 409, n_voted=visit.judge.n_voted))
    return visit


OpenVisit = Annotated[Visit, Depends(_open_visit)]
"""The same, while the panel takes votes."""


def _join_panel(token: str, store: Stored) -> PanelFacts:
    panel = store.panel()
    if panel.join_sha256 is None or not compare_digest(hash_token(token), panel.join_sha256):
        raise HTTPException(404)
    return panel


JoinPanel = Annotated[PanelFacts, Depends(_join_panel)]
"""The panel whose open link it is."""


def is_admin(token: str, store: Store) -> bool:
    return compare_digest(hash_token(token), store.panel().admin_sha256)


def sign_in_form(was_wrong: bool = False) -> Response:
    answer = page("sign_in", 401, was_wrong=was_wrong)
    answer.headers["www-authenticate"] = "Bearer"
    return answer


def _signed_in(request: Request, store: Stored) -> None:
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    token = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(ADMIN_COOKIE, "")
    if not token or not is_admin(token, store):
        raise Answered(sign_in_form())


SIGNED_IN: Final = Depends(_signed_in)


def _locked(store: Stored) -> None:
    if not store.panel().is_locked:
        title = "Not before the lock"
        raise Answered(problem(409, title=title, text=NO_EXPORT_YET, back="/admin", word="Back to the overview"))


LOCKED: Final = Depends(_locked)
