"""samples.jsonl and the A/B tool's file: read, written, and every damage named in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replication.errors import UserError
from replication.generation.completions import Completion, read_samples, suite_completions
from replication.generation.export import read_export, write_export
from replication.runs.files import file_sha256, read_json, write_json, write_text
from replication.runs.layout import RunDir, SuiteDir

TEXTS = ["plain", 'a "quoted" one', "two\nlines", "a separator\u2028inside", ""]
SETTINGS = {"temperature": 0.7, "top_k": 40, "top_p": 1.0, "max_new_tokens": 8, "prompts_sha256": "x"}


def line(arm: str = "both", seed: int = 1, prompt: int = 1, sample: int = 0, text: str = "said") -> dict:
    named = {"arm": arm, "seed": seed, "prompt_id": prompt, "category": "factual", "question": f"Question {prompt}?"}
    return {**named, "sample": sample, "completion": text, "tokens": 3, "stopped": True}


def write_lines(run: RunDir, lines: list[dict]) -> None:
    """samples.jsonl, and its hash in the manifest where there is one."""
    write_text(run.samples, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    if run.manifest.is_file():
        generation = read_json(run.manifest)["generation"]
        write_json(run.manifest, {"generation": generation | {"samples_sha256": file_sha256(run.samples)}})


def write_cell(suite_dir: SuiteDir, arm: str, seed: int, *, complete: bool = True, **settings: object) -> RunDir:
    run = suite_dir.cell(arm, seed)
    lines = [line(arm, seed, p, s, f"{arm} {TEXTS[p]} {s}") for p in range(len(TEXTS)) for s in range(2)]
    write_lines(run, lines)
    own = {"samples_sha256": file_sha256(run.samples), "weights_sha256": arm}
    write_json(run.manifest, {"generation": SETTINGS | settings | own})
    if complete:
        write_json(run.complete, {})
    return run


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_samples_are_read_in_order_whatever_the_texts_hold(tmp_path):
    run = RunDir(tmp_path)
    write_lines(run, [line(prompt=i, text=text) for i, text in enumerate(TEXTS)])
    assert read_samples(run) == [
        Completion("both", 1, i, "factual", f"Question {i}?", 0, t) for i, t in enumerate(TEXTS)
    ]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line(), line(arm="baseline", prompt=2)], "mixes completions of baseline/seed-1, both/seed-1"),
        ([line(), line(seed=2, prompt=2)], "mixes completions of both/seed-1, both/seed-2"),
        ([line(), line(prompt=2), line()], "sample 0 of prompt 1 twice"),
        ([line(), {k: v for k, v in line(prompt=2).items() if k != "completion"}], "line 2: completion is missing"),
        ([line() | {"seed": "1"}], "line 1: seed must be a whole number, not '1'"),
        ([line() | {"sample": True}], "line 1: sample must be a whole number"),
    ],
)
def test_lines_that_are_not_one_cells_completions_are_refused(tmp_path, lines, said):
    write_lines(RunDir(tmp_path), lines)
    with pytest.raises(UserError) as caught:
        read_samples(RunDir(tmp_path))
    assert said in one_line(caught) and "replicate generate" in str(caught.value)


def test_a_missing_empty_torn_or_binary_file_is_refused(tmp_path):
    run = RunDir(tmp_path)
    whole = (json.dumps(line()) + "\n" + json.dumps(line(prompt=2)) + "\n").encode()
    for content, said in (
        (None, "no such file"),
        (b"", "is empty"),
        (whole[:-1], "torn in its last line"),
        (whole[:-20], "torn in its last line"),
        (whole + b"\xff\n", "not UTF-8 text"),
        (whole + b"[]\n", "line 3: holds no JSON object"),
        (whole + b"\n", "line 3: is not valid JSON"),
    ):
        if content is not None:
            run.samples.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_samples(run)
        assert said in one_line(caught), content


def test_a_suites_completions_are_those_of_seeds_with_every_arm(tmp_path):
    suite_dir = SuiteDir(tmp_path)
    for arm in ("baseline", "both"):
        for seed in (2, 1, 10):
            write_cell(suite_dir, arm, seed)
    write_cell(suite_dir, "baseline", 3)
    write_cell(suite_dir, "both", 3, complete=False)
    write_cell(suite_dir, "baseline", 4)
    write_cell(suite_dir, "both", 4).samples.unlink()
    found = suite_completions(suite_dir, ["both", "baseline"])
    assert list(found) == [1, 2, 10] and all(list(arms) == ["both", "baseline"] for arms in found.values())
    assert {(c.arm, c.seed) for c in found[2]["both"]} == {("both", 2)} and len(found[2]["both"]) == 10
    assert suite_completions(suite_dir, ["baseline", "focal"]) == {} == suite_completions(suite_dir, [])
    write_lines(suite_dir.cell("both", 2), [line("both", 1)])
    with pytest.raises(UserError, match="holds completions of both/seed-1"):
        suite_completions(suite_dir, ["baseline", "both"])


def test_a_file_that_the_manifest_does_not_record_is_read_by_nobody(tmp_path):
    """Edited by hand, or sampled anew and killed before the manifest was written."""
    suite_dir = SuiteDir(tmp_path / "out")
    for arm in ("baseline", "both"):
        write_cell(suite_dir, arm, 1)
    run = suite_dir.cell("both", 1)
    run.samples.write_text(run.samples.read_text().replace("plain", "other"))
    for read in (
        lambda: read_samples(run),
        lambda: suite_completions(suite_dir, ["baseline", "both"]),
        lambda: write_export(tmp_path / "ab.json", suite_dir, 1, ("baseline", "both")),
    ):
        with pytest.raises(UserError, match="is not the file whose settings") as caught:
            read()
        assert str(run.samples) in one_line(caught) and "`replicate generate` makes it again" in str(caught.value)
    assert not (tmp_path / "ab.json").exists()


# ---------------------------------------------------------------- the A/B tool's file


def exported(tmp_path: Path) -> Path:
    suite_dir = SuiteDir(tmp_path / "out")
    for arm in ("baseline", "both"):
        write_cell(suite_dir, arm, 7)
    assert write_export(tmp_path / "ab.json", suite_dir, 7, ("baseline", "both")) == len(TEXTS)
    return tmp_path / "ab.json"


def test_what_is_exported_comes_back_as_it_was(tmp_path):
    path = exported(tmp_path)
    value = json.loads(path.read_text())
    assert list(value["metadata"]) == ["model_a", "model_b", "questions_file", "n_generations", "temperature", "top_k",
                                       "max_tokens", "generated_at"]  # fmt: skip
    assert [value["metadata"][k] for k in ("n_generations", "temperature", "top_k", "max_tokens")] == [2, 0.7, 40, 8]
    assert list(value["questions"][0]) == ["id", "category", "question", "responses_a", "responses_b"]
    assert read_export(path, seed=7) == suite_completions(SuiteDir(tmp_path / "out"), ["baseline", "both"])
    assert list(read_export(path)) == [0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["metadata"].update(n_generations=3), "question 1 (id 0): responses_a has 2 entries"),
        (lambda v: v["questions"][2]["responses_b"].pop(), "question 3 (id 2): responses_b has 1 entries"),
        (lambda v: v["questions"][1].update(responses_a=["x", 3]), "questions[1].responses_a[1] must be text"),
        (lambda v: v["questions"][1].update(id=0), "question 2 has id 0, as question 1 does"),
        (lambda v: v["questions"][1].update(id="1"), "questions[1].id must be a whole number"),
        (lambda v: v["questions"].insert(0, "x"), "questions[0] must have keys of its own"),
        (lambda v: v["questions"].clear(), "'questions' is empty"),
        (lambda v: v["metadata"].update(n_generations="2"), "metadata.n_generations must be a whole number"),
        (lambda v: v["metadata"].update(n_generations=0), "metadata.n_generations must be a positive whole number"),
        (lambda v: v["metadata"].update(model_a=""), "metadata.model_a and metadata.model_b must each name a model"),
        (lambda v: v["metadata"].pop("model_b"), "metadata.model_b is missing"),
        (lambda v: v["metadata"].update(model_b="baseline"), "model_a and model_b are both 'baseline'"),
        (lambda v: v.pop("questions"), "questions is missing"),
    ],
)
def test_a_damaged_export_is_refused_by_its_place(tmp_path, change, said):
    path = exported(tmp_path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        read_export(path)
    assert said in one_line(caught) and str(path) in str(caught.value)


def test_an_export_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "ab.json"
    for text in (None, "{", "[]"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError) as caught:
            read_export(path)
        one_line(caught)


def test_arms_that_do_not_match_are_not_exported(tmp_path):
    suite_dir = SuiteDir(tmp_path / "out")
    write_cell(suite_dir, "baseline", 7)
    write_cell(suite_dir, "both", 7, temperature=0.1, top_p=0.5)
    write_cell(suite_dir, "focal", 7)
    write_lines(suite_dir.cell("focal", 7), [line("focal", 7)])

    def refused(arm: str) -> str:
        with pytest.raises(UserError) as caught:
            write_export(tmp_path / "ab.json", suite_dir, 7, ("baseline", arm))
        return one_line(caught)

    assert "sampled with different temperature, top_p" in refused("both")
    assert "different prompts or samples" in refused("focal")
    assert "no such file" in refused("none")
    for arm in ("baseline", "focal"):
        write_lines(suite_dir.cell(arm, 7), [line(arm, 7, 1, 0), line(arm, 7, 2, 1)])
    assert "lack samples of some prompts" in refused("focal")
    assert not (tmp_path / "ab.json").exists()
