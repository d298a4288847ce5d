"""The administrator's page: how the judging goes, blind until the lock; then results by arm and the exports."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from replication.judging.page.needs import ADMIN_COOKIE, LOCKED, SIGNED_IN, Stored, is_admin, sign_in_form
from replication.judging.page.rendering import page, see_other
from replication.judging.progress import gather

routes = APIRouter(prefix="/admin")


@routes.get("", dependencies=[SIGNED_IN])
def overview(store: Stored) -> Response:
    return page("admin", o=gather(store.database))


@routes.post("/sign-in")
def sign_in(request: Request, store: Stored, token: Annotated[str, Form(max_length=200)]) -> Response:
    if not is_admin(token.strip(), store):
        return sign_in_form(was_wrong=True)
    answer = see_other("/admin")
    is_https = request.url.scheme == "https"
    answer.set_cookie(ADMIN_COOKIE, token.strip(), path="/admin", httponly=True, samesite="strict", secure=is_https)
    return answer


@routes.post("/sign-out")
def sign_out() -> Response:
    answer = see_other("/admin")
    answer.delete_cookie(ADMIN_COOKIE, path="/admin", httponly=True, samesite="strict")
    return answer


@routes.get("/votes.csv", dependencies=[SIGNED_IN, LOCKED])
def votes(store: Stored) -> Response:
    from replication.judging.export import votes_csv

    return _file(votes_csv(store.database), "votes.csv", "text/csv; charset=utf-8")


@routes.get("/marginals.json", dependencies=[SIGNED_IN, LOCKED])
def marginals(store: Stored) -> Response:
    from replication.judging.export import marginals_json

    return _file(marginals_json(store.database), "marginals.json", "application/json")


def _file(text: str, name: str, media_type: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(text, media_type=media_type, headers=headers)
