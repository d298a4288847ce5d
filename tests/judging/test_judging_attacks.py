"""What an attacker sends to the judging page: each is refused, and the tables hold the same afterwards."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from judging_setup import last_vote
from small_panel import SmallPanel, begin, served, small_panel
from sqlalchemy import event

from replication.judging.page.server import LONGEST_BODY_BYTES


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> SmallPanel:
    """One for all tests: none of them changes it."""
    return small_panel(tmp_path_factory.mktemp("panel"))


@pytest.fixture(scope="module")
def begun(panel: SmallPanel) -> dict[str, str]:
    """Both judges have started and one vote each; token -> what is shown to them now."""
    return begin(panel)


@pytest.fixture(scope="module")
def client(panel: SmallPanel, begun: dict[str, str]) -> Iterator[httpx.Client]:
    """Speaks to a real server; follows no redirect."""
    with served(panel.store) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture(autouse=True)
def writes_nothing(panel: SmallPanel) -> Iterator[None]:
    """The tables hold the same before and after the test."""
    before = panel.contents()
    yield
    assert panel.contents() == before


def test_a_guessed_link_and_a_broken_one_get_the_same_page(panel: SmallPanel, client: httpx.Client) -> None:
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
        client.post(f"/j/{guesses[0]}/{verb}", data={"impression": "x", "choice": "tie"})
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
        ("not an impression", 422),
        ("no impression", 422),
        ("unknown choice", 422),
        ("no choice", 422),
    ],
)
def test_a_vote_must_be_on_what_is_shown(
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str], what: str, status: int
) -> None:
    mine, other = panel.links
    data = {
        "never shown": {"impression": "A" * 22, "choice": "left"},
        "of another judge": {"impression": begun[other], "choice": "left"},
        "voted on before": {"impression": last_vote(panel.store, "judge-001"), "choice": "left"},
        "not an impression": {"impression": "'; DROP TABLE judging_votes; --", "choice": "left"},
        "no impression": {"choice": "left"},
        "unknown choice": {"impression": begun[mine], "choice": "first"},
        "no choice": {"impression": begun[mine]},
    }[what]
    answer = client.post(f"/j/{mine}/vote", data=data)
    assert answer.status_code == status and f'href="/j/{mine}"' in answer.text


@pytest.mark.parametrize("choice", ["tie", "left"])
def test_a_replayed_vote_is_told_so_and_led_on(
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str], choice: str
) -> None:
    path = f"/j/{panel.links[0]}"
    answer = client.post(f"{path}/vote", data={"impression": last_vote(panel.store, "judge-001"), "choice": choice})
    assert answer.status_code == 409
    assert ("stored already" if choice == "tie" else "vote on this pair already") in answer.text
    assert f'http-equiv="refresh" content="4; url={path}"' in answer.text and f'href="{path}"' in answer.text


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
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str], headers: dict[str, str]
) -> None:
    token = panel.links[0]
    data = {"impression": begun[token], "choice": "left", "token": panel.admin}
    for path in (f"/j/{token}/vote", f"/j/{token}/undo", f"/j/{token}/start", f"/join/{panel.join}", "/admin/sign-in"):
        assert client.post(path, data=data, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "host", ["example.org", "127.0.0.1.example.org", "10.0.0.7", "localhost@example.org", "", "[::1", "judging"]
)
def test_a_foreign_host_is_refused(panel: SmallPanel, client: httpx.Client, host: str) -> None:
    """Another site's name may be made to lead here."""
    assert client.get(f"/j/{panel.links[0]}", headers={"host": host}).status_code == 400
    assert client.post(f"/j/{panel.links[0]}/start", headers={"host": host}).status_code == 400


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
def test_no_path_leads_out(client: httpx.Client, panel: SmallPanel, path: str) -> None:
    answer = raw(client, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]


def test_posting_routes_take_no_other_method(client: httpx.Client, panel: SmallPanel, begun: dict[str, str]) -> None:
    token = panel.links[0]
    for verb in ("start", "survey", "vote", "undo"):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            answer = client.request(method, f"/j/{token}/{verb}?impression={begun[token]}&choice=left")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert f'href="/j/{token}"' in answer.text


def test_a_query_is_no_form(client: httpx.Client, panel: SmallPanel, begun: dict[str, str]) -> None:
    token = panel.links[0]
    assert client.post(f"/j/{token}/vote?impression={begun[token]}&choice=left").status_code == 422


def test_bodies_that_are_too_long(client: httpx.Client, panel: SmallPanel, begun: dict[str, str]) -> None:
    path = f"/j/{panel.links[0]}/vote"
    body = f"impression={begun[panel.links[0]]}&choice=left&x=".encode()
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
        ("application/json", '{"impression": "IMPRESSION", "choice": "left"}', 415),
        ("text/plain", "impression=IMPRESSION&choice=left", 415),
        ("multipart/form-data; boundary=b", "--b\r\nbroken", 415),
        ("application/x-www-form-urlencoded", "%%%=%zz&&&=\x00", 422),
        ("application/x-www-form-urlencoded", "impression=IMPRESSION&choice=left%00", 422),
        ("application/x-www-form-urlencoded", "impression[]=IMPRESSION&choice[$ne]=left", 422),
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
    content = body.replace("IMPRESSION", begun[panel.links[0]]).encode()
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
def test_broken_requests(client: httpx.Client, panel: SmallPanel, request_: bytes) -> None:
    assert raw(client, request_).startswith(b"HTTP/1.1 400 ")
    assert client.get("/healthz").text == "ok"


def test_only_the_token_opens_the_administrators_pages(panel: SmallPanel, client: httpx.Client) -> None:
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
