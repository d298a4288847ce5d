"""`replicate judge ACTION`: a panel from completions to the report, on one machine or two; mistakes in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from browsing import PageReader
from judging_setup import at_random, completions, hasty, vote_all
from paths import CHECKOUT
from reported import report
from rich.console import Console
from small_panel import served
from synthetic_runs import build_suite, edit_manifest

from replication.cli.judge import print_state
from replication.cli.main import main
from replication.config import AnalysisConfig, find_config, load_suite, to_yaml
from replication.config.study import load_study
from replication.errors import UserError
from replication.generation.completions import suite_completions
from replication.judging.completions import Chosen
from replication.judging.database import Database
from replication.judging.folder import find_panel
from replication.judging.panel import add_judges, preview
from replication.judging.progress import judge_progress
from replication.judging.seal import read_by_others
from replication.judging.store import Recruit, Store, hash_token
from replication.protocol.deviations import check_plan
from replication.protocol.panel_records import panel_contradictions
from replication.protocol.preregistration import register
from replication.runs.files import file_sha256, read_json, write_text
from replication.runs.layout import SuiteDir
from replication.runs.ledger import read_ledger
from replication.runs.records import write_record
from replication.runs.withdrawn import read_withdrawals
from replication.votes.record import counted_votes, read_note, read_panel_record, read_votes

ENVIRONMENT = os.environ | {"PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of two arms at six seeds, complete, whose plan asks for four judges with seven votes each."""
    root = tmp_path_factory.mktemp("finished") / "out"
    suite_dir, suite = build_suite(root, arms=("baseline", "both"), seeds=(1, 2, 3, 4, 5, 6))
    analysis = AnalysisConfig(judges=4, votes_per_judge=7, bootstrap_resamples=200)
    write_text(suite_dir.suite, to_yaml(replace(suite, analysis=analysis)))
    return root


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def run(*words: object) -> int:
    return main(["judge", *map(str, words)])


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    """What one action prints; its code must be the one expected."""

    def act(*words: object, code: int = 0) -> str:
        assert run(*words) == code, capsys.readouterr()
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return act


def one_line(text: str) -> str:
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def store_of(out: Path) -> Store:
    return Store(hasty(out / "judging" / "judging.sqlite"))


def vote_everything(out: Path, judges: int = 4) -> None:
    for n in range(1, judges + 1):
        vote_all(store_of(out), f"judge-{n:03d}", at_random(n))


# ---------------------------------------------------------------- from completions to the report


def test_the_whole_way(out: Path, said, capsys: pytest.CaptureFixture[str]) -> None:
    text = said("prepare", out)
    assert "4 sets of 7 pairs and 1 repeat, 6 seeds" in text and f"replicate judge serve {out}" in text
    assert "http" not in text, "nothing is served yet"
    for name in ("judging/admin-token", "judging/join-token", "sealed/key.json"):
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o600
    admin = (out / "judging" / "admin-token").read_text().strip()
    assert store_of(out).panel().admin_sha256 == hash_token(admin)
    facts = (out / "judging" / "panel.json").read_text()
    assert "baseline" not in facts and "both" not in facts
    assert read_json(out / "judging" / "panel.json")["votes_per_judge"] == 7

    links = list(csv.DictReader(io.StringIO(said("invite", out, "--judges", 5, "--csv"))))
    assert [row["judge_id"] for row in links] == [f"judge-00{n}" for n in range(1, 6)]
    assert all(row["link"].startswith("http://127.0.0.1:8765/j/") for row in links)
    vote_everything(out)
    status = said("status", out)
    assert (
        "judge-001" in status
        and "8/8" in status
        and "4 of 4 planned judges, people and models together, have given all 7 votes" in status
    )
    assert "% of" in status and "baseline" not in status and "both " not in status.replace("both bad", "")

    one_line(said("export", out, code=2))
    locked = said("lock", out, "--yes")
    note = read_json(out / "votes.json")
    assert note["votes_sha256"] in locked and note["key_sha256"] in locked and f"replicate report {out}" in locked
    assert (note["n_votes"], note["n_repeats"], note["locked_early_because"]) == (28, 4, None)
    results, page, _ = report(SuiteDir(out), load_suite(out / "suite.yaml"))
    assert results["preference"]["n_votes"] == 28 and results["preference"]["n_repeats"] == 4
    assert results["plan"]["state"] == "none" and "28" in page
    assert f"The sealed key that says which arm stood where has the SHA-256 {note['key_sha256']}" in page
    assert results["votes_note"]["changed"] is False and "when nothing planned was missing" in page

    record = (out / "votes.csv").read_bytes()
    exported = said("export", out, "--out", out / "files")
    for name in ("votes.csv", "marginals.json", "judges.csv", "answers.jsonl"):
        assert str(out / "files" / name) in exported
    assert (out / "files" / "votes.csv").read_bytes() == record
    assert (out / "files" / "marginals.json").read_text() == (out / "judging" / "marginals.json").read_text()
    assert main(["power", "--votes", str(out / "judging" / "marginals.json"), "--out", str(out / "power"),
                 "--simulations", "2", "--seeds", "5", "--prompts", "7", "--judges", "4",
                 "--processes", "1"]) == 0  # fmt: skip
    assert "fitted to" in capsys.readouterr().out


def test_the_votes_are_a_dataset_with_their_texts(out: Path, said, tmp_path: Path) -> None:
    import datasets

    study = out / "study.yaml"  # without rules for exclusion, which judges who vote at random break
    study.write_text(re.sub("(?m)^exclude:.*$", "", find_config("paid", "studies").read_text(encoding="utf-8")))
    said("prepare", out, "--study", study)
    vote_everything(out)
    data = out / "dataset"
    assert "not locked" in one_line(said("export", out, "--dataset", data, code=2)) and not data.exists()
    os.utime(out / "sealed" / "key.json", (2e9, 1e9))  # read by somebody
    said("lock", out, "--yes")
    said("withdraw", out, "judge-002", "--why", "asked for it")
    read_at = read_json(out / "votes.json")["key_read_at"]
    assert str(data / "votes.parquet") in said(
        "export", out, "--out", out / "files", "--dataset", data, "--license", "mit"
    )
    assert read_json(out / "files" / "votes.json")["key_read_at"] == read_at is not None
    rows = datasets.load_dataset(str(data), cache_dir=str(tmp_path / "cache"))["train"].to_list()
    assert rows == [json.loads(line) for line in (data / "votes.jsonl").read_text().splitlines()]
    votes = {vote.vote_id: vote for vote in read_votes(out / "votes.csv") if vote.judge_id != "judge-002"}
    assert {row["vote_id"] for row in rows} == votes.keys() and len(rows) == 3 * 8
    texts = {
        (seed, arm, one.prompt_id, one.sample): one.text
        for seed, of_arm in suite_completions(SuiteDir(out), ("baseline", "both")).items()
        for arm, some in of_arm.items()
        for one in some
    }
    chosen = {"left": "model_a", "right": "model_b"}
    for row in rows:
        vote = votes[row["vote_id"]]
        assert row["winner"] == chosen.get(vote.choice, vote.choice) and row["seconds"] == vote.seconds
        assert row["response_a"] == texts[vote.seed, row["model_a"], vote.prompt_id, vote.sample_left]
        assert row["response_b"] == texts[vote.seed, row["model_b"], vote.prompt_id, vote.sample_right]
    card = (data / "README.md").read_text()
    for told in (
        "license: mit",
        read_json(out / "votes.json")["key_sha256"],
        "published without",
        "without those of 1 judge who",
    ):
        assert told in card
    assert file_sha256(data / "votes.parquet") in card


def test_arena_rank_reads_the_dataset_as_the_page_has_it(out: Path, said, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("arena_rank", reason="it pins numpy and jax: an environment of its own has it")
    said("prepare", out)
    vote_everything(out)
    said("lock", out, "--yes")
    said("export", out, "--dataset", out / "DIR")
    monkeypatch.chdir(out)
    page = (CHECKOUT / "replication" / "judging" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?arena_rank.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["pairs"].competitors == ["baseline", "both"]


def test_the_counts_can_be_audited(out: Path, said, capsys: pytest.CaptureFixture[str]) -> None:
    said("prepare", out)
    vote_everything(out)
    said("lock", out, "--yes")
    claims = out / "claims.yaml"
    claims.write_text(
        "paper: ours\nfiles: {votes: marginals.json}\n"
        "claims: [{id: n, what: votes, where: here, printed: '28', recompute: votes, args: {count: n}}]\n"
    )
    code = main(["audit", str(out / "judging"), "--claims", str(claims), "--out", str(out / "audit")])
    assert code == 0, capsys.readouterr()
    found = read_json(out / "audit" / "audit.json")
    assert found["stated"] and all(row["verdict"] == "same" for row in (*found["stated"], *found["rows"]))


def test_the_lock_waits_for_what_is_planned_or_for_a_reason(out: Path, said) -> None:
    said("prepare", out)
    vote_everything(out, judges=3)
    assert "--early: is empty" in one_line(said("lock", out, "--yes", "--early", " ", code=2))
    text = one_line(said("lock", out, "--yes", code=2))
    assert "3 of 4 planned judges, people and models together, have given all 7 votes (3 have voted)" in text
    assert "--early" in text
    assert not store_of(out).panel().is_locked and not (out / "votes.csv").exists()
    assert "no terminal to ask on; --yes" in said("lock", out, "--early", "one is ill", code=2)
    assert not store_of(out).panel().is_locked
    assert "locked early: one is ill" in said("lock", out, "--early", "one is ill", "--yes")
    assert read_json(out / "votes.json")["locked_early_because"] == "one is ill"
    assert "one is ill" in said("status", out)
    again = " ".join(said("lock", out, "--yes", "--early", "another").split())
    assert "the panel is locked already, since 20" in again and "the reason is not taken" in again
    assert read_json(out / "votes.json")["locked_early_because"] == "one is ill"
    _, page, markdown = report(SuiteDir(out), load_suite(out / "suite.yaml"))
    assert "The reason given: one is ill" in page and "The reason given: one is ill" in markdown
    (out / "votes.csv").write_text((out / "votes.csv").read_text().replace(",left,", ",right,"))
    _, page, _ = report(SuiteDir(out), load_suite(out / "suite.yaml"))
    assert "votes.csv is not the file that was written when the panel was locked" in page
    said("export", out)
    assert report(SuiteDir(out), load_suite(out / "suite.yaml"))[0]["votes_note"]["changed"] is False
    assert "the panel is locked" in one_line(said("invite", out, "--judges", 1, code=2))


def test_a_lock_that_was_interrupted_is_finished_by_the_next_call(out: Path, said) -> None:
    said("prepare", out)
    vote_everything(out)
    from replication.judging.panel import lock_panel

    lock_panel(store_of(out).database, out / "sealed")  # and the process ends before it has written the record
    assert not (out / "votes.csv").exists()
    said("lock", out)  # nothing is asked: what cannot be undone is done
    record = (out / "votes.csv").read_bytes()
    assert len(read_votes(out / "votes.csv")) == 32
    said("lock", out)
    assert (out / "votes.csv").read_bytes() == record


def test_a_record_that_could_not_be_read_is_found_before_the_lock(out: Path, said) -> None:
    said("prepare", out)
    vote_everything(out)
    with store_of(out).database.write() as c:
        c.exec_driver_sql("DROP INDEX judging_one_first_vote_an_item")
        c.exec_driver_sql("UPDATE judging_assignments SET item_id = (SELECT min(item_id) FROM judging_items)")
    assert "on the same completions by the same judge" in one_line(said("lock", out, "--yes", code=2))
    assert not store_of(out).panel().is_locked and not (out / "votes.csv").exists()


def test_another_vote_record_is_not_written_over(out: Path, said) -> None:
    said("prepare", out)
    vote_everything(out)
    said("lock", out, "--yes")
    other = (out / "votes.csv").read_text().replace(store_of(out).panel().panel_id, "other")
    for folder in ("judging", "sealed"):
        shutil.rmtree(out / folder)
    (out / "votes.csv").write_text(other)
    said("prepare", out)
    assert "holds votes of something else" in one_line(said("lock", out, "--yes", "--early", "x", code=2))
    assert not store_of(out).panel().is_locked and (out / "votes.csv").read_text() == other


@pytest.mark.parametrize(("answer", "is_locked"), [("y", True), ("n", False), ("", False)])
def test_on_a_terminal_the_lock_asks(
    out: Path, said, monkeypatch: pytest.MonkeyPatch, answer: str, is_locked: bool
) -> None:
    said("prepare", out)
    vote_everything(out)
    terminal, inside = pty.openpty()
    os.write(terminal, f"{answer}\n".encode())
    with open(inside, encoding="utf-8") as keyboard:
        monkeypatch.setattr(sys, "stdin", keyboard)
        printed = said("lock", out, code=0 if is_locked else 2)
    os.close(terminal)
    assert is_locked or "not locked; nothing has changed" in printed
    assert store_of(out).panel().is_locked == is_locked == (out / "votes.csv").exists()


# ---------------------------------------------------------------- what a panel is made from


def test_seeds_that_may_not_be_compared_are_left_out_by_name(tmp_path: Path, said) -> None:
    root = tmp_path / "out"
    suite_dir, _ = build_suite(
        root, arms=("baseline", "both"), seeds=(1, 2, 3, 4), missing=[("both", 2)], interrupted={("baseline", 3): 20}
    )
    edit_manifest(suite_dir.cell("both", 4), initial_weights_sha256="0" * 64)
    text = said("prepare", root, "--judges", 2, "--votes", 7)
    assert "1 seed," in text
    for line in ("seed 2 is left out: both", "seed 3 is left out: baseline", "seed 4 is left out: initial weights"):
        assert line in text
    key = read_json(root / "sealed" / "key.json")
    assert key["seeds"] == [1]


def test_no_completions_at_all_is_one_line(tmp_path: Path, said, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "out"
    build_suite(root, arms=("baseline", "both"), samples=False)
    assert "no seed has completions of both baseline and both" in one_line(said("prepare", root, code=2))
    assert not (root / "sealed").exists() and not (root / "judging" / "judging.sqlite").exists()


def test_cells_that_were_sampled_otherwise_are_refused(out: Path, said) -> None:
    cells = [SuiteDir(out).cell(arm, seed) for arm in ("baseline", "both") for seed in range(1, 7)]
    odd = SuiteDir(out).cell("both", 3)
    hashes = {cell.root: file_sha256(cell.samples) for cell in cells}
    for cell in cells:
        generation = {"temperature": 0.7, "samples_sha256": hashes[cell.root], "weights_sha256": str(cell.root)}
        edit_manifest(cell, generation=generation)
    edit_manifest(odd, generation={"temperature": 0.8, "samples_sha256": hashes[odd.root]})
    text = one_line(said("prepare", out, code=2))
    assert "both/seed-3: was sampled with another temperature than baseline/seed-1" in text
    edit_manifest(odd, generation={"temperature": 0.7, "samples_sha256": hashes[odd.root]})
    texts = odd.samples.read_text()
    odd.samples.write_text(texts.replace('"completion": "', '"completion": "sampled otherwise: '))
    text = one_line(said("prepare", out, code=2))
    assert f"{odd.samples}: is not the file" in text and "`replicate generate`" in text
    assert not (out / "sealed").exists()
    odd.samples.write_text(texts)
    said("prepare", out)


def test_arms_with_unlike_numbers_of_completions_are_refused() -> None:
    """Each text of one arm would be in as many pairs as the other has texts: how often it comes would tell its arm."""
    few = {seed: of | {"both": [c for c in of["both"] if not c.sample]} for seed, of in completions(3).items()}
    chosen = Chosen("s", ("baseline", "both"), few, (), AnalysisConfig(), None)
    with pytest.raises(UserError, match=r"both: has 1 completions of each prompt and baseline \d"):
        _ = chosen.n_pairs


@pytest.mark.parametrize("what", ["seed", "prompt_id", "sample"])
def test_numbers_that_no_database_holds_are_one_line(what: str) -> None:
    big, made = 10**30, completions(2, seeds=(10**30 if what == "seed" else 1,))
    for of_arm in made.values():
        for arm, found in of_arm.items():
            of_arm[arm] = (
                [replace(c, **{what: big + c.prompt_id + c.sample}) for c in found] if what != "seed" else found
            )
    with pytest.raises(UserError, match=rf"{what} is one of 100 bits, which must be a whole number of 64 bits"):
        _ = Chosen("s", ("baseline", "both"), made, (), AnalysisConfig(), None).n_pairs


def test_80_columns_hold_every_name(out: Path) -> None:
    said = io.StringIO()
    make = Console(file=said, width=80, soft_wrap=True)
    assert run("prepare", out) == 0
    assert run("invite", out, "--judges", 4) == 0
    vote_everything(out, judges=2)
    folder = find_panel(out)
    add_judges(folder.open(), folder.sealed, ["a-model-with-a-long-name"], "model", "Lab")
    print_state(folder, folder.open(), make)
    table = said.getvalue().split("votes:")[0]
    assert all(f"judge-00{n} " in table for n in range(1, 5)) and "…" not in table
    assert max(map(len, table.splitlines())) <= 80


def test_a_deviation_from_the_plan_is_one_line_each(out: Path, said) -> None:
    suite_dir = SuiteDir(out)
    register(suite_dir, load_suite(suite_dir.suite))
    text = said("prepare", out, "--pair", "both,baseline", "--judges", 3, "--votes", 6)
    assert "the plan's pair is baseline,both" in text and "has 7 votes a judge, the panel 6" in text
    assert "the plan has 4 judges, people and models together: 1 more are to come" in text
    assert read_json(out / "sealed" / "key.json")["treatment"] == "baseline"
    vote_everything(out, judges=3)
    assert "3 of 4 planned judges, people and models together, have given all 6 votes" in said("status", out)


RULES = """
criteria: {overall: Which?, coherence: Which holds together?}
exclude: {failed_attention: 0, tie_share: 0.9}
"""


def test_rules_for_exclusion_are_in_the_plan_and_hold_when_the_panel_is_locked(out: Path, said) -> None:
    suite_dir, file = SuiteDir(out), out / "study.yaml"
    suite = load_suite(suite_dir.suite)
    file.write_text(RULES)
    register(suite_dir, suite, study=load_study(file))
    assert not register(suite_dir, suite).is_new, "the study of the plan is kept"
    rules = "(more than 0 failed attention items; more than 90% ties)"
    assert f"break one when the panel is locked, whatever the arms {rules}" in suite_dir.plan_md.read_text()
    assert "another study" not in said("prepare", out, "--attention", 1)
    assert store_of(out).study == load_study(file)

    def attentive(shown) -> str:
        return ("left" if "Left" in shown.question else "right") if not shown.is_pair else "left"

    for n, choose in enumerate([lambda shown: "tie", attentive, at_random(3), at_random(4)], 1):
        vote_all(store_of(out), f"judge-{n:03d}", choose)
    told = said("lock", out, "--yes")
    note = read_note(suite_dir.votes_note, suite_dir.votes)
    assert note is not None and note.note.excluded is not None
    assert "judge-001, by the study's rule: more than 0 failed attention items, more than 90% ties" in told
    assert note.note.excluded["judge-001"] == "more than 0 failed attention items, more than 90% ties"
    assert "judge-002" not in note.note.excluded and f"judge-001 ({note.note.excluded['judge-001']})" in str(note.lines)
    kept = {vote.judge_id for vote in counted_votes(suite_dir.votes)}
    every = {vote.judge_id for vote in read_votes(suite_dir.votes)}
    assert len(every) == 4 and kept == every - note.note.excluded.keys()
    said("export", out, "--dataset", out / "dataset")
    rows = [json.loads(line) for line in (out / "dataset" / "votes.jsonl").read_text().splitlines()]
    assert {row["judge_id"] for row in rows} == kept, "the dataset too"
    status = check_plan(suite_dir, suite)
    assert "study" not in str(status.deviations) and "excluded" not in str(status.withheld)
    write_record(suite_dir.votes_note, replace(note.note, study_sha256="0" * 64))
    status = check_plan(suite_dir, suite)
    assert "the panel's study, what judges were told and asked, is not the plan's" in status.deviations
    assert "judges were excluded by rules that the plan does not have" in {w.why for w in status.withheld}


def _export(folder: Path) -> Path:
    """A file of the published tool: two models, five prompts, two completions of each."""
    made = completions(5, seeds=(0,), samples=(2, 2))[0]
    questions = [
        {
            "id": prompt, "category": "factual", "question": f"Question {prompt}?",
            "responses_a": [c.text for c in made["baseline"] if c.prompt_id == prompt],
            "responses_b": [c.text for c in made["both"] if c.prompt_id == prompt],
        }
        for prompt in range(5)
    ]  # fmt: skip
    file = folder / "export.json"
    about = {"model_a": "run-one", "model_b": "run-two", "n_generations": 2}
    file.write_text(json.dumps({"metadata": about, "questions": questions}))
    return file


def test_a_file_of_the_published_tool_needs_no_suite(tmp_path: Path, said) -> None:
    file = _export(tmp_path)
    few, none = tmp_path / "few", tmp_path / "none"
    text = said("prepare", few, "--import", file, "--judges", 2, "--attention", 1)
    told = load_study("imported")
    assert store_of(few).study == told and "small" not in str(told) and "early" not in str(told)
    assert read_panel_record(few / "judging").study_sha256 == told.sha256
    assert load_study(few / "judging" / "study.yaml") == told
    assert "the file has 20 pairs" in text and "2 sets of 20 pairs, 2 repeats and 1 attention item, 1 seed" in text
    text = one_line(said("prepare", none, "--import", file, "--votes", 32, code=2))
    assert "--votes: 32 is more than the 20 pairs" in text and "give at most 20" in text
    text = said("prepare", none, "--import", file, "--judges", 0)
    assert "0 sets of 20 pairs" in text and "/join/" not in text and not (none / "judging" / "join-token").exists()
    out, study = tmp_path / "new", tmp_path / "study.yaml"
    study.write_text("criteria: {overall: Which?, wit: Which is wittier?}")
    options = ("--judges", 2, "--votes", 5, "--repeats", 0, "--invite-only", "--study", study)
    said("prepare", out, "--import", file, *options)
    assert store_of(out).study.task == told.task
    assert not (out / "judging" / "join-token").exists() and store_of(out).panel().join_sha256 is None
    assert "--pair: does not act" in one_line(said("prepare", out, "--import", file, "--pair", "a,b", code=2))
    for n, background in ((1, "ml"), (2, "none")):
        store_of(out).answer_survey(f"judge-{n:03d}", {"background": background})
        vote_all(store_of(out), f"judge-{n:03d}", at_random(n), said={"wit": "tie" if n == 1 else "left"})
    assert f"replicate report {out}" in said("lock", out, "--yes")
    votes = read_votes(out / "votes.csv")
    assert len(votes) == 10 and {v.suite for v in votes} == {"imported"}
    assert {v.arm_left for v in votes} == {"run-one", "run-two"}
    counts = read_json(out / "judging" / "marginals.json")
    assert counts["model_b"] == "run-two"

    assert main(["report", str(out)]) == 0
    results, text = read_json(out / "results.json"), (out / "report.md").read_text()
    found = results["preference"]
    assert (found["baseline"], found["treatment"], found["seeds"]) == ("run-one", "run-two", [0])
    head = counts["headline"]
    assert [found[key] for key in ("n_votes", "n_baseline", "n_treatment")] == [head["n"], head["a"], head["b"]]
    assert results["lines"][0].startswith("Preference: not decided: an estimate, no verdict, as the runs are not here")
    full = next(row for row in found["filters"] if row["name"] == "without judges of fewer than 5 votes")
    assert full["n_votes"] == 10
    [wit] = found["criteria"]
    assert (wit["name"], wit["n_votes"], wit["n_ties"]) == ("wit", 10, 5) and wit["n_decisive"] == 5
    strata = [(row["name"], row["n_votes"]) for row in found["survey"]]
    assert strata == [("background: ml", 5), ("background: none", 5)]
    assert "**Other criteria (secondary)**" in text and "**People by their answers to the survey" in text
    assert "an estimate, no verdict" in text and "conditional on the one seed" in text and "None" not in text
    assert (out / "figures" / "preference.svg").stat().st_size > 10_000
    assert {row["name"] for row in found["categories"]} == {"factual"} and "SHA-256" in text
    (out / "votes.csv").write_text((out / "votes.csv").read_text().replace("run-two", "run-six", 1))
    assert main(["report", str(out)]) == 2, "several pairs of arms"
    assert main(["report", str(tmp_path)]) == 2, "neither a suite nor votes"


# ---------------------------------------------------------------- links


def test_a_new_link_ends_the_old_one(out: Path, said) -> None:
    said("prepare", out, "--invite-only")

    def link(*flags: object) -> str:
        rows = list(csv.DictReader(io.StringIO(said("invite", out, *flags, "--csv"))))
        assert [row["judge_id"] for row in rows] == ["judge-001"]
        return rows[0]["link"]

    first = link("--judges", 1)
    second = link("--judge-id", "judge-001", "--base-url", "https://judge.example.org/")
    assert second.startswith("https://judge.example.org/j/")
    assert store_of(out).judge_by_token(first.rpartition("/")[2]) is None
    assert store_of(out).judge_by_token(second.rpartition("/")[2]) is not None
    assert "judge-002" in said("invite", out, "--judges", 1)


def test_links_past_the_planned_sets_need_the_key(out: Path, said) -> None:
    said("prepare", out, "--judges", 1)
    shutil.move(out / "sealed", out.parent / "away")
    assert "judge-001" in said("invite", out, "--judges", 1)
    assert "sealed key is needed" in one_line(said("invite", out, "--judges", 1, code=2))
    shutil.move(out.parent / "away", out / "sealed")
    assert "1 of them are further sets" in said("invite", out, "--judges", 1)


# ---------------------------------------------------------------- the page


@contextmanager
def serving(*words: object, last: str = "judges:") -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A server as a process of its own, and the lines it printed until it was open."""
    command = [sys.executable, "-m", "replication", "judge", "serve", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as with & in a script
    ) as p:  # fmt: skip
        assert p.stdout is not None
        lines: list[str] = []
        try:
            while not lines or not lines[-1].startswith(last):
                line = p.stdout.readline()
                assert line, lines
                lines.append(line.strip())
            yield p, lines
        finally:
            if p.poll() is None:
                p.send_signal(signal.SIGINT)
                p.communicate(timeout=120)


def address(lines: list[str]) -> str:
    return re.search(r"(http\S+)/admin", "\n".join(lines)).group(1)  # type: ignore[union-attr]


def test_the_judging_folder_alone_serves_and_its_votes_come_home(out: Path, tmp_path: Path, said) -> None:
    said("prepare", out, "--judges", 1, "--votes", 2, "--repeats", 0, "--no-survey")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(out / "judging", elsewhere)
    join = (elsewhere / "join-token").read_text().strip()
    with serving(elsewhere, "--port", 0) as (process, lines):
        base = address(lines)
        assert f"{base}/join/{join}" in "\n".join(lines)
        with httpx.Client(base_url=base, follow_redirects=True) as browser:
            form = re.search(r'name="nonce" value="([^"]+)"', browser.get(f"/join/{join}").text)
            assert form
            mine = str(browser.post(f"/join/{join}", data={"nonce": form.group(1)}).url)
            browser.post(f"{mine}/start")
            for _ in range(2):
                impression = re.search(r'/vote".*?name="impression" value="([^"]+)"', browser.get(mine).text, re.DOTALL)
                assert impression, browser.get(mine).text
                assert browser.post(
                    f"{mine}/vote", data={"impression": impression.group(1), "choice": "left"}
                ).is_success
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in rest
    assert "1 of 1 planned judges" in said("status", elsewhere)
    assert "sealed key is needed" in one_line(said("lock", elsewhere, "--yes", code=2))
    shutil.move(elsewhere, out / "judging")
    said("lock", out, "--yes", "--early", "two votes are all")
    assert [v.choice for v in read_votes(out / "votes.csv")] == ["left", "left"]


def test_links_name_the_page_that_is_served(out: Path, said, capsys: pytest.CaptureFixture[str]) -> None:
    said("prepare", out, "--invite-only")

    def link(*flags: object) -> tuple[str, str]:
        assert run("invite", out, "--judge-id", "judge-001", "--csv", *flags) == 0
        printed = capsys.readouterr()
        return printed.out.splitlines()[1].split(",")[1], printed.err

    found, note = link()
    assert found.startswith("http://127.0.0.1:8765/j/") and "--base-url names another address" in note
    with serving(out, "--port", 0) as (_, lines):
        found, note = link()
        assert found.startswith(f"{address(lines)}/j/") and note == ""
        assert link("--base-url", "https://a.example.org")[0].startswith("https://a.example.org/j/")
        (out / "judging" / "serving.json").write_text("{")
        assert "8765" in link()[0], "a damaged note is none"
    with serving(out, "--port", 0, "--base-url", "https://judge.example.org") as (_, lines):
        text = "\n".join(lines)
        assert "https://judge.example.org/admin" in text and "by invitation" in text
        assert link()[0].startswith("https://judge.example.org/j/")
    assert not (out / "judging" / "serving.json").exists() and "8765" in link()[0]


def test_a_preview_is_a_copy_that_nothing_comes_back_from(out: Path, said) -> None:
    said("prepare", out, "--invite-only", "--judges", 1)
    own = said("invite", out, "--judges", 1, "--csv").splitlines()[1].rpartition("/")[2]
    before = said("status", out)
    with serving(out, "--port", 0, "--preview", last="preview:") as (_, lines):
        base, join = re.search(r"(http\S+)(/join/\S+)", lines[-1]).groups()  # type: ignore[union-attr]
        with httpx.Client(base_url=base, follow_redirects=True) as browser:
            assert browser.get(f"/j/{own}").status_code == 404, "a judge's own link must not end in the preview"
            form = re.search(r'name="nonce" value="([^"]+)"', browser.get(join).text)
            page = browser.post(join, data={"nonce": form.group(1)})  # type: ignore[union-attr]
            browser.post(f"{page.url}/start")
            browser.post(f"{page.url}/survey", data={"skip": "yes"})
            for _ in range(2):
                page = browser.get(str(page.url))
                assert "<strong>Preview.</strong>" in page.text
                impression = re.search(r'/vote".*?name="impression" value="([^"]+)"', page.text, re.DOTALL).group(1)  # type: ignore[union-attr]
                assert browser.post(f"{page.url}/vote", data={"impression": impression, "choice": "left"}).is_success
            assert "<strong>Preview.</strong>" in browser.get("/no/such").text
    assert said("status", out) == before and not (out / "judging" / "serving.json").exists()
    said("prepare", (empty := out.parent / "empty"), "--import", _export(out.parent), "--judges", 0)
    assert "nobody has pairs yet" in one_line(said("serve", empty, "--preview", "--port", 0, code=2))


def test_votes_of_test_judges_enter_nothing(out: Path, said) -> None:
    said("prepare", out)
    links = list(csv.DictReader(io.StringIO(said("invite", out, "--judges", 2, "--test", "--csv"))))
    assert [row["judge_id"] for row in links] == ["test-001", "test-002"]
    with store_of(out).database.read() as c:
        first = {n: set(c.exec_driver_sql(f"SELECT item_id FROM judging_assignments WHERE judge_id = '{n}'").scalars())
                 for n in ("judge-001", "test-001", "test-002")}  # fmt: skip
    assert first["test-001"] == first["test-002"] == first["judge-001"], "they take no pairs from the design"
    visit = store_of(out).visit(links[0]["link"].rpartition("/")[2])
    assert visit is not None and visit.is_test
    empty = said("status", out)
    for name in ("test-001", "test-002"):
        vote_all(store_of(out), name, lambda *_: "left")
    assert said("status", out) == empty.replace("0 votes of 2 test", "16 votes of 2 test")
    assert "left out:     16 votes of 2 test judges" in said("status", out)
    assert "give --judges N" in one_line(said("invite", out, "--test", code=2))
    assert "--test: goes with --judges" in one_line(said("invite", out, "--test", "--judge-id", "test-001", code=2))
    assert "0 of 4 planned" in one_line(said("lock", out, "--yes", code=2))
    vote_everything(out)
    said("invite", out, "--judges", 5)  # further sets go on where the planned ones ended
    assert "left out:     16 votes of test judges" in said("lock", out, "--yes")
    assert "left out:     16 votes of test judges" in said("export", out)
    assert {vote.judge_id for vote in read_votes(out / "votes.csv")} == {f"judge-00{n}" for n in range(1, 5)}
    assert (
        "test-" not in (out / "judging" / "judges.csv").read_text() + (out / "judging" / "marginals.json").read_text()
    )
    note = read_note(out / "votes.json", out / "votes.csv")
    assert note is not None and "Votes of test judges, left out of every count: 16." in note.lines


def test_a_port_that_is_taken_is_one_line(out: Path, said) -> None:
    said("prepare", out)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = one_line(said("serve", out, "--port", taken.getsockname()[1], code=2))
    assert "cannot listen on 127.0.0.1:" in text


# ---------------------------------------------------------------- where nothing can be written


def closed_copy(out: Path, to: Path) -> Path:
    """The folder as a server that has ended leaves it, its database one file; here it stays open as long as we run."""
    with store_of(out).database.engine.connect() as c:
        c.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Path(shutil.copytree(out, to, ignore=shutil.ignore_patterns("*-wal", "*-shm")))


@contextmanager
def not_writable(folder: Path) -> Iterator[None]:
    """Nothing in a folder can be written; where we are root, who may write anywhere, we are nobody meanwhile."""
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"), *folder.parents)}
    wanted = {path: 0o555 if path.is_dir() else 0o444 for path in modes if path.is_relative_to(folder)}
    wanted |= {path: modes[path] | 0o011 for path in folder.parents if not modes[path] & 0o001}  # pytest's own
    is_root = os.geteuid() == 0
    try:
        for path, mode in wanted.items():
            path.chmod(mode)
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in wanted:
            if path.exists():
                path.chmod(modes[path])


def test_status_of_a_folder_in_which_nothing_can_be_written(out: Path, said, tmp_path: Path) -> None:
    said("prepare", out)
    vote_all((store := store_of(out)), "judge-001", at_random(1))
    said("invite", out, "--judge-id", "judge-001")
    closed = closed_copy(out, tmp_path / "closed")
    with store.database.write() as c:  # a server has it open: what came last stands in the journal alone
        c.exec_driver_sql("DELETE FROM judging_votes WHERE vote_id = (SELECT max(vote_id) FROM judging_votes)")
    live = Path(shutil.copytree(out, tmp_path / "live"))
    torn = Path(shutil.copytree(out, tmp_path / "torn", ignore=shutil.ignore_patterns("*-shm")))
    for folder, votes in ((closed, "8/8"), (live, "7/8")):
        names = {path.name for path in (folder / "judging").iterdir()}
        with not_writable(folder):
            assert votes in said("status", folder)
            assert "not locked" in one_line(said("export", folder, "--out", tmp_path / "record", code=2))
            with TemporaryDirectory() as elsewhere:
                preview(find_panel(folder).open(only_reads=True), Path(elsewhere) / "preview.sqlite")
            one_line(said("invite", folder, "--judges", 1, code=2))
        assert {path.name for path in (folder / "judging").iterdir()} == names
    with not_writable(torn):
        assert "judging.sqlite-wal holds votes that can be read only where" in one_line(said("status", torn, code=2))
    assert "7/8" in said("status", torn)


# ---------------------------------------------------------------- PostgreSQL


def test_a_panel_in_postgresql(out: Path, postgres, said) -> None:
    url = postgres.new_database()
    with_password = url.replace("postgres@", "postgres:not-told@", 1)
    text = said("prepare", out, "--database", with_password)
    facts = (out / "judging" / "panel.json").read_text()
    assert "not-told" not in facts + text and not (out / "judging" / "judging.sqlite").exists()
    store = Store(Database(url))
    for n in range(1, 5):
        vote_all(store, f"judge-{n:03d}", at_random(n))
    assert "4 of 4 planned judges" in said("status", out)  # panel.json names the database
    copy, _ = preview(store.database, out / "preview.sqlite")
    assert store.show("judge-001") is None and copy.show("judge-001") is not None
    said("lock", out, "--yes")
    assert len(read_votes(out / "votes.csv")) == 32
    store.database.close()


def test_a_password_in_a_url_s_query_is_neither_kept_nor_printed(out: Path, postgres, said) -> None:
    text = said("prepare", out, "--database", f"{postgres.new_database()}&password=not-told")
    assert "not-told" not in text + (out / "judging" / "panel.json").read_text()
    assert "not-told" not in one_line(said("prepare", out, "--database", "mysql://u@h/x?password=not-told", code=2))
    assert "0 of 4 planned judges" in said("status", out)


def test_a_user_of_postgresql_who_may_make_no_tables_is_told_so(out: Path, postgres, said) -> None:
    url = postgres.new_database()
    with Database(url).engine.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE reader LOGIN")
    text = one_line(said("prepare", out, "--database", url.replace("postgres@", "reader@", 1), code=2))
    assert "refused what was asked of it" in text and not (out / "sealed" / "key.json").exists()
    said("prepare", out, "--database", url)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("prepare", "no/such"), "no/such: no such folder"),
        (("status", "no/such"), "no/such: no such folder"),
        (("status", "{out}"), "no panel there; `replicate judge prepare"),
        (("lock", "{out}", "--yes"), "no panel there"),
        (("serve", "{out}"), "no panel there"),
        (("export", "{out}"), "no panel there"),
        (("invite", "{out}", "--judges", "1"), "no panel there"),
        (("prepare", "{out}/runs"), "suite.yaml: no such file"),
        (("prepare", "{out}", "--pair", "baseline"), "--pair: 'baseline' must name two arms"),
        (("prepare", "{out}", "--pair", "baseline,bth"), "--pair: bth is no arm of the suite"),
        (("prepare", "{out}", "--judges", "-1"), "--judges: -1"),
        (("prepare", "{out}", "--votes", "0"), "--votes: 0"),
        (("prepare", "{out}", "--votes", "1000"), "--votes: 1000 is more than"),
        (("prepare", "{out}", "--attention", "9"), "--attention: 9 is more than the 8 other places of a set"),
        (("prepare", "{out}", "--repeats", "2"), "--repeats: 2.0"),
        (("prepare", "{out}", "--import", "{out}/suite.yaml"), "cannot be read as JSON"),
        (("prepare", "{out}", "--database", "what://x"), "--database: what://x cannot be used"),
        (("prepare", "{out}", "--database", "postgresql://a:b@127.0.0.1:1/x"), "127.0.0.1:1/x does not answer"),
        (("status", "{out}", "--database", "postgresql://a:b@127.0.0.1:1/x"), "127.0.0.1:1/x does not answer"),
        (("status", "{out}", "--database", "{out}/suite.yaml"), "suite.yaml cannot be read"),
    ],
)
def test_mistakes_before_there_is_a_panel(finished: Path, said, words: tuple[str, ...], what: str) -> None:
    assert what in one_line(said(*(word.format(out=finished) for word in words), code=2))
    assert not (finished / "sealed" / "key.json").exists() and not list(finished.glob("judging/*"))


def test_mistakes_with_a_panel(out: Path, said) -> None:
    said("prepare", out)
    before = (out / "sealed" / "key.json").read_bytes()
    assert "holds a panel already" in one_line(said("prepare", out, code=2))
    assert "written once" in one_line(said("prepare", out, "--database", out / "other.sqlite", code=2))
    assert (out / "sealed" / "key.json").read_bytes() == before
    for words, what in (
        (("invite", out), "give --judges N, or --judge-id NAME"),
        (("invite", out, "--judges", 1, "--judge-id", "x"), "give --judges N, or --judge-id NAME"),
        (("invite", out, "--judges", 0), "--judges: 0"),
        (("invite", out, "--judge-id", "nobody"), "'nobody' is no person of this panel"),
        (("invite", out, "--judges", 1, "--base-url", "judge.example.org"), "is no address such as https://"),
        (("invite", out, "--judges", 1, "--base-url", ""), "is no address such as https://"),
        (("serve", out, "--base-url", "http://judge.example.org:99999"), "is no address such as https://"),
        (("serve", out, "--host", "judge..example.org"), "cannot listen on judge..example.org"),
        (("serve", out, "--port", 70000), "--port: 70000"),
        (("export", out), "the panel is not locked"),
    ):
        assert what in one_line(said(*words, code=2))
    vote_everything(out)
    (out / "sealed" / "key.json").write_bytes(before.replace(b'"seed": 1', b'"seed": 2', 1))
    assert "not the key that this panel was made with" in one_line(said("lock", out, "--yes", code=2))
    (out / "sealed" / "key.json").unlink()
    assert "sealed key is needed" in one_line(said("lock", out, "--yes", code=2))
    assert not store_of(out).panel().is_locked


def test_damage_to_a_panel_s_files_is_one_line(out: Path, said) -> None:
    said("prepare", out)
    judging, facts = out / "judging", (out / "judging" / "panel.json").read_bytes()
    for damaged, what in (
        (facts[:-9], "panel.json: not valid JSON"),
        (b"\xff" + facts[1:], "panel.json: not valid JSON"),
        (b"[]", "panel.json: holds no JSON object; restore it"),
        (b'{"database": 5}', "panel.json: database must be text, not '5'; restore it"),
        (b'{"panel_id": "ab"}', "panel.json: is of the panel ab, and "),
    ):
        (judging / "panel.json").write_bytes(damaged)
        assert what in one_line(said("status", out, code=2))
    (judging / "panel.json").unlink()
    assert "0 of 4 planned" in said("status", out), "what it says can be done without"
    (judging / "join-token").write_bytes(b"\xffanother")
    with serving(out, "--port", 0) as (_, lines):
        assert "/join/...   (its end is not what stands in join-token" in lines[-1]
    for n in range(3):
        file = closed_copy(out, out.parent / f"copy-{n}") / "judging" / "judging.sqlite"
        whole = file.read_bytes()
        file.write_bytes((whole[:8192], whole[:4096] + b"\xff" * (len(whole) - 4096), b"no database" * 500)[n])
        assert "--database: " in one_line(said("status", file.parents[1], code=2))
    (out / "sealed" / "key.json").unlink()
    (out / "sealed" / "key.json").mkdir()
    assert "key.json: cannot be read" in one_line(said("lock", out, "--yes", "--early", "x", code=2))


@pytest.mark.parametrize(("earlier", "now"), [("rehearse", "load"), ("blinding", "blinding")])
def test_an_action_that_became_a_test_of_the_page_names_it(said, earlier: str, now: str) -> None:
    told = one_line(said(earlier, "--judges", 3, code=2))
    assert f"replicate judge {earlier}" in told and f"`python tests/load_test {now}`" in told


@pytest.mark.parametrize("package", ["sqlalchemy", "fastapi"])
def test_a_missing_package_names_its_remedy(out: Path, said, package: str) -> None:
    said("prepare", out)
    code = f"import sys; sys.modules['{package}'] = None; from replication.cli.main import main; "
    code += "sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "judge", "serve", str(out)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert f"the package {package} is missing; launch/install.sh judge" in one_line(done.stderr)


def test_status_answers_at_once(out: Path, said) -> None:
    """It loads neither torch nor what serves the page, asks models or does statistics."""
    said("prepare", out)
    slow = {"torch", "lightning", "fastapi", "starlette", "uvicorn", "jinja2", "openai", "numpy", "scipy"}
    code = (
        "import sys; from replication.cli.main import main\n"
        f"assert main(['judge', 'status', {str(out)!r}]) == 0\n"
        f"print(sorted({slow} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# ---------------------------------------------------------------- records that contradict one another


@pytest.fixture(scope="module")
def voted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose panel is full and locked."""
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("voted") / "out"))
    assert run("prepare", root) == 0
    vote_everything(root)
    assert run("lock", root, "--yes") == 0
    return root


def write_votes(out: Path, lines: list[str]) -> None:
    """Votes, and the hash of them where it stands."""
    (out / "votes.csv").write_text("".join(lines))
    note = read_json(out / "votes.json")
    write_text(out / "votes.json", json.dumps(note | {"votes_sha256": file_sha256(out / "votes.csv")}))


def turn_a_vote(out: Path) -> None:
    lines = (out / "votes.csv").read_text().splitlines(keepends=True)
    i = next(i for i, line in enumerate(lines) if ",left," in line)
    write_votes(out, [*lines[:i], lines[i].replace(",left,", ",right,"), *lines[i + 1 :]])


def lose_a_vote(out: Path) -> None:
    """One that is no repeat, which would count for nothing, and that none repeats, which could not be read then."""
    lines = (out / "votes.csv").read_text().splitlines(keepends=True)
    votes = read_votes(out / "votes.csv")
    repeated = {vote.repeat_of for vote in votes}
    i = next(i for i, vote in enumerate(votes) if not vote.repeat_of and vote.vote_id not in repeated)
    write_votes(out, lines[: 1 + i] + lines[2 + i :])


def turn_it_in_the_database(out: Path) -> None:
    store = store_of(out)
    with store.database.write() as c:
        c.exec_driver_sql("UPDATE judging_votes SET choice = 'tie' WHERE vote_id = 1 AND choice != 'tie'")
        c.exec_driver_sql("UPDATE judging_votes SET choice = 'both_bad' WHERE vote_id = 2")
    store.database.close()
    assert run("export", out) == 0


def swap_the_arms(out: Path) -> None:
    key = read_json(out / "sealed" / "key.json")
    for behind in key["items"].values():
        behind["arm_first"], behind["arm_second"] = behind["arm_second"], behind["arm_first"]
    write_text(out / "sealed" / "key.json", json.dumps(key, indent=1))


def damage_the_database(out: Path) -> None:
    for path in (out / "judging").glob("judging.sqlite-*"):
        path.unlink()
    (out / "judging" / "judging.sqlite").write_bytes(b"no database" * 9)


LEDGER = "votes.csv is not the file that the lock wrote, by ledger.jsonl"
CHEATS = {
    "a vote turned": (turn_a_vote, ["votes.csv has 1 vote other than in the panel's database", LEDGER]),
    "a vote lost": (lose_a_vote, ["votes.csv lacks 1 vote of the panel's database", LEDGER]),
    "the database": (turn_it_in_the_database, [LEDGER]),
    "the record gone": (
        lambda out: (out / "votes.csv").unlink(),
        ["votes.csv is gone, of a locked panel"],
    ),
    "the key": (
        swap_the_arms,
        [
            "the sealed key is not of the key that the panel's database has named since it was made",
            "which arm stands behind an item is not the same in the sealed key and in the panel's database",
        ],
    ),
    "a damaged database": (
        damage_the_database,
        ["the panel cannot be compared with its records (file is not a database)"],
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_votes_key_and_database_that_contradict_one_another_withhold_the_verdict(
    voted: Path, tmp_path: Path, name: str
) -> None:
    suite_dir = SuiteDir(Path(shutil.copytree(voted, tmp_path / "out")))

    def named() -> set[str]:
        found = check_plan(suite_dir, load_suite(suite_dir.suite))
        assert {entry.why for entry in found.withheld} <= {*found.deviations}
        return {entry.why for entry in found.withheld}

    assert named() == set()
    cheat, words = CHEATS[name]
    cheat(suite_dir.root)
    assert named() == {*words}


def test_a_returned_place_is_given_to_the_next_and_its_votes_are_withdrawn(out: Path, said) -> None:
    said("prepare", out)
    store = store_of(out)
    for n in range(3):
        store.claim(f"token {n}", Recruit(f"{n:024x}", "study", "session"))
        vote_all(store, f"judge-00{n + 1}", at_random(n), most=2)
    export = out / "submissions.csv"
    states = ("RETURNED", "TIMED-OUT", "ACTIVE")
    export.write_text("Participant id,Status\n" + "".join(f"{n:024x},{state}\n" for n, state in enumerate(states)))
    told = said("reclaim", out, "--export", export)
    assert "judge-001.2 has the same pairs" in told and "judge-002.2 has" in told and "judge-003" not in told
    assert "has the same" not in said("reclaim", out, "--export", export), "once"
    assert read_withdrawals(SuiteDir(out)).of("judge").keys() == {"judge-001"}
    assert "judge-003.2" in said("reclaim", out, "--judge-id", "judge-003")
    assert "cannot be read" in one_line(said("reclaim", out, "--export", out / "nothing.csv", code=2))
    one_line(said("reclaim", out, code=2))
    assert "not taken:    4 sets" in said("status", out)


STUDY = """
consent: {text: You agree that votes are published., contact: us@example.org, withdrawal: Write to us.}
check: {What counts?: [All of it, The length]}
ask_reason: true
completion: {pay: 5 pounds, code: D0NE, url: "URL?cc=D0NE", screened_out_code: S0RRY}
"""


@contextmanager
def recruiting_site() -> Iterator[tuple[str, list[str]]]:
    """The address at which a site takes back those whom it sent, and what it was asked there."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/submissions/complete", asked
        server.shutdown()


def test_a_study_at_a_recruiting_site_from_the_first_participant_to_the_dataset(out: Path, said) -> None:
    """One fails the check, one returns the place, one goes all the way; a withdrawal; nobody else's vote is touched."""
    with recruiting_site() as (url, asked):
        (out / "study.yaml").write_text(STUDY.replace("URL", url))
        flags = ("--judges", 1, "--votes", 30, "--attention", 1)
        assert "1 set of 30 pairs, 3 repeats and 1 attention item" in said(
            "prepare", out, "--study", out / "study.yaml", *flags
        )
        join = (out / "judging" / "join-token").read_text().strip()

        def come(name: str, tries: list[str], most: int = 99) -> str:
            """Go from the site's link as far as the page leads, or to so many votes; the last page."""
            with httpx.Client(base_url=address, follow_redirects=True, timeout=60) as browser:
                link = f"/join/{join}?PROLIFIC_PID={name * 24}&STUDY_ID=st&SESSION_ID={name}"
                page = browser.get(link)
                page = (
                    page if "/j/" in str(page.url) else browser.post(link, data=PageReader(page.text).forms[0].hidden)
                )
                while True:
                    reader = PageReader(page.text)
                    if form := reader.form("/start"):
                        assert "5 pounds" in page.text
                        assert browser.post(form.action).status_code == 422, "without consent nothing is shown"
                        page = browser.post(form.action, data={"consent": "yes"})
                    elif form := reader.form("/check"):
                        page = browser.post(form.action, data={**form.hidden, "q0": tries.pop(0)})
                    elif form := reader.form("/survey"):
                        page = browser.post(form.action, data={"skip": "yes"})
                    elif (form := reader.form("/vote")) and most:
                        data = {**form.hidden, "choice": "left", "reason": "It holds together."}
                        page, most = browser.post(form.action, data=data), most - 1
                    else:
                        return page.text

        def listed(**states: str) -> str:
            lines = [f"{name * 24},{state}" for name, state in states.items()]
            (out / "export.csv").write_text("\n".join(["Participant id,Status", *lines, ""]))
            return said("reclaim", out, "--export", out / "export.csv")

        def states() -> dict[str, str]:
            return {judge.judge_id: judge.state for judge in judge_progress(store_of(out).database)}

        with served(store_of(out)) as address:
            assert "S0RRY" in come("a", ["The length", "The length"]) and states() == {"judge-001": "screened out"}
            assert "All places are taken" in come("b", [])
            assert "judge-001.2 has the same pairs" in listed(a="SCREENED-OUT")
            assert "Pair 6 of 34" in come("b", ["The length", "All of it"], most=5)
            assert "judge-001.2.2 has the same pairs" in listed(a="SCREENED-OUT", b="RETURNED")
            assert "This place was given up" in come("b", [])
            assert states() == {"judge-001": "gave up", "judge-001.2": "gave up", "judge-001.2.2": "not started"}
            last = come("c", ["All of it"])
            assert "All of your 34 votes are stored" in last and "D0NE" in last
            assert come("c", []) == last, "who comes again is led back"
            (back,) = re.findall(r'class="button" href="([^"]+)"', last)
            httpx.get(back)
            assert asked == ["/submissions/complete?cc=D0NE"]
    with store_of(out).database.read() as c:
        (n,) = c.exec_driver_sql("SELECT count(*) FROM judging_votes WHERE undone_at IS NULL").one()
    assert n == 5 + 34, "no vote is lost, none is there twice"
    said("lock", out, "--yes", "--early", "one place")
    assert read_withdrawals(SuiteDir(out)).of("judge").keys() == {"judge-001.2"}
    said("export", out, "--dataset", out / "dataset")
    rows = [json.loads(line) for line in (out / "dataset" / "votes.jsonl").read_text().splitlines()]
    assert len(rows) == 33 and {row["judge_id"] for row in rows} == {"judge-001.2.2"}
    assert {row["reason"] for row in rows} == {"It holds together."}
    card = (out / "dataset" / "README.md").read_text()
    assert "without those of 1 judge who" in card and "You agree that votes are published." in card
    assert "cccc" not in (out / "judging" / "judges.csv").read_text()


def test_a_custodian_holds_the_key_and_whoever_reads_it_before_the_lock_leaves_a_trace(
    out: Path, tmp_path: Path, said, capsys: pytest.CaptureFixture[str]
) -> None:
    custodian = tmp_path / "custodian"
    custodian.mkdir(mode=0o750)
    assert f"{custodian}/key.json" in said("prepare", out, "--key-to", custodian)
    key = custodian / "key.json"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and not (out / "sealed").exists()
    assert stat.S_IMODE(custodian.stat().st_mode) == 0o750, "the custodian's own folder"
    said("invite", out, "--judges", 5, "--key", custodian, "--csv")  # a further set needs the key
    assert "--key" in one_line(said("invite", out, "--judges", 1, code=2))
    long_ago = key.stat().st_mtime - 60  # so that any reading moves the time of access, also where a mount is sparing
    os.utime(key, (long_ago, key.stat().st_mtime))
    found = SuiteDir(out, custodian)
    assert [*panel_contradictions(found)] == [] and key.stat().st_atime == long_ago, (
        "a check before the lock reads none"
    )
    assert read_by_others(custodian) is None, "our own reading is none"
    key.read_bytes()
    facts = key.stat()
    os.utime(key, (facts.st_mtime + 60, facts.st_mtime))  # what a reading leaves, where the mount keeps such times
    vote_everything(out)
    assert "with --key" in one_line(said("lock", out, "--yes", code=2))
    assert "key read" in said("lock", out, "--yes", "--key", custodian)
    read_at = read_json(out / "votes.json")["key_read_at"]
    assert read_at is not None and read_ledger(SuiteDir(out)).of("lock")[0].facts["key_read_at"] == read_at
    said("lock", out, "--yes", "--key", custodian)
    assert read_json(out / "votes.json")["key_read_at"] == read_at, "locking again keeps it"
    assert main(["report", str(out), "--key", str(custodian)]) == 0
    page = (out / "report.md").read_text()
    assert f"Its file was read at {read_at} by something else" in page and "sealed key is not of" not in page
    key.write_text(key.read_text().replace('"arm_first": "both"', '"arm_first": "BOTH"', 1))
    assert main(["plan", "check", str(out), "--key", str(custodian)]) == 1
    assert "- the sealed key is not of the key that the panel's database has named" in capsys.readouterr().out
