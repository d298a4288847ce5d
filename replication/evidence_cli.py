"""`replicate calibrate` and `replicate power`: what the tests do on experiments whose truth is known."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from replication.arguments import Parser
from replication.errors import UserError
from replication.rundir import read_json

if TYPE_CHECKING:
    from replication.analysis.power import Fitted
    from replication.analysis.simulate import Spread

VOTE_FILE = "phase3_ab_preference.json"


def calibrate(argv: Sequence[str]) -> int:
    """Simulate experiments of known truth and show how often every test of the report is wrong."""
    parser = Parser(prog="replicate calibrate", description=calibrate.__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/calibration"), help="folder of table, figure and rows")
    parser.add_argument("--experiments", type=int, default=2000, help="of each cell of the grid (default 2000)")
    parser.add_argument("--seeds", type=int, default=5, help="training seeds of an experiment (default 5)")
    parser.add_argument("--prompts", type=int, default=32, help="(default 32)")
    parser.add_argument("--judges", type=int, default=40, help="each votes once on every prompt (default 40)")
    _add_common(parser)
    args = parser.parse_args(argv)
    _check_counts(args, "experiments", "processes")
    for name in ("seeds", "prompts", "judges"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name}: {getattr(args, name)} must be at least 2; one has no spread")
    from replication.analysis.calibrate import declared_grid, run_cell
    from replication.analysis.calibration_report import findings, write_calibration
    from replication.analysis.rows import compute_rows

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
    parser.add_argument("--share", type=float, help="share of decisive votes to find (default: published, 0.5995)")
    parser.add_argument("--ties", type=float, help="share of ties (default: the votes', or published, 0.336)")
    parser.add_argument("--seed-spread", type=_floats, help="swept (default 0,0.05,0.1; a pilot's own is added)")
    for name in ("prompt", "judge", "seed-prompt"):
        parser.add_argument(f"--{name}-spread", type=float, help="(default: the votes'; else the calibrated one)")
    for name in ("seed-judge", "prompt-judge"):
        parser.add_argument(f"--{name}-spread", type=float, default=0.0, help="an assumption (default 0)")
    parser.add_argument("--seeds", type=_ints, default=[5, 8, 12, 20], help="(default 5,8,12,20)")
    parser.add_argument("--prompts", type=_ints, default=[32, 64, 128], help="(default 32,64,128)")
    parser.add_argument("--judges", type=_ints, default=[20, 40, 80], help="(default 20,40,80)")
    parser.add_argument("--have", type=int, default=0, help="seeds that there are: how many more it takes")
    parser.add_argument("--simulations", type=int, default=1000, help="of each row (default 1000)")
    parser.add_argument("--gpu-hours-per-cell", type=float, help="one arm at one seed (default: published, 180)")
    _add_common(parser)
    args = parser.parse_args(argv)
    _check_counts(args, "simulations", "processes")
    _check_power(args)
    from replication.analysis.power import (
        PUBLISHED_CELL_HOURS,
        PUBLISHED_SHARE,
        PUBLISHED_TIES,
        power_row,
        studies,
        with_cost,
    )
    from replication.analysis.power_report import write_power
    from replication.analysis.rows import compute_rows

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
    parser.add_argument("--random-seed", type=int, default=0, help="of the simulation (default 0)")
    parser.add_argument("--processes", type=int, help="at once (default: one a core)")


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if args.random_seed < 0:
        raise UserError(f"--random-seed: {args.random_seed} must be at least 0")


def _check_power(args: argparse.Namespace) -> None:
    if args.share is not None and not (0 < args.share < 1 and args.share != 0.5):
        raise UserError(f"--share: {args.share} must lie between 0 and 1, and not be 0.5, which is no preference")
    if args.ties is not None and not 0 <= args.ties < 1:
        raise UserError(f"--ties: {args.ties} must be at least 0 and below 1")
    if args.have < 0:
        raise UserError(f"--have: {args.have} must be at least 0")
    hours = args.gpu_hours_per_cell
    if hours is not None and not hours > 0:
        raise UserError(f"--gpu-hours-per-cell: {hours} must be above 0")
    for name in ("prompt", "judge", "seed_prompt", "seed_judge", "prompt_judge", "seed"):
        values = getattr(args, f"{name}_spread")
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not 0 <= value <= 0.5:
                raise UserError(f"--{name.replace('_', '-')}-spread: {value} must lie between 0 and 0.5")
    for name, least in (("seeds", 2), ("prompts", 2), ("judges", 2)):
        for value in getattr(args, name):
            if value < least:
                raise UserError(f"--{name}: {value} must be at least {least}; one has no spread")


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _ints(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


# ---------------------------------------------------------------- where the spreads come from


def _fitted(path: Path | None) -> Fitted | None:
    """Spreads of votes given: a folder of the published files, an output folder with votes.csv, or such a file."""
    if path is None:
        return None
    from replication.analysis.power import fit_ballots, fit_marginals
    from replication.analysis.preference import ballots
    from replication.votes import read_votes

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
    from replication.analysis.calibrate import JUDGE, PROMPT, SEED_PROMPT
    from replication.analysis.simulate import Spread

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
