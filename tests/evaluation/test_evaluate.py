"""`replicate eval`: our model scores as the exported folder does; scores are redone where something changed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from reported import report
from trained_suite import write_trained_suite

from replication.cli.main import main
from replication.config import load_run, load_suite
from replication.console import Reporter
from replication.data.store import TokenStore, validation_set
from replication.evaluation.distributions import QUARTERS, frequency_quarters
from replication.evaluation.record import matched_temperature, read_parts
from replication.evaluation.scoring import Scorer
from replication.evaluation.verify import _tolerance
from replication.generation.completions import read_samples
from replication.generation.generate import load_model
from replication.judging.completions import from_suite
from replication.runs.files import read_json, write_json
from replication.runs.layout import SuiteDir
from replication.runs.manifest import read_manifest
from replication.votes.record import read_panel_record

CELLS = ("baseline/seed-1", "both/seed-1", "baseline/seed-2")  # both/seed-2 is not trained
TEXT = "The sea was far away, and a boat lay on the river.\nNobody had seen it.\n" * 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of four cells, three of them with completions, and a text."""
    folder = tmp_path_factory.mktemp("trained")
    suite_dir = write_trained_suite(folder)
    assert main(["generate", str(suite_dir.root)]) == 1
    (folder / "book.txt").write_text(TEXT)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def write_tasks(folder: Path) -> None:
    """A multiple choice, a rolling likelihood, a last word and a generation, over documents in a local file."""
    folder.mkdir()
    words = ("sea", "boat", "river", "bird", "stone", "cloud", "house", "tree")
    docs = [
        {"question": f"Where is the {a}? It is {'far away, ' * i}by the", "choices": [f" {b}", f" old {a}", " x"],
         "gold": i % 3, "text": f"The {a} and the {b} were old. " * (i + 1)}
        for i, (a, b) in enumerate(pairwise(words))
    ]  # fmt: skip
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    own = {
        "choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "gold",
            "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "last_word": {
            "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{choices[0]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "answer": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"max_gen_toks": 6, "until": ["\n"]}, "metric_list": [{"metric": "chrf"}],
        },
    }  # fmt: skip
    for name, keys in own.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        task = {"task": name, "test_split": "test", **data, **keys}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def scores(suite_dir: SuiteDir, name: str) -> dict[str, dict[str, float]]:
    parts = read_json(suite_dir.runs / name / "evaluation.json")["parts"]
    return {part["name"]: part["scores"] for part in parts}


@pytest.mark.slow
def test_tasks_score_as_the_exported_folder_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the harness's own model of transformers, and through ours."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    suite_dir = SuiteDir(folder / "out")
    write_tasks(folder / "tasks")
    one = [str(suite_dir.root), "--arm=both", "--seed=1"]
    assert main(["eval", *one, "--tasks", str(folder / "tasks")]) == 0
    assert main(["export", *one, "--to", str(folder / "model")]) == 0
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(folder / "model"), "dtype": "float32"}, ["choice", "rolling", "last_word", "answer"],
        batch_size=3, device="cpu", bootstrap_iters=0, task_manager=manager,
    )["results"]  # fmt: skip
    ours = scores(suite_dir, "both/seed-1")
    compared = 0
    for task in ("choice", "rolling", "last_word", "answer"):
        for metric, value in ours[task].items():
            assert value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-5), (task, metric)
            compared += 1
    assert compared == 7

    capsys.readouterr()
    assert main(["eval", *one, "--tasks", str(folder / "tasks")]) == 0  # nothing to do
    assert capsys.readouterr().out.count("there already") == 4
    docs = folder / "tasks/docs.jsonl"
    docs.write_text(docs.read_text().replace("boat", "ship"))
    assert main(["eval", *one, "--tasks", str(folder / "tasks")]) == 0
    assert "there already" not in capsys.readouterr().out
    assert main(["eval", *one, "--tasks", "no_such_task"]) == 2
    assert "no_such_task is neither a folder nor a task" in " ".join(capsys.readouterr().err.split())


def test_files_without_the_harness(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_dir, words = SuiteDir(folder / "out"), ["--files", str(folder / "book.txt")]
    assert main(["eval", str(suite_dir.root), *words]) == 1  # both/seed-2 is not trained
    assert "not trained: both/seed-2" in capsys.readouterr().out
    for name in CELLS:
        found = scores(suite_dir, name)
        assert set(found) == {"book.txt"} and 0 < found["book.txt"]["bits per byte"] < 10
    before = (suite_dir.runs / CELLS[0] / "evaluation.json").read_bytes()
    main(["eval", str(suite_dir.root), *words])
    assert capsys.readouterr().out.count("there already") == 3
    assert (suite_dir.runs / CELLS[0] / "evaluation.json").read_bytes() == before
    (folder / "book.txt").write_text(TEXT + "More.")
    main(["eval", str(suite_dir.root), *words])
    assert "there already" not in capsys.readouterr().out


def log_probs(suite_dir: SuiteDir, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(log probabilities [N, V], targets [N]) of a cell on its validation set, plainly."""
    run, store = SuiteDir(suite_dir.root).cell(*name.split("/seed-")), TokenStore.open(suite_dir.data)
    config = load_run([run.config], ["--generation.precision=32-true"])
    blocks = torch.from_numpy(store.read("validation", *validation_set(config, store))).long()
    inputs, targets = blocks[:, :-1].clone(), blocks[:, 1:]
    inputs[blocks[:, :-1] < 0] = store.end_of_text_id
    model = load_model(config, run)
    with torch.inference_mode():
        logits = model.logits(model(inputs).hidden_BTD)
    return logits[targets >= 0].log_softmax(-1), targets[targets >= 0]


def test_distributions_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_dir = SuiteDir(folder / "out")
    assert main(["eval", str(suite_dir.root), "--distributions"]) == 1
    found = scores(suite_dir, "both/seed-1")["validation"]
    own, targets = log_probs(suite_dir, "both/seed-1")
    plain = log_probs(suite_dir, "baseline/seed-1")[0]
    kl = float((plain.exp() * (plain - own)).sum(-1).mean())
    assert found["KL from baseline at the same seed"] == pytest.approx(kl, rel=1e-3) and kl > 0
    assert found["KL from the same arm at another seed"] is None, "the other one is not trained"
    of_baseline = scores(suite_dir, "baseline/seed-1")["validation"]
    other = log_probs(suite_dir, "baseline/seed-2")[0]
    kl = float((other.exp() * (other - plain)).sum(-1).mean())
    assert of_baseline["KL from the same arm at another seed"] == pytest.approx(kl, rel=1e-3)
    assert of_baseline["KL from baseline at the same seed"] is None

    store, losses = TokenStore.open(suite_dir.data), -own.gather(1, targets[:, None])[:, 0]
    config = load_run([suite_dir.cell("both", 1).config])
    quarters = torch.from_numpy(frequency_quarters(config, store))[targets]
    for i, name in enumerate(QUARTERS):
        if (quarters == i).any():
            expected = float(losses[quarters == i].mean())
            assert found[f"loss, {name} quarter of tokens"] == pytest.approx(expected, rel=1e-5)
    assert len(set(quarters.tolist())) >= 3
    counts = torch.bincount(targets, minlength=300)
    of_V = frequency_quarters(config, store)
    assert counts[of_V == 0].float().mean() > counts[of_V == 3].float().mean(), "the frequent ones come first"

    part = read_parts(suite_dir.cell("both", 1))["distributions", "validation"]
    entropy = float(-(own.exp() * own).sum(-1).mean())
    assert part.entropies_nats["1.000000"] == pytest.approx(entropy, rel=1e-5)
    capsys.readouterr()
    main(["eval", str(suite_dir.root), "--distributions"])
    assert capsys.readouterr().out.count("there already") == 3
    results, text, _ = report(suite_dir, load_suite(folder / "suite.yaml"))
    rows = {row["name"]: row for row in results["evaluations"]}
    assert rows["validation: KL from baseline at the same seed"]["means"]["both"] == pytest.approx(
        found["KL from baseline at the same seed"]
    )
    assert "validation: loss, rarest quarter of tokens" in text


def test_named_settings_lie_apart_and_matched_has_the_baselines_entropy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_dir, one = SuiteDir(folder / "out"), ["--arm=both", "--seed=1"]
    out, run = str(suite_dir.root), suite_dir.cell("both", 1)
    before, manifest = run.samples.read_bytes(), run.manifest.read_bytes()
    assert main(["generate", out, *one, "--setting=matched"]) == 2
    assert "replicate eval" in capsys.readouterr().err
    main(["eval", out, "--distributions"])
    assert main(["generate", out, *one, "--setting=greedy,t1.3,matched"]) == 0
    assert "3 of 3 cells sampled" in capsys.readouterr().out
    assert (run.samples.read_bytes(), run.manifest.read_bytes()) == (before, manifest)
    found = {name: suite_dir.cell("both", 1, name) for name in ("greedy", "t1.3", "matched")}
    texts = {name: [c.text for c in read_samples(cell)] for name, cell in found.items()}
    assert len(texts["greedy"]) == 4 and len(texts["t1.3"]) == len(texts["matched"]) == 12
    assert texts["t1.3"] != [c.text for c in read_samples(run)]
    assert main(["generate", out, *one, "--setting=greedy,t1.3,matched"]) == 0
    assert "0 of 3 cells sampled, 3 there already" in capsys.readouterr().out

    def entropy(name: str, temperature: float) -> float:
        at = (log_probs(suite_dir, name)[0] / temperature).log_softmax(-1)
        return float(-(at.exp() * at).sum(-1).mean())

    asked = load_run([run.config]).generation.temperature
    matched = read_json(found["matched"].sampling)["temperature"]
    assert matched != asked and read_json(found["t1.3"].sampling)["temperature"] == 1.3
    assert entropy("both/seed-1", matched) == pytest.approx(entropy("baseline/seed-1", asked), rel=2e-3)
    assert matched_temperature(suite_dir.cell("baseline", 1), suite_dir.cell("baseline", 1), asked) == asked
    assert main(["generate", out, "--setting=hot"]) == 2
    assert "--setting: 'hot' names no way of sampling" in capsys.readouterr().err

    main(["generate", out, "--arm=baseline", "--seed=1", "--setting=greedy,matched"])
    words = ["--judges=1", "--votes=4", "--repeats=0"]
    assert main(["judge", "prepare", out, "--setting=greedy", *words]) == 0
    assert read_panel_record(suite_dir.judging).setting == "greedy"
    assert "seed 2 is left out" in capsys.readouterr().out
    assert from_suite(suite_dir.root, None, setting="matched").completions[1].keys() == {"baseline", "both"}
    _, text, _ = report(suite_dir, load_suite(folder / "suite.yaml"))
    assert "completions of the setting greedy" in text


def test_bits_per_byte_are_those_of_the_plain_sum(folder: Path) -> None:
    """Windows of the model's length, each token once: the first after an end of text, the last with a full context."""
    suite_dir = SuiteDir(folder / "out")
    run, store = suite_dir.cell("both", 1), TokenStore.open(suite_dir.data)
    model = load_model(load_run([run.config], ["--generation.precision=32-true"]), run)
    main(["eval", str(suite_dir.root), "--arm=both", "--seed=1", "--files", str(folder / "book.txt")])
    ids, length, total = store.tokenizer.encode(TEXT), store.block_size_tokens, 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), length):
            end = min(start + length, len(ids))
            first = end - length - 1
            fed = [store.end_of_text_id, *ids[: end - 1]] if first < 0 else ids[first : end - 1]
            log_probs = model.logits(model(torch.tensor([fed])).hidden_BTD)[0].log_softmax(-1)
            total += sum(float(log_probs[i - end, ids[i]]) for i in range(start, end))
    assert len(ids) % length and len(ids) > 3 * length
    expected = -total / math.log(2) / len(TEXT.encode())
    assert scores(suite_dir, "both/seed-1")["book.txt"]["bits per byte"] == pytest.approx(expected, rel=1e-5)
    scorer = Scorer(model, length, store.end_of_text_id, Reporter(None))
    assert scorer.rolling([ids, [], ids[:3]])[0] == pytest.approx(total, rel=1e-5)  # whatever is scored beside it


def test_the_report_compares_arms_over_seeds(folder: Path) -> None:
    suite_dir, suite = SuiteDir(folder / "out"), load_suite(folder / "suite.yaml")
    without, text, markdown = report(suite_dir, suite)
    assert "evaluations" not in without and "Evaluations" not in text
    inputs = suite_dir.inputs_sha256([suite_dir.cell("both", 1)])
    main(["eval", str(suite_dir.root), "--files", str(folder / "book.txt")])
    assert suite_dir.inputs_sha256([suite_dir.cell("both", 1)]) != inputs
    results, text, with_them = report(suite_dir, suite)
    assert {k: v for k, v in results.items() if k != "evaluations"} == without
    rows = {row["key"]: row for row in results["evaluations"]}
    bits = rows["file/book.txt/bits per byte"]
    values = {name: scores(suite_dir, name)["book.txt"]["bits per byte"] for name in CELLS}
    assert bits["values"] == {"baseline": [values["baseline/seed-1"], values["baseline/seed-2"]],
                              "both": [values["both/seed-1"], None]}  # fmt: skip
    (pair,) = bits["pairs"]
    assert (pair["arm"], pair["n"], pair["note"]) == ("both", 1, "one seed: no interval")
    assert pair["mean"] == pytest.approx(values["both/seed-1"] - values["baseline/seed-1"])
    section = with_them.split("## Evaluations\n")[1].split("\n## ")[0]
    assert section.count("book.txt: bits per byte") == 3  # means, differences, each seed
    assert "".join(with_them.split("## Evaluations\n" + section + "\n")) == markdown
    assert "Evaluations" in text

    path = suite_dir.cell("both", 1).evaluation  # scored on another book, as it says
    tree = read_json(path)
    tree["parts"][0]["asked"] = "0" * 64
    write_json(path, tree)
    results, text, _ = report(suite_dir, suite)
    assert results["evaluations"][0]["values"]["both"] == [None, None]
    assert "evaluation on book.txt: both/seed-1 had another version of it" in text
    for run in (suite_dir.cell("baseline", 1), suite_dir.cell("both", 1)):  # scores of other weights are not shown
        write_json(run.manifest, read_json(run.manifest) | {"final_weights_sha256": "1" * 64})
    path.write_text("{")  # and what cannot be read counts as missing
    results, *_ = report(suite_dir, suite)
    assert {row["key"].split("/")[0] for row in results["evaluations"]} == {"file"}
    assert results["evaluations"][0]["values"]["baseline"][0] is None


def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, book = str(folder / "out"), folder / "book.txt"
    (folder / "other").mkdir()
    (folder / "other/book.txt").write_text("x")
    (folder / "empty.txt").write_text("")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe")
    for words, expected in (
        (["--files", str(book), str(folder / "other/book.txt")], "two files have the same name"),
        (["--files", str(folder / "none.txt")], "none.txt: cannot be read (No such file or directory)"),
        (["--files", str(folder / "empty.txt")], "empty.txt: is empty"),
        (["--files", str(folder / "bytes.txt")], "cannot be read as UTF-8 text"),
        (["--limit", "0"], "--limit: "),
        ([], "nothing is asked for; give --tasks, --files or --distributions"),
    ):
        assert main(["eval", out, *words]) == 2
        assert expected in " ".join(capsys.readouterr().err.split()), words
    assert not list((folder / "out").glob("runs/*/*/evaluation.json"))
    monkeypatch.setattr("replication.errors.find_spec", lambda name: None)
    assert main(["eval", out, "--tasks", "lambada_openai"]) == 2
    assert "the package lm_eval is missing; launch/install.sh eval" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- verify


def test_checkpoints_validated_again_are_what_the_journal_says_to_the_bit(folder: Path, capsys) -> None:
    suite_dir = SuiteDir(folder / "out")
    assert main(["verify", str(suite_dir.root), "--cells", "3", "--seed", "7"]) == 0
    said = capsys.readouterr().out
    assert said.count("holds, every bit") == 3 and "all are as recorded" in said
    assert all(name in said for name in CELLS)
    assert main(["verify", str(suite_dir.root), "--cells", "4"]) == 2
    assert "has 3 validated checkpoints; ask for fewer" in capsys.readouterr().err


def test_an_edited_loss_and_other_weights_do_not_pass(folder: Path, capsys) -> None:
    suite_dir = SuiteDir(folder / "out")
    edited, swapped = suite_dir.cell("both", 1), suite_dir.cell("baseline", 2)
    lines = edited.metrics.read_text().splitlines(keepends=True)
    i = next(i for i, line in enumerate(lines) if '"val/loss_nats"' in line)
    value = json.loads(lines[i])["val/loss_nats"]
    lines[i] = lines[i].replace(str(value), str(value - 1e-3))
    edited.metrics.write_text("".join(lines))
    shutil.copy(edited.checkpoint_folders()[-1] / "weights.pt", swapped.checkpoint_folders()[-1] / "weights.pt")
    assert main(["verify", str(suite_dir.root), "--cells", "3"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "+0.001" in said and "2 checkpoints of 3 not as recorded" in said
    assert "weights are not those of the checkpoint's COMPLETE" in said
    assert main(["verify", str(suite_dir.root), "--cells", "3", "--tolerance", "0.01"]) == 1, "weights have none"
    assert "1 checkpoint of 3 not as recorded" in capsys.readouterr().out


def test_another_machine_is_compared_within_the_tolerance_of_its_precision(folder: Path, capsys) -> None:
    suite_dir = SuiteDir(folder / "out")
    for _, _, run in suite_dir.cells():
        if run.manifest.is_file():
            manifest = read_json(run.manifest)
            for start in manifest["starts"]:
                start["machine"]["device"] = "another CPU"
            write_json(run.manifest, manifest)
    assert main(["verify", str(suite_dir.root), "--cells", "1"]) == 0
    assert "holds, within 0.0001" in capsys.readouterr().out


def test_a_checkpoint_is_compared_as_the_start_that_validated_it_allows(folder: Path) -> None:
    run = SuiteDir(folder / "out").cell("baseline", 1)
    config, manifest = load_run([run.config]), read_manifest(run)
    (here,) = manifest.starts
    elsewhere = replace(here, step=0, machine={**here.machine, "device": "another CPU"})
    moved = replace(manifest, starts=(elsewhere, replace(here, step=2)))
    assert [_tolerance(config, moved, step) for step in (1, 2, 3)] == [1e-4, 1e-4, 0.0]
