"""One TensorBoard run kept saying what it should: it is appended to, and restarts where earlier points changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from replication.runs.files import naming
from replication.tensorboard.live import Curve

SUFFIX = "over-seeds"  # ends the names of our event files, so that they are told from a cell's
NONE: Curve = np.empty(0, dtype=np.int64), np.empty(0)


class EventFile:
    """An append-only event file in a folder of its own; opened for each write, because there may be hundreds."""

    def __init__(self, folder: Path, description: str = "") -> None:
        self.folder, self.description = folder, description
        self._path: Path | None = None
        self._written: dict[str, Curve] = {}

    def bring_to(self, curves: Mapping[str, Curve]) -> int:
        """Append what is new, and return how many points that are.

        Where what was written has changed, the file says from which step on readers must forget.
        """
        restart = []
        cut = min((_first_change(w, curves.get(tag, NONE)) for tag, w in self._written.items()), default=np.inf)
        if np.isfinite(cut):  # what a resumed training says: readers drop every point from this step on
            restart.append(Event(step=int(cut), session_log=SessionLog(status=SessionLog.START)))
            self._written = {t: (s[s < cut], v[s < cut]) for t, (s, v) in self._written.items()}
        pending: dict[int, list[tuple[str, float, bool]]] = {}  # step -> (tag, value, whether it is the tag's first)
        for tag, (steps, values) in curves.items():
            n = len(self._written.get(tag, NONE)[0])
            for i, (step, value) in enumerate(zip(steps[n:].tolist(), values[n:].tolist(), strict=True), n):
                pending.setdefault(step, []).append((tag, value, i == 0))
        self._written = dict(curves)
        points = (
            Event(step=step, summary=Summary(value=[self._value(*point) for point in there]))
            for step, there in sorted(pending.items())
        )
        self._append(chain(restart, points))
        return sum(map(len, pending.values()))

    def write_layout(self, layout: layout_pb2.Layout, step: int) -> None:
        """Write a custom-scalars page; readers keep the one of the highest step."""
        tensor = tensor_util.make_tensor_proto(layout.SerializeToString())
        metadata = layout_metadata.create_summary_metadata()
        value = Summary.Value(tag=layout_metadata.CONFIG_SUMMARY_TAG, metadata=metadata, tensor=tensor)
        self._append([Event(step=step, summary=Summary(value=[value]))])

    def _value(self, tag: str, value: float, is_first: bool) -> Summary.Value:
        """A scalar as TensorBoard 2 writes it: a tensor, with the description beside the tag's first point."""
        tensor = TensorProto(dtype=DT_FLOAT, float_val=[value])
        if not is_first:
            return Summary.Value(tag=tag, tensor=tensor)
        metadata = scalar_metadata.create_summary_metadata(display_name="", description=self.description)
        return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)

    def _append(self, events: Iterable[Event]) -> None:
        records = _records(events)
        if not records:
            return
        if self._path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self.folder / f"events.out.tfevents.{int(time.time()):010d}.{SUFFIX}"
            start = Event(step=0, session_log=SessionLog(status=SessionLog.START))  # only a second one is a restart
            with naming(self._path):
                self._path.write_bytes(_records([Event(file_version="brain.Event:2"), start]))
        with naming(self._path), open(self._path, "ab") as file:
            file.write(records)


def _records(events: Iterable[Event]) -> bytes:
    """Events as a file holds them."""
    buffer = BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        event.wall_time = time.time()
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _first_change(written: Curve, wanted: Curve) -> float:
    """The first step at which what was written is not what is wanted; infinite where it only goes on."""
    n = min(len(written[0]), len(wanted[0]))
    same = (written[0][:n] == wanted[0][:n]) & (written[1][:n] == wanted[1][:n])
    first = n if same.all() else int(same.argmin())
    if first == len(written[0]):
        return np.inf
    return float(min(steps[first] for steps, _ in (written, wanted) if first < len(steps)))
