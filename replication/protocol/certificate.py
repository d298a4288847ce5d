"""The pair certificate: a machine check, seed by seed, that the arms of a suite may be compared.

All arms of a seed must share initial weights, consumed data, token count and schedule, and differ in the keys that the
arm files declare, and in those alone; and all seeds must share data and config, or they are not pooled. That arms ran
other code, or on a machine that rounds otherwise, is a departure: told, and refused where `analysis.strict_pairs` says
so. Pure functions of run folders; nothing that a process said about itself is believed where the folder lets it be
recomputed. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from replication.config import RunConfig, differences, load_run, scientific, scientific_hash, without_seeds
from replication.errors import UserError
from replication.runs.failures import read_failure
from replication.runs.files import file_sha256, read_object
from replication.runs.journal import Logged, LoggedStep, due_validations, journal_gaps, logged_steps, read_journal
from replication.runs.layout import KEPT, RunDir, SuiteDir
from replication.runs.manifest import Manifest, read_manifest
from replication.runs.records import to_json
from replication.runs.starts import NOT_RECORDED, Facts, code_of, machine_of, unlike
from replication.runs.withdrawn import read_withdrawals

State = Literal["holds", "fails", "incomplete"]
SCHEDULE_KEYS = {
    "training.steps": "steps",
    "training.batch_tokens": "tokens a step",
    "training.learning_rate": "peak learning rate",
    "training.warmup_steps": "warm-up steps",
    "training.decay_steps": "decay steps",
}
RATE_KEYS = {*SCHEDULE_KEYS, "token_gain.control"}
"""On which the learning rate of a step depends."""


@dataclass(frozen=True)
class Check:
    """One named question put to all complete cells of one seed."""

    name: str
    holds: bool | None  # None where fewer than two cells are complete, or nothing was recorded
    values: Mapping[str, object]  # by arm
    explanation: str = ""  # one line that names arm and key (or step) where it fails; empty where it holds
    refuses: bool = True  # whether failing it refuses the pair; else it is a departure: told, and the pair is used


@dataclass(frozen=True)
class SeedCertificate:
    """All arms of one seed together."""

    seed: int
    state: State  # incomplete where a cell is missing or not complete, whatever the checks of the others say
    missing: tuple[str, ...]  # a line for each such cell
    checks: tuple[Check, ...]  # of the complete cells, with the first of them

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the state is not `holds`, a line each."""
        return (*self.missing, *self._failed(refuses=True))

    @property
    def departures(self) -> tuple[str, ...]:
        """In what the cells are not alike that refuses no pair, a line each."""
        return self._failed(refuses=False)

    def _failed(self, refuses: bool) -> tuple[str, ...]:
        return tuple(f"{c.name}: {c.explanation}" for c in self.checks if c.holds is False and c.refuses == refuses)


@dataclass(frozen=True)
class PairCertificate:
    """One arm beside the suite's first arm, at one seed: what a paired difference needs."""

    arm: str
    reference: str
    seed: int
    state: State
    reasons: tuple[str, ...]
    departures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Certificate:
    """The certificate of a suite."""

    arms: tuple[str, ...]
    seeds: tuple[SeedCertificate, ...]
    pairs: tuple[PairCertificate, ...]  # so that a failed cell of one arm does not spoil the pairs of the others

    @property
    def holds(self) -> bool:
        """Whether every seed holds."""
        return all(seed.state == "holds" for seed in self.seeds)

    @property
    def not_pooled(self) -> dict[int, str]:
        """The seeds that are not as the others in what all must share -> in what."""
        reasons = [(seed.seed, reason) for seed in self.seeds for reason in seed.reasons]
        reasons += [(pair.seed, reason) for pair in self.pairs for reason in pair.reasons]
        return {seed: line.removeprefix("over seeds: ") for seed, line in reasons if line.startswith("over seeds: ")}

    def pair(self, arm: str, seed: int) -> PairCertificate:
        """The pair of an arm with the first arm at a seed (KeyError: no such pair)."""
        return {(pair.arm, pair.seed): pair for pair in self.pairs}[arm, seed]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as written to certificate.json."""
        of_seeds = [
            to_json(seed) | {"reasons": list(seed.reasons), "departures": list(seed.departures)} for seed in self.seeds
        ]
        return {"holds": self.holds, **to_json(self), "seeds": of_seeds}


def certify(
    suite_dir: SuiteDir,
    arms: Sequence[str],
    seeds: Sequence[int],
    logged: Mapping[tuple[str, int], Logged] | None = None,
    strict: bool = False,
) -> Certificate:
    """Check every seed of a suite. Damaged or edited files make a check fail; a damaged withdrawn.json alone raises.

    Args:
        suite_dir: the output folder; cells that are not there count as missing.
        arms: names, the first is the one that the others are paired with.
        logged: `logged_steps` of every (arm, seed), where the caller has read the journals already; else they are read.
        strict: whether departures refuse a pair too.
    """
    cells = [[_gather(suite_dir.cell(arm, seed), arm, seed, logged) for arm in arms] for seed in seeds]
    withdrawn = {int(name): f"{entry}" for name, entry in read_withdrawals(suite_dir).of("seed").items()}
    pairs = [
        PairCertificate(arm, arms[0], two.seed, two.state, two.reasons, two.departures)
        for i, arm in enumerate(arms[1:], 1)
        for two in _certify_seeds([[of_seed[0], of_seed[i]] for of_seed in cells], seeds, strict, withdrawn)
    ]
    pairs.sort(key=lambda pair: seeds.index(pair.seed))
    return Certificate(tuple(arms), tuple(_certify_seeds(cells, seeds, strict, withdrawn)), tuple(pairs))


def _certify_seeds(
    cells: Sequence[Sequence[_Evidence]], seeds: Sequence[int], strict: bool, withdrawn: Mapping[int, str]
) -> list[SeedCertificate]:
    """Each seed by itself, then those that hold beside one another; cells: the same arms at each of the seeds.

    A seed that is withdrawn is pooled with no other, whatever it is like.
    """
    alone = [_certify_cells(of_seed, seed, strict) for of_seed, seed in zip(cells, seeds, strict=True)]
    holding = {seed.seed: of for seed, of in zip(alone, cells, strict=True) if seed.state == "holds"}
    pooled = {seed: of for seed, of in holding.items() if seed not in withdrawn}
    strays = {**_strays(pooled), **_twins(pooled), **withdrawn}
    found = []
    for seed, of_seed in zip(alone, cells, strict=True):
        shown = {cell.arm: cell.data_hash for cell in of_seed if cell.state == "complete"}
        line = strays.get(seed.seed)
        check = Check("over seeds", None if line is None else not line, shown, line or "")
        found.append(replace(seed, state="fails" if line else seed.state, checks=(*seed.checks, check)))
    return found


def _certify_cells(cells: Sequence[_Evidence], seed: int, strict: bool) -> SeedCertificate:
    complete = [cell for cell in cells if cell.state == "complete"]
    missing = tuple(cell.missing for cell in cells if cell.state != "complete")
    checks = []
    for name, values, faults in _comparisons(complete):
        holds = not faults if len(complete) > 1 else None
        shown = {cell.arm: value for cell, value in zip(complete, values, strict=True)}
        checks.append(Check(name, holds, shown, "" if holds is None else "; ".join(faults)))
    checks += [
        _check_facts("code", {cell.arm: code_of(cell.manifest) for cell in complete}, strict),
        _check_facts("machine", {cell.arm: machine_of(cell.manifest, cell.config) for cell in complete}, strict),
    ]
    state: State = "fails" if any(check.holds is False and check.refuses for check in checks) else "holds"
    return SeedCertificate(seed, "incomplete" if missing else state, missing, tuple(checks))


def _check_facts(name: str, facts: Mapping[str, Sequence[Facts]], strict: bool) -> Check:
    """That the same is true of all starts of all cells: any that was otherwise may have moved a weight."""
    values = {
        arm: {key: " then ".join(dict.fromkeys(str(f.get(key, NOT_RECORDED)) for f in starts)) for key in starts[-1]}
        for arm, starts in facts.items()
    }
    different = unlike(facts)
    if not different and any(NOT_RECORDED in f.values() for starts in facts.values() for f in starts):
        return Check(name, None, values, NOT_RECORDED, strict)
    if len(facts) < 2:
        return Check(name, None, values, refuses=strict)
    return Check(name, not different, values, different, strict)


@dataclass(frozen=True)
class _Evidence:
    """The content of one cell's files, read once; of one that is not complete, `missing` alone."""

    arm: str
    state: str
    missing: str = ""  # one line about a cell that is not complete
    manifest: Manifest = field(default_factory=Manifest)
    config: RunConfig | None = None  # of config.yaml; None where that cannot be read
    scientific: dict[str, object] = field(default_factory=dict)  # recomputed from it
    faults: tuple[str, ...] = ()  # of manifest.json and config.yaml themselves
    logged: Logged = field(default_factory=dict)  # of training lines
    journal: tuple[str, ...] = ()  # faults of the journal, or of COMPLETE
    plugins: tuple[str, ...] = ()  # faults of the output folder's copies

    @property
    def data_hash(self) -> str:
        """First 16 hex digits of the data's hash: enough to tell corpora apart, and to be read."""
        return str(self.manifest.data.hash)[:16]

    @property
    def shared(self) -> dict[str, object]:
        """What all seeds of an arm have in common."""
        return {"the data's hash": self.data_hash, **without_seeds(self.scientific)}


def _gather(run: RunDir, arm: str, seed: int, given: Mapping[tuple[str, int], Logged] | None) -> _Evidence:
    state = run.state()
    if state != "complete":
        failure = read_failure(run) if state == "failed" else None
        why = f" ({_one_line(failure.error)})" if failure else ""
        missing = "the cell is missing" if state == "pending" else f"the cell is not complete: {state}{why}"
        return _Evidence(arm, state, f"{arm}: {missing}")
    manifest, faults = None, list[str]()
    try:
        manifest = read_manifest(run)
        faults += [] if manifest else [f"{arm}: manifest.json is missing or holds nothing"]
    except (UserError, OSError) as error:
        faults.append(f"{arm}: manifest.json cannot be used ({_one_line(error)})")
    loaded, keys = None, dict[str, object]()
    try:
        loaded = load_run([run.config])
        keys = scientific(loaded)
        faults += _contradictions(arm, seed, loaded, manifest or Manifest())
    except (UserError, OSError, ValueError) as error:
        faults.append(f"{arm}: config.yaml cannot be used ({_one_line(error)})")
    journal = []
    try:
        logged = logged_steps(read_journal(run.metrics)) if given is None else given[arm, seed]
    except UserError as error:
        logged, journal = {}, [_one_line(error)]
    if loaded is not None and keys:
        last = loaded.training.steps
        journal += journal_gaps(logged, last, due_validations(last, loaded.validation.every_steps))
        journal += [f"metrics.jsonl goes on to step {max(logged)}"] if max(logged, default=0) > last else []
    journal = [f"{arm}: {fault}" for fault in (*journal, *unlike_complete(run, manifest))]
    lines = {step: line for step, line in logged.items() if line.is_training}
    plugins = []
    for name, sha256 in (loaded.plugins if loaded else {}).items():
        copy = SuiteDir.of(run).plugins / name
        there = file_sha256(copy) if copy.is_file() else "missing"
        if there != sha256:
            plugins.append(f"{arm}: plugins/{name} is {there}, config.yaml has {sha256}")
    found = (tuple(faults), lines, tuple(journal), tuple(plugins))
    return _Evidence(arm, state, "", manifest or Manifest(), loaded, keys, *found)


def unlike_complete(run: RunDir, manifest: Manifest | None) -> list[str]:
    """Faults of COMPLETE, and of journal and manifest if they are not those that it was written for."""
    try:
        marker = read_object(run.complete)
        journal = file_sha256(run.metrics) if run.metrics.is_file() else None
    except (UserError, OSError) as error:
        return [f"COMPLETE cannot be used ({_one_line(error)})"]
    if not marker:
        return ["COMPLETE holds nothing; remove it and run again"]
    keys = [k for k in KEPT if manifest is not None and k in marker and marker[k] != getattr(manifest, k)]
    found = [f"manifest.json has {k} {getattr(manifest, k)}, COMPLETE has {marker[k]}" for k in keys]
    if marker.get("journal_sha256", journal) != journal:
        found.append("metrics.jsonl is not the file that COMPLETE was written for: it was cut, damaged or edited")
    return found


def _contradictions(arm: str, seed: int, config: RunConfig, manifest: Manifest) -> Iterator[str]:
    """Contradictions between config.yaml, manifest.json and the folder's name."""
    if manifest.config_hash != (hashed := scientific_hash(config)):
        yield (
            f"{arm}: config.yaml hashes to {hashed}, manifest.json has {manifest.config_hash}: the file "
            "was edited, or another version of this package wrote it"
        )
    for key, folder in (("arm", arm), ("seed", seed)):
        for file, value in (("config.yaml", getattr(config, key)), ("manifest.json", getattr(manifest, key))):
            if value != folder:
                yield f"{arm}: {file} has {key} {value} in the folder of {key} {folder}"


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]


def _comparisons(cells: Sequence[_Evidence]) -> Iterator[tuple[str, Sequence[object], Sequence[str]]]:
    """(name, what each arm has, faults) of each question; a fault is one line that names arm and key."""
    manifests = [cell.manifest for cell in cells]
    weights = [manifest.initial_weights_sha256 for manifest in manifests]
    yield "initial weights", weights, _unlike_first(cells, weights, "initial_weights_sha256")
    chains = [manifest.data_chain for manifest in manifests]
    # a journal that already differs says at which step; the end would only repeat it
    yield "data chain", chains, _chain_faults(cells) or _unlike_first(cells, chains, "data_chain")
    hashes = [manifest.data.hash for manifest in manifests]
    yield "data", hashes, _unlike_first(cells, hashes, "data.hash")
    tokens = [manifest.tokens for manifest in manifests]
    yield "tokens", tokens, _unlike_first(cells, tokens, "tokens")
    schedules = [{word: cell.scientific.get(key) for key, word in SCHEDULE_KEYS.items()} for cell in cells]
    reached = [schedule | {"step reached": m.step} for schedule, m in zip(schedules, manifests, strict=True)]
    extended = [{"extended": [str(e) for e in m.extensions]} if m.extensions else {} for m in manifests]
    reached = [of | more for of, more in zip(reached, extended, strict=True)]
    declared = sorted({key for manifest in manifests for key in manifest.arm_keys})
    yield "schedule", reached, _schedule_faults(cells, declared)
    yield "journal", [max(cell.logged, default=None) for cell in cells], [f for cell in cells for f in cell.journal]
    plugins = [cell.config.plugins if cell.config else {} for cell in cells]
    if any(plugins):
        yield "plugins", plugins, [fault for cell in cells for fault in cell.plugins]
    yield "declared keys", [{k: c.scientific.get(k) for k in declared} for c in cells], _undeclared(cells, declared)


def _unlike_first(cells: Sequence[_Evidence], values: Sequence[Any], what: str) -> list[str]:
    """A line for each arm that has no value, or another than the first arm's."""
    faults = [f"{c.arm}: {what} is missing" for c, v in zip(cells, values, strict=True) if v is None]
    for cell, value in zip(cells[1:], values[1:], strict=True):
        if value is not None and values[0] is not None and value != values[0]:
            faults.append(f"{cell.arm}: {what} is {value}, {cells[0].arm} has {values[0]}")
    return faults


def _chain_faults(cells: Sequence[_Evidence]) -> list[str]:
    """Of the hash chain of the data fed so far: against the manifest, and at every step that two journals share."""
    faults = []
    for cell in cells:
        last = None if cell.manifest.step is None else cell.logged.get(cell.manifest.step)
        if last is not None and last.data_hash != cell.manifest.data_chain:
            faults.append(
                f"{cell.arm}: data_hash of the journal's last step is {last.data_hash}, manifest.json has "
                f"data_chain {cell.manifest.data_chain}"
            )
    return faults + _first_differences(cells, "data_hash", lambda line: line.data_hash)


def _first_differences(cells: Sequence[_Evidence], key: str, of: Callable[[LoggedStep], object]) -> list[str]:
    """For each arm the first step it shares with the first arm whose lines lack a key or differ in it, in words."""
    found = []
    for other in cells[1:]:
        first = cells[0]
        common = sorted(first.logged.keys() & other.logged.keys())
        if not common:
            found.append(
                f"{other.arm}: its journal shares no logged step with {first.arm}'s, so {key} cannot be compared"
            )
        for step in common:
            a, b = of(first.logged[step]), of(other.logged[step])
            if a is None or b is None:
                found.append(f"{(first if a is None else other).arm}: {key} is missing at step {step}")
                break
            if a != b:
                found.append(f"{other.arm}: {key} differs first at step {step} ({b}, {first.arm} has {a})")
                break
    return found


def _schedule_faults(cells: Sequence[_Evidence], declared: Sequence[str]) -> list[str]:
    """Of the step reached, the schedule's keys, and the learning rate at every common logged step.

    Arms may declare a rate of their own, or a gain that acts on it; never another number of steps or tokens.
    """
    faults = []
    for cell in cells:
        planned, reached = cell.scientific.get("training.steps"), cell.manifest.step
        if planned != reached:
            faults.append(f"{cell.arm}: reached step {reached}, training.steps is {planned}")
    own = {key for key in declared if key not in ("training.steps", "training.batch_tokens")}
    for key in SCHEDULE_KEYS:
        faults += _unlike_first(cells, [cell.scientific.get(key) for cell in cells], key) if key not in own else []
    alike = [c for c in cells if all(c.scientific.get(k) == cells[0].scientific.get(k) for k in own & RATE_KEYS)]
    return faults + _first_differences(alike, "train/learning_rate", lambda line: line.learning_rate)


def _undeclared(cells: Sequence[_Evidence], declared: Sequence[str]) -> list[str]:
    """That arms differ in declared keys alone, and that every arm declares the same ones."""
    faults = [fault for cell in cells for fault in cell.faults]
    for cell in cells:
        if lacking := [key for key in declared if key not in cell.manifest.arm_keys]:
            faults.append(f"{cell.arm}: does not declare {', '.join(lacking)}, another arm does")
    for cell in cells[1:]:
        for key, (a, b) in differences(cells[0].scientific, cell.scientific).items():
            if key not in declared and cells[0].scientific and cell.scientific:
                faults.append(f"{cell.arm}: {key} is {b}, {cells[0].arm} has {a}, and no arm file declares it")
    return faults


def _twins(of_seed: Mapping[int, Sequence[_Evidence]]) -> dict[int, str]:
    """The seeds that are an earlier one under another number -> by what, in words."""
    found, first = dict[int, str](), dict[tuple[str, object], int]()
    for seed, cells in of_seed.items():
        for cell in cells:
            marks: dict[str, object] = {"ended with the weights": cell.manifest.final_weights_sha256}
            if cell.config is not None:
                given = cell.config.training.initial_weights or cell.config.model.initial_weights
                fixed = cell.config.weights_seed is not None or given
                marks["began with the weights"] = None if fixed else cell.manifest.initial_weights_sha256
                marks["has the weights_seed and data_seed"] = (
                    cell.config.effective_weights_seed,
                    cell.config.effective_data_seed,
                )
            for what, value in marks.items():
                if value is not None and (other := first.setdefault((what, value), seed)) != seed:
                    found[seed] = f"{cell.arm} {what} of seed {other}, so it is no other run"
    return found


def _strays(of_seed: Mapping[int, Sequence[_Evidence]]) -> dict[int, str]:
    """For each seed, if there are several, in what it is not as most (or the first) are, in words; "" where it is.

    A suite has one corpus, so one validation set, and one config an arm: a mean over seeds that differ in these is a
    mean over different experiments. The seeds themselves may differ, that of weights and that of data apart.
    """
    if len(of_seed) < 2:
        return {}
    alike: dict[str, list[int]] = {}
    for seed, cells in of_seed.items():
        alike.setdefault(json.dumps([cell.shared for cell in cells]), []).append(seed)
    most = max(alike.values(), key=len)  # of equally many, the first in the suite's order

    def named(seeds: Sequence[int]) -> str:
        return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"

    found: dict[int, str] = {}
    for seeds in alike.values():
        keys: dict[str, tuple[Any, Any]] = {}
        for here, there in zip(of_seed[seeds[0]], of_seed[most[0]], strict=True):
            keys |= differences(here.shared, there.shared)
        lines = [f"{k} is {a} at {named(seeds)} and {b} at {named(most)}" for k, (a, b) in list(keys.items())[:5]]
        found |= dict.fromkeys(seeds, "; ".join([*lines, "they are not pooled"]) if lines else "")
    return found
