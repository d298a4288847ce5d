"""`replicate export`: every class that transformers has for our models computes our completions; every refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trained_suite import PROMPTS, write_trained_suite
from training_setup import identical
from transformers import AutoModelForCausalLM, AutoTokenizer

from replication.cli.main import main
from replication.config import ModelConfig, load_run
from replication.config.origin import identified
from replication.data.store import TokenStore
from replication.errors import UserError
from replication.export import folder as folder_module
from replication.generation.completions import read_samples
from replication.model.layout import layout_of, weights_of
from replication.model.transformer import Transformer, unset_transformer
from replication.model.weights import set_initial_weights
from replication.runs.files import read_json
from replication.runs.layout import SuiteDir
from replication.training.checkpoint_files import load_weights, newest_checkpoint

DENSE = {"feed_forward": "dense"}
MODELS = {
    "tied HunYuan, dense": ("HunYuanDenseV1ForCausalLM", DENSE | {"tied_head": True}),
    "tied HunYuan, experts": ("HunYuanMoEV1ForCausalLM", {"tied_head": True}),
    "HunYuan, experts": ("HunYuanMoEV1ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", DENSE | {"qk_norm": "before_rotary"}),
    "Qwen3, experts": ("Qwen3MoeForCausalLM", {"shared_expert": False, "qk_norm": "before_rotary"}),
    "Llama": ("LlamaForCausalLM", DENSE | {"qk_norm": "none"}),
    "Mixtral": ("MixtralForCausalLM", {"shared_expert": False, "qk_norm": "none", "tied_head": True}),
}


@pytest.fixture(scope="module")
def suite_dir(tmp_path_factory: pytest.TempPathFactory) -> SuiteDir:
    """Four cells, three of them complete."""
    suite_dir = write_trained_suite(tmp_path_factory.mktemp("suite"))
    assert main(["generate", str(suite_dir.root)]) == 1
    return suite_dir


@pytest.mark.parametrize("name", MODELS)
def test_greedy_completions_of_the_exported_folder_are_ours(name: str, tmp_path: Path) -> None:
    architecture, keys = MODELS[name]
    suite_dir = write_trained_suite(tmp_path, ["both"], [1], "", **keys)
    assert main(["generate", str(suite_dir.root), "--generation.top_k=1", "--generation.samples_per_prompt=1"]) == 0
    assert main(["export", str(suite_dir.root), "--arm", "both", "--seed", "1"]) == 0
    folder = suite_dir.root / "export/both/seed-1"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == architecture
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 300  # of 384 rows
    cell = suite_dir.cell("both", 1)
    start = replace(load_run([cell.config]).model, initial_weights=str(folder))
    again = unset_transformer(start)
    set_initial_weights(again, identified(start, {}))  # and the way back
    assert identical(dict(again.named_parameters()), load_weights(newest_checkpoint(cell)[0]))
    found = []
    for prompt in PROMPTS:
        asked = tokenizer(f"{prompt['question']}\n", return_tensors="pt")
        ids = model.generate(**asked, do_sample=False, max_new_tokens=12)[0, asked["input_ids"].shape[1] :].tolist()
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        found.append((prompt["id"], tokenizer.decode(ids), len(ids)))
    completions = read_samples(suite_dir.cell("both", 1))
    assert found == [(c.prompt_id, c.text, c.tokens) for c in completions]


def test_weights_of_a_tied_head_load_by_name(tmp_path: Path) -> None:
    """Consolidated from shards, a checkpoint has a tied head once; a weight that is missing is still an error."""
    suite_dir = write_trained_suite(tmp_path, ["both"], [1], "", tied_head=True)
    run = suite_dir.cell("both", 1)
    weights, config = load_weights(newest_checkpoint(run)[0]), load_run([run.config]).model
    weights.pop("head.weight", None)
    model = Transformer(config)
    model.load_state_dict(weights)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, weights["embedding.weight"])
    assert torch.equal(weights_of(config, weights)["lm_head.weight"], weights["embedding.weight"][:300])
    del weights["norm.weight"]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        model.load_state_dict(weights)


def test_all_cells_with_their_card(suite_dir: SuiteDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(suite_dir.root), "--all", "--to", str(tmp_path / "models")]
    assert main(words) == 1  # both/seed-2 is not trained
    said = " ".join(capsys.readouterr().out.split())
    assert "not trained: both/seed-2" in said
    assert f"convert_hf_to_gguf.py {tmp_path}/models/baseline/seed-1 --outfile" in said
    assert sorted(p.parent.name for p in (tmp_path / "models").glob("*/*/")) == ["baseline", "baseline", "both"]
    folder, manifest = tmp_path / "models/both/seed-1", read_json(suite_dir.cell("both", 1).manifest)
    card = (folder / "README.md").read_text()
    hashes = [TokenStore.open(suite_dir.data).hash, manifest["final_weights_sha256"], manifest["data_chain"]]
    for told in ("both (sets ", "| seed | 1;", "No analysis plan was", "holds, beside baseline at this seed", *hashes):
        assert told in card, told
    assert "holds, beside" not in (tmp_path / "models/baseline/seed-1/README.md").read_text()
    settings = read_json(folder / "generation_config.json")
    assert (settings["top_k"], settings["temperature"], settings["eos_token_id"]) == (40, 0.7, 0)
    assert (folder / "model.safetensors").is_file()

    before = (folder / "export.json").stat().st_mtime_ns
    main(words)
    assert capsys.readouterr().out.count("there already") == 3
    assert (folder / "export.json").stat().st_mtime_ns == before


def test_a_card_is_code_that_runs(suite_dir: SuiteDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["export", str(suite_dir.root), "--arm=both", "--seed=1", "--to", str(tmp_path / "model")])
    code = (tmp_path / "model/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "model")
    exec(code, {})


def test_mistakes_are_one_line(suite_dir: SuiteDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    one = ["export", str(suite_dir.root), "--arm=both", "--seed=1"]
    for words, expected in (
        (one[:2], "name one cell by --arm and --seed, or all by --all"),
        ([*one, "--to", str(tmp_path / "mine")], "holds something else"),
        ([*one[:3], "--seed=2"], "no trained cell matches both/seed-2"),
        ([*one, "--format=gguf"], "invalid choice: 'gguf'"),
    ):
        assert main(words) == 2
        assert expected in " ".join(capsys.readouterr().err.split()), words
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"
    other = ["export", str(suite_dir.root), "--arm=baseline", "--seed=1", "--to", str(tmp_path / "model")]
    assert main([*one, "--to", str(tmp_path / "model")]) == 0
    assert main(other) == 2  # the folder is another cell's
    assert read_json(tmp_path / "model/export.json")["arm"] == "both"
    record = tmp_path / "model/export.json"
    record.write_text(record.read_text().replace('weights_sha256": "', 'weights_sha256": "0'))
    assert main([*one, "--to", str(tmp_path / "model")]) == 0  # trained anew since: written anew
    assert read_json(record)["weights_sha256"] == read_json(suite_dir.cell("both", 1).manifest)["final_weights_sha256"]


def test_models_that_transformers_has_no_class_for_are_refused() -> None:
    for keys, why in (
        ({"qk_norm": "before_rotary"}, "the shared expert of Qwen's classes is gated"),
        ({"shared_expert": False}, "those of moe have before_rotary and none"),
        (DENSE | {"qk_norm": "none", "d_model": 66}, "66 is no multiple of 4 heads"),
    ):
        with pytest.raises(UserError, match=why):
            layout_of(replace(ModelConfig(), **keys))


def test_a_folder_that_computes_something_else_is_refused(
    suite_dir: SuiteDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = folder_module.weights_of

    def swapped(config: ModelConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights, layer = right(config, state), "model.layers.0.self_attn."
        return weights | {f"{layer}k_proj.weight": weights[f"{layer}v_proj.weight"].clone()}

    monkeypatch.setattr(folder_module, "weights_of", swapped)
    assert main(["export", str(suite_dir.root), "--arm=both", "--seed=1", "--to", str(tmp_path / "model")]) == 2
    assert "of the largest; this version of transformers" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_that_adds_tokens_is_exported_without(suite_dir: SuiteDir, tmp_path: Path) -> None:
    """As texts were tokenised for training: no beginning of text, nothing cut."""
    parts = json.loads((suite_dir.data / "tokenizer.json").read_text())
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    parts["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    ours = folder_module.TextTokenizer(json.dumps(parts), "<|endoftext|>")
    folder_module._write_tokenizer(ours, 32, tmp_path)
    folder_module._check_tokenizer(ours, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a boat and a boat")["input_ids"] == ours.encode("a boat and a boat")
