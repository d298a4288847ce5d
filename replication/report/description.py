"""What surrounds the numbers: warnings, configuration, data, machines, completions and how to run it all again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from replication.config import RunConfig, SuiteConfig, differences, flatten, load_cell, load_run, to_dict
from replication.errors import UserError
from replication.protocol.certificate import Certificate
from replication.protocol.fidelity import arms_read, in_words, lines_of, section_of
from replication.report.load import Cell
from replication.runs.files import file_sha256, read_json
from replication.runs.layout import SuiteDir
from replication.runs.manifest import Manifest
from replication.runs.starts import unlike

SUMMARY_KEYS = {
    "model.n_blocks": "blocks",
    "model.d_model": "width",
    "model.feed_forward": "feed-forward",
    "model.n_experts": "routed experts",
    "model.top_k": "experts a token visits",
    "model.vocab_size": "vocabulary",
    "data.block_size_tokens": "tokens in a sequence",
    "training.steps": "optimizer steps",
    "training.batch_tokens": "tokens a step",
    "training.gain_group_sequences": "sequences in a gain group",
    "training.optimizer": "optimizer",
    "training.learning_rate": "peak learning rate",
    "training.warmup_steps": "warm-up steps",
    "training.decay_steps": "decay steps",
    "training.clip_norm": "largest gradient norm",
    "training.label_smoothing": "label smoothing",
    "training.precision": "precision",
    "validation.sequences": "validation sequences",
    "validation.every_steps": "steps between validations",
}


OWN = ("weights_sha256", "samples_sha256")
"""Of a manifest's generation part, what is a cell's own."""
VERDICTS = ("as published", "our choice", "deviates")


def one_value(values: Iterable[Any]) -> Any:
    """The value that all share; None where there is none, or more than one."""
    seen = {v for v in values if isinstance(v, (int, float, str))}
    return seen.pop() if len(seen) == 1 else None


def part(record: dict[str, Any], name: str) -> dict[str, Any]:
    """A record's inner object; empty where it is missing or is none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- what a reader should be warned of


def warnings(suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[Cell], certificate: Certificate) -> Iterable[str]:
    """One sentence for each thing that could mislead a reader who trusts the numbers."""
    complete = [cell for cell in cells if cell.complete]
    for seed, why in certificate.not_pooled.items():
        yield f"Seed {seed} is left out of every comparison and mean over seeds: {why}."
    for of_seed in certificate.seeds:
        if of_seed.departures:
            yield f"The arms of seed {of_seed.seed} were not run alike: {'; '.join(of_seed.departures)}."
    for seed in suite.seeds:
        seen: dict[str, str] = {}
        for cell in complete:
            weights = cell.manifest.final_weights_sha256
            if cell.seed != seed or weights is None:
                continue
            if weights in seen:
                yield f"{cell.arm} and {seen[weights]} ended with the same weights at seed {seed}: no change acted."
            seen.setdefault(weights, cell.arm)
    for words, value in (
        ("hashes of the code", lambda m: m.code_hash),
        ("commits of the code", lambda m: m.git.commit),
        ("hardware", lambda m: m.hardware),
        ("world sizes", lambda m: m.world_size),
    ):
        if len({value(cell.manifest) for cell in complete if not cell.manifest.is_empty}) > 1:
            yield f"The complete cells ran with different {words}; see the table of machines."
    if unlike({f"{cell.arm}/seed-{cell.seed}": [cell.manifest.packages] for cell in complete}):
        yield "The complete cells ran with different package versions; see the table of machines."
    if len({_sampling(cell.manifest) for cell in complete}) > 1:
        yield "The completions of the cells were sampled under different settings or prompts: do not compare them."
    changed = unrecorded_samples(suite_dir, complete)
    if changed:
        yield f"The completions are not those that were recorded when they were sampled: {', '.join(changed)}."
    if any(len(_machines(cell.manifest)) > 1 for cell in complete):
        yield "Some cells were resumed with other code, packages or hardware than they had begun with."
    dirty = sorted({f"{c.arm}/seed-{c.seed}" for c in complete if c.manifest.git.dirty})
    if dirty:
        yield f"The code had changes that no commit holds in {len(dirty)} of {len(complete)} complete cells."
    known = {suite_dir.cell(cell.arm, cell.seed).root for cell in cells}
    for path in sorted(suite_dir.runs.glob("*/seed-*")):
        if path not in known:
            yield f"The folder runs/{path.parent.name}/{path.name} is not part of the suite and was not read."


def _sampling(manifest: Manifest) -> str:
    """How a cell's completions were made, without what is a cell's own (weights and texts)."""
    return str({k: v for k, v in manifest.generation.items() if k not in OWN})


def _machines(manifest: Manifest) -> set[str]:
    """The different machines and codes among the starts of a cell; a plan frozen in between changes neither."""
    return {str(replace(start, at=None, step=None, plan=None)) for start in manifest.starts}


# ---------------------------------------------------------------- config, data, machines


def config_summary(suite: SuiteConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Keys of the first cell that has a config, and what each arm declares."""
    first = next((cell.config for cell in cells if cell.config), {})
    declared_keys = sorted({key for cell in cells for key in declared_by(cell) if key != "arm"})
    by_arm = {cell.arm: cell.config for cell in reversed(cells) if cell.config}
    return {
        "summary": [{"name": word, "value": first[key]} for key, word in SUMMARY_KEYS.items() if key in first],
        # how completions were sampled is in generation_summary: `generate` may have used other prompts since
        "all": {
            key: value
            for key, value in first.items()
            if key not in (*declared_keys, "arm", "seed") and not key.startswith("generation.")
        },
        "declared_keys": declared_keys,
        "declared": {arm: [by_arm.get(arm, {}).get(key) for key in declared_keys] for arm in suite.arms},
    }


def declared_by(cell: Cell) -> list[str]:
    """Dotted keys that the cell's manifest says its arm file sets."""
    return list(cell.manifest.arm_keys)


def fidelity_summary(suite_dir: SuiteDir, suite: SuiteConfig, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """This suite's settings beside those of the published run that it is nearest to; None without a readable config."""
    section = section_of(suite)
    wanted = arms_read(section, suite)
    configs: dict[str, RunConfig] = {}
    for cell in sorted((c for c in cells if c.arm in wanted), key=lambda c: wanted.index(c.arm)):
        if cell.config and cell.arm not in configs:
            with suppress(UserError, OSError):
                configs[cell.arm] = load_run([suite_dir.cell(cell.arm, cell.seed).config])
    if not configs:
        return None
    rows = []
    for line in lines_of(section, suite, configs):
        published, here = in_words(line)
        key = line.row.keys.replace(" ", ", ")
        rows.append({"key": key, "arm": line.row.arm, "published": published, "here": here, "verdict": line.verdict})
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    return {"run": section.title, "rows": rows, "counts": counts}


def generation_summary(suite_dir: SuiteDir, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """How the completions that lie in samples.jsonl were sampled, as the manifests recorded it; an entry a setting."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if not cell.samples:
            continue
        recorded = {k: v for k, v in cell.manifest.generation.items() if k not in OWN}
        facts = {
            "n_prompts": len({str(sample.get("prompt_id")) for sample in cell.samples}),
            "n_completions": len(cell.samples),
            "settings": recorded,
        }
        entry = found.setdefault(str(facts), {**facts, "cells": []})
        entry["cells"].append(f"{cell.arm}/seed-{cell.seed}")
    return list(found.values())


def unrecorded_samples(suite_dir: SuiteDir, cells: Sequence[Cell]) -> list[str]:
    """Cells whose samples.jsonl is not the file that their manifest recorded."""
    names = []
    for cell in cells:
        recorded = cell.manifest.generation.get("samples_sha256")
        path = suite_dir.cell(cell.arm, cell.seed).samples
        if recorded and (not path.is_file() or file_sha256(path) != recorded):
            names.append(f"{cell.arm}/seed-{cell.seed}")
    return names


def data_summary(suite_dir: SuiteDir, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """Sources with documents, bytes and tokens; None where the folder holds no prepared corpus."""
    try:
        manifest = read_json(suite_dir.data / "manifest.json")
    except (UserError, OSError):
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sources"), dict):
        return None
    rows = []
    for name, source in manifest["sources"].items():
        if isinstance(source, dict):
            train, validation = part(source, "train"), part(source, "validation")
            rows.append({
                "name": name,
                "documents": source.get("documents"),
                "text_bytes": source.get("text_bytes"),
                "train_tokens": train.get("tokens"),
                "validation_tokens": validation.get("tokens"),
            })  # fmt: skip
    used = {cell.manifest.data.hash for cell in cells if not cell.manifest.is_empty}
    return {
        "hash": manifest.get("hash"),
        "vocab_size": manifest.get("vocab_size"),
        "sources": rows,
        "used_by_all": used == {manifest.get("hash")},
    }


def data_hashes(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each hash of the data that cells were trained on, with their seeds."""
    found: dict[str, dict[int, None]] = {}
    for cell in cells:
        hash = cell.manifest.data.hash
        if hash is not None:
            found.setdefault(hash, {})[cell.seed] = None
    return [{"hash": hash, "seeds": list(seeds)} for hash, seeds in found.items()]


def noise_summary(suite_dir: SuiteDir, cells: Sequence[Cell], loss: str) -> dict[str, Any] | None:
    """What `replicate bench noise` measured of a loss: how far rounding alone moves it; None where it was not run.

    Returns:
        {"largest_nats": of all differences, None where there is none, "cuts": names, "cells": arm/seed-n,
        "is_of_this_suite": whether those cells have the config that was measured}.
    """
    try:
        rows = read_json(suite_dir.noise)["rows"]
        measured = [row for row in rows if row["cut"] != "as it is"]
        found = {row["cell"]: row["config_hash"] for row in rows}
        differences = [abs(float(row["differences"][loss])) for row in measured]
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
    hashes = {f"{c.arm}/seed-{c.seed}": c.manifest.config_hash for c in cells if not c.manifest.is_empty}
    return {
        "largest_nats": max(differences, default=None),
        "cuts": list(dict.fromkeys(str(row["cut"]) for row in measured)),
        "cells": list(found),
        "is_of_this_suite": all(hashes.get(name, hash) == hash for name, hash in found.items()),
    }


def machines(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each different combination of code, packages and hardware, with the cells that ran there."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        m = cell.manifest
        if m.is_empty:
            continue
        machine = {
            "cpu": m.hardware.cpu,
            "cores": m.hardware.cores,
            "gpus": list(m.hardware.gpus),
            "memory_gib": m.hardware.memory_gib,
            "world_size": m.world_size,
            "commit": m.git.commit,
            "dirty": m.git.dirty,
            "packages": {k: v for k, v in m.packages.items() if v is not None},
        }
        entry = found.setdefault(str(machine), {**machine, "cells": []})
        entry["cells"].append(f"{cell.arm}/seed-{cell.seed}")
    return list(found.values())


MACHINE_KEYS = ("cluster.", "logging.", "checkpoints.", "data.dir", "data.num_proc")


def reproduce(suite: SuiteConfig, cells: Sequence[Cell]) -> list[str]:
    """Shell lines that make these numbers again: the suite file, and the flags that it was run with."""
    commit = one_value(cell.manifest.git.commit for cell in cells)
    lines = ["# in a checkout of this package; DIR is the folder of this report"]
    lines += [f"git checkout {shlex.quote(commit)}"] if isinstance(commit, str) else []
    command = ["replicate", "grid", "run", "DIR/suite.yaml", "--out", "AGAIN", *_flags(suite, cells)]
    return [*lines, " ".join(command), "# writes AGAIN/report.html; compare AGAIN/results.json with DIR/results.json"]


def _flags(suite: SuiteConfig, cells: Sequence[Cell]) -> list[str]:
    """Keys in which the first cell differs from what the suite file alone gives, as flags."""
    cell = next((cell for cell in cells if cell.config), None)
    if cell is None:
        return []
    try:
        expected = flatten(to_dict(load_cell(suite, cell.arm, cell.seed)))
    except (UserError, OSError):
        return []
    different = differences(expected, cell.config)
    values = {key: value for key, (_, value) in different.items() if not key.startswith(MACHINE_KEYS)}
    return [shlex.quote(f"--{key}={v if isinstance(v, str) else json.dumps(v)}") for key, v in values.items()]


# ---------------------------------------------------------------- completions

LONGEST_COMPLETION = 1500


def completions(suite: SuiteConfig, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One prompt a category, every arm's first completion at one seed: the seed and prompts that most arms have."""
    first: dict[int, dict[Any, dict[str, dict[str, Any]]]] = {seed: {} for seed in suite.seeds}
    for cell in cells:
        for sample in reversed(cell.samples):
            prompt = first[cell.seed].setdefault(str(sample.get("prompt_id")), {})
            prompt[cell.arm] = sample
    seed = max(suite.seeds, key=lambda s: sum(len(arms) for arms in first[s].values()))
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for arms in first[seed].values():
        category = str(next(iter(arms.values())).get("category"))
        if len(arms) > len(chosen.get(category, {})):
            chosen[category] = arms
    return [_side_by_side(category, seed, suite.arms, arms) for category, arms in sorted(chosen.items())]


def _side_by_side(category: str, seed: int, order: Sequence[str], arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    any_sample = next(iter(arms.values()))
    completions = []
    for arm in order:
        text = str(arms[arm]["completion"]) if arm in arms else None
        shown = text and text[:LONGEST_COMPLETION]
        completions.append({"arm": arm, "text": shown, "cut": text != shown})
    question = str(any_sample.get("question", ""))[:LONGEST_COMPLETION]
    return {"category": category, "seed": seed, "question": question, "completions": completions}
