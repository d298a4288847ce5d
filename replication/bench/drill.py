"""`replicate drill`: kill a run at random points, resume it, kill it again, compare the end with an undisturbed run.

The killed processes are the product's own `replicate train`, started as a user starts it, and SIGKILL comes from
outside: nothing in the run knows of it. Where the kill landed is read afterwards from the phase board, which survives
it (training/phases.py). On a CPU the ends must be equal bit for bit; on a GPU, where a rerun of the same seed may
already differ, that difference is the noise floor beside which the drill's own spread is shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from replication.config import RunConfig, flatten, refuse_differences, to_dict, to_yaml
from replication.errors import UserError
from replication.runs.failures import last_line
from replication.runs.files import read_json, write_json, write_text
from replication.runs.journal import read_journal
from replication.runs.layout import RunDir, SuiteDir, step_of
from replication.training.phases import VARIABLE, Board, Reading

AIMS = {"mid-step": ("forward", "update"), "mid-accumulation": ("accumulate",), "mid-save": ("save",)}
"""What a kill aims at, as phases of the board; the next one aims where the fewest have landed."""
KILLS_A_RUN = 6
NOISE_FACTOR = 10.0
"""How many times the distance of one rerun a disturbed run may end away: both are single draws of the same noise."""
TIMING = ("wall_seconds", "train/tokens_per_second")
END_SECONDS = 120.0
"""How long the rest of a run may take to end after a rank was killed."""


@dataclass
class Kill:
    """One SIGKILL, as the board showed the victim when it died."""

    aim: str
    phase: str
    step: int
    micro_batch: int
    ranks: list[int]
    restart: int
    """0: the first start of the run; 1: its first resume, and so on."""
    resumed_from: int | None = None
    """Step of the checkpoint that the next start went on from (0: none); None until it started."""

    @property
    def landed(self) -> str:
        """The aim that the phase belongs to, or the phase itself."""
        return next((aim for aim, phases in AIMS.items() if self.phase in phases), self.phase)


@dataclass
class Disturbed:
    """One run that was killed and resumed, beside the undisturbed one."""

    name: str
    kills: list[Kill]
    spread: float
    """Largest ||a - b||_F / ||b||_F over the weight tensors; 0 means bitwise equal."""
    faults: list[str]
    """Lines about lost or repeated steps, the hash chain, the journal; empty where all is equal."""


@dataclass
class StrategyResult:
    """The drill of one strategy."""

    strategy: str
    world_size: int
    accumulation: int
    noise_floor: float
    """The same measure between the undisturbed run and its rerun."""
    runs: list[Disturbed] = field(default_factory=list)

    @property
    def kills(self) -> list[Kill]:
        return [kill for run in self.runs for kill in run.kills]

    @property
    def n_resumed(self) -> int:
        """Kills after which the run went on from a checkpoint, not from the start."""
        return sum(bool(kill.resumed_from) for kill in self.kills)

    @property
    def spread(self) -> float:
        return max((run.spread for run in self.runs), default=0.0)

    @property
    def holds(self) -> bool:
        """Resumed from a checkpoint, no step lost or repeated, and ends as near to the undisturbed run as a rerun's.

        That is to a factor of 10 in the weights; where a rerun is bitwise equal, as on a CPU, so must they be.
        """
        equal = not any(run.faults for run in self.runs) and self.spread <= NOISE_FACTOR * self.noise_floor
        return equal and self.n_resumed > 0


def drill(
    config: RunConfig, strategies: Sequence[str], out: Path, n_kills: int, seed: int, console: Console
) -> list[StrategyResult]:
    """Drill every strategy; results go to out/drill.json as they come, and a second call goes on from there.

    Args:
        config: what to train; its data.dir is prepared.
        strategies: values of cluster.strategy; single runs one process, the others cluster.devices of them.
        out: folder of the runs.
        n_kills: in all, shared evenly among the strategies.
        seed: of the choice of the moments.
        console: for progress and the table.

    Raises:
        UserError: a run failed on its own, or out holds a drill of another config.
    """
    kept = _earlier_results(config, out)
    results: list[StrategyResult] = []
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("kills"),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for i, strategy in enumerate(strategies):
            share = n_kills * (i + 1) // len(strategies) - n_kills * i // len(strategies)
            one = _Drill(_with_strategy(config, strategy), out / strategy, random.Random(f"{seed}/{strategy}"))
            task = progress.add_task(strategy, total=share)
            tick = functools.partial(progress.advance, task)
            result = kept.get(strategy) or StrategyResult(
                strategy, one.config.world_size, one.config.accumulation, one.noise_floor(progress.console)
            )
            results.append(result)
            progress.update(task, completed=len(result.kills))
            while len(result.kills) < share:
                one.disturb(result, share, tick)
                _write_results(config, out, kept | {r.strategy: r for r in results})
    console.print(result_table(results))
    for result in results:
        if not result.n_resumed:
            console.print(f"[red]{result.strategy}: no killed run went on from a checkpoint, so nothing is shown[/]")
    return results


def check_saves(config: RunConfig) -> None:
    """Raise UserError where no checkpoint is saved that a killed run could go on from."""
    every, steps = config.checkpoints.every_steps, config.training.steps
    if every > steps - 2:
        raise UserError(
            f"checkpoints.every_steps: the first of {every} comes too late in {steps} steps for a killed run to go on "
            f"from it; lower it, to {max(1, steps // 6)} for instance, or raise training.steps"
        )


def _with_strategy(config: RunConfig, strategy: str) -> RunConfig:
    devices = 1 if strategy == "single" else max(2, config.cluster.devices)
    cluster = dataclasses.replace(config.cluster, strategy=strategy, devices=devices)  # type: ignore[arg-type]
    generation = dataclasses.replace(config.generation, prompts=None)
    return dataclasses.replace(config, cluster=cluster, generation=generation).check()


# ---------------------------------------------------------------- one strategy


class _Drill:
    """Starts, kills and compares the runs of one strategy."""

    def __init__(self, config: RunConfig, folder: Path, rng: random.Random) -> None:
        self.config, self.folder, self.rng = config, folder, rng
        self.undisturbed = self._cell("undisturbed")
        self.phase_seconds = {phase: 0.003 for phases in AIMS.values() for phase in phases}
        self.aims = [aim for aim in AIMS if aim != "mid-accumulation" or config.accumulation > 1]

    def noise_floor(self, console: Console) -> float:
        """Run the undisturbed run and its rerun; how far apart they end."""
        for name in ("undisturbed", "rerun"):
            console.print(f"{self.config.cluster.strategy}: {name} run")
            with self._started(name) as (process, board):
                self._watch(process, board)
            self._check_ended(process, name)
        return spread(self._cell("rerun"), self.undisturbed)

    def disturb(self, result: StrategyResult, share: int, tick: Callable[[], None]) -> None:
        """One run that is killed several times, then left to end, then compared."""
        name = self._next_name()
        run, kills = self._cell(name), list[Kill]()
        before = len(result.kills)
        planned = min(KILLS_A_RUN, share - before)
        while True:
            starting_step = newest_step(run)
            if kills:
                kills[-1].resumed_from = starting_step
            kill = None
            with self._started(name) as (process, board):
                if len(kills) < planned:
                    must_resume = len(kills) == planned - 1 and not any(k.resumed_from for k in [*result.kills, *kills])
                    step = max(starting_step, self._moment(len(kills), planned, must_resume))
                    kill = self._kill(process, board, self._next_aim([*result.kills, *kills]), step, len(kills))
                if kill is None:  # it ended before the moment came, or has been killed often enough
                    self._watch(process, board)
            if kill is None:
                self._check_ended(process, name)
                break
            kills.append(kill)
            tick()
        result.runs.append(Disturbed(name, kills, spread(run, self.undisturbed), faults(run, self.undisturbed)))

    def _next_name(self) -> str:
        """A name that no folder has; what an interrupted drill left half killed is not gone on with."""
        n = 1
        while (self.folder / f"killed-{n:02d}").exists():
            n += 1
        return f"killed-{n:02d}"

    def _next_aim(self, kills: Sequence[Kill]) -> str:
        landed = Counter(kill.landed for kill in kills)
        return min(self.aims, key=lambda aim: landed[aim])

    def _moment(self, kill: int, kills: int, must_resume: bool) -> int:
        """Step from which on kill number `kill` of so many strikes: anywhere in its own part of the run.

        Args:
            kill: from 0.
            kills: planned in this run.
            must_resume: whether a checkpoint must be there by then, because no kill before met one.
        """
        steps = self.config.training.steps
        first, last = steps * kill // kills, steps * (kill + 1) // kills - 1
        if must_resume:
            first = max(first, self.config.checkpoints.every_steps + 1)
        return self.rng.randint(first, max(first, last))

    def _kill(self, process: subprocess.Popen[bytes], board: Board, aim: str, step: int, restart: int) -> Kill | None:
        """Wait for a moment of the aim's kind from a step on, kill one rank or all; None where the run ended first."""
        victim = self.rng.randrange(self.config.world_size)
        ranks = list(range(self.config.world_size)) if self.rng.random() < 0.5 else [victim]
        phases = [self.rng.choice(AIMS[aim])]
        while (reading := _slot(board, victim)) is None or reading.phase not in phases or reading.step < step:
            if process.poll() is not None:
                return None
            time.sleep(0.0002)
        time.sleep(self.rng.uniform(0, self.phase_seconds[phases[0]]))
        for reading in board.read():
            if reading.rank in ranks:
                _sigkill(reading.pid)
        last = _slot(board, victim)
        assert last is not None
        self._wait_for_the_rest(process, board)
        return Kill(aim, last.phase, last.step, last.micro_batch, ranks, restart)

    def _wait_for_the_rest(self, process: subprocess.Popen[bytes], board: Board) -> None:
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            for reading in board.read():
                _sigkill(reading.pid)
            raise UserError(
                f"{self.folder}: the other ranks did not end within {END_SECONDS:.0f} seconds after one was killed; "
                "see log.txt there"
            ) from None

    def _watch(self, process: subprocess.Popen[bytes], board: Board) -> None:
        """Wait for the end; learn how long each phase takes, so that later kills fall anywhere inside one."""
        seconds: Counter[str] = Counter()
        visits: Counter[str] = Counter()
        before, at = None, time.monotonic()
        while process.poll() is None:
            time.sleep(0.0005)
            reading, now = _slot(board, 0), time.monotonic()
            if reading is None:
                continue
            place = (reading.step, reading.micro_batch, reading.phase)
            seconds[reading.phase] += now - at  # type: ignore[assignment]
            visits[reading.phase] += place != before
            before, at = place, now
        for phase in self.phase_seconds:
            if visits[phase]:
                self.phase_seconds[phase] = seconds[phase] / visits[phase]

    @contextlib.contextmanager
    def _started(self, name: str) -> Iterator[tuple[subprocess.Popen[bytes], Board]]:
        """The run's next start; where the drill itself is interrupted, the run is interrupted too and waited for."""
        process, board = self._start(name)
        try:
            yield process, board
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise

    def _start(self, name: str) -> tuple[subprocess.Popen[bytes], Board]:
        suite = SuiteDir(self.folder / name)
        config = suite.root / "drill.yaml"
        write_text(config, to_yaml(self.config))
        board_path = suite.root / "phase_board"
        board = Board(board_path, self.config.world_size, create=True)
        command = [sys.executable, "-P", "-m", "replication", "train", "--config", str(config)]
        command += ["--out", str(suite.root)]
        with open(suite.root / "log.txt", "ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=os.environ | {VARIABLE: str(board_path)}, start_new_session=True,
            )  # fmt: skip
        return process, board

    def _check_ended(self, process: subprocess.Popen[bytes], name: str) -> None:
        if process.returncode:
            log = self.folder / name / "log.txt"
            last = last_line(log) or "no message"
            raise UserError(f"{self.folder / name}: the run failed on its own ({last[:200]}); see {log}")

    def _cell(self, name: str) -> RunDir:
        return SuiteDir(self.folder / name).cell(self.config.arm, self.config.seed)


def _slot(board: Board, rank: int) -> Reading | None:
    return next((reading for reading in board.read() if reading.rank == rank), None)


def _sigkill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------- comparing two ends


def newest_step(run: RunDir) -> int:
    """Step of the newest complete checkpoint, by its marker alone; 0 where there is none."""
    return max((step_of(p) for p in run.checkpoint_folders() if (p / "COMPLETE").is_file()), default=0)


def spread(run: RunDir, reference: RunDir) -> float:
    """Largest ||a - b||_F / ||b||_F over the final weight tensors of two runs; 0 only where they are bitwise equal."""
    import torch

    from replication.training.checkpoints import load_weights, newest_checkpoint

    folders = [newest_checkpoint(r)[0] for r in (run, reference)]
    a, b = (load_weights(folder) for folder in folders if folder is not None)
    if all(torch.equal(a[name], b[name]) for name in b):
        return 0.0
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in b) or sys.float_info.min


def faults(run: RunDir, reference: RunDir) -> list[str]:
    """What a disturbed run's journal and manifest have that the undisturbed ones do not, a line each."""
    found = []
    a, b = read_json(run.manifest), read_json(reference.manifest)
    for key in ("step", "tokens", "data_chain", "initial_weights_sha256", "config_hash"):
        if a.get(key) != b.get(key):
            found.append(f"{key} is {a.get(key)}, undisturbed {b.get(key)}")
    lines = [[_untimed(line) for line in read_journal(r.metrics)] for r in (run, reference)]
    steps = [[(line["step"], len(line.get("per_step", {}).get("train/loss_nats", []))) for line in part]
             for part in lines]  # fmt: skip
    if steps[0] != steps[1]:
        found.append(f"the journal holds other steps: {_first_unlike(*steps)}")
    elif lines[0] != lines[1] and a.get("final_weights_sha256") == b.get("final_weights_sha256"):
        found.append(f"the journal has other values: {_first_unlike(*lines)}")
    return found


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in TIMING}


def _first_unlike(a: Sequence[Any], b: Sequence[Any]) -> str:
    for left, right in zip(a, b, strict=False):
        if left != right:
            return f"{str(left)[:100]} instead of {str(right)[:100]}"
    return f"{len(a)} lines instead of {len(b)}"


# ---------------------------------------------------------------- results


def result_table(results: Sequence[StrategyResult]) -> Table:
    """A column a strategy: kills by phase, kills of resumed runs, spread beside the noise floor, the verdict."""
    table = Table("", title="killed and resumed runs beside an undisturbed one")
    landed = [Counter(kill.landed for kill in r.kills) for r in results]
    rows: dict[str, list[object]] = {
        "ranks": [r.world_size for r in results],
        "micro-batches a step": [r.accumulation for r in results],
        "runs": [len(r.runs) for r in results],
        "kills": [len(r.kills) for r in results],
        **{f"  {aim}": [n[aim] for n in landed] for aim in AIMS},
        "  elsewhere": [sum(n.values()) - sum(n[aim] for aim in AIMS) for n in landed],
        "resumed from a checkpoint": [r.n_resumed for r in results],
        "of a resumed run": [sum(kill.restart > 0 for kill in r.kills) for r in results],
        "of one rank alone": [sum(len(kill.ranks) < r.world_size for kill in r.kills) for r in results],
        "noise floor": [f"{r.noise_floor:.1e}" for r in results],
        "spread": [f"{r.spread:.1e}" for r in results],
        "lost or repeated steps": [sum(bool(run.faults) for run in r.runs) for r in results],
        "holds": ["[green]yes[/]" if r.holds else "[red]no[/]" for r in results],
    }
    for r in results:
        table.add_column(r.strategy, justify="right")
    for name, values in rows.items():
        table.add_row(name, *map(str, values))
    return table


def _write_results(config: RunConfig, out: Path, results: dict[str, StrategyResult]) -> None:
    plain = [asdict(r) | {"holds": r.holds, "spread": r.spread} for r in results.values()]
    write_json(out / "drill.json", {"config": _compared(config), "strategies": plain})


def _compared(config: RunConfig) -> dict[str, Any]:
    """Every key that two calls of one drill must share: all but the strategy, and where the corpus lies."""
    other = ("cluster.strategy", "data.dir", "data.num_proc", "generation.")
    return {k: v for k, v in flatten(to_dict(config)).items() if not k.startswith(other)}


def _earlier_results(config: RunConfig, out: Path) -> dict[str, StrategyResult]:
    """What an earlier call found in this folder, by strategy.

    Raises:
        UserError: it drilled another config.
    """
    earlier = read_json(out / "drill.json")
    if earlier is None:
        return {}
    what = f"{out / 'drill.json'}: of another config"
    refuse_differences(what, earlier.get("config", {}), _compared(config), "choose another --out")
    results = {}
    for plain in json.loads(json.dumps(earlier["strategies"])):
        runs = [Disturbed(**(run | {"kills": [Kill(**kill) for kill in run["kills"]]})) for run in plain["runs"]]
        known = {f.name: plain[f.name] for f in dataclasses.fields(StrategyResult)}
        results[plain["strategy"]] = StrategyResult(**(known | {"runs": runs}))
    return results
