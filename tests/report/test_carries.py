"""Which change carries the preference: a panel of four arms from its making to the report, and the plan's questions."""

from __future__ import annotations

import secrets
from dataclasses import replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
from judging_setup import hasty
from reported import report
from synthetic_runs import ARMS, build_suite
from vote_records import record, vote

from replication.cli.main import main
from replication.config import AnalysisConfig, to_yaml, without_neutral
from replication.errors import UserError
from replication.judging.folder import find_panel
from replication.judging.panel import invite
from replication.judging.store import Store
from replication.protocol.panel_records import panel_contradictions
from replication.protocol.preregistration import build_plan
from replication.report.carries import preference_factorial
from replication.runs.files import write_text
from replication.votes.record import read_note, read_votes

SEEDS = (1, 2, 3, 4, 5)
OF_PLACE = dict(zip(("neither", "token", "layer", "both"), ARMS, strict=True))
PLANTED = {"token_gain": 0.4, "layer_gain": 0.0, "interaction": 0.2}
CERTIFIED = dict.fromkeys(ARMS[1:], SEEDS)


def quality(arm: str) -> float:
    token, layer = arm in ("token_gain", "both"), arm in ("layer_gain", "both")
    return PLANTED["token_gain"] * token + PLANTED["layer_gain"] * layer + PLANTED["interaction"] * (token - 0.5) * (
        layer - 0.5
    )  # fmt: skip


def planted_votes(pairs, n_judges: int = 24, choices: Random | None = None):
    """Every judge on every prompt, pairs and seeds in rotation."""
    rng, votes = choices or Random(0), []
    for judge in range(n_judges):
        for prompt in range(12):
            left, right = rng.sample(pairs[(judge + prompt) % len(pairs)], 2)
            choice = "left" if rng.random() < 0.5 + quality(left) - quality(right) else "right"
            seed = SEEDS[(judge // len(pairs) + prompt) % len(SEEDS)]
            votes.append(vote(len(votes), seed, prompt, f"j{judge}", choice, left, right))
    return votes


def analysed(votes, **keys):
    analysis = AnalysisConfig(**keys).resolved(ARMS)
    return preference_factorial(votes, "s", analysis, CERTIFIED, OF_PLACE)


def test_planted_effects_are_recovered_and_pairs_that_do_not_join_the_arms_say_so():
    found = analysed(planted_votes(list(combinations(ARMS, 2))))
    assert [effect.id for effect in found.effects] == [f"preference_{name}" for name in PLANTED]
    for effect, truth in zip(found.effects, PLANTED.values(), strict=True):
        assert effect.low < truth < effect.high and effect.n == len(SEEDS)
    assert found.effects[0].p < 0.01 < found.effects[1].p and not found.is_registered
    assert len(found.pairs) == 6 and sum(row["n_votes"] for row in found.pairs) == found.n_decisive == 24 * 12
    star = analysed(planted_votes([("baseline", arm) for arm in ARMS[1:]]))
    assert star.effects[0].p < 0.01, "three pairs that join four arms are enough"
    two = [("baseline", "both"), ("baseline", "token_gain")]
    apart = analysed(planted_votes(two))
    assert "--pairs all" in apart.note and apart.effects[0].p != apart.effects[0].p
    on_one_pair = record()
    assert analysed(on_one_pair) is None
    assert analysed(on_one_pair, preference_factorial=True).is_registered
    assert preference_factorial(on_one_pair, "s", AnalysisConfig().resolved(ARMS), CERTIFIED, None) is None


def test_models_of_few_vendors_carry_an_effect_on_condition_of_them():
    votes = planted_votes(list(combinations(ARMS, 2)), n_judges=12)
    for vendors, words in ((3, "as to models conditional on these vendors (v0, v1, v2)"), (4, "")):
        models = [replace(v, judge_kind="model", vendor=f"v{int(v.judge_id[1:]) % vendors}") for v in votes]
        found = analysed(models)
        assert found.note.endswith(words) and bool(found.note) == bool(words) and 0 <= found.effects[0].p <= 1
    assert analysed(votes).note == "", "people are not related"


def test_judges_who_vote_alike_count_as_one():
    votes = planted_votes(list(combinations(ARMS, 2)), n_judges=12)
    votes = [replace(v, judge_id="j0") if v.judge_id in ("j1", "j2", "j3") else v for v in votes]
    own = [vote for vote in votes if vote.judge_id == "j0"]
    copied = [replace(v, vote_id=f"{v.vote_id}-{k}", judge_id=f"copy{k}") for k in range(5) for v in own]
    alone, with_copies = (analysed(of).effects[0] for of in (votes, [*votes, *copied]))
    assert with_copies.high - with_copies.low > alone.high - alone.low, "they say no more, and weigh more"


def test_seeds_and_arms_that_are_not_certified_are_left_out():
    votes = planted_votes(list(combinations(ARMS, 2)))
    analysis = AnalysisConfig().resolved(ARMS)
    found = preference_factorial(votes, "s", analysis, CERTIFIED | {"both": SEEDS[:3]}, OF_PLACE)
    kept = [v for v in votes if v.seed in SEEDS[:3] or "both" not in (v.arm_left, v.arm_right)]
    assert found.n_decisive == len(kept) < len(votes)


def test_the_plan_asks_only_where_it_is_told_to(tmp_path: Path):
    _, suite = build_suite(tmp_path / "out", seeds=SEEDS)
    plain = build_plan(suite)
    assert not any(name.startswith("preference_") for name in plain.secondary)
    asking = replace(suite, analysis=replace(suite.analysis, preference_factorial=True))
    plan = build_plan(asking)
    assert [name for name in plan.secondary if name.startswith("preference_")] == [f"preference_{n}" for n in PLANTED]
    assert "preference_factorial" in str(without_neutral(plan)) and "preference_factorial" not in str(
        without_neutral(plain)
    )
    pair = replace(asking, arms=("baseline", "both"))
    with pytest.raises(UserError, match=r"analysis.preference_factorial: the suite's arms are no 2x2"):
        build_plan(pair)


def test_a_panel_of_four_arms_from_its_making_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = Random(3)  # the same panel in every run of the test
    monkeypatch.setattr(secrets, "token_hex", lambda n: drawn.randbytes(n).hex())
    monkeypatch.setattr(secrets, "randbits", drawn.getrandbits)
    out, rng = tmp_path / "out", Random(1)
    texts = {(arm, seed): sha256(f"{arm} {seed}".encode()).hexdigest() for arm in ARMS for seed in SEEDS}
    suite_dir, plain = build_suite(out, seeds=SEEDS, completions=texts)
    analysis = AnalysisConfig(judges=20, votes_per_judge=14, bootstrap_resamples=100, preference_factorial=True)
    suite = replace(plain, analysis=analysis)
    write_text(suite_dir.suite, to_yaml(suite))
    without_votes, _, _ = report(suite_dir, suite)
    assert main(["judge", "prepare", str(out), "--pairs", "all", "--repeats", "0"]) == 0
    database = hasty(find_panel(out).database_file)
    store, arm_of = Store(database), {text: arm for (arm, _), text in texts.items()}
    names = [f"judge-{n:03d}" for n in range(1, 21)]
    invite(database, names)
    for name in names:
        while (shown := store.show(name)) is not None:
            left, right = (
                quality(next(a for t, a in arm_of.items() if t in side)) for side in (shown.left, shown.right)
            )
            store.vote(name, shown.impression, "left" if rng.random() < 0.5 + left - right else "right")
    assert main(["judge", "lock", str(out), "--yes"]) == 0
    assert not list(panel_contradictions(suite_dir))
    votes = read_votes(suite_dir.votes)
    assert len(votes) == 20 * 14 and {v.arm_left for v in votes} == {v.arm_right for v in votes} == set(ARMS)
    assert read_note(suite_dir.votes_note, suite_dir.votes).note.arms == sorted(ARMS)
    before = {row["id"]: row["verdict"] for row in without_votes["decisions"]}
    assert before["preference_interaction"] == "not decided: no votes on a 2x2 of arms yet"
    results, text, _ = report(suite_dir, suite)
    found = results["preference_factorial"]
    assert found["is_registered"] and found["n_decisive"] == len(votes) and found["n"] == len(SEEDS)
    for effect, truth in zip(found["effects"], PLANTED.values(), strict=True):
        assert effect["low"] < truth < effect["high"]
    assert found["effects"][0]["p"] < 0.01
    decided = {row["id"]: row for row in results["decisions"]}
    outcomes = [decided[f"preference_{name}"]["outcome"] for name in PLANTED]
    assert outcomes[:2] == ["other than zero", "not told from zero"] and found["seeds"] == list(SEEDS)
    assert decided["preference_token_gain"]["p_holm"] >= 6 * found["effects"][0]["p"], "one of seven or so questions"
    assert "Which change carries the preference" in text and "Token gain, main effect on the preference: +" in text
    assert f"{len(votes)} decisive votes by 20 judges" in text
