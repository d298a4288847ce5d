"""A panel's study: kept with it, shown to people, and asked of models."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient
from judging_setup import MadePanel, make_panel

from replication.config.study import Study, load_study
from replication.judging.models.prompt import comparison_prompt, prompt_version
from replication.judging.page.server import create_app
from replication.judging.panel import ATTENTION_QUESTION, preview
from replication.judging.schema import items
from replication.judging.store import Store


def a_study(folder: Path, text: str) -> Study:
    (folder / "study.yaml").write_text(text)
    return load_study(folder / "study.yaml")


def browser(panel: MadePanel) -> TestClient:
    return TestClient(create_app(panel.store), base_url="http://127.0.0.1")


def test_models_are_asked_in_the_words_of_before_there_were_studies() -> None:
    assert prompt_version(load_study()) == "fa75ea958f68c7f8"


def test_a_panel_keeps_its_study_and_page_models_and_preview_go_by_it(tmp_path: Path) -> None:
    own = a_study(
        tmp_path,
        "task: Both are <recipes>.\nbetter: better recipe\nlabels: {left: L wins, tie: Even}\n"
        "survey: [{name: cooks, question: Do you cook?, answers: {'yes': Daily, 'no': Never}}]",
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
    assert ">L wins <" in item and ">Even <" in item and ">Right is better <" in item
    visit = panel.store.visit(path.removeprefix("/j/"))
    assert visit is not None and visit.survey == {"cooks": "yes"}
    web.headers["authorization"] = f"Bearer {panel.admin}"
    assert "<dt>Do you cook?</dt><dd>Daily: 1</dd>" in web.get("/admin").text
    questions = {row.question for row in panel.rows(items) if row.prompt_id is None}
    assert questions == {ATTENTION_QUESTION.format(choice=choice) for choice in ("L wins", "Right is better")}
    assert "Both are <recipes>." in comparison_prompt(own, "Why?", "one", "two")
