"""`replicate prepare --show-batch K`: the global batch of a step, decoded."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from replication.config import RunConfig
from replication.data.blocks import PAD
from replication.data.order import MixtureOrder
from replication.data.store import TokenStore
from replication.errors import UserError

SHOWN_CHARACTERS = 72


def show_batch(config: RunConfig, data_dir: Path, step: int, console: Console, full: bool = False) -> None:
    """Print each sequence of a step's global batch: position in the batch, source, block, and text.

    Args:
        config: seed, weights and batch size are taken from it.
        data_dir: a complete preparation.
        step: 0 is the first.
        console: where to print.
        full: whole sequences; otherwise the beginning and the end of each, on one line.

    Raises:
        UserError: a negative step, or data that do not fit the config (vocabulary sizes are not compared).
    """
    if step < 0:
        raise UserError(f"--show-batch: step {step} must be 0 (the first) or more")
    store = TokenStore.open(data_dir)
    store.check_data(config)
    weights = [source.weight for source in config.data.sources]
    order = MixtureOrder(store.sizes("train"), weights, config.effective_data_seed)
    source_ids, indices = order.global_batch(step, config.batch_sequences)
    tokens = store.read("train", source_ids, indices)
    tokenizer = store.tokenizer()
    console.print(
        f"step {step}, data seed {config.effective_data_seed}: {len(indices)} sequences of {store.block_size_tokens} "
        f"predicted tokens, data hash {store.hash[:12]}",
        highlight=False,
        soft_wrap=True,
    )
    for position, (source, index, block) in enumerate(zip(source_ids, indices, tokens, strict=True)):
        text = repr(tokenizer.decode(block[block != PAD], skip_special_tokens=False))
        if not full and len(text) > SHOWN_CHARACTERS:
            half = SHOWN_CHARACTERS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        line = f"{position:5d}  {store.source_names[source]:<16s} block {index:<8d} {text}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
