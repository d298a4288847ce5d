"""The drill itself, short: real kills of real runs; and that it notices what it is there to notice."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import CHECKOUT
from run_files import read_journal
from small_corpus import two_sources
from training_setup import fit, small_config

from replication.bench.drill import AIMS, Disturbed, DrillResults, Kill, StrategyResult, _Drill, faults, spread
from replication.config import to_yaml
from replication.errors import UserError
from replication.runs.files import read_json, write_text
from replication.runs.layout import RunDir
from replication.training.phases import Board, Reading

FULL = bool(os.environ.get("REPLICATION_FULL"))
STRATEGIES = ("single", "zero2") if FULL else ("single",)  # test_slurm.py kills a rank of zero2
KILLS = 3 * len(STRATEGIES)  # one of each aim to each strategy; the long form is the command of the product


GAIN = """
import torch
from replication import gain

@gain
def noisy(losses, plain, valid, *, context):
    return 1 + 0.1 * torch.rand(losses.shape, generator=context.generator, dtype=losses.dtype)
"""


def drill(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "replication", "drill", "--out", str(root / "out"), *args],
        capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config file over a small corpus: 18 steps of four micro-batches on one rank, two on each of two."""
    root = tmp_path_factory.mktemp("drill")
    small = small_config("both", "--training.steps=18", "--checkpoints.every_steps=3", "--validation.every_steps=6",
                         "--cluster.micro_batch_sequences=2")  # fmt: skip
    model = dataclasses.replace(small.model, vocab_size=320)
    write_text(root / "config.yaml", to_yaml(dataclasses.replace(small, data=two_sources(root), model=model)))
    return root / "config.yaml"


@pytest.mark.slow
def test_killed_and_resumed_runs_end_bitwise_equal(config, tmp_path, publish):
    plugin = tmp_path / "my_gains.py"  # a gain that draws: what it drew before a kill it draws again
    plugin.write_text(GAIN)
    args = ("--config", str(config), "--strategies", ",".join(STRATEGIES), "--kills", str(KILLS))
    args += ("--plugins", str(plugin), "--token_gain.function=noisy")
    done = drill(tmp_path, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(tmp_path / "out" / "drill.json")
    landed = [kill for s in result["strategies"] for run in s["runs"] for kill in run["kills"]]
    assert len(landed) == KILLS
    for strategy in result["strategies"]:
        assert strategy["holds"] and strategy["spread"] == strategy["noise_floor"] == 0, strategy
        kills = [kill for run in strategy["runs"] for kill in run["kills"]]
        assert any(kill["restart"] > 0 for kill in kills), "a resumed run was killed"
        assert any(kill["resumed_from"] for kill in kills) and "resumed from a checkpoint" in done.stdout
    phases = {aim: sum(kill["phase"] in AIMS[aim] for kill in landed) for aim in AIMS}
    publish(f"drill: {KILLS} kills over {', '.join(STRATEGIES)}: {phases}, all bitwise equal")
    assert min(phases.values()) > 0
    again = drill(tmp_path, *args)
    assert again.returncode == 0
    assert read_json(tmp_path / "out" / "drill.json") == result, "a second call goes on from what there is"
    other = drill(tmp_path, *args, "--checkpoints.every_steps=4")
    assert (other.returncode, "checkpoints.every_steps: 3 there, 4 here" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--kills", "1", "--strategies", "single,zero2"), "--kills: 1 leaves some of the 2 strategies without one"),
        (("--strategies", "tpu"), "no strategy 'tpu'"),
        (("--checkpoints.every_steps=299",), "the first of 299 comes too late in 300 steps"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(tmp_path, args, message):
    done = drill(tmp_path, *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# ---------------------------------------------------------------- it notices


def changed(run: RunDir, target: Path, change) -> RunDir:
    shutil.copytree(run.root, target)
    change(RunDir(target))
    return RunDir(target)


def rewrite_journal(run: RunDir, change) -> None:
    lines = [change(i, line) for i, line in enumerate(read_journal(run.metrics))]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


def test_lost_steps_other_data_and_other_values_are_faults(tmp_path):
    run = fit(small_config(), tmp_path / "whole")
    assert faults(run, run) == []

    def lose_a_step(r):
        rewrite_journal(r, lambda i, line: line | {"per_step": {"train/loss_nats": [1.0]}} if i == 1 else line)

    def lose_a_line(r):
        rewrite_journal(r, lambda i, line: None if i == 0 else line)

    def other_value(r):
        rewrite_journal(r, lambda i, line: line | {"train/loss_nats": 0.0} if i == 0 else line)

    def other_data(r):
        r.manifest.write_text(json.dumps(read_json(r.manifest) | {"data_chain": "0"}))

    for i, (change, words) in enumerate([(lose_a_step, "other steps"), (lose_a_line, "other steps"),
                                         (other_value, "other values"), (other_data, "data_chain is 0")]):  # fmt: skip
        assert any(words in fault for fault in faults(changed(run, tmp_path / str(i), change), run)), words


def test_spread_is_zero_for_equal_weights_alone(tmp_path):
    run, again = fit(small_config(), tmp_path / "1"), fit(small_config(), tmp_path / "2")
    other = fit(small_config("baseline", "--training.learning_rate=0.0031"), tmp_path / "3")
    assert spread(run, again) == 0
    assert spread(run, other) > 1e-5


def test_a_drill_holds_where_it_ends_as_near_as_a_rerun():
    def result(noise_floor: float, spread: float, *faults: str, resumed_from: int = 5) -> StrategyResult:
        kills = [Kill("mid-step", "forward", 7, 0, [0], 0, resumed_from)]
        return StrategyResult("zero2", 2, 4, noise_floor, [Disturbed("killed-01", kills, spread, list(faults))])

    assert result(0.0, 0.0).holds
    assert result(1e-6, 5e-6).holds
    assert not result(0.0, 1e-12).holds, "a rerun was bitwise equal"
    assert not result(1e-6, 1e-2).holds, "further away than noise"
    assert not result(0.0, 0.0, "a step is lost").holds
    assert not result(0.0, 0.0, resumed_from=0).holds, "every kill fell before the first save"


def test_results_of_an_earlier_version_are_read_and_damaged_ones_named(tmp_path):
    """It wrote `holds` and `spread` beside the fields, and its kills did not say what they were resumed from."""
    config, path = small_config(), tmp_path / "drill.json"
    assert DrillResults.of(config, path).strategies == []
    kill = {"aim": "mid-step", "phase": "update", "step": 3, "micro_batch": 1, "ranks": [0, 1], "restart": 1}
    run = {"name": "killed-01", "kills": [kill], "spread": 1e-12, "faults": []}
    result = {"strategy": "zero2", "world_size": 2, "accumulation": 4, "noise_floor": 0.0, "runs": [run]}
    there = {"config": DrillResults.of(config, path).config, "strategies": [result | {"holds": False, "spread": 1e-12}]}
    path.write_text(json.dumps(there))
    found = DrillResults.of(config, path).strategies
    disturbed = Disturbed("killed-01", [Kill("mid-step", "update", 3, 1, [0, 1], 1)], 1e-12, [])
    assert found == [StrategyResult("zero2", 2, 4, 0.0, [disturbed])] and found[0].spread == 1e-12
    assert found[0].to_dict().keys() == there["strategies"][0].keys()
    with pytest.raises(UserError, match=r"of another config .*optimizer"):
        DrillResults.of(small_config("both", "--training.optimizer=sgd"), path)
    for damaged in ("[]", '{"config": {}}', json.dumps(there | {"strategies": [result | {"runs": [{}]}]})):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"drill.json: .*(holds no JSON object|is missing); restore it") as caught:
            DrillResults.of(config, path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kills", [1, 2, 4, 6])
def test_kills_fall_over_the_whole_run_and_one_at_least_behind_a_save(tmp_path, kills):
    """However few they are, and however late the first save comes."""
    config = small_config("both", "--training.steps=300", "--checkpoints.every_steps=200")
    for seed in range(50):
        drill = _Drill(config, tmp_path, random.Random(seed))
        steps = [drill._moment(k, kills, k == kills - 1) for k in range(kills)]
        assert steps == sorted(steps) and 200 < steps[-1] < 300
        assert all(300 * k // kills <= step < 300 * (k + 1) // kills for k, step in enumerate(steps))


def test_the_board_outlives_its_writer(tmp_path):
    board = Board(tmp_path / "board", 2, create=True)
    assert board.read() == []
    script = (
        "import os, signal; from replication.training import phases; phases.enter('accumulate', 7, 2)\n"
        "with phases.during('save'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    variables = {"REPLICATION_PHASE_BOARD": str(tmp_path / "board"), "RANK": "1", "WORLD_SIZE": "2"}
    writer = subprocess.Popen([sys.executable, "-c", script], env=os.environ | variables, cwd=CHECKOUT)
    writer.wait(timeout=60)
    assert board.read() == [Reading(1, writer.pid, 7, 2, "save")]
