"""The votes of a locked panel with their texts, as a folder that `datasets.load_dataset` opens: Parquet, JSONL, a card.

A row is a vote that counts, in the columns of the public arena's data; model_a stood on the left.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

from sqlalchemy import select

from replication.console import plural
from replication.errors import UserError
from replication.judging.database import Database
from replication.judging.folder import PanelFolder
from replication.judging.record import iso, unsealed_votes
from replication.judging.schema import items, unsealed
from replication.judging.store import panel_study
from replication.runs.files import file_sha256, write_text
from replication.votes.record import uncounted_judges

KEPT = ("seed", "prompt_id", "judge_id", "judge_kind", "vendor", "vote_id", "repeat_of")
ASKED = ("criteria", "strength", "reason")  # beside the vote, as votes.csv has it; empty where the study does not ask
CARD = resources.files("replication.judging") / "dataset_card.md"


def write_dataset(folder: PanelFolder, database: Database, into: Path, license: str) -> list[Path]:
    """Write the three files; returns their paths. Raises UserError where the panel is not locked or no vote counts."""
    import pyarrow.parquet

    found, gone = unsealed_votes(database), uncounted_judges(folder.suite)
    votes = [vote for vote in found.votes if vote.judge_id not in gone]
    if not votes:
        raise UserError("--dataset: no vote counts, so there is nothing to write")
    texts, about, rows = {}, {}, []
    with database.read() as c:
        consent = panel_study(c).consent
        for row in c.execute(select(items, unsealed).join_from(items, unsealed)):
            about[row.prompt_id] = {"prompt": row.question, "category": row.category}
            texts[row.seed, row.prompt_id, row.arm_first, row.sample_first] = row.first
            texts[row.seed, row.prompt_id, row.arm_second, row.sample_second] = row.second
    for vote in votes:
        sides = (vote.arm_left, vote.sample_left), (vote.arm_right, vote.sample_right)
        left, right = (texts[vote.seed, vote.prompt_id, *side] for side in sides)
        winner = {"left": "model_a", "right": "model_b"}.get(vote.choice, vote.choice)
        shown = {"model_a": vote.arm_left, "model_b": vote.arm_right, "winner": winner, **about[vote.prompt_id]}
        shown |= {"response_a": left, "response_b": right, **{name: getattr(vote, name) for name in KEPT + ASKED}}
        rows.append(shown | {"seconds": None if math.isnan(vote.seconds) else vote.seconds})
    parquet, lines, card = into / "votes.parquet", into / "votes.jsonl", into / "README.md"
    write_text(lines, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    facts = {
        "votes": plural(len(rows), "vote"),
        "judges": plural(len({vote.judge_id for vote in votes}), "judge"),
        "left_out": plural(len(gone), "judge"),
        "locked_at": iso(found.panel.locked_at or math.nan),
        "sha256": file_sha256(parquet),
        "scope": f"{consent.text}\n\n{consent.withdrawal}" if consent else "No text of consent was shown.",
    }
    write_text(card, CARD.read_text(encoding="utf-8").format(license=license, panel=found.panel, **facts))
    return [parquet, lines, card]
