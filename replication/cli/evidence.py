"""`replicate calibrate` and `replicate power`: what the tests do on experiments whose truth is known."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from replication.cli.arguments import COUNT, NATURAL, POSITIVE, Parser, number, several, whole
from replication.errors import UserError
from replication.runs.files import read_json

if TYPE_CHECKING:
    from replication.simulation.power import Fitted
    from replication.simulation.simulate import Spread

VOTE_FILE = "phase3_ab_preference.json"
SPREAD = number("[0, 0.5]")


def calibrate(argv: Sequence[str]) -> int:
    """Simulate experiments of known truth and show how often every test of the report is wrong."""
    parser = Parser(prog="replicate calibrate", description=calibrate.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/calibration"), help="folder of table, figure and rows")
    parser.add_argument("--experiments", type=COUNT, default=2000, help="of each cell of the grid (default 2000)")
    parser.add_argument("--seeds", type=whole(2), default=5, help="training seeds of an experiment (default 5)")
    parser.add_argument("--prompts", type=whole(2), default=32, help="(default 32)")
    parser.add_argument("--judges", type=whole(2), default=40, help="each votes once on every prompt (default 40)")
    _add_common(parser)
    args = parser.parse_args(argv)
    from replication.simulation.calibration import declared_grid, run_cell
    from replication.simulation.calibration_report import findings, write_calibration
    from replication.simulation.rows import compute_rows

    console = Console()
    rows = compute_rows(
        declared_grid(args.seeds, args.prompts, args.judges),
        run_cell,
        (args.experiments, args.random_seed),
        args.out / "rows.jsonl",
        "calibrating",
        console,
        args.processes,
    )
    found = findings(rows)
    for path in write_calibration(rows, found, args.out, console):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0 if all(line["holds"] for line in found) else 1


def power(argv: Sequence[str]) -> int:
    """Say how many seeds, prompts, judges and GPU-hours it takes to find a preference of a given size."""
    parser = Parser(prog="replicate power", description=power.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/power"), help="folder of table, figure and rows")
    parser.add_argument("--votes", type=Path, help="spreads from votes: a pilot's output folder or votes.csv (all of "
                        "them); published data files or a marginals.json (prompts and judges)")  # fmt: skip
    parser.add_argument(
        "--share", type=number("(0, 1)"), help="of decisive votes, to find (default: published, 0.5995)"
    )
    parser.add_argument("--ties", type=number("[0, 1)"), help="their share (default: the votes', or published, 0.336)")
    parser.add_argument("--seed-spread", type=several(SPREAD), help="swept (default 0,0.05,0.1, and a pilot's own)")
    for name in ("prompt", "judge", "seed-prompt"):
        parser.add_argument(f"--{name}-spread", type=SPREAD, help="(default: the votes'; else the calibrated one)")
    for name in ("seed-judge", "prompt-judge"):
        parser.add_argument(f"--{name}-spread", type=SPREAD, default=0.0, help="an assumption (default 0)")
    parser.add_argument("--seeds", type=several(whole(2)), default=[5, 8, 12, 20], help="(default 5,8,12,20)")
    parser.add_argument("--prompts", type=several(whole(2)), default=[32, 64, 128], help="(default 32,64,128)")
    parser.add_argument("--judges", type=several(whole(2)), default=[20, 40, 80], help="(default 20,40,80)")
    parser.add_argument("--have", type=NATURAL, default=0, help="seeds that there are: how many more it takes")
    parser.add_argument("--simulations", type=COUNT, default=1000, help="of each row (default 1000)")
    parser.add_argument("--gpu-hours-per-cell", type=POSITIVE, help="one arm at one seed (default: published, 180)")
    _add_common(parser)
    args = parser.parse_args(argv)
    if args.share == 0.5:
        raise UserError("--share: 0.5 is no preference; name the share of decisive votes that is to be found")
    from replication.simulation.power import (
        PUBLISHED_CELL_HOURS,
        PUBLISHED_SHARE,
        PUBLISHED_TIES,
        power_row,
        studies,
        with_cost,
    )
    from replication.simulation.power_report import write_power
    from replication.simulation.rows import compute_rows

    console = Console()
    fitted = _fitted(args.votes)
    spread, assumptions = _spread(args, fitted)
    share = PUBLISHED_SHARE if args.share is None else args.share
    own_ties = None if fitted is None else fitted.ties
    ties = next(t for t in (args.ties, own_ties, PUBLISHED_TIES) if t is not None)
    swept = _swept(args, fitted)
    hours = PUBLISHED_CELL_HOURS if args.gpu_hours_per_cell is None else args.gpu_hours_per_cell
    rows = compute_rows(
        studies(spread, swept, args.seeds, args.prompts, args.judges, share, ties),
        power_row,
        (args.simulations, args.random_seed),
        args.out / "rows.jsonl",
        "simulating",
        console,
        args.processes,
    )
    rows = [with_cost(row, hours) for row in rows]
    for path in write_power(rows, assumptions, args.have, args.out, console):
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


# ---------------------------------------------------------------- arguments


def _add_common(parser: Parser) -> None:
    parser.add_argument("--random-seed", type=NATURAL, default=0, help="of the simulation (default 0)")
    parser.add_argument("--processes", type=COUNT, help="at once (default: one a core)")


# ---------------------------------------------------------------- where the spreads come from


def _fitted(path: Path | None) -> Fitted | None:
    """Spreads of votes given: a folder of the published files, an output folder with votes.csv, or such a file."""
    if path is None:
        return None
    from replication.simulation.power import fit_ballots, fit_marginals
    from replication.statistics.preference import ballots
    from replication.votes.record import read_votes

    marginals = path if path.is_file() and path.suffix == ".json" else path / VOTE_FILE
    if marginals.is_file():
        document = read_json(marginals)
        try:
            return fit_marginals(document, str(marginals))
        except (KeyError, TypeError):
            keys = "question_majorities.details and judges"
            raise UserError(f"{marginals}: not in the published schema; it needs {keys}") from None
    file = path if path.is_file() else path / "votes.csv"
    if not file.is_file():
        raise UserError(f"--votes: {path} holds neither votes.csv nor {VOTE_FILE}; name such a folder or a votes.csv")
    votes = read_votes(file)
    pairs = sorted({tuple(sorted((vote.arm_left, vote.arm_right))) for vote in votes})
    if len(pairs) != 1:
        found = "no votes" if not pairs else f"votes on {len(pairs)} pairs of arms"
        raise UserError(f"{file}: holds {found}; power needs those of one pair")
    return fit_ballots(ballots(votes, *pairs[0]), str(file))


def _swept(args: argparse.Namespace, fitted: Fitted | None) -> list[float]:
    if args.seed_spread is not None:
        return sorted(set(args.seed_spread))
    own = [] if fitted is None or fitted.seed is None else [round(fitted.seed, 4)]
    return sorted({0.0, 0.05, 0.1, *own})


def _spread(args: argparse.Namespace, fitted: Fitted | None) -> tuple[Spread, list[str]]:
    """The spreads besides the seeds', and where each comes from, in words."""
    from replication.simulation.calibration import JUDGE, PROMPT, SEED_PROMPT
    from replication.simulation.simulate import Spread

    spread, words = Spread(), []
    for name, default in (("prompt", PROMPT), ("judge", JUDGE), ("seed_prompt", SEED_PROMPT)):
        given = getattr(args, f"{name}_spread")
        estimate: Any = None if fitted is None else getattr(fitted, name)
        value, source = (
            (given, "given") if given is not None
            else (estimate, f"fitted to {fitted.source}") if fitted is not None and estimate is not None
            else (default, "an assumption")
        )  # fmt: skip
        spread = replace(spread, **{name: value})
        words.append(f"{name.replace('_', ' x ')} spread {value:.3f} ({source})")
    for name in ("seed_judge", "prompt_judge"):
        value = getattr(args, f"{name}_spread")
        spread = replace(spread, **{name: value})
        words.append(f"{name.replace('_', ' x ')} spread {value:.3f} (an assumption)")
    seed = None if fitted is None else fitted.seed
    words.append(
        "seed spread swept (an assumption)" if seed is None else f"seed spread swept, the pilot's is {seed:.3f}"
    )
    return spread, words
