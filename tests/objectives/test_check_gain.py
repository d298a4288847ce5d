"""The checks of a gain: our own pass them, and each planted fault fails the check that is about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from replication.cli.main import main
from replication.config import LayerGainConfig, TokenGainConfig
from replication.errors import UserError
from replication.objectives.check_gain import CHECKS
from replication.objectives.layer_gain import layer_scales
from replication.objectives.token_gain import token_gain

VARIANTS = get_args(get_type_hints(TokenGainConfig)["variant"])

RIGHT = """
import torch
from replication import gain, scale

@gain
def hard(losses, plain, valid, *, power: float = 2.0, context):
    n = valid.sum(1, keepdim=True).clamp(min=1)
    mean = losses.masked_fill(~valid, 0).sum(1, keepdim=True) / n
    ratio = torch.where(mean > 0, losses / mean, 1.0)
    return 1 + ratio.clamp(0, 3) ** power * context.learning_rate_fraction

@gain(clamp=True)
def noisy(losses, plain, valid, *, width: float = 0.5, context):
    return 1 + width * torch.randn(losses.shape, generator=context.generator, dtype=losses.dtype)

@scale
def deepest(divergence, *, t: float, context):
    return 1 + t * (divergence == divergence.max()).to(divergence.dtype)
"""

WRONG = {
    "gives another result at a second call": "return 1 + torch.rand(losses.shape)",
    "writes to its arguments": "return losses.add_(1).clamp(max=2)",
    "a gradient flows through": "with torch.enable_grad():\n        return losses * 2",
    "where `valid` is false": "return losses / losses.mean(1, keepdim=True).clamp(min=1e-3)",
    "depends on other groups": "return losses - losses[valid].mean()",
    "is not finite where all losses are 0": "return plain / losses",
    "returned torch.float64 [4, 1]": "return losses.mean(1, keepdim=True)",
    "raises ZeroDivisionError": "return losses * (1 / 0)",
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("check", CHECKS["gain"], ids=lambda check: check.__name__)
def test_our_own_gains_pass(check, variant):
    config = replace(TokenGainConfig(), variant=variant)
    assert check(lambda context, *losses: token_gain(config, *losses).after_GN, "gain") == ""


@pytest.mark.parametrize("check", CHECKS["scale"], ids=lambda check: check.__name__)
def test_our_own_scales_pass(check):
    def formula(context, divergence_L):
        return layer_scales(LayerGainConfig(), divergence_L, torch.ones_like(divergence_L, dtype=torch.bool))

    assert check(formula, "scale") == ""


def checked(folder: Path, text: str, *words: str) -> int:
    path = folder / "my_gains.py"
    path.write_text(text)
    return main(["check-gain", str(path), *words])


def test_a_right_plugin_passes_with_a_line_for_each_check(tmp_path, capsys):
    assert checked(tmp_path, RIGHT, "--deepest.t=0.25") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (len(CHECKS["gain"]) + 1) + len(CHECKS["scale"]) + 1
    assert not [line for line in lines if "FAILS" in line]
    assert lines[-1].split() == ["deepest:", "mean", "1.021,", "from", "1", "to", "1.25"]


@pytest.mark.parametrize("fault", WRONG)
def test_a_planted_fault_fails_its_check(tmp_path, capsys, fault):
    text = f"import torch\nfrom replication import gain\n@gain\ndef wrong(losses, plain, valid):\n    {WRONG[fault]}\n"
    assert checked(tmp_path, text) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILS" in line]
    assert any(fault in line for line in failed), failed


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        ("gives another result at a second call", "SEEN.append(1)\n    return divergence * len(SEEN)"),
        ("a gradient flows through", "with torch.enable_grad():\n        return divergence * 2"),
        ("is not finite where all divergences are 0", "return divergence / divergence.mean()"),
    ],
)
def test_a_planted_fault_of_scales_fails_its_check(tmp_path, capsys, fault, body):
    text = f"import torch\nfrom replication import scale\nSEEN = []\n@scale\ndef wrong(divergence):\n    {body}\n"
    assert checked(tmp_path, text) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILS" in line]
    assert len(failed) == 1 and fault in failed[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "deepest: t: is missing, and has no default; deepest of my_gains.py takes t: float"),
        (
            ("--deepest.t=x",),
            "deepest: t: must be a number such as 0.5, not 'x'; deepest of my_gains.py takes t: float",
        ),
        (("--hard.pwoer=1",), "hard: pwoer: no such key; did you mean power?; hard of my_gains.py takes power: float"),
        (("--harder.power=1",), "--harder.power=1: give a parameter as --FUNCTION.PARAMETER=VALUE; functions: hard, "),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, said):
    assert checked(tmp_path, RIGHT, *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:\n", "my_gains.py: this plugin cannot be loaded (SyntaxError: "),
        ("import no_such_thing\n", "cannot be loaded (ModuleNotFoundError: No module named 'no_such_thing'); mend it"),
        ("def f(a):\n    return a\n", "my_gains.py: marks no function; put @gain or @scale"),
        (
            "from replication import gain\n@gain\ndef f(losses):\n    return losses\n",
            "my_gains.py: f: the arguments of a gain are (losses, plain, valid, *, ..., context)",
        ),
        (
            "from __future__ import annotations\nfrom replication import gain\n@gain\n"
            "def f(losses: Tensor, plain, valid):\n    return losses\n",
            "my_gains.py: f: a type cannot be read (name 'Tensor' is not defined); import it",
        ),
        (
            "from replication import scale\n@scale\ndef f(d, *, t=1.0):\n    return d\n",
            "my_gains.py: f: t needs a type, bool, int, float or str, such as `t: float`",
        ),
    ],
)
def test_a_file_that_is_no_plugin_is_one_line(tmp_path, capsys, text, said):
    assert checked(tmp_path, text) == 2
    assert said in capsys.readouterr().err


def test_a_variant_without_its_branch_is_an_error():
    losses = torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
    config = replace(TokenGainConfig(), variant="not_written_yet")  # type: ignore[arg-type]
    with pytest.raises((AssertionError, UserError), match="not_written_yet"):
        token_gain(config, *losses)
