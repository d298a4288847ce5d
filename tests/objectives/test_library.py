"""Gains in other loops than ours: bit for bit our own training on our own model; in fp64 a naive restatement on
transformers' models; under Trainer, Lightning, accelerate, DDP and FSDP2 the same as in a plain loop."""

from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from host_sync import NoHostSync
from memory_store import MemoryStore
from paths import CHECKOUT
from slow_reference import slow_gain, slow_scales
from training_setup import fit, identical, small_config, weights

import replication
from replication import Gains
from replication.config import LayerGainConfig, TokenGainConfig
from replication.data.module import TrainingBatches
from replication.errors import UserError
from replication.model.transformer import Transformer, initialise
from replication.training.module import LanguageModel
from replication.training.optimizers import build_optimizer, learning_rate_factor

pytest.importorskip("transformers")
from gains_models import BLOCKS, masked, plain_loop, random_tokens, small_model

BOTH = {"token": {}, "layer": {}}
ARMS = {"token_gain": {"token": {}}, "layer_gain": {"layer": {}}, "both": BOTH}


def gains_of(model, **options) -> Gains:
    return Gains(model.model.layers, **(BOTH | options))


# ---------------------------------------------------------------- our own model: bit for bit our own training


def loop_on_our_model(config, store, arm):
    """Gradients before clipping of each step, and the weights at the end."""
    t = config.training
    model = Transformer(config.model)
    initialise(model, config.effective_weights_seed)
    gains = Gains("blocks", model, group_sequences=2, label_smoothing=t.label_smoothing, **ARMS[arm])
    optimizer, gradients = build_optimizer(t, model), []
    whole = replace(config, cluster=replace(config.cluster, micro_batch_sequences=None))
    for k in range(t.steps):
        for group in optimizer.param_groups:
            group["lr"] = t.learning_rate * learning_rate_factor(t, k)
        micro_batches = TrainingBatches(whole, store)[k].tokens_BS.long().split(config.micro_batch_sequences)
        for tokens in micro_batches:
            out = model(tokens[:, :-1], n_groups=len(tokens) // 2)
            extra = config.model.aux_coef * out.aux_G
            loss = gains.loss(model.logits(out.hidden_BTD), tokens[:, 1:], shift=False, extra=extra)
            (loss / len(micro_batches)).backward()
        gains.scale()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return gradients, model.state_dict(), gains


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("micro", [8, 2])
def test_a_plain_loop_is_bit_for_bit_our_own_training(tmp_path, monkeypatch, arm, micro):
    gradients = []
    clip = LanguageModel.configure_gradient_clipping

    def spied(self, *args, **kwargs):
        gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
        clip(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "configure_gradient_clipping", spied)
    config = small_config(arm, "--training.steps=3", f"--cluster.micro_batch_sequences={micro}")
    store = MemoryStore(blocks=(400, 300))  # no padded block among these steps
    trained = weights(fit(config, tmp_path, store))
    ours, final, gains = loop_on_our_model(config, store, arm)
    assert len(ours) == len(gradients) == 3
    assert all(identical(a, b) for a, b in zip(ours, gradients, strict=True))
    assert identical(final, trained)
    assert (set(gains._scale_L.tolist()) != {1.0}) and (gains.layer.enabled == (arm != "token_gain"))


# ---------------------------------------------------------------- transformers' models: a naive restatement in fp64


def naive_steps(kind, steps, size, token, layer, smoothing, rate):
    """SGD with both interventions, one group of sequences at a time, one token at a time."""
    model = small_model(kind).double()
    blocks = list(model.get_submodule(BLOCKS[kind]))
    for micro_batches in steps:
        objectives, divergences = [], []
        for group in torch.cat(micro_batches).split(size):
            seen = []
            hooks = [b.register_forward_hook(lambda _m, a, out, s=seen: s.append((a[0].detach(), out))) for b in blocks]
            out = model(group)
            for hook in hooks:
                hook.remove()
            ys = [y[0] if isinstance(y, tuple) else y for _, y in seen]
            divergences.append([float((y - x).norm() / (x.norm() + 1e-8)) for (x, _), y in zip(seen, ys, strict=True)])
            losses, plain, labels = [], [], masked(torch.cat(micro_batches))
            row = len(objectives) * size
            for b, t in ((b, t) for b in range(size) for t in range(group.shape[1] - 1)):
                target = labels[row + b, t + 1]
                if target != -100:
                    log_p = F.log_softmax(out.logits[b, t], 0)
                    plain.append(float(-log_p[target].detach()))
                    losses.append(-(1 - smoothing) * log_p[target] - smoothing * log_p.mean())
            _, gain = slow_gain(token, [float(x.detach()) for x in losses], plain)
            objectives.append(sum(g * x for g, x in zip(gain, losses, strict=True)) / len(losses))
        (sum(objectives) / len(objectives)).backward()
        mean = [sum(column) / len(column) for column in zip(*divergences, strict=True)]
        scales = dict(zip(blocks, slow_scales(layer, mean), strict=True))
        for block, scale in scales.items():
            for p in block.parameters():
                p.grad *= scale
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
                p.grad = None
    return model.state_dict(), float(objectives[-1].detach()), list(scales.values())


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_epoch_equals_a_naive_restatement_in_fp64(kind, size, smoothing):
    tokens = random_tokens(24).split(4)
    steps = [list(tokens[i : i + 2]) for i in range(0, 6, 2)]
    token, layer = {"s": 0.7, "c_max": 2.0}, {"t": 0.8, "exclude_blocks": [1]}
    configs = TokenGainConfig(s=0.7, c_max=2.0), LayerGainConfig(t=0.8, exclude_blocks=(1,))
    naive, objective, scales = naive_steps(kind, steps, size, *configs, smoothing, rate=0.1)
    model = small_model(kind).double()
    gains = Gains(BLOCKS[kind], model, group_sequences=size, token=token, layer=layer, label_smoothing=smoothing)
    plain_loop(model, gains, steps, clip=float("inf"))
    fast = model.state_dict()
    assert all(torch.allclose(fast[name], naive[name], rtol=1e-9, atol=1e-12) for name in naive)
    metrics = gains.metrics()
    assert [metrics[f"scale/block_{i:02d}"] for i in range(3)] == pytest.approx(scales, rel=1e-6)
    assert scales[1] == 1.0 != scales[0]
    assert objective != pytest.approx(metrics["train/loss_nats"], rel=1e-3)


def test_without_interventions_the_loss_is_the_models_own():
    model, tokens = small_model(), random_tokens(4)
    labels = masked(tokens)
    gains = Gains(model.model.layers, group_sequences=None)
    out = model(tokens, labels=labels)
    assert torch.allclose(gains.loss(out.logits, labels), out.loss, rtol=1e-6)
    before = [p.grad for p in model.parameters()]
    gains.scale()
    assert [p.grad for p in model.parameters()] == before


def test_in_eval_mode_the_loss_is_plain_and_batches_need_no_whole_groups():
    model, tokens = small_model(), random_tokens(3)
    gains = gains_of(model)
    model.eval()
    out = model(tokens, labels=masked(tokens))
    assert torch.allclose(gains.loss(out.logits, masked(tokens)), out.loss, rtol=1e-6)
    with pytest.raises(UserError, match=r"no loss\(\) in training mode"):
        gains.scale()


def test_a_group_without_labels_leaves_the_divisor():
    model, tokens = small_model(), random_tokens(4)
    labels = tokens.clone()
    labels[2:] = -100
    gains = gains_of(model)
    half = gains.loss(model(tokens).logits, labels, extra=torch.tensor([3.0, 100.0]))
    alone = gains.loss(model(tokens[:2]).logits, labels[:2], extra=3.0)
    assert float(half.detach()) == pytest.approx(float(alone.detach()), rel=1e-6)
    divided = gains.loss(model(tokens).logits, labels, divisor=2)
    assert float(divided.detach()) == pytest.approx((float(alone.detach()) - 3.0) / 2, rel=1e-6)


@pytest.mark.parametrize("how", ["checkpointed", "checkpointed_reentrant", "compiled"])
def test_blocks_that_are_run_another_way_train_alike(how):
    steps = [list(random_tokens(8).split(4))] * 2
    plain = small_model()
    expected = plain_loop(plain, gains_of(plain), steps, clip=1.0)
    model = small_model()
    gains = gains_of(model)
    if how == "compiled":
        model.compile(backend="eager")
    else:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": how == "checkpointed_reentrant"})
    assert identical(plain_loop(model, gains, steps, clip=1.0), expected)


def test_nothing_is_read_from_the_device_until_metrics_are_asked_for():
    model, tokens = small_model(), random_tokens(4)
    gains = gains_of(model)
    logits = model(tokens).logits
    with NoHostSync():
        gains.loss(logits, tokens).backward()
        gains.scale()
    metrics = gains.metrics()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert metrics["train/loss_nats"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert metrics["train/objective"] > metrics["train/loss_nats"]
    assert {"gain/mean", "gain/share_at_min", "gain/share_at_max", "divergence/block_02", "scale/block_00"} <= set(
        metrics
    )
    assert 0 < metrics["gain/share_at_min"] < 1


MISTAKES = {
    "no_path": (lambda m: Gains("transformer.h", m), r"no 'transformer.h'; its lists are model.layers"),
    "no_model": (lambda m: Gains("model.layers"), r"give model= too"),
    "no_blocks": (lambda m: Gains([]), r"residual blocks"),
    "unknown": (lambda m: gains_of(m, token={"c_maxx": 1}), r"Gains: token: c_maxx: no such key; did you mean c_max"),
    "wrong_type": (lambda m: gains_of(m, layer={"t": "much"}), r"Gains: layer: t: must be a number"),
    "clamps": (lambda m: gains_of(m, token={"c_min": 9.0}), r"token_gain.c_min: 9.0 exceeds"),
    "excluded": (lambda m: gains_of(m, layer={"exclude_blocks": [3]}), r"\[3\] are not blocks 0..2"),
    "micro_batch": (lambda m: gains_of(m, layer={"apply": "micro_batch"}), r"apply: micro_batch"),
    "plugin": (lambda m: gains_of(m, token={"function": "mine"}), r"a plugin acts only under `replicate`"),
    "smoothing": (lambda m: gains_of(m, label_smoothing=1.0), r"label_smoothing lies"),
    "no_whole_groups": (lambda m: (gains_of(m), m(random_tokens(3))), r"3 sequences does not hold whole groups"),
    "other_labels": (lambda m: gains_of(m).loss(m(random_tokens(4)).logits[:2], random_tokens(2)), r"3 of 3 blocks"),
    "no_forward": (lambda m: gains_of(m).loss(torch.zeros(2, 10, 40), random_tokens(2)), r"after each forward pass"),
    "no_metrics": (lambda m: gains_of(m).metrics(), r"no step has ended"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_with_the_remedy(name):
    act, words = MISTAKES[name]
    with pytest.raises(UserError, match=words) as found:
        act(small_model())
    assert "\n" not in str(found.value)


def test_scale_before_backward_is_refused():
    model, tokens = small_model(), random_tokens(4)
    gains = gains_of(model)
    gains.loss(model(tokens).logits, tokens)
    with pytest.raises(UserError, match="no block has a gradient"):
        gains.scale()


def test_removed_hooks_see_nothing():
    model = small_model()
    gains = gains_of(model)
    gains.remove()
    model(random_tokens(3))
    assert gains._divergences.seen == [None] * 3


def test_names_are_loaded_when_asked_for():
    assert {"Gains", "GainsTrainer", "GainsCallback"} < set(replication.__all__)
    with pytest.raises(ImportError):
        from replication import Losses  # noqa: F401
    assert Gains.__module__ == "replication.objectives.library"  # test_architecture.py: and without torch until then


# ---------------------------------------------------------------- other people's loops

STEPS = [list(random_tokens(24, seed=k).split(4)[:2]) for k in range(2)] + [list(random_tokens(4, seed=5).split(4))]
"""Two steps of two micro-batches, and the epoch's last, of one."""
CLIPS = [0.5, 1e9]
"""One that binds, so that a scale after it would show; one that does not, so that a wrong divisor would."""


@pytest.fixture
def fresh_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def expected_weights(clip, steps=STEPS):
    model = small_model()
    return plain_loop(model, gains_of(model), steps, clip)


def test_the_clip_binds_and_both_interventions_matter():
    bound, free = (expected_weights(clip) for clip in CLIPS)
    assert not identical(bound, free)
    for off in ({"token": None}, {"layer": None}):
        model = small_model()
        assert not identical(plain_loop(model, gains_of(model, **off), STEPS, 0.5), bound)


@pytest.mark.parametrize("clip", CLIPS)
def test_transformers_trainer(tmp_path, fresh_accelerate, clip):
    """The model takes num_items_in_batch, where the Trainer by itself would no longer divide by the accumulation."""
    from transformers import TrainingArguments

    from replication import GainsTrainer

    class InOrder(GainsTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = small_model()
    rows = [row for step in STEPS for tokens in step for row in zip(tokens, masked(tokens), strict=True)]
    data = [{"input_ids": tokens, "labels": labels} for tokens, labels in rows]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
        max_grad_norm=clip, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    gains = gains_of(model)
    trainer = InOrder(
        model, args, train_dataset=data, eval_dataset=data[:3], optimizers=(optimizer, schedule), gains=gains
    )
    assert trainer.train().global_step == 3
    assert identical({n: p.detach() for n, p in model.named_parameters()}, expected_weights(clip))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["train/objective"], rel=1e-3)
    assert lines[-1]["scale/block_00"] == pytest.approx(gains.metrics()["scale/block_00"])
    told = trainer.evaluate()["eval_loss"]  # and the model is in eval mode
    assert told == pytest.approx(float(model(**torch.utils.data.default_collate(data[:3])).loss.detach()), rel=1e-5)


def test_a_mixtures_balance_is_added_unweighted(tmp_path, fresh_accelerate):
    from transformers import TrainingArguments

    from replication import GainsTrainer

    model, tokens = small_model("qwen3_moe"), random_tokens(4)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = GainsTrainer(model, args, gains=gains_of(model, token=None, group_sequences=None))
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    out = model(tokens, labels=tokens)
    assert float(out.aux_loss.detach()) > 0
    assert float(loss.detach()) == pytest.approx(float(out.loss.detach()), rel=1e-6)


@pytest.mark.parametrize("way", ["compute_loss_func", "label_smoothing_factor"])
def test_a_second_loss_is_refused(tmp_path, fresh_accelerate, way):
    from transformers import TrainingArguments

    from replication import GainsTrainer

    model, smoothing = small_model(), 0.1 if way == "label_smoothing_factor" else 0.0
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=smoothing)
    func = {"compute_loss_func": lambda *a, **k: 0.0} if way == "compute_loss_func" else {}
    with pytest.raises(UserError, match=way if way == "compute_loss_func" else "label_smoothing to Gains"):
        GainsTrainer(model, args, gains=gains_of(model), **func)


@pytest.mark.parametrize("clip", CLIPS)
def test_anyones_lightning_module(tmp_path, clip):
    from lightning import LightningModule, Trainer

    from replication import GainsCallback

    class Anyones(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small_model()
            self.gains = gains_of(self.net)

        def training_step(self, tokens, index):
            return self.gains.loss(self.net(tokens).logits, masked(tokens))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, steps = Anyones(), STEPS[:2]
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=clip,
        callbacks=[GainsCallback(module.gains)], log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([row for step in steps for tokens in step for row in tokens], batch_size=4)
    trainer.fit(module, loader)
    assert identical({n: p.detach() for n, p in module.net.named_parameters()}, expected_weights(clip, steps))
    assert float(trainer.logged_metrics["scale/block_00"]) == pytest.approx(module.gains.metrics()["scale/block_00"])


@pytest.mark.parametrize("clip", CLIPS)
def test_accelerate(fresh_accelerate, clip):
    """Its backward divides by the accumulation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_model()
    gains, steps = gains_of(model), STEPS[:2]
    rows = [row for step in steps for tokens in step for row in tokens]
    prepared = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), torch.utils.data.DataLoader(rows, batch_size=4)
    )
    wrapped, optimizer, loader = prepared
    for tokens in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(gains.loss(wrapped(tokens).logits, masked(tokens)))
            if accelerator.sync_gradients:
                gains.scale()
                accelerator.clip_grad_norm_(wrapped.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    assert identical({n: p.detach() for n, p in model.named_parameters()}, expected_weights(clip, steps))


# ---------------------------------------------------------------- several processes: tests/support/gains_ranks.py


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder, script = tmp_path_factory.mktemp("ranks"), CHECKOUT / "tests" / "support" / "gains_ranks.py"
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["step_mean", "last_group", "fsdp2"])
def test_two_processes_train_as_one(of_two_processes, way):
    """DDP, and FSDP2 with half of each gradient: one process takes the same eight groups a step."""
    model = small_model().double()
    gains = gains_of(model, layer={"divergence": "last_group" if way == "last_group" else "step_mean"})
    steps = [list(random_tokens(16, seed=k).split(8)) for k in range(2)]
    expected = plain_loop(model, gains, steps, clip=0.5)
    found = of_two_processes[way]
    assert all(torch.allclose(found[name], expected[name], rtol=1e-10, atol=1e-13) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_zero_is_refused_by_name(of_two_processes, stage):
    assert of_two_processes[f"zero{stage}"].startswith("Gains.scale: DeepSpeed ZeRO keeps gradients out of reach")


# ---------------------------------------------------------------- the examples


@pytest.mark.parametrize("name", ["plain_loop", "hugging_face_trainer", "lightning_module"])
def test_examples_run_and_are_short(tmp_path, monkeypatch, capfd, fresh_accelerate, name):
    path = CHECKOUT / "configs" / "examples" / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path), run_name="__main__")
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
    gains = names["gains"] if "gains" in names else names["model"].gains
    assert all(gains.metrics()[f"scale/block_{i:02d}"] != 1.0 for i in range(3))
    code = path.read_text(encoding="utf-8").split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
