"""A made-up experiment in the schema of the published data files: single votes and curves, and files of their sums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# One row a judge, one letter a prompt: a for the baseline, b for gain, t a tie; "." was not judged.
VOTES = {
    "Author": "bbbatb",
    "H1": "bbatba",
    "H2": "aabta.",
    "H3": "tttttb",
    "M1": "bbabbt",
    "M2": "babbtb",
}
TYPES = {"M1": "FM", "M2": "FM"}
BACKGROUNDS = {"Author": "ml", "H1": "lay", "H2": "lay", "H3": "lay"}
SECONDS = {"Author": 30.0, "H1": 20.5, "H2": 9.0, "H3": 18.0, "M1": 5.0, "M2": 7.0}
CATEGORIES = ("recall", "recall", "recall", "open", "open", "open")


def votes_file(votes: dict[str, str] = VOTES) -> dict[str, Any]:
    """What the author would publish of these votes: margins, and sums of them."""
    judges = [
        {
            "name": name,
            "type": TYPES.get(name, "Human"),
            "background": BACKGROUNDS.get(name),
            "n": len(row.replace(".", "")),
            "a": row.count("a"),
            "b": row.count("b"),
            "ties": row.count("t"),
            "median_seconds_between_votes": SECONDS[name],
            "first_ts": f"2026-01-{day:02d} 10:00:00",
        }
        for day, (name, row) in enumerate(votes.items(), start=1)
    ]
    columns = ["".join(row[place] for row in votes.values()) for place in range(len(CATEGORIES))]
    details = [
        {"question_id": i, "category": category, "a": c.count("a"), "b": c.count("b"), "tie": c.count("t")}
        for i, (category, c) in enumerate(zip(CATEGORIES, columns, strict=True), start=1)
    ]
    everything = "".join(votes.values())
    return {
        "headline": {"a": everything.count("a"), "b": everything.count("b"), "t": everything.count("t")},
        "judges": judges,
        "question_majorities": {"details": details},
        "inter_annotator_agreement": {
            "details": [
                {"human_majority": "gain", "fm_majority": "gain"},
                {"human_majority": "baseline", "fm_majority": "gain"},
                {"human_majority": "tied", "fm_majority": "gain"},
            ]
        },
    }


def losses_file(late: Sequence[float] = (3.0, 3.2)) -> dict[str, Any]:
    """Two curves of three checkpoints, the last two of which are given for gain."""
    gain, baseline = (4.0, *late), (4.1, 3.0, 3.1)
    return {
        run: {"trajectory": [{"step": 100 * i, "train_loss": v - 0.5, "val_loss": v} for i, v in enumerate(curve, 1)]}
        for run, curve in (("gain", gain), ("baseline", baseline))
    }


def divergences_file() -> list[dict[str, Any]]:
    """Three blocks at two steps: block 0 far above the others, then less; block 2 doubles."""
    rows = ((100, (9.0, 0.5, 0.5)), (200, (3.0, 1.0, 1.0)))
    return [{"_step": step, **{f"layer_gain/div_layer_{i:02d}": v for i, v in enumerate(row)}} for step, row in rows]


def write_data(folder: Path, votes: dict[str, str] = VOTES) -> Path:
    """All files of the experiment; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "votes.json": votes_file(votes),
        "losses.json": losses_file(),
        "divergences.json": divergences_file(),
        "last.json": {"gain": {"val_loss": 3.25}, "baseline": {"val_loss": 3.0}},
        "prompts.json": [{"id": i, "category": c, "question": f"Q{i}?"} for i, c in enumerate(CATEGORIES, 1)],
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


# Counted from VOTES by hand. The tests change one figure, or one vote, at a time.
CLAIMS = """
paper: a made-up paper
files: {votes: votes.json, losses: losses.json, divergences: divergences.json, finals: last.json, prompts: prompts.json}
claims:
  - id: all
    what: headline
    where: table 1
    recompute: votes
    columns: {n: {count: n}, a: {count: baseline}, b: {count: gain}, t: {count: ties},
              b%: {count: share}, p: {count: p}}
    rows:
      everyone: {printed: ["35", "8", "17", "10", "68.0 %", "0.108"]}
      humans: {args: {type: Human}, printed: ["23", "6", "9", "8", "60.0 %", "0.607"]}
      models: {args: {type: FM}, printed: ["12", "2", "8", "2", "80.0 %", "0.109"]}
      no fast humans: {args: {humans_faster_than: 15}, printed: ["30", "5", "16", "9", "76.2 %", "0.027"]}
      no ties: {args: {ties_above: 0.8}, printed: ["29", "8", "16", "5", "66.7 %", "0.152"]}
      no author: {args: {without: [Author]}, printed: ["29", "7", "13", "9", "65.0 %", "0.263"]}
  - {id: prompts.b, what: votes for gain by prompt, where: table 2, printed: "17",
     recompute: prompt_votes, args: {count: gain}}
  - {id: prompts.open, what: share of open prompts, where: table 2, printed: "70.0 %",
     recompute: prompt_votes, args: {count: share, category: open}}
  - {id: leans.gain, what: prompts for gain, where: text, printed: "6", recompute: prompts, args: {leans: gain}}
  - {id: judges.gain, what: judges for gain, where: text, printed: "5", recompute: judges, args: {leans: gain}}
  - {id: range, what: lowest share of a judge, where: text, printed: "25.0 %",
     recompute: extreme_share, args: {which: min, decisive_below: 4}}
  - {id: lowest, what: lowest judge, where: text, printed: H2,
     recompute: extreme_judge, args: {count: share, which: min, decisive_below: 4}}
  - {id: filters, what: every filter leaves a majority for gain, where: text, printed: "yes",
     recompute: every_filter_leans, args: {to: gain, filters: [{type: FM}, {ties_above: 0.8}]}}
  - {id: agreement, what: agreement, where: text, printed: "33.3 %", recompute: agreeing_prompts, args: {of: share}}
  - {id: order, what: votes in a fixed order, where: text, printed: "none", recompute: prompts_out_of_step}
  - {id: loss, what: late loss, where: table 3, printed: "+0.05",
     recompute: late_loss, args: {run: gain, minus: baseline, last: 2}}
  - {id: final, what: last loss, where: table 3, printed: "3.25", recompute: final, args: {run: gain, key: val_loss}}
  - {id: growth, what: growth of block 2, where: text, printed: "+100 %",
     recompute: divergence_growth, args: {block: 2, start: 100, end: 200}}
  - {id: saturated, what: samples of block 0 at the clamp of 1.8, where: text, printed: "50 %",
     recompute: samples_at_upper_clamp, args: {block: 0, m_max: 1.8}}
  - {id: r, what: correlation, where: text, printed: "0.78", why_not: votes by prompt and type are not published}
cannot_answer: [anything about seeds]
"""


def write_claims(folder: Path, text: str = CLAIMS) -> Path:
    """The claims of the made-up paper; returns their file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "claims.yaml"
    path.write_text(text)
    return path
