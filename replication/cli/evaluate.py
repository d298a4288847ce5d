"""`replicate eval OUT`: trained cells scored and compared; `replicate verify OUT`: validated again."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, SEED, folder, number, table_console, takes, verb
from replication.console import Reporter, plural, say, table
from replication.errors import UserError, require
from replication.runs.layout import SuiteDir


@verb
@takes("out", "output folder of a suite", folder)
@takes("--arm", "only this arm")
@takes("--seed", "only this seed", SEED)
@takes("--tasks", "tasks of lm-evaluation-harness by name, or folders of task files", metavar="A,B,FOLDER")
@takes("--limit", "with --tasks: only so many documents of each", COUNT)
@takes("--files", "texts in UTF-8, scored in bits per byte", Path, nargs="+")
@takes("--distributions", "loss by frequency of the token, KL between arms and between seeds, entropies", bool)
def eval(args: Namespace) -> int:
    """Score every trained cell on tasks of lm-evaluation-harness, on text files, and by its next-token distributions on
    the validation set, for the report, which counts completions by itself. What is there already is left alone, and an
    interrupted command goes on where it stopped.

    Returns:
        0; 1 where cells are not trained.
    """
    if not (args.tasks or args.files or args.distributions):
        raise UserError("replicate eval: nothing is asked for; give --tasks, --files or --distributions")
    if args.tasks:
        require("eval", "lm_eval")
    files = {path.name: path for path in args.files or ()}
    if len(files) != len(args.files or ()):
        raise UserError("--files: two files have the same name, by which the report tells them apart; rename one")
    from replication.evaluation.evaluate import evaluate_cell
    from replication.generation.suite import trained_cells

    console, suite_dir, tasks = Console(), SuiteDir(args.out), []
    trained, untrained = trained_cells(suite_dir, args.arm, args.seed)
    if args.tasks:
        from replication.evaluation.harness import load_tasks

        tasks = load_tasks(args.tasks, args.limit)
    for run in trained:
        with run.lock():
            evaluate_cell(run, suite_dir, tasks, files, args.distributions, console)
    if untrained:
        say(console, ("not trained:", "yellow"), f" {', '.join(untrained)}")
    say(console, f"`replicate report {args.out}` compares the arms")
    return 1 if untrained else 0


@verb
@takes("out", "output folder of a suite", folder)
@takes("--cells", "so many checkpoints (default 1)", COUNT, 1)
@takes("--seed", "of the draw: yours, which nobody knew before (default 0)", NATURAL, 0)
@takes("--tolerance", "nats (default: none on the machine of the training, else by its precision)", number("[0, 1]"))
def verify(args: Namespace) -> int:
    """Validate checkpoints drawn at random again, and compare with the journal's losses and the hashes of the weights.

    Returns:
        0; 1 where one differs.
    """
    from replication.evaluation.verify import verify_cells

    console, rows, failed = Console(), [], 0
    for found in verify_cells(SuiteDir(args.out), args.cells, args.seed, args.tolerance, Reporter(console)):
        allowed = f"within {found.tolerance:g}" if found.tolerance else "every bit"
        difference = "not recorded" if found.journal is None else f"{found.now - found.journal:+.3g}"
        said = f"holds, {allowed}" if found.holds else (found.weights and f"weights are {found.weights}") or "differs"
        rows.append((found.cell, found.step, found.journal, found.now, difference, said))
        failed += not found.holds
    columns = ("cell", ">step", ">journal, nats", ">now", ">difference", "verdict")
    table_console().print(table(f"Checkpoints drawn by seed {args.seed}", columns, rows))
    say(console, f"{plural(failed, 'checkpoint')} of {args.cells} not as recorded" if failed else "all are as recorded")
    return 1 if failed else 0
