"""Configs: layers, refusals that name file and key, the hash, and what the shipped arms differ in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from itertools import combinations
from typing import get_args, get_origin

import pytest
import yaml
from paths import CHECKOUT

from replication.cli.main import main
from replication.config import (
    RunConfig,
    SuiteConfig,
    arm_keys,
    config_root,
    declared_keys,
    differences,
    find_config,
    flatten,
    load_cell,
    load_run,
    load_suite,
    scientific,
    scientific_hash,
    to_dict,
    to_yaml,
)
from replication.config.checks import contradictions
from replication.config.reading import check_layer, hints, parse_yaml, read_yaml, untyped
from replication.errors import UserError

INTERVENTIONS = {"arm", "token_gain.enabled", "layer_gain.enabled"}


def test_the_four_arms_differ_in_intervention_keys_alone():
    suite = load_suite("ablation_2x2")
    configs = {arm: scientific(load_cell(suite, arm, 1)) for arm in suite.arms}
    for a, b in combinations(suite.arms, 2):
        assert set(differences(configs[a], configs[b])) <= INTERVENTIONS
    switches = {(c["token_gain.enabled"], c["layer_gain.enabled"]) for c in configs.values()}
    assert len(switches) == 4, "the 2x2 is complete"
    assert {frozenset(arm_keys(arm)) for arm in suite.arms} == {frozenset(INTERVENTIONS)}


def test_seeds_of_an_arm_differ_in_the_seed_alone():
    suite = load_suite("ablation_2x2")
    a, b = (scientific(load_cell(suite, "both", seed)) for seed in (1, 2))
    assert set(differences(a, b)) == {"seed", "weights_seed", "data_seed"}


NO_LAYERS = ("suites", "claims", "examples", "studies")
LAYERS = sorted(path for path in config_root().rglob("*.yaml") if path.parent.name not in NO_LAYERS)


@pytest.mark.parametrize("path", LAYERS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_layer_loads(path):  # suites: tests/test_suites.py, claims: tests/test_audit.py
    # the published batch, 64 sequences of 2,048: what the largest cluster files are for
    flags = ["--data.block_size_tokens=2048", "--training.batch_tokens=131072"]
    assert isinstance(load_run([path], flags if path.parent.name in ("cluster", "data") else []), RunConfig)


def test_later_layers_win_and_flags_win_over_all(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("training:\n  steps: 50\n  warmup_steps: 7\n")
    second.write_text("training:\n  steps: 60\n")
    config = load_run([first, second], ["--training.clip_norm=2.5"])
    assert (config.training.steps, config.training.warmup_steps, config.training.clip_norm) == (60, 7, 2.5)


def test_a_saved_config_loads_as_itself(tmp_path):
    config = load_cell(load_suite("ablation_2x2"), "both", 2, ["--layer_gain.exclude_blocks=[0]"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_run([path]) == config
    assert scientific_hash(load_run([path])) == scientific_hash(config)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  n_block: 3\n", ["bad.yaml line 2", "model.n_block", "did you mean model.n_blocks?"]),
        ("modell:\n  n_blocks: 3\n", ["bad.yaml", "modell"]),
        ("model:\n  n_blocks: three\n", ["bad.yaml line 2", "model.n_blocks", "whole number", "three"]),
        ("training:\n  precision: fp8\n", ["bad.yaml", "training.precision", "fp8"]),
        (
            "data:\n  sources:\n    - {name: a, kind: text, path: x, wieght: 2}\n",
            ["line 3: data.sources[0].wieght:"],
        ),
        ("model: [\n", ["bad.yaml", "line 2"]),
        ("run:\n  a: 1\nrun:\n  b: 1\n", ["bad.yaml line 3: key 'run' comes twice"]),
        ("training:\n  steps: 50\ntraining.steps: 60\n", ["bad.yaml line 3: training.steps: comes twice"]),
        ("model:\n", ["bad.yaml line 1: model: must have keys of its own, not null"]),
        ("training: {steps: null}\n", ["training.steps: must be a whole number", "not null"]),
        ("arm: null\n", ["arm: must be text, not null"]),
        ("training: {steps: 010}\n", ["training.steps", "'010'"]),
        ("cluster: {slurm: {time_limit_minutes: 24:00}}\n", ["time_limit_minutes", "'24:00'"]),
        ("training: &t {steps: 5, again: *t}\n", ["line 1: an alias stands inside of what it names"]),
        ("arm: !!binary aGk=\n", ["line 1: the tag !!binary means nothing here"]),
        ("arm: a\n---\narm: b\n", ["bad.yaml: not valid YAML", "line 2"]),
        ("- 1\n", ["bad.yaml: must have keys of its own, not [1]"]),
        ("? [a]\n: b\n", ["line 1: a key must be a word"]),
        ('arm: "a\\0b"\n', ["arm: holds a NUL character"]),
        ("[" * 20_000, ["bad.yaml: not valid YAML"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(tmp_path, text, parts):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_run([path])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_text_means_what_the_type_of_its_key_says(tmp_path):
    """YAML 1.1 makes numbers, truths and dates of these; as names they stay what they are, and are saved so."""
    path = tmp_path / "layer.yaml"
    odd = ["no", "010", "1e-6", "1_000", "12:30", "2026-01-31", "0x1F", "1e400", "'null'", "'~'", "'[1]'", "''"]
    for text in odd:
        source = f"[{{name: a, kind: hub, path: {text}, revision: {text}, messages: {{user: {text}}}}}]"
        path.write_text(f"training: {{adam_eps: 1e-6, steps: 1_000, deterministic: no}}\n"
                        f"data: {{sources: {source}, tokenizer: {{end_of_text: {text}}}}}\n")  # fmt: skip
        if text == "''":
            path.write_text("generation: {template: '{question}'}\n")
        config = load_run([path])
        if text != "''":
            plain = text.strip("'")
            found = config.data.sources[0]
            assert [config.data.tokenizer.end_of_text, found.path, found.revision, found.messages["user"]] == [
                plain
            ] * 4
            assert (config.training.adam_eps, config.training.steps) == (0.000001, 1000)
            assert config.training.deterministic is False
        path.write_text(to_yaml(config))
        assert load_run([path]) == config, text
        assert untyped(parse_yaml(to_yaml(config), "").tree) == to_dict(config), "readers that know no type agree"
    assert untyped(parse_yaml("[2024_10, +5, 12, 1.5]", "").tree) == ["2024_10", "+5", 12, 1.5], (
        "a suite's run has names"
    )


def test_a_typo_in_an_arm_names_its_own_file_and_equal_numbers_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    arms[0].write_text("arm: baseline\ntoken_gain: {eps: 1e-6, s: 1}\n")
    arms[1].write_text("arm: both\ntoken_gain: {eps: 0.000001, enabeld: true}\n")
    suite = replace(load_suite("ablation_2x2"), arms=tuple(map(str, arms)))
    assert load_cell(suite, str(arms[0]), 1).token_gain.eps == 1e-6
    with pytest.raises(UserError, match=r"b\.yaml line 2: token_gain\.enabeld: no such key; did you mean"):
        declared_keys(suite)


def test_merge_keys_take_over_and_may_be_overridden(tmp_path):
    path = tmp_path / "layer.yaml"
    path.write_text("training: &t {steps: 50, clip_norm: 2}\n")
    assert load_run([path]).training.steps == 50
    path.write_text("training:\n  <<: {steps: 50, clip_norm: 2}\n  steps: 60\n")
    assert (load_run([path]).training.steps, load_run([path]).training.clip_norm) == (60, 2.0)


def test_a_file_with_a_byte_order_mark_and_an_empty_file_load(tmp_path):
    path = tmp_path / "layer.yaml"
    path.write_bytes(b"\xef\xbb\xbftraining: {steps: 50}\n")
    assert load_run([path]).training.steps == 50
    path.write_text("# nothing yet\n")
    assert load_run([path]) == RunConfig()


def numeric_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every key that takes numbers, and their type, in lists too."""
    for name, hint in hints(cls).items():
        parts = [hint, *get_args(hint), *(b for a in get_args(hint) for b in get_args(a))]
        for part in parts:
            if isinstance(part, type) and is_dataclass(part):
                yield from numeric_keys(part, f"{prefix}{name}{'.' if part is hint else '[0].'}")
            elif part in (int, float):
                yield f"{prefix}{name}" if get_origin(hint) is not tuple else f"{prefix}{name}[0]", part


NEGATIVE = {"token_gain.s", "token_gain.sigmoid_k", "token_gain.sigmoid_a", "layer_gain.t"}
NEGATIVE |= {"token_gain.c_min", "layer_gain.m_min"}
"""Slopes and strengths, which may have either sign, and lower clamps, which one below every value switches off."""


@pytest.mark.parametrize("cls", [RunConfig, SuiteConfig])
def test_every_number_is_finite_and_in_its_range(cls, tmp_path):
    """A new key is walked too: it needs a Range, or a place in NEGATIVE."""
    path, keys = tmp_path / "bad.yaml", list(numeric_keys(cls))
    assert len(keys) > (70 if cls is RunConfig else 12)
    assert {"data.sources[0].weight", "cluster.slurm.memory_gib", "seeds[0]"} & {key for key, _ in keys}
    for key, kind in keys:
        for text in (".nan", "nan", ".inf", "-.inf", "-1", "true", "1e999", "9" * 400):
            tree: object = text
            for part in reversed(re.split(r"\.|(?=\[)", key)):
                tree = f"[{tree}]" if part == "[0]" else f"{{{part}: {tree}}}"
            path.write_text(f"{tree}\n")
            if key in NEGATIVE and text == "-1":
                check_layer(cls, read_yaml(path))
                continue
            said = f"{key} takes {text}: give it a Range, or a place in NEGATIVE"
            try:
                check_layer(cls, read_yaml(path))
            except UserError as error:
                said = str(error)
            assert said.startswith(f"{path} line 1: {key}: "), said
            if kind is float and text in (".nan", "nan"):
                assert said.endswith("nan must be a finite number")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--training.batch_tokens=2000"], ["training.batch_tokens", "data.block_size_tokens"]),
        (["--cluster.micro_batch_sequences=5"], ["cluster.micro_batch_sequences", "divide"]),
        (["--cluster.micro_batch_sequences=1"], ["cluster.micro_batch_sequences", "gain_group_sequences", "multiple"]),
        (["--cluster.micro_batch_sequences=0"], ["cluster.micro_batch_sequences", "at least 1"]),
        (["--data.block_size_tokens=0"], ["data.block_size_tokens", "at least 1"]),
        (["--model.n_kv_heads=3"], ["model.n_kv_heads", "model.n_heads"]),
        (["--model.d_head=15"], ["model.d_head", "even"]),
        (["--model.top_k=9"], ["model.top_k", "model.n_experts"]),
        (["--training.warmup_steps=900"], ["training.warmup_steps", "training.steps"]),
        (["--layer_gain.exclude_blocks=[7]"], ["layer_gain.exclude_blocks", "[7]"]),
        (["--layer_gain.exclude_blocks=[0,1,2,3]"], ["layer_gain.exclude_blocks", "leave at least one"]),
        (["--generation.template=x"], ["generation.template", "{question}"]),
        (["--generation.template={question} {x}"], ["generation.template", "no other field"]),
        (["--generation.template={question:d}"], ["generation.template", "no other field"]),
        (["--generation.template={question!r}"], ["generation.template", "no other field"]),
        (["--arm=a/b"], ["arm: 'a/b' names folders"]),
        (["--arm=a,b"], ["arm: 'a,b' names folders"]),
        (["--arm= a"], ["arm: ' a' names folders"]),
        (["--arm=.."], ["arm: '..' names folders"]),
        (["--arm=" + "a" * 101], ["at most 100 characters"]),
        (["--token_gain.c_min=9"], ["token_gain.c_min", "token_gain.c_max", "swap"]),
        (["--layer_gain.m_max=0.01"], ["layer_gain.m_min", "layer_gain.m_max"]),
        (["--cluster.devices=2"], ["cluster.strategy", "ddp"]),
        (["--cluster.devices=3", "--cluster.strategy=ddp"], ["cluster.devices", "16 sequences"]),
        (["--cluster.devices=16", "--cluster.strategy=ddp"], ["cluster.micro_batch_sequences", "multiple"]),
        (["--cluster.devices=32", "--cluster.strategy=ddp"], ["cluster.devices"]),
        (["--training.beta1=1.5"], ["training.beta1"]),
        (["--training.weight_decay=-3"], ["training.weight_decay", "at least 0"]),
        (["--training.warmup_steps=-5"], ["training.warmup_steps", "at least 0"]),
        (["--cluster.threads=-1"], ["cluster.threads"]),
        (["--training.label_smoothing=1.0"], ["training.label_smoothing"]),
        (["--nothing=1"], ["--nothing"]),
        (["--training.steps"], ["--training.steps: has no value"]),
        (["--training.steps", "--seed=1"], ["--training.steps: has no value"]),
        (["stray"], ["stray: is not a flag"]),
        (["--layer_gain.exclude_blocks=[0"], ["--layer_gain.exclude_blocks: not valid YAML"]),
        (["--arm=\udcff"], ["--arm: holds half a character"]),
    ],
)
def test_contradictions_name_the_keys(flags, parts):
    with pytest.raises(UserError) as caught:
        load_run([], flags)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("grid run S --jobs 0", "--jobs: 0 must be at least 1"),
        ("grid plan S --seeds 1,1", "--seeds: '1,1' names a seed twice"),
        ("grid plan S --seeds 1,,2", "--seeds[1]: must be a whole number such as 20, not null"),
        ("grid plan S --seeds 99999999999", "--seeds[0]: 99999999999 must be at most 4294967295"),
        ("grid plan S --seeds=", "--seeds[0]: must be a whole number"),
        ("tensorboard D --port 99999", "--port: 99999 must be at most 65535"),
        ("tensorboard D --every nan", "--every: nan must be a finite number"),
        ("judge serve D --port -1", "--port: -1 must be at least 0"),
        ("judge prepare D --votes -1", "--votes: -1 must be at least 1"),
        ("judge prepare D --judges 1e3", "--judges: must be a whole number such as 20, not '1e3'"),
        ("judge prepare D --repeats nan", "--repeats: nan must be a finite number"),
        ("generate S --seed 010", "--seed: must be a whole number such as 20, not '010'"),
        ("power --seed-spread 0,nan", "--seed-spread: nan must be a finite number"),
        ("drill --out D --kills " + "9" * 5000, "is too large a number"),
    ],
)
def test_a_number_of_the_command_line_is_one_line_where_it_cannot_be(words, said, capsys):
    assert main([word.replace("S", "ablation_2x2") if word == "S" else word for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_and_a_suite_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    suite = replace(load_suite("ablation_2x2"), name="mine")
    (folder / "suite.yaml").write_text(to_yaml(suite))
    for words, said in (
        (
            "report --out out/mine",
            "replicate report: the output folder stands without --out: `replicate report out/mine`",
        ),
        ("plan check --out=out/mine", "`replicate preregistration check out/mine`"),
        ("judge status --out", "`replicate judge status DIR`"),
        ("report mine", "mine: no such folder; did you mean out/mine?"),
        ("tensorboard mine", "did you mean out/mine?"),
        ("grid plan mine", "mine: is an output folder, and a suite's file or name goes here, with --out out/mine"),
        ("plan freeze out/mine", "out/mine: is an output folder"),
    ):
        assert main(words.split()) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, words
    monkeypatch.delenv("COLUMNS", raising=False)
    for words in ("grid status mine", "grid status out/mine", "grid status ablation_2x2 --out out/mine"):
        assert main(words.split()) == 0
        said = capsys.readouterr()
        assert "8 pending" in said.out
        hint = "the output folder alone stands here now: `replicate grid status out/mine`"
        assert (hint in said.err) == (words != "grid status out/mine")
    assert main(["grid", "plan", "ablation_2x2", "--out", "o" * 150]) == 0
    assert f"{'o' * 150}/runs/token_gain/seed-2" in capsys.readouterr().out, "what is piped is not cut"


def test_a_locale_that_is_not_utf_8_changes_nothing(tmp_path):
    layer, questions = tmp_path / "layer.yaml", tmp_path / "é.json"
    layer.write_text("generation: {prompts: \u00e9.json, template: '\u2192 {question}'}\n", encoding="utf-8")
    questions.write_text('[{"id": 1, "category": "\u00e9", "question": "\u2192?"}]', encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "replication", "train", "--config", "layer.yaml", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert "template: ? {question}" in done.stdout, "what the terminal cannot spell"


def test_missing_files_say_what_there_is():
    with pytest.raises(UserError, match=r"configs/arms has: baseline, .*both, .*token_gain"):
        find_config("bothh", "arms")
    with pytest.raises(UserError, match=r"nope\.yaml: no such config file"):
        load_run(["nope.yaml"])


def test_suite_errors(tmp_path):
    path = tmp_path / "suite.yaml"
    for text, part in (
        ("name: x\narms: [baseline]\nseeds: []\n", "seeds"),
        ("name: x\narms: [baseline]\nseeds: [1, 1]\n", "twice"),
        ("name: x\narms: [baseline]\nseeds: [a]\n", "seeds"),
        ("name: x\narms: [baseline]\nseeds: [1]\nextra: 1\n", "extra"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=part):
            load_suite(path)


def test_only_scientific_keys_move_the_hash():
    config = load_cell(load_suite("ablation_2x2"), "both", 1)
    base = scientific_hash(config)
    for flags in (["--cluster.threads=2"], ["--cluster.micro_batch_sequences=4"], ["--logging.log_every_steps=7"],
                  ["--checkpoints.keep_last=5"], ["--generation.temperature=1"], ["--data.num_proc=1"]):  # fmt: skip
        assert scientific_hash(load_cell(load_suite("ablation_2x2"), "both", 1, flags)) == base, flags
    free = ("data.dir", "data.num_proc", "logging", "checkpoints", "generation", "cluster")
    for key, value in flatten(to_dict(config)).items():
        if key.startswith(free) or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        changed = _with(config, key, value + 1 if isinstance(value, int) else value * 0.5 + 0.001)
        assert scientific_hash(changed) != base, key


def _with(config, dotted: str, value):
    head, _, rest = dotted.partition(".")
    return replace(config, **{head: _with(getattr(config, head), rest, value) if rest else value})


def test_scaling_per_micro_batch_makes_the_micro_batch_scientific():
    def digest(size: int) -> str:
        flags = ["--layer_gain.apply=micro_batch", f"--cluster.micro_batch_sequences={size}"]
        return scientific_hash(load_cell(load_suite("ablation_2x2"), "both", 1, flags))

    assert digest(8) != digest(4)


def test_every_key_has_a_line_of_documentation():
    import ast

    tree = ast.parse((CHECKOUT / "replication/config/schema.py").read_text())
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(field.target)}"


def test_a_flag_may_not_turn_one_arm_into_another():
    with pytest.raises(UserError, match=r"token_gain\.enabled: the arm baseline is defined by False"):
        load_cell(load_suite("ablation_2x2"), "baseline", 1, ["--token_gain.enabled=true"])


def test_a_suite_and_its_layers_may_lie_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "layer.yaml").write_text("model:\n  n_blocks: 2\n")
    suite_file = tmp_path / "mine" / "suite.yaml"
    suite_file.write_text("name: x\narms: [baseline]\nseeds: [1]\nlayers: [layer.yaml, cluster/cpu.yaml]\n")
    monkeypatch.chdir(tmp_path)
    config = load_cell(load_suite("mine/suite.yaml"), "baseline", 1)
    assert (config.model.n_blocks, config.cluster.threads) == (2, 1)
    assert load_suite("ablation_2x2.yaml") == load_suite("ablation_2x2")


def test_suite_file_sets_no_intervention():
    for path in (config_root() / "suites").glob("*.yaml"):
        run = yaml.safe_load(path.read_text()).get("run", {})
        assert not {"token_gain.enabled", "layer_gain.enabled", "arm"} & set(flatten(run)), path


def test_no_rule_relies_on_another_that_holds() -> None:
    """All that one config breaks is said at once: a rule does not divide by what an earlier one refused."""
    config = RunConfig()
    broken = replace(
        config,
        arm="a/b",
        model=replace(config.model, n_heads=3, d_head=15, top_k=9),
        data=replace(config.data, block_size_tokens=4096),
        cluster=replace(config.cluster, devices=7, strategy="zero3", compile=True),
        layer_gain=replace(config.layer_gain, exclude_blocks=(0, 1, 2, 3, 4), m_min=9.0),
        generation=replace(config.generation, template="{"),
    )
    keys = [line.partition(":")[0] for line in contradictions(broken)]
    assert keys == [
        *("arm", "model.n_kv_heads", "model.d_head", "model.top_k", "layer_gain.m_min"),
        *("layer_gain.exclude_blocks", "layer_gain.exclude_blocks", "training.batch_tokens"),
        *("validation.sequences", "cluster.compile", "cluster.compile", "cluster.devices", "generation.template"),
    ]
