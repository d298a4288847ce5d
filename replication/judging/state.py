"""How far a panel is, printed: judges, votes, sides, coverage, and how far from its plan. Knows no arm."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from replication.config import AnalysisConfig, load_suite
from replication.judging.attendance import fill
from replication.judging.database import Database
from replication.judging.folder import PanelFolder
from replication.judging.numbers import Share
from replication.judging.overview import JudgeState, Overview, gather
from replication.judging.store import Store
from replication.protocol.preregistration import read_plan
from replication.runs.layout import SuiteDir

DASH = "–"
WIDEST_NAME = 14  # that 80 columns hold beside the counts; a longer one goes on in the next line


def rules_of(folder: PanelFolder, database: Database) -> tuple[AnalysisConfig, tuple[int, int]]:
    """The suite's analysis section, and (judges, votes of each) that the panel is to come to.

    The registered plan says how many judges, people and models together; the panel how many votes each was given. Where
    the suite is not here the section has its defaults, and the panel says both.
    """
    panel = Store(database).panel()
    rules, judges = AnalysisConfig(), panel.planned_judges
    suite_dir = SuiteDir(folder.root)
    if suite_dir.suite.is_file():
        suite = load_suite(suite_dir.suite)
        rules = suite.analysis.resolved(suite.arms)
        record = read_plan(suite_dir)
        judges = record.plan.analysis.judges if record else judges
    return rules, (judges, panel.votes_per_judge)


def print_state(folder: PanelFolder, database: Database, console: Console) -> None:
    """The whole state, read in one consistent view."""
    rules, planned = rules_of(folder, database)
    o = gather(database)
    console.print(_judges(o), soft_wrap=False)
    if o.n_unclaimed:
        console.print(f"not taken:    {o.n_unclaimed} sets")
    console.print(f"votes:        {o.votes.part} of {o.votes.whole}, repeats and attention items included")
    left = o.left
    if left.value is not None and left.chance_margin is not None:
        low, high = 100 * (0.5 - left.chance_margin), 100 * (0.5 + left.chance_margin)
        console.print(
            f"left:         {100 * left.value:.1f} % of {left.whole} decisive first votes; by chance {low:.1f} to "
            f"{high:.1f} %"
        )
    if o.n_test_judges:
        console.print(f"left out:     {o.n_test_votes} votes of {o.n_test_judges} test judges, here and everywhere")
    console.print(f"coverage:     {_coverage(o)}")
    console.print(f"plan:         {fill(database, *planned, rules.judge_kinds).sentence}")
    if o.locked_at:
        early = f", early: {escape(o.lock_note)}" if o.lock_note else ""
        console.print(f"locked:       {o.locked_at}{early}")


def _judges(o: Overview) -> Table:
    table = Table(title=f"{escape(o.suite)}: judges")
    names = {judge.numbers.judge_id: escape(_name(judge)) for judge in o.judges}
    widest = max([len("judge"), *(len(word) for judge in o.judges for word in _name(judge).split())])
    table.add_column("judge", overflow="fold", min_width=min(widest, WIDEST_NAME))
    for name in ("votes", "ties", "both bad", "left", "median s", "attention", "repeats alike"):
        table.add_column(name, justify="right")
    for judge in o.judges:
        n = judge.numbers
        seconds = DASH if n.median_seconds is None else f"{n.median_seconds:.1f}"
        table.add_row(
            names[n.judge_id],
            f"{n.votes.part}/{n.votes.whole}",
            _percent(n.ties),
            _percent(n.both_bad),
            _percent(n.left),
            seconds,
            _of(n.attention),
            _of(n.repeats),
        )
    return table


def _name(judge: JudgeState) -> str:
    return judge.numbers.judge_id + (f" ({judge.vendor or 'model'})" if judge.kind == "model" else "")


def _coverage(o: Overview) -> str:
    cast = [sum(share.part for share in prompt.votes.values()) for prompt in o.coverage]
    if not cast:
        return "no prompts"
    none = sum(n == 0 for n in cast)
    return f"{len(cast)} prompts, each with {min(cast)} to {max(cast)} first votes" + (
        f"; {none} with none" if none else ""
    )


def _percent(share: Share) -> str:
    return DASH if share.value is None else f"{100 * share.value:.0f} %"


def _of(share: Share) -> str:
    return f"{share.part}/{share.whole}" if share.whole else DASH
