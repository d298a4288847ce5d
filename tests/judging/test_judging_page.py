"""The judging page over HTTP: a session, what a visitor may see, the administrator, the server."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from judging_setup import last_vote
from small_panel import SUITE, SmallPanel, begin, served, small_panel
from sqlalchemy import update

from replication.config.study import load_study
from replication.errors import UserError
from replication.judging.page.server import LONGEST_BODY_BYTES, create_app, serve
from replication.judging.schema import items, judges

IMPRESSION = re.compile(r'/vote"[^>]*>\s*<input type="hidden" name="impression" value="([^"]+)"')
UNDOABLE = re.compile(r'/undo"[^>]*>\s*<input type="hidden" name="impression" value="([^"]+)"')


@pytest.fixture
def panel(tmp_path: Path) -> SmallPanel:
    return small_panel(tmp_path)


@pytest.fixture
def client(panel: SmallPanel) -> Iterator[httpx.Client]:
    """Speaks to a real server; follows no redirect."""
    with served(panel.store) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture
def begun(panel: SmallPanel) -> dict[str, str]:
    """Both judges have started and one vote each; token -> what is shown to them now."""
    return begin(panel)


def impression(page: httpx.Response) -> str:
    match = IMPRESSION.search(page.text)
    assert match, page.text
    return match.group(1)


# ---------------------------------------------------------------- a session


def test_a_session_from_the_link_to_the_end(tmp_path: Path) -> None:
    panel = small_panel(tmp_path, survey=True)
    with served(panel.store) as address, httpx.Client(base_url=address, follow_redirects=True) as client:
        path = f"/j/{panel.links[0]}"
        kept = f'value="{address}{path}" readonly'
        page = client.get(path)
        assert "Start</button>" in page.text and kept in page.text
        assert "About you" in client.post(f"{path}/start").text
        page = client.post(f"{path}/survey", data={"background": "technical", "native_english": "yes"})
        for n in range(1, 7):
            assert f"Pair {n} of 6" in page.text and "How to judge" in page.text
            page = client.post(f"{path}/vote", data={"impression": impression(page), "choice": "left"})
        assert "Thank you" in page.text and kept in page.text and client.get(path).text == page.text
        undoable = UNDOABLE.search(page.text)
        assert undoable
        page = client.post(f"{path}/undo", data={"impression": undoable.group(1)})
        assert "Pair 6 of 6" in page.text
    visit = panel.store.visit(panel.links[0])
    assert visit is not None and visit.n_voted == 5
    assert visit.survey == {"background": "technical", "native_english": "yes"}


def test_posts_answer_with_see_other(panel: SmallPanel, client: httpx.Client) -> None:
    path = f"/j/{panel.links[0]}"
    assert (answer := client.post(f"{path}/start")).status_code == 303 and answer.headers["location"] == path
    shown = impression(client.get(path))
    for verb in ("vote", "undo"):
        answer = client.post(f"{path}/{verb}", data={"impression": shown, "choice": "tie"})
        assert (answer.status_code, answer.headers["location"]) == (303, path)


def test_a_look_starts_nothing_and_votes_nothing(panel: SmallPanel, client: httpx.Client) -> None:
    """A link that is previewed by a messenger, or opened by a scanner of mail."""
    before = panel.contents()
    for path in ("/", f"/j/{panel.links[0]}", f"/join/{panel.join}", "/admin", "/healthz"):
        client.get(path)
        client.head(path)
        client.options(path)
    assert panel.contents() == before


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
    assert visit is not None and visit.survey == kept


def test_the_open_link_gives_each_visitor_a_set(panel: SmallPanel, client: httpx.Client) -> None:
    paths = []
    for _ in range(2):
        form = nonce_of(client.get(f"/join/{panel.join}"))
        answer = client.post(f"/join/{panel.join}", data=form)
        assert answer.status_code == 303
        paths.append(answer.headers["location"])
        client.cookies.clear()  # another visitor
    assert len(set(paths)) == 2 and all(client.get(path).status_code == 200 for path in paths)
    before = panel.contents()
    full = client.post(f"/join/{panel.join}", data=nonce_of(client.get(f"/join/{panel.join}")))
    assert full.status_code == 409 and "All places are taken" in full.text
    assert "Go on" not in full.text
    assert client.post(f"/join/{panel.join}").status_code == 422, "a form of ours has its number"
    assert panel.contents() == before


def nonce_of(page: httpx.Response) -> dict[str, str]:
    match = re.search(r'name="nonce" value="([\w-]+)"', page.text)
    assert match, page.text
    return {"nonce": match.group(1)}


def test_the_open_link_gives_one_browser_one_set(panel: SmallPanel, client: httpx.Client) -> None:
    """A second press, the way back and a press again, a visit on another day: one place, not several judges."""
    link = f"/join/{panel.join}"
    first = client.get(link)
    assert "One set of pairs is for one person" in first.text
    answer = client.post(link, data=nonce_of(first))
    own = answer.headers["location"]
    cookie = answer.headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=lax", "Path=/join", "Max-Age="))
    before = panel.contents()
    again = client.get(link)
    assert (again.status_code, again.headers["location"]) == (303, own)
    for form in (nonce_of(first), {"nonce": "x" * 32}):
        assert client.post(link, data=form).headers["location"] == own
    client.cookies.clear()  # a browser that keeps none sends its form again: the answer was lost
    assert client.post(link, data=nonce_of(first)).headers["location"] == own
    assert panel.contents() == before
    client.cookies.set(cookie.split("=")[0], "of-another-panel", path="/join")
    assert client.get(link).status_code == 200
    client.cookies.clear()
    other = client.post(link, data=nonce_of(client.get(link))).headers["location"]
    assert other != own


def test_after_the_lock_the_open_link_still_leads_home(panel: SmallPanel, client: httpx.Client) -> None:
    link = f"/join/{panel.join}"
    own = client.post(link, data=nonce_of(client.get(link))).headers["location"]
    panel.lock()
    assert client.get(link).headers["location"] == own
    assert client.get(own).status_code == 200


def test_an_undo_works_once_and_for_the_last_vote(
    panel: SmallPanel, client: httpx.Client, begun: dict[str, str]
) -> None:
    mine = panel.links[0]
    last = last_vote(panel.store, "judge-001")
    for impression_ in ("A" * 22, begun[mine], last_vote(panel.store, "judge-002")):
        assert client.post(f"/j/{mine}/undo", data={"impression": impression_}).status_code == 409
    assert client.post(f"/j/{mine}/undo", data={"impression": last}).status_code == 303
    before = panel.contents()
    assert client.post(f"/j/{mine}/undo", data={"impression": last}).status_code == 409
    assert client.post(f"/j/{mine}/vote", data={"impression": last, "choice": "left"}).status_code == 409
    assert panel.contents() == before


def test_after_the_lock_nothing_is_taken(panel: SmallPanel, client: httpx.Client, begun: dict[str, str]) -> None:
    panel.lock()
    before = panel.contents()
    token = panel.links[0]
    for verb, data in (
        ("vote", {"impression": begun[token], "choice": "left"}),
        ("undo", {"impression": last_vote(panel.store, "judge-001") or ""}),
        ("start", {}),
        ("survey", {"background": "ml"}),
    ):
        answer = client.post(f"/j/{token}/{verb}", data=data)
        assert answer.status_code == 409 and "closed" in answer.text
    assert client.post(f"/join/{panel.join}", data={"nonce": "x" * 32}).status_code == 409
    page = client.get(f"/j/{token}")
    assert page.status_code == 200 and "Your 1 vote is stored" in page.text
    assert panel.contents() == before


def test_sql_in_names_stays_data(panel: SmallPanel) -> None:
    name = "o'brien\"; DROP TABLE judging_votes; -- <b>"
    with panel.database.write() as c:
        c.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        c.exec_driver_sql("UPDATE judging_assignments SET judge_id = ? WHERE judge_id = 'judge-001'", (name,))
        c.execute(
            update(judges).where(judges.c.judge_id == "judge-001").values(judge_id=name, survey={"background": name})
        )
    with served(panel.store) as address, httpx.Client(base_url=address, follow_redirects=True) as client:
        path = f"/j/{panel.links[0]}"
        page = client.post(f"{path}/start")
        client.post(f"{path}/vote", data={"impression": impression(page), "choice": "left"})
        assert client.post(f"{path}/survey", data={"background": "'; DROP TABLE judging_votes; --"}).status_code == 422
        overview = client.get("/admin", headers={"authorization": f"Bearer {panel.admin}"}, timeout=60).text
    assert "<b>" not in overview.split("<main")[1]
    assert "o&#39;brien&#34;; DROP TABLE judging_votes; -- &lt;b&gt;" in overview
    assert len(panel.contents()["judging_votes"]) == 1


# ---------------------------------------------------------------- what answers carry


def test_pages_and_headers_name_nothing_but_the_impression(tmp_path: Path) -> None:
    panel = small_panel(tmp_path, attention=1, repeat_share=0.5, text=lambda *_: "the same words")
    contents = panel.contents()
    secret = {str(row.item_id) for row in contents["judging_items"]} | {"judge-001", "baseline", SUITE, "seed", "plain"}
    pages = []
    with served(panel.store) as address, httpx.Client(base_url=address) as client:
        path = f"/j/{panel.links[0]}"
        client.post(f"{path}/start")
        for _ in range(10):
            answer = client.get(path)
            shown = impression(answer)
            raw = answer.text + str(answer.headers)
            assert not [word for word in secret if word in raw]
            # what is left when prompt, number and what is random are taken out is the same on every page
            plain = re.sub(r'(?s)<section class="prompt".*?</section>', "", answer.text).replace(shown, "")
            plain = plain.replace("(no text)", "the same words")
            plain = re.sub(r'(?s)<form[^>]*/undo".*?</form>\s*|Pair \d+|value="\d+"', "", plain)
            plain = re.sub(r"\s+", " ", plain)
            pages.append((plain, {k: v for k, v in answer.headers.items() if k not in ("date", "content-length")}))
            client.post(f"{path}/vote", data={"impression": shown, "choice": "left"})
    assert all(page == pages[0] for page in pages)


HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
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
        client.post(f"{path}/vote", data={"impression": "x", "choice": "tie"}),
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
    ways = {a.status_code: '<a class="button"' in a.text for a in answers if a.status_code >= 400}
    assert {status for status, leads_on in ways.items() if not leads_on} == {400, 401, 404}  # 401 is a form


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


# ---------------------------------------------------------------- who is let in


def test_our_own_pages_can_post(panel: SmallPanel, client: httpx.Client) -> None:
    origin = str(client.base_url).rstrip("/")
    for headers in (
        {"origin": origin},
        {"origin": origin, "sec-fetch-site": "same-origin"},
        {"origin": "null", "sec-fetch-site": "same-origin"},
    ):
        assert client.post(f"/j/{panel.links[0]}/start", headers=headers).status_code == 303


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
    votes = client.get("/admin/votes.csv", headers=headers)
    assert votes.headers["content-disposition"] == 'attachment; filename="votes.csv"'
    assert len(votes.text.splitlines()) == 3 and ",baseline," in votes.text  # a header and two votes
    assert client.get("/admin/marginals.json", headers=headers).json()


def overview_of(panel: SmallPanel) -> str:
    with served(panel.store) as address:
        return httpx.get(f"{address}/admin", headers={"authorization": f"Bearer {panel.admin}"}).text


def test_the_administrator_reads_words_and_every_prompt(tmp_path: Path) -> None:
    panel = small_panel(tmp_path, n_prompts=8, votes=1, survey=True)  # four sets of one pair
    with panel.database.write() as c:
        c.execute(update(items).values(category="structured_output"))
    panel.store.answer_survey("judge-001", {"chat_models": "sometimes", "background": "ml"})
    text = overview_of(panel)
    assert "planned: 4 judges, people and models together" in text
    assert "How often do you use chat models" in text and "Now and then: 1" in text and "chat_models" not in text
    assert text.count("<td>structured output</td>") == 8 and text.count("in no set") == 4


@pytest.mark.parametrize(
    ("text", "n_criteria", "n_minutes"), [("word " * 500, 1, 26), ("千字文" * 100, 1, 16), ("", 1, 1), ("", 9, 5)]
)
def test_the_start_says_how_long_the_set_takes(tmp_path: Path, text: str, n_criteria: int, n_minutes: int) -> None:
    study = replace(load_study(), criteria={f"c{n}": "Which?" for n in range(n_criteria)})
    panel = small_panel(tmp_path, text=lambda *_: text, study=study)  # six pairs; a prompt has four words
    with served(panel.store) as address:
        page = httpx.get(f"{address}/j/{panel.links[0]}").text
    assert f"You have 6 pairs to judge: about {n_minutes} minute{'s' * (n_minutes > 1)}." in page


@pytest.mark.parametrize(("n_left", "is_outside"), [(6, False), (12, True), (0, True)])
def test_a_share_of_left_that_chance_hardly_gives_is_marked(tmp_path: Path, n_left: int, is_outside: bool) -> None:
    panel = small_panel(tmp_path)
    for n in range(12):
        name = ("judge-001", "judge-002")[n % 2]
        shown = panel.store.show(name)
        assert shown is not None
        panel.store.vote(name, shown.impression, "left" if n < n_left else "right")
    text = overview_of(panel)
    plain = " ".join(re.sub("<[^>]+>", "", text).split())
    assert "between 25.0 and 75.0 % in 95 of 100 panels by chance" in plain
    assert ("Outside of that range" in plain) == is_outside


# ---------------------------------------------------------------- the server


SERVE = """
import sys
from replication.judging.database import Database
from replication.judging.page.server import serve
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
        output = process.communicate(timeout=120)[0]
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
    in_use = pytest.raises(UserError, match=r"--port: cannot listen on 127\.0\.0\.1:\d+ \([^()]*in use\)")
    with socket.create_server(("127.0.0.1", 0)) as taken, in_use:
        serve(panel.store, "127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(UserError, match=r"cannot listen on no\.such\.name:1"):
        serve(panel.store, "no.such.name", 1, None)
