"""The door: `replicate VERB`. Each verb parses its own arguments and imports what it needs only when it runs."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

from rich.console import Console

from replication import __version__
from replication.cli.arguments import Namespace, verb
from replication.console import say
from replication.errors import UserError, did_you_mean, is_lost_peer, told
from replication.processes.launcher import forget_place_of_the_shell
from replication.processes.preemption import PREEMPTED, Preempted, StoppedEarly

TABLE = {
    "quickstart": ("quickstart", "The whole path here: four arms at two seeds of a tiny model, report, judging page."),
    "prepare": ("train", "Read the sources, train or load the tokenizer, write token blocks; or show a global batch."),
    "train": ("train", "Train one cell (one arm at one seed), generate its completions, mark it complete."),
    "preregistration": ("preregistration", "Register a suite's analysis plan before the data; show it; check it."),
    "plan": ("preregistration", "Another name of `preregistration`; `plan freeze` is `preregistration register`."),
    "grid": ("grid", "Plan, run, submit or show a suite: arms x seeds."),
    "generate": ("generate", "Sample completions of trained cells, or export two arms' for blind judging elsewhere."),
    "export": ("export", "Write trained cells as model folders of transformers, checked against our own logits."),
    "eval": ("evaluate", "Score trained cells on tasks of lm-evaluation-harness, on texts, and by their completions."),
    "verify": ("evaluate", "Validate checkpoints drawn at random again; compare with journal and hashes of weights."),
    "judge": ("judge", "Let people and models compare completions of two arms, blind; lock; write the votes."),
    "report": ("report", "Write report.html, report.md, results.json and figures from the run folders."),
    "archive": ("archive", "Put an output folder into one file; or prove that a file's report follows from its runs."),
    "prune": ("archive", "Remove from finished cells what only further training needs: optimizer states."),
    "power": ("evidence", "Say how many seeds, prompts, judges and GPU-hours a preference of a given size takes."),
    "calibrate": ("evidence", "Simulate experiments of known truth; show how often each test of the report is wrong."),
    "tensorboard": ("tensorboard", "Curves with means, bands, paired differences over seeds; live while cells run."),
    "drill": ("bench", "Kill a run at random points, resume it, and compare its end with an undisturbed run."),
    "bench": ("bench", "Measure speed and memory as ratios inside one run: arms, trainers, ranks, heads; and noise."),
    "audit": ("report", "Recompute a paper's printed figures from its published data files, and say which differ."),
    "check-gain": ("gains", "Check the gains and scales of a plugin as our own are checked: pure, whatever the cut."),
    "doctor": ("grid", "Say what this machine has and each config would need; or whether a cluster could run a suite."),
    "completion": ("main", "Print the completion of verbs, actions, flags and keys for bash."),
}
"""Verb -> (module of cli/ that holds it, what it does)."""
USAGE = "usage: replicate VERB [options]      (replicate help VERB says more; --debug shows tracebacks)\n"
COMPLETION = r"""_replicate() {
  local word=${COMP_WORDS[COMP_CWORD]} asked=("${COMP_WORDS[@]:1:COMP_CWORD-1}") known
  [[ $word != --*.* ]] || asked=(train "${word%.*}")
  known=$(replicate help "${asked[@]}" 2>/dev/null | grep -oE '^ {2,4}[a-z][a-z-]+|--[a-z][a-z._-]*')
  mapfile -t COMPREPLY < <(compgen -W "$known" -- "$word")
}
complete -o default -o nospace -F _replicate replicate"""
INTERRUPTED = 130


def _run(verb: str, argv: list[str]) -> int:
    return int(getattr(import_module(f"replication.cli.{TABLE[verb][0]}"), verb.replace("-", "_"))(argv))


VERBS: dict[str, Callable[[list[str]], int]] = {verb: partial(_run, verb) for verb in TABLE}


@verb
def completion(args: Namespace) -> None:
    """Print the completion for bash; its place is ~/.local/share/bash-completion/completions/replicate."""
    print(COMPLETION)


def _print_verbs() -> None:
    width, indent = max(shutil.get_terminal_size().columns - 2, 50), f"\n{'':18}"
    print(USAGE)
    for name, (_, text) in TABLE.items():
        print(f"  {name:<15} {indent.join(textwrap.wrap(text, width - 18))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 on success, 2 with one line for a user's mistake, 75 where a run was told to stop and did, 130 after Ctrl-C,
        1 otherwise.
    """
    if argv is None:  # the door itself: nothing of the current folder or of a login shell may pass for the run's own
        os.environ["PYTHONSAFEPATH"] = "1"
        if "PYTHONPATH" in os.environ:  # an empty entry is the current folder
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, os.environ["PYTHONPATH"].split(os.pathsep)))
        forget_place_of_the_shell()
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
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        if not args or args[0] in ("-h", "--help"):
            _print_verbs()
            return 0
        if args[0] == "--version":
            print(f"replicate {__version__}")
            return 0
        if args[0] not in VERBS:
            meant = did_you_mean(args[0], VERBS) or f"; the verbs are {', '.join(VERBS)}"
            raise UserError(f"replicate: no verb '{args[0]}'{meant}")
        return VERBS[args[0]](args[1:])
    except UserError as error:
        if debug:
            traceback.print_exc()
        say(errors, ("error:", "red"), f" {error}")
        return 2
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            say(errors, (str(stop), "yellow"), "; the same command goes on from there")
        return PREEMPTED
    except KeyboardInterrupt as stop:
        if not launched:
            errors.print("interrupted; the same command goes on where this one stopped")
        return PREEMPTED if isinstance(stop, StoppedEarly) else INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `replicate ... | head` is no error
        return 0
    except Exception as error:
        if is_lost_peer(error) and not debug:
            errors.print(f"rank {os.environ.get('RANK', '0')}: stopped, because another rank of the run did")
            return 1
        if (line := told(error)) is None:
            raise
        if debug:
            traceback.print_exc()
        say(errors, ("error:", "red"), f" {line}")
        return 2


def _listen() -> None:
    """End as at Ctrl-C when told to by a signal, until a verb listens in its own way.

    SIGINT also where it was ignored (what a script starts with &, many CI runners): it is sent on purpose. SIGHUP, a
    closed terminal, does not under nohup. The stop signals, and SIGTERM from a scheduler, end with PREEMPTED.
    """

    def interrupt(signum: int, frame: object) -> NoReturn:
        early = {signal.SIGUSR1, signal.SIGUSR2} | ({signal.SIGTERM} if "SLURM_STEP_ID" in os.environ else set())
        raise StoppedEarly if signum in early else KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), interrupt)
