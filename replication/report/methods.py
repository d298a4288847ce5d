"""The methods paragraph: prose that can be pasted into a paper, put together from results alone."""

from __future__ import annotations

from typing import Any

from replication.report.preference_words import preference_methods
from replication.statistics.format import count, plain


def methods(r: dict[str, Any]) -> list[str]:
    """Paragraphs on models, data, arms, tests, plan and software.

    Args:
        r: see results.compute_results, before the verdict is added.
    """
    if not r["config"]["summary"]:
        return ["No cell has started: there is nothing to describe yet."]
    return [" ".join(part) for part in (_training(r), _measurement(r), _tests(r), _record(r))]


def _training(r: dict[str, Any]) -> list[str]:
    suite, keys = r["suite"], r["config"]["all"]
    size = f"{count(suite['parameters'])} parameters" if suite["parameters"] else "one size"
    shape = f"{plain(keys.get('model.n_blocks'))} blocks of width {plain(keys.get('model.d_model'))}"
    steps, batch = keys.get("training.steps"), keys.get("training.batch_tokens")
    seeds = ", ".join(map(str, suite["seeds"]))
    lines = [
        f"Decoder-only language models of {size} ({shape}) were trained for {count(steps)} steps of {count(batch)} "
        f"tokens with {plain(keys.get('training.optimizer'))} at a peak learning rate of "
        f"{plain(keys.get('training.learning_rate'))}, {plain(keys.get('training.warmup_steps'))} warm-up steps, "
        f"label smoothing {plain(keys.get('training.label_smoothing'))} and precision "
        f"{plain(keys.get('training.precision'))}.",
    ]
    if r["data"]:
        names = ", ".join(source["name"] for source in r["data"]["sources"])
        same = "the same for all runs" if r["data"]["used_by_all"] else "not the same for all runs"
        lines.append(f"The data ({names}; hash {plain(r['data']['hash'])}) were {same}.")
    elif r["data_hashes"]:
        lines.append(f"The runs were trained on {data_words(r['data_hashes'])}.")
    declared = ", ".join(r["config"]["declared_keys"]) or "nothing"
    unlike = {seed["seed"]: "; ".join(seed["departures"]) for seed in r["certificate"]["seeds"] if seed["departures"]}
    beside = "".join(f", and at seed {seed} in what ran them ({what})" for seed, what in unlike.items())
    lines.append(
        f"The {len(suite['arms'])} arms ({', '.join(suite['arms'])}) differ in {declared}{beside or ' alone'}. "
        f"Each was trained at {len(suite['seeds'])} {'seed' if len(suite['seeds']) == 1 else 'seeds'} ({seeds}), which "
        f"set initial weights and data order; {suite['cells_complete']} of {suite['cells_total']} runs are complete."
    )
    n_used, n_refused = len(r["pairs_used"]), len(r["pairs_refused"])
    lines.append(
        "That the arms of a seed had the same initial weights, data in the same order, token count and schedule was "
        f"checked from recorded hashes: {n_used} of {n_used + n_refused} pairs with {suite['baseline']} pass, and only "
        "these are compared."
    )
    return lines


def data_words(hashes: list[dict[str, Any]]) -> str:
    """'data hash abc (seeds 1, 2) and data hash def (seed 3)'."""
    seeds = [f"{'seed' if len(h['seeds']) == 1 else 'seeds'} {', '.join(map(str, h['seeds']))}" for h in hashes]
    return " and ".join(f"data hash {plain(h['hash'])} ({words})" for h, words in zip(hashes, seeds, strict=True))


def _measurement(r: dict[str, Any]) -> list[str]:
    late = r["late"]
    lines = [
        "The validation loss is the unweighted cross-entropy, label smoothing included as in training, on a fixed set "
        "that all runs share."
    ]
    if r["loss"] and r["loss"]["loss"] == "late_val_loss" and late["k"]:
        lines.append(
            f"Each run's loss is the mean of its last {late['k']} validations (steps {count(late['first_step'])} to "
            f"{count(late['last_step'])})."
        )
    for entry in r["generation"]:
        s = entry["settings"]
        if s:
            nucleus = f"top-p {plain(s['top_p'])}, " if s.get("top_p", 1) != 1 else ""
            lines.append(
                f"Completions: {entry['n_prompts']} prompts, {entry['n_completions']} completions a run, temperature "
                f"{plain(s.get('temperature'))}, top-k {plain(s.get('top_k'))}, {nucleus}at most "
                f"{plain(s.get('max_new_tokens'))} tokens."
            )
    return lines


def _tests(r: dict[str, Any]) -> list[str]:
    loss, a = r["loss"], r["analysis"]
    if loss is None:
        return ["There is one arm, and nothing was compared."]
    lines = ["The unit of analysis is the training seed."]
    if loss["n"] < 2:
        lines.append(f"Too few seeds have the losses of {loss['arm']} and {loss['baseline']} to test them.")
    else:
        lines.append(
            f"Equivalence of the loss of {loss['arm']} and {loss['baseline']} was tested on the paired differences "
            f"over {loss['n']} seeds with two one-sided t tests against a margin of {loss['margin_nats']:g} nats at "
            f"level {a['alpha']:g}; the number of further seeds is from the exact power of that test."
        )
    if r["factorial"] and r["factorial"]["n"] > 1:
        lines.append(
            "The 2x2 of token gain and layer gain was analysed as contrasts within each seed (two main effects and the "
            f"interaction), each with a t test over {r['factorial']['n']} seeds."
        )
    lines.append(
        f"The primary question is the {a['primary']}; the {len(r['secondary'])} secondary questions were corrected "
        "together by Holm's method. Exact sign-flip tests stand beside the t tests."
    )
    lines += preference_methods(r["preference"])
    n_lost = len(r["diverged"])
    if n_lost:
        runs = "1 run" if n_lost == 1 else f"{n_lost} runs"
        lines.append(
            f"{runs} diverged by the rule fixed in the suite; a diverged run stays in every comparison that its files "
            "allow."
        )
    return lines


def _followed(plan: dict[str, Any]) -> str:
    departures = len(plan["departures"]) - len(plan["unfinished"])
    if departures:
        return f"was departed from in {departures} {'point' if departures == 1 else 'points'}"
    return "was followed" if plan["followed"] else "is unfinished, without another departure"


def _record(r: dict[str, Any]) -> list[str]:
    plan = r["plan"]
    if plan["sha256"] is None:
        lines = ["No analysis plan was frozen before the data; the results are exploratory."]
    else:
        lines = [
            f"The analysis plan (SHA-256 {plan['sha256']}) was frozen at {plan['frozen_at']}, {plan['state']}, and "
            f"{_followed(plan)}."
        ]
    for machine in r["machines"]:
        versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
        device = plain(machine["gpus"]) if machine["gpus"] else plain(machine["cpu"])
        lines.append(
            f"Runs used {device} with {plain(machine['world_size'])} process(es), code at commit "
            f"{plain(machine['commit'])}{' with uncommitted changes' if machine['dirty'] else ''} ({versions})."
        )
    return lines
