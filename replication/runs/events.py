"""TensorBoard's event files of a cell: a second record of its losses, written beside the journal, with clocks."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from replication.runs.layout import RunDir

LENGTH = struct.Struct("<Q")
AROUND = 12, 4  # bytes before a record (its length and a checksum of it) and behind it


@dataclass(frozen=True)
class Events:
    """The losses that event files hold; empty where there are none."""

    losses: dict[tuple[str, int], tuple[float, ...]] = field(default_factory=dict)
    """(tag, step) -> fp32, of each start that logged it; nodes' clocks do not say which was the last."""
    began: float | None = None  # clock of the first of them, in seconds since 1970


def read_events(run: RunDir) -> Events:
    """Of all files of a cell; what follows damage, or a torn end, is not there."""
    paths = sorted(run.tensorboard.glob("events.out.tfevents.*"))
    if not paths:
        return Events()
    from tensorboard.compat.proto.event_pb2 import Event  # here, as it is not for what answers at once

    found, clocks = defaultdict[tuple[str, int], tuple[float, ...]](tuple), []
    for path in paths:
        for record in _records(path):
            if b"loss" not in record:  # of 80 scalars of a line: reading them all would take a report's time
                continue
            try:
                event = Event.FromString(record)
            except Exception:  # protobuf's own, which is in another place in each of its versions
                break
            scalars = {value.tag: value.simple_value for value in event.summary.value if value.HasField("simple_value")}
            for tag, value in scalars.items():
                found[tag, event.step] += (value,)
            clocks += [event.wall_time] if scalars else []
    return Events(dict(found), min(clocks, default=None))


def _records(path: Path) -> Iterator[bytes]:
    try:
        content = path.read_bytes()
    except OSError:
        return
    at = 0
    while at + sum(AROUND) <= len(content):
        start = at + AROUND[0]
        end = start + LENGTH.unpack_from(content, at)[0]
        if end + AROUND[1] > len(content):
            return
        yield content[start:end]
        at = end + AROUND[1]
