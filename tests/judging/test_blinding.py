"""The classifier two-sample test: it finds a planted leak, nothing where there is none, and its interval holds."""

from __future__ import annotations

from pathlib import Path

import blinding
import numpy as np
import pytest
from classifier import Blocks, auc, blocks, permuted, scores
from features import SIDE, cut, numbers
from fetched_pages import Fetched, Seen, Truth
from rich.console import Console
from scipy import sparse
from synthetic import ARMS, completions

from replication.cli.arguments import Parser
from replication.errors import UserError
from replication.runs.files import read_json

ITEMS = 1008


def classified(out: Path, *flags: str) -> tuple[int, dict[str, dict]]:
    parser = Parser()
    blinding.add_arguments(parser)
    args = parser.parse_args([f"--items={ITEMS}", "--folds=4", f"--out={out}", *flags])
    code = blinding.run(args, Console(quiet=True))
    return code, {result["experiment"]: result for result in read_json(out / "blinding.json")}


@pytest.mark.parametrize("experiment", [pytest.param("alike", marks=pytest.mark.full), "placeholder"])
def test_nothing_that_the_server_sends_tells_the_side(experiment: str, tmp_path: Path) -> None:
    """With 1,000 items the interval is about ± 0.04; times differ from run to run, so three widths are allowed."""
    _, found = classified(tmp_path, f"--experiment={experiment}")
    result = found[experiment]
    value = result["auc"][result["primary"]]
    assert result["items"] == ITEMS
    assert value["high"] - value["low"] < 0.1
    assert abs(value["value"] - 0.5) < 1.5 * (value["high"] - value["low"])
    assert result["different_files"] == 2
    assert abs(result["treatment_left"] - 0.5) < 0.03


def test_a_planted_header_is_found(tmp_path: Path) -> None:
    code, found = classified(tmp_path, "--experiment=placeholder", "--leak=header")
    assert code == 0
    assert found["placeholder"]["auc"]["everything"]["low"] > 0.95


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for flags, words in (
        (["--folds=1"], "--folds"),
        (["--items=10"], "--items"),
        (["--arms", "a", "a"], "--arms: names a twice"),
    ):
        with pytest.raises(UserError, match=words):
            classified(tmp_path, *flags)
    with pytest.raises(UserError, match="--completions"):
        classified(tmp_path, f"--completions={tmp_path}")


# ---------------------------------------------------------------- the classifier and its interval


def design(n_judges: int, rng: np.random.Generator, n_prompts: int = 32) -> tuple[list[Truth], np.ndarray]:
    """Every judge sees every prompt once, half of them with the treatment on the left."""
    behind = []
    for j in range(n_judges):
        sides = rng.permutation(np.arange(n_prompts) % 2)
        behind += [Truth(bool(side), f"judge-{j}", p, 0) for p, side in enumerate(sides)]
    return behind, np.array([b.treatment_left for b in behind], int)


def test_the_auc_is_that_of_all_pairs_of_a_block() -> None:
    rng = np.random.default_rng(0)
    behind, labels = design(12, rng)
    where = blocks(behind, 3, 0)
    score = np.round(rng.normal(size=len(labels)) + 0.5 * labels, 1)  # with ties
    won, pairs = 0.0, 0
    for block in set(where.block):
        inside = where.block == block
        ones, zeros = score[inside & (labels == 1)], score[inside & (labels == 0)]
        won += sum(float(a > b) + 0.5 * float(a == b) for a in ones for b in zeros)
        pairs += len(ones) * len(zeros)
    assert auc(score, labels, where).value == pytest.approx(won / pairs)


def test_train_and_test_share_neither_prompt_nor_judge() -> None:
    """A classifier that knew a judge's or a prompt's other labels would be far from chance; this one cannot."""
    rng = np.random.default_rng(1)
    behind, labels = design(60, rng)
    names = np.unique([[b.judge, b.prompt] for b in behind], return_inverse=True)[1]
    columns = sparse.csr_matrix((np.ones(names.size), names.ravel(), np.arange(0, names.size + 1, 2)), dtype=np.float32)
    where = blocks(behind, 4, 0)
    assert auc(scores(columns, columns.toarray(), labels, where, False)["everything"], labels, where).is_chance
    mixed = Blocks(rng.integers(0, 4, len(labels)), np.arange(len(labels)) % 4, where.prompt, 4)  # items, not judges
    apart = auc(scores(columns, columns.toarray(), labels, mixed, False)["everything"], labels, mixed)
    assert apart.high < 0.5  # worse than chance: what is left of a judge's balanced sides is the other side


def test_the_interval_misses_as_often_as_it_says() -> None:
    """Scores that a prompt's items share, labels drawn like the design's: about one interval in twenty misses."""
    misses, widths = [], []
    for k in range(200):
        rng = np.random.default_rng(k)
        behind, labels = design(40, rng)
        where = blocks(behind, 4, k)
        score = rng.normal(size=32)[where.prompt] + rng.normal(size=len(labels))
        value = auc(score, labels, where)
        misses.append(not value.is_chance)
        widths.append(value.half_width)
    assert 0.01 <= np.mean(misses) <= 0.1
    assert np.mean(widths) < 0.045


def test_items_of_a_prompt_are_not_counted_as_independent() -> None:
    """Where a completion is shown again and again, the interval is that of the completions, not of the impressions."""
    misses = []
    for k in range(200):
        rng = np.random.default_rng(k)
        tells = rng.normal(size=(32, 4))  # score of a pair, and the side it is on for good: shown 15 times
        side = rng.permuted(np.tile([0, 1, 0, 1], (32, 1)), axis=1)
        behind = [Truth(bool(side[p, j % 4]), f"judge-{j}", p, 0) for j in range(60) for p in range(32)]
        score = np.array([tells[p, j % 4] for j in range(60) for p in range(32)])
        labels = np.array([b.treatment_left for b in behind], int)
        misses.append(not auc(score, labels, blocks(behind, 4, k)).is_chance)
    assert np.mean(misses) <= 0.12


def test_labels_are_dealt_anew_within_judges() -> None:
    rng = np.random.default_rng(2)
    behind, labels = design(10, rng)
    again = permuted(labels, behind, rng)
    assert not np.array_equal(again, labels)
    assert np.array_equal(again.reshape(10, 32).sum(1), labels.reshape(10, 32).sum(1))


# ---------------------------------------------------------------- what is looked at


def page(left: str, right: str) -> Seen:
    body = "".join(
        f'<section class="text" aria-labelledby="{n}">{t}</section>\n' for n, t in (("left", left), ("right", right))
    )
    answer = Fetched("HTTP/1.1 200 OK\na: b", f"<main>\n{body}</main>", 0.001, 0.002)
    return Seen(0, 0, "s", answer, Fetched("HTTP/1.1 303 See Other", "", 0.003, 0.004))


def test_a_page_is_cut_into_its_parts() -> None:
    seen = page("one", "three")
    parts = cut(seen)
    assert "one" in parts.left
    assert "three" in parts.right
    assert parts.rest.split() == ["<main>", "</main>"]
    assert "0 a: b" in parts.heads
    assert "1 HTTP/1.1 303 See Other" in parts.heads
    row = dict(zip(("place", "page", "left", "right", "less"), numbers([seen], [parts])[0], strict=False))
    assert row["less"] == -3  # two letters of the text, one of the name
    with pytest.raises(RuntimeError, match="learn the new page"):
        cut(Seen(0, 0, "s", Fetched("", "<main></main>", 0, 0), Fetched("", "", 0, 0)))
    assert set(SIDE) == {"left", "right"}


def test_one_arm_s_completions_are_dealt_as_two() -> None:
    texts = completions(3, seed=0, n_prompts=2)
    one = [c for of_arm in texts.values() for c in of_arm["baseline"]]
    dealt = blinding.deal(one, ("a", "b"), seed=0)
    assert len(dealt) == 4  # nine completions of a prompt: four pairs
    for prompt in {c.prompt_id for c in one}:
        shown = [c.text for of_arm in dealt.values() for cs in of_arm.values() for c in cs if c.prompt_id == prompt]
        assert len(set(shown)) == 8
        assert set(shown) <= {c.text for c in one if c.prompt_id == prompt}


def test_synthetic_arms_differ_where_they_should() -> None:
    def words(alike: bool) -> list[float]:
        found = completions(4, seed=0, alike=alike)
        return [float(np.mean([len(c.text.split()) for of in found.values() for c in of[arm]])) for arm in ARMS]

    same, apart = words(alike=True), words(alike=False)
    assert same[1] / same[0] == pytest.approx(1, abs=0.1)
    assert apart[1] / apart[0] > 1.3
