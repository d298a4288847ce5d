"""The judging page over HTTP: a session, what a visitor may see, and what an attacker must not get."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from small_panel import SUITE, SmallPanel, served, small_panel
from sqlalchemy import event, update

from replication.errors import UserError
from replication.judging import numbers
from replication.judging.numbers import Share
from replication.judging.schema import judges
from replication.judging.security import LONGEST_BODY_BYTES
from replication.judging.server import create_app, serve

SHOWING = re.compile(r'/vote"[^>]*>\s*<input type="hidden" name="showing" value="([^"]+)"')
UNDOABLE = re.compile(r'/undo"[^>]*>\s*<input type="hidden" name="showing" value="([^"]+)"')


@pytest.fixture
def panel(tmp_path: Path) -> SmallPanel:
    return small_panel(tmp_path)


@pytest.fixture
def client(panel: SmallPanel) -> Iterator[httpx.Client]:
    """Speaks to a real server; follows no redirect."""
    with served(panel.store) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture
def writes_nothing(panel: SmallPanel) -> Iterator[None]:
    """The tables hold the same before and after the test."""
    before = panel.contents()
    yield
    assert panel.contents() == before


@pytest.fixture
def begun(panel: SmallPanel) -> dict[str, str]:
    """Both judges have started and one vote each; token -> what is shown to them now."""
    shown = {}
    for token, name in zip(panel.links, ("judge-001", "judge-002"), strict=True):
        panel.store.start(name)
        first = panel.store.show(name)
        assert first is not None
        panel.store.vote(name, first.showing, "tie")
        second = panel.store.show(name)
        assert second is not None
        shown[token] = second.showing
    return shown


def showing(page: httpx.Response) -> str:
    match = SHOWING.search(page.text)
    assert match, page.text
    return match.group(1)


# ---------------------------------------------------------------- a session


def test_a_session_from_the_link_to_the_end(tmp_path: Path) -> None:
    panel = small_panel(tmp_path, survey=True)
    with served(panel.store) as address, httpx.Client(base_url=address, follow_redirects=True) as client:
        path = f"/j/{panel.links[0]}"
        assert "Start</button>" in client.get(path).text
        assert "About you" in client.post(f"{path}/start").text
        page = client.post(f"{path}/survey", data={"background": "technical", "native_english": "yes"})
        for n in range(1, 7):
            assert f"Pair {n} of 6" in page.text and "How to judge" in page.text
            page = client.post(f"{path}/vote", data={"showing": showing(page), "choice": "left"})
        assert "Thank you" in page.text and client.get(path).text == page.text
        undoable = UNDOABLE.search(page.text)
        assert undoable
        page = client.post(f"{path}/undo", data={"showing": undoable.group(1)})
        assert "Pair 6 of 6" in page.text
    visit = panel.store.visit(panel.links[0])
    assert visit is not None and visit.judge.n_voted == 5
    assert visit.judge.survey == {"background": "technical", "native_english": "yes"}


def test_posts_answer_with_see_other(panel: SmallPanel, client: httpx.Client) -> None:
    path = f"/j/{panel.links[0]}"
    assert (answer := client.post(f"{path}/start")).status_code == 303 and answer.headers["location"] == path
    shown = showing(client.get(path))
    for verb in ("vote", "undo"):
        answer = client.post(f"{path}/{verb}", data={"showing": shown, "choice": "tie"})
        assert (answer.status_code, answer.headers["location"]) == (303, path)


def test_a_look_starts_nothing_and_votes_nothing(panel: SmallPanel, client: httpx.Client, writes_nothing: None) -> None:
    """A link that is previewed by a messenger, or opened by a scanner of mail."""
    for path in ("/", f"/j/{panel.links[0]}", f"/join/{panel.join}", "/admin", "/healthz"):
        client.get(path)
        client.head(path)
        client.options(path)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [({"skip": "yes", "background": "ml"}, {}), ({}, {}), ({"background": "ml"}, {"background": "ml"})],
)
def test_the_survey_can_be_skipped_and_is_asked_once(
    tmp_path: Path, sent: dict[str, str], kept: dict[str, str]
) -> None:
    panel = small_panel(tmp_path, survey=True)
    with served(panel.store) as address, httpx.Client(base_url=address, follow_redirects=True) as client:
        path = f"/j/{panel.links[0]}"
        client.post(f"{path}/start")
        assert "Pair 1 of 6" in client.post(f"{path}/survey", data=sent).text
        client.post(f"{path}/survey", data={"background": "none"})
    visit = panel.store.visit(panel.links[0])
    assert visit is not None and visit.judge.survey == kept


def test_the_open_link_gives_each_visitor_a_set(panel: SmallPanel, client: httpx.Client) -> None:
    paths = []
    for _ in range(2):
        answer = client.post(f"/join/{panel.join}")
        assert answer.status_code == 303
        paths.append(answer.headers["location"])
    assert len(set(paths)) == 2 and all(client.get(path).status_code == 200 for path in paths)
    before = panel.contents()
    full = client.post(f"/join/{panel.join}")
    assert full.status_code == 409 and "All places are taken" in full.text
    assert panel.contents() == before


# ---------------------------------------------------------------- blindness


def test_pages_and_headers_name_nothing_but_the_showing(tmp_path: Path) -> None:
    panel = small_panel(tmp_path, attention=1, repeat_share=0.5, text=lambda *_: "the same words")
    contents = panel.contents()
    secret = {str(row.item_id) for row in contents["items"]} | {"judge-001", "baseline", SUITE, "seed", "plain"}
    pages = []
    with served(panel.store) as address, httpx.Client(base_url=address) as client:
        path = f"/j/{panel.links[0]}"
        client.post(f"{path}/start")
        for _ in range(10):
            answer = client.get(path)
            shown = showing(answer)
            raw = answer.text + str(answer.headers)
            assert not [word for word in secret if word in raw]
            # what is left when prompt, number and what is random are taken out is the same on every page
            plain = re.sub(r'(?s)<section class="prompt".*?</section>', "", answer.text).replace(shown, "")
            plain = UNDOABLE.sub("", plain.replace("(no text)", "the same words"))
            plain = re.sub(
                r'<form method="post" action="[^"]*?>\s*<button class="small.*?</form>|Pair \d+|value="\d+"',
                "",
                plain,
                flags=re.S,
            )
            pages.append((plain, {k: v for k, v in answer.headers.items() if k not in ("date", "content-length")}))
            client.post(f"{path}/vote", data={"showing": shown, "choice": "left"})
    assert all(page == pages[0] for page in pages)


HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex, nofollow",
}


def test_every_answer_carries_the_headers(panel: SmallPanel, client: httpx.Client, begun: dict[str, str]) -> None:
    path = f"/j/{panel.links[0]}"
    answers = [
        client.get(p) for p in ("/", path, f"/join/{panel.join}", "/admin", "/healthz", "/nowhere", f"{path}/vote")
    ]
    answers += [
        client.post(f"{path}/start"),
        client.post(f"{path}/vote", data={"showing": "x", "choice": "tie"}),
        client.post(f"{path}/vote"),
        client.post(f"{path}/vote", headers={"origin": "null"}),
        client.post(f"{path}/vote", content=b"x" * (LONGEST_BODY_BYTES + 1)),
        client.post(f"{path}/vote", content=b"{}", headers={"content-type": "application/json"}),
        client.get("/", headers={"host": "example.org"}),
    ]
    assert [a.status_code for a in answers] == [200, 200, 200, 401, 200, 404, 405, 303, 403, 422, 403, 413, 415, 400]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert not {"etag", "last-modified", "server", "set-cookie"} & set(answer.headers)
    assert all("<h1" in a.text for a in answers if a.status_code >= 400)
    assert all("href" in a.text for a in answers if a.status_code >= 400)


def test_a_failure_of_ours_is_a_page_too(panel: SmallPanel, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    app = create_app(panel.store, log=lines.append)
    panel.database.close()
    (panel.sealed.parent / "judging.sqlite").unlink()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(f"/j/{panel.links[0]}")

    answer = asyncio.run(ask())
    assert answer.status_code == 500 and "Votes that were stored before are safe" in answer.text
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert lines[0].startswith("GET /j/{token} 500 ")


def test_static_files_are_two_and_kept(client: httpx.Client) -> None:
    page = client.get("/").text
    for kind, path in (("text/css", r'href="(/static/[^"]+)"'), ("text/javascript", r'src="(/static/[^"]+)"')):
        match = re.search(path, page)
        assert match
        answer = client.get(match.group(1))
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert "immutable" in answer.headers["cache-control"]
    assert not re.search(r"(?:src|href|url)\W{1,3}(?:https?:)?//", page + client.get("/static/judge.css").text)


# ---------------------------------------------------------------- attacks


def test_a_guessed_link_and_a_broken_one_get_the_same_page(
    panel: SmallPanel, client: httpx.Client, writes_nothing: None
) -> None:
    guesses = [
        "A" * 32,
        "x",
        "%00",
        "'%20OR%20'1'='1",
        "%F0%9F%98%80",
        "%ff%fe",
        "a" * 5000,
        panel.links[0][:-1],
        panel.join,
        "judge-001",
    ]
    pages = [client.get(f"/j/{guess}") for guess in guesses]
    pages += [
        client.post(f"/j/{guesses[0]}/{verb}", data={"showing": "x", "choice": "tie"})
        for verb in ("start", "survey", "vote", "undo")
    ]
    pages += [client.get(f"/join/{panel.links[0]}"), client.post("/join/x"), client.get("/nowhere")]
    assert {page.status_code for page in pages} == {404}
    assert len({page.text for page in pages}) == 1


def test_a_guessed_link_asks_the_database_what_a_broken_one_asks(panel: SmallPanel, client: httpx.Client) -> None:
    """So neither takes longer than the other."""
    asked: list[str] = []
    event.listen(panel.database.engine, "before_cursor_execute", lambda *about: asked.append(about[2]))
    statements = []
    for token in ("A" * 32, "x", "%00", "a" * 5000):
        asked.clear()
        client.get(f"/j/{token}")
        statements.append(list(asked))
    assert statements[0] and all(those == statements[0] for those in statements)


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("never shown", 403),
        ("of another judge", 403),
        ("voted on before", 409),
        ("not a showing", 422),
        ("no showing", 422),
        ("unknown choice", 422),
        ("no choice", 422),
    ],
)
def test_a_vote_must_be_on_what_is_shown(
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str], writes_nothing: None, what: str, status: int
) -> None:
    mine, other = panel.links
    data = {
        "never shown": {"showing": "A" * 22, "choice": "left"},
        "of another judge": {"showing": begun[other], "choice": "left"},
        "voted on before": {"showing": panel.store.last_vote("judge-001"), "choice": "left"},
        "not a showing": {"showing": "'; DROP TABLE votes; --", "choice": "left"},
        "no showing": {"choice": "left"},
        "unknown choice": {"showing": begun[mine], "choice": "first"},
        "no choice": {"showing": begun[mine]},
    }[what]
    answer = client.post(f"/j/{mine}/vote", data=data)
    assert answer.status_code == status and f'href="/j/{mine}"' in answer.text


@pytest.mark.parametrize("choice", ["tie", "left"])
def test_a_replayed_vote_is_told_so_and_led_on(
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str], writes_nothing: None, choice: str
) -> None:
    path = f"/j/{panel.links[0]}"
    answer = client.post(f"{path}/vote", data={"showing": panel.store.last_vote("judge-001"), "choice": choice})
    assert answer.status_code == 409
    assert ("stored already" if choice == "tie" else "vote on this pair already") in answer.text
    assert f'http-equiv="refresh" content="4; url={path}"' in answer.text and f'href="{path}"' in answer.text


def test_an_undo_works_once_and_for_the_last_vote(
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str]
) -> None:
    mine, other = panel.links
    last = panel.store.last_vote("judge-001")
    for showing_ in ("A" * 22, begun[mine], panel.store.last_vote("judge-002")):
        assert client.post(f"/j/{mine}/undo", data={"showing": showing_}).status_code == 409
    assert client.post(f"/j/{mine}/undo", data={"showing": last}).status_code == 303
    before = panel.contents()
    assert client.post(f"/j/{mine}/undo", data={"showing": last}).status_code == 409
    assert client.post(f"/j/{mine}/vote", data={"showing": last, "choice": "left"}).status_code == 409
    assert panel.contents() == before


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://example.org"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://localhost"},
        {"origin": "http://[::bad"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "null"},
    ],
)
def test_another_site_cannot_post(
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str], writes_nothing: None, headers: dict[str, str]
) -> None:
    token = panel.links[0]
    data = {"showing": begun[token], "choice": "left", "token": panel.admin}
    for path in (f"/j/{token}/vote", f"/j/{token}/undo", f"/j/{token}/start", f"/join/{panel.join}", "/admin/sign-in"):
        assert client.post(path, data=data, headers=headers).status_code == 403


def test_our_own_pages_can_post(panel: SmallPanel, client: httpx.Client) -> None:
    origin = str(client.base_url).rstrip("/")
    for headers in (
        {"origin": origin},
        {"origin": origin, "sec-fetch-site": "same-origin"},
        {"origin": "null", "sec-fetch-site": "same-origin"},
    ):
        assert client.post(f"/j/{panel.links[0]}/start", headers=headers).status_code == 303


@pytest.mark.parametrize(
    "host", ["example.org", "127.0.0.1.example.org", "10.0.0.7", "localhost@example.org", "", "[::1", "judging"]
)
def test_a_foreign_host_is_refused(panel: SmallPanel, client: httpx.Client, writes_nothing: None, host: str) -> None:
    """Another site's name may be made to lead here."""
    assert client.get(f"/j/{panel.links[0]}", headers={"host": host}).status_code == 400
    assert client.post(f"/j/{panel.links[0]}/start", headers={"host": host}).status_code == 400


async def _status(app: Any, host: str, **headers: str) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        return (await client.post("/admin/sign-out", headers={"host": host} | headers)).status_code


@pytest.mark.parametrize(
    ("options", "host", "origin", "status"),
    [
        ({}, "localhost:8000", "http://localhost:8000", 303),
        ({}, "[::1]:8000", "http://[::1]:8000", 303),
        ({"bound_to": "192.0.2.1"}, "192.0.2.1:8000", "http://192.0.2.1:8000", 303),
        ({"bound_to": "192.0.2.1"}, "192.0.2.2:8000", "http://192.0.2.2:8000", 400),
        ({"bound_to": "0.0.0.0"}, "192.0.2.2:8000", "http://192.0.2.2:8000", 303),
        ({"bound_to": "::"}, "[2001:db8::1]:8000", "http://[2001:db8::1]:8000", 303),
        ({"bound_to": "0.0.0.0"}, "example.org", "http://example.org", 400),
        ({"allowed_hosts": ["example.org"]}, "EXAMPLE.org", "https://EXAMPLE.org", 303),
        ({"allowed_hosts": ["example.org"]}, "127.0.0.1:8000", "https://example.org", 303),  # a proxy that sets Host
        ({"allowed_hosts": ["example.org"]}, "127.0.0.1:8000", "https://example.com", 403),
    ],
)
def test_which_hosts_are_ours(panel: SmallPanel, options: dict[str, Any], host: str, origin: str, status: int) -> None:
    assert asyncio.run(_status(create_app(panel.store, **options), host, origin=origin)) == status


def raw(client: httpx.Client, request: bytes) -> bytes:
    """What the server answers to these very bytes, which no client library would send."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10) as connection:
        connection.sendall(request)
        return connection.recv(65536)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e%2fserver.py",
        "/static/judge.css%00",
        "/static/..\\server.py",
        "/static//etc/passwd",
        "/static/",
        "/static/./judge.css",
        "//static/judge.css",
        "/j/",
        "/j//start",
        "/docs",
        "/openapi.json",
        "/favicon.ico",
        "/admin/",
        "/admin/../healthz",
    ],
)
def test_no_path_leads_out(client: httpx.Client, panel: SmallPanel, writes_nothing: None, path: str) -> None:
    answer = raw(client, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]


def test_posting_routes_take_no_other_method(
    client: httpx.Client, panel: SmallPanel, begun: dict[str, str], writes_nothing: None
) -> None:
    token = panel.links[0]
    for verb in ("start", "survey", "vote", "undo"):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            answer = client.request(method, f"/j/{token}/{verb}?showing={begun[token]}&choice=left")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert f'href="/j/{token}"' in answer.text


def test_a_query_is_no_form(
    client: httpx.Client, panel: SmallPanel, begun: dict[str, str], writes_nothing: None
) -> None:
    token = panel.links[0]
    assert client.post(f"/j/{token}/vote?showing={begun[token]}&choice=left").status_code == 422


def test_bodies_that_are_too_long(
    client: httpx.Client, panel: SmallPanel, begun: dict[str, str], writes_nothing: None
) -> None:
    path = f"/j/{panel.links[0]}/vote"
    body = f"showing={begun[panel.links[0]]}&choice=left&x=".encode()
    form = {"content-type": "application/x-www-form-urlencoded"}

    def pieces(n: int) -> Iterator[bytes]:
        yield body
        for _ in range(n):
            yield b"x" * 1024

    assert client.post(path, content=body + b"x" * LONGEST_BODY_BYTES, headers=form).status_code == 413
    assert client.post(path, content=pieces(64), headers=form).status_code == 413
    declared = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n".encode() + body
    assert raw(client, declared).startswith(b"HTTP/1.1 413 ")
    assert client.get("/healthz").text == "ok"


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", '{"showing": "SHOWING", "choice": "left"}', 415),
        ("text/plain", "showing=SHOWING&choice=left", 415),
        ("multipart/form-data; boundary=b", "--b\r\nbroken", 415),
        ("application/x-www-form-urlencoded", "%%%=%zz&&&=\x00", 422),
        ("application/x-www-form-urlencoded", "showing=SHOWING&choice=left%00", 422),
        ("application/x-www-form-urlencoded", "showing[]=SHOWING&choice[$ne]=left", 422),
        ("application/x-www-form-urlencoded", "&" * 10000, 422),
        ("application/x-www-form-urlencoded; charset=utf-16", "\x00s\x00h", 422),
    ],
)
def test_bodies_that_are_no_form(
    client: httpx.Client,
    panel: SmallPanel,
    begun: dict[str, str],
    writes_nothing: None,
    kind: str,
    body: str,
    status: int,
) -> None:
    content = body.replace("SHOWING", begun[panel.links[0]]).encode()
    answer = client.post(f"/j/{panel.links[0]}/vote", content=content, headers={"content-type": kind})
    assert answer.status_code == status


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /j/x/vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /j/x/vote HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST /j/x/vote HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /j/x HTTP/1.1\r\n\r\n",
        b"GET /j/x HTTP/1.1\r\nHost: localhost\r\nHost: example.org\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_broken_requests(client: httpx.Client, panel: SmallPanel, writes_nothing: None, request_: bytes) -> None:
    assert raw(client, request_).startswith(b"HTTP/1.1 400 ")
    assert client.get("/healthz").text == "ok"


def test_sql_in_names_stays_data(panel: SmallPanel) -> None:
    name = "o'brien\"; DROP TABLE votes; -- <b>"
    with panel.database.write() as c:
        c.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        c.exec_driver_sql("UPDATE assignments SET judge_id = ? WHERE judge_id = 'judge-001'", (name,))
        c.execute(
            update(judges).where(judges.c.judge_id == "judge-001").values(judge_id=name, survey={"background": name})
        )
    with served(panel.store) as address, httpx.Client(base_url=address, follow_redirects=True) as client:
        path = f"/j/{panel.links[0]}"
        page = client.post(f"{path}/start")
        client.post(f"{path}/vote", data={"showing": showing(page), "choice": "left"})
        assert client.post(f"{path}/survey", data={"background": "'; DROP TABLE votes; --"}).status_code == 422
        overview = client.get("/admin", headers={"authorization": f"Bearer {panel.admin}"}).text
    assert "<b>" not in overview.split("<main")[1] and "o&#39;brien&#34;; DROP TABLE votes; -- &lt;b&gt;" in overview
    assert len(panel.contents()["votes"]) == 1


def test_after_the_lock_nothing_is_taken(panel: SmallPanel, client: httpx.Client, begun: dict[str, str]) -> None:
    panel.lock()
    before = panel.contents()
    token = panel.links[0]
    for verb, data in (
        ("vote", {"showing": begun[token], "choice": "left"}),
        ("undo", {"showing": panel.store.last_vote("judge-001") or ""}),
        ("start", {}),
        ("survey", {"background": "ml"}),
    ):
        answer = client.post(f"/j/{token}/{verb}", data=data)
        assert answer.status_code == 409 and "closed" in answer.text
    assert client.post(f"/join/{panel.join}").status_code == 409
    page = client.get(f"/j/{token}")
    assert page.status_code == 200 and "Your 1 vote is stored" in page.text
    assert panel.contents() == before


# ---------------------------------------------------------------- the administrator


def test_only_the_token_opens_the_administrators_pages(
    panel: SmallPanel, client: httpx.Client, writes_nothing: None
) -> None:
    for path in ("/admin", "/admin/votes.csv", "/admin/marginals.json"):
        for headers in (
            {},
            {"authorization": "Bearer x"},
            {"authorization": f"Basic {panel.admin}"},
            {"cookie": "judging_admin=x"},
            {"authorization": f"Bearer {panel.links[0]}"},
        ):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and "judge-001" not in answer.text
    assert client.post("/admin/sign-in", data={"token": "x"}).status_code == 401
    assert (
        client.post("/admin/sign-in", data={"token": "\udcff".encode("utf-8", "replace").decode()}).status_code == 401
    )


def test_signing_in_and_out(panel: SmallPanel, client: httpx.Client) -> None:
    answer = client.post("/admin/sign-in", data={"token": f" {panel.admin}\n"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/admin")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "path=/admin" in cookie and "secure" not in cookie
    assert client.get("/admin").status_code == 200
    assert client.post("/admin/sign-out").status_code == 303
    assert client.get("/admin").status_code == 401


def test_arms_stay_hidden_until_the_lock(panel: SmallPanel, client: httpx.Client, begun: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {panel.admin}"}
    page = client.get("/admin", headers=headers)
    assert page.status_code == 200 and "baseline" not in page.text and "votes.csv" not in page.text
    for name in ("votes.csv", "marginals.json"):
        refused = client.get(f"/admin/{name}", headers=headers)
        assert refused.status_code == 409 and "once the panel is locked" in refused.text
    panel.lock()
    page = client.get("/admin", headers=headers)
    assert "baseline" in page.text and "/admin/votes.csv" in page.text


# ---------------------------------------------------------------- numbers, worked by hand


def row(judge: str, item: str, choice: str, first_is_left: bool = True, **more: Any) -> SimpleNamespace:
    usual = {
        "kind": "human",
        "vendor": "",
        "prompt_id": 1,
        "category": "plain",
        "repeats": None,
        "expected": None,
        "seconds": None,
        "cast_at": 0.0,
        "assignment_id": 0,
    }
    return SimpleNamespace(**(usual | more), judge_id=judge, item_id=item, choice=choice, first_is_left=first_is_left)


def test_a_choice_without_its_sides() -> None:
    assert [numbers.verdict(c, True) for c in ("left", "right", "tie", "both_bad")] == ["first", "second", "tie", "tie"]
    assert [numbers.verdict(c, False) for c in ("left", "right")] == ["second", "first"]


def test_numbers_of_a_judge() -> None:
    rows = [
        row("a", "i", "left", assignment_id=1, seconds=4.0, cast_at=10.0),
        row("a", "j", "right", assignment_id=2, seconds=1.0, cast_at=20.0),
        row("a", "k", "left", assignment_id=3, seconds=9.0, cast_at=30.0),
        row("a", "l", "both_bad", assignment_id=4, cast_at=40.0),
        row("a", "i", "right", False, assignment_id=5, repeats=1, seconds=5.0, cast_at=50.0),  # the same text again
        row("a", "j", "right", False, assignment_id=6, repeats=2, cast_at=60.0),  # the other text
        row("a", "x", "left", assignment_id=7, expected="left", cast_at=70.0),
        row("a", "y", "tie", assignment_id=8, expected="right", cast_at=65.0),
        row("b", "i", "tie"),
    ]
    one, other, nobody = numbers.by_judge(rows, {"a": 12, "b": 1, "c": 3})
    assert one == numbers.JudgeNumbers(
        "a", Share(8, 12), ties=Share(0, 4), both_bad=Share(1, 4), left=Share(2, 3), median_seconds=4.5,
        last_vote_at=70.0, attention=Share(1, 2), repeats=Share(1, 2),
    )  # fmt: skip
    assert (other.ties, other.left.value, other.median_seconds) == (Share(1, 1), None, None)
    assert (nobody.votes, nobody.last_vote_at) == (Share(0, 3), None)
    assert numbers.left_share(rows) == Share(2, 3)
    assert Share(50, 100).chance_margin == pytest.approx(0.098, abs=1e-3)


def test_coverage_counts_first_votes_by_prompt_and_kind() -> None:
    rows = [
        row("a", "i", "tie"),
        row("b", "i", "tie"),
        row("a", "i", "tie", repeats=1),
        row("m", "i", "left", kind="model"),
    ]
    planned = {(2, "hard", "human"): 4, (1, "plain", "model"): 3, (1, "plain", "human"): 5}
    assert numbers.coverage(rows, planned) == [
        numbers.PromptNumbers(1, "plain", {"human": Share(2, 5), "model": Share(1, 3)}),
        numbers.PromptNumbers(2, "hard", {"human": Share(0, 4)}),
    ]


def test_agreement_is_over_pairs_of_judges_of_an_item() -> None:
    rows = [
        row("a", "i", "left"),
        row("b", "i", "right", False),  # first, as a
        row("c", "i", "left", False),  # second
        row("a", "j", "tie"),
        row("b", "j", "both_bad"),
        row("m", "j", "tie", kind="model"),
        row("m", "i", "left", kind="model"),
        row("a", "i", "right", repeats=1),  # not a first vote
        row("a", "k", "left"),  # alone
    ]
    assert numbers.agreement(rows) == {"human": Share(2, 4), "model": Share(0, 0), "human and model": Share(4, 5)}


def test_results_by_arm() -> None:
    truth = {
        "i": SimpleNamespace(seed=2, arm_first="both", arm_second="baseline"),
        "j": SimpleNamespace(seed=1, arm_first="baseline", arm_second="both"),
    }
    rows = [
        row("a", "i", "left"),  # both
        row("b", "i", "left", False),  # baseline
        row("a", "j", "right"),  # both
        row("b", "j", "both_bad"),
        row("b", "j", "left", repeats=1),
        row("a", "attention", "left", expected="left"),
    ]
    assert numbers.results(rows, truth) == [
        numbers.Tally("human", "baseline", "both", None, 1, 2, 1),
        numbers.Tally("human", "baseline", "both", 1, 0, 1, 1),
        numbers.Tally("human", "baseline", "both", 2, 1, 1, 0),
    ]
    assert numbers.results(rows, {}) == []


def test_the_survey_is_counted() -> None:
    surveys = [None, {}, {"background": "ml"}, {"background": "ml", "native_english": "no"}]
    assert numbers.survey_counts(surveys) == (2, {"background": {"ml": 2}, "native_english": {"no": 1}})


# ---------------------------------------------------------------- the server

SERVE = """
import sys
from replication.judging.database import Database
from replication.judging.server import serve
from replication.judging.store import Store
say = lambda line: print(line, flush=True)
serve(Store(Database(sys.argv[1])), "127.0.0.1", 0, say, ready=say)
print("stopped", flush=True)
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_told_to_stop_and_logs_no_link(panel: SmallPanel, stop: signal.Signals) -> None:
    database = str(panel.sealed.parent / "judging.sqlite")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, database], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        for path in (f"/j/{panel.links[0]}", f"/j/{panel.links[0]}/nowhere?{panel.links[1]}"):
            httpx.get(address + path, headers={"host": "127.0.0.1"})
        httpx.post(f"{address}/admin/sign-in", data={"token": panel.admin})
        process.send_signal(stop)
        output = process.communicate(timeout=20)[0]
    finally:
        process.kill()
    lines = [re.sub(r"\d+ ms", "N ms", line) for line in output.splitlines()]
    assert lines == [
        "GET /j/{token} 200 N ms",
        "GET (no such page) 404 N ms",
        "POST /admin/sign-in 303 N ms",
        "stopped",
    ]
    assert process.returncode == 0


def test_a_port_that_is_taken_is_said_in_one_line(panel: SmallPanel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match=r"--port: cannot listen on 127\.0\.0\.1:\d+ \(.*in use"):
            serve(panel.store, "127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(UserError, match="cannot listen on no.such.name:1"):
        serve(panel.store, "no.such.name", 1, None)
