"""`python tests/load_test blinding`: can anybody tell from what the server sends on which side the treatment is?

Two experiments. In the first both arms' texts come from one model, so that whatever tells the sides apart is not in the
texts. In the second the arms write differently, but each completion is replaced by one placeholder when the panel is
made. A panel is built through the real design, every item is fetched through the real server over HTTP, and a
classifier is taught the treatment's side from everything that came (features.py), on some prompts and judges, and asked
about others (classifier.py). The blinding holds where the interval of its AUC contains one half.

Decided beforehand, for both experiments: the logistic regression on everything decides; gradient boosting on the
numbers alone stands beside it, for what is not linear. One experiment in twenty misses one half by chance; how often
the interval does so with these pages and scores, when each judge's sides are dealt anew, is printed beside it.
`--leak` plants a leak, in this process alone: a test that did not find it would prove nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from classifier import Auc, auc, blocks, permuted, scores
from features import as_ranks, cut, matrix, numbers
from fetched_pages import Seen, fetch_all, truths
from leak import LEAKS, leaking_server
from rich.console import Console
from rich.status import Status
from rich.table import Table
from server_child import ServerChild
from synthetic import ARMS, completions

from replication.cli.arguments import COUNT, NATURAL, whole
from replication.errors import UserError
from replication.generation.completions import Completion, suite_completions
from replication.judging.completions import Completions
from replication.judging.database import Database
from replication.judging.panel import PanelOptions, create_panel, invite
from replication.runs.files import write_json
from replication.runs.layout import SuiteDir

EXPERIMENTS: Final = {
    "alike": "both arms' texts from one model",
    "placeholder": "real pairs, every text replaced",
}
PRIMARY: Final = "everything"
CLASSIFIERS: Final = {"everything": "logistic regression on everything", "numbers": "boosting on the numbers"}
PLACEHOLDER: Final = "This text stands where a completion was."
VOTES_PER_JUDGE: Final = 32
REPEAT_SHARE: Final = 0.1
PERMUTATIONS: Final = 100


@dataclass
class Result:
    """One experiment."""

    experiment: str
    leak: str
    items: int
    judges: int
    prompts: int
    treatment_left: float
    """Share of items."""
    auc: dict[str, Auc]
    false_alarms: float
    """Share of permutations of the labels within judges in which the primary interval misses one half."""
    different_files: int
    """How many different static answers there were, of two files, the date apart."""
    fetch_seconds: float
    classify_seconds: float

    @property
    def holds(self) -> bool:
        return self.auc[PRIMARY].is_chance

    @property
    def is_found(self) -> bool:
        return self.auc[PRIMARY].low > 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `blinding`."""
    parser.add_argument("--items", type=COUNT, default=10_000, help="shown items of each experiment (default 10000)")
    parser.add_argument("--folds", type=whole(2), default=5, help="of prompts, and of judges (default 5)")
    parser.add_argument("--completions", type=Path, metavar="DIR", help="a suite's folder (default: synthetic texts)")
    parser.add_argument("--arms", nargs=2, default=ARMS, metavar=("BASELINE", "TREATMENT"), help="of that suite; the "
                        "first one's completions serve both sides of the first experiment "
                        f"(default: {' '.join(ARMS)})")  # fmt: skip
    parser.add_argument("--experiment", choices=("both", *EXPERIMENTS), default="both", help="default both")
    parser.add_argument("--leak", choices=tuple(LEAKS), default="none", help="plant a leak, which must be found: "
                        + "; ".join(f"{name}: {text}" for name, text in LEAKS.items() if name != "none"))  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep panels, all that was sent, and blinding.json "
                        "there (default: a folder that is removed)")  # fmt: skip
    parser.add_argument("--seed", type=NATURAL, default=0, help="of texts, votes, folds and permutations (default 0)")


def run(args: argparse.Namespace, console: Console) -> int:
    """The command: 0 where the blinding holds, or the planted leak was found."""
    if args.items < 100 * args.folds:
        raise UserError(f"--items: {args.items} must be at least {100 * args.folds} for {args.folds} folds")
    if args.arms[0] == args.arms[1]:
        raise UserError(f"--arms: names {args.arms[0]} twice; give two arms")
    names = list(EXPERIMENTS) if args.experiment == "both" else [args.experiment]
    results = []
    with _folder(args.out) as folder, console.status("") as status:
        for name in names:
            say = partial(_say, status, name)
            results.append(_experiment(name, args, folder / name, say))
        if args.out:
            write_json(folder / "blinding.json", [_as_json(result) for result in results])
    print_results(results, console)
    if args.out:
        console.print(f"every figure: {args.out / 'blinding.json'}", soft_wrap=True)
    good = [result.holds if args.leak == "none" else result.is_found for result in results]
    return 0 if all(good) else 1


def _say(status: Status, name: str, text: str) -> None:
    status.update(f"{name}: {text}")


def _experiment(name: str, args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> Result:
    """Make the panel, fetch it, run the classifier two-sample test."""
    suite = SuiteDir(folder)
    suite.judging.mkdir(parents=True, exist_ok=True)
    address = str(suite.judging / "panel.sqlite")
    database = Database(address)
    try:
        say("making the panel")
        links = _make_panel(name, args, suite, database)
        began = time.monotonic()
        with _server(database, address, suite, args.leak) as base:
            seen = fetch_all(base, links, args.seed, say)
        fetched = time.monotonic() - began
        if args.out:
            _write_seen(folder / "seen.jsonl.gz", seen)
        say("classifying")
        return two_sample_test(name, args.leak, seen, database, suite.sealed, args.folds, args.seed, fetched)
    finally:
        database.close()


def two_sample_test(
    name: str,
    leak: str,
    seen: list[Seen],
    database: Database,
    sealed: Path,
    n_folds: int,
    seed: int,
    fetched: float = 0,
) -> Result:
    """Open the seal, teach and ask the classifiers."""
    began = time.monotonic()
    behind_all = truths(database, sealed)
    seen = [one for one in seen if one.impression in behind_all]
    behind = [behind_all[one.impression] for one in seen]
    labels = np.array([b.treatment_left for b in behind], dtype=int)
    parts = [cut(one) for one in seen]
    ranks = as_ranks(numbers(seen, parts))
    where = blocks(behind, n_folds, seed)
    score = scores(matrix(parts, ranks), ranks, labels, where)
    rng = np.random.default_rng(seed)
    anew = [auc(score[PRIMARY], permuted(labels, behind, rng), where) for _ in range(PERMUTATIONS)]
    files = {("\n".join(line for line in a.head.split("\n") if not line.lower().startswith("date:")), a.body)
             for one in seen for a in one.files}  # fmt: skip
    return Result(
        experiment=name,
        leak=leak,
        items=len(seen),
        judges=len({b.judge for b in behind}),
        prompts=len({b.prompt for b in behind}),
        treatment_left=float(labels.mean()),
        auc={classifier: auc(score[classifier], labels, where) for classifier in score},
        false_alarms=float(np.mean([not one.is_chance for one in anew])),
        different_files=len(files),
        fetch_seconds=fetched,
        classify_seconds=time.monotonic() - began,
    )


# ---------------------------------------------------------------- the panel


def _make_panel(name: str, args: argparse.Namespace, suite: SuiteDir, database: Database) -> list[str]:
    """A panel with enough judges; their links."""
    places = VOTES_PER_JUDGE + math.ceil(REPEAT_SHARE * VOTES_PER_JUDGE)
    n_judges = math.ceil(args.items / places)
    texts = _texts(name, args, n_judges)
    options = PanelOptions(n_judges, VOTES_PER_JUDGE, REPEAT_SHARE, attention=0, open_link=False)
    create_panel(database, suite.sealed, "blinding", texts, tuple(args.arms), options)
    names = [f"judge-{n:03d}" for n in range(1, n_judges + 1)]
    return list(invite(database, names).values())


def _texts(name: str, args: argparse.Namespace, n_judges: int) -> Completions:
    baseline, treatment = args.arms
    if args.completions is None:
        # a judge's votes are one row of the design, and three rows use each completion of a seed once
        found = completions(math.ceil(n_judges / 3), args.seed, alike=name == "alike")
        arms = dict(zip(ARMS, args.arms, strict=True))
        found = {
            s: {arms[arm]: [replace(c, arm=arms[arm]) for c in cs] for arm, cs in of.items()} for s, of in found.items()
        }
    else:
        found = suite_completions(SuiteDir(args.completions), args.arms)
        if not found:
            raise UserError(
                f"--completions: {args.completions} has no seed with completions of {baseline} and {treatment}"
            )
        if name == "alike":
            found = deal([c for of_arm in found.values() for c in of_arm[baseline]], args.arms, args.seed)
    if name == "placeholder":
        found = {
            s: {arm: [replace(c, text=PLACEHOLDER) for c in cs] for arm, cs in of.items()} for s, of in found.items()
        }
    return found


def deal(one_arm: list[Completion], arms: tuple[str, str], seed: int) -> Completions:
    """One arm's completions dealt out at random as those of two arms: pairs of synthetic seeds with one sample each."""
    rng = Random(f"{seed}/deal")
    by_prompt: dict[int, list[Completion]] = {}
    for c in one_arm:
        by_prompt.setdefault(c.prompt_id, []).append(c)
    n_pairs = min(len(cs) for cs in by_prompt.values()) // 2
    dealt = {prompt: rng.sample(cs, 2 * n_pairs) for prompt, cs in by_prompt.items()}
    return {
        s: {
            arm: [replace(cs[2 * s + i], arm=arm, seed=s, sample=0) for cs in dealt.values()]
            for i, arm in enumerate(arms)
        }
        for s in range(n_pairs)
    }


@contextlib.contextmanager
def _server(database: Database, address: str, suite: SuiteDir, leak: str) -> Iterator[str]:
    """The product's server in its own process; with a leak, around its app in this one."""
    if leak == "none":
        with ServerChild(address, suite.root / "server.log", durable=False) as child:
            yield child.base
    else:
        with leaking_server(database, suite.sealed, leak) as base:
            yield base


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="blinding-") as name:
        yield Path(name)


# ---------------------------------------------------------------- results


def _write_seen(path: Path, seen: list[Seen]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        for one in seen:
            file.write(json.dumps(asdict(one)) + "\n")


def _as_json(result: Result) -> dict[str, Any]:
    return asdict(result) | {"primary": PRIMARY, "holds": result.holds, "is_found": result.is_found}


def print_results(results: list[Result], console: Console) -> None:
    """A table, a line an experiment, the verdict."""
    table = Table(title="AUC: 0.5 is chance, 1 is knowing the treatment's side")
    for column in ("experiment", "classifier", "items", "AUC", "95 % interval", ""):
        table.add_column(column, justify="right" if column in ("items", "AUC") else "left")
    for result in results:
        for name, value in result.auc.items():
            words = "decides" if name == PRIMARY else "beside it"
            interval = f"{value.low:.4f} to {value.high:.4f} (± {value.half_width:.4f})"
            label = EXPERIMENTS[result.experiment]
            table.add_row(label, CLASSIFIERS[name], f"{result.items:,}", f"{value.value:.4f}", interval, words)
    console.print(table)
    for r in results:
        console.print(
            f"{r.experiment}: {r.judges} judges, {r.prompts} prompts, treatment on the left in "
            f"{100 * r.treatment_left:.1f} %; with each judge's sides dealt anew the interval misses one half in "
            f"{100 * r.false_alarms:.1f} % of {PERMUTATIONS}; {r.different_files} different static files; fetched in "
            f"{r.fetch_seconds:.0f} s, classified in {r.classify_seconds:.0f} s"
        )
        if r.leak == "none":
            verdict = "nothing tells the side" if r.holds else "SOMETHING TELLS THE SIDE, or this is the one in twenty"
        else:
            verdict = f"the planted leak ({r.leak}) " + ("is found" if r.is_found else "is NOT found")
        console.print(f"[bold]{r.experiment}: {verdict}[/bold]")
