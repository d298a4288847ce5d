"""The door: `replicate VERB`. Each verb parses its own arguments and imports what it needs only when it runs."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from replication import __version__
from replication.cli.arguments import NATURAL, Parser, folder
from replication.errors import NO_ROOM, REMEDIES, UserError, is_disk_full, is_lost_peer, told
from replication.processes.launcher import forget_place_of_the_shell
from replication.processes.preemption import PREEMPTED, Preempted, StoppedEarly

if TYPE_CHECKING:
    from replication.config import RunConfig

INTERRUPTED = 130
STAGES = ("all", "train", "generate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 on success, 2 with one line for a user's mistake, 75 where a run was told to stop and did, 130 after Ctrl-C,
        1 otherwise.
    """
    if argv is None:  # the door itself
        _clean_environment()
    args = list(sys.argv[1:] if argv is None else argv)
    launched = "RANK" in os.environ or "SLURM_STEP_ID" in os.environ  # by what speaks for all ranks
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    _listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a locale cannot spell becomes ?, and ends no run
            stream.reconfigure(errors="replace")
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        return _verb(args)
    except UserError as error:
        if debug:
            traceback.print_exc()
        errors.print(f"[red]error:[/red] {_escape(str(error))}")
        return 2
    except Preempted as told:
        if os.environ.get("RANK", "0") == "0":
            errors.print(f"[yellow]{_escape(str(told))}[/yellow]; the same command goes on from there")
        return PREEMPTED
    except KeyboardInterrupt as told:
        if not launched:
            errors.print("interrupted; the same command goes on where this one stopped")
        return PREEMPTED if isinstance(told, StoppedEarly) else INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `replicate ... | head` is no error
        return 0
    except Exception as error:
        if is_lost_peer(error) and not debug:
            errors.print(f"rank {os.environ.get('RANK', '0')}: stopped, because another rank of the run did")
            return 1
        line = _told(error)
        if line is None:
            raise
        if debug:
            traceback.print_exc()
        errors.print(f"[red]error:[/red] {_escape(line)}")
        return 2


def _told(error: Exception) -> str | None:
    """One line about an error of the disk or of a path; None where it is a fault of ours."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in REMEDIES):
        return told(error) if error.filename is not None else f"{error.strerror}: {REMEDIES[error.errno or 0]}"
    if is_disk_full(error):  # wrapped by a library, or in words of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return f"no room on the disk ({first}); {NO_ROOM}"
    return None


def _clean_environment() -> None:
    """Let nothing of the current folder or of a login shell pass for the run's own, here and in what this starts."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:  # an empty entry is the current folder
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, os.environ["PYTHONPATH"].split(os.pathsep)))
    forget_place_of_the_shell()


def _listen() -> None:
    """End as at Ctrl-C when told to by a signal, until a verb listens in its own way.

    SIGINT also where it was ignored (what a script starts with &, many CI runners): it is sent on purpose. SIGHUP, a
    closed terminal, does not under nohup. The stop signals, and SIGTERM from a scheduler, end with PREEMPTED.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _interrupt)


def _interrupt(signum: int, frame: object) -> NoReturn:
    early = signum in (signal.SIGUSR1, signal.SIGUSR2) or (signum == signal.SIGTERM and "SLURM_STEP_ID" in os.environ)
    raise StoppedEarly if early else KeyboardInterrupt


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _verb(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        print(f"replicate {__version__}")
        return 0
    if args[0] not in VERBS:
        raise UserError(f"replicate: no verb '{args[0]}'; the verbs are {', '.join(VERBS)}")
    return VERBS[args[0]](args[1:])


def _overview() -> str:
    lines = [
        "usage: replicate VERB [options]      (replicate VERB --help says more; --debug shows tracebacks)",
        "",
    ]
    lines += [f"  {name:<15} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------- verbs


def prepare(argv: list[str]) -> int:
    """Read the sources, train or load the tokenizer, write token blocks; or show a global batch."""
    from replication.config import load_run

    parser = Parser(prog="replicate prepare", description=prepare.__doc__)
    parser.add_argument(
        "--config", action="append", default=[], help="config file; repeat it (default: data/python.yaml)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the prepared corpus")
    parser.add_argument(
        "--show-batch", type=NATURAL, metavar="K", help="print the global batch of step K (from 0), decoded"
    )
    parser.add_argument("--full", action="store_true", help="with --show-batch: whole sequences")
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.config or ["data/python.yaml"], flags)
    console = Console()
    from replication.data.prepare import prepare as prepare_corpus
    from replication.data.store import show_batch

    if args.show_batch is not None:
        show_batch(config, args.out, args.show_batch, console, full=args.full)
    else:
        prepare_corpus(config.data, args.out, console)
    return 0


def train(argv: list[str]) -> int:
    """Train one cell (one arm at one seed), generate its completions, mark it complete."""
    from replication.config import help_of_keys, load_run, to_yaml

    parser = Parser(prog="replicate train", description=train.__doc__, add_help=False)
    parser.add_argument("--config", action="append", default=[], help="layer of keys; repeat it, later files win")
    parser.add_argument("--out", type=Path, help="output folder; the cell is OUT/runs/<arm>/seed-<n>")
    parser.add_argument("--stage", choices=STAGES, default="all", help="train, or generate completions, or both")
    parser.add_argument("--print_config", action="store_true", help="print every key as it is resolved, train nothing")
    parser.add_argument("--dry-run", action="store_true", help="print parameter groups and sizes, and train nothing")
    if not argv or any(a in ("-h", "--help") for a in argv):
        print(f"{parser.format_help()}\nkeys of a run, with their defaults; flags win over files:\n{help_of_keys()}")
        return 0
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.config, flags)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.dry_run:
        from replication.training.dry_run import dry_run

        dry_run(config, Console())
        return 0
    if args.out is None:
        raise UserError("replicate train: --out is missing; name the output folder, such as --out out/my_suite")
    from replication.grid.cell import run_cell
    from replication.processes.launcher import adopt_place
    from replication.processes.preemption import listen
    from replication.runs.layout import SuiteDir

    if args.stage != "generate" and not adopt_place(config) and config.world_size > 1:
        return _start_ranks(config, argv)
    listen(config.cluster.stop_signal)
    if "SLURM_STEP_ID" in os.environ:  # what a scheduler that takes its nodes back sends before it kills
        listen("TERM")
    run_cell(config, SuiteDir(args.out), Console(), args.stage)
    return 0


def _start_ranks(config: RunConfig, argv: list[str]) -> int:
    """Start this verb once for each process of the run, and wait.

    Raises:
        UserError: the run spans nodes, where each node must start its own launcher.
    """
    from replication.processes.launcher import run_ranks

    if config.cluster.nodes > 1:
        raise UserError(
            f"cluster.nodes: {config.cluster.nodes} nodes need a launcher: in a SLURM job `srun --nodes="
            f"{config.cluster.nodes} --ntasks-per-node={config.cluster.devices} replicate train ...` (`replicate grid "
            f"submit` writes it), elsewhere on every node `torchrun --nnodes={config.cluster.nodes} --nproc-per-node="
            f"{config.cluster.devices} --rdzv-backend=c10d --rdzv-id=RUN --rdzv-endpoint=FIRST_NODE:PORT "
            "-m replication train ...`"
        )
    command = [sys.executable, "-P", "-m", "replication", "train", *argv]
    return run_ranks(command, config.world_size, config.cluster.stop_signal)


def grid(argv: list[str]) -> int:
    """Plan, run, submit or show a suite: arms x seeds."""
    from replication.cli.grid import grid as run_grid

    return run_grid(argv)


def preregistration(argv: list[str]) -> int:
    """Register a suite's analysis plan before its first cell, show it, or check whether it was followed."""
    from replication.cli.preregistration import preregistration as run_preregistration

    return run_preregistration(argv)


def plan(argv: list[str]) -> int:
    """Another name of `preregistration`; `plan freeze` is `preregistration register`."""
    return preregistration(argv)


def generate(argv: list[str]) -> int:
    """Sample completions of a suite's trained cells, or export two arms' for blind judging elsewhere."""
    from replication.cli.generate import generate as run_generate

    return run_generate(argv)


def judge(argv: list[str]) -> int:
    """Let people and models compare completions of two arms, blind; lock; write the votes for the report."""
    from replication.cli.judge import judge as run_judge

    return run_judge(argv)


def report(argv: list[str]) -> int:
    """Write report.html, report.md, results.json and figures from the run folders."""
    parser = Parser(prog="replicate report", description=report.__doc__)
    parser.add_argument("out", type=folder, help="output folder of a suite; or one with votes.csv alone")
    args = parser.parse_args(argv)
    from replication.config import load_suite
    from replication.runs.layout import SuiteDir

    suite_dir = SuiteDir(args.out)
    if not suite_dir.suite.is_file():
        if not suite_dir.votes.is_file():
            raise UserError(f"{suite_dir.suite}: no such file; give the output folder of `replicate grid run`")
        from replication.report.votes_report import write_votes_report

        Console().print(f"no suite.yaml: a report of the votes alone; wrote {write_votes_report(suite_dir)}",
                        soft_wrap=True)  # fmt: skip
        return 0
    from replication.report.report import write_report

    Console().print(f"wrote {write_report(suite_dir, load_suite(suite_dir.suite))}", soft_wrap=True)
    return 0


def tensorboard(argv: list[str]) -> int:
    """Curves in TensorBoard, with means, bands and paired differences over seeds; live while cells run."""
    from replication.cli.tensorboard import tensorboard as show

    return show(argv)


def drill(argv: list[str]) -> int:
    """Kill a run at random points, resume it, and compare its end with an undisturbed run."""
    from replication.cli.bench import drill as run_drill

    return run_drill(argv)


def bench(argv: list[str]) -> int:
    """Measure speed and memory as ratios inside one run: arms, other trainers, ranks, heads; and rounding's noise."""
    from replication.cli.bench import bench as run_bench

    return run_bench(argv)


def power(argv: list[str]) -> int:
    """Say how many seeds, prompts, judges and GPU-hours it takes to find a preference of a given size."""
    from replication.cli.evidence import power as run_power

    return run_power(argv)


def calibrate(argv: list[str]) -> int:
    """Simulate experiments of known truth and show how often every test of the report is wrong."""
    from replication.cli.evidence import calibrate as run_calibrate

    return run_calibrate(argv)


def audit(argv: list[str]) -> int:
    """Recompute a paper's printed figures from its published data files, and say which differ."""
    from replication.cli.audit import audit as run_audit

    return run_audit(argv)


def doctor(argv: list[str]) -> int:
    """Say what this machine has and what each config would need; or whether a cluster could run a suite."""
    parser = Parser(prog="replicate doctor", description=doctor.__doc__)
    parser.add_argument("--cluster", help="cluster file, or its name in configs/cluster: ask SLURM, start nothing")
    parser.add_argument("--suite", help="with --cluster: suite file or name (default: ablation_2x2)")
    parser.add_argument("--site", type=Path, help="with --cluster: site file (default: launch/site.env, if there)")
    parser.add_argument("--out", type=Path, help="with --cluster: folder of the results (default: out)")
    args = parser.parse_args(argv)
    if args.cluster:
        from replication.config import find_cluster, load_cell, load_suite
        from replication.grid.cluster import examine_cluster
        from replication.grid.site import default_site

        suite = load_suite(args.suite or "ablation_2x2")
        config = load_cell(suite, suite.arms[0], suite.seeds[0], cluster=find_cluster(args.cluster))
        return examine_cluster(suite, config, default_site(args.site), args.out or Path("out"), Console())
    for name in ("suite", "site", "out"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: says what a cluster is asked about; name that with --cluster")
    from replication.config import config_root
    from replication.grid.doctor import doctor as examine

    return examine(Console(), config_root())


VERBS: dict[str, Callable[[list[str]], int]] = {
    "prepare": prepare,
    "train": train,
    "preregistration": preregistration,
    "plan": plan,
    "grid": grid,
    "generate": generate,
    "judge": judge,
    "report": report,
    "power": power,
    "calibrate": calibrate,
    "tensorboard": tensorboard,
    "drill": drill,
    "bench": bench,
    "audit": audit,
    "doctor": doctor,
}
