"""Runs over seeds in TensorBoard: read back as TensorBoard reads them, and compared with numpy on the journals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chromium import picture
from rich.console import Console
from run_files import read_journal
from scipy import stats
from synthetic_runs import build_suite, edit_journal
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.util.tensor_util import make_ndarray

from replication.cli.main import main
from replication.cli.tensorboard import _writable
from replication.config import to_yaml
from replication.runs.files import remove_tree, write_text
from replication.runs.journal import Journal, Line
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.withdrawn import withdraw
from replication.tensorboard import writer as tensorboard
from replication.tensorboard.event_file import EventFile
from replication.tensorboard.live import LiveJournal
from replication.tensorboard.writer import ALIVE_SECONDS, claim

SEEDS = (1, 2, 3)
PAIR = "over-seeds/both-minus-baseline"
VERSUS = "versus_baseline/"


def suite_of(root: Path, **changes: object) -> tuple:
    return build_suite(root, arms=("baseline", "both"), seeds=SEEDS, samples=False, data_manifest=False, **changes)[
        ::-1
    ]


def points(suite_dir: SuiteDir, run: str, tag: str) -> dict[int, float]:
    """Step -> value; fails where a step comes twice."""
    board = EventAccumulator(str(suite_dir.tensorboard / run), size_guidance={"tensors": 0}).Reload()
    events = board.Tensors(tag) if tag in board.Tags()["tensors"] else []
    found = {event.step: float(make_ndarray(event.tensor_proto)) for event in events}
    assert len(found) == len(events), f"{run} {tag}: a step is doubled"
    assert list(found) == sorted(found)
    return found


def journal(run: RunDir, tag: str) -> dict[int, float]:
    return {line["step"]: line[tag] for line in read_journal(run.metrics) if line.get(tag) is not None}


def append(run: RunDir, step: int, **values: float) -> None:
    file = Journal(run.metrics, resume_step=10**9)
    file.append(Line(step, {"tokens": 1, **values}))
    file.close()


def test_means_bands_and_differences_are_numpys(tmp_path: Path) -> None:
    suite, suite_dir = suite_of(tmp_path, effects={"both": {"val/loss_nats": 0.5}})
    edit_journal(suite_dir.cell("baseline", 2), 20, **{"train/grad_norm": None})
    with claim(suite, suite_dir) as over_seeds:
        over_seeds.refresh()
    for tag in ("val/loss_nats", "train/grad_norm", "divergence/block_03"):
        cells = {(a, s): journal(suite_dir.cell(a, s), tag) for a in suite.arms for s in SEEDS}
        for arm in suite.arms:
            steps = sorted(set.intersection(*(set(cells[arm, s]) for s in SEEDS)))
            values = np.array([[cells[arm, s][k] for k in steps] for s in SEEDS])
            half = stats.t.ppf(0.975, 2) * values.std(0, ddof=1) / np.sqrt(3)
            mean = values.mean(0)
            for which, expected in (("mean", mean), ("low", mean - half), ("high", mean + half)):
                found = points(suite_dir, f"over-seeds/{arm}", tag if which == "mean" else f"with_band/{tag}/{which}")
                assert list(found) == steps
                np.testing.assert_allclose(list(found.values()), expected, rtol=1e-6)
        pairs = {s: {k: v - cells["baseline", s].get(k, np.nan) for k, v in cells["both", s].items()} for s in SEEDS}
        mean = {k: np.mean([pair[k] for pair in pairs.values()]) for k in pairs[1]}
        expected = {k: v for k, v in sorted(mean.items()) if np.isfinite(v)}
        assert points(suite_dir, PAIR, VERSUS + tag) == pytest.approx(expected, abs=1e-6)
        for seed in SEEDS:
            of_seed = points(suite_dir, PAIR, f"{VERSUS}{tag}/seed-{seed}")
            assert of_seed == (pytest.approx(pairs[seed], abs=1e-6) if tag == "val/loss_nats" else {})
    assert 20 not in points(suite_dir, "over-seeds/baseline", "train/grad_norm"), "a missing value is missing"
    low, high = (points(suite_dir, PAIR, f"with_band/{VERSUS}val/loss_nats/{which}")[60] for which in ("low", "high"))
    assert low < points(suite_dir, PAIR, f"{VERSUS}val/loss_nats")[60] < high
    assert set(points(suite_dir, "over-seeds/both", "n_seeds/val").values()) == {3.0}


def test_the_page_names_tags_that_exist(tmp_path: Path) -> None:
    suite, suite_dir = suite_of(tmp_path)
    with claim(suite, suite_dir) as over_seeds:
        over_seeds.refresh()
    tags = {
        tag
        for folder in suite_dir.tensorboard.glob("over-seeds/*")
        for tag in EventAccumulator(str(folder)).Reload().Tags()["tensors"]
    }
    board = EventAccumulator(str(suite_dir.tensorboard), size_guidance={"tensors": 0})
    page = board.Reload().Tensors(CONFIG_SUMMARY_TAG)[-1]
    layout = layout_pb2.Layout.FromString(make_ndarray(page.tensor_proto).item())
    charts = [chart for category in layout.category for chart in category.chart]
    named = {t for c in charts for s in c.margin.series for t in (s.value, s.lower, s.upper)}
    assert len(named) > 40
    assert named <= tags
    assert all(any(re.match(t, tag) for tag in tags) for c in charts for t in c.multiline.tag)
    for i in (0, 2, 3):
        assert {f"divergence/block_{i:02d}", f"{VERSUS}divergence/block_{i:02d}"} <= named


def test_what_journals_grow_by_is_appended_and_a_resumed_one_replaces(tmp_path: Path) -> None:
    suite, suite_dir = suite_of(tmp_path, interrupted={(a, s): 30 for a in ("baseline", "both") for s in SEEDS})
    runs = [suite_dir.cell("both", seed) for seed in SEEDS]
    tag, mean = "train/loss_nats", "over-seeds/both"

    def losses() -> dict[int, float]:
        return {k: round(v, 4) for k, v in points(suite_dir, mean, tag).items() if k > 30}

    with claim(suite, suite_dir) as over_seeds:
        over_seeds.refresh()
        assert max(points(suite_dir, mean, tag)) == 30
        for i, run in enumerate(runs[:2]):
            append(run, 35, **{tag: float(i)})
        over_seeds.refresh()
        assert losses() == {}, "the slowest seed holds the mean"
        append(runs[2], 35, **{tag: 2.0})
        with open(runs[2].metrics, "a") as file:
            file.write('{"step":40,"tokens":1,"train/lo')
        over_seeds.refresh()
        assert losses() == {35: 1.0}
        assert over_seeds.refresh() == 0, "nothing new, nothing written"
        for run in runs:
            Journal(run.metrics, resume_step=30).close()
            append(run, 35, **{tag: 4.0})
            append(run, 40, **{tag: 5.0})
        over_seeds.refresh()
        assert losses() == {35: 4.0, 40: 5.0}
        Journal(runs[0].metrics, resume_step=35).close()
        over_seeds.refresh()
        assert losses() == {35: 4.0}
    with claim(suite, suite_dir) as again:
        again.refresh()
    assert losses() == {35: 4.0}, "a second start replaces the first one's runs"


def test_a_seed_that_failed_or_was_left_does_not_hold_the_mean(tmp_path: Path) -> None:
    suite, suite_dir = suite_of(tmp_path, failed={("both", 1): 20}, interrupted={("both", 2): 30})
    with claim(suite, suite_dir) as over_seeds:
        over_seeds.refresh()
        assert max(points(suite_dir, "over-seeds/both", "val/loss_nats")) == 30, "its journal is fresh"
        ahead = time.time() + ALIVE_SECONDS + 60  # by the clock of another node
        os.utime(suite_dir.cell("both", 2).metrics, (ahead, ahead))
        assert not tensorboard.counts(suite_dir.cell("both", 2))
        left = time.time() - ALIVE_SECONDS - 1
        os.utime(suite_dir.cell("both", 2).metrics, (left, left))
        over_seeds.refresh()
    assert set(points(suite_dir, "over-seeds/both", "n_seeds/val").values()) == {1.0}
    alone = journal(suite_dir.cell("both", 3), "val/loss_nats")
    assert points(suite_dir, "over-seeds/both", "val/loss_nats") == pytest.approx(alone)
    assert not points(suite_dir, "over-seeds/both", "with_band/val/loss_nats/low"), "one seed has no band"
    assert max(points(suite_dir, PAIR, f"{VERSUS}val/loss_nats/seed-1")) == 18
    assert max(points(suite_dir, PAIR, f"{VERSUS}val/loss_nats")) == 60


def test_a_withdrawn_seed_leaves_the_mean_and_keeps_its_own_curves(tmp_path: Path) -> None:
    suite, suite_dir = suite_of(tmp_path, steps=10)
    with claim(suite, suite_dir) as over_seeds:
        over_seeds.refresh()
        assert set(points(suite_dir, "over-seeds/both", "n_seeds/val").values()) == {3.0}
        withdraw(suite_dir, "seed", "2", "its node had bad memory")
        over_seeds.refresh()
    assert set(points(suite_dir, "over-seeds/both", "n_seeds/val").values()) == {2.0}
    others = [journal(suite_dir.cell("both", seed), "val/loss_nats") for seed in (1, 3)]
    mean = {step: (others[0][step] + others[1][step]) / 2 for step in others[0]}
    assert points(suite_dir, "over-seeds/both", "val/loss_nats") == pytest.approx(mean)
    assert points(suite_dir, PAIR, f"{VERSUS}val/loss_nats/seed-2")


def test_a_seed_that_joins_the_suite_later_joins_the_mean_and_no_number_is_no_point(tmp_path: Path) -> None:
    suite, suite_dir = suite_of(tmp_path, steps=10)
    fewer = replace(suite, seeds=SEEDS[:2])
    write_text(suite_dir.suite, to_yaml(fewer))
    mean, tag = "over-seeds/both", "train/loss_nats"
    with claim(fewer, suite_dir) as over_seeds:
        over_seeds.refresh()
        assert set(points(suite_dir, mean, "n_seeds/train").values()) == {2.0}
        suite_dir.suite.write_text("arms: [")
        assert over_seeds.refresh() == 0, "a suite that cannot be read changes nothing"
        write_text(suite_dir.suite, to_yaml(suite))
        over_seeds.refresh()
        assert set(points(suite_dir, mean, "n_seeds/train").values()) == {3.0}
        for seed in SEEDS:
            with open(suite_dir.cell("both", seed).metrics, "a") as file:
                for step, word in ((11, "NaN"), (12, "true"), (13, "-Infinity"), (14, "2")):
                    file.write(f'{{"step":{step},"tokens":1,"{tag}":{word}}}\n')
        over_seeds.refresh()
    assert {step: v for step, v in points(suite_dir, mean, tag).items() if step > 10} == {14: 2.0}


def test_a_start_that_was_interrupted_while_it_removed_runs_does_not_block_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, suite_dir = suite_of(tmp_path, steps=10)
    with claim(suite, suite_dir) as over_seeds:
        over_seeds.refresh()

    def interrupted(folder: Path) -> None:
        if folder.exists():
            (folder / tensorboard.MARKER).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard, "remove_tree", interrupted)
    with pytest.raises(KeyboardInterrupt), claim(suite, suite_dir):
        pass
    monkeypatch.setattr(tensorboard, "remove_tree", remove_tree)
    with claim(suite, suite_dir) as over_seeds:
        over_seeds.refresh()
    assert [p.name for p in suite_dir.tensorboard.iterdir() if p.is_dir()] == ["over-seeds"]
    assert points(suite_dir, "over-seeds/both", "train/loss_nats")


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, suite_dir = suite_of(tmp_path / "out")
    with claim(suite, suite_dir):
        assert main(["tensorboard", str(suite_dir.root), "--once"]) == 2
    assert "another `replicate tensorboard` writes here" in capsys.readouterr().err
    assert main(["tensorboard", str(tmp_path / "none")]) == 2
    assert "suite.yaml: no such file" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["tensorboard", str(suite_dir.root), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err
    (suite_dir.tensorboard / "over-seeds" / "WRITTEN_BY_REPLICATE_TENSORBOARD").unlink()
    assert main(["tensorboard", str(suite_dir.root), "--once"]) == 2
    assert "not written by `replicate tensorboard`" in capsys.readouterr().err


def test_a_folder_that_can_only_be_read_is_shown_from_a_passing_one(tmp_path, monkeypatch, capsys) -> None:
    suite, suite_dir = suite_of(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["tensorboard", str(suite_dir.root), "--once"]) == 2
    assert "can only be read" in capsys.readouterr().err
    with _writable(suite_dir, suite, False, Console()) as passing, claim(suite, passing) as over_seeds:
        assert over_seeds.refresh() > 0
        link = passing.tensorboard / suite.arms[0] / f"seed-{suite.seeds[0]}"
        assert link.resolve() == suite_dir.cell(suite.arms[0], suite.seeds[0]).tensorboard
    assert sorted(tmp_path.rglob("*")) == before and not passing.root.exists()


def test_the_first_page_shows_cells_by_arm_and_ctrl_c_ends_tensorboard_too(tmp_path: Path, browser) -> None:
    suite, suite_dir = build_suite(tmp_path, steps=10, samples=False, data_manifest=False)[::-1]
    for arm, seed, run in suite_dir.cells():
        journals = LiveJournal(run.metrics, lambda tag: True)
        journals.read()
        EventFile(run.tensorboard).bring_to(journals.curves())
        suite_dir.link_tensorboard(arm, int(seed))
    command = [sys.executable, "-m", "replication", "tensorboard", str(suite_dir.root), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("curves:"))
        address = line.split()[1].split("?")[0]
        try:
            assert len(runs := _runs(address, 16)) == 16, runs
            page = browser.new_page(viewport={"width": 1500, "height": 1200})
            page.set_default_timeout(60_000)
            page.goto(line.split()[1])
            page.locator("card-view").nth(4).locator("[title]").first.wait_for()
            page.locator(".run-color-swatch").nth(10).wait_for()
            cards = [card.get_attribute("title") for card in page.locator("card-view tb-truncated-path").all()]
            rows = page.locator("runs-data-table tb-data-table-content-row").all()
            colours = {
                row.inner_text().strip(): row.locator(".run-color-swatch").get_attribute("style") for row in rows
            }
            picture(page, "tensorboard")
            page.close()
        finally:
            process.send_signal(signal.SIGTERM)  # the same handler; SIGINT may be ignored where tests run
        assert process.wait(timeout=15) == 130
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=2)
    losses = ["val/loss_nats", "versus_baseline/val/loss_nats", "train/loss_nats"]
    assert cards[:5] == [*losses, "train/grad_norm", "val/entropy_predicted_tokens_nats"]
    pairs = [f"over-seeds/{arm}-minus-baseline" for arm in suite.arms[1:]]
    assert sorted(colours) == sorted([f"{arm}/seed-{seed}" for arm in suite.arms for seed in suite.seeds] + pairs)
    of_arm = {re.sub("over-seeds/|/seed.*|-minus.*", "", run): colour for run, colour in colours.items()}
    assert len(set(colours.values())) == len(set(of_arm.values())) == len(suite.arms), "one colour an arm"


def _runs(address: str, n: int) -> list[str]:
    """The runs that TensorBoard has read, once they are n."""
    found: list[str] = []
    for _ in range(400):  # a busy machine takes long to start it
        with suppress(OSError):
            found = json.load(urllib.request.urlopen(f"{address}data/runs", timeout=2))
        if len(found) >= n:
            break
        time.sleep(0.1)
    return found
