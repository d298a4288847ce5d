"""Each setting of the published runs beside ours: published facts from paper.py and here, ours from the configs.

    python -m replication.protocol.fidelity                   print the tables
    python -m replication.protocol.fidelity --write [FILE]    renew them between the markers of configs/README.md

Published means: in the paper or its data files. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from replication.config import (
    Keys,
    RunConfig,
    SuiteConfig,
    config_root,
    flatten,
    load_cell,
    load_run,
    load_suite,
    to_dict,
)
from replication.errors import UserError
from replication.model.size import checkpoint_gib, checkpoints_kept, parameter_count
from replication.protocol import paper
from replication.runs.files import write_text

BEGIN, END = "<!-- fidelity:begin -->", "<!-- fidelity:end -->"
ROUGHLY = 0.02  # "about 1.2 billion" is met by 1.21
UNPUBLISHED = object()

Verdict = Literal["as published", "our choice", "deviates"]


@dataclass(frozen=True)
class Row:
    """One published fact, or one gap that a choice fills."""

    keys: str  # of _values, separated by blanks
    published: Any = UNPUBLISHED  # in the terms of the config; a tuple for several keys
    reason: str = ""  # why ours is what it is; needed wherever it is not the published value
    words: str = ""  # the published value as the reader should see it; none: the value itself
    arm: str = ""  # of the suite, that it is read from; none: the section's


@dataclass(frozen=True)
class Section:
    """One published run, and the suite that repeats it."""

    title: str
    suite: str
    arm: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Line:
    """A row with our value."""

    row: Row
    ours: Any
    verdict: Verdict


PHASE_3 = (
    Row("parameters", paper.PHASE_3.parameters),
    Row("model.n_blocks model.d_model", (paper.PHASE_3.blocks, paper.PHASE_3.width)),
    Row("model.n_heads model.n_kv_heads model.d_head", (16, 8, 64)),
    Row("model.feed_forward model.n_experts model.top_k model.shared_expert", ("moe", 4, 2, True)),
    Row("model.d_ff model.tied_head", reason="an untied head and three times the width give the published size"),
    Row("model.vocab_size", 100_031, words="100,031: DeepSeek-V2's and 27 of the author's"),
    Row("model.vocab_multiple", reason="aligned matrix products; rows past the vocabulary are never predicted"),
    Row("model.qk_norm", reason="that there is one is published, not where; transformers' HunYuanMoEV1 has it there"),
    Row("model.rotary_base", reason="the usual one at this length"),
    Row("model.init_std", reason="GPT-2's, in every matrix"),
    Row("model.aux_coef", reason="the Switch loss in each gain group; balanced routing costs 0.01"),
    Row("data", "13 sources by curriculum", "neither shares nor sampler are published: ours draws by fixed weights"),
    Row("data.block_size_tokens", 2048),
    Row("training.steps training.batch_tokens", (paper.PHASE_3.steps, paper.PHASE_3.batch_tokens)),
    Row("tokens", paper.PHASE_3.tokens),
    Row("seeds", [paper.PHASE_3.seed]),
    Row("training.gain_group_sequences", 2, words="2: its micro-batch"),
    Row("cluster.micro_batch_sequences", 2, "a matter of speed: the statistics are taken over groups of two"),
    Row("training.optimizer", "muon", words="muon on 2-D weights, AdamW on the rest"),
    Row("training.learning_rate", 3e-4, words="0.0003 for AdamW"),
    Row("training.muon_learning_rate", reason="AdamW's; updates get its size, by 0.2 sqrt(max(rows, columns))"),
    Row("training.muon_momentum", reason="the usual one"),
    Row("training.weight_decay training.beta1 training.beta2", reason="common in language models"),
    Row("training.warmup_steps training.decay_steps", (500, 0)),
    Row("training.label_smoothing", 0.1, words="0.1; whether the gain sees it is open, here it does"),
    Row("training.clip_norm", reason="the author's example clips at 1. Norms of 1.74 and 2.50 then bind at every step, "
        "and take a constant scale of all gradients away"),
    Row("training.precision", "bf16-mixed", words="bf16", reason="fp32 weights; theirs are not described"),
    Row("training.deterministic", reason="deterministic kernels are slower, and some do not exist"),
    Row("token_gain.variant token_gain.s token_gain.eps", ("precision", 1.0, 1e-6)),
    Row("token_gain.c_min token_gain.c_max", (0.1, 5.0)),
    Row("layer_gain.t layer_gain.m_min layer_gain.m_max", (0.5, 0.1, 3.0)),
    Row("layer_gain.exclude_blocks", []),
    Row("layer_gain.apply", "step"),
    Row("layer_gain.divergence", "last_group", "the last micro-batch depends on the machine, the mean of the step does "
        "not; last_group is one key away"),
    Row("validation.every_steps", 500, words="500: the spacing of the published curve"),
    Row("validation.sequences", reason="a million tokens; the published curve has a noise of 0.2 nats"),
    Row("generation.prompts", "32 of the author", "their text is the author's; ours are as many of each kind"),
    Row("generation.samples_per_prompt generation.temperature generation.top_k generation.max_new_tokens",
        (3, 0.7, 40, 200)),
    Row("generation.top_p", 0.93, words="0.93 in the author's code; the paper names none"),
    Row("generation.precision", reason="fp64, so that a completion depends on weights and noise alone"),
    Row("generation.template", reason="a base model continues text"),
)  # fmt: skip

PHASE_1 = (
    Row("parameters", paper.PHASE_1.parameters),
    Row("model.n_blocks model.d_model model.d_ff model.tied_head", reason="1b2 made narrow; untied, 100,031 rows would "
        "take all 50 million"),
    Row("data", "data/fineweb_edu.yaml", words="FineWeb-Edu"),
    Row("data.block_size_tokens", reason="as in phase 3"),
    Row("training.steps training.batch_tokens", (paper.PHASE_1.steps, paper.PHASE_1.batch_tokens)),
    Row("tokens", paper.PHASE_1.tokens),
    Row("training.optimizer", "muon", words="muon beside AdamW"),
    Row("training.learning_rate training.warmup_steps training.label_smoothing", reason="as in phase 3"),
    Row("training.gain_group_sequences", reason="as in phase 3"),
    Row("arms", ["uniform", "linear", "focal", "sigmoid"], "and phase 3's gain, which was never compared with these"),
    Row("token_gain.variant token_gain.c_min token_gain.c_max", ("linear", 0.1, 5.0), arm="linear"),
    Row("token_gain.variant token_gain.focal_gamma", ("focal", 2.0), arm="focal"),
    Row("token_gain.focal_min token_gain.focal_max", (1e-4, 10.0), arm="focal"),
    Row("token_gain.variant token_gain.sigmoid_a token_gain.sigmoid_k", ("sigmoid", 0.5, 5.0), arm="sigmoid"),
    Row("seeds", reason="one run an arm, of a seed that is not named"),
)  # fmt: skip

PHASE_2 = (
    Row("parameters", paper.PHASE_2.parameters),
    Row("training.steps training.batch_tokens", (paper.PHASE_2.steps, paper.PHASE_2.batch_tokens)),
    Row("tokens", paper.PHASE_2.tokens),
    Row("training.decay_steps", reason="a decay phase is spoken of, its length is not; the last tenth"),
    Row("token_gain.variant token_gain.c_min token_gain.c_max", ("linear", 0.1, 5.0), arm="linear_wide"),
    Row("token_gain.variant token_gain.c_min token_gain.c_max", ("linear", 0.5, 2.0), arm="linear_conservative"),
    Row("token_gain.variant token_gain.c_min token_gain.c_max", ("linear", 0.8, 1.2), arm="linear_tight"),
    Row("seeds", reason="one run an arm, of a seed that is not named"),
)

SCALE_UP = (
    Row("parameters", paper.SCALE_UP.parameters),
    Row("model.n_blocks model.d_model", (paper.SCALE_UP.blocks, paper.SCALE_UP.width)),
    Row("model.n_heads model.n_kv_heads model.d_ff", reason="phase 3's head width; d_ff gives the size"),
    Row("training.warmup_steps", 4000),
    Row("training.steps", paper.SCALE_UP.steps, words="7,000, where the pair was read; one run went on"),
    Row("training.batch_tokens", reason="as in phase 3"),
    Row("layer_gain.exclude_blocks", [], arm="block0_in"),
    Row("layer_gain.exclude_blocks", [0], arm="block0_out"),
    Row("seeds", [paper.SCALE_UP.seed], "the published seed and more: one pair says nothing of the method"),
)  # fmt: skip

SECTIONS = (
    Section("Phase 3", "phase3_1b2", "both", PHASE_3),
    Section("Phase 1", "phase1_gain_variants", "linear", PHASE_1),
    Section("Phase 2", "phase2_clamp_ranges", "linear_wide", PHASE_2),
    Section("Scale-up", "layer0_exclusion_1b5", "block0_in", SCALE_UP),
)


def lines(section: Section) -> list[Line]:
    """The section's rows with the values of its own suite, and verdicts."""
    suite = load_suite(section.suite)
    configs = {arm: load_cell(suite, arm, suite.seeds[0]) for arm in {row.arm or section.arm for row in section.rows}}
    return lines_of(section, suite, configs)


def lines_of(section: Section, suite: SuiteConfig, configs: Mapping[str, RunConfig]) -> list[Line]:
    """The section's rows with the values of any suite, of a config of each arm; rows of an arm that has none are left
    out, and where the section's own arm is missing, the last one stands for it.

    Raises UserError: a row names a key that no run has.
    """
    values = {arm: _values(suite, config) for arm, config in configs.items()}
    own = section.arm if section.arm in configs else list(configs)[-1]
    found = []
    for row in section.rows:
        if (row.arm or own) not in values:
            continue
        here, keys = values[row.arm or own], row.keys.split()
        for key in keys:
            if key not in here:
                raise UserError(f"{key}: a row of the fidelity table names it, and no run has such a key")
        ours = here[keys[0]] if len(keys) == 1 else tuple(here[key] for key in keys)
        verdict: Verdict = "our choice"
        if row.published is not UNPUBLISHED:
            about = row.keys == "parameters"
            same = abs(ours / row.published - 1) <= ROUGHLY if about else ours == row.published
            verdict = "as published" if same else "deviates"
        found.append(Line(row, ours, verdict))
    return found


def _values(suite: SuiteConfig, config: RunConfig) -> Keys:
    """Every dotted key of a run, and what is not one key of it."""
    return flatten(to_dict(config)) | {
        "arms": list(suite.arms),
        "seeds": list(suite.seeds),
        "parameters": parameter_count(config.model),
        "tokens": config.training.steps * config.training.batch_tokens,
        "data": next((layer for layer in suite.layers if layer.startswith("data/")), None) or _shipped_data(config),
    }


def _shipped_data(config: RunConfig) -> str | None:
    """The file of configs/data that has the sources of a run whose suite names no layers any more."""
    for path in sorted((config_root() / "data").glob("*.yaml")):
        if config.data.sources and load_run([path]).data.sources == config.data.sources:
            return f"data/{path.name}"
    return None


def section_of(suite: SuiteConfig) -> Section:
    """The published run whose suite shares most arms with this one; Phase 3 where none does."""
    return max(SECTIONS, key=lambda section: len({*load_suite(section.suite).arms} & {*suite.arms}))


def arms_read(section: Section, suite: SuiteConfig) -> list[str]:
    """The arms of a suite whose configs `lines_of` reads; the last one where it has none of the section's."""
    wanted = {section.arm, *(row.arm for row in section.rows)}
    own = [] if section.arm in suite.arms else [suite.arms[-1]]
    return list(dict.fromkeys([*(arm for arm in suite.arms if arm in wanted), *own]))


def in_words(line: Line) -> tuple[str, str]:
    """(published, ours) of a line as plain text."""
    theirs, ours = (text.replace("<br>", ", ").replace("`", "") for text in _both(line))
    return theirs, ours


def _both(line: Line) -> tuple[str, str]:
    """(published, ours) of a line as Markdown."""
    row = line.row
    theirs = "not published" if row.published is UNPUBLISHED else row.words or _words(row.keys, row.published)
    return theirs, _words(row.keys, line.ours)


def tables() -> str:
    """The Markdown between the markers: the suites, what deviates, then every row of every section, folded away."""
    found = [(section, line) for section in SECTIONS for line in lines(section)]
    deviating = [(section, line) for section, line in found if line.verdict == "deviates"]
    chosen = sum(line.verdict == "our choice" for _, line in found)
    counts = f"{len(found) - chosen - len(deviating)} are as published, {chosen} are not published and our choice"
    parts = [_suites_table(), f"Of {len(found)} settings {counts}, and {len(deviating)} deviate:", _table(deviating)]
    parts += [f"<details><summary>All {len(found)} settings</summary>", _table(found), "</details>"]
    return "\n\n".join(parts)


def _suites_table() -> str:
    """The size of each shipped suite; checkpoints as in size.py."""
    head = "| suite | arms x seeds | parameters | tokens of a cell | checkpoints, all cells |"
    text = [head, "|---|---|---|---|---|"]
    for path in sorted((config_root() / "suites").glob("*.yaml")):
        suite = load_suite(path)
        config = load_cell(suite, suite.arms[0], suite.seeds[0])
        n = len(suite.arms) * len(suite.seeds)
        tokens = _billions(config.training.steps * config.training.batch_tokens)
        disk = f"{n * checkpoints_kept(config) * checkpoint_gib(config):,.0f} GiB"
        shown = f"[{suite.name}](suites/{path.name}) | {len(suite.arms)} x {len(suite.seeds)}"
        text.append(f"| {shown} | {_billions(parameter_count(config.model))} | {tokens} | {disk} |")
    return "\n".join(text)


def _table(rows: Sequence[tuple[Section, Line]]) -> str:
    text = ["| run | key | published | here | |", "|---|---|---|---|---|"]
    for section, line in rows:
        row = line.row
        where = f"{section.title}, `{row.arm}`" if row.arm else section.title
        keys = "<br>".join(f"`{key}`" for key in row.keys.split())
        said = "; ".join(part for part in ("deviates" if line.verdict == "deviates" else "", row.reason) if part)
        text.append(f"| {where} | {keys} | {' | '.join(_both(line))} | {said} |")
    return "\n".join(text)


def _words(key: str, value: Any) -> str:
    """A value as it stands in the table: numbers readable, names as code."""
    if isinstance(value, tuple):
        return "<br>".join(_words(key, v) for v in value)
    if isinstance(value, list):
        return ", ".join(_words(key, v) for v in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "`null`"}[value]
    if key == "parameters":
        return _billions(value)
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.10f}".rstrip("0").rstrip(".") if value >= 1e-6 else f"{value:g}"
    return f"`{value!r}`" if "\n" in value else str(value)


def _billions(number: float) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def renewed(text: str, fresh: str) -> str:
    """A file's text with fresh tables between its markers; UserError where it lacks them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise UserError(f"the file needs the lines {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n{fresh}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or renew a file."""
    name = "python -m replication.protocol.fidelity"
    parser = argparse.ArgumentParser(name, description="Published settings and ours.")
    parser.add_argument("--write", nargs="?", type=Path, const=config_root() / "README.md", metavar="FILE",
                        help="renew the tables between the markers of FILE (default: configs/README.md)")  # fmt: skip
    file = parser.parse_args(argv).write
    try:
        if file is None:
            print(tables())
        else:
            write_text(file, renewed(file.read_text(encoding="utf-8"), tables()))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
