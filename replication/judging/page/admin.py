"""The administrator's page: how the judging goes, blind until the lock; then results by arm and the exports."""

from __future__ import annotations

from hmac import compare_digest
from typing import Annotated, Final

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from replication.judging.page.rendering import page, problem, see_other
from replication.judging.progress import gather
from replication.judging.store import Store, hash_token

COOKIE: Final = "judging_admin"
NO_EXPORT_YET: Final = "Votes can be exported by arm once the panel is locked. Until then nobody sees the arms."


def admin_routes(store: Store) -> APIRouter:
    """Sign-in, the page, the exports."""
    routes = APIRouter(prefix="/admin")

    @routes.get("")
    def overview(request: Request) -> Response:
        if not _is_signed_in(request, store):
            return _sign_in_form()
        return page("admin", o=gather(store.database))

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
