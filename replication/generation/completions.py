"""A cell's completions on the disk: samples.jsonl, read and checked, and the parts that it is put together from.

samples.jsonl                   all completions, in the order of prompts and samples; a line is {"arm", "seed",
                                "prompt_id", "category", "question", "sample", "completion", "tokens", "stopped"}
samples.part/<i>-of-<n>.jsonl   completions of shard i of n, in any order; the first line is {"binding": ...}, the hash
                                of settings, prompts and weights: what was sampled otherwise is never gone on from
samples.part/<i>-of-<n>.log     output of a worker
sampled/<name>/                 the same of a named setting (settings.py); sampling.json there is its record
manifest.json                   its `generation`: settings, and the hashes of prompts, weights and samples.jsonl; and
                                `generated_by`: the code that put them together

A shard is every n-th completion of the cell. Any number of shards goes on with what any other number left behind.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from replication.config import RunConfig, sampling_settings
from replication.data.prompts import Prompt, find_prompts, load_prompts
from replication.errors import UserError
from replication.runs.files import file_sha256, naming, read_object, remove_tree, write_json, write_text
from replication.runs.layout import RunDir, SuiteDir
from replication.runs.manifest import Manifest, code_identity, read_manifest, refuse_untrained, update_manifest
from replication.runs.records import WrongForm, from_json, to_json

AGAIN = "`replicate generate` makes it again"
BEFORE = {"top_p": 1.0, "precision": "32-true"}  # of a record that was written before these keys were


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    arm: str  # hidden from judges
    seed: int  # of the cell's training
    prompt_id: int
    category: str
    question: str  # the prompt's text, without the template
    sample: int  # from 0; which of the prompt's answers it is
    text: str
    tokens: int | None = field(default=None, compare=False)  # None: not known, as in the published tool's file
    stopped: bool | None = field(default=None, compare=False)  # whether the model ended the text, or max_new_tokens did

    @classmethod
    def of_line(cls, line: str | bytes) -> Completion:
        """Of a line of samples.jsonl; WrongForm where it is no completion, which says why."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise WrongForm("is not valid JSON") from None
        if isinstance(value, dict):
            if "completion" not in value:
                raise WrongForm("completion is missing")
            value["text"] = value.pop("completion")
        return from_json(cls, value)

    def line(self) -> str:
        """For samples.jsonl, with its end."""
        value = {"completion" if k == "text" else k: v for k, v in to_json(self).items() if v is not None}
        return json.dumps(value, ensure_ascii=False) + "\n"


def read_samples(run: RunDir) -> list[Completion]:
    """The completions of one cell, in the file's order; UserError where the file is missing, damaged or edited."""
    path, found = run.samples, list[Completion]()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `replicate generate` makes it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None
    if not text.endswith("\n"):
        raise UserError(f"{path}: {'is torn in its last line' if text else 'is empty'}; {AGAIN}")
    for number, line in enumerate(text[:-1].split("\n"), 1):  # a completion may hold other line breaks
        try:
            found.append(Completion.of_line(line))
        except WrongForm as error:
            raise UserError(f"{path}: line {number}: {error}; {AGAIN}") from None
    cells = sorted({f"{c.arm}/seed-{c.seed}" for c in found})
    if len(cells) > 1:
        raise UserError(f"{path}: mixes completions of {', '.join(cells)}; {AGAIN}")
    seen: set[tuple[int, int]] = set()
    for c in found:
        if (c.prompt_id, c.sample) in seen:
            raise UserError(f"{path}: has sample {c.sample} of prompt {c.prompt_id} twice; {AGAIN}")
        seen.add((c.prompt_id, c.sample))
    # edited, or sampled anew and killed before the manifest was written: then the settings are of other texts
    recorded = recorded_sampling(run).get("samples_sha256")
    if recorded is not None and file_sha256(path) != recorded:
        raise UserError(
            f"{path}: is not the file whose settings {run.manifest.name} records; it was edited, or sampling it again "
            f"was cut off: {AGAIN}"
        )
    return found


def recorded_sampling(run: RunDir) -> Mapping[str, object]:
    """What was recorded of how a cell's completions were sampled; empty where nothing was."""
    return read_object(run.sampling) if run.setting else (read_manifest(run) or Manifest()).generation


def suite_completions(
    suite_dir: SuiteDir, arms: Sequence[str], setting: str = ""
) -> dict[int, dict[str, list[Completion]]]:
    """Seed -> arm -> completions, of the seeds at which every one of the arms is complete and has completions.

    UserError where a complete cell's samples.jsonl is damaged, or another cell's: a seed is never left out for that.
    """
    found: dict[int, dict[str, list[Completion]]] = {}
    for seed in sorted(seed for arm, seed, _ in suite_dir.cells() if [arm] == list(arms[:1])):
        runs = {arm: suite_dir.cell(arm, seed, setting) for arm in arms}
        if not all(run.complete.is_file() and run.samples.is_file() for run in runs.values()):
            continue
        found[seed] = {arm: read_samples(run) for arm, run in runs.items()}
        for arm, (first, *_) in found[seed].items():
            if (first.arm, first.seed) != (arm, seed):
                there = f"{first.arm}/seed-{first.seed}"
                raise UserError(f"{runs[arm].samples}: holds completions of {there}; {AGAIN}")
    return found


@dataclass(frozen=True)
class Shard:
    """Every n-th completion of a cell, from the i-th."""

    i: int = 0
    n: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of `i/n`."""
        i, _, n = text.partition("/")
        if not i.isdecimal() or not n.isdecimal() or not int(i) < int(n):
            raise UserError(f"--shard: '{text}' must be I/N with 0 <= I < N")
        return cls(int(i), int(n))

    def path(self, run: RunDir, suffix: str) -> Path:
        return run.samples_part / f"{self.i}-of-{self.n}{suffix}"


@dataclass(frozen=True)
class Samples:
    """The completions that one cell is to have."""

    config: RunConfig
    run: RunDir
    prompts: tuple[Prompt, ...]
    record: Mapping[str, object]  # what the manifest is to say of them, but for the hash of the file

    @classmethod
    def of(cls, config: RunConfig, run: RunDir) -> Samples:
        """Those that a config asks for; UserError where the cell is not trained, or its prompts cannot be read."""
        if config.generation.prompts is None:
            raise UserError(f"{run.config}: key generation.prompts is empty; name a prompt file")
        weights = refuse_untrained(run).final_weights_sha256
        record = sampling_settings(config.generation)
        record |= {"prompts_sha256": file_sha256(find_prompts(config.generation)), "weights_sha256": weights}
        return cls(config, run, tuple(load_prompts(config.generation)), record)

    @property
    def name(self) -> str:
        return f"{self.config.arm}/seed-{self.config.seed}{self.run.setting and f' ({self.run.setting})'}"

    @property
    def rows(self) -> list[tuple[Prompt, int]]:
        """Every (prompt, sample), in the order of samples.jsonl."""
        n = self.config.generation.samples_per_prompt
        return [(prompt, sample) for prompt in self.prompts for sample in range(n)]

    @property
    def binding(self) -> str:
        """Hash of all on which a completion depends, 64 hex digits."""
        text = json.dumps([self.config.arm, self.config.seed, self.record], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def are_there(self) -> bool:
        """Whether samples.jsonl is whole and was made with these settings, prompts and weights."""
        recorded = recorded_sampling(self.run)
        return self.run.samples.is_file() and BEFORE | dict(recorded) == self._record_of_file()

    def _record_of_file(self) -> dict[str, object]:
        return {**self.record, "samples_sha256": file_sha256(self.run.samples)}

    def begin(self) -> int:
        """Remove parts that were sampled otherwise; returns how many completions the others hold."""
        for path in self.run.samples_part.glob("*"):
            if path.is_file() and (path.suffix == ".log" or _read(path)[0] != self.binding):
                path.unlink()
        return len(self.parts())

    def parts(self) -> dict[tuple[int, int], Completion]:
        """The completions that are on the disk, by prompt id and sample."""
        read = [_read(path) for path in self.run.samples_part.glob("*.jsonl")]
        ours = [completions for binding, completions in read if binding == self.binding]
        return {(c.prompt_id, c.sample): c for completions in ours for c in completions}

    def appender(self, shard: Shard) -> Appender:
        return Appender(shard.path(self.run, ".jsonl"), self.binding)

    def finish(self) -> int:
        """Put the parts together, then remove them; returns how many completions there are.

        A kill on the way leaves what the next start puts together again; between samples.jsonl and the manifest, texts
        whose hash the manifest does not have, which nobody reads (`read_samples`).
        """
        parts = self.parts()
        lines = [parts[prompt.id, sample].line() for prompt, sample in self.rows]
        write_text(self.run.samples, "".join(lines))
        if self.run.setting:
            write_json(self.run.sampling, self._record_of_file())
        else:
            update_manifest(self.run, generation=self._record_of_file(), generated_by=code_identity())
        remove_tree(self.run.samples_part)
        return len(lines)


class Appender:
    """One shard's file, open for more completions; what a kill tore off is gone."""

    def __init__(self, path: Path, binding: str) -> None:
        there, kept = _read(path)
        lines = [c.line() for c in kept] if there == binding else []
        write_text(path, "".join([json.dumps({"binding": binding}) + "\n", *lines]))
        self.path = path
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the shard is sampled)

    def append(self, completions: Sequence[Completion]) -> None:
        """Bring completions to the disk; when this returns they outlive a kill and a power cut."""
        with naming(self.path):
            self._file.write("".join(c.line() for c in completions))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # on a full disk, what append has said already
            self._file.close()


def _read(path: Path) -> tuple[str | None, list[Completion]]:
    """(binding, completions) of a part file up to its first torn or damaged line; (None, []) where it is none."""
    found: list[Completion] = []
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        first, *lines = path.read_bytes().split(b"\n")[:-1]
        binding = json.loads(first).get("binding")
        with suppress(WrongForm):
            for line in lines:
                completion = Completion.of_line(line)
                if completion.tokens is None:
                    break
                found.append(completion)
        return binding, found
    return None, []
