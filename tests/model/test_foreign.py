"""Someone else's model in our suites: trained as Gains trains it, certified, resumed, sampled; and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_store import MemoryStore
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from trained_suite import write_trained_suite
from training_setup import MODEL, fit, furthest, identical, small_config, weights
from transformers import GPT2LMHeadModel

from replication import Gains
from replication.cli.main import main
from replication.config import ModelConfig, RunConfig, load_cell, load_run, load_suite, scientific, scientific_hash
from replication.config.origin import identified, remember, sha256_of_weights
from replication.data.module import TrainingBatches
from replication.errors import UserError
from replication.generation.generate import load_model
from replication.generation.sampling import Sampler, complete
from replication.grid.doctor import needs_of
from replication.model.foreign import Foreign, build, parameters_in
from replication.model.loss import inputs_and_targets
from replication.model.size import activation_gib, parameter_count
from replication.protocol.certificate import certify
from replication.runs.files import read_json, remove_tree
from replication.runs.layout import RunDir, SuiteDir
from replication.training.optimizers import build_optimizer, build_schedule, dry_run

SIZE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
SIZE |= {"num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, low):
        super().__init__()
        self.linear, self.low = nn.Linear(width, width), low

    def forward(self, x):
        return x + self.linear(x.cumsum(1) if self.low else x).tanh()

class Net(nn.Module):
    def __init__(
        self, vocab_size: int, width: int = 8, blocks: int = 2, dropout=0.0, norm=False, ahead=False, kept=True, most=99
    ):
        super().__init__()
        self.register_buffer("shift", torch.randn(width), persistent=kept)
        self.places = nn.Embedding(most, width)
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.stack = nn.ModuleList(Block(width, i == 0) for i in range(blocks))
        self.drop, self.norm, self.ahead = nn.Dropout(dropout), nn.BatchNorm1d(16) if norm else nn.Identity(), ahead

    def forward(self, tokens):
        x = self.drop(self.norm(self.embed(tokens) + self.places.weight[torch.arange(tokens.shape[1])] + self.shift))
        x = x + x.mean(1, keepdim=True) if self.ahead else x
        for block in self.stack:
            x = block(x)
        return self.head(x)
"""


def transformers(name: str, keys: dict[str, object], **more: object) -> ModelConfig:
    config = {"class_path": f"transformers.{name}Config", "init_args": keys | more}
    cls, blocks = ("GPT2LMHeadModel", "transformer.h") if name == "GPT2" else (f"{name}ForCausalLM", "model.layers")
    model = ModelConfig(64, class_path=f"transformers.{cls}", init_args={"config": config}, blocks=blocks)
    return identified(model, {})


MODELS = {"Qwen3": transformers("Qwen3", SIZE), "GPT2": transformers("GPT2", GPT2)}


def plugin_config(folder: Path, arm: str = "baseline", *flags: str, **init_args: object) -> RunConfig:
    """A run of Net from the plugin of this output folder."""
    file = folder / "plugins/my_model.py"
    file.parent.mkdir()
    file.write_text(NET)
    remember([file])
    args = json.dumps({"vocab_size": 64, **init_args})
    keys = [f"--model.init_args={args}", "--model.class_path=my_model.Net", "--model.blocks=stack"]
    keys += ["--model.vocab_size=64", f"--plugins={{my_model.py: {sha256_of_weights((file,))}}}"]
    found = load_run([], keys)
    return replace(small_config(arm, *flags, model=found.model), plugins=found.plugins).check()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_are_those_of_gains_in_a_plain_loop_bit_for_bit(name, tmp_path):
    """With accumulation, clipping, smoothing and a padded block, both gains."""
    config = small_config("both", "--training.steps=3", "--cluster.micro_batch_sequences=4", model=MODELS[name])
    run = fit(config, tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build(config.model)
    gains = Gains(config.model.blocks, model, token={}, layer={}, label_smoothing=0.1)
    optimizer = build_optimizer(config.training, model)
    schedule = build_schedule(config.training, optimizer)
    batches = map(TrainingBatches(config, MemoryStore(), 0, 1).__getitem__, range(6))
    for _ in range(3):
        micro_batches = [next(batches) for _ in range(2)]
        for batch in micro_batches:
            tokens, labels = inputs_and_targets(batch.tokens_BS, 0)
            loss = gains.loss(model(tokens).logits, labels, shift=False, divisor=batch.step_groups / 2)
            (loss / 2).backward()
        gains.scale()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert identical(weights(run), {n: p.detach() for n, p in model.named_parameters()})
    line = [json.loads(line) for line in run.metrics.read_text().splitlines()][-2]
    told = gains.metrics()
    assert {line[f"scale/block_{i:02d}"] for i in range(3)} == {told[f"scale/block_{i:02d}"] for i in range(3)}
    assert line["train/loss_nats"] == pytest.approx(told["train/loss_nats"], rel=1e-6)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> SuiteDir:
    """The four arms of GPT-2, whose head is tied, two steps each."""
    model = transformers("GPT2", GPT2, vocab_size=300)
    keys = {key: getattr(model, key) for key in ("class_path", "init_args", "blocks")}
    return write_trained_suite(
        tmp_path_factory.mktemp("gpt2"), ["baseline", "token_gain", "layer_gain", "both"], [1], "", **keys
    )


def test_four_arms_are_certified_and_differ(suite):
    loaded = load_suite(suite.suite)
    assert main(["generate", str(suite.root)]) == 0
    certificate = certify(suite, loaded.arms, loaded.seeds)
    assert certificate.holds, [seed.reasons for seed in certificate.seeds]
    cells = {arm: read_json(suite.cell(arm, 1).manifest) for arm in loaded.arms}
    assert len({cell["initial_weights_sha256"] for cell in cells.values()}) == 1
    assert len({cell["final_weights_sha256"] for cell in cells.values()}) == 4
    assert cells["both"]["parameters"] == parameter_count(load_run([suite.cell("both", 1).config]).model)
    assert main(["report", str(suite.root)]) == 0
    said = suite.report_md.read_text()
    assert "transformers.GPT2LMHeadModel" in said
    assert "model.d_model" not in said


def test_completions_are_those_of_the_class(suite):
    """Greedy, without a cache, rows of different lengths."""
    run = suite.cell("both", 1)
    config = load_run([run.config])
    model = load_model(config, run)
    assert isinstance(model, Foreign)
    prompts = [[5, 9, 200, 31], [7, 8], [3]]
    with torch.no_grad():
        logits = model(torch.tensor(prompts[:1])).hidden_BTD
    assert torch.allclose(model.entropies(logits), torch.distributions.Categorical(logits=logits[0]).entropy())
    found = complete(model, prompts, [1, 2, 3], Sampler(1.0, 1), 8, end_of_text=-1)
    assert isinstance(model.net, GPT2LMHeadModel)
    for prompt, ids in zip(prompts, found, strict=True):
        asked = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        theirs = model.net.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **asked)
        assert theirs[0, len(prompt) :].tolist() == ids
    n = model.net.config.n_positions = max(map(len, prompts)) + 7  # the last token of 8 is not fed
    assert complete(model, prompts, [1, 2, 3], Sampler(1.0, 1), 8, end_of_text=-1) == found
    with pytest.raises(UserError, match=rf"have {n + 2} tokens, and transformers\.\S+ has {n} positions"):
        complete(model, prompts, [1, 2, 3], Sampler(1.0, 1), 9, end_of_text=-1)


@pytest.mark.parametrize("name", MODELS)
def test_it_goes_on_bit_for_bit(name, tmp_path):
    config = small_config("both", model=MODELS[name])
    run = fit(config, tmp_path)
    end = weights(run)
    remove_tree(run.checkpoints / "step-000006")
    fit(config, tmp_path)
    assert identical(weights(run), end)
    assert len(read_json(run.manifest)["starts"]) == 2


def test_a_class_of_a_plugin_is_that_file_s(tmp_path):
    run = SuiteDir(tmp_path).cell("both", 1)
    config = plugin_config(tmp_path, "both", "--training.precision=64-true")
    fit(config, run.root)
    assert [len(weights(run)), config.model.origin] == [9, f"my_model.py=={config.plugins['my_model.py']}"]
    assert isinstance(load_model(config, run), Foreign)
    (tmp_path / "plugins/my_model.py").write_text(NET + "\n")
    with pytest.raises(UserError, match=r"my_model.py: the plugin was changed"):
        load_model(config, run)


def test_checkpointing_changes_nothing(tmp_path):
    config = small_config("both", model=MODELS["Qwen3"])
    again = replace(config, cluster=replace(config.cluster, activation_checkpointing=True))
    assert identical(weights(fit(config, tmp_path / "a")), weights(fit(again, tmp_path / "b")))


def test_a_mixtures_balance_enters_where_its_micro_batch_is_the_group(tmp_path):
    keys = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "output_router_logits": True}
    model = transformers("Qwen3Moe", SIZE | keys)
    with pytest.raises(UserError, match=r"training.gain_group_sequences: .* one load-balancing loss a micro-batch"):
        fit(small_config(model=model), tmp_path / "refused")
    run = fit(small_config("baseline", "--training.gain_group_sequences=null", model=model), tmp_path / "whole")
    line = json.loads(run.metrics.read_text().splitlines()[0])
    assert line["train/aux_loss"] > 0
    assert line["train/objective"] == pytest.approx(line["train/loss_nats"] + line["train/aux_loss"], rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_two_ranks_train_as_one(strategy, suite, tmp_path):
    """The tied GPT-2 under SGD, two steps in fp32."""
    ends = []
    for name, devices in (("single", 1), (strategy, 2)):
        config, machine = suite.cell("both", 1).config, [f"--cluster.strategy={name}", f"--cluster.devices={devices}"]
        keys = [f"--data.dir={suite.data}", "--training.optimizer=sgd", "--training.learning_rate=0.1", *machine]
        out = str(tmp_path / name)
        command = [
            sys.executable,
            "-P",
            "-m",
            "replication",
            "train",
            "--config",
            str(config),
            "--out",
            out,
            "--stage=train",
        ]
        subprocess.run([*command, *keys], check=True, timeout=300)
        ends.append(weights(SuiteDir(Path(out)).cell("both", 1)))
    assert furthest(*ends) < 1e-5


# ---------------------------------------------------------------- identity, sizes


def test_the_hash_covers_class_arguments_blocks_and_version():
    config = small_config(model=MODELS["Qwen3"])
    keys = {key for key in scientific(config) if key.startswith("model.")}
    assert {"model.class_path", "model.blocks", "model.origin", "model.vocab_size"} < keys
    assert "model.d_model" not in keys
    others = [
        replace(config.model, blocks="model.layer"),
        replace(config.model, origin="transformers==1.0"),
        replace(config.model, class_path="transformers.LlamaForCausalLM"),
        transformers("Qwen3", SIZE, hidden_size=32),
    ]
    assert len({scientific_hash(replace(config, model=model)) for model in (config.model, *others)}) == 5
    moved = replace(config.model, initial_weights="elsewhere")
    assert scientific_hash(replace(config, model=moved)) == scientific_hash(config)


def test_a_suites_file_records_the_version_and_survives_another(suite, tmp_path):
    config = load_cell(load_suite(suite.suite), "both", 1)
    there = load_run([suite.cell("both", 1).config])
    assert config.model == there.model
    other = replace(there, model=replace(there.model, origin="transformers==1.0"))
    with pytest.raises(
        UserError, match=r"model.origin: the run is defined by transformers==1.0, and transformers==\S+ is"
    ):
        fit(other, tmp_path)


def test_sizes_are_counted_and_what_is_not_known_is_said():
    config = small_config(model=MODELS["GPT2"])
    assert parameter_count(config.model) == sum(p.numel() for p in build(config.model).parameters())
    assert activation_gib(config) is None
    out = io.StringIO()
    dry_run(config, Console(file=out, width=160))
    assert "at least: unknown" in out.getvalue()
    groups = re.findall(r"(\S+) in \d+ tensors", out.getvalue())
    assert sum(int(n.replace(",", "")) for n in groups) == parameter_count(config.model)


def test_the_shipped_example_is_small():
    config = load_cell(load_suite("examples/qwen3.yaml"), "both", 1)
    assert 200_000 < parameter_count(config.model) < 400_000


def test_doctor_asks_what_can_be_counted(suite):
    found = needs_of(load_suite(suite.suite), load_run([suite.cell("both", 1).config]))
    assert (found.activations_gib, found.n_cells) == (None, 4)
    assert found.training_gib == pytest.approx(16 * found.parameters / 2**30)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.blocks=null"], r"model.blocks: is not set; give the path"),
        (["--model.class_path=null"], r"model.class_path: None names no class"),
        (["--model.d_model=32"], r"model.d_model: is a key of our own model; remove it"),
        (["--training.optimizer=muon"], r"training.optimizer: muon does not go with model.class_path: Muon knows"),
        (["--cluster.compile=true"], r"cluster.compile: true does not go with .*; choose false"),
        (["--cluster.head=chunked"], r"cluster.head: chunked does not go with"),
        (["--cluster.attention=math"], r"cluster.attention: math .* attn_implementation"),
        (["--cluster.strategy=zero3"], r"cluster.strategy: zero3 does not go with .* single or ddp"),
        (["--model.class_path=nowhere.Net"], r"nowhere.Net is of no installed package and no plugin"),
        (["--model.initial_weights=/nowhere"], r"model.initial_weights: /nowhere is no file and holds no"),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags, message):
    layer = [
        "--model.class_path=transformers.GPT2LMHeadModel",
        "--model.blocks=transformer.h",
        "--cluster.accelerator=cpu",
    ]
    with pytest.raises(UserError, match=message):
        load_run([], [*layer, *flags])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, r"my_model.Net draws random numbers in training: set its dropout to 0"),
        ({"norm": True}, r"keeps statistics of batches \(norm.running_mean\): choose a norm"),
        ({"ahead": True}, r"lets positions see later ones: give it a causal mask"),
        ({"vocab_size": 80}, r"gives logits \[1, 16, 80\], not \[1, 16, 64\]: give its vocabulary"),
        ({"widht": 3}, r"my_model.Net cannot be made of its init_args \(TypeError: .*widht"),
        ({"most": 15}, r"my_model.Net does not run on 16 tokens \(IndexError: .*: it takes token ids"),
        ({"blocks": 0}, r"model.blocks: stack of my_model.Net holds no blocks"),
    ],
)
def test_models_that_would_be_trained_otherwise_than_stated_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit(plugin_config(tmp_path, "both", **change), SuiteDir(tmp_path).cell("both", 1).root)


@pytest.mark.parametrize("kept", [True, False])
def test_buffers_that_a_constructor_draws_are_those_of_the_training(kept, tmp_path):
    config, run = plugin_config(tmp_path, "both", kept=kept), SuiteDir(tmp_path).cell("both", 1)
    fit(config, run.root)
    drawn = Foreign(config.model, config.effective_weights_seed).net.shift
    sampled = parameters_in(load_model(config, run))
    assert torch.equal(sampled.shift, drawn) and not torch.equal(drawn, Foreign(config.model, 2).net.shift)
    file = run.checkpoint_folders()[-1] / "weights.pt"
    found = torch.load(file)
    assert ("shift" in found) == kept
    found.pop("shift", None)  # consolidated shards have parameters alone
    sampled.load_state_dict(found)
    assert torch.equal(sampled.shift, drawn)
    again = replace(config, seed=2, training=replace(config.training, initial_weights=str(file)))
    fit(again, SuiteDir(tmp_path).cell("both", 2).root)


def test_a_misspelt_key_of_a_configuration_is_refused():
    with pytest.raises(UserError, match=r"Qwen3Config cannot be made .*\(TypeError: it has no hiden_size"):
        build(transformers("Qwen3", SIZE, hiden_size=3))
    build(transformers("Qwen3", SIZE, attn_implementation="eager"))


def test_what_only_the_built_model_shows_is_refused(tmp_path, suite, capsys):
    for flags, model, message in (
        (["--layer_gain.exclude_blocks=[3]"], MODELS["GPT2"], r"layer_gain.exclude_blocks: \[3\] are not blocks 0..2"),
        (
            [],
            replace(MODELS["GPT2"], blocks="model.layers"),
            r"model.blocks: the model has no 'model.layers'; its lists are ",
        ),
    ):
        with pytest.raises(UserError, match=message):
            fit(small_config("both", *flags, model=model), tmp_path / "cell")
    assert main(["export", str(suite.root), "--all", "--to", str(tmp_path / "models")]) == 2
    assert "only our own model is exported" in capsys.readouterr().err
    assert main(["bench", "step", "--config", str(suite.cell("both", 1).config)]) == 2
    assert "model.class_path: bench times our own model" in capsys.readouterr().err


# ---------------------------------------------------------------- initial weights


def start_from(path: Path, model: ModelConfig, *flags: str) -> RunConfig:
    keys = {"initial_weights": str(path), "weights_sha256": None}
    return small_config("both", *flags, model=identified(replace(model, **keys), {}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[RunDir, Path]:
    """A Qwen3 cell, and its weights as the class's save_pretrained writes them, in shards."""
    root = tmp_path_factory.mktemp("trained")
    config = small_config("baseline", "--training.steps=2", model=MODELS["Qwen3"])
    run = fit(config, root / "cell")
    model = build(config.model)
    model.load_state_dict(weights(run))
    model.save_pretrained(root / "saved", max_shard_size="8KB")
    assert len(list((root / "saved").glob("*.safetensors"))) > 2
    return run, root / "saved"


def test_continued_pretraining_starts_where_the_other_run_ended(trained, tmp_path):
    before, saved = trained
    folder = tmp_path / "weights"
    shutil.copytree(saved, folder)
    config = start_from(folder, MODELS["Qwen3"])
    run = fit(config, tmp_path / "cell")
    assert read_json(run.manifest)["initial_weights_sha256"] == read_json(before.manifest)["final_weights_sha256"]
    elsewhere = replace(config, model=replace(config.model, initial_weights="/elsewhere"))
    assert (
        scientific_hash(elsewhere)
        == scientific_hash(config)
        != scientific_hash(small_config("both", model=MODELS["Qwen3"]))
    )
    there = f"--training.initial_weights={before.root / 'checkpoints/step-000002/weights.pt'}"
    other_way = fit(small_config("both", there, model=MODELS["Qwen3"]), tmp_path / "by_checkpoint")
    assert identical(weights(other_way), weights(run))
    remove_tree(folder)  # a run that goes on reads nothing of it
    end = weights(run)
    remove_tree(run.checkpoints / "step-000006")
    fit(config, run.root)
    assert identical(weights(run), end)


def test_files_that_are_not_the_configs_are_refused(trained, tmp_path):
    config = start_from(trained[1], MODELS["Qwen3"])
    other = replace(config, model=replace(config.model, weights_sha256="0" * 64))
    with pytest.raises(UserError, match=r"has SHA-256 \w+, and the run is defined by 0{64}; restore those files"):
        fit(other, tmp_path)


def test_our_own_names_in_one_file(tmp_path):
    run = fit(small_config("baseline", "--training.steps=2"), tmp_path / "first")
    file = tmp_path / "ours.safetensors"
    save_file(weights(run), file)
    started = fit(start_from(file, MODEL, "--training.steps=2"), tmp_path / "second")
    assert read_json(started.manifest)["initial_weights_sha256"] == read_json(run.manifest)["final_weights_sha256"]
    assert sha256_of_weights((file,)) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("way", ["by transformers", "by name", "ours"])
def test_tensors_that_do_not_fit_are_one_line(way, trained, tmp_path):
    model = MODEL if way == "ours" else transformers("Qwen3", SIZE, num_hidden_layers=4, intermediate_size=32)
    state = {"norm.weight": torch.ones(2), "more": torch.ones(1)}
    if way == "by name":
        state = {n: t for file in trained[1].glob("*.safetensors") for n, t in load_file(file).items()}
    save_file({**state, "more": torch.ones(1)}, tmp_path / "model.safetensors")
    path = trained[1] if way == "by transformers" else tmp_path
    with pytest.raises(UserError, match=r"does not fit the keys of model: tensors are ") as refused:
        fit(start_from(path, model), tmp_path / "cell")
    for what in ("missing", *(("unexpected",) if way != "by transformers" else ()), "misshapen"):
        assert re.search(rf"\d+ {what}, such as \S+", str(refused.value)), what
    assert "\n" not in str(refused.value)


def test_a_head_of_its_own_is_not_dropped_by_a_tied_model(tmp_path):
    model = transformers("Qwen3", SIZE, tie_word_embeddings=True)
    state = {name: t.contiguous().clone() for name, t in Foreign(model, 1).net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    fit(start_from(tmp_path, model, "--training.steps=2"), tmp_path / "cell")
    save_file(state | {"lm_head.weight": state["lm_head.weight"] + 1}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"another lm_head.weight than model.embed_tokens.weight, which are one weight"):
        fit(start_from(tmp_path / "other.safetensors", model), tmp_path / "other")
