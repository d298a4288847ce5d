"""A panel's study: kept with it, shown to people, and asked of models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from judging_setup import MadePanel, make_panel, vote_all

from replication.config.study import Study, load_study
from replication.errors import UserError
from replication.judging.models.prompt import comparison_prompt, parse_reply, prompt_version
from replication.judging.models.sheets import read_sheet, write_sheet
from replication.judging.page.server import create_app
from replication.judging.panel import ATTENTION_QUESTION, add_judges, preview
from replication.judging.progress import Part, judge_progress
from replication.judging.record import unsealed_votes
from replication.judging.schema import items, remarks
from replication.judging.store import Store
from replication.votes.record import parse_votes, votes_text


def a_study(folder: Path, text: str) -> Study:
    (folder / "study.yaml").write_text(text)
    return load_study(folder / "study.yaml")


def browser(panel: MadePanel) -> TestClient:
    return TestClient(create_app(panel.store), base_url="http://127.0.0.1")


def test_models_are_asked_in_the_words_of_before_there_were_studies() -> None:
    assert prompt_version(load_study()) == "fa75ea958f68c7f8"


BOTH_NAMES = "Right is better” or “Second is better"  # side by side, and one below the other


def test_a_panel_keeps_its_study_and_page_models_and_preview_go_by_it(tmp_path: Path) -> None:
    own = a_study(
        tmp_path,
        "task: Both are <recipes>.\nbetter: better recipe\nlabels: {left: L wins, tie: Even}\n"
        "survey: {cooks: {question: Do you cook?, answers: {'yes': Daily, 'no': Never}}}",
    )
    panel = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", study=own, attention=6)
    (tmp_path / "study.yaml").unlink()
    assert Store(panel.database).study == own and preview(panel.database, tmp_path / "copy.sqlite")[0].study == own
    path, web = f"/j/{panel.link()}", browser(panel)
    start = web.get(path).text
    assert "Which text is the better recipe?" in start and "Both are &lt;recipes&gt;." in start
    assert "early stage of training" not in start
    assert "Do you cook?" in web.post(f"{path}/start").text
    assert web.post(f"{path}/survey", data={"cooks": "often"}).status_code == 422
    item = web.post(f"{path}/survey", data={"cooks": "yes", "other": "x"}).text
    assert all(f">{label}</span>" in item for label in ("L wins", "Even", "Right is better", "Second is better"))
    visit = panel.store.visit(path.removeprefix("/j/"))
    assert visit is not None and visit.survey == {"cooks": "yes"}
    web.headers["authorization"] = f"Bearer {panel.admin}"
    assert "<dt>Do you cook?</dt><dd>Daily: 1</dd>" in web.get("/admin").text
    questions = {row.question for row in panel.rows(items) if row.prompt_id is None}
    assert questions == {ATTENTION_QUESTION.format(choice=choice) for choice in ("L wins", BOTH_NAMES)}
    assert "Both are <recipes>." in comparison_prompt(own, "Why?", "one", "two")


CHECK = r"""
consent: {text: "One.\n\nTwo <b>.", contact: me@example.org, withdrawal: Write to me.}
check:
  When is it a tie?: [when both are as good, always]
  Who is right?: [nobody, I am]
"""


def test_consent_comes_first_and_who_fails_the_check_twice_sees_no_pair(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", study=a_study(tmp_path, CHECK), survey=False)
    failed, passed = (f"/j/{panel.link(name)}" for name in ("judge-001", "judge-002"))
    web = browser(panel)
    start = web.get(failed).text
    assert "<p>One.</p>" in start and "<p>Two &lt;b&gt;.</p>" in start and "Contact: me@example.org" in start
    assert web.post(f"{failed}/start").status_code == 422 and "Consent" in web.get(failed).text
    right, wrong = {"q0": "when both are as good", "q1": "nobody"}, {"q0": "always", "q1": "nobody"}
    for path in (failed, passed):
        assert "Who is right?" in web.post(f"{path}/start", data={"consent": "yes"}).text
        again = web.post(f"{path}/check", data=wrong | {"attempt": 0}).text
        assert "this is the last try" in again
        assert "this is the last try" in web.post(f"{path}/check", data=wrong | {"attempt": 0}).text, "sent twice"
    assert "no pairs are shown" in web.post(f"{failed}/check", data={"attempt": 1}).text
    assert "no pairs are shown" in web.post(f"{failed}/check", data=right | {"attempt": 2}).text
    assert "Pair 1 of" in web.post(f"{passed}/check", data=right | {"attempt": 1}).text
    assert panel.store.tries("judge-001") == [False, False] and panel.store.tries("judge-002") == [False, True]


MORE = """
criteria: {overall: Which?, coherence: Which holds together?}
strength: [slightly, clearly]
ask_reason: true
gold: [{question: Name a fruit., better: Left out in the sun., worse: the the the}]
"""


def test_what_is_asked_beside_the_vote_is_kept_with_it_and_in_the_record(tmp_path: Path) -> None:
    own = a_study(tmp_path, MORE)
    panel = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", study=own, survey=False, attention=1)
    path, web = f"/j/{panel.link()}", browser(panel)
    page, expected = web.post(f"{path}/start").text, []
    more = {"coherence": "right", "strength": "clearly", "reason": " it  rhymes\n", "other": "x"}
    while "/vote" in page:
        shown = re.findall(r'name="impression" value="([^"]+)"', page)[-1]
        is_attention = "please choose" in page
        assert ("Which holds together?" in page) is not is_attention
        said = {} if is_attention else more
        vote = said | {"impression": shown, "choice": "left"}
        assert web.post(f"{path}/vote", data=vote | {"coherence": "up"}).status_code == 422
        page = web.post(f"{path}/vote", data=vote).text
        kept = {"coherence": "right", "strength": "clearly", "reason": "it  rhymes"}
        expected += [] if is_attention else [(shown, kept)]
    assert sorted((row.about, row.said) for row in panel.rows(remarks)) == sorted(expected)
    assert len(expected) == 6 + 1 + 1, "first votes, a repeat, the gold pair"
    panel.lock()
    votes = unsealed_votes(panel.database).votes
    assert {(v.said["coherence"], v.strength, v.reason) for v in votes} == {("right", "clearly", "it  rhymes")}
    text = votes_text(votes)
    assert text.splitlines()[0].endswith("repeat_of,criteria,strength,reason")
    assert parse_votes(text, "votes") == list(votes)
    with pytest.raises(UserError, match="line 2: criteria is 'coherence:up'"):
        parse_votes(text.replace("coherence:right", "coherence:up"), "votes")


def test_gold_pairs_are_in_every_set_models_too_and_counted_apart(tmp_path: Path) -> None:
    panel = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", study=a_study(tmp_path, MORE), attention=2)
    add_judges(panel.database, panel.sealed, ["m"], "model", "maker")
    for name in panel.names:
        vote_all(panel.store, name, lambda shown: "left" if "Left" in shown.question + shown.left else "right")
    found = {judge.judge_id: (judge.gold, judge.attention) for judge in judge_progress(panel.database)}
    assert found == {
        "judge-001": (Part(1, 1), Part(2, 2)), "judge-002": (Part(1, 1), Part(2, 2)), "m": (Part(1, 1), Part(0, 0))
    }  # fmt: skip
    with pytest.raises(UserError, match="--attention: 7 is more than the 6 other places"):
        make_panel(tmp_path / "2.sqlite", tmp_path / "2", study=a_study(tmp_path, MORE), attention=7)


def test_several_criteria_are_read_strictly_and_each_is_a_vote_of_both_orders(tmp_path: Path) -> None:
    own = a_study(tmp_path, MORE)
    assert "1. Which?\n2. Which holds together?" in comparison_prompt(own, "Why?", "one", "two")
    for reply, read in {"A tie": ("left", ("tie",)), "**b**, NEITHER.": ("right", ("both_bad",))}.items():
        found = parse_reply(reply, n=2)
        assert (found.status, found.choice, found.further) == ("choice", *read)
    assert {parse_reply(reply, n=2).status for reply in ("A", "A A A", "A or B", "Answer: A")} == {"garbage"}
    panel = make_panel(tmp_path / "panel.sqlite", tmp_path / "sealed", study=own, survey=False)
    add_judges(panel.database, panel.sealed, ["m"], "model", "maker")
    sheet, filled = tmp_path / "sheet.md", tmp_path / "filled.txt"
    assert write_sheet(panel.database, "m", sheet) == 2
    assert "`NUMBER: WORD WORD`, a word for each of these questions" in sheet.read_text()
    filled.write_text("\n".join([f"{n}: A A" for n in range(1, 8)] + [f"{n}: B TIE" for n in range(8, 15)]))
    counts = read_sheet(panel.database, "m", filled).counts
    assert (counts.n_pairs, counts.n_votes, counts.n_a, counts.n_b, len(counts.gold)) == (7, 7, 7, 7, 1)
    assert read_sheet(panel.database, "m", filled).n_stored == 0
    assert [row.said for row in panel.rows(remarks)] == [{"coherence": "tie"}] * 7
    panel.lock()
    votes = unsealed_votes(panel.database).votes
    assert {(vote.choice, vote.criteria) for vote in votes} == {("left", "coherence:tie")}
