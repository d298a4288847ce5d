"""Named ways of sampling beside the one that a cell's config asks for: what each name says. Imports no torch.

Their completions lie in runs/<arm>/seed-<n>/sampled/<name>/, so that none replaces another's.
"""

from __future__ import annotations

import re

from replication.errors import UserError

GREEDY, MATCHED = "greedy", "matched"
TEMPERATURE = re.compile(r"t(\d+(?:\.\d+)?)")


def parse_settings(text: str) -> list[str]:
    """Names with commas between them; UserError for one that says nothing."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (GREEDY, MATCHED) and not TEMPERATURE.fullmatch(name):
            raise UserError(
                f"--setting: '{name}' names no way of sampling; there are greedy, a temperature such as t0.5, and "
                "matched, at which an arm's predictive entropy is the baseline's"
            )
    return list(dict.fromkeys(names))


def setting_flags(name: str, matched: float | None = None) -> list[str]:
    """The keys that a setting sets; `matched` is the temperature of a cell. A greedy answer is the same every time."""
    if name == GREEDY:
        return ["--generation.top_k=1", "--generation.samples_per_prompt=1"]
    found = TEMPERATURE.fullmatch(name)
    return [f"--generation.temperature={found[1] if found else matched}"] if name else []
