"""`replicate calibrate` and `replicate power`: what the tests do on experiments whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, POSITIVE, Parser, number, several, whole
from replication.errors import UserError
from replication.protocol.paper import PHASE_3, VOTES

SPREAD = number("[0, 0.5]")


def calibrate(argv: Sequence[str]) -> int:
    """Simulate experiments of known truth and show how often every test of the report is wrong."""
    parser = Parser(prog="replicate calibrate", description=calibrate.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/calibration"), help="folder of table, figure and rows")
    parser.add_argument("--experiments", type=COUNT, default=2000, help="of each truth of the grid (default 2000)")
    parser.add_argument("--seeds", type=whole(2), default=5, help="training seeds of an experiment (default 5)")
    parser.add_argument("--prompts", type=whole(2), default=32, help="(default 32)")
    parser.add_argument("--judges", type=whole(2), default=40, help="each votes once on every prompt (default 40)")
    _add_common(parser)
    args = parser.parse_args(argv)
    from replication.simulation.calibration import declared_grid, findings, measure, write_calibration
    from replication.simulation.rows import compute_rows

    console = Console()
    grid, path = declared_grid(args.seeds, args.prompts, args.judges), args.out / "rows.jsonl"
    rows = compute_rows(grid, measure, args.experiments, args.seed, path, "calibrating", console, args.jobs)
    found = findings(rows)
    for path in write_calibration(rows, found, args.out, console):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0 if all(line["holds"] for line in found) else 1


def power(argv: Sequence[str]) -> int:
    """Say how many seeds, prompts, judges and GPU-hours it takes to find a preference of a given size."""
    parser = Parser(prog="replicate power", description=power.__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/power"), help="folder of table, figure and rows")
    add("--votes", type=Path, help="spreads from votes: a pilot's output folder or votes.csv (all of them); published "
        "data files or a marginals.json (prompts and judges)")  # fmt: skip
    add(
        "--share",
        type=number("(0, 1)"),
        default=VOTES.share,
        help="to find (default: published, 0.5995)",
    )
    add("--ties", type=number("[0, 1)"), help="their share (default: the votes', or published, 0.336)")
    add("--seed-spread", type=several(SPREAD), help="swept (default 0,0.05,0.1, and a pilot's own)")
    for name in ("prompt", "judge", "seed-prompt"):
        add(f"--{name}-spread", type=SPREAD, help="(default: the votes'; else the calibrated one)")
    for name in ("seed-judge", "prompt-judge"):
        add(f"--{name}-spread", type=SPREAD, help="an assumption (default 0)")
    add("--seeds", type=several(whole(2)), default=[5, 8, 12, 20], help="(default 5,8,12,20)")
    add("--prompts", type=several(whole(2)), default=[32, 64, 128], help="(default 32,64,128)")
    add("--judges", type=several(whole(2)), default=[20, 40, 80], help="(default 20,40,80)")
    add("--have", type=NATURAL, default=0, help="seeds that there are: how many more it takes")
    add("--simulations", type=COUNT, default=1000, help="of each row (default 1000)")
    add(
        "--gpu-hours-per-cell",
        type=POSITIVE,
        default=PHASE_3.gpu_hours,
        help="of an arm's seed (default: published, 180)",
    )
    _add_common(parser)
    args = parser.parse_args(argv)
    if args.share == 0.5:
        raise UserError("--share: 0.5 is no preference; name the share of decisive votes that is to be found")
    from replication.simulation.power import GIVEN, Fitted, fit, power_row, studies, write_power
    from replication.simulation.rows import compute_rows

    console = Console()
    given = {name: getattr(args, f"{name}_spread") for name in GIVEN}
    votes, sizes = fit(args.votes) if args.votes else Fitted(""), (args.seeds, args.prompts, args.judges)
    every, words = studies(given, args.seed_spread, args.ties, votes, sizes, args.share)
    path = args.out / "rows.jsonl"
    rows = compute_rows(every, power_row, args.simulations, args.seed, path, "simulating", console, args.jobs)
    for path in write_power(rows, words, args.have, args.gpu_hours_per_cell, args.out, console):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _add_common(parser: Parser) -> None:
    parser.add_argument("--seed", type=NATURAL, default=0, help="of the simulation (default 0)")
    parser.add_argument("--jobs", type=COUNT, help="processes at once (default: one a core)")
    parser.old_spelling("--random-seed", "--seed")
    parser.old_spelling("--processes", "--jobs")
