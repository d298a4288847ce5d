"""Experiments that never were: votes with known seeds', prompts' and judges' spread, to try the tests on.

Spreads are standard deviations of the chance that a decisive vote goes to the treatment, on the scale of that chance.
Shapes: R experiments, V votes of each, all experiments with the same pattern of votes. Many scenarios take long: they
are computed in parallel, one row each, which is kept as it comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy import special
from scipy import stats as scipy_stats

from replication.console import progress
from replication.processes.launcher import tethered
from replication.runs.files import naming, parse_objects

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
AT_ONCE = 250
"""Experiments in memory at a time."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the chance of a vote for the treatment."""

    seed: float = 0.0  # between training seeds: pairs of models differ
    prompt: float = 0.0
    judge: float = 0.0
    seed_prompt: float = 0.0  # a pair of models is better at some prompts than at others, beyond both main effects
    seed_judge: float = 0.0
    prompt_judge: float = 0.0

    @property
    def total(self) -> float:
        return float(np.sqrt(sum(sd**2 for sd in astuple(self))))


@dataclass(frozen=True, eq=False)
class VotePattern:
    """Who votes on what; every array is int64 [V]."""

    seed: Ints
    prompt: Ints
    judge: Ints

    @property
    def factors(self) -> tuple[Ints, Ints, Ints]:
        return self.seed, self.prompt, self.judge

    def __len__(self) -> int:
        return len(self.seed)


def vote_pattern(n_seeds: int, n_prompts: int, n_judges: int, votes_per_judge: int | None = None) -> VotePattern:
    """Every judge votes once on each prompt, with seeds in rotation over prompts and judges.

    With `votes_per_judge` a judge sees so many prompts only, consecutive ones that move on from judge to judge.
    """
    n_votes = n_prompts if votes_per_judge is None else min(votes_per_judge, n_prompts)
    judge, place = (a.ravel() for a in np.meshgrid(np.arange(n_judges), np.arange(n_votes), indexing="ij"))
    prompt = (judge * n_votes + place) % n_prompts
    return VotePattern((prompt + judge + judge // n_seeds) % n_seeds, prompt, judge)


def draw_scores(
    preference: float,
    spread: Spread,
    ties: float,
    pattern: VotePattern,
    n: int,
    generator: np.random.Generator,
    logit: bool = False,
) -> Floats:
    """Votes of n experiments, [R, V]: 1 for the treatment, 0 for the baseline, 0.5 for a tie.

    Chance of the treatment = preference + seed + prompt + judge + interactions, cut off at 0 and 1, or all of it on the
    logit scale; every effect is normal and drawn anew in each experiment. A vote is a tie by a chance of its own.
    """
    seed, prompt, judge = pattern.factors
    n_seeds, n_prompts, n_judges = (int(index.max()) + 1 for index in pattern.factors)
    chance = np.full((n, len(pattern)), preference)
    effects = (
        (spread.seed, seed, n_seeds),
        (spread.prompt, prompt, n_prompts),
        (spread.judge, judge, n_judges),
        (spread.seed_prompt, seed * n_prompts + prompt, n_seeds * n_prompts),
        (spread.seed_judge, seed * n_judges + judge, n_seeds * n_judges),
        (spread.prompt_judge, prompt * n_judges + judge, n_prompts * n_judges),
    )
    for sd, index, size in effects:
        if sd:
            chance += sd * generator.standard_normal((n, size))[:, index]
    if logit:
        chance = special.expit(chance)
    scores = (generator.random(chance.shape) < chance).astype(np.float64)
    scores[generator.random(chance.shape) < ties] = 0.5
    return scores


def true_share(preference: float, spread: Spread) -> float:
    """The treatment's share of decisive votes over all seeds, prompts and judges: the mean chance after the cut."""
    z = np.linspace(-8, 8, 4001)
    weights = scipy_stats.norm.pdf(z)
    return float((np.clip(preference + spread.total * z, 0, 1) * weights).sum() / weights.sum())


def preference_for(share: float, spread: Spread) -> float:
    """The mean before the cut at 0 and 1 that gives a true share; the share lies between 0 and 1."""
    low, high = -1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if true_share(middle, spread) < share else (low, middle)
    return (low + high) / 2


def batches(experiments: int) -> Iterator[int]:
    """Sizes of the parts in which so many experiments are drawn."""
    yield from (min(AT_ONCE, experiments - start) for start in range(0, experiments, AT_ONCE))


class Keyed(Protocol):
    @property
    def key(self) -> str: ...


S = TypeVar("S", bound=Keyed)
R = TypeVar("R", bound=Mapping[str, Any])
"""A row: a TypedDict of plain JSON with `key`."""


def _leave_to_parent() -> None:
    """Make a worker deaf to Ctrl-C, which its parent answers, and end at the parent's word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def compute_rows(
    scenarios: Sequence[S],
    function: Callable[[S, int, int], R],
    experiments: int,
    seed: int,
    path: Path,
    label: str,
    console: Console,
    jobs: int | None = None,
) -> list[R]:
    """function(scenario, experiments, seed) of every scenario, in their order; `function` is at the top of its module.

    `path` keeps the finished rows as JSON lines; those of the same number, seed and code are not computed again.
    `label` stands before the progress bar; `jobs` run at once, one a core where it is None.
    """
    package = Path(__file__).parents[1]
    analysis = sorted(file for part in ("simulation", "statistics") for file in (package / part).glob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in analysis)).hexdigest()[:16]
    same = [experiments, seed, code]
    content = path.read_bytes() if path.exists() else b""
    done: dict[str, Any] = {row["key"]: row for row in parse_objects(content) if row.pop("arguments", None) == same}
    missing = [scenario for scenario in scenarios if scenario.key not in done]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            naming(path),
            open(path, "a", encoding="utf-8") as file,
            progress(console, "bar", "count", "elapsed", transient=True) as shown,
            ProcessPoolExecutor(min(jobs or os.cpu_count() or 1, len(missing)), initializer=_leave_to_parent) as pool,
            tethered(),
        ):
            others = active_children()
            task = shown.add_task(label, total=len(scenarios), completed=len(scenarios) - len(missing))
            try:
                futures = {pool.submit(function, scenario, experiments, seed): scenario.key for scenario in missing}
                for future in as_completed(futures):
                    row = done[futures[future]] = future.result()
                    file.write(json.dumps({"arguments": same, **row}) + "\n")
                    file.flush()
                    shown.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in set(active_children()) - set(others):
                    worker.terminate()  # in the middle of an experiment, of which nothing is kept
                raise
    return [done[scenario.key] for scenario in scenarios]
