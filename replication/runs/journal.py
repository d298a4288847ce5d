"""The journal of a run, metrics.jsonl: written line by line, read whole or from its end, checked for gaps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from replication.errors import UserError
from replication.runs.files import naming, number, parse_objects, write_text
from replication.runs.layout import spans

MOST_STEPS = 10_000_000


class Journal:
    """Append-only metrics.jsonl: one object a line, each with its `step`.

    A training line has step, tokens, wall_seconds, data_hash, every scalar that goes to TensorBoard, and `per_step`
    with one value a step since the line before. A validation line has step and the val/ scalars. Readers merge by
    step. Numbers that are not finite are stored as null: missing is missing.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Open for appending; lines after resume_step, and a torn last line, are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_journal(path) if line["step"] <= resume_step]
        write_text(path, "".join(_dump(line) for line in kept))
        self.path = path
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115  (lives as long as the run)

    def append(self, line: dict[str, Any]) -> None:
        with naming(self.path):
            self._file.write(_dump(line).encode())
            self._file.flush()

    def sync(self) -> None:
        """Bring every line to the disk: before a checkpoint that stands for them."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # on a full disk, what append has said already
            self._file.close()


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(_finite(line), separators=(",", ":")) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; a torn or damaged line is passed over; no file is no lines.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    return [line for line in parse_objects(content) if has_step(line)]


def read_tail(path: Path, n_bytes: int = 16384) -> dict[str, Any] | None:
    """The last training line (one with `tokens`) of a journal, reading its end alone; None where there is none."""
    lines, is_whole = _end_of_journal(path, n_bytes)
    if not lines and not is_whole:
        return read_tail(path, n_bytes * 8)
    return lines[-1] if lines else None


def read_last_losses(path: Path, n_steps: int, n_bytes: int = 16384) -> tuple[int, list[float | None]]:
    """(last logged step, training losses in nats of at most n_steps steps up to it), reading a journal's end alone.

    A loss that was not finite is None.
    """
    lines, is_whole = _end_of_journal(path, n_bytes)
    losses = [loss for line in lines for loss in step_losses(line) if loss is None or number(loss) is not None]
    if len(losses) < n_steps and not is_whole:
        return read_last_losses(path, n_steps, n_bytes * 8)
    return (lines[-1]["step"] if lines else 0), losses[-n_steps:]


def _end_of_journal(path: Path, n_bytes: int) -> tuple[list[dict[str, Any]], bool]:
    """The training lines among the last bytes of a journal, and whether these are all of its bytes."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            size = file.tell()
            file.seek(max(0, size - n_bytes))
            content = file.read()
    except FileNotFoundError:
        return [], True
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    return [line for line in parse_objects(content) if has_step(line) and "tokens" in line], size <= n_bytes


def has_step(line: Mapping[str, Any]) -> bool:
    """Whether a journal's line says of which step it is; a number that no training reaches is damage."""
    step = line.get("step")
    return type(step) is int and 0 <= step <= MOST_STEPS


def step_losses(line: Mapping[str, Any]) -> list[Any]:
    """The training losses of a line, one a step since the line before, as they stand there."""
    per_step = line.get("per_step")
    losses = per_step.get("train/loss_nats") if isinstance(per_step, dict) else None
    return losses if isinstance(losses, list) else []


Logged = dict[int, dict[str, Any]]
"""Step -> what checks read of its lines: LOGGED_KEYS alone, so that many journals fit in memory."""
LOGGED_KEYS = ("tokens", "data_hash", "train/learning_rate", "train/loss_nats", "val/loss_nats")


def logged_steps(lines: Iterable[dict[str, Any]]) -> Logged:
    """What the checks need of a journal's lines, and as n_losses of how many steps a line has the losses.

    A later line of the same step wins.
    """
    found: Logged = {}
    for line in lines:
        entry = found.setdefault(line["step"], {})
        entry |= {key: line[key] for key in LOGGED_KEYS if key in line}
        if "tokens" in line:
            entry["n_losses"] = sum(loss is None or number(loss) is not None for loss in step_losses(line))
    return found


def due_validations(config: Mapping[str, Any]) -> set[int]:
    """The steps that a whole training validates at, of a config's dotted keys: every so many, and the last."""
    steps, every = config["training.steps"], config["validation.every_steps"]
    return {*range(every, steps, every), steps}


def journal_gaps(logged: Logged, steps: int, validations: Iterable[int]) -> list[str]:
    """What a journal lacks of the losses of steps up to `steps` and of the validations at those steps, a line each.

    Each training line has the losses of the steps since the line before, whatever the interval of lines was: together
    they have every step once.
    """
    times = [0] * (steps + 1)
    for step, entry in logged.items():
        for k in range(max(1, step - entry.get("n_losses", 0) + 1), min(step, steps) + 1):
            times[k] += 1
    odd = {
        "metrics.jsonl lacks the losses of": [k for k in range(1, steps + 1) if not times[k]],
        "metrics.jsonl has more than once": [k for k in range(1, steps + 1) if times[k] > 1],
        "metrics.jsonl lacks the validation of": [
            k for k in sorted(validations) if number(logged.get(k, {}).get("val/loss_nats")) is None
        ],
    }
    return [f"{what} {_steps(found)}" for what, found in odd.items() if found]


def _steps(found: list[int]) -> str:
    """`step 5` or `steps 6-20, 25`: runs of neighbours in brief, five of them."""
    runs = spans(found)
    return f"step{'s' if len(found) > 1 else ''} {', '.join(runs[:5] + (['...'] if len(runs) > 5 else []))}"
