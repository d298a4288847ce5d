"""Whether votes.csv, the sealed key and a panel's SQLite database agree. A part of deviations.py; writes nothing.

It asks the tables of judging/schema.py by themselves, as a report may be made where that stage's packages are not.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from replication.console import plural
from replication.errors import UserError
from replication.runs.files import file_sha256, read_json
from replication.runs.layout import SuiteDir
from replication.votes.record import read_note, read_panel_record, read_votes

PANEL = "SELECT panel_id, key_sha256, locked_at FROM judging_panel"
KEY = "SELECT item_id, seed, arm_first, arm_second, sample_first, sample_second FROM judging_unsealed"
STANDING = """
SELECT assignment_id, repeats, choice, judge_id, seed, prompt_id,
       CASE WHEN first_is_left THEN arm_first ELSE arm_second END,
       CASE WHEN first_is_left THEN arm_second ELSE arm_first END
FROM judging_votes JOIN judging_assignments USING (assignment_id) JOIN judging_judges USING (judge_id)
     JOIN judging_items USING (item_id) JOIN judging_unsealed USING (item_id)
WHERE undone_at IS NULL AND NOT (kind = 'human' AND vendor = 'test')
"""


def panel_contradictions(suite_dir: SuiteDir) -> Iterator[str]:
    """A line for each; none where the folder holds no such database, or it is on a server."""
    try:
        record, note = read_panel_record(suite_dir.judging), read_note(suite_dir.votes_note, suite_dir.votes)
        votes = {vote.vote_id: vote for vote in read_votes(suite_dir.votes)}
    except UserError:
        return  # named where the votes themselves are read
    file, path = suite_dir.judging / (record.database or "judging.sqlite"), suite_dir.sealed / "key.json"
    if not file.is_file():
        return
    try:
        with closing(_opened(file)) as database:
            panel_id, key_sha256, locked_at = database.execute(PANEL).fetchone()
            key, standing = database.execute(KEY).fetchall(), database.execute(STANDING).fetchall()
        sealed = None if locked_at is None else read_json(path)  # before the lock, reading it would leave a trace
    except (UserError, sqlite3.Error, TypeError) as error:
        yield f"the panel cannot be compared with its records ({error})"
        return
    keys = {"panel.json": record.key_sha256, "votes.json": note and note.note.key_sha256}
    keys["the sealed key"] = None if sealed is None else file_sha256(path)
    for name, sha256 in keys.items():
        if sha256 not in (None, key_sha256):
            yield f"{name} is not of the key that the panel's database has named since it was made"
    if sealed is not None and key and {row[0]: [*row[1:]] for row in key} != _behind(sealed):
        yield "which arm stands behind an item is not the same in the sealed key and in the panel's database"
    own = {name: vote for name, vote in votes.items() if name.startswith(f"{panel_id}-")}
    if locked_at is None or not suite_dir.votes.is_file():
        if own or locked_at is not None:
            yield "votes.csv " + ("has votes of a panel that is not locked" if own else "is gone, of a locked panel")
        return
    first = {f"{panel_id}-{row[0]}": row[1] is None for row in standing}
    cast = {f"{panel_id}-{row[0]}": row[2:] for row in standing}
    told = {n: (v.choice, v.judge_id, v.seed, v.prompt_id, v.arm_left, v.arm_right) for n, v in own.items()}
    counts = {
        "other than": sum(name in cast and cast[name] != vote for name, vote in told.items()),
        "that are not": len(told.keys() - cast.keys()),
    }
    for how, n in counts.items():
        if n:
            yield f"votes.csv has {plural(n, 'vote')} {how} in the panel's database"
    if n := sum(is_first and name not in told for name, is_first in first.items()):
        yield f"votes.csv lacks {plural(n, 'vote')} of the panel's database"


def _opened(file: Path) -> sqlite3.Connection:
    """To read alone, also where its folder lets nothing be written."""
    address = f"file:{quote(str(file))}?mode=ro"
    try:
        connection = sqlite3.connect(address, uri=True)
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError:
        return sqlite3.connect(f"{address}&immutable=1", uri=True)


def _behind(sealed: object) -> object:
    """What a key says of each item, in the order of KEY; None where it is of another form."""
    try:
        return {item: [*behind.values()] for item, behind in sealed["items"].items()}  # type: ignore[index]
    except (KeyError, TypeError, AttributeError):
        return None
