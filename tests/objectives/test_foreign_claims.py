"""Claims of others as plugins, from configs/examples, each against its formula; and scales that act on the update."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from memory_store import MemoryStore
from paths import CHECKOUT
from run_files import read_journal
from slow_reference import SlowRun
from training_setup import MODEL, fit, furthest, identical, small_config, weights

from replication.cli.main import main
from replication.config import ModelConfig, RunConfig, load_suite
from replication.data.module import TrainingBatches
from replication.errors import UserError
from replication.grid.cells import load_cells
from replication.model import transformer
from replication.model.transformer import Transformer, initialise
from replication.objectives.library import Gains
from replication.objectives.plugins import keep_plugins
from replication.runs.files import read_json
from replication.runs.layout import RunDir, SuiteDir

EXAMPLES = CHECKOUT / "configs" / "examples"
SLOW = ("--training.steps=3", "--training.precision=64-true", "--training.optimizer=sgd")


def config_with(plugin: str, arm: str, *flags: str) -> RunConfig:
    sha256 = hashlib.sha256((EXAMPLES / plugin).read_bytes()).hexdigest()
    return small_config(arm, f"--plugins={{{plugin}: {sha256}}}", *flags)


def trained(config: RunConfig, out: Path, store: MemoryStore | None = None) -> RunDir:
    keep_plugins([EXAMPLES / name for name in config.plugins], SuiteDir(out).plugins)
    return fit(config, SuiteDir(out).cell(config.arm, config.seed).root, store)


def slow_and_fast(config: RunConfig, out: Path, weigh=None) -> float:
    """How far three steps of the product end from the slow restatement; the padded block is among them."""
    store, slow = MemoryStore(blocks=(6, 5)), SlowRun(config, weigh=weigh)
    whole = TrainingBatches(small_config(config.arm, *SLOW), store)
    for step in range(3):
        slow.step(whole[step].tokens_BS)
    return furthest(weights(trained(config, out, store)), slow.model.state_dict())


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> RunDir:
    """A cell that was trained before."""
    return trained(small_config("baseline", "--seed=9"), tmp_path_factory.mktemp("reference"))


def rho_flags(reference: RunDir, sha256: str | None = None) -> tuple[str, ...]:
    sha256 = sha256 or read_json(reference.manifest)["final_weights_sha256"]
    parameters = f"{{reference: {reference.root}, sha256: '{sha256}', share: 0.4}}"
    return "--token_gain.function=rho_1", f"--token_gain.parameters={parameters}"


# ---------------------------------------------------------------- against the papers' formulas


@pytest.mark.parametrize("micro", [8, 2])
def test_mile_weighs_by_the_entropy_of_the_prediction(tmp_path, micro):
    def weigh(plain, log_probs_of, group):
        entropies = [-sum(math.exp(x) * x for x in row.tolist()) for row in log_probs_of]
        raw = [(1 + h) ** 1.5 for h in entropies]
        return [x / (sum(raw) / len(raw)) for x in raw]

    flags = ("--token_gain.function=mile", "--token_gain.parameters={gamma: 1.5}")
    config = config_with("mile_loss.py", "token_gain", *SLOW, *flags, f"--cluster.micro_batch_sequences={micro}")
    assert slow_and_fast(config, tmp_path, weigh) < 1e-10


def test_rho_1_trains_on_the_tokens_of_largest_excess_loss(tmp_path, reference):
    of_reference = Transformer(MODEL).double()
    of_reference.load_state_dict(weights(reference))

    def weigh(plain, log_probs_of, group):
        tokens = group.long().clamp(min=0)
        log_probs = of_reference.logits(of_reference(tokens[:, :-1]).hidden_BTD).log_softmax(-1)
        places = [(b, t) for b in range(len(group)) for t in range(group.shape[1] - 1) if group[b, t + 1] >= 0]
        excess = [x + float(log_probs[b, t, tokens[b, t + 1]]) for x, (b, t) in zip(plain, places, strict=True)]
        k = math.ceil(0.4 * len(excess))
        chosen = sorted(range(len(excess)), key=lambda i: -excess[i])[:k]
        return [len(excess) / k if i in chosen else 0.0 for i in range(len(excess))]

    config = config_with("rho_1.py", "token_gain", *SLOW, *rho_flags(reference))
    assert slow_and_fast(config, tmp_path, weigh) < 1e-10


def test_a_reference_of_another_hash_is_refused(tmp_path, reference):
    config = config_with("rho_1.py", "token_gain", *rho_flags(reference, "0" * 64))
    with pytest.raises(UserError, match=r"token_gain\.parameters: reference .* has weights of SHA-256 .*, not 0000"):
        trained(config, tmp_path)


def test_layer_wise_rates_are_rates(tmp_path):
    """Under AdamW, with its decay: each block moves by its share of what it moves at one rate."""
    one_step = ("--training.steps=1", "--training.warmup_steps=0", "--training.precision=64-true")
    of_plugin = ("--layer_gain.apply=update", "--layer_gain.function=layer_wise_rates")
    ends = []
    for factor in (1, 2):
        flags = (*one_step, *of_plugin, f"--layer_gain.parameters={{factor: {factor}}}")
        config = config_with("layer_wise_rates.py", "layer_gain", *flags)
        ends.append(weights(trained(config, tmp_path / str(factor))))
    model = Transformer(MODEL)
    initialise(model, 1)
    for name, start in model.double().state_dict().items():
        depth = MODEL.n_blocks - 1 - int(name.split(".")[1]) if name.startswith("blocks.") else 0
        torch.testing.assert_close((ends[1][name] - start) * 2**depth, ends[0][name] - start, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- what ships


def test_the_examples_pass_the_checks(reference, capsys):
    sha256 = read_json(reference.manifest)["final_weights_sha256"]
    own = [f"--rho_1.reference={reference.root}", f"--rho_1.sha256={sha256}"]
    for name, words in (("mile_loss", []), ("rho_1", own), ("layer_wise_rates", [])):
        assert main(["check-gain", str(EXAMPLES / f"{name}.py"), *words]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["mile_loss", "rho_1", "layer_wise_rates"])
def test_an_example_s_suite_plans_with_its_plugin(name, tmp_path):
    cells = load_cells(load_suite(f"examples/{name}.yaml"), SuiteDir(tmp_path))
    assert {tuple(cell.config.plugins) for cell in cells} == {(f"{name}.py",)}
    assert len({cell.hash for cell in cells}) == len(cells)


# ---------------------------------------------------------------- entropies, and scaled updates


def test_entropies_are_those_of_the_logits_however_they_are_cut(monkeypatch):
    model = Transformer(MODEL)
    initialise(model, 1)
    hidden = torch.randn(2, 8, MODEL.d_model, generator=torch.Generator().manual_seed(0))
    found = [model.entropies(hidden)]
    monkeypatch.setattr(transformer, "CHUNK_LOGITS", 3 * MODEL.vocab_size)
    found.append(model.entropies(hidden))
    probs = model.logits(hidden).softmax(-1).flatten(0, 1)
    for entropies in found:
        torch.testing.assert_close(entropies, torch.special.entr(probs).sum(-1))


PARTS = "--layer_gain.parts=attention_and_feed_forward"


@pytest.mark.parametrize(
    ("optimizer", "micro", "how"),
    [
        ("sgd", 2, ["--layer_gain.apply=update"]),
        ("adamw", 8, ["--layer_gain.apply=update"]),
        ("adamw", 4, ["--layer_gain.apply=update", PARTS]),
        ("sgd", 8, [PARTS, "--layer_gain.exclude_blocks=[0]", "--cluster.activation_checkpointing=true"]),
    ],
)
def test_scaled_updates_and_parts_train_as_their_slow_restatement(tmp_path, optimizer, micro, how):
    more = (f"--training.optimizer={optimizer}", f"--cluster.micro_batch_sequences={micro}")
    assert slow_and_fast(small_config("both", *SLOW, *how, *more), tmp_path) < 1e-10


def test_a_scale_of_one_moves_no_bit_and_another_does(tmp_path):
    runs = {
        "plain": small_config("baseline"),
        "one": small_config("layer_gain", "--layer_gain.apply=update", "--layer_gain.t=0"),
        "update": small_config("layer_gain", "--layer_gain.apply=update"),
        "parts of one": small_config("layer_gain", PARTS, "--layer_gain.t=0"),
        "parts": small_config("layer_gain", "--layer_gain.apply=update", PARTS),
    }
    ends = {name: weights(fit(config, tmp_path / name)) for name, config in runs.items()}
    assert identical(ends["plain"], ends["one"])
    assert identical(ends["plain"], ends["parts of one"])
    assert furthest(ends["update"], ends["plain"]) > 0.01 < furthest(ends["update"], ends["parts"])
    lines = {}
    for name in ("update", "parts"):
        logged = read_journal(RunDir(tmp_path / name).metrics)
        lines[name] = next(line for line in reversed(logged) if "scale/block_00" in line)
    assert not any(tag.startswith("part_") for tag in lines["update"])
    measured = {tag: value for tag, value in lines["parts"].items() if tag.startswith("part_scale/")}
    assert len(measured) == 2 * runs["parts"].model.n_blocks and len({*measured.values()}) == len(measured)
    assert {"divergence/block_00", "scale/block_00", "part_divergence/feed_forward_00"} <= lines["parts"].keys()


def test_what_parts_do_not_go_with_is_refused():
    with pytest.raises(UserError, match=r"layer_gain\.parts: control and function give scales of blocks"):
        small_config("permuted_scale", PARTS)
    with pytest.raises(UserError, match=r"layer_gain\.parts: .* does not go with model\.class_path"):
        small_config("layer_gain_parts", model=ModelConfig(class_path="a.B", blocks="c"))
    with pytest.raises(UserError, match=r"Gains: layer\.parts"):
        Gains([torch.nn.Linear(2, 2)] * 2, layer={"parts": "attention_and_feed_forward"})


def test_a_scaled_update_resumes_bitwise(tmp_path):
    config = small_config("layer_gain", "--layer_gain.apply=update")
    run = fit(config, tmp_path)
    whole = weights(run)
    shutil.rmtree(run.checkpoint_folders()[-1])
    assert identical(weights(fit(config, tmp_path)), whole)
