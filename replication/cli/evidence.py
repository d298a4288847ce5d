"""`replicate calibrate` and `replicate power`: what the tests do on experiments whose truth is known."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, POSITIVE, number, several, takes, verb, whole
from replication.errors import UserError
from replication.protocol.paper import PHASE_3, VOTES

BOUNDARIES = ("haybittle_peto", "obrien_fleming")
SPREAD, SIZES = number("[0, 0.5]"), several(whole(2))
SEED = takes("--seed", "of the simulation (default 0)", NATURAL, 0, old="--random-seed")
JOBS = takes("--jobs", "processes at once (default: one a core)", COUNT, old="--processes")


@verb
@takes("--out", "folder of table, figure and rows", Path, Path("out/calibration"))
@takes("--experiments", "of each truth of the grid (default 2000)", COUNT, 2000)
@takes("--seeds", "training seeds of an experiment (default 5)", whole(2), 5)
@takes("--prompts", "(default 32)", whole(2), 32)
@takes("--judges", "each votes once on every prompt (default 40)", whole(2), 40)
@SEED
@JOBS
def calibrate(args: Namespace) -> int:
    """Simulate experiments of known truth and show how often every test of the report is wrong."""
    from replication.simulation.calibration import declared_grid, findings, measure, write_calibration
    from replication.simulation.simulate import compute_rows

    console = Console()
    grid, path = declared_grid(args.seeds, args.prompts, args.judges), args.out / "rows.jsonl"
    rows = compute_rows(grid, measure, args.experiments, args.seed, path, "calibrating", console, args.jobs)
    found = findings(rows)
    for path in write_calibration(rows, found, args.out, console):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0 if all(line["holds"] for line in found) else 1


@verb
@takes("--out", "folder of table, figure and rows", Path, Path("out/power"))
@takes(
    "--votes",
    "spreads from votes: a pilot's output folder or votes.csv (all of them); published data files or a "
    "marginals.json (prompts and judges)",
    Path,
)
@takes("--share", "to find (default: published, 0.5995)", number("(0, 1)"), VOTES.share)
@takes("--ties", "their share (default: the votes', or published, 0.336)", number("[0, 1)"))
@takes("--seed-spread", "swept (default 0,0.05,0.1, and a pilot's own)", several(SPREAD))
@takes("--prompt-spread", "(default: the votes'; else the calibrated one)", SPREAD)
@takes("--judge-spread", "(default: the votes'; else the calibrated one)", SPREAD)
@takes("--seed-prompt-spread", "(default: the votes'; else the calibrated one)", SPREAD)
@takes("--seed-judge-spread", "an assumption (default 0)", SPREAD)
@takes("--prompt-judge-spread", "an assumption (default 0)", SPREAD)
@takes("--seeds", "(default 5,8,12,20)", SIZES, [5, 8, 12, 20])
@takes("--looks", "seeds at which it may end, such as 5,8,12, in place of --seeds", SIZES)
@takes("--look-boundaries", "haybittle_peto (default) or obrien_fleming", choices=BOUNDARIES, default=BOUNDARIES[0])
@takes("--prompts", "(default 32,64,128)", SIZES, [32, 64, 128])
@takes("--judges", "(default 20,40,80)", SIZES, [20, 40, 80])
@takes(
    "--factorial",
    "in place of --share, a panel of four arms: power to find a main effect and the interaction of so much of the "
    "share, such as 0.05; 0: how often one is found that is not there",
    number("[0, 0.5)"),
    metavar="EFFECT",
)
@takes("--votes-per-judge", "of that panel (default 32)", COUNT, 32)
@takes("--have", "seeds that there are: how many more it takes", NATURAL, 0)
@takes("--simulations", "of each row (default 1000)", COUNT, 1000)
@takes("--gpu-hours-per-cell", "of an arm's seed (default: published, 180)", POSITIVE, PHASE_3.gpu_hours)
@SEED
@JOBS
def power(args: Namespace) -> None:
    """Say how many seeds, prompts, judges and GPU-hours it takes to find a preference of a given size."""
    if args.share == 0.5:
        raise UserError("--share: 0.5 is no preference; name the share of decisive votes that is to be found")
    from replication.simulation.factorial import FactorialStudy, factorial_row, write_factorial
    from replication.simulation.power import GIVEN, Fitted, fit, power_row, studies, write_power
    from replication.simulation.simulate import compute_rows

    console = Console()
    given = {name: getattr(args, f"{name}_spread") for name in GIVEN}
    votes, sizes = fit(args.votes) if args.votes else Fitted(""), (args.seeds, args.prompts, args.judges)
    path, share = args.out / "rows.jsonl", args.share if args.factorial is None else 0.5 + args.factorial
    looks = tuple(sorted(set(args.looks or ())))
    if looks and args.factorial is not None:
        raise UserError("--looks: are of a panel of two arms; leave out --factorial or --looks")
    every, words = studies(given, args.seed_spread, args.ties, votes, sizes, share, looks, args.look_boundaries)
    if args.factorial is not None:
        panels, work = [FactorialStudy(study, args.votes_per_judge) for study in every], (args.simulations, args.seed)
        found = compute_rows(panels, factorial_row, *work, path, "simulating", console, args.jobs)
        for path in write_factorial(found, words, args.out, console):
            console.print(f"wrote {path}", soft_wrap=True)
        return
    rows = compute_rows(every, power_row, args.simulations, args.seed, path, "simulating", console, args.jobs)
    for path in write_power(rows, words, args.have, args.gpu_hours_per_cell, args.out, console):
        console.print(f"wrote {path}", soft_wrap=True)
