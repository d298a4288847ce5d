"""What the votes say, in plain words. Reads results["preference"], computes nothing new."""

from __future__ import annotations

from typing import Any

from replication.report.judged import BASELINE_PREFERRED, PREFERRED
from replication.statistics.format import count, number, p_value, percent


def preference_lines(preference: dict[str, Any] | None) -> list[str]:
    """The first sentence is the verdict.

    Args:
        preference: judged.analyse_votes, cleaned; None: no votes yet.
    """
    if preference is None:
        return ["Preference: no votes yet."]
    f = preference
    return [_verdict(f), *_more(f), *_beside(f), *_judges(f), *f["left_out"]]


def _verdict(f: dict[str, Any]) -> str:
    found = (
        f"{percent(f['estimate'], 1)} of {count(f['n_decisive'])} decisive votes for {f['treatment']}"
        f"{_interval(f['primary'])}"
    )
    if f["decision"] == PREFERRED:
        return f"Preference: {f['treatment']} is preferred to {f['baseline']} ({found}, p {p_value(f['p'])})."
    if f["decision"] == BASELINE_PREFERRED:
        return f"Preference: {f['baseline']} is preferred to {f['treatment']} ({found}, p {p_value(f['p'])})."
    return f"Preference: not decided: {f['why']}{f' ({found})' if f['n_decisive'] else ''}."


def _interval(e: dict[str, Any]) -> str:
    if e["low"] is None:
        return ""
    scope = f", {e['note']}" if e["note"] else " over seeds, prompts and judges"
    return f", {percent(e['level'])} interval {percent(e['low'], 1)} to {percent(e['high'], 1)}{scope}"


def _more(f: dict[str, Any]) -> list[str]:
    """How many more seeds an undecided question takes."""
    more = f["more_seeds"]
    if more is None:
        return []
    power, size = percent(more["power"]), percent(more["effect"], 1)
    found = f"a power of {power} to find a preference of the published size ({size})"
    if more["k"] is None:
        return [
            f"No number of further seeds would give {found} with these {more['limit']}: more {more['limit']} would."
        ]
    if not more["k"]:
        return [f"These seeds, prompts and judges had {found}: a smaller one may be there."]
    seeds = "1 more seed" if more["k"] == 1 else f"{more['k']} more seeds"
    return [f"{seeds} would give {found}, with as many prompts and judges."]


def _beside(f: dict[str, Any]) -> list[str]:
    """The other tests, each with its scope."""
    if not f["n_votes"]:
        return []
    per_seed, flips, naive = f["per_seed"], f["sign_flip"], f["naive"]
    rows = [row["estimate"] for row in per_seed["rows"] if row["estimate"] is not None]
    above, at = sum(value > 0.5 for value in rows), sum(value == 0.5 for value in rows)
    even = f", {at} at it" if at else ""
    lines = [
        f"{above} of {len(rows)} seeds lie above one half{even}; t over seeds p {p_value(per_seed['p'])}, "
        f"{per_seed['scope']}; exact sign flips p {p_value(flips['p'])} (with so many seeds the smallest there "
        f"is is {p_value(flips['smallest'])}).",
        f"{count(f['n_ties'])} of {count(f['n_votes'])} votes are ties; wins and half the ties are "
        f"{percent(f['win_half']['estimate'], 1)}{_interval(f['win_half'])}.",
    ]
    if naive["p"] is not None:
        lines.append(
            f"Counted as the published p counts, each vote as independent, p would be {p_value(naive['p'])}: not to be "
            "believed, because votes on one seed, prompt or by one judge are alike."
        )
    return lines


def _judges(f: dict[str, Any]) -> list[str]:
    a = f["agreement"]
    both, lines = a["people_and_models"], []
    if both["n_prompts"]:
        r = f", correlation {number(both['pearson'], 2)}" if both["pearson"] is not None else ""
        lines.append(
            f"People and models have the same majority on {both['same_majority']} of {both['n_prompts']} prompts{r}."
        )
    if a["krippendorff_alpha"] is not None:
        lines.append(f"Agreement between judges: Krippendorff's alpha {number(a['krippendorff_alpha'], 2)}.")
    if a["repeats"]:
        lines.append(f"Judges repeated their own choice in {a['repeats_same']} of {a['repeats']} pairs shown again.")
    return lines


def preference_methods(preference: dict[str, Any] | None) -> list[str]:
    """Sentences for the methods paragraph."""
    if preference is None:
        return ["No votes on completions have been collected yet."]
    f = preference
    if not f["n_votes"]:
        return ["There are votes on completions, but none on a pair that may be compared."]
    return [
        f"{count(f['n_judges'])} judges gave {count(f['n_votes'])} blind votes on pairs of completions of "
        f"{f['treatment']} and {f['baseline']} of the same seed, over {count(f['n_prompts'])} prompts and "
        f"{count(f['n_seeds'])} seeds. The share of decisive votes was tested against one half by a t test in a model "
        "with crossed random effects of seed, prompt and judge and an interaction of seed and prompt (variance "
        "components by Henderson's first method, Satterthwaite degrees of freedom)."
    ]
