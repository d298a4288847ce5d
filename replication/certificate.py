"""The pair certificate: a machine check, seed by seed, that the arms of a suite may be compared.

All arms of a seed must share initial weights, consumed data, token count and schedule, and differ in the keys that the
arm files declare, and in those alone. Pure functions of run folders; nothing that a process said about itself is
believed where the folder lets it be recomputed. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from replication.config import differences, load_run, scientific, scientific_hash
from replication.errors import UserError
from replication.rundir import RunDir, SuiteDir, read_journal, read_json

State = Literal["holds", "fails", "incomplete"]
Logged = dict[int, dict[str, Any]]
"""Step of a training line -> what the checks read of it: LOGGED_KEYS alone, so that many journals fit in memory."""

LOGGED_KEYS = ("data_hash", "train/learning_rate")

SCHEDULE_KEYS = {
    "training.steps": "steps",
    "training.batch_tokens": "tokens a step",
    "training.learning_rate": "peak learning rate",
    "training.warmup_steps": "warm-up steps",
    "training.decay_steps": "decay steps",
}

# ---------------------------------------------------------------- the certificate


@dataclass(frozen=True)
class Check:
    """One named question put to all complete cells of one seed."""

    name: str
    """initial weights, data chain, data, tokens, schedule or declared keys."""
    holds: bool | None
    """None where fewer than two cells are complete: nothing to compare."""
    values: dict[str, Any]
    """What each arm has."""
    explanation: str = ""
    """One line that names arm and key (or step) where the check fails; empty where it holds."""


@dataclass(frozen=True)
class SeedCertificate:
    """All arms of one seed together."""

    seed: int
    state: State
    """incomplete where a cell is missing or not complete, whatever the checks of the others say."""
    missing: tuple[str, ...]
    """One line for each cell that is missing or not complete."""
    checks: tuple[Check, ...]
    """Over the complete cells; the first of them is the one that the others are compared with."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the state is not `holds`, a line each."""
        return (*self.missing, *(f"{c.name}: {c.explanation}" for c in self.checks if c.holds is False))


@dataclass(frozen=True)
class PairCertificate:
    """One arm beside the suite's first arm, at one seed: what a paired difference needs."""

    arm: str
    reference: str
    seed: int
    state: State
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Certificate:
    """The certificate of a suite."""

    arms: tuple[str, ...]
    seeds: tuple[SeedCertificate, ...]
    pairs: tuple[PairCertificate, ...]
    """Every arm but the first, at every seed: a failed cell of one arm does not spoil the pairs of the others."""

    @property
    def holds(self) -> bool:
        """Whether every seed holds."""
        return all(seed.state == "holds" for seed in self.seeds)

    def pair(self, arm: str, seed: int) -> PairCertificate:
        """The pair of an arm with the first arm at a seed (KeyError: no such pair)."""
        for pair in self.pairs:
            if (pair.arm, pair.seed) == (arm, seed):
                return pair
        raise KeyError((arm, seed))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, as written to certificate.json."""
        plain = dataclasses.asdict(self)
        for written, seed in zip(plain["seeds"], self.seeds, strict=True):
            written["reasons"] = list(seed.reasons)
        return {"holds": self.holds, **json.loads(json.dumps(plain))}


def logged_steps(lines: Iterable[dict[str, Any]]) -> Logged:
    """What the checks need of a journal's lines; a later line of the same step wins."""
    return {line["step"]: {k: line[k] for k in LOGGED_KEYS if k in line} for line in lines if "tokens" in line}


def certify(
    suite_dir: SuiteDir,
    arms: Sequence[str],
    seeds: Sequence[int],
    logged: Mapping[tuple[str, int], Logged] | None = None,
) -> Certificate:
    """Check every seed of a suite.

    Args:
        suite_dir: the output folder; cells that are not there count as missing.
        arms: names, the first is the one that the others are paired with.
        seeds: training seeds.
        logged: `logged_steps` of every (arm, seed), where the caller has read the journals already; else they are read.

    Returns:
        The certificate. Damaged or edited files make a check fail; nothing is raised for them.
    """
    by_seed, pairs = [], []
    gather = _Gatherer(logged)
    for seed in seeds:
        evidence = [gather(suite_dir.cell(arm, seed), arm, seed) for arm in arms]
        by_seed.append(_certify_cells(evidence, seed))
        for other in evidence[1:]:
            two = _certify_cells([evidence[0], other], seed)
            pairs.append(PairCertificate(other.arm, arms[0], seed, two.state, two.reasons))
    return Certificate(tuple(arms), tuple(by_seed), tuple(pairs))


def _certify_cells(cells: Sequence[_Evidence], seed: int) -> SeedCertificate:
    complete = [cell for cell in cells if cell.state == "complete"]
    missing = tuple(cell.missing for cell in cells if cell.state != "complete")
    checks = tuple(check(name, complete) for name, check in _CHECKS.items())
    if missing:
        state: State = "incomplete"
    else:
        state = "fails" if any(check.holds is False for check in checks) else "holds"
    return SeedCertificate(seed, state, missing, checks)


# ---------------------------------------------------------------- what a cell's files say


@dataclass(frozen=True)
class _Evidence:
    """What one cell's files say, read once."""

    arm: str
    seed: int
    state: str
    missing: str
    """One line about a cell that is not complete."""
    manifest: dict[str, Any]
    scientific: dict[str, Any]
    """Recomputed from config.yaml; empty where that cannot be read."""
    faults: tuple[str, ...]
    """What is wrong with manifest.json or config.yaml themselves."""
    logged: Logged


class _Gatherer:
    """Reads cells, each once."""

    def __init__(self, logged: Mapping[tuple[str, int], Logged] | None) -> None:
        self._logged = logged

    def __call__(self, run: RunDir, arm: str, seed: int) -> _Evidence:
        state = run.state()
        if state != "complete":
            return _Evidence(arm, seed, state, _missing_line(run, arm, state), {}, {}, (), {})
        manifest, faults = _read_manifest(run)
        config: dict[str, Any] = {}
        try:
            loaded = load_run([run.config])
            config = scientific(loaded)
            faults += _contradictions(arm, seed, config, scientific_hash(loaded), manifest)
        except (UserError, OSError, ValueError) as error:
            faults.append(f"{arm}: config.yaml cannot be used ({_one_line(error)})")
        logged = logged_steps(read_journal(run.metrics)) if self._logged is None else self._logged[arm, seed]
        return _Evidence(arm, seed, state, "", manifest, config, tuple(faults), logged)


def _missing_line(run: RunDir, arm: str, state: str) -> str:
    if state == "pending":
        return f"{arm}: the cell is missing"
    try:
        failure = read_json(run.failed) if state == "failed" else None
    except UserError:
        failure = None
    error = str(failure.get("error", "")).strip() if isinstance(failure, dict) else ""
    why = f" ({_one_line(error.splitlines()[0])})" if error else ""
    return f"{arm}: the cell is not complete: {state}{why}"


def _read_manifest(run: RunDir) -> tuple[dict[str, Any], list[str]]:
    arm = run.root.parent.name
    try:
        manifest = read_json(run.manifest)
    except (UserError, OSError) as error:
        return {}, [f"{arm}: manifest.json cannot be used ({_one_line(error)})"]
    if not isinstance(manifest, dict):
        return {}, [f"{arm}: manifest.json is missing or holds no object"]
    return manifest, []


def _contradictions(
    arm: str, seed: int, config: dict[str, Any], config_hash: str, manifest: dict[str, Any]
) -> list[str]:
    """Where config.yaml, manifest.json and the folder's name contradict one another."""
    found = []
    if manifest.get("config_hash") != config_hash:
        found.append(
            f"{arm}: config.yaml hashes to {config_hash}, manifest.json has {manifest.get('config_hash')}: the file "
            "was edited, or another version of this package wrote it"
        )
    for key, folder in (("arm", arm), ("seed", seed)):
        for file, value in (("config.yaml", config.get(key)), ("manifest.json", manifest.get(key))):
            if value != folder:
                found.append(f"{arm}: {file} has {key} {value} in the folder of {key} {folder}")
    return found


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]


# ---------------------------------------------------------------- the checks


def _verdict(name: str, cells: Sequence[_Evidence], values: Iterable[Any], faults: Sequence[str]) -> Check:
    shown = {cell.arm: value for cell, value in zip(cells, values, strict=True)}
    if len(cells) < 2:
        return Check(name, None, shown)
    return Check(name, not faults, shown, "; ".join(faults))


def _unlike_first(cells: Sequence[_Evidence], values: Sequence[Any], what: str) -> list[str]:
    """A line for each arm that has no value, or another than the first arm's."""
    faults = [f"{c.arm}: {what} is missing" for c, v in zip(cells, values, strict=True) if v is None]
    for cell, value in zip(cells[1:], values[1:], strict=True):
        if value is not None and values[0] is not None and value != values[0]:
            faults.append(f"{cell.arm}: {what} is {value}, {cells[0].arm} has {values[0]}")
    return faults


def _manifest_check(*path: str) -> Callable[[str, Sequence[_Evidence]], Check]:
    """The check that one value of manifest.json is there and equal in all arms."""

    def check(name: str, cells: Sequence[_Evidence]) -> Check:
        values = [_dig(cell.manifest, path) for cell in cells]
        return _verdict(name, cells, values, _unlike_first(cells, values, ".".join(path)))

    return check


def _dig(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _check_chain(name: str, cells: Sequence[_Evidence]) -> Check:
    """The hash chain of the data fed so far: at every step that two journals share, and at the end."""
    final = [cell.manifest.get("data_chain") for cell in cells]
    faults = []
    for cell in cells:
        last = cell.logged.get(cell.manifest.get("step", -1))
        if last is not None and last.get("data_hash") != cell.manifest.get("data_chain"):
            faults.append(
                f"{cell.arm}: data_hash of the journal's last step is {last.get('data_hash')}, manifest.json has "
                f"data_chain {cell.manifest.get('data_chain')}"
            )
    for cell in cells[1:]:
        line = _first_difference(cells[0], cell, "data_hash")
        faults += [line] if line else []
    # A journal that already differs says at which step; the end would only repeat it.
    faults = faults or _unlike_first(cells, final, "data_chain")
    return _verdict(name, cells, final, faults)


def _first_difference(first: _Evidence, other: _Evidence, key: str) -> str | None:
    """The first common step whose journal lines lack a key or differ in it, in words."""
    common = sorted(first.logged.keys() & other.logged.keys())
    if not common:
        return f"{other.arm}: its journal shares no logged step with {first.arm}'s, so {key} cannot be compared"
    for step in common:
        a, b = first.logged[step].get(key), other.logged[step].get(key)
        if a is None or b is None:
            return f"{(first if a is None else other).arm}: {key} is missing at step {step}"
        if a != b:
            return f"{other.arm}: {key} differs first at step {step} ({b}, {first.arm} has {a})"
    return None


def _check_schedule(name: str, cells: Sequence[_Evidence]) -> Check:
    """The schedule's keys, the step reached, and the learning rate at every common logged step."""
    values = [{word: cell.scientific.get(key) for key, word in SCHEDULE_KEYS.items()} for cell in cells]
    faults = []
    for cell in cells:
        planned, reached = cell.scientific.get("training.steps"), cell.manifest.get("step")
        if planned != reached:
            faults.append(f"{cell.arm}: reached step {reached}, training.steps is {planned}")
    for key in SCHEDULE_KEYS:
        faults += _unlike_first(cells, [cell.scientific.get(key) for cell in cells], key)
    for cell in cells[1:]:
        line = _first_difference(cells[0], cell, "train/learning_rate")
        faults += [line] if line else []
    shown = [{**value, "step reached": cell.manifest.get("step")} for value, cell in zip(values, cells, strict=True)]
    return _verdict(name, cells, shown, faults)


def _check_declared(name: str, cells: Sequence[_Evidence]) -> Check:
    """Arms differ in declared keys alone, and every arm declares the same ones."""
    declared = [_declared(cell) for cell in cells]
    union: set[str] = set().union(*declared)
    faults = [fault for cell in cells for fault in cell.faults]
    for cell, keys in zip(cells, declared, strict=True):
        if union - keys:
            faults.append(
                f"{cell.arm}: its arm file does not set {', '.join(sorted(union - keys))}, another arm's does"
            )
    for cell in cells[1:]:
        for key, (a, b) in differences(cells[0].scientific, cell.scientific).items():
            if key not in union and cells[0].scientific and cell.scientific:
                faults.append(f"{cell.arm}: {key} is {b}, {cells[0].arm} has {a}, and no arm file declares it")
    values = [{key: cell.scientific.get(key) for key in sorted(union)} for cell in cells]
    return _verdict(name, cells, values, faults)


def _declared(cell: _Evidence) -> set[str]:
    keys = cell.manifest.get("arm_keys")
    return {key for key in keys if isinstance(key, str)} if isinstance(keys, list) else set()


_CHECKS: dict[str, Callable[[str, Sequence[_Evidence]], Check]] = {
    "initial weights": _manifest_check("initial_weights_sha256"),
    "data chain": _check_chain,
    "data": _manifest_check("data", "hash"),
    "tokens": _manifest_check("tokens"),
    "schedule": _check_schedule,
    "declared keys": _check_declared,
}
