"""A gain and scales from a file outside of the package: trained, resumed after a kill, certified, never swapped."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from paths import CHECKOUT, SUPPORT
from rich.console import Console
from run_files import read_journal
from small_corpus import prose_layer, texts, write_folder
from training_setup import fit, furthest, identical, small_config, weights

from replication.cli.main import main
from replication.config import RunConfig, load_cell, load_suite, scientific, scientific_hash
from replication.config.load import find_plugin
from replication.data.prepare import prepare
from replication.errors import UserError
from replication.grid.cell import run_cell
from replication.grid.cells import Cell, claim_folder, load_cells, write_configs
from replication.objectives.plugins import Context, keep_plugins, read_functions
from replication.protocol.certificate import certify
from replication.runs.files import read_json
from replication.runs.layout import RunDir, SuiteDir

PLUGIN = """
import torch
from replication import gain, scale

@gain(clamp=True)
def noisy(losses, plain, valid, *, width: float = 0.5, context):
    noise = torch.randn(losses.shape, generator=context.generator, dtype=losses.dtype)
    return 1 + width * noise * context.learning_rate_fraction

@gain
def exact(losses, plain, valid, *, gamma: float = 2.0):
    return ((1 - torch.exp(-plain)) ** gamma).clamp(1e-4, 10)

@scale
def published(divergence, *, t: float = 0.5):
    return (1 + t * (divergence / divergence.mean() - 1)).clamp(0.1, 3)

@scale
def drawn(divergence, *, context):
    return 0.5 + torch.rand(divergence.shape, generator=context.generator, dtype=divergence.dtype)
"""
NOISY = ("--token_gain.function=noisy", "--layer_gain.function=drawn")


def plugin_in(folder: Path, text: str = PLUGIN) -> Path:
    path = folder / "my_gains.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def cell_in(out: Path, plugin: Path) -> RunDir:
    """The cell both/seed-1 of an output folder that keeps the plugin."""
    keep_plugins([plugin], SuiteDir(out).plugins)
    return SuiteDir(out).cell("both", 1)


def own_config(plugin: Path, *flags: str) -> RunConfig:
    sha256 = hashlib.sha256(plugin.read_bytes()).hexdigest()
    return small_config("both", f"--plugins={{{plugin.name}: {sha256}}}", *flags)


# ---------------------------------------------------------------- training


def test_our_formulas_as_a_plugin_train_to_the_same_weights(tmp_path):
    plugin = plugin_in(tmp_path)
    own = own_config(plugin, "--token_gain.function=exact", "--layer_gain.function=published")
    run = fit(own, cell_in(tmp_path / "own", plugin).root)
    built_in = fit(small_config("both", "--token_gain.variant=focal"), tmp_path / "built_in")
    assert identical(weights(run), weights(built_in))
    for own_line, line in zip(read_journal(run.metrics), read_journal(built_in.metrics), strict=True):
        tags = {k for k in line.keys() & own_line.keys() if k.startswith(("gain/", "scale/", "train/objective"))}
        assert {k: own_line[k] for k in tags if "before" not in k and "share" not in k} == {
            k: line[k] for k in tags if "before" not in k and "share" not in k
        }


def test_an_excluded_block_keeps_one_and_is_not_shown(tmp_path):
    from replication.config import LayerGainConfig
    from replication.objectives.layer_gain import included_blocks, layer_scales

    function = read_functions(plugin_in(tmp_path))["published"].with_parameters({"t": 1}, "")
    config = LayerGainConfig(exclude_blocks=(1,), function="published")
    divergence_L, context = torch.tensor([1.0, 50.0, 3.0]), Context(1, 0, 10, 1.0)
    scale_L = layer_scales(config, divergence_L, included_blocks(config, 3), function, context)
    assert scale_L.tolist() == [0.5, 1.0, 1.5]


def test_random_gains_and_scales_do_not_depend_on_the_cut(tmp_path):
    """In fp64: each group has its own numbers, wherever it is computed; and the noise acts."""
    plugin, ends = plugin_in(tmp_path), []
    for micro in (8, 2):
        flags = ("--training.precision=64-true", f"--cluster.micro_batch_sequences={micro}", *NOISY)
        ends.append(weights(fit(own_config(plugin, *flags), cell_in(tmp_path / str(micro), plugin).root)))
    assert furthest(*ends) < 1e-10
    other = own_config(plugin, "--training.precision=64-true", *NOISY, "--token_gain.parameters={width: 0.1}")
    assert furthest(ends[0], weights(fit(other, cell_in(tmp_path / "other", plugin).root))) > 1e-4


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    plugin, layer = plugin_in(tmp_path), tmp_path / "layer.yaml"
    write_folder(tmp_path / "corpus", texts(40))
    layer.write_text(yaml.safe_dump(small_layer(tmp_path)))
    ends = []
    data = tmp_path / "data"
    assert main(["prepare", "--config", str(layer), "--out", str(data)]) == 0
    for devices in (1, 2):
        out = tmp_path / f"ranks-{devices}"
        words = ["--config", str(layer), "--config", "arms/both.yaml", "--plugins", str(plugin), "--out", str(out)]
        keys = [*NOISY, "--seed=1", "--training.precision=64-true", f"--data.dir={data}"]
        machine = [f"--cluster.devices={devices}", *(["--cluster.strategy=ddp"] if devices == 2 else [])]
        command = [sys.executable, "-P", "-m", "replication", "train", *words, *keys, *machine]
        subprocess.run(command, check=True, timeout=300)
        ends.append(weights(SuiteDir(out).cell("both", 1)))
    assert furthest(*ends) < 1e-10


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    """With random gains: the generator of a step is no state that a kill could lose."""
    plugin, flags = plugin_in(tmp_path), ("--training.steps=12", "--checkpoints.every_steps=5", *NOISY)
    run = cell_in(tmp_path / "out", plugin)
    script = (
        "import sys; sys.path[:0] = [sys.argv[2], sys.argv[3]]\nfrom pathlib import Path\n"
        "from held_cell import hold_steps\nfrom test_plugins import fit, own_config\n"
        "hold_steps(Path(sys.argv[1]).parent)\n"
        f"fit(own_config(Path(sys.argv[1]), *{flags}), Path(sys.argv[4]))\n"
    )
    command = [sys.executable, "-c", script, str(plugin), str(SUPPORT), str(Path(__file__).parent), str(run.root)]
    (tmp_path / "hold").write_text("7")
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (run.checkpoints / "step-000005" / "COMPLETE").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    (tmp_path / "hold").unlink()
    config = own_config(plugin, *flags)
    fit(config, run.root)
    assert [start["step"] for start in read_json(run.manifest)["starts"]] == [0, 5]
    undisturbed = fit(config, cell_in(tmp_path / "undisturbed", plugin).root)
    assert identical(weights(run), weights(undisturbed))


# ---------------------------------------------------------------- a suite


def small_layer(folder: Path) -> dict[str, object]:
    return {
        "data": prose_layer(folder / "corpus"),
        "model": {"vocab_size": 300, "n_blocks": 2, "d_model": 32, "d_head": 8, "d_ff": 16, "init_std": 0.1},
        "cluster": {"accelerator": "cpu", "threads": 1},
        "training": {"steps": 4, "batch_tokens": 128, "warmup_steps": 1},
        "validation": {"every_steps": 2, "sequences": 4},
        "logging": {"log_every_steps": 1},
        "checkpoints": {"every_steps": 2},
        "generation": {"prompts": None},
    }


def write_suite(folder: Path, **more: object) -> Path:
    """A suite of baseline, an arm in a file and one that is written out, over a plugin."""
    write_folder(folder / "corpus", texts(40))
    plugin_in(folder)
    (folder / "arms").mkdir()
    (folder / "arms" / "drawn.yaml").write_text("layer_gain: {enabled: true, function: drawn}\n")
    noisy = {"enabled": True, "function": "noisy", "parameters": {"width": 0.25}}
    suite = {
        "name": "own",
        "arms": ["baseline", {"name": "noisy", "token_gain": noisy}, "arms/drawn.yaml"],
        "seeds": [1, 2],
        "plugins": ["my_gains.py"],
        "run": small_layer(folder),
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(suite | more))
    return folder / "own.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SuiteDir:
    """Every cell of the suite, complete; the folder of suite and plugin was moved away since."""
    folder = tmp_path_factory.mktemp("trained")
    cells, suite_dir = ready(write_suite(folder / "source"), folder / "out")
    (folder / "source").rename(folder / "moved")
    for cell in cells:
        run_cell(cell.config, suite_dir, Console(file=io.StringIO()))
    return suite_dir


def ready(suite_file: Path, out: Path) -> tuple[list[Cell], SuiteDir]:
    """The cells of a suite in its output folder, with their data: `grid run` but for the running."""
    suite, suite_dir = load_suite(suite_file), SuiteDir(out)
    cells = load_cells(suite, suite_dir)
    claim_folder(suite, suite_dir, cells)
    write_configs(cells)
    prepare(cells[0].config.data, suite_dir.data, Console(file=io.StringIO()))
    return cells, suite_dir


def test_cells_of_a_plugin_are_certified_with_its_name_and_hash(trained):
    suite = load_suite(trained.suite)
    assert suite.arms == ("baseline", "noisy", "drawn")
    certificate = certify(trained, suite.arms, suite.seeds)
    assert certificate.holds, [seed.reasons for seed in certificate.seeds]
    sha256 = hashlib.sha256(PLUGIN.encode()).hexdigest()
    check = next(c for c in certificate.seeds[0].checks if c.name == "plugins")
    assert check.values == {arm: {"my_gains.py": sha256} for arm in suite.arms}
    ends = {arm: read_json(trained.cell(arm, 1).manifest)["final_weights_sha256"] for arm in suite.arms}
    assert len(set(ends.values())) == 3, "both functions acted"


def test_report_and_status_name_such_arms_and_the_plugin(trained, capsys):
    assert main(["report", str(trained.root)]) == 0
    assert main(["grid", "status", str(trained.root)]) == 0
    assert "6 complete" in capsys.readouterr().out
    report = trained.report_md.read_text()
    assert f"`my_gains.py`, SHA-256 `{hashlib.sha256(PLUGIN.encode()).hexdigest()}`" in report
    declared = json.loads(trained.results.read_text())["config"]
    row = dict(zip(declared["declared_keys"], declared["declared"]["noisy"], strict=True))
    assert (row["token_gain.function"], row["token_gain.parameters.width"], row["layer_gain.enabled"]) == (
        "noisy", 0.25, False
    )  # fmt: skip
    assert "again" not in capsys.readouterr().err


def test_a_changed_copy_is_named_by_the_certificate(trained):
    copy = trained.plugins / "my_gains.py"
    try:
        copy.write_text(PLUGIN + "\n")
        suite = load_suite(trained.suite)
        reasons = certify(trained, suite.arms, suite.seeds).seeds[0].reasons
        assert [r for r in reasons if r.startswith("plugins: baseline: plugins/my_gains.py is ")]
    finally:
        copy.write_text(PLUGIN)


def test_a_changed_plugin_is_refused_by_name_with_both_hashes(tmp_path, capsys):
    suite_file, out = write_suite(tmp_path), tmp_path / "out"
    suite, suite_dir = load_suite(suite_file), SuiteDir(out)
    cells = load_cells(suite, suite_dir)
    claim_folder(suite, suite_dir, cells)
    before, after = (hashlib.sha256(text.encode()).hexdigest() for text in (PLUGIN, PLUGIN + "\n"))
    (tmp_path / "my_gains.py").write_text(PLUGIN + "\n")
    assert main(["grid", "run", str(suite_file), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"my_gains.py: the plugin was changed: its SHA-256 is {after}, that of the copy" in said
    assert f"plugins/my_gains.py, is {before}; restore the one that was changed, or choose another --out" in said
    (suite_dir.plugins / "my_gains.py").write_text(PLUGIN + "\n")  # and the copy alone, beneath a cell
    config = own_config(plugin_in(tmp_path / "again"), *NOISY)
    with pytest.raises(UserError, match=f"its SHA-256 is {after}, and both/seed-1 is defined by {before}; restore"):
        fit(config, suite_dir.cell("both", 1).root)
    assert not suite_dir.cell("both", 1).manifest.exists()


def test_the_plugin_is_part_of_the_hash_and_no_other_hash_moves(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    first = load_cell(suite, "noisy", 1)
    keys = scientific(first)
    assert keys["plugins.my_gains.py"] == hashlib.sha256(PLUGIN.encode()).hexdigest()
    assert (keys["token_gain.function"], keys["token_gain.parameters.width"]) == ("noisy", 0.25)
    (tmp_path / "my_gains.py").write_text(PLUGIN + "\n")
    assert scientific_hash(load_cell(suite, "noisy", 1)) != scientific_hash(first)
    known = {
        k for k in scientific(RunConfig()) if k.startswith(("plugins", "token_gain.p", "token_gain.fu", "layer_gain.p"))
    }
    assert known == set()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ({"function": "nosiy"}, "token_gain.function: nosiy is no gain of the plugins; those are noisy, exact"),
        ({"function": "drawn"}, "token_gain.function: drawn is no gain of the plugins"),
        (
            {"function": "noisy", "parameters": {"widht": 1}},
            "token_gain.parameters: widht: no such key; did you mean width?; noisy of my_gains.py takes "
            "width: float = 0.5",
        ),
        (
            {"function": "noisy", "parameters": {"width": "wide"}},
            "token_gain.parameters: width: must be a number such as 0.5, not 'wide'; noisy of my_gains.py takes",
        ),
        ({"parameters": {"width": 1}}, "token_gain.parameters: are those of token_gain.function, which is not set"),
    ],
)
def test_mistakes_in_an_arm_are_one_line(tmp_path, capsys, gain, said):
    arm = {"name": "mine", "token_gain": {"enabled": True, **gain}}
    suite = write_suite(tmp_path, arms=["baseline", arm])
    assert main(["grid", "plan", str(suite)]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_plugin_is_one_line(tmp_path, capsys):
    assert main(["grid", "plan", str(write_suite(tmp_path, plugins=["her_gains.py"]))]) == 2
    assert "plugins: her_gains.py is no file in" in capsys.readouterr().err
    assert main(["train", "--config", "arms/both.yaml", "--token_gain.function=x", "--out", str(tmp_path)]) == 2
    assert "token_gain.function: x is a function of a plugin, and none is named" in capsys.readouterr().err


def test_a_result_of_another_shape_is_refused_in_training(tmp_path):
    plugin = plugin_in(
        tmp_path, "from replication import gain\n@gain\ndef f(losses, plain, valid):\n    return losses[0]\n"
    )
    config = own_config(plugin, "--token_gain.function=f")
    with pytest.raises(UserError, match=re.escape("my_gains.py: f returned torch.float32 [32]; return numbers of")):
        fit(config, cell_in(tmp_path / "out", plugin).root)


# ---------------------------------------------------------------- packages, and the page


def test_a_package_registers_a_gain(tmp_path, monkeypatch):
    (tmp_path / "their_gains.py").write_text(PLUGIN)
    info = tmp_path / "their_gains-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_gains\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[replication.gains]\ntheirs = their_gains:noisy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_plugin("theirs") == tmp_path / "their_gains.py"
    suite = load_suite(write_suite(tmp_path / "suite", plugins=["theirs"]))
    assert [*load_cell(suite, "noisy", 1).plugins] == ["their_gains.py"]
    claim_folder(suite, SuiteDir(tmp_path / "out"), load_cells(suite, SuiteDir(tmp_path / "out")))
    assert (tmp_path / "out" / "plugins" / "their_gains.py").read_text() == PLUGIN


def test_the_page_s_example_passes_and_trains(tmp_path, capsys):
    page = (CHECKOUT / "replication/objectives/README.md").read_text().partition("## A gain of your own")[2]
    python, suite = (re.search(rf"```{kind}\n(.*?)```", page, re.S)[1] for kind in ("python", "yaml"))  # type: ignore[index]
    plugin = plugin_in(tmp_path, python)
    assert main(["check-gain", str(plugin)]) == 0
    write_folder(tmp_path / "corpus", texts(40))
    written = yaml.safe_load(suite)
    written |= {"layers": [], "run": small_layer(tmp_path), "seeds": [1]}
    (tmp_path / "my_suite.yaml").write_text(yaml.safe_dump(written))
    cells, suite_dir = ready(tmp_path / "my_suite.yaml", tmp_path / "out")
    assert [cell.arm for cell in cells] == ["baseline", "hard_tokens"]
    run_cell(cells[1].config, suite_dir, Console(file=io.StringIO()))
    assert cells[1].run.complete.is_file()
