"""`replicate bench`: it times what it says it times, and its figures are computed as it says. Nothing here is timed."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import platform
import resource
import threading
import weakref

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from synthetic_runs import edit_manifest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from trained_suite import write_trained_suite
from training_setup import MODEL, small_config

from replication.bench import noise
from replication.bench.blocks import Block, Elapsed, Interleaved, Ratio, interleave, running_order
from replication.bench.head import CountAllocations, HeadSize, bench_head
from replication.bench.loops import PlainLoop, Turns, prepare
from replication.bench.noise import CUTS, cuts
from replication.bench.peers import PLAIN, NaiveLoop, bench_peers, missing
from replication.bench.product import ARMS, DATA, OPTIMIZER, REST, Product, configure, take_breakdown
from replication.bench.rates import bench_rates
from replication.bench.scaling import ScalingBench, ScalingRow, at_ranks, bench_scaling
from replication.bench.step import BF16_PEAKS, arithmetic_peak, bench_step
from replication.cli.bench import bench as bench_cli
from replication.cli.main import main
from replication.config import ModelConfig, load_run, load_suite, scientific_hash
from replication.errors import UserError
from replication.grid.cell import run_cell
from replication.grid.local import Outcome
from replication.model.cost import H100
from replication.model.size import active_matrix_parameters, flops_per_token
from replication.objectives.callbacks import LayerGain, TokenGain
from replication.report.report import collect
from replication.runs.files import read_json
from replication.runs.layout import SuiteDir
from replication.runs.records import to_json

CPU = torch.device("cpu")
DENSE = dataclasses.replace(MODEL, feed_forward="dense")
PUBLISHED = ModelConfig(vocab_size=100_031, n_blocks=20, d_model=1024, n_heads=16, n_kv_heads=8, d_head=64, d_ff=3072)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


def printed(*tables) -> str:
    """The tables as an 80-column terminal shows them; nothing may be cut."""
    console = quiet()
    for table in tables:
        console.print(table)
    text = console.file.getvalue()
    assert "…" not in text, text
    return text


# ---------------------------------------------------------------- ratios


def test_each_block_is_paired_with_the_reference_blocks_beside_it():
    names = ["ref", "a", "ref", "b", "ref", "a", "ref"]
    seconds = [1.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0]
    blocks = tuple(Block(n, s, 2 * s) for n, s in zip(names, seconds, strict=True))
    bench = Interleaved("ref", 120, blocks)
    assert bench.ratios("a") == [1.5, 1.0] and bench.ratios("b") == [1.0]
    assert bench.ratios("a", "cpu_seconds") == [1.5, 1.0]
    assert bench.time_over_reference["a"].median == 1.25
    assert bench.reference_over("a").median == pytest.approx((2 / 3 + 1) / 2)
    assert bench.tokens_per_second["a"] == 60
    json.dumps(to_json(bench), allow_nan=False)


def test_the_upper_bound_is_the_order_statistic():
    ratio = Ratio.of([1 + i / 100 for i in range(24)])
    assert ratio.upper_bound_95 == pytest.approx(1.16)  # the 17th of 24: P(Binomial(24, 1/2) >= 17) = 0.032 < 0.05
    assert Ratio.of([1.0, 1.1]).upper_bound_95 is None


def test_the_reference_stands_between_any_two_and_everybody_goes_first_in_turn():
    order = running_order("ref", ["a", "b"], 2)
    assert order == ["ref", "a", "ref", "b", "ref", "b", "ref", "a", "ref"]
    ran: list[str] = []

    def run(name):
        ran.append(name)
        return Elapsed(float(len(ran)), 1.0)

    bench = interleave("ref", ["a", "b"], 2, 1, run, Progress(console=quiet()))
    assert ran == ["ref", "a", "b", *order], "one block of each warms up"
    assert [b.name for b in bench.blocks] == order and bench.blocks[0].seconds == 4.0


# ---------------------------------------------------------------- arithmetic


def test_flops_of_the_published_model():
    assert active_matrix_parameters(PUBLISHED) == pytest.approx(731.7e6, rel=1e-4)
    assert flops_per_token(PUBLISHED, 2048, causal=False) == pytest.approx(4.89e9, rel=1e-3)
    assert flops_per_token(PUBLISHED, 2048, causal=True) == pytest.approx(4.64e9, rel=1e-3)


def test_flops_agree_with_torch_s_own_counter():
    """Forward and backward; the plain attention kernel multiplies all of the matrix, masked or not."""
    model = dataclasses.replace(DENSE, vocab_size=128)
    config = configure(small_config("baseline", "--cluster.attention=math", model=model), 2, "baseline")
    loop = PlainLoop(config, CPU, 1)
    batch = next(loop.loader)
    with FlopCounterMode(display=False) as counter:
        loop.objective(batch).backward()
    tokens = batch.tokens_BS.shape[0] * config.data.block_size_tokens
    assert counter.get_total_flops() == pytest.approx(tokens * flops_per_token(model, 16, causal=False))


def test_the_peak_of_a_known_gpu_is_the_published_one(monkeypatch):
    for name, known in {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H200": "H200",
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak = arithmetic_peak(torch.device("cuda"), "bf16-mixed")
        assert peak.flops_per_second == BF16_PEAKS[known] and known in peak.source


# ---------------------------------------------------------------- taking turns


def test_exactly_one_training_runs_at_a_time_and_errors_come_home():
    log: list[str] = []

    def train(name):
        def run(pause):
            log.append(f"{name} set up")
            for i in range(2):
                pause()
                log.append(f"{name} {i}")
            pause()
            raise ValueError(name)

        return run

    before = threading.active_count()
    a, b = Turns(train("a")), Turns(train("b"))
    a.block()
    b.block()
    a.block(lambda: log.append("instead"))
    a.block()
    assert log == ["a set up", "b set up", "a 0", "b 0", "instead", "a 1"]
    with pytest.raises(ValueError, match="a"):
        a.block()
    a.close()
    b.close()
    assert threading.active_count() == before and log[-1] == "a 1", "a closed one does nothing more"


# ---------------------------------------------------------------- bench step


@pytest.mark.parametrize("micro", [8, 2])
def test_the_plain_loop_is_the_same_step(micro):
    """Both end on the same weights, bit for bit, so that a ratio compares like with like."""
    config = configure(small_config("both", f"--cluster.micro_batch_sequences={micro}"), 2, "baseline")
    product, plain = Product(config, 2), PlainLoop(config, CPU, 2)
    for _ in range(2):
        product.block()
        plain.block()
    ends = product.module.model.state_dict()
    assert product.trainer.global_step == 4
    assert all(torch.equal(ends[name], weight) for name, weight in plain.model.state_dict().items())
    product.close()


@pytest.mark.parametrize(("apply", "arms"), [("step", tuple(ARMS)), ("micro_batch", ("baseline", "layer_gain"))])
def test_an_arm_that_is_switched_to_trains_as_if_it_had_been_alone(apply, arms):
    """Callbacks that it lacks are out, and those that were taken out before act again."""
    ends = set()
    for arm in arms:
        weights = []
        for start in (arm, "both"):
            config = configure(small_config("both", f"--layer_gain.apply={apply}"), 2, start)
            product = Product(config, 2)
            if start != arm:
                product.switch("baseline")
                product.switch(arm)
            product.block()
            assert {type(c) for c in product.trainer.callbacks} & {TokenGain, LayerGain} == set(ARMS[arm])
            weights.append(product.module.model.blocks[0].attention.q.weight.detach().clone())
            product.close()
        assert torch.equal(*weights)
        ends.add(float(weights[0].sum()))
    assert len(ends) == len(arms), "the arms differ"


def test_bench_step_measures_every_arm_and_every_part():
    config = configure(small_config(), 2)
    bench = bench_step(config, 2, 1, quiet())
    names = [block.name for block in bench.interleaved.blocks]
    assert names[::2] == ["baseline"] * 5
    assert sorted(names[1::2]) == ["both", "layer_gain", "plain loop", "token_gain"]
    assert all(bench.peak_bytes.values())
    assert set(bench.breakdown.milliseconds) == {"attention", "experts", "head", OPTIMIZER, DATA, REST}
    assert all(ms > 0 for ms in bench.breakdown.milliseconds.values())
    text = printed(*bench.tables())
    assert "of 5 pairs on" in text and "all of the attention" in " ".join(text.split())
    json.dumps(bench.to_dict(), allow_nan=False)


def test_a_breakdown_leaves_the_model_as_it_was():
    config = configure(small_config("both", "--cluster.activation_checkpointing=true"), 2)
    product = Product(config, 2)
    before = {name: dict(m.__dict__) for name, m in product.module.named_modules()}
    take_breakdown(product, 1)
    for name, module in product.module.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
    product.close()


def test_a_closed_training_frees_its_model():
    config = configure(small_config(), 2)
    product = Product(config, 2)
    product.block()
    weight = weakref.ref(product.module.model)
    product.close()
    gc.collect()
    assert weight() is None


# ---------------------------------------------------------------- bench peers


def test_bench_peers_says_what_it_skips():
    config = small_config("baseline", model=DENSE)
    bench = bench_peers(config, 2, 1, quiet())
    assert bench.interleaved.reference == PLAIN
    assert {"product", "both, product", "both, naive"} <= set(bench.names)
    for name in ("HF Trainer", "LitGPT"):
        assert (name in bench.names) == (missing(name) is None)
    text = printed(*bench.tables())
    assert f"torch {torch.__version__}" in " ".join(text.split())
    json.dumps(bench.to_dict(), allow_nan=False)


def test_the_naive_way_computes_the_same_update():
    """With the whole micro-batch as its group; otherwise the comparison would be of two different things."""
    flags = ("--training.gain_group_sequences=8", "--training.precision=64-true")
    config = configure(small_config("both", *flags, model=DENSE), 2, "both")
    product = Product(config, 2)
    naive = NaiveLoop(config, CPU, 2)
    product.block()
    naive.block()
    ends = product.module.model.state_dict()
    for name, weight in naive.model.state_dict().items():
        torch.testing.assert_close(weight, ends[name], rtol=1e-9, atol=1e-12, msg=name)
    product.close()


# ---------------------------------------------------------------- bench head


def test_allocations_are_counted_alike_on_real_and_on_fake_tensors():
    def run():
        x = torch.ones(8, 4, requires_grad=True)
        with CountAllocations() as counted:
            y = x @ x.T  # 256 bytes
            z = y.T.exp()  # 256 more; the view is none
            del y
            z.sum().backward()  # exp keeps its result
        return counted.peak

    real = run()
    with FakeTensorMode():
        assert run() == real
    assert 512 <= real <= 512 + 3 * 256 + 2 * 128


def test_the_chunked_head_stays_under_4_gb_at_full_size():
    """At a quarter of the tokens, where all logits take over 4 GB already; REPLICATION_FULL=1: at all of them."""
    n_tokens = 16384 if os.environ.get("REPLICATION_FULL") else 4096
    size = HeadSize(n_tokens, 100_031, 1024, bf16=True, compile=False)
    bench = bench_head(size, CPU, 0, quiet())
    counted = {row.kind: row.counted_bytes for row in bench.rows}
    assert counted["chunked"] < 4e9 < counted["logits"]


def test_bench_head_times_what_fits():
    size = HeadSize(64, 100, 16, bf16=False, compile=False)
    bench = bench_head(size, CPU, 1, quiet())
    logits, chunked, liger = bench.rows
    assert logits.seconds and chunked.seconds
    assert liger.seconds is None and "GPU" in liger.note
    assert "64 tokens x 100 vocabulary" in printed(*bench.tables())
    json.dumps(bench.to_dict(), allow_nan=False)


# ---------------------------------------------------------------- bench scaling


def test_bench_scaling_runs_the_ranks():
    config = small_config("both", "--cluster.strategy=ddp")
    bench = bench_scaling(config, [2], "weak", 2, 1, quiet())
    (row,) = bench.rows
    assert (row.batch_tokens, len(row.seconds)) == (256, 1)
    assert "all share" in " ".join(printed(*bench.tables()).split())
    json.dumps(bench.to_dict(), allow_nan=False)


def test_efficiency_is_per_process():
    rows = tuple(ScalingRow(n, n * 100, 1, 1, 1, (s,)) for n, s in ((1, 1.0), (2, 1.25)))
    assert ScalingBench({}, "weak", rows, small_config()).rows[1].efficiency == pytest.approx(0.8)


def test_strong_scaling_cuts_the_same_batch():
    config = at_ranks(small_config("both", "--cluster.strategy=ddp"), 2, "strong")
    assert (config.training.batch_tokens, config.micro_batch_sequences) == (128, 4)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["step", "--blocks=0"], ("--blocks", "at least 1")),
        (["step", "--block-steps=3"], ("--block-steps", "multiple", "--logging.log_every_steps=3")),
        (["step", "--cluster.strategy=ddp", "--cluster.devices=2"], ("cluster.devices", "bench scaling")),
        (["step", "--cluster.strategy=zero2"], ("cluster.strategy", "choose single")),
        (["peers", "--model.feed_forward=moe"], ("model.feed_forward", "dense")),
        (["peers", "--training.optimizer=sgd"], ("training.optimizer", "AdamW")),
        (["scaling", "--ranks=two"], ("--ranks", "whole number")),
        (["scaling", "--cluster.strategy=single"], ("cluster.strategy", "ddp")),
        (["scaling", "--ranks=3", "--mode=strong"], ("cluster.devices", "divisor")),
        (["head", "--model.vocab_size=3"], ("--model.vocab_size", "bench head --help")),
        (["head", "--repeats=-1"], ("--repeats", "at least 0")),
        (["speed"], ("speed", "--help")),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(capsys, argv, words):
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_several_processes_are_refused():
    with pytest.raises(UserError, match="this times one process, not 2"):
        configure(small_config("baseline", "--cluster.strategy=ddp", "--cluster.devices=2"), 2)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_bench_step_and_head_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    flags = ("--cluster.accelerator=gpu", "--training.precision=bf16-mixed", "--cluster.threads=null")
    bench = bench_step(configure(small_config("both", *flags), 2), 2, 1, quiet())
    assert bench.peak_bytes["kind"] == "allocated on the GPU" and all(bench.peak_bytes.values())
    assert all(ms > 0 for ms in bench.breakdown.milliseconds.values())
    size = HeadSize(4096, 20_000, 256, bf16=True, compile=False)
    rows = {row.kind: row for row in bench_head(size, torch.device("cuda"), 1, quiet()).rows}
    for kind in ("logits", "chunked"):  # kernels may need buffers that no operator returns
        assert rows[kind].measured_bytes == pytest.approx(rows[kind].counted_bytes, rel=0.5)


# ---------------------------------------------------------------- the noise of rounding


def test_cuts_change_no_objective_and_say_what_is_left_out():
    """The tiny batch of 8 sequences in groups of 2: halves and quarters go, twice as many do not."""
    config = small_config("both")
    found = {name: (cut, why) for name, cut, why in cuts(config, CUTS)}
    n = config.micro_batch_sequences
    assert {name for name, (cut, _) in found.items() if cut} >= {f"micro-batch {n // 2}", "head chunked", "again"}
    assert "does not divide" in found[f"micro-batch {2 * n}"][1]
    assert all(scientific_hash(cut) == scientific_hash(config) for cut, _ in found.values() if cut)
    whole = small_config("both", "--training.gain_group_sequences=null")
    assert [why for _, cut, why in cuts(whole, ["micro-batch"]) if cut is None]
    assert not [name for name, cut, _ in cuts(whole, ["micro-batch"]) if cut]  # there it is part of the objective


def test_noise_is_measured_in_the_suites_folder_and_stands_beside_the_margin(tmp_path, monkeypatch, capsys):
    def here(cells, suite_dir, jobs, console):
        run_cell(cells[0].config, suite_dir, quiet())
        return Outcome(complete=list(cells))

    suite_dir = write_trained_suite(tmp_path, seeds=(1,), untrained="both/1")
    suite = load_suite(suite_dir.suite)
    assert "not measured: replicate bench noise DIR measures it" in collect(suite_dir, suite)[1].verdict["noise"][0]
    monkeypatch.setattr(noise, "run_cells", here)
    for _ in range(2):  # the second call finds the runs of the first
        assert main(["bench", "noise", str(suite_dir.root), "--cuts", "micro-batch,again"]) == 0
    rows = read_json(suite_dir.noise)["rows"]
    assert [row["cut"] for row in rows] == ["as it is", "micro-batch 2", "again"]
    assert rows[2]["differences"] == {"final_val_loss": 0.0, "late_val_loss": 0.0}
    assert abs(rows[1]["differences"]["final_val_loss"]) < 1e-4  # two steps in fp32
    line = collect(suite_dir, suite)[1].verdict["noise"][0]
    assert line.endswith("(micro-batch 2, again; baseline/seed-1).") and "beside the margin of 0.02 nats" in line
    edit_manifest(suite_dir.cell("baseline", 1), config_hash="another")
    assert "under another config" in collect(suite_dir, suite)[1].verdict["noise"][0]
    edit_manifest(SuiteDir(suite_dir.root / "noise" / "again").cell("baseline", 1), starts=None, code_hash="beef")
    with pytest.raises(UserError, match=r"ran other code .*beef.* remove .*noise, and measure anew"):
        bench_cli(["noise", str(suite_dir.root), "--cuts", "again"])
    for damaged in ("{", "[]", '{"rows": [{"cut": 1}]}'):
        suite_dir.noise.write_text(damaged)
        assert "not measured" in collect(suite_dir, suite)[1].verdict["noise"][0]
    with pytest.raises(UserError, match="--cuts: no 'heads'; choose of micro-batch, head"):
        bench_cli(["noise", str(suite_dir.root), "--cuts", "heads"])


# ---------------------------------------------------------------- rates


def test_every_block_is_in_the_file_as_it_comes(tmp_path):
    """A call on a lent machine may be cut off."""
    out, seen = tmp_path / "step.json", []

    def run(name: str) -> Elapsed:
        seen.append(read_json(out)["blocks"] if out.exists() else [])
        return Elapsed(1.0, 1.0)

    interleave("a", ["b"], 2, 10, run, Progress(disable=True), keep=out)
    assert [len(blocks) for blocks in seen] == list(range(len(seen)))
    assert read_json(out)["unfinished"] is True and read_json(out)["blocks"][0]["name"] == "a"


def test_rates_are_measured_one_by_one_and_predict_a_step(tmp_path):
    """What this device cannot compute is named, and the others go on; the file tells what was measured so far."""
    flags = ["--model.vocab_size=512", "--data.block_size_tokens=32", "--training.batch_tokens=256"]
    config = load_run(["model/tiny.yaml", "cluster/cpu.yaml", "arms/both.yaml"], flags)
    out = tmp_path / "rates.json"
    found = bench_rates(config, torch.device("cpu"), 1, out, Console(file=io.StringIO()))
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == [row.name for row in found.rows]
    by_name = {row.name: row for row in found.rows}
    assert by_name["attention, as trained"].per_second == found.measured.attention
    grouped = [row.per_second for row in found.rows if row.rate == "grouped"]
    assert found.measured.grouped == sorted(grouped)[1]
    assert found.measured.node_bus == H100.node_bus, "what is not measured stays as assumed"
    assert found.predicted.seconds > found.assumed.seconds
    if not torch.cuda.is_available():
        assert by_name["attention, cudnn"].note and by_name["attention, cudnn"].milliseconds is None
    assert found.tables()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's way with freed memory")
def test_a_step_on_a_cpu_takes_no_new_memory_from_the_system():
    """Counted: else each step of this model is given 10,000 pages again."""
    config = configure(
        load_run(
            ["model/tiny.yaml"],
            ["--cluster.accelerator=cpu", "--model.feed_forward=dense", "--logging.log_every_steps=2"],
        ),
        2,
    )
    prepare(config)
    product, taken = Product(config, 2), []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        product.block()
        taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(taken) < 100, "now and then the heap grows by a piece"
    product.close()
