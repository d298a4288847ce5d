"""Study: frames of the same numbers as journal, report and votes; and the report's figures and tables for a paper."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from paths import CHECKOUT
from reported import PLANTED, report
from run_files import read_journal
from synthetic_runs import build_suite

from replication import Study
from replication.cli.main import main
from replication.config import SuiteConfig
from replication.errors import UserError
from replication.report.drawing import arm_styles, save_vector
from replication.report.effects import paired_figure
from replication.report.results import read_results
from replication.report.study import leaves
from replication.runs.files import read_json
from replication.runs.layout import SuiteDir
from replication.votes.record import Vote, votes_text

VOTE = Vote("v1", "synthetic", 1, "baseline", "both", 1, 0, 0, "anna", "human", "", "right", "", 3.5, "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteDir, SuiteConfig]:
    suite_dir, suite = build_suite(
        tmp_path_factory.mktemp("study") / "out", seeds=(1, 2, 3), effects=PLANTED, failed={("token_gain", 3): 20}
    )
    suite_dir.votes.write_text(votes_text([VOTE]))
    report(suite_dir, suite)
    return suite_dir, suite


def test_metrics_are_the_values_of_the_journal(built: tuple[SuiteDir, SuiteConfig]) -> None:
    suite_dir, _ = built
    frame = Study(suite_dir.root).metrics()
    assert list(frame.columns) == ["cell", "arm", "seed", "step", "tag", "value"]
    for arm, seed in (("both", 2), ("token_gain", 3)):
        own = frame[(frame.arm == arm) & (frame.seed == seed)]
        found = {(step, tag): value for step, tag, value in zip(own.step, own.tag, own.value, strict=True)}
        lines = read_journal(suite_dir.cell(arm, seed).metrics)
        said = {(line["step"], tag): value for line in lines for tag, value in line.items()}
        numbers = {key: value for key, value in said.items() if isinstance(value, float | int) and key[1] != "step"}
        assert found == numbers
        assert set(own.cell) == {f"{arm}/seed-{seed}"}


def test_per_step_metrics_have_every_step_once(built: tuple[SuiteDir, SuiteConfig]) -> None:
    suite_dir, _ = built
    frame = Study(suite_dir.root).metrics(per_step=True)
    own = frame[(frame.cell == "both/seed-1") & (frame.tag == "train/loss_nats")]
    assert own.step.tolist() == list(range(1, 61))
    lists = [line["per_step"]["train/loss_nats"] for line in read_journal(suite_dir.cell("both", 1).metrics)
             if "per_step" in line]  # fmt: skip
    assert own.value.tolist() == list(itertools.chain.from_iterable(lists))


def test_the_other_frames_are_the_report(built: tuple[SuiteDir, SuiteConfig]) -> None:
    suite_dir, _ = built
    study, told = Study(suite_dir.root), read_json(suite_dir.results)
    before = {path: path.stat().st_mtime_ns for path in suite_dir.root.rglob("*")}

    cells = study.cells()
    assert [(row["arm"], row["seed"]) for row in told["cells"]] == list(zip(cells.arm, cells.seed, strict=True))
    failed = cells[(cells.arm == "token_gain") & (cells.seed == 3)].iloc[0]
    assert failed.state == "failed" and np.isnan(failed.late_val_loss) and failed.step == 20

    differences = study.differences().set_index(["quantity", "arm"])
    quantity = next(q for q in told["quantities"] if q["key"] == "late_val_loss")
    for pair in quantity["pairs"]:
        row = differences.loc["late_val_loss", pair["arm"]]
        assert [row["mean"], row.low, row.high, row.n] == [pair["mean"], pair["low"], pair["high"], pair["n"]]
    assert differences.loc["late_val_loss", "both"]["mean"] == pytest.approx(0.25, abs=0.05)

    votes = study.votes()
    assert votes.to_dict("records") == [asdict(VOTE) | {"chosen": "both", "withdrawn": False}]

    flat = study.results().set_index("key")["value"]
    assert flat["loss.mean"] == told["loss"]["mean"]
    same = {key for key, value in leaves(told).items() if key in flat and (flat[key] == value or value is None)}
    assert same >= {key for key in leaves(told) if key != "made_from"}
    assert {path: path.stat().st_mtime_ns for path in suite_dir.root.rglob("*")} == before, "a Study writes nothing"


def test_the_example_of_the_page_runs(built: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> None:
    page = (CHECKOUT / "replication/report/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "out").mkdir()
    shutil.copytree(built[0].root, tmp_path / "out/mine")
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    columns = re.findall(r"^\| `(\w+)\(\)` \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    assert {name for name, _ in columns} == {"cells", "metrics", "differences", "votes", "results"}
    study = Study(built[0].root)
    for name, listed in columns:
        frame = getattr(study, name)()
        assert set(re.findall(r"`(\w+)`", listed)) == set(frame.columns), name


def test_a_study_is_there_without_torch_or_pandas() -> None:
    code = "import sys, replication; early = 'replication.report.study' in sys.modules; from replication import Study"
    code += "; sys.exit(early or any(name in sys.modules for name in ('torch', 'pandas', 'scipy')))"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suite.yaml: no such file; give the output folder"):
        Study(tmp_path)


def test_a_paper_gets_figures_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_dir, _ = build_suite(tmp_path / "out", arms=("baseline", "both"), steps=20, effects=PLANTED)
    suite_dir.votes.write_text(votes_text([VOTE]))
    root = suite_dir.root
    assert main(["report", str(root), "--width", "3.3in", "--tables", "tex,csv"]) == 0
    assert "for a paper" in capsys.readouterr().out
    pictures, drawn = ({path.stem for path in (root / "figures").glob(f"*.{kind}")} for kind in ("svg", "pdf"))
    assert pictures == drawn
    pdf = (root / "figures/validation_loss.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf)
    assert box is not None and float(box[1]) == pytest.approx(3.3 * 72, abs=0.1)
    assert b"/Type3" not in pdf and b"CreationDate" not in pdf

    told = read_json(suite_dir.results)
    with open(root / "tables/differences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (pair,) = next(q for q in told["quantities"] if q["key"] == "late_val_loss")["pairs"]
    (mean,) = [float(row["mean"]) for row in rows if row["quantity"] == "late_val_loss"]
    assert mean == pair["mean"], "every digit"
    tex = (root / "tables/differences.tex").read_text()
    assert r"\toprule" in tex and rf"late\_val\_loss & nats & token + layer gain & 2 & {mean:+.4f}" in tex
    assert {"differences", "seeds", "secondary", "votes", "cells", "token_gain"} <= {
        path.stem for path in (root / "tables").glob("*.tex")
    }


def test_a_figure_is_readable_at_the_width_of_a_column(built: tuple[SuiteDir, SuiteConfig], tmp_path: Path) -> None:
    results = read_results(built[0].results)
    figure, drawn = paired_figure(results, arm_styles(results.suite.arms))
    save_vector(figure, tmp_path / drawn.file, 3.3)
    assert f'width="{3.3 * 72:.1f}' in (tmp_path / "paired_differences.svg").read_text()
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert len(shown) > 10 and min(text.get_fontsize() for text in shown) >= 7
    assert max(text.get_fontsize() for text in shown) < 9
    again, _ = paired_figure(results, arm_styles(results.suite.arms))
    first = (tmp_path / "paired_differences.pdf").read_bytes()
    save_vector(again, tmp_path / drawn.file, 3.3)
    assert (tmp_path / "paired_differences.pdf").read_bytes() == first, "the same numbers, the same bytes"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tables", "pdf"), "--tables: 'pdf' is no form of them; name tex, csv"),
        (("--width", "wide"), "--width: 'wide' must be a width of 2 to 20 inches"),
    ],
)
def test_mistakes_are_one_line(
    built: tuple[SuiteDir, SuiteConfig], flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(built[0].root), *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


# ---------------------------------------------------------------- other tools


@pytest.fixture
def small(tmp_path: Path) -> Study:
    suite_dir, _ = build_suite(tmp_path / "out", arms=("baseline", "both"), seeds=(1,), steps=10)
    return Study(suite_dir.root)


def needs(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def run_example(name: str, study: Study, **environment: str) -> None:
    command = [sys.executable, str(CHECKOUT / "configs/examples" / name), str(study.dir.root)]
    done = subprocess.run(
        command, cwd=study.dir.root.parent, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def journal_of(study: Study) -> dict[tuple[str, str], dict[int, float]]:
    """(cell, tag) -> step -> value."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in study.metrics().itertuples():
        found.setdefault((str(row.cell), str(row.tag)), {})[int(row.step)] = float(row.value)
    return found


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log in blocks of 32 KiB, after a head of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for another head in this block
            at += 32768 - at % 32768
            continue
        length, part = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_holds_what_the_journal_does(small: Study, tmp_path: Path) -> None:
    needs("wandb")
    from wandb.proto import wandb_internal_pb2

    run_example("to_wandb.py", small, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    found: dict[tuple[str, str], dict[int, float]] = {}
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        name = ""
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            name = record.run.display_name or name
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if items:
                step = int(json.loads(items["_step"]))
                for tag, value in items.items():
                    if not tag.startswith("_"):
                        found.setdefault((name, tag), {})[step] = json.loads(value)
    assert found == journal_of(small)


def test_mlflow_holds_what_the_journal_does(small: Study, tmp_path: Path) -> None:
    needs("mlflow")
    run_example("to_mlflow.py", small, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}")
    found: dict[tuple[str, str], dict[int, float]] = {}
    query = "SELECT name, key, step, value FROM metrics JOIN runs USING (run_uuid)"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        for name, tag, step, value in connection.execute(query):
            found.setdefault((name, tag), {})[step] = value
    assert found == journal_of(small)


def test_trackio_holds_what_the_journal_does(small: Study, tmp_path: Path) -> None:
    needs("trackio")
    run_example("to_trackio.py", small, TRACKIO_DIR=str(tmp_path / "trackio"))
    found: dict[tuple[str, str], dict[int, float]] = {}
    (database,) = (tmp_path / "trackio").glob("synthetic*.db")
    with closing(sqlite3.connect(database)) as connection:
        for name, step, metrics in connection.execute("SELECT run_name, step, metrics FROM metrics"):
            for tag, value in json.loads(metrics).items():
                found.setdefault((name, tag), {})[step] = value
    assert found == journal_of(small)


def test_frames_are_tidy(small: Study) -> None:
    """What a reader does first: a mean over seeds, a curve an arm."""
    losses = small.metrics().query("tag == 'val/loss_nats'")
    wide = losses.pivot_table(index="step", columns="arm", values="value", observed=True)
    assert list(wide.columns) == ["baseline", "both"] and isinstance(wide, pd.DataFrame)
