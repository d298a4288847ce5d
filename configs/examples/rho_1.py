"""Selective language modelling, Rho-1 (Lin et al. 2024, NeurIPS, arXiv 2404.07965): train on the tokens worth learning.

    excess_i = l_i - l_i of a reference model;   loss = mean of l_i over the `share` of tokens of largest excess

The reference is a cell that was trained before, on what one would rather be good at. Losses are unsmoothed ones,
the choice is made within each gain group, and the gain is n / k for those k of n tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from replication import gain
from replication.config import load_run
from replication.errors import UserError
from replication.model.transformer import Transformer, unset_transformer, weights_sha256
from replication.runs.layout import RunDir
from replication.training.checkpoint_files import load_weights, newest_checkpoint


@functools.cache
def reference_model(cell: str, sha256: str, device: str) -> Transformer:
    """The last weights of a cell's folder; UserError where their hash is another one."""
    run = RunDir(Path(cell))
    checkpoint, _ = newest_checkpoint(run)
    weights = load_weights(checkpoint) if checkpoint else {}
    if not weights or (found := weights_sha256(weights)) != sha256:
        there = f"weights of SHA-256 {found}, not {sha256 or 'none'}" if weights else "no weights"
        raise UserError(f"token_gain.parameters: reference {cell} has {there}; set sha256 to those that are meant")
    model = unset_transformer(load_run([run.config]).model)
    model.load_state_dict(weights)
    return model.eval().to(device)


@gain
def rho_1(losses, plain, valid, *, inputs, targets, reference: str, sha256: str, share: float = 0.6):
    """n / k for the tokens chosen, 0 for the others; sha256 is the reference's final_weights_sha256."""
    model = reference_model(reference, sha256, str(losses.device))
    with torch.no_grad():
        hidden = model(inputs.flatten(0, 1)).hidden_BTD
        of_reference = model.losses(hidden, targets.flatten(0, 1), 0.0).losses.plain_N.view_as(plain)
    excess = (plain - of_reference).masked_fill(~valid, float("-inf"))
    n = valid.sum(1, keepdim=True).to(losses.dtype)
    k = (share * n).ceil()
    place = excess.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.where(place < k, n / k.clamp(min=1), 0.0)
