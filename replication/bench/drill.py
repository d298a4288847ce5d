"""`replicate drill`: kill a run at random points, resume it, kill it again, compare the end with an undisturbed run.

The killed processes are the product's own `replicate train`, started as a user starts it, and SIGKILL comes from
outside: nothing in the run knows of it. Where the kill landed is read afterwards from the phase board, which survives
it (training/phases.py). On a CPU the ends must be equal bit for bit; on a GPU, where a rerun of the same seed may
already differ, that difference is the noise floor beside which the drill's own spread is shown.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from replication.config import Keys, RunConfig, flatten, refuse_differences, to_yaml, without_neutral
from replication.console import progress, say, table
from replication.errors import UserError
from replication.objectives.plugins import keep_plugins
from replication.processes.launcher import end
from replication.runs.failures import last_line
from replication.runs.files import read_object, write_json, write_text
from replication.runs.journal import read_journal
from replication.runs.layout import RunDir, SuiteDir, step_of
from replication.runs.records import read_record, to_json
from replication.training.phases import PHASES, VARIABLE, Board, Reading

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")
AIMS = {"mid-step": ("forward", "update"), "mid-accumulation": ("accumulate",), "mid-save": ("save",)}
"""Aims of a kill, as phases of the board; the next one aims where the fewest have landed."""
KILLS_A_RUN = 6
NOISE_FACTOR = 10.0
"""Times the distance of one rerun that a disturbed run may end away: both are single draws of the same noise."""
TIMING = ("wall_seconds", "train/tokens_per_second")
END_SECONDS = 120.0
"""Time for the rest of a run to end after a rank was killed."""


@dataclass
class Kill:
    """One SIGKILL, as the board showed the victim when it died."""

    aim: str
    phase: str
    step: int
    micro_batch: int
    ranks: list[int]
    restart: int  # 0: the first start of the run; 1: its first resume, and so on
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
    spread: float  # see `spread`
    faults: list[str]  # see `faults`


@dataclass
class StrategyResult:
    """The drill of one strategy."""

    strategy: str
    world_size: int
    accumulation: int
    noise_floor: float  # the spread between the undisturbed run and its rerun
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

    def to_dict(self) -> Mapping[str, object]:
        """What drill.json holds of it; what is computed is not read again."""
        return {**to_json(self), "holds": self.holds, "spread": self.spread}


@dataclass
class DrillResults:
    """All of drill.json."""

    config: Keys  # those that two calls of one drill must share: all but the strategy, and where the corpus lies
    strategies: list[StrategyResult]

    @classmethod
    def of(cls, config: RunConfig, path: Path) -> DrillResults:
        """The results of an earlier call, or none; raises UserError where it drilled another config or is damaged."""
        other = ("cluster.strategy", "data.dir", "data.num_proc", "generation.")
        shared = {k: v for k, v in flatten(without_neutral(config)).items() if not k.startswith(other)}
        earlier = read_record(path, cls)
        if earlier is None:
            return cls(shared, [])
        refuse_differences(f"{path}: of another config", earlier.config, shared, "choose another --out")
        return earlier


def drill(
    config: RunConfig, strategies: Sequence[str], out: Path, n_kills: int, seed: int, console: Console
) -> list[StrategyResult]:
    """Drill every strategy; results go to out/drill.json as they come, and a second call goes on from there.

    Kills are shared evenly among the strategies, and `seed` chooses their moments. Where the config names no data.dir,
    the corpus is prepared in out/data; plugins are those in out/plugins. single runs one process, the other strategies
    cluster.devices of them. Raises UserError where no such drill is possible, a run failed on its own, or out holds a
    drill of another config.
    """
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise UserError(f"--strategies: no strategy '{strategy}'; the strategies are {', '.join(STRATEGIES)}")
    if n_kills < len(strategies):
        raise UserError(f"--kills: {n_kills} leaves some of the {len(strategies)} strategies without one; raise it")
    every, steps = config.checkpoints.every_steps, config.training.steps
    if every > steps - 2:
        raise UserError(
            f"checkpoints.every_steps: the first of {every} comes too late in {steps} steps for a killed run to go on "
            f"from it; lower it, to {max(1, steps // 6)} for instance, or raise training.steps"
        )
    if config.data.dir is None:
        from replication.data.prepare import prepare

        prepare(config.data, out / "data", console)
        config = replace(config, data=replace(config.data, dir=str((out / "data").resolve())))
    there = DrillResults.of(config, out / "drill.json")
    results = []
    with progress(console, "bar", "count", "kills", "elapsed") as bars:
        for i, strategy in enumerate(strategies):
            share = n_kills * (i + 1) // len(strategies) - n_kills * i // len(strategies)
            devices = 1 if strategy == "single" else max(2, config.cluster.devices)
            cluster = replace(config.cluster, strategy=strategy, devices=devices)  # type: ignore[arg-type]
            own = replace(config, cluster=cluster, generation=replace(config.generation, prompts=None)).check()
            one = _Drill(own, out / strategy, random.Random(f"{seed}/{strategy}"))
            task = bars.add_task(strategy, total=share)
            result = next((result for result in there.strategies if result.strategy == strategy), None)
            if result is None:
                floor = one.noise_floor(bars.console)
                result = StrategyResult(strategy, own.world_size, own.accumulation, floor)
                there.strategies.append(result)
            results.append(result)
            bars.update(task, completed=len(result.kills))
            while len(result.kills) < share:
                one.disturb(result, share, partial(bars.advance, task))
                found = [done.to_dict() for done in there.strategies]
                write_json(out / "drill.json", {"config": there.config, "strategies": found})
    console.print(_table(results))
    for result in results:
        if not result.n_resumed:
            no = f"{result.strategy}: no killed run went on from a checkpoint, so nothing is shown"
            say(console, no, style="red")
    return results


class _Drill:
    """Starts, kills and compares the runs of one strategy."""

    def __init__(self, config: RunConfig, folder: Path, rng: random.Random) -> None:
        self.config, self.folder, self.rng = config, folder, rng
        self.phase_seconds = {phase: 0.003 for phases in AIMS.values() for phase in phases}
        self.aims = [aim for aim in AIMS if aim != "mid-accumulation" or config.accumulation > 1]

    def noise_floor(self, console: Console) -> float:
        """Run the undisturbed run and its rerun; how far apart they end."""
        for name in ("undisturbed", "rerun"):
            say(console, f"{self.config.cluster.strategy}: {name} run")
            with self._started(name) as (process, board):
                self._await_end(process, board, name)
        return spread(self._cell("rerun"), self._cell("undisturbed"))

    def disturb(self, result: StrategyResult, share: int, tick: Callable[[], None]) -> None:
        """One run that is killed several times, then left to end, then compared."""
        names = (f"killed-{n:02d}" for n in itertools.count(1))
        name = next(name for name in names if not (self.folder / name).exists())  # none of an interrupted drill's
        run, reference, kills = self._cell(name), self._cell("undisturbed"), list[Kill]()
        planned, ended = min(KILLS_A_RUN, share - len(result.kills)), False
        while not ended:
            complete = [step_of(p) for p in run.checkpoint_folders() if (p / "COMPLETE").is_file()]
            starting_step = max(complete, default=0)
            if kills:
                kills[-1].resumed_from = starting_step
            with self._started(name) as (process, board):
                kill = None
                if len(kills) < planned:
                    so_far = [*result.kills, *kills]
                    must_resume = len(kills) == planned - 1 and not any(k.resumed_from for k in so_far)
                    step = max(starting_step, self._moment(len(kills), planned, must_resume))
                    landed = Counter(k.landed for k in so_far)
                    aim = min(self.aims, key=lambda aim: landed[aim])
                    kill = self._kill(process, board, aim, step, len(kills))
                if kill is None:  # it ended before the moment came, or has been killed often enough
                    self._await_end(process, board, name)
                    ended = True
                else:
                    kills.append(kill)
                    tick()
        result.runs.append(Disturbed(name, kills, spread(run, reference), faults(run, reference)))

    def _moment(self, kill: int, kills: int, must_resume: bool) -> int:
        """Step from which on kill number `kill` (from 0) of so many strikes: anywhere in its own part of the run.

        It must resume where no kill before met a checkpoint: one must be there by then.
        """
        steps = self.config.training.steps
        first, last = steps * kill // kills, steps * (kill + 1) // kills - 1
        if must_resume:
            first = max(first, self.config.checkpoints.every_steps + 1)
        return self.rng.randint(first, max(first, last))

    def _kill(self, process: subprocess.Popen[bytes], board: Board, aim: str, step: int, restart: int) -> Kill | None:
        """Wait for a moment of the aim's kind from a step on, kill one rank or all; None where the run ended first."""
        everyone = range(self.config.world_size)
        victim = self.rng.randrange(self.config.world_size)
        ranks = list(everyone) if self.rng.random() < 0.5 else [victim]
        phase = self.rng.choice(AIMS[aim])
        while (reading := _slot(board, victim)) is None or phase not in _phases(board, reading) or reading.step < step:
            if process.poll() is not None:
                return None
            time.sleep(0.0002)
        time.sleep(self.rng.uniform(0, self.phase_seconds[phase]))
        _sigkill(board, ranks)
        last = _slot(board, victim)
        assert last is not None
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            _sigkill(board, everyone)
            raise UserError(
                f"{self.folder}: the other ranks did not end within {END_SECONDS:.0f} seconds after one was killed; "
                "see log.txt there"
            ) from None
        return Kill(aim, _phases(board, last)[0], last.step, last.micro_batch, ranks, restart)

    def _await_end(self, process: subprocess.Popen[bytes], board: Board, name: str) -> None:
        """Learn meanwhile how long each phase takes, so that later kills fall anywhere inside one."""
        seconds, visits = dict.fromkeys(PHASES, 0.0), Counter[str]()
        before, at = None, time.monotonic()
        while process.poll() is None:
            time.sleep(0.0005)
            reading, now = _slot(board, 0), time.monotonic()
            if reading is not None:
                phase = _phases(board, reading)[0]
                place = (reading.step, reading.micro_batch, phase)
                seconds[phase] += now - at
                visits[phase] += place != before
                before, at = place, now
        self.phase_seconds |= {p: seconds[p] / visits[p] for p in self.phase_seconds if visits[p]}
        if process.returncode:
            log = self.folder / name / "log.txt"
            last = last_line(log) or "no message"
            raise UserError(f"{self.folder / name}: the run failed on its own ({last[:200]}); see {log}")

    @contextlib.contextmanager
    def _started(self, name: str) -> Iterator[tuple[subprocess.Popen[bytes], Board]]:
        """The run's next start, as a user starts it; where the drill itself is interrupted, the run is ended too."""
        root = self.folder / name
        config, board_path = root / "drill.yaml", root / "phase_board"
        write_text(config, to_yaml(self.config))
        keep_plugins(sorted((self.folder.parent / "plugins").glob("*.py")), SuiteDir(root).plugins)
        board = Board(board_path, self.config.world_size, create=True)
        command = [sys.executable, "-P", "-m", "replication", "train", "--config", str(config), "--out", str(root)]
        with open(root / "log.txt", "ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=os.environ | {VARIABLE: str(board_path)}, start_new_session=True,
            )  # fmt: skip
        try:
            yield process, board
        except BaseException:
            end([process])
            raise

    def _cell(self, name: str) -> RunDir:
        return SuiteDir(self.folder / name).cell(self.config.arm, self.config.seed)


def _slot(board: Board, rank: int) -> Reading | None:
    return next((reading for reading in board.read() if reading.rank == rank), None)


def _phases(board: Board, reading: Reading) -> list[str]:
    """What a rank is at: first the save that any rank is writing beside its steps, then what the rank says itself."""
    return ["save"] * any(r.is_writing for r in board.read()) + [reading.phase]


def _sigkill(board: Board, ranks: Sequence[int]) -> None:
    for reading in board.read():
        if reading.rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(reading.pid, signal.SIGKILL)


def spread(run: RunDir, reference: RunDir) -> float:
    """Largest ||a - b||_F / ||b||_F over the final weight tensors of two runs; 0 only where they are bitwise equal."""
    import torch

    from replication.training.checkpoint_files import load_weights, newest_checkpoint

    folders = [newest_checkpoint(r)[0] for r in (run, reference)]
    a, b = (load_weights(folder) for folder in folders if folder is not None)
    if all(torch.equal(a[name], b[name]) for name in b):
        return 0.0
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in b) or sys.float_info.min


def faults(run: RunDir, reference: RunDir) -> list[str]:
    """Differences of a disturbed run's journal and manifest from the undisturbed ones, a line each."""
    a, b = read_object(run.manifest), read_object(reference.manifest)
    keys = ("step", "tokens", "data_chain", "initial_weights_sha256", "config_hash")
    found = [f"{key} is {a.get(key)}, undisturbed {b.get(key)}" for key in keys if a.get(key) != b.get(key)]
    lines = [
        [replace(line, values={k: v for k, v in line.values.items() if k not in TIMING}) for line in journal]
        for journal in (read_journal(r.metrics) for r in (run, reference))
    ]
    steps = [[(line.step, len(line.losses)) for line in part] for part in lines]

    def first_unlike(these: Sequence[object], those: Sequence[object]) -> str:
        unlike = (f"{str(x)[:100]} instead of {str(y)[:100]}" for x, y in zip(these, those, strict=False) if x != y)
        return next(unlike, f"{len(these)} lines instead of {len(those)}")

    if steps[0] != steps[1]:
        found.append(f"the journal holds other steps: {first_unlike(*steps)}")
    elif lines[0] != lines[1] and a.get("final_weights_sha256") == b.get("final_weights_sha256"):
        found.append(f"the journal has other values: {first_unlike(*lines)}")
    return found


def _table(results: Sequence[StrategyResult]) -> Table:
    """A column a strategy: kills by phase, kills of resumed runs, spread beside the noise floor, the verdict."""
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
        "holds": [Text("yes", "green") if r.holds else Text("no", "red") for r in results],
    }
    columns = ["", *(f">{r.strategy}" for r in results)]
    return table("killed and resumed runs beside an undisturbed one", columns, [(k, *v) for k, v in rows.items()])
