"""The audit finds what does not add up, and nothing else: on a made-up paper, and on the published one where it is."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import PUBLISHED
from published_data import CLAIMS, VOTES, losses_file, votes_file, write_claims, write_data
from scipy import stats as scipy_stats

from replication.audit import audit as audits
from replication.audit.audit import CANNOT, DIFFERS, SAME, Audit, audit, cluster, markdown
from replication.audit.claims import load_claims, same, shown
from replication.audit.published import load_published
from replication.audit.recompute import FUNCTIONS, OF_TALLY, Figures
from replication.cli.main import main
from replication.config import config_root
from replication.errors import UserError
from replication.votes.tally import Tally

SHIPPED = config_root() / "claims" / "precision_weighted_training.yaml"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the author's data files are not at {PUBLISHED}; REPLICATION_PUBLISHED names them"
)


def differing(found: Audit) -> set[str]:
    return {row.id for row in found.of(DIFFERS)}


# ---------------------------------------------------------------- a made-up paper


def test_a_paper_whose_figures_add_up(tmp_path: Path) -> None:
    found = audit(write_data(tmp_path / "data"), write_claims(tmp_path))
    assert differing(found) == set()
    assert [row.id for row in found.of(CANNOT)] == ["r"]
    assert len(found.of(SAME)) == 36 + 14 - 1
    assert all(entry.verdict == SAME for entry in found.stated)


@pytest.mark.parametrize(
    ("id", "right", "wrong"),
    [
        ("all.models.n", '["12",', '["13",'),
        ("all.humans.b%", '"60.0 %", "0.607"', '"60.1 %", "0.607"'),
        ("all.everyone.p", '"0.108"', '"0.107"'),
        ("leans.gain", 'printed: "6"', 'printed: "5"'),
        ("lowest", "printed: H2", "printed: H1"),
        ("filters", 'printed: "yes"', 'printed: "no"'),
        ("order", 'printed: "none"', 'printed: "6 (4 votes, 5 judges)"'),
        ("loss", 'printed: "+0.05"', 'printed: "-0.05"'),
        ("growth", 'printed: "+100 %"', 'printed: "+101 %"'),
        ("saturated", 'printed: "50 %"', 'printed: "> 95 %"'),
    ],
)
def test_a_misprint_is_the_only_thing_that_differs(tmp_path: Path, id: str, right: str, wrong: str) -> None:
    assert CLAIMS.count(right) == 1
    found = audit(write_data(tmp_path / "data"), write_claims(tmp_path, CLAIMS.replace(right, wrong)))
    assert differing(found) == {id}


def test_one_vote_changes_the_rows_that_count_it(tmp_path: Path) -> None:
    row = VOTES["Author"]
    assert row[3] == "a"
    votes = {**VOTES, "Author": row[:3] + "b" + row[4:]}
    found = audit(write_data(tmp_path / "data", votes), write_claims(tmp_path))
    with_author = {f"all.{who}.{cell}" for who in ("everyone", "humans", "no fast humans", "no ties")
                   for cell in ("a", "b", "b%", "p")}  # fmt: skip
    assert differing(found) == with_author | {"prompts.b", "prompts.open"}


def test_a_judge_who_judges_a_prompt_twice_shows(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    content = votes_file()
    details = content["question_majorities"]["details"]
    details[1]["b"], details[2]["b"] = details[1]["b"] + 1, details[2]["b"] - 1
    (folder / "votes.json").write_text(json.dumps(content))
    found = audit(folder, write_claims(tmp_path))
    assert {row.id: row.recomputed for row in found.of(DIFFERS)} == {
        "order": "2 (7 votes, 6 judges), 3 (5 votes, 6 judges)",
        "leans.gain": "5",  # the third prompt is even now
    }


def test_sums_that_the_file_states_are_checked(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    content = votes_file()
    content["headline"]["b"] += 1
    (folder / "votes.json").write_text(json.dumps(content))
    found = audit(folder, write_claims(tmp_path))
    wrong = [(entry.what, entry.stated, entry.recomputed) for entry in found.stated if entry.verdict == DIFFERS]
    assert wrong == [("headline, from the judges: b", 18, 17), ("headline, from the prompts: b", 18, 17)]
    assert differing(found) == set(), "figures come from the rows, not from the file's own sums"


def test_the_late_loss_has_its_error(tmp_path: Path) -> None:
    found = audit(write_data(tmp_path / "data"), write_claims(tmp_path))
    assert found.late_loss is not None and found.late_loss.checkpoints == 2
    assert found.late_loss.difference == pytest.approx(0.05)
    assert found.late_loss.standard_error == pytest.approx(math.sqrt((0.02 + 0.005) / 2))
    assert found.late_loss.one_earlier == pytest.approx((4.0 + 3.0) / 2 - (4.1 + 3.0) / 2)
    assert found.late_loss.autocorrelation < 0  # of three differences, .05, .05 and then -.1 or so
    short = {run: {"trajectory": curve["trajectory"][:2]} for run, curve in losses_file().items()}
    (tmp_path / "data" / "losses.json").write_text(json.dumps(short))
    assert audit(tmp_path / "data", write_claims(tmp_path)).late_loss is None


def test_a_smoothed_point_has_the_error_that_neighbours_leave_it(tmp_path: Path) -> None:
    """Of an AR(1) series, beside the spread of the means of many windows."""
    rng, r, n, window = np.random.default_rng(0), 0.6, 40_000, 10
    series = np.zeros(n)
    for i in range(1, n):
        series[i] = r * series[i - 1] + rng.normal()
    rows = {
        run: {"run_id": "x", "trajectory": [{"step": i, "train_loss": 1.0, "val_loss": v} for i, v in enumerate(of)]}
        for run, of in (("gain", (4 + series).tolist()), ("baseline", [4.0] * n))
    }
    folder = write_data(tmp_path / "data")
    (folder / "losses.json").write_text(json.dumps(rows))
    figures = Figures(load_published(folder, load_claims(write_claims(tmp_path)).files))
    means = series.reshape(-1, window).mean(1)
    assert figures.checkpoint_autocorrelation("gain", "baseline") == pytest.approx(r, abs=0.02)
    assert figures.smoothed_error("gain", "baseline", window=window) == pytest.approx(means.std(ddof=1), rel=0.05)
    alone = np.sqrt(series.var() / window)
    assert figures.smoothed_error("gain", "baseline", window=window) > 1.5 * alone, "as if independent"


def test_claims_are_counted_apart_from_cells(tmp_path: Path) -> None:
    found = audit(write_data(tmp_path / "data"), write_claims(tmp_path))
    n = len({row.entry for row in found.rows})
    assert found.claims == {SAME: n - 1, CANNOT: 1} and found.claims.total() < len(found.rows)
    assert found.largest_table[1] == len([row for row in found.rows if row.entry == "all"])
    wrong = audit(tmp_path / "data", write_claims(tmp_path, CLAIMS.replace('["12",', '["13",')))
    assert wrong.claims[DIFFERS] == 1, "a table with a wrong cell"


# ---------------------------------------------------------------- digits


@pytest.mark.parametrize(
    ("printed", "value", "expected"),
    [
        ("59.9 %", 470 / 784, True),
        ("60.0 %", 470 / 784, False),
        ("46.2 %", 74 / 160, True),  # 46.25: a tie may go either way
        ("46.3 %", 74 / 160, True),
        ("46.4 %", 74 / 160, False),
        ("2.80e-8", 2.8015e-8, True),
        ("2.80e-8", 2.806e-8, False),
        ("1,181", 1181, True),
        ("1,181", 1180, False),
        ("+0.004", 0.00415, True),
        ("-0.27 points", -0.00265, True),
        ("~6,000", 6068.0, True),
        ("6,000", 6068.0, False),
        ("~12", 12.4, True),
        ("< 0.005", 0.0045, True),
        ("< 0.005", 0.005, False),
        (">= 35", 34, False),
        ("> 50 %", 0.51, True),
        ("yes", True, True),
        ("yes", False, False),
        ("H2", "H2", True),
        ("none", float("nan"), True),
        ("50.0 %", float("nan"), False),
    ],
)
def test_printed_digits_decide(printed: str, value: Any, expected: bool) -> None:
    assert same(printed, value) is expected


@pytest.mark.parametrize(
    ("printed", "value", "text"),
    [
        ("63.1 %", 377 / 599, "62.938 %"),
        ("5.3e-11", 2.5016e-10, "2.502e-10"),
        ("8", 12, "12"),
        ("6 %", 61 / 1181, "5.17 %"),
        ("+132 %", 1.278, "+127.80 %"),
        ("3.93e9", 3932160000, "3.9322e9"),
        ("42", float("nan"), "none"),
    ],
)
def test_recomputed_values_show_two_digits_more(printed: str, value: Any, text: str) -> None:
    assert shown(value, printed) == text


def test_p_is_the_exact_two_sided_one() -> None:
    tail = sum(math.comb(25, k) for k in range(17, 26)) / 2**25
    assert OF_TALLY["p"](Tally(8, 17, 10)) == pytest.approx(2 * tail, rel=1e-12)
    assert math.isnan(OF_TALLY["p"](Tally(0, 0, 3)))


# ---------------------------------------------------------------- clusters


def test_alike_clusters_leave_no_doubt_and_unlike_ones_do() -> None:
    alike = cluster("prompts", [Tally(1, 3, 5)] * 8)
    assert (alike.low, alike.share, alike.high) == (0.75, 0.75, 0.75)
    assert alike.sign_p == pytest.approx(2 / 2**8) == alike.wilcoxon_p and math.isnan(alike.t_p)
    unlike = cluster("prompts", [Tally(0, 4, 0)] * 6 + [Tally(4, 0, 0)] * 2)
    # of eight clusters drawn, k are for gain: binomial(8, 3/4), whose 2.5 and 97.5 % points are 3 and 8
    assert (unlike.low, unlike.share, unlike.high) == (3 / 8, 0.75, 1.0)
    t = 0.25 / (math.sqrt(3 / 14) / math.sqrt(8))  # of six shares of 1 and two of 0
    assert unlike.t_p == pytest.approx(2 * scipy_stats.t.sf(t, 7))


def test_one_cluster_has_no_interval_and_ties_have_no_share() -> None:
    one = cluster("judges", [Tally(1, 3, 0), Tally(0, 0, 9)])
    assert one.n_decisive == 1 and math.isnan(one.low) and one.share == 0.75
    none = cluster("judges", [Tally(0, 0, 9)] * 3)
    assert math.isnan(none.share) and math.isnan(none.sign_p) and math.isnan(none.wilcoxon_p)


# ---------------------------------------------------------------- the command line


def test_the_verb_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = write_claims(tmp_path, CLAIMS.replace('"60.0 %", "0.607"', '"61.0 %", "0.607"'))
    argv = ["audit", str(write_data(tmp_path / "data")), "--claims", str(claims), "--out", str(tmp_path / "out")]
    assert main(argv) == 0, "what differs is a finding, not an error"
    shorter = capsys.readouterr().out
    assert "15 claims, a table counted once: 13 same, 1 differs, 1 not recomputable" in shorter
    assert "50 cells and sentences (35 same in headline): 48 same, 1 differs, 1 not recomputable" in shorter
    assert "cannot be answered" in shorter
    assert "Not recomputable" in shorter and "The same (" not in shorter
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert {v: content["counts"][v] for v in (SAME, DIFFERS, CANNOT)} == {SAME: 48, DIFFERS: 1, CANNOT: 1}
    text = (tmp_path / "out" / "audit.md").read_text()
    assert "| headline: humans, b% | table 1 | 61.0 % | 60.000 % |" in text
    assert "anything about seeds" in text and "nan" not in text.lower().replace("finan", "")
    assert main([*argv[:4], "--all"]) == 0
    assert "The same (48)" in capsys.readouterr().out


def replaced(old: str, new: str) -> str:
    assert CLAIMS.count(old) >= 1
    return CLAIMS.replace(old, new, 1)


@pytest.mark.parametrize(
    ("claims", "data", "message"),
    [
        (CLAIMS, {"losses.json": None}, "losses.json: no such file"),
        (CLAIMS, {"votes.json": "{"}, "votes.json: not valid JSON"),
        (CLAIMS, {"votes.json": "[]"}, "votes.json: votes must have keys of its own"),
        (CLAIMS, {"last.json": "[]"}, "last.json: finals must have keys of its own"),
        (CLAIMS, {"prompts.json": '[{"id": 1}]'}, "prompts.json: prompts[0].question is missing"),
        (CLAIMS, {"losses.json": '{"gain": {}}'}, "losses.json: losses.gain.trajectory is missing"),
        (CLAIMS, {"divergences.json": "{}"}, "divergences.json: divergences must be a list"),
        (replaced("recompute: final,", "recompute: fnal,"), {}, "final: no function 'fnal'"),
        (replaced("key: val_loss", "ky: val_loss"), {}, "final: final: missing a required argument: 'key'"),
        (replaced("{type: FM}, printed", "{tipe: FM}, printed"), {}, "all.models.n: votes: the data hold no rule"),
        (replaced("category: open", "category: opn"), {}, "the data hold no category 'opn'"),
        (replaced("args: {which: min, decisive_below: 4}}", "args: {which: least}}"), {}, "the data hold no 'least'"),
        (replaced("run: gain, key", "run: gian, key"), {}, "the data hold no metric val_loss of 'gian'"),
        (replaced("id: range", "id: growth"), {}, "id growth comes twice"),
        (replaced("where: text, printed", "wo: text, printed"), {}, "claims[3].wo: no such key; the keys are id"),
        (replaced('printed: "6"', "printed: 6"), {}, "].printed: must be text in quotes"),
        (replaced("why_not: votes by prompt and type are not published", "reading: none"), {}, "r: give either"),
        (replaced("votes: votes.json, ", ""), {}, "the role 'votes' is missing"),
        ("claims: [", {}, "claims.yaml: not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], claims: str, data: dict[str, str | None], message: str
) -> None:
    folder = write_data(tmp_path / "data")
    for name, text in data.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    assert main(["audit", str(folder), "--claims", str(write_claims(tmp_path, claims))]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


ONE = """files: {votes: votes.json}
claims:
  - {id: one, what: w, where: text, printed: "2", recompute: product, args: {of: [1, 2]}}
"""
TABLE = """files: {votes: votes.json}
claims:
  - {id: one, what: w, where: text, recompute: votes, columns: {n: {count: n}}, rows: {all: {printed: ["35"]}}}
"""


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (ONE, "of: [1, 2]", "of: abc", "one: product: could not convert string to float"),
        (ONE, "of: [1, 2]", "of: 5", "one: product: 'int' object is not iterable"),
        (ONE, "recompute: product, args: {of: [1, 2]}", "recompute: stated, args: {role: votes, path: headline.n.x}",
         "one: stated: the data hold no key headline.n.x"),
        (ONE, "recompute: product, args: {of: [1, 2]}", "recompute: stated, args: {role: votes, path: 5}",
         "one: stated: 'int' object has no attribute 'split'"),
        (ONE, "args: {of: [1, 2]}", "args: [1, 2]", "line 3: claims[0].args: must have keys of its own"),
        (ONE, "id: one", "id: [a]", "line 3: claims[0].id: must be text"),
        (ONE, "where: text", "where: [7.2]", "line 3: claims[0].where: must be text"),
        (ONE, "recompute: product", "recompute: [product]", "line 3: claims[0].recompute: must be text"),
        (ONE, 'printed: "2"', "printed: twelve", "one: printed 'twelve' is not a number"),
        (ONE, 'printed: "2"', "printed: 1e999", "claims[0].printed: must be text in quotes"),
        (ONE, "what: w", "what: w, what: v", "line 3: key 'what' comes twice"),
        (ONE, "files: {", "files: {votes: v.json, ", "key 'votes' comes twice"),
        (ONE, "{votes: votes.json}", "{votes: 5}", "files.votes: must be a file name or a list"),
        (ONE, "{votes: votes.json}", "{votes: null}", "files.votes: must be a file name or a list"),
        (ONE, "{votes: votes.json}", "{votes: []}", "files.votes: must be a file name or a list"),
        (ONE, "claims:", "cannot_answer:\nclaims:", "line 2: cannot_answer: must be a list"),
        (ONE, "claims:", "cannot_answer: no\nclaims:", "line 2: cannot_answer: must be a list"),
        (ONE, "claims:", "paper: [a]\nclaims:", "line 2: paper: must be text"),
        (ONE, "what: w", "what: \udcff", "claims.yaml: cannot be read as UTF-8 text"),
        (TABLE, '{all: {printed: ["35"]}}', "[1]", "claims[0].rows: must have keys of its own"),
        (TABLE, "{n: {count: n}}", "[a]", "claims[0].columns: must have keys of its own"),
        (TABLE, "n: {count: n}", "n: 5", "claims[0].columns.n: must have keys of its own"),
        (TABLE, '["35"]', "null", "claims[0].rows.all.printed: must be a list"),
        (TABLE, '["35"]', '["35", "36"]', "claims[0].rows.all: needs a list `printed` of 1"),
        (TABLE, '["35"]', '["35"], args: 3', "claims[0].rows.all.args: must have keys of its own"),
        (TABLE, '["35"]', '["35"], why_not: x', "claims[0].rows.all.why_not: no such key; the keys are printed"),
    ],
)  # fmt: skip
def test_a_malformed_claims_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, old: str, new: str, message: str
) -> None:
    assert text.count(old) == 1
    folder, claims = write_data(tmp_path / "data"), tmp_path / "claims.yaml"
    claims.write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
    assert main(["audit", str(folder), "--claims", str(claims)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_text_without_quotes_is_as_it_is_written(tmp_path: Path) -> None:
    claims = load_claims(write_claims(tmp_path, ONE.replace("where: text", "where: 7.20")))
    assert claims.claims[0].where == "7.20"


def test_what_a_merge_takes_over_may_be_overridden(tmp_path: Path) -> None:
    text = ONE.replace("args: {of: [1, 2]}", "args: {<<: {of: [7, 8]}, of: [1, 2]}")
    assert load_claims(write_claims(tmp_path, text)).claims[0].args == {"of": [1, 2]}


def test_a_judge_whose_votes_do_not_add_up_is_refused(tmp_path: Path) -> None:
    content = votes_file()
    content["judges"][2]["n"] += 1
    folder = write_data(tmp_path / "data")
    (folder / "votes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"judges\[2\]: n is 6, but a \+ b \+ ties is 5"):
        audit(folder, write_claims(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        audit(tmp_path / "nowhere", write_claims(tmp_path))


# ---------------------------------------------------------------- the published paper


def test_every_shipped_claim_names_a_function_and_its_arguments() -> None:
    claims = load_claims(SHIPPED)
    assert len(claims.claims) > 700 and claims.cannot_answer
    for claim in claims.claims:
        if claim.recompute is not None:
            inspect.signature(FUNCTIONS[claim.recompute]).bind(None, **claim.args)


@pytest.fixture(scope="module")
def found() -> Audit:
    return audits.audit(PUBLISHED, SHIPPED)


@needs_published
def test_the_published_vote_tables_are_reproduced(found: Audit) -> None:
    filters = [row.verdict for row in found.rows if row.entry == "filters"]
    assert filters == [SAME] * 8 * 7
    tables = ("headline", "headline_from_prompts", "categories", "backgrounds", "appendix_c", "majorities")
    assert {row.id for row in found.of(DIFFERS) if row.entry in tables} == set()
    assert len([row for row in found.rows if row.entry == "appendix_c"]) == 42 * 9
    assert all(entry.verdict == SAME for entry in found.stated) and len(found.stated) > 60


@needs_published
def test_the_known_misprints_are_found(found: Audit) -> None:
    rows = {row.id: (row.printed, row.recomputed) for row in found.of(DIFFERS)}
    assert rows["prompts.factual_baseline"] == ("5", "4")
    assert rows["filters.strictest_in_conclusion.strictest.share"] == ("63.1 %", "62.938 %")
    assert rows["filters.strictest_in_conclusion.strictest.p"] == ("5.3e-11", "2.502e-10")
    assert rows["range.others"] == ("8", "12")
    assert rows["earlier.first ten.p"] == ("1.98e-5", "2.3625e-5")
    assert {row.id for row in found.of(CANNOT)} >= {"agreement.r", "large.grad_norm.gain.mean"}


@needs_published
def test_prompts_and_judges_as_units(found: Audit) -> None:
    prompts, judges, *categories = found.clusters
    assert (prompts.low, prompts.high) == pytest.approx((0.516, 0.678), abs=0.004)
    assert (judges.low, judges.high) == pytest.approx((0.554, 0.642), abs=0.004)
    assert (prompts.for_gain, prompts.for_baseline, prompts.even) == (21, 10, 1)
    assert prompts.sign_p == pytest.approx(0.0708, abs=1e-4)
    assert (prompts.t_p, prompts.wilcoxon_p) == pytest.approx((0.0205, 0.0224), abs=1e-4)
    assert len(categories) == 7


@needs_published
def test_one_changed_vote_in_a_copy_shows(tmp_path: Path, found: Audit) -> None:
    copy = Path(shutil.copytree(PUBLISHED, tmp_path / "copy", copy_function=shutil.copyfile))
    path = copy / "phase3_ab_preference.json"
    content = json.loads(path.read_text())
    content["judges"][0]["a"] += 1
    content["judges"][0]["b"] -= 1
    path.write_text(json.dumps(content))
    changed = differing(audit(copy, SHIPPED))
    new = changed - differing(found)
    for who in ("all", "humans", "no speed-clickers", "no tie-biased", "no partials"):
        assert {f"filters.{who}.{cell}" for cell in ("baseline", "gain", "share", "p")} <= new
    assert not {id for id in new if id.startswith(("filters.foundation", "filters.no author", "filters.strictest."))}
    assert "categories.factual.gain" not in new, "the prompts' votes were not changed"


@needs_published
def test_the_report_of_the_published_audit_holds_every_row(found: Audit) -> None:
    text = markdown(found)
    assert text.count("\n| ") >= len(found.rows)
    assert "/work" not in text and "None" not in text
