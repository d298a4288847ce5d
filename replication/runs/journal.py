"""The journal of a run, metrics.jsonl: written line by line, read whole or from its end, checked for gaps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from replication.errors import UserError
from replication.runs.files import naming, number, parse_objects, write_text
from replication.runs.layout import spans

MOST_STEPS = 10_000_000


@dataclass(frozen=True, slots=True)
class Line:
    """One line: of training, with the scalars of a step and the per-step values since the line before; or of a
    validation, with the val/ scalars. Readers merge lines by step."""

    step: int
    values: Mapping[str, Any]
    """All else, as it stands in the file: tokens, wall_seconds and data_hash (the hash chain of the data fed so far) of
    a training line, and every scalar that goes to TensorBoard. null is missing."""
    per_step: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Tag -> one value a step, the last one of this step."""
    per_sequence: Sequence[Any] = ()
    """Of a validation, one value a sequence of the validation set, whose mean is val/loss_nats."""

    @property
    def is_training(self) -> bool:
        return "tokens" in self.values

    def number(self, tag: str) -> float | None:
        """A value, where it is a finite number."""
        return number(self.values.get(tag))

    @property
    def losses(self) -> list[float | None]:
        """The training losses in nats since the line before, None for one that was not finite."""
        found = self.per_step.get("train/loss_nats", ())
        return [number(loss) for loss in found if loss is None or number(loss) is not None]


def parse_line(content: bytes) -> Line | None:
    """A line of the file; None where it is torn, damaged or says of no step (one that no training reaches is none)."""
    value = next(parse_objects(content), None)
    step = None if value is None else value.pop("step", None)
    if value is None or type(step) is not int or not 0 <= step <= MOST_STEPS:
        return None
    per_step, per_sequence = value.pop("per_step", None), value.pop("per_sequence", None)
    lists = per_step.items() if isinstance(per_step, dict) else ()
    by_tag = {tag: values for tag, values in lists if isinstance(values, list)}
    return Line(step, value, by_tag, per_sequence if isinstance(per_sequence, list) else ())


class Journal:
    """Append-only metrics.jsonl. Numbers that are not finite are stored as null: missing is missing."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Open for appending; lines after resume_step, and a torn last line, are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_journal(path) if line.step <= resume_step]
        write_text(path, "".join(_dump(line) for line in kept))
        self.path = path
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115  (lives as long as the run)

    def append(self, line: Line) -> None:
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


def _dump(line: Line) -> str:
    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {k: finite(v) for k, v in value.items()}
        return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value

    lists = {"per_step": line.per_step, "per_sequence": line.per_sequence}
    tree = {"step": line.step, **line.values} | {key: values for key, values in lists.items() if values}
    return json.dumps(finite(tree), separators=(",", ":")) + "\n"


def read_journal(path: Path) -> list[Line]:
    """Every whole line, in order; a torn or damaged line is passed over; no file is no lines."""
    return _read(path, None)[0]


def read_tail(path: Path) -> Line | None:
    """The last training line of a journal, reading its end alone; None where there is none."""
    return next(reversed(_last_training(path, 0)), None)


def read_last_losses(path: Path, n_steps: int) -> tuple[int, list[float | None]]:
    """(last logged step, training losses in nats of at most n_steps steps up to it, None: not finite), from its end."""
    training = _last_training(path, n_steps)
    return (training[-1].step if training else 0), [loss for line in training for loss in line.losses][-n_steps:]


def _last_training(path: Path, n_losses: int) -> list[Line]:
    """Training lines up to the last, at least one, and with as many losses, where the journal has them."""
    n_bytes = 16384
    while True:
        lines, is_whole = _read(path, n_bytes)
        training = [line for line in lines if line.is_training]
        if is_whole or (training and sum(len(line.losses) for line in training) >= n_losses):
            return training
        n_bytes *= 8


def _read(path: Path, n_bytes: int | None) -> tuple[list[Line], bool]:
    """The lines among the last bytes of a journal (None: all), and whether these are all; UserError: no reading it."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0 if n_bytes is None else max(0, size - n_bytes))
            content = file.read()
    except FileNotFoundError:
        return [], True
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    lines = [line for raw in content.splitlines() if (line := parse_line(raw))]
    return lines, n_bytes is None or size <= n_bytes


@dataclass(slots=True)
class LoggedStep:
    """The lines of one step as checks need them, and no more, so that many journals fit in memory."""

    is_training: bool = False
    n_losses: int = 0  # steps up to this one whose losses its training line has
    data_hash: str | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None


Logged = Mapping[int, LoggedStep]  # by step


def logged_steps(lines: Iterable[Line]) -> dict[int, LoggedStep]:
    """Step -> what its lines say; a later line of the same step wins."""
    found: dict[int, LoggedStep] = {}
    for line in lines:
        entry = found.setdefault(line.step, LoggedStep())
        if line.is_training:
            entry.is_training, entry.n_losses = True, len(line.losses)
        if "data_hash" in line.values:
            hash = line.values["data_hash"]
            entry.data_hash = hash if isinstance(hash, str) else None
        if "train/learning_rate" in line.values:
            entry.learning_rate = line.number("train/learning_rate")
        if "val/loss_nats" in line.values:
            entry.validation_loss = line.number("val/loss_nats")
    return found


def due_validations(steps: int, every: int) -> set[int]:
    """The steps that a whole training validates at: every so many, and the last."""
    return {*range(every, steps, every), steps}


def journal_gaps(logged: Logged, steps: int, validations: Iterable[int]) -> list[str]:
    """The gaps of a journal in the losses of steps up to `steps` and in the validations at those steps, a line each.

    Each training line has the losses of the steps since the line before, whatever the interval of lines was: together
    they have every step once.
    """
    times = [0] * (steps + 1)
    for step, entry in logged.items():
        for k in range(max(1, step - entry.n_losses + 1), min(step, steps) + 1):
            times[k] += 1
    odd = {
        "metrics.jsonl lacks the losses of": [k for k in range(1, steps + 1) if not times[k]],
        "metrics.jsonl has more than once": [k for k in range(1, steps + 1) if times[k] > 1],
        "metrics.jsonl lacks the validation of": [
            k for k in sorted(validations) if k not in logged or logged[k].validation_loss is None
        ],
    }
    said = []
    for what, found in odd.items():
        if found:  # `step 5` or `steps 6-20, 25`: runs of neighbours in brief, five of them
            runs = spans(found)
            said.append(f"{what} step{'s' if found[1:] else ''} {', '.join(runs[:5] + ['...'] * (len(runs) > 5))}")
    return said
