"""Relative paths: beside the file that says them, else in the current folder; and part of no hash and no file."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from small_corpus import prose_layer, texts, write_folder
from trained_suite import PROMPTS

from replication.cli.main import main
from replication.config import RunConfig, inlined, load_cell, load_run, load_suite, scientific_hash, to_yaml
from replication.data.files import local_files
from replication.data.prompts import load_prompts
from replication.data.store import TokenStore
from replication.data.tokenizer import load_tokenizer
from replication.errors import UserError
from replication.grid.cell import run_cell
from replication.grid.cells import claim_folder, load_grid, make_ready, refuse_other_suite
from replication.report.report import collect
from replication.runs.layout import SuiteDir


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with a suite, a layer in a folder of its own with the corpus beside it, and prompts beside the suite."""
    study = tmp_path / "study"
    write_folder(study / "layers/corpus", texts(40))
    layer = {
        "data": prose_layer(Path("corpus")),
        "model": {"vocab_size": 300, "n_blocks": 2, "d_model": 32, "d_head": 8, "d_ff": 16},
        "cluster": {"accelerator": "cpu", "threads": 1},
    }
    (study / "layers/data.yaml").write_text(yaml.safe_dump(layer))
    (study / "asked").mkdir()
    (study / "asked/mine.json").write_text(json.dumps(PROMPTS[:1]))
    suite = {
        "name": "small",
        "arms": ["both"],
        "seeds": [1],
        "layers": ["layers/data.yaml"],
        "run": {
            "training": {"steps": 1, "batch_tokens": 64, "warmup_steps": 0},
            "validation": {"sequences": 4},
            "generation": {"prompts": "asked/mine.json", "max_new_tokens": 2, "samples_per_prompt": 1},
        },
    }
    (study / "suite.yaml").write_text(yaml.safe_dump(suite))
    return study


def test_a_path_means_beside_its_file_and_the_hash_knows_no_place(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cell(root: Path) -> RunConfig:
        return load_cell(load_suite(root / "suite.yaml"), "both", 1)

    here = cell(study)
    (source,) = here.data.sources
    assert source.path == "corpus" and len(local_files(source) or {}) == 40
    assert [prompt.id for prompt in load_prompts(here.generation)] == [3]
    shutil.copytree(study, tmp_path / "copy")
    monkeypatch.chdir(study / "layers")  # a third place, where the corpus lies in the current folder
    there = cell(tmp_path / "copy")
    assert there.data.sources[0].folder == str(tmp_path / "copy/layers") != source.folder
    bare = load_run([], [f"--data.sources={json.dumps([vars(source) | {'folder': None}])}"])
    assert bare.data.sources[0] == source and len(local_files(bare.data.sources[0]) or {}) == 40
    assert here == there and scientific_hash(here) == scientific_hash(there)
    assert to_yaml(here) == to_yaml(there) and "folder" not in to_yaml(here)
    assert "folder" not in to_yaml(inlined(load_suite(study / "suite.yaml")))


@pytest.mark.parametrize("pattern", ["corpus", "corpus/*.txt", "**/*.txt", "one [1].txt"])
def test_files_folders_and_globs_are_found_from_anywhere(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "a [b]*"  # which a glob would read otherwise
    write_folder(root / "corpus", texts(2))
    (root / "one [1].txt").write_text("text")
    layer = {"data": {"sources": [{"name": "x", "kind": "text", "path": pattern}]}}
    (root / "layer.yaml").write_text(yaml.safe_dump(layer))
    monkeypatch.chdir(root)
    inside = local_files(load_run(["layer.yaml"]).data.sources[0])
    monkeypatch.chdir(tmp_path)
    assert inside and local_files(load_run([root / "layer.yaml"]).data.sources[0]) == inside


def test_a_prepared_corpus_and_a_tokenizer_are_found_so_too(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert main(["prepare", "--config", str(study / "layers/data.yaml"), "--out", str(study / "layers/ready")]) == 0
    shutil.copy(study / "layers/ready/tokenizer.json", study / "layers/words.json")
    layer = {"data": {"dir": "ready", "tokenizer": {"path": "words.json"}}}
    (study / "layers/more.yaml").write_text(yaml.safe_dump(layer))
    config = load_run([study / "layers/data.yaml", study / "layers/more.yaml"])
    assert TokenStore.open(config.data.dir).vocab_size == 300
    again = ["prepare", "--config", str(study / "layers/data.yaml"), "--config", str(study / "layers/more.yaml")]
    assert main([*again, "--out", str(study / "layers/again")]) == 0
    monkeypatch.chdir(study / "layers")
    config = load_run(["more.yaml"], ["--data.tokenizer.path=ready/tokenizer.json"])  # a flag means the current folder
    assert load_tokenizer(config.data.tokenizer).vocab_size == 300


def run_here(suite: Path, out: Path) -> SuiteDir:
    """What `replicate grid run` does, in this process, and the numbers of the report."""
    quiet, suite_dir = Console(file=io.StringIO()), SuiteDir(out)
    grid = load_grid(load_suite(suite), suite_dir)
    begun = claim_folder(grid.suite, suite_dir, grid.cells)
    make_ready(grid, grid.incomplete, begun, quiet)
    for cell in grid.incomplete:
        run_cell(load_run([cell.run.config]), suite_dir, quiet)
    collect(suite_dir, load_suite(suite_dir.suite))
    return suite_dir


def test_a_folder_is_run_and_reported_from_anywhere_and_after_a_move(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite_dir = run_here(Path("study/suite.yaml"), Path("study/out"))
    assert (suite_dir.prompts / "mine.json").is_file()
    run_here(Path("study/suite.yaml"), Path("study/out"))  # the same suite still, from here and from itself
    refuse_other_suite(load_suite("study/out/suite.yaml"), suite_dir)
    moved = Path(shutil.move(study / "out", tmp_path / 'it\'s "é" $x [1]'))
    shutil.rmtree(study)
    monkeypatch.chdir("/")
    run = SuiteDir(moved).cell("both", 1)
    shutil.rmtree(run.root)
    run_here(moved / "suite.yaml", moved)
    assert run.complete.is_file() and load_prompts(load_run([run.config]).generation)[0].id == 3


def test_what_is_nowhere_is_told_with_where_it_was_sought(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    shutil.rmtree(study / "layers/corpus")
    config = load_run([study / "layers/data.yaml"])
    with pytest.raises(UserError, match=r"matches corpus; .*beside the file that says it, or in the current folder, /"):
        local_files(config.data.sources[0])
