"""The methods paragraphs: prose that can be pasted into a paper, put together from results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from replication.console import plural
from replication.report.description import DataHash
from replication.report.results import Results
from replication.statistics.format import count, plain


def methods(r: Results) -> list[str]:
    """Paragraphs on models, data, arms, tests, plan and software."""
    if not r.config.summary:
        return ["No cell has started: there is nothing to describe yet."]
    return [" ".join(part) for part in (_training(r), _measurement(r), _tests(r), _record(r))]


def data_words(hashes: Sequence[DataHash]) -> str:
    """'data hash abc (seeds 1, 2) and data hash def (seed 3)'."""
    return " and ".join(
        f"data hash {plain(of.hash)} ({'seed' if len(of.seeds) == 1 else 'seeds'} {', '.join(map(str, of.seeds))})"
        for of in hashes
    )


def _training(r: Results) -> Iterator[str]:
    suite, keys = r.suite, r.config.all
    size = f"{count(suite.parameters)} parameters" if suite.parameters else "one size"
    yield (
        f"Decoder-only language models of {size} ({plain(keys.get('model.n_blocks'))} blocks of width "
        f"{plain(keys.get('model.d_model'))}) were trained for {count(keys.get('training.steps'))} steps of "
        f"{count(keys.get('training.batch_tokens'))} tokens with {plain(keys.get('training.optimizer'))} at a peak "
        f"learning rate of {plain(keys.get('training.learning_rate'))}, {plain(keys.get('training.warmup_steps'))} "
        f"warm-up steps, label smoothing {plain(keys.get('training.label_smoothing'))} and precision "
        f"{plain(keys.get('training.precision'))}."
    )
    if r.data:
        names = ", ".join(str(source["name"]) for source in r.data.sources)
        same = "the same for all runs" if r.data.used_by_all else "not the same for all runs"
        yield f"The data ({names}; hash {plain(r.data.hash)}) were {same}."
    elif r.data_hashes:
        yield f"The runs were trained on {data_words(r.data_hashes)}."
    declared = ", ".join(r.config.declared_keys) or "nothing"
    unlike = {of.seed: "; ".join(of.departures) for of in r.certificate.seeds if of.departures}
    beside = "".join(f", and at seed {seed} in what ran them ({what})" for seed, what in unlike.items())
    yield (
        f"The {len(suite.arms)} arms ({', '.join(suite.arms)}) differ in {declared}{beside or ' alone'}. Each was "
        f"trained at {plural(len(suite.seeds), 'seed')} ({', '.join(map(str, suite.seeds))}), which set initial "
        f"weights and data order; {suite.cells_complete} of {suite.cells_total} runs are complete."
    )
    yield (
        "That the arms of a seed had the same initial weights, data in the same order, token count and schedule was "
        f"checked from recorded hashes: {len(r.pairs_used)} of {len(r.pairs_used) + len(r.pairs_refused)} pairs with "
        f"{suite.baseline} pass, and only these are compared."
    )


def _measurement(r: Results) -> Iterator[str]:
    yield (
        "The validation loss is the unweighted cross-entropy, label smoothing included as in training, on a fixed set "
        "that all runs share."
    )
    late = r.late
    if r.loss and r.loss.loss == "late_val_loss" and late.k:
        steps = f"{count(late.first_step)} to {count(late.last_step)}"
        yield f"Each run's loss is the mean of its last {late.k} validations (steps {steps})."
    for entry in r.generation:
        if s := entry.settings:
            nucleus = f"top-p {plain(s['top_p'])}, " if s.get("top_p", 1) != 1 else ""
            yield (
                f"Completions: {entry.n_prompts} prompts, {entry.n_completions} completions a run, temperature "
                f"{plain(s.get('temperature'))}, top-k {plain(s.get('top_k'))}, {nucleus}at most "
                f"{plain(s.get('max_new_tokens'))} tokens."
            )


def _tests(r: Results) -> Iterator[str]:
    loss, a, f = r.loss, r.analysis, r.preference
    if loss is None:
        yield "There is one arm, and nothing was compared."
        return
    yield "The unit of analysis is the training seed."
    if loss.n < 2:
        yield f"Too few seeds have the losses of {loss.arm} and {loss.baseline} to test them."
    else:
        yield (
            f"Equivalence of the loss of {loss.arm} and {loss.baseline} was tested on the paired differences "
            f"over {loss.n} seeds with two one-sided t tests against a margin of {loss.margin_nats:g} nats at "
            f"level {a.alpha:g}; the number of further seeds is from the exact power of that test."
        )
    if r.factorial and r.factorial.n > 1:
        yield (
            "The 2x2 of token gain and layer gain was analysed as contrasts within each seed (two main effects and the "
            f"interaction), each with a t test over {r.factorial.n} seeds."
        )
    yield (
        f"The primary question is the {a.primary}; the {len(r.secondary)} secondary questions were corrected "
        "together by Holm's method. Exact sign-flip tests stand beside the t tests."
    )
    if f is None:
        yield "No votes on completions have been collected yet."
    elif not f.n_votes:
        yield "There are votes on completions, but none on a pair that may be compared."
    else:
        yield (
            f"{count(f.n_judges)} judges gave {count(f.n_votes)} blind votes on pairs of completions of "
            f"{f.treatment} and {f.baseline} of the same seed, over {count(f.n_prompts)} prompts and "
            f"{count(f.n_seeds)} seeds. The share of decisive votes was tested against one half by a t test in a model "
            "with crossed random effects of seed, prompt and judge and an interaction of seed and prompt (variance "
            "components by Henderson's first method, Satterthwaite degrees of freedom)."
        )
    if r.diverged:
        yield (
            f"{plural(len(r.diverged), 'run')} diverged by the rule fixed in the suite; a diverged run stays in every "
            "comparison that its files allow."
        )


def _record(r: Results) -> Iterator[str]:
    plan, n_departures = r.plan, len(r.plan.deviations) - len(r.plan.unfinished)
    if plan.sha256 is None:
        yield "No analysis plan was frozen before the data; the results are exploratory."
    else:
        followed = "was followed" if plan.followed else "is unfinished, without another departure"
        departed = f"was departed from in {plural(n_departures, 'point')}"
        yield (
            f"The analysis plan (SHA-256 {plan.sha256}) was frozen at {plan.frozen_at}, {plan.state}, and "
            f"{departed if n_departures else followed}."
        )
    for machine in r.machines:
        versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
        yield (
            f"Runs used {plain(machine.gpus or machine.cpu)} with {plain(machine.world_size)} process(es), code at "
            f"commit {plain(machine.commit)}{' with uncommitted changes' if machine.dirty else ''} ({versions})."
        )
