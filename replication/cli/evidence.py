"""`replicate calibrate` and `replicate power`: what the tests do on experiments whose truth is known."""

from __future__ import annotations

from argparse import Namespace
from math import isfinite
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, POSITIVE, number, several, takes, verb, whole
from replication.config import AnalysisConfig
from replication.errors import UserError
from replication.protocol.paper import PHASE_3, VOTES
from replication.runs.layout import SuiteDir

BOUNDARIES = ("haybittle_peto", "obrien_fleming")
SPREAD, SIZES, SDS = number("[0, 0.5]"), several(whole(2)), several(POSITIVE)
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
@takes("--prompt-spread", "of one pair of models (default: the votes'; else the calibrated one)", SPREAD)
@takes("--judge-spread", "(default: the votes'; else the calibrated one)", SPREAD)
@takes("--seed-prompt-spread", "(default: a pilot's; else a share of the prompts', which then hold it)", SPREAD)
@takes(
    "--seed-prompt-share",
    "swept: of the variance between the prompts of one pair of models, what is of that pair alone (default "
    "0.25,0.5,0.75)",
    several(number("[0, 1]")),
    [0.25, 0.5, 0.75],
)
@takes("--seed-judge-spread", "an assumption (default 0)", SPREAD)
@takes("--prompt-judge-spread", "an assumption (default 0)", SPREAD)
@takes("--seeds", "(default 5,8,12,20)", SIZES, [5, 8, 12, 20])
@takes("--looks", "seeds at which it may end, such as 5,8,12, in place of --seeds", SIZES)
@takes("--look-boundaries", "haybittle_peto (default) or obrien_fleming", choices=BOUNDARIES, default=BOUNDARIES[0])
@takes("--prompts", "(default 32,64,128)", SIZES, [32, 64, 128])
@takes("--judges", "independent ones: a vendor's models together are one (default 40)", SIZES, [40])
@takes("--loss-sd", "swept: of the loss's difference over seeds, nats (default: --pilot's, else 0.005 to 0.04)", SDS)
@takes("--margin-nats", "of the equivalence of losses (default 0.02)", POSITIVE, AnalysisConfig.margin_nats)
@takes("--pilot", "output folder with a report, for the loss's standard deviation over seeds", Path)
@takes(
    "--factorial",
    "in place of --share, a panel of four arms: power to find a main effect and the interaction of so much of the "
    "share, such as 0.05; 0: how often one is found that is not there",
    number("[0, 0.5)"),
    metavar="EFFECT",
)
@takes("--votes-per-judge", "however many prompts there are (default 32)", COUNT, 32)
@takes("--have", "seeds that there are: how many more it takes", NATURAL, 0)
@takes("--simulations", "of each row (default 1000)", COUNT, 1000)
@takes("--gpu-hours-per-cell", "of an arm's seed (default: published, 180)", POSITIVE, PHASE_3.gpu_hours)
@SEED
@JOBS
def power(args: Namespace) -> None:
    """Say how many seeds, prompts, judges and GPU-hours it takes to find a preference of a given size."""
    if args.share == 0.5:
        raise UserError("--share: 0.5 is no preference; name the share of decisive votes that is to be found")
    from replication.report.results import read_results
    from replication.simulation.factorial import FactorialStudy, factorial_row, write_factorial
    from replication.simulation.power import GIVEN, LOSS_SDS, Fitted, fit, loss_lines, power_row, studies, write_power
    from replication.simulation.simulate import compute_rows
    from replication.statistics.seeds import sd_upper_bound

    console = Console()
    given = {name: getattr(args, f"{name}_spread") for name in GIVEN}
    votes, sizes = fit(args.votes) if args.votes else Fitted(""), (args.seeds, args.prompts, args.judges)
    path, share = args.out / "rows.jsonl", args.share if args.factorial is None else 0.5 + args.factorial
    looks = tuple(sorted(set(args.looks or ())))
    if looks and args.factorial is not None:
        raise UserError("--looks: are of a panel of two arms; leave out --factorial or --looks")
    shares = args.seed_prompt_share
    if args.factorial is not None:
        one = [shares[len(shares) // 2]]
        every, words = studies(given, args.seed_spread, args.ties, votes, sizes, share, seed_prompt_shares=one)
        panels, work = [FactorialStudy(study, args.votes_per_judge) for study in every], (args.simulations, args.seed)
        found = compute_rows(panels, factorial_row, *work, path, "simulating", console, args.jobs)
        for path in write_factorial(found, words, args.out, console):
            console.print(f"wrote {path}", soft_wrap=True)
        return
    swept, ended = (args.seed_spread, args.ties, votes, sizes, share), (looks, args.look_boundaries)
    every, words = studies(given, *swept, *ended, shares, args.votes_per_judge)
    sds = args.loss_sd or LOSS_SDS
    if args.pilot and not args.loss_sd:
        pilot = read_results(SuiteDir(args.pilot).results).loss
        if pilot is None or not pilot.sd or not isfinite(pilot.sd):
            raise UserError(f"--pilot: {args.pilot} has no difference in loss at two seeds; give --loss-sd")
        sds = [pilot.sd, sd_upper_bound(pilot.sd, pilot.n)]
        words.append(f"loss: sd over {pilot.n} seeds of {args.pilot}, and its upper 80 % bound")
    rows = compute_rows(every, power_row, args.simulations, args.seed, path, "simulating", console, args.jobs)
    losses = loss_lines(args.seeds, sds, args.margin_nats)
    for path in write_power(rows, words, args.have, args.gpu_hours_per_cell, losses, args.out, console):
        console.print(f"wrote {path}", soft_wrap=True)
