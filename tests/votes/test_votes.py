"""The vote record: what is written is read, and what cannot be a vote is refused by name."""

import dataclasses
import math

import pytest
from vote_records import write_votes

from replication.errors import UserError
from replication.runs.files import file_sha256, write_json
from replication.runs.records import write_record
from replication.votes.record import COLUMNS, PanelRecord, Vote, VotesNote, read_note, read_panel_record, read_votes

VOTE = Vote(
    "v1", "s", 1, "baseline", "both", 7, 0, 2, "judge-a", "human", "", "left", "2026-11-24T10:00:00+0000", 21.5, ""
)


def test_a_record_survives_writing_and_reading(tmp_path):
    model = dataclasses.replace(
        VOTE, vote_id="v2", judge_id='comma, "quote"\nand line', judge_kind="model", vendor="a", seconds=math.nan
    )
    again = dataclasses.replace(VOTE, vote_id="v3", choice="both_bad", repeat_of="v1")
    write_votes(tmp_path / "votes.csv", [VOTE, model, again])
    first, second, third = read_votes(tmp_path / "votes.csv")
    assert (first, third) == (VOTE, again)
    assert math.isnan(second.seconds) and dataclasses.replace(second, seconds=0.0) == dataclasses.replace(
        model, seconds=0.0
    )


def test_the_note_beside_a_record_says_how_it_was_locked_and_whether_it_is_still_that(tmp_path):
    votes, note = tmp_path / "votes.csv", tmp_path / "votes.json"
    write_votes(votes, [VOTE])
    assert read_note(note, votes) is None, "votes from elsewhere"
    facts = {"locked_at": "2030-01-02T03:04:05+00:00", "votes_sha256": file_sha256(votes), "n_refusals": 2,
             "n_garbage": 1, "n_repeats_without_first_vote": 4, "n_attention_asked": 5,
             "n_attention_passed": 3,
             "of_no_concern": []}  # fmt: skip
    write_json(note, facts | {"locked_early_because": None})
    found = read_note(note, votes)
    assert found and found.changed is False and found.warning == ""
    assert "when nothing planned was missing" in found.lines[0] and "before" not in found.lines[0]
    assert "3 answers of models were no choice (refusals: 2; not readable: 1)" in found.lines[1]
    assert found.lines[2].endswith("was never cast: 4.") and len(found.lines) == 4
    assert found.lines[3] == "Attention items: people chose what was asked of them in 3 of 5."
    write_json(note, facts | {"locked_early_because": "the lab closed"})
    votes.write_text(votes.read_text().replace(",left,", ",right,"))
    found = read_note(note, votes)
    assert found and found.changed and "votes.csv is not the file that was written" in found.warning
    assert "before all planned votes were in. The reason given: the lab closed" in found.lines[0]
    votes.unlink()
    assert read_note(note, votes).changed, "votes that are gone are changed"  # type: ignore[union-attr]


@pytest.mark.parametrize("damaged", ["[]", '{"n_refusals": "2"}', '{"votes_sha256": 3}', "{"])
def test_a_note_that_is_damaged_is_one_line(tmp_path, damaged):
    (tmp_path / "votes.json").write_text(damaged)
    with pytest.raises(UserError, match=r"votes\.json") as caught:
        read_note(tmp_path / "votes.json", tmp_path / "votes.csv")
    assert "\n" not in str(caught.value)


def test_a_record_of_another_folder_is_named(tmp_path):
    """Copied whole, with its votes.json, every hash is right."""
    write_votes(tmp_path / "votes.csv", [VOTE])
    write_json(tmp_path / "votes.json", {"panel_id": "aa", "votes_sha256": file_sha256(tmp_path / "votes.csv")})
    write_json(tmp_path / "judging" / "panel.json", {"panel_id": "bb"})
    found = read_note(tmp_path / "votes.json", tmp_path / "votes.csv")
    assert found and "votes.csv is of another panel than bb" in found.warning


def test_a_record_that_is_cut_anywhere_is_refused_or_lacks_whole_votes(tmp_path):
    again = (
        dataclasses.replace(VOTE, vote_id="v12", prompt_id=8),
        dataclasses.replace(VOTE, vote_id="v3", repeat_of="v12", prompt_id=8),
    )
    write_votes(tmp_path / "votes.csv", votes := [VOTE, *again])
    whole = (tmp_path / "votes.csv").read_bytes()
    for n in range(1, len(whole)):
        (tmp_path / "votes.csv").write_bytes(whole[:n])
        try:
            found = read_votes(tmp_path / "votes.csv")
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert found == votes[: len(found)] and whole[:n].endswith(b"\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: [rows[0], rows[1] + ",x"], "line 2: has more cells"),
        (lambda rows: [rows[0], rows[1].rpartition(",")[0]], "line 2: has fewer cells"),
        (lambda rows: [rows[0] + ",seed", rows[1] + ",1"], "has the column seed twice"),
        (lambda rows: [rows[0], rows[1], rows[1]], "'v1' comes twice"),
        (lambda rows: [rows[0], rows[1].replace(",1,", ",1_0,", 1)], "seed is '1_0', which must be a whole number"),
        (lambda rows: [rows[0], rows[1].replace(",7,", "," + "9" * 5000 + ",")], "must be a whole number of 64 bits"),
        (lambda rows: [rows[0], "x" * (1 << 21)], "field larger than field limit"),
        (lambda rows: [rows[0], "\0" + rows[1][1:]], ""),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, damage, said):
    write_votes(tmp_path / "votes.csv", [VOTE])
    rows = (tmp_path / "votes.csv").read_text().splitlines()
    (tmp_path / "votes.csv").write_text("\n".join(damage(rows)) + "\n")
    if not said:  # read, as a name that differs
        assert read_votes(tmp_path / "votes.csv")[0].vote_id != "v1"
        return
    with pytest.raises(UserError, match=r"votes\.csv") as error:
        read_votes(tmp_path / "votes.csv")
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_record_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "votes.csv").mkdir()
    with pytest.raises(UserError, match=r"votes\.csv: cannot be read"):
        read_votes(tmp_path / "votes.csv")


def test_no_file_is_no_votes(tmp_path):
    assert read_votes(tmp_path / "votes.csv") == []


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("choice", "middle", "choice is 'middle', which must be one of left, right, tie, both_bad"),
        ("judge_kind", "cat", "judge_kind is 'cat'"),
        ("seed", "one", "seed is 'one', which must be a whole number of 64 bits"),
        ("prompt_id", "1" + "0" * 20, "which must be a whole number of 64 bits"),
        ("repeat_of", "v1", "which is not a first vote on the same completions by the same judge"),
        ("seconds", "-1", "seconds is '-1'"),
        ("seconds", "soon", "seconds is 'soon'"),
        ("judge_id", "", "judge_id is empty"),
        ("arm_right", "baseline", "arm_left and arm_right are both 'baseline'"),
        ("repeat_of", "v9", "repeats 'v9', which is not in the file"),
    ],
)
def test_what_cannot_be_a_vote_is_refused_by_line_and_column(tmp_path, column, value, said):
    write_votes(tmp_path / "votes.csv", [VOTE])
    lines = (tmp_path / "votes.csv").read_text().splitlines()
    cells = lines[1].split(",")
    cells[COLUMNS.index(column)] = value
    (tmp_path / "votes.csv").write_text("\n".join([lines[0], ",".join(cells)]) + "\n")
    with pytest.raises(UserError, match=r"votes\.csv") as error:
        read_votes(tmp_path / "votes.csv")
    assert said in str(error.value)


def test_a_missing_column_and_a_double_id_are_refused(tmp_path):
    (tmp_path / "votes.csv").write_text("vote_id,suite\nv1,s\n")
    with pytest.raises(UserError, match="lacks the column seed"):
        read_votes(tmp_path / "votes.csv")
    write_votes(tmp_path / "votes.csv", [VOTE, VOTE])
    with pytest.raises(UserError, match="'v1' comes twice"):
        read_votes(tmp_path / "votes.csv")


def test_a_first_vote_that_comes_twice_is_refused(tmp_path):
    swapped = dataclasses.replace(
        VOTE, vote_id="v2", arm_left="both", arm_right="baseline", sample_left=2, sample_right=0
    )
    write_votes(tmp_path / "votes.csv", [VOTE, swapped])
    with pytest.raises(UserError, match="on the same completions by the same judge as 'v1'"):
        read_votes(tmp_path / "votes.csv")
    write_votes(tmp_path / "votes.csv", [VOTE, dataclasses.replace(swapped, repeat_of="v1")])
    assert len(read_votes(tmp_path / "votes.csv")) == 2


def test_records_of_earlier_versions_are_read(tmp_path):
    """votes.json and panel.json without a version, with keys that are null or missing, and with one of no concern."""
    write_votes(tmp_path / "votes.csv", [VOTE])
    write_json(tmp_path / "votes.json", {"panel_id": "aa", "n_refusals": None, "later": [1], "n_garbage": 1})
    write_json(tmp_path / "judging" / "panel.json", {"panel_id": "aa", "suite": "s", "judges": 2, "repeat_share": 0})
    found = read_note(tmp_path / "votes.json", tmp_path / "votes.csv")
    assert found and (found.changed, found.warning, found.note.schema_version) == (None, "", None)
    assert "1 answer of a model was no choice (refusals: 0; not readable: 1)" in found.lines[0]
    panel = read_panel_record(tmp_path / "judging")
    assert (panel.panel_id, panel.judges, panel.repeat_share, panel.database) == ("aa", 2, 0.0, None)
    assert read_panel_record(tmp_path / "elsewhere") == PanelRecord()
    write_record(tmp_path / "votes.json", note := VotesNote(panel_id="aa", n_votes=1, schema_version=1))
    assert read_note(tmp_path / "votes.json", tmp_path / "votes.csv").note == note  # type: ignore[union-attr]
