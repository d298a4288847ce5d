"""What surrounds the numbers: warnings, configuration, data, machines, completions and how to run it all again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from replication.config import MACHINE_KEYS, RunConfig, SuiteConfig, load_run, load_suite, set_by_flags
from replication.errors import UserError
from replication.protocol.certificate import Certificate
from replication.protocol.fidelity import arms_read, in_words, lines_of, section_of
from replication.report.comparisons import Number, Row
from replication.report.load import CellData, Sample
from replication.runs.files import file_sha256, read_json, read_object
from replication.runs.layout import SuiteDir, name_cells
from replication.runs.manifest import Manifest
from replication.runs.records import WrongForm, from_json, to_json
from replication.runs.starts import unlike
from replication.runs.withdrawn import read_withdrawals
from replication.statistics.format import arm_name
from replication.votes.record import read_panel_record

VERDICTS = ("as published", "our choice", "deviates")
LONGEST_COMPLETION = 1500
T = TypeVar("T")


def one_value(values: Iterable[T | None]) -> T | None:
    """The value that all share; None where there is none, or more than one."""
    seen = {value for value in values if value is not None}
    return seen.pop() if len(seen) == 1 else None


def manifests(cells: Iterable[CellData]) -> Iterator[tuple[CellData, Manifest]]:
    """The cells that have a manifest, with it."""
    return ((cell, cell.manifest) for cell in cells if cell.manifest is not None)


def warnings(
    suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[CellData], certificate: Certificate
) -> Iterable[str]:
    """One sentence for each thing that could mislead a reader who trusts the numbers."""
    complete = [cell for cell in cells if cell.complete]
    recorded = list(manifests(complete))
    for seed, why in certificate.not_pooled.items():
        yield f"Seed {seed} is left out of every comparison and mean over seeds: {why}."
    longer: dict[str, list[str]] = {}
    for cell, manifest in manifests(cells):
        for extension in manifest.extensions:
            longer.setdefault(str(extension), []).append(cell.name)
    for line, names in longer.items():
        yield f"{name_cells(names)}: extended {line}."
    for judge, entry in read_withdrawals(suite_dir).of("judge").items():
        yield f"The votes of judge {judge} are kept and enter no statistic: {entry}."
    for of_seed in certificate.seeds:
        if of_seed.departures:
            yield f"The arms of seed {of_seed.seed} were not run alike: {'; '.join(of_seed.departures)}."
    first: dict[tuple[int, str], str] = {}
    for cell, manifest in recorded:
        if manifest.final_weights_sha256 is not None:
            same = first.setdefault((cell.seed, manifest.final_weights_sha256), cell.arm)
            if same != cell.arm:
                pair = f"{arm_name(cell.arm)} and {arm_name(same)}"
                yield f"{pair} ended with the same weights at seed {cell.seed}: no change acted."
    for words, values in (
        ("hashes of the code", {m.code_hash for _, m in recorded}),
        ("commits of the code", {m.git.commit for _, m in recorded}),
        ("hardware", {m.hardware for _, m in recorded}),
        ("world sizes", {m.world_size for _, m in recorded}),
    ):
        if len(values) > 1:
            yield f"The complete cells ran with different {words}; see the table of machines."
    if unlike({cell.name: [manifest.packages] for cell, manifest in recorded}):
        yield "The complete cells ran with different package versions; see the table of machines."
    if len({str(sampling(cell)) for cell in complete}) > 1:
        yield "The completions of the cells were sampled under different settings or prompts: do not compare them."
    if setting := read_panel_record(suite_dir.judging).setting:
        yield f"The panel was made of completions of the setting {setting}, not of those that the configs ask for."
    changed = []
    for cell, manifest in recorded:
        sha256, path = manifest.generation.get("samples_sha256"), suite_dir.cell(cell.arm, cell.seed).samples
        if sha256 and not (path.is_file() and file_sha256(path) == sha256):
            changed.append(cell.name)
    if changed:
        yield f"The completions are not those that were recorded when they were sampled: {', '.join(changed)}."
    if any(len({str(replace(s, at=None, step=None, plan=None)) for s in m.starts}) > 1 for _, m in recorded):
        yield "Some cells were resumed with other code, packages or hardware than they had begun with."
    dirty = sum(bool(manifest.git.dirty) for _, manifest in recorded)
    if dirty:
        yield f"The code had changes that no commit holds in {dirty} of {len(complete)} complete cells."
    known = {suite_dir.cell(cell.arm, cell.seed).root for cell in cells}
    for path in sorted(suite_dir.runs.glob("*/seed-*")):
        if path not in known:
            yield f"The folder runs/{path.parent.name}/{path.name} is not part of the suite and was not read."


def config_summary(suite: SuiteConfig, cells: Sequence[CellData]) -> Row:
    """Keys of the first cell that has a config, and what each arm declares."""
    first = next((cell.config for cell in cells if cell.config), {})
    declared = sorted({key for _, manifest in manifests(cells) for key in manifest.arm_keys if key != "arm"})
    by_arm = {cell.arm: cell.config for cell in reversed(cells) if cell.config}
    own = (*declared, "arm", "seed")
    return {
        # all that arms share, but for the keys of completions: `generate` may have used others since
        "all": {key: value for key, value in first.items() if key not in own and not key.startswith("generation.")},
        "declared_keys": declared,
        "declared": {arm: [by_arm.get(arm, {}).get(key) for key in declared] for arm in suite.arms},
    }


def fidelity(suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[CellData]) -> Row | None:
    """This suite's settings beside those of the published run that it is nearest to; None without a readable config, or
    where it has none of that run's treatments, or another model, and so repeats nothing of it."""
    section = section_of(suite)
    if not {*load_suite(section.suite).arms[1:]} & {*suite.arms}:
        return None
    wanted = arms_read(section, suite)
    configs: dict[str, RunConfig] = {}
    for cell in sorted((c for c in cells if c.arm in wanted), key=lambda c: wanted.index(c.arm)):
        if cell.config and cell.arm not in configs:
            with suppress(UserError, OSError):
                configs[cell.arm] = load_run([suite_dir.cell(cell.arm, cell.seed).config])
    if not configs or any(config.model.class_path for config in configs.values()):
        return None
    rows = []
    for line in lines_of(section, suite, configs):
        published, here = in_words(line)
        row = {"key": line.row.keys.replace(" ", ", "), "arm": line.row.arm, "published": published, "here": here}
        rows.append(row | {"verdict": line.verdict})
    counts = {word: sum(row["verdict"] == word for row in rows) for word in VERDICTS}
    return {"run": section.title, "rows": rows, "counts": counts}


def reproduce(suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[CellData]) -> list[str]:
    """Shell lines that make these numbers again from the folder alone, wherever it lies by then.

    Flags are the keys in which the first cell differs from what the suite file alone gives, and where in the folder its
    corpus and prompts are.
    """
    recorded = list(manifests(cells))
    commit = one_value(manifest.git.commit for _, manifest in recorded)
    version = one_value(manifest.packages.get("replication") for _, manifest in recorded)
    patches = (suite_dir.cell(cell.arm, cell.seed).patch for cell, _ in recorded)
    patch = next((path for path in patches if path.is_file()), None)
    flags = []
    cell = next((cell for cell in cells if cell.config), None)
    if cell is not None:
        with suppress(UserError, OSError):
            given = set_by_flags(suite, cell.arm, cell.seed, cell.config)
            flags = [shlex.quote(flag) for key, flag in given.items() if not key.startswith(MACHINE_KEYS)]
        prompts = suite_dir.prompts / str(cell.config.get("generation.prompts")).rpartition("/")[2]
        here = {"data.dir": suite_dir.data / "manifest.json", "generation.prompts": prompts}
        found = {key: path if key != "data.dir" else path.parent for key, path in here.items() if path.is_file()}
        flags += [f'--{key}="$PWD"/{shlex.quote(str(p.relative_to(suite_dir.root)))}' for key, p in found.items()]
    return [
        "# in the folder of this report; CHECKOUT is one of the code",
        *([f"git -C CHECKOUT checkout {shlex.quote(commit)}"] if commit else [f"# replication {version or 'unknown'}"]),
        *([f'git -C CHECKOUT apply "$PWD/{patch.relative_to(suite_dir.root)}"'] if commit and patch else []),
        " ".join(["replicate grid run suite.yaml --out ../again", *flags]),
        "# writes ../again/report.html; compare ../again/results.json with results.json",
    ]


@dataclass(frozen=True)
class SourceFacts:
    documents: int | None = None
    text_bytes: int | None = None
    train: Mapping[str, int | None] = field(default_factory=dict)
    validation: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class CorpusFacts:
    """What is read of data/manifest.json; damage counts as missing, as everywhere here."""

    sources: dict[str, SourceFacts]
    hash: str | None = None
    vocab_size: int | None = None


def data_summary(suite_dir: SuiteDir, cells: Sequence[CellData]) -> Row | None:
    """The folder's own corpus, and whether every cell was trained on it; None where it holds none."""
    try:
        corpus = from_json(CorpusFacts, read_json(suite_dir.data / "manifest.json"), lenient=True)
    except (UserError, WrongForm):
        return None
    rows = []
    for name, source in corpus.sources.items():
        tokens = {"train_tokens": source.train.get("tokens"), "validation_tokens": source.validation.get("tokens")}
        rows.append(Row(name=name, documents=source.documents, text_bytes=source.text_bytes, **tokens))
    is_used = {manifest.data.hash for _, manifest in manifests(cells)} == {corpus.hash}
    return Row(hash=corpus.hash, vocab_size=corpus.vocab_size, sources=rows, used_by_all=is_used)


def data_hashes(cells: Sequence[CellData]) -> list[Row]:
    """Each hash of the data that cells were trained on, with their seeds."""
    found: dict[str, dict[int, None]] = {}
    for cell, manifest in manifests(cells):
        if manifest.data.hash is not None:
            found.setdefault(manifest.data.hash, {})[cell.seed] = None
    return [Row(hash=hash, seeds=list(seeds)) for hash, seeds in found.items()]


def machines(cells: Sequence[CellData]) -> list[Row]:
    """Each combination of code, packages and hardware, with the cells that ran there."""
    found = []
    for cell, m in manifests(cells):
        packages = {name: version for name, version in m.packages.items() if version is not None}
        on = to_json(m.hardware) | {"world_size": m.world_size, "commit": m.git.commit, "dirty": m.git.dirty}
        found.append((on | {"packages": packages}, cell.name))
    return _with_cells(found)


def _with_cells(rows: Sequence[tuple[Row, str]]) -> list[Row]:
    """Each different row once, with the names of its cells."""
    different: list[Row] = []
    for row, _ in rows:
        if row not in different:
            different.append(row)
    return [row | {"cells": [name for other, name in rows if other == row]} for row in different]


@dataclass(frozen=True)
class NoiseRow:
    """What is read of one run of `replicate bench noise`."""

    cell: str
    cut: str
    config_hash: str | None
    differences: dict[str, float]


@dataclass(frozen=True)
class Noise:
    """How far rounding alone moves a loss, as `replicate bench noise` measured it."""

    largest_nats: Number
    """None where only the cell as it is was run."""
    cuts: list[str]
    cells: list[str]
    is_of_this_suite: bool
    """Whether those cells have the config that was measured."""


def noise_summary(suite_dir: SuiteDir, cells: Sequence[CellData], loss: str) -> Noise | None:
    """The measurement; None where there is none, or it is damaged."""
    try:
        rows = [from_json(NoiseRow, row) for row in read_object(suite_dir.noise)["rows"]]
        measured = [row for row in rows if row.cut != "as it is"]
        largest = max((abs(row.differences[loss]) for row in measured), default=None)
    except (UserError, WrongForm, KeyError, TypeError):
        return None
    hashes = {cell.name: manifest.config_hash for cell, manifest in manifests(cells)}
    found = {row.cell: row.config_hash for row in rows}
    same = all(hashes.get(name, hash) == hash for name, hash in found.items())
    return Noise(largest, list(dict.fromkeys(row.cut for row in measured)), list(found), same)


def generations(cells: Sequence[CellData]) -> list[Row]:
    """How completions that lie in samples.jsonl were sampled, as the manifests recorded it: one a setting."""
    found = []
    for cell in cells:
        if cell.samples:
            n_prompts = len({str(sample.prompt_id) for sample in cell.samples})
            row = Row(n_prompts=n_prompts, n_completions=len(cell.samples), settings=sampling(cell))
            found.append((row, cell.name))
    return _with_cells(found)


def sampling(cell: CellData) -> Mapping[str, object]:
    """How a cell's completions were made, without what is a cell's own (weights and texts)."""
    settings = cell.manifest.generation if cell.manifest else {}
    return {key: value for key, value in settings.items() if key not in ("weights_sha256", "samples_sha256")}


def side_by_side(suite: SuiteConfig, cells: Sequence[CellData]) -> list[Row]:
    """Every arm's first completion of one prompt a category, at one seed: the seed and prompts that most arms have."""
    first: dict[int, dict[str, dict[str, Sample]]] = {seed: {} for seed in suite.seeds}
    for cell in cells:
        for sample in reversed(cell.samples):
            first[cell.seed].setdefault(str(sample.prompt_id), {})[cell.arm] = sample
    seed = max(suite.seeds, key=lambda s: sum(map(len, first[s].values())))
    chosen: dict[str, dict[str, Sample]] = {}
    for by_arm in first[seed].values():
        category = str(next(iter(by_arm.values())).category)
        if len(by_arm) > len(chosen.get(category, {})):
            chosen[category] = by_arm
    found = []
    for category, by_arm in sorted(chosen.items()):
        found.append(on_one_prompt(category, seed, {arm: by_arm.get(arm) for arm in suite.arms}))
    return found


def on_one_prompt(category: str, seed: int, samples: Mapping[str, Sample | None]) -> Row:
    """The completions of arms at one seed, as long as a page shows them."""
    texts = {arm: sample and sample.text for arm, sample in samples.items()}
    shown = [
        Row(arm=arm, text=text and text[:LONGEST_COMPLETION], cut=len(text or "") > LONGEST_COMPLETION)
        for arm, text in texts.items()
    ]
    question = next(str(sample.question)[:LONGEST_COMPLETION] for sample in samples.values() if sample)
    return Row(category=category, seed=seed, question=question, completions=shown)
