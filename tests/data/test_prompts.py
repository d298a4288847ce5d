"""Our prompts and the loader of prompt files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from paths import PUBLISHED

from replication.data.prompts import Prompt, load_prompts
from replication.errors import UserError

QUESTIONS = PUBLISHED / "eval_questions_1.2B.json"
COUNTS = {
    "factual": 6,
    "reasoning": 6,
    "creative": 5,
    "conversational": 5,
    "structured_output": 5,
    "instruction_following": 3,
    "world_knowledge": 2,
}
GOOD = {"id": 1, "category": "factual", "question": "Where?"}


@pytest.fixture
def published() -> list[Prompt]:
    if not QUESTIONS.is_file():
        pytest.skip("the published prompt file is not beside this checkout (../shared/published)")
    return load_prompts(QUESTIONS)


def test_our_prompts_have_the_papers_categories_and_counts() -> None:
    prompts = load_prompts("prompts/replication_32.json")
    assert Counter(p.category for p in prompts) == COUNTS
    assert [p.id for p in prompts] == list(range(1, 33))


def test_the_published_file_loads(published: list[Prompt]) -> None:
    assert len(published) == 32
    assert Counter(p.category for p in published) == COUNTS


def test_no_question_is_the_authors(published: list[Prompt]) -> None:
    ours = {_plain(p.question) for p in load_prompts("replication_32")}
    assert len(ours) == 32
    assert not ours & {_plain(p.question) for p in published}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize(
    "name",
    [
        "replication_32",
        "replication_32.json",
        "prompts/replication_32.json",
        "configs/prompts/replication_32.json",
    ],
)
def test_a_shipped_file_is_found_by_each_of_its_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load_prompts(name)) == 32


def test_json_lines_and_unknown_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    other = {"id": 2, "category": "factual", "question": "Which\u2028line?"}
    lines = [json.dumps({**GOOD, "source": "me"}), "", json.dumps(other, ensure_ascii=False), ""]
    path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    assert load_prompts(path) == [Prompt(1, "factual", "Where?"), Prompt(2, "factual", "Which\u2028line?")]


def test_a_missing_file_lists_what_is_shipped() -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such prompt file.*replication_32\.json"):
        load_prompts("nowhere.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not valid JSON"),
        ("{}", "must be a list of prompts, not dict"),
        ("[]", "holds no prompts"),
        ([GOOD, "hello"], "entry 2 must be an object"),
        ([GOOD, {"id": 2, "category": "factual"}], "entry 2 lacks the key 'question'"),
        ([GOOD, {"id": 2, "question": "Who?"}], "entry 2 lacks the key 'category'"),
        ([{"category": "factual", "question": "Who?"}], "entry 1 lacks the key 'id'"),
        ([{**GOOD, "id": "one"}], "entry 1: key 'id' must be a whole number, not 'one'"),
        ([{**GOOD, "id": True}], "entry 1: key 'id' must be a whole number, not True"),
        ([GOOD, {**GOOD, "question": "Who?"}], "entry 2 has id 1, as entry 1 does"),
        ([{**GOOD, "question": "  "}], "entry 1: key 'question' is empty"),
        ([{**GOOD, "category": ""}], "entry 1: key 'category' is empty"),
        ([{**GOOD, "question": "Half a \ud83d?"}], "entry 1: key 'question' holds half a character"),
        ([{**GOOD, "category": "a\0"}], "entry 1: key 'category' holds a NUL character"),
        ([{**GOOD, "id": 2**63}], "entry 1: key 'id' must be a whole number of 64 bits, not 9223372036854775808"),
        ([{**GOOD, "id": 10**30}], "key 'id' must be a whole number of 64 bits"),
        ('[{"id": ' + "9" * 5000 + "}]", "not valid JSON"),
        ([GOOD, {**GOOD, "id": 2}], "entry 2 asks what entry 1 does"),
        ('[{"id": 1, "id": 2, "category": "a", "question": "Who?"}]', "not valid JSON (key 'id' comes twice)"),
        ('[{"id": NaN, "category": "a", "question": "Who?"}]', "not valid JSON (NaN is not a number of JSON)"),
        ("[" * 20_000, "not valid JSON (brackets are nested too deep)"),
    ],
)
def test_each_mistake_names_file_and_entry(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_line_of_json_lines_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{\n")
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        load_prompts(path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        load_prompts(path)
