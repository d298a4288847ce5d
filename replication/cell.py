"""One cell from nothing to COMPLETE: train, then generate. The only place that knows this order."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from replication.config import RunConfig, refuse_other_config, scientific_hash
from replication.errors import UserError, is_lost_peer
from replication.preemption import Preempted
from replication.rundir import RunDir, SuiteDir, is_trained, read_json, record_failure, write_json

if TYPE_CHECKING:
    from replication.data.store import TokenStore


Stage = Literal["all", "train", "generate"]


def run_cell(config: RunConfig, suite_dir: SuiteDir, console: Console, stage: Stage = "all") -> None:
    """Run one cell of an output folder to the end; a complete one is left alone, an interrupted one goes on.

    A failure is recorded in the cell's FAILED file, with its first line, before it is raised.

    Args:
        config: the cell's.
        suite_dir: the output folder.
        console: for progress.
        stage: train ends before the completions are generated; generate, in one process of a trained cell, makes
            them: so that a run on many GPUs does not hold them for what one does.

    Raises:
        UserError: see training.train; also where another process runs this cell, or an untrained one is to generate.
        Preempted: the run was told to stop, and did.
    """
    from replication.data.store import TokenStore
    from replication.preference.generate import generate
    from replication.training.ranks import launched_rank, leave_group
    from replication.training.train import train

    run = suite_dir.cell(config.arm, config.seed)
    first = launched_rank() == 0
    with run.lock() if first else nullcontext():  # the first rank holds the cell for all
        if first:
            refuse_other_config(config, run.config)
        if run.complete.is_file():
            console.print(f"{config.arm}/seed-{config.seed}: complete already")
            return
        if first:
            run.failed.unlink(missing_ok=True)
        try:
            store = TokenStore.open(data_folder(config, suite_dir))
            check_before_training(config, store)
            if first:
                suite_dir.link_tensorboard(config.arm, config.seed)
            if stage == "generate":
                check_is_trained(run)
            else:
                train(config, run, store, console)
                leave_group()
            if not first or (stage == "train" and config.generation.prompts):
                return
            if config.generation.prompts:
                generate(config, run, store, console)
            mark_cell_complete(config, run)
        except Preempted:
            leave_group()
            raise
        except Exception as error:
            if not is_lost_peer(error):  # the rank that failed first says why
                record_failure(run, error)
            raise


def mark_cell_complete(config: RunConfig, run: RunDir) -> None:
    """Write the marker of a cell that is trained and has the completions that its config asks for."""
    manifest = read_json(run.manifest)
    kept = ("step", "tokens", "data_chain", "final_weights_sha256", "finished_at")
    write_json(run.complete, {"config_hash": scientific_hash(config), **{k: manifest[k] for k in kept}})


def check_is_trained(run: RunDir) -> None:
    """Raise UserError where a cell has not been trained to its last step."""
    if not is_trained(run):
        raise UserError(f"{run.root}: is not trained to its last step, so it cannot generate; train it first")


def check_before_training(config: RunConfig, store: TokenStore) -> None:
    """Raise UserError for what would otherwise be noticed only after hours: data, mixture, validation, prompts."""
    from replication.data.order import MixtureOrder, validation_selection
    from replication.preference.prompts import load_prompts, prompt_tokens

    store.check(config)
    weights = [source.weight for source in config.data.sources]
    MixtureOrder(store.sizes("train"), weights, config.effective_data_seed)
    validation_selection(store.sizes("validation"), weights, config.validation.sequences)
    if config.generation.prompts:
        prompts = load_prompts(config.generation.prompts)
        prompt_tokens(config.generation.template, prompts, store.tokenizer(), store.end_of_text_id)


def data_folder(config: RunConfig, suite_dir: SuiteDir) -> Path:
    """data.dir, or the output folder's own data.

    Raises:
        UserError: data.dir does not exist.
    """
    if config.data.dir is None:
        return suite_dir.data
    path = Path(config.data.dir).expanduser()
    if not path.is_dir():
        raise UserError(
            f"data.dir: {path} does not exist; prepare it first, with the --config files of this run: "
            f"`replicate prepare --config ... --out {path}`"
        )
    return path
