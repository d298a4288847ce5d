"""Looks: their levels against published ones, all looks together against their level, and power with looks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from replication.cli.main import main
from replication.simulation.calibration import measure
from replication.simulation.looks import LookScenario, first_below, look_scenarios
from replication.simulation.power import Study, simulate
from replication.simulation.simulate import Spread
from replication.statistics.looks import alpha_for, look_levels


def test_levels_are_the_published_ones() -> None:
    """Five equal looks at two-sided 5 %: z by alpha spending as gsDesign and rpact print them."""
    levels = look_levels((1, 2, 3, 4, 5), 0.05, "obrien_fleming", 2)
    z = scipy_stats.norm.isf(np.array(levels) / 2)
    assert z == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=5e-4)
    assert look_levels((5, 8, 12), 0.05, "haybittle_peto", 2) == pytest.approx((0.001, 0.001, 0.049))
    assert look_levels((8,), 0.05, "haybittle_peto", 1) == pytest.approx((0.05,))


@pytest.mark.parametrize("boundaries", ["haybittle_peto", "obrien_fleming"])
def test_a_part_of_alpha_has_boundaries_of_its_own(boundaries: str) -> None:
    """A third of alpha over three looks: by its own boundaries kept, by a third of alpha's not where alpha is spent."""
    looks = (5, 8, 12)
    for p in (0.0004, 0.02):
        alpha = alpha_for(p, looks, 1, boundaries, 2)
        assert look_levels(looks, alpha, boundaries, 2)[1] == pytest.approx(p, rel=1e-6) if alpha < 1 else p > 0.9 / 50
    information = np.array(looks) / 12
    walk = scipy_stats.multivariate_normal(
        cov=np.sqrt(np.minimum.outer(information, information) / np.maximum.outer(information, information))
    )
    levels = np.array([look_levels(looks, 0.05 / 3, boundaries, 2), look_levels(looks, 0.05, boundaries, 2)])
    z = scipy_stats.norm.isf(levels / [[2], [6]])
    own, parts = (3 * (1 - walk.cdf(bound, lower_limit=-bound)) for bound in z)
    assert 0.049 < own < 0.0502 and (parts > 0.051) == (boundaries == "obrien_fleming")


@pytest.mark.parametrize("boundaries", ["haybittle_peto", "obrien_fleming"])
@pytest.mark.parametrize("sides", [1, 2])
def test_all_looks_together_keep_the_level(boundaries: str, sides: int) -> None:
    looks, rng = (5, 8, 12), np.random.default_rng(0)
    sums = rng.standard_normal((400_000, 12)).cumsum(1)[:, np.array(looks) - 1]
    z = sums / np.sqrt(looks)
    p = scipy_stats.norm.sf(z) if sides == 1 else 2 * scipy_stats.norm.sf(np.abs(z))
    rejected = float((first_below(p, look_levels(looks, 0.05, boundaries, sides)) < 3).mean())
    assert 0.048 < rejected < 0.0511
    assert (first_below(p, (0.05,) * 3) < 3).mean() > 0.08


def test_looks_keep_what_naive_looks_do_not() -> None:
    loss = measure(LookScenario("loss", 0.5), 2000, 0)["tests"]
    assert loss["haybittle_peto"]["rejected"] < 0.065 and loss["obrien_fleming"]["rejected"] < 0.065
    assert loss["naive"]["rejected"] > 0.08
    votes = measure(LookScenario("votes", 0.8, prompts=12, judges=10), 150, 0)["tests"]
    assert votes["haybittle_peto"]["rejected"] <= votes["naive"]["rejected"]
    assert {scenario.of for scenario in look_scenarios()} == {"votes", "loss"}


def test_a_study_with_looks_ends_earlier_and_finds_nearly_as_often() -> None:
    study = Study(8, 10, 8, Spread(0.02, 0.05, 0.05), 0.85, 0.2)
    power, seeds = simulate(study, 100, 0)
    with_looks = Study(8, 10, 8, Spread(0.02, 0.05, 0.05), 0.85, 0.2, (4, 8))
    power_looks, seeds_looks = simulate(with_looks, 100, 0)
    assert seeds == 8 and 4 <= seeds_looks < 8 and power_looks > power - 0.1


def test_the_power_command_takes_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompts", "8", "--judges", "6", "--simulations", "20", "--jobs", "1", "--seed-spread", "0.05"]
    sizes += ["--seed-prompt-share", "0.5"]
    assert main(["power", "--looks", "3,6", "--out", str(tmp_path), *sizes]) == 0
    (row,) = json.loads((tmp_path / "power.json").read_text())["rows"]
    assert row["seeds"] == 6 and row["looks"] == [3, 6] and 3 <= row["expected_seeds"] <= 6
    assert "expected seeds" in (tmp_path / "power.md").read_text()
    assert main(["power", "--looks", "3,6", "--factorial", "0.1", "--out", str(tmp_path)]) == 2
    assert "--looks: are of a panel of two arms" in capsys.readouterr().err
