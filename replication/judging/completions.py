"""The completions that a panel compares: both arms' at every seed that may be compared, and the items made of them.

What cannot be compared raises UserError.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from replication.config import AnalysisConfig, SuiteConfig, load_suite
from replication.config.study import Study, load_study
from replication.errors import UserError
from replication.generation.completions import Completion, recorded_sampling, suite_completions
from replication.generation.export import read_export
from replication.generation.settings import MATCHED
from replication.judging.seal import Behind
from replication.protocol.certificate import certify
from replication.protocol.preregistration import Plan, read_plan
from replication.runs.layout import RunDir, SuiteDir
from replication.votes.record import check_number

Completions = Mapping[int, Mapping[str, Sequence[Completion]]]
"""seed -> arm -> completions"""
IMPORTED = "imported"
OWN_TO_A_CELL = ("samples_sha256", "weights_sha256")  # every other key of a manifest's `generation` must be alike


@dataclass(frozen=True)
class Chosen:
    """The material of a panel."""

    suite: str  # its name, for the vote record
    arms: tuple[str, ...]  # (baseline, treatment), and further ones where each is compared with each
    completions: Completions  # of the seeds that are used
    left_out: tuple[str, ...]  # a line for each seed that is not
    analysis: AnalysisConfig
    plan: Plan | None  # the preregistration; None without one
    setting: str = ""  # the named way of sampling

    @property
    def n_pairs(self) -> int:
        """Pairs of completions that a judge can be given."""
        found = matched(self.completions, self.arms)
        a, *others = map(len, found.samples)
        for arm, b in zip(self.arms[1:], others, strict=True):
            if a != b:  # each text is in as many pairs as other arms have completions: that would tell, key or no key
                raise UserError(
                    f"{arm}: has {b} completions of each prompt and {self.arms[0]} {a}, so that how often a text "
                    "is shown would tell its arm; give both as many"
                )
        return len(found.prompts) * len(found.seeds) * a**2 * math.comb(len(self.arms), 2)


def from_suite(root: Path, pair: str | None, named: str | None = None, setting: str = "") -> Chosen:
    """Completions of an output folder, of the pair "baseline,treatment" or the suite's own; or of each of the named
    arms with each ("all": of the suite's). `setting`: of a named way of sampling, not those that the configs ask for.
    """
    suite_dir = SuiteDir(root)
    if not suite_dir.suite.is_file():
        raise UserError(
            f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`, or --import a file"
        )
    suite = load_suite(suite_dir.suite)
    analysis = suite.analysis.resolved(suite.arms)
    own = (analysis.baseline or "", analysis.treatment or "")
    arms = _named("--pair", pair, suite) if pair else own
    if named:
        several = suite.arms if named == "all" else _named("--arms", named, suite)
        arms = (*own, *(arm for arm in several if arm not in own)) if set(own) <= set(several) else several
    if not all(arms):
        raise UserError(f"{suite.name}: has one arm, and judges compare two")
    left_out = {}  # seed -> why its completions may not be compared
    for checked in certify(suite_dir, arms, suite.seeds, strict=suite.analysis.strict_pairs).pairs:
        without = [arm for arm in arms if not suite_dir.cell(arm, checked.seed, setting).samples.is_file()]
        if checked.state != "holds":
            left_out[checked.seed] = "; ".join(checked.reasons)
        elif without:
            left_out[checked.seed] = f"{' and '.join(without)} has no completions, `replicate generate` makes them"
    found = suite_completions(suite_dir, arms, setting)
    kept = {seed: of_arm for seed, of_arm in found.items() if seed in suite.seeds and seed not in left_out}
    _check_alike(suite_dir, [suite_dir.cell(arm, seed, setting) for seed in sorted(kept) for arm in arms])
    record = read_plan(suite_dir)
    lines = tuple(f"seed {seed} is left out: {why}" for seed, why in left_out.items())
    return Chosen(suite.name, arms, kept, lines, analysis, record.plan if record else None, setting)


def from_file(path: Path) -> Chosen:
    """Completions of a file that the author's public tool exports; it names no seed, and they carry seed 0."""
    completions = read_export(path)
    baseline, treatment = completions[0]
    return Chosen(IMPORTED, (baseline, treatment), completions, (), AnalysisConfig(), None)


def _named(flag: str, names: str, suite: SuiteConfig) -> tuple[str, ...]:
    arms = tuple(arm.strip() for arm in names.split(","))
    if len(arms) < 2 or (len(arms) > 2 and flag == "--pair") or len({*arms}) < len(arms):
        two = "two arms" if flag == "--pair" else "two arms or more, each once"
        raise UserError(f"{flag}: '{names}' must name {two}, such as {suite.arms[0]},{suite.arms[-1]}")
    for arm in arms:
        if arm not in suite.arms:
            raise UserError(f"{flag}: {arm} is no arm of the suite; its arms are {', '.join(suite.arms)}")
    return arms


def _check_alike(suite_dir: SuiteDir, cells: Sequence[RunDir]) -> None:
    """Raise UserError where cells were sampled in different ways: that would be judged as if the arms did it."""
    own = (*OWN_TO_A_CELL, "temperature") if cells and cells[0].setting == MATCHED else OWN_TO_A_CELL
    sampled = {}
    for run in cells:
        recorded = recorded_sampling(run)
        sampled[f"{run.root.parent.name}/{run.root.name}"] = {k: v for k, v in recorded.items() if k not in own}
    for name, settings in sampled.items():
        first, expected = next(iter(sampled.items()))
        if settings != expected:
            keys = sorted(k for k in {*settings, *expected} if settings.get(k) != expected.get(k))
            raise UserError(
                f"{name}: was sampled with another {', '.join(keys)} than {first}; `replicate generate "
                f"{suite_dir.root}` makes all alike"
            )


def deviations(chosen: Chosen, judges: int, votes: int, study: Study) -> list[str]:
    """A line for each thing that the registered plan has otherwise."""
    if chosen.plan is None:
        return []
    planned, lines = chosen.plan.analysis, []
    if chosen.setting:
        lines.append(f"the plan has another way of sampling than {chosen.setting}: votes on it are exploratory")
    if chosen.arms[:2] != (planned.baseline, planned.treatment):
        lines.append(f"the plan's pair is {planned.baseline},{planned.treatment}: votes on another are exploratory")
    if planned.preference_factorial and len(chosen.arms) < 4:
        lines.append("the plan asks which change carries the preference, which takes a panel of all arms: --pairs all")
    if study.sha256 != (chosen.plan.study or load_study()).sha256:
        lines.append("the plan has another study, what judges are told and asked: a deviation")
    if votes != planned.votes_per_judge:
        lines.append(f"the plan has {planned.votes_per_judge} votes a judge, the panel {votes}: a deviation")
    if judges < planned.judges:
        more = planned.judges - judges
        lines.append(
            f"the plan has {planned.judges} judges, people and models together: {more} more are to come from "
            "`replicate judge model`, `sheet` or `invite`, or it is a deviation"
        )
    if judges > planned.judges:
        lines.append(f"the plan has {planned.judges} judges, the panel {judges}: a deviation")
    return lines


@dataclass(frozen=True)
class Found:
    """Completions by name, and what there is of each."""

    prompts: list[int]
    seeds: list[int]
    samples: tuple[list[int], ...]  # of each arm
    by_name: dict[tuple[int, str, int, int], Completion]  # (seed, arm, prompt, sample)


def matched(completions: Completions, arms: Sequence[str]) -> Found:
    """The completions by name, where every seed and arm has the same prompts and samples."""
    if not completions:
        who = f"both {arms[0]} and {arms[1]}" if len(arms) == 2 else f"all of {', '.join(arms)}"
        raise UserError(f"no seed has completions of {who}; run `replicate generate` first")
    seeds = sorted(completions)
    by_name: dict[tuple[int, str, int, int], Completion] = {}
    shapes: dict[str, dict[tuple[int, int], str]] = {}
    for seed, arm in product(seeds, arms):
        check_number(seed, "seed")
        shape = {}
        for one in completions[seed].get(arm, ()):
            check_number(one.prompt_id, f"{arm}/seed-{seed}: prompt_id")
            check_number(one.sample, f"{arm}/seed-{seed}: sample")
            by_name[seed, arm, one.prompt_id, one.sample] = one
            shape[one.prompt_id, one.sample] = one.question
        if not shape or shape != shapes.setdefault(arm, shape):
            raise UserError(
                f"{arm}/seed-{seed}: has completions of other prompts, or other numbers of them, than "
                f"{arms[0]}/seed-{seeds[0]}; generate all cells with the same settings"
            )
    prompts = {prompt for prompt, _ in shapes[arms[0]]}
    for arm in arms[1:]:
        if prompts != {prompt for prompt, _ in shapes[arm]}:
            raise UserError(
                f"{arm}: has completions of other prompts than {arms[0]}; generate both with one prompt file"
            )
    samples = [sorted({sample for _, sample in shapes[arm]}) for arm in arms]
    for arm, numbers in zip(arms, samples, strict=True):
        for prompt, sample in product(sorted(prompts), numbers):
            if (prompt, sample) not in shapes[arm]:
                raise UserError(f"{arm}: prompt {prompt} lacks some of the samples {numbers}; generate the cells again")
    return Found(sorted(prompts), seeds, tuple(samples), by_name)


def draw_items(found: Found, arms: Sequence[str]) -> dict[str, tuple[dict[str, object], Behind]]:
    """Item id -> its row and what is behind it: every pair of completions of one prompt and seed, in random order."""
    drawn: dict[str, tuple[dict[str, object], Behind]] = {}
    texts = [[(arm, sample) for sample in samples] for arm, samples in zip(arms, found.samples, strict=True)]
    pairs = [pair for two in combinations(texts, 2) for pair in product(*two)]
    for seed, prompt, pair in product(found.seeds, found.prompts, pairs):
        both = list(pair)
        if secrets.randbits(1):
            both.reverse()
        first, second = (found.by_name[seed, arm, prompt, sample] for arm, sample in both)
        item = secrets.token_hex(8)
        about = {"item_id": item, "prompt_id": prompt, "category": first.category, "question": first.question}
        row = {**about, "first": first.text, "second": second.text}
        drawn[item] = row, Behind(seed, both[0][0], both[1][0], both[0][1], both[1][1])
    return drawn
