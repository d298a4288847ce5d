"""One TensorBoard run kept saying what it should: it is appended to, and restarts where earlier points changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from io import BytesIO
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

SUFFIX = "over-seeds"
"""Ends the names of our event files, so that they are told from a cell's."""
NONE: Curve = np.empty(0, dtype=np.int64), np.empty(0)


class EventFile:
    """An append-only event file in a folder of its own; opened for each write, because there may be hundreds."""

    def __init__(self, folder: Path, description: str = "") -> None:
        self.folder, self.description = folder, description
        self._path: Path | None = None
        self._written: dict[str, Curve] = {}

    def bring_to(self, curves: Mapping[str, Curve]) -> int:
        """Append what is new. Where what was written has changed, say from which step on readers must forget.

        Returns:
            How many points were written.
        """
        records = _Records()
        cut = min((_first_change(w, curves.get(tag, NONE)) for tag, w in self._written.items()), default=np.inf)
        if np.isfinite(cut):  # what a resumed training says: readers drop every point from this step on
            records.add(Event(step=int(cut), session_log=SessionLog(status=SessionLog.START)))
            self._written = {t: (s[s < cut], v[s < cut]) for t, (s, v) in self._written.items()}
        n_points = 0
        for step, values in sorted(self._pending(curves).items()):
            records.add(Event(step=step, summary=Summary(value=[self._value(*value) for value in values])))
            n_points += len(values)
        self._written = dict(curves)
        self._append(records)
        return n_points

    def write_layout(self, layout: layout_pb2.Layout, step: int) -> None:
        """Write a custom-scalars page; readers keep the one of the highest step."""
        tensor = tensor_util.make_tensor_proto(layout.SerializeToString())
        metadata = layout_metadata.create_summary_metadata()
        value = Summary.Value(tag=layout_metadata.CONFIG_SUMMARY_TAG, metadata=metadata, tensor=tensor)
        records = _Records()
        records.add(Event(step=step, summary=Summary(value=[value])))
        self._append(records)

    def _pending(self, curves: Mapping[str, Curve]) -> dict[int, list[tuple[str, float, bool]]]:
        """Step -> (tag, value, whether it is the tag's first) of what is not written yet."""
        pending: dict[int, list[tuple[str, float, bool]]] = {}
        for tag, (steps, values) in curves.items():
            n = len(self._written.get(tag, NONE)[0])
            for i, (step, value) in enumerate(zip(steps[n:].tolist(), values[n:].tolist(), strict=True), n):
                pending.setdefault(step, []).append((tag, value, i == 0))
        return pending

    def _value(self, tag: str, value: float, is_first: bool) -> Summary.Value:
        """A scalar as TensorBoard 2 writes it: a tensor, with the description beside the tag's first point."""
        tensor = TensorProto(dtype=DT_FLOAT, float_val=[value])
        if not is_first:
            return Summary.Value(tag=tag, tensor=tensor)
        metadata = scalar_metadata.create_summary_metadata(display_name="", description=self.description)
        return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)

    def _append(self, records: _Records) -> None:
        if not records:
            return
        if self._path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self.folder / f"events.out.tfevents.{int(time.time()):010d}.{SUFFIX}"
            first = _Records()
            first.add(Event(file_version="brain.Event:2"))
            first.add(Event(step=0, session_log=SessionLog(status=SessionLog.START)))  # only a second one is a restart
            with naming(self._path):
                self._path.write_bytes(first.bytes())
        with naming(self._path), open(self._path, "ab") as file:
            file.write(records.bytes())


class _Records:
    """Events as a file holds them, ready to be written at once."""

    def __init__(self) -> None:
        self._buffer = BytesIO()
        self._writer = RecordWriter(self._buffer)

    def add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def __bool__(self) -> bool:
        return self._buffer.tell() > 0

    def bytes(self) -> bytes:
        return self._buffer.getvalue()


def _first_change(written: Curve, wanted: Curve) -> float:
    """The first step at which what was written is not what is wanted; infinite where it only goes on."""
    n = min(len(written[0]), len(wanted[0]))
    same = (written[0][:n] == wanted[0][:n]) & (written[1][:n] == wanted[1][:n])
    first = n if same.all() else int(same.argmin())
    if first == len(written[0]):
        return np.inf
    return float(min(steps[first] for steps, _ in (written, wanted) if first < len(steps)))
