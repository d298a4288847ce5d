"""The shipped suites: each plans, its arms differ as they say, and its model has the size that was published."""

from __future__ import annotations

import functools
from itertools import combinations
from pathlib import Path

import pytest
import torch

from replication.config import (
    config_root,
    declared_keys,
    differences,
    find_cluster,
    load_cell,
    load_run,
    load_suite,
    scientific,
)
from replication.data.prompts import load_prompts
from replication.grid.cells import Cell, load_cells
from replication.model.size import checkpoint_gib, parameter_count, state_needs
from replication.runs.layout import SuiteDir

SUITES = {path.stem: path for path in sorted((config_root() / "suites").glob("*.yaml"))}
SIZES = {"50m": (49e6, 52e6), "1b2": (1.205e9, 1.215e9), "1b5": (1.475e9, 1.485e9)}
CELLS = {
    "packages_gain_variants_50m": 15,
    "packages_2x2_50m": 12,
    "phase1_gain_variants": 40,
    "phase2_clamp_ranges": 24,
    "phase3_1b2": 2,
    "phase3_ablation": 24,
    "phase3_chinchilla": 6,
    "layer0_exclusion_1b5": 12,
    "optimizers_50m_adamw": 32,
    "optimizers_50m_muon": 32,
    "optimizers_50m_sgd": 32,
    "rates_50m": 60,
    "controls_50m": 54,
    "unsmoothed_50m": 24,
    "unclipped_50m": 24,
}
OPTIMIZERS = [name for name in SUITES if name.startswith("optimizers_50m_")]


@functools.cache  # loading configs is most of the time of these tests
def cells_of(name: str) -> list[Cell]:
    return load_cells(load_suite(SUITES[name]), SuiteDir(Path("/results")))


def cell(name: str, arm: str) -> Cell:
    """The first seed's cell of an arm."""
    return next(c for c in cells_of(name) if c.arm == arm)


# ---------------------------------------------------------------- every suite


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_plans(name: str) -> None:
    suite = load_suite(SUITES[name])
    cells = cells_of(name)
    assert suite.name == name, "a suite is found by its file's name, and its jobs carry the other"
    assert len(cells) == len(suite.arms) * len(suite.seeds) == CELLS.get(name, len(cells))
    assert len({c.hash for c in cells}) == len(cells), "no two cells are the same experiment"


@pytest.mark.parametrize("name", SUITES)
def test_arms_of_a_suite_differ_in_declared_keys_alone(name: str) -> None:
    suite = load_suite(SUITES[name])
    for a, b in combinations(suite.arms, 2):
        different = set(differences(scientific(cell(name, a).config), scientific(cell(name, b).config)))
        assert "arm" in different and different <= declared_keys(suite)


@pytest.mark.parametrize("name", SUITES)
def test_the_late_mean_has_its_ten_validations(name: str) -> None:
    config = cells_of(name)[0].config
    assert config.training.steps >= 10 * config.validation.every_steps


def test_every_published_run_has_a_suite() -> None:
    assert set(SUITES) >= set(CELLS)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_its_published_size(name: str) -> None:
    """In closed form, and of the real module, which takes no memory on the meta device."""
    from replication.model.transformer import Transformer

    model = load_run([f"model/{name}.yaml"]).model
    low, high = SIZES[name]
    assert low < parameter_count(model) < high
    with torch.device("meta"):
        built = Transformer(model)
    assert low < sum(p.numel() for p in built.parameters()) < high


def test_muon_keeps_one_number_for_what_it_trains_and_adamw_two() -> None:
    by_optimizer = [cells_of(f"optimizers_50m_{name}")[0].config for name in ("sgd", "muon", "adamw")]
    for need in (checkpoint_gib, lambda config: state_needs(config).device_gib):
        sgd, muon, adamw = (need(config) for config in by_optimizer)
        assert sgd < muon < adamw
        assert muon == pytest.approx((sgd + adamw) / 2, rel=0.01)  # the tied head is half of this model


# ---------------------------------------------------------------- what the suites are for


@pytest.mark.parametrize("name", [name for name in CELLS if "chinchilla" not in name])
def test_a_suite_fits_every_cluster_file_for_gpus(name: str) -> None:
    """The batches of the smaller models are too few sequences for 32 GPUs in groups of two."""
    suite = load_suite(SUITES[name])
    large = cells_of(name)[0].config.batch_sequences >= 64
    for file in ("one_gpu", "node_8gpu_ddp", "node_8gpu_zero2", *(["nodes_zero3", "nodes_ddp"] if large else [])):
        config = load_cell(suite, suite.arms[-1], suite.seeds[0], cluster=find_cluster(file))
        assert config.cluster.compile == (file != "nodes_zero3" and "packages" not in name), file


def test_the_published_pair_is_part_of_the_ablation() -> None:
    of_ablation = {(c.arm, c.seed): c.hash for c in cells_of("phase3_ablation")}
    assert [of_ablation[c.arm, c.seed] for c in cells_of("phase3_1b2")] == [c.hash for c in cells_of("phase3_1b2")]


def test_no_suite_repeats_its_corpus() -> None:
    """As a whole, that is: a source may be smaller than its share."""
    for name in CELLS:
        config = cells_of(name)[0].config
        budget = config.data.token_budget
        assert budget is not None and config.training.steps * config.training.batch_tokens <= budget, name


def test_chinchilla_is_the_ablation_made_longer() -> None:
    a, b = (scientific(cell(name, "both").config) for name in ("phase3_ablation", "phase3_chinchilla"))
    assert set(differences(a, b)) == {"training.steps", "data.token_budget"}
    config = cell("phase3_chinchilla", "both").config
    assert 0 <= config.training.steps * config.training.batch_tokens - 24e9 < config.training.batch_tokens
    assert config.checkpoints.keep_every_steps == a["training.steps"]
    prompts = config.generation.prompts
    assert prompts is not None and len(load_prompts(prompts)) == 24
    assert 200 < config.generation.max_new_tokens < config.data.block_size_tokens


def test_the_optimizers_suites_differ_in_optimizer_and_rates_alone() -> None:
    assert len(OPTIMIZERS) == 3
    allowed = {"training.optimizer", "training.learning_rate", "training.weight_decay"}
    for arm in load_suite(SUITES[OPTIMIZERS[0]]).arms:
        first, *others = (scientific(cell(name, arm).config) for name in OPTIMIZERS)
        for other in others:
            assert "training.optimizer" in differences(first, other)
            assert set(differences(first, other)) <= allowed


def test_decay_pulls_alike_under_every_optimizer() -> None:
    """SGD adds it to the gradient, where momentum sums it up: rate * decay / (1 - momentum) is one step's pull."""
    adamw, sgd = (cells_of(f"optimizers_50m_{name}")[0].config.training for name in ("adamw", "sgd"))
    pull = sgd.learning_rate * sgd.weight_decay / (1 - sgd.momentum)
    assert pull == pytest.approx(adamw.learning_rate * adamw.weight_decay)
