"""Curves of the page: what a person hovers, switches and prints, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from chromium import picture
from run_files import read_journal
from synthetic_runs import build_suite

from replication.report.curves import MOST_STEPS, _thinned
from replication.report.report import write_report
from replication.runs.files import read_json
from replication.runs.layout import SuiteDir
from replication.statistics.format import arm_name

DIGITS = r"(?P<value>-?[\d.]+)"


@pytest.fixture(scope="module")
def suite_dir(tmp_path_factory: pytest.TempPathFactory) -> SuiteDir:
    """Two arms and two seeds, one of which stopped early."""
    built = build_suite(
        tmp_path_factory.mktemp("curves"), arms=("baseline", "both"), samples=False, interrupted={("both", 2): 30}
    )
    write_report(*built)
    return built[0]


@pytest.fixture(scope="module")
def figure(browser, suite_dir: SuiteDir) -> Iterator[object]:
    """The figure of validation losses, on a page that may ask nothing of a network and must not fail."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else None)
    page.goto(suite_dir.report_html.as_uri())
    found = page.locator("figure[data-curves=validation_loss]")
    found.scroll_into_view_if_needed()
    found.locator("canvas").nth(1).wait_for()
    yield found
    page.close()
    assert wrong == []


def hover(figure, share: float) -> str:
    area = figure.locator(".u-over").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    figure.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
    return figure.locator("output").first.inner_text()


def read(words: str, what: str) -> float | None:
    found = re.search(rf"{re.escape(what)} {DIGITS}", words)
    return float(found["value"]) if found else None


def test_what_is_hovered_is_the_journals(figure, suite_dir: SuiteDir) -> None:
    words = hover(figure, 0.3)
    step = read(words, "step")
    assert step is not None and 3 <= step < 30
    losses = {}
    for arm in ("baseline", "both"):
        for seed in (1, 2):
            lines = read_journal(suite_dir.cell(arm, seed).metrics)
            (losses[arm, seed],) = [
                line["val/loss_nats"] for line in lines if line["step"] == step and "val/loss_nats" in line
            ]
            assert read(words, f"{arm_name(arm)} seed {seed}") == pytest.approx(losses[arm, seed], rel=1e-5)
    assert read(words, "baseline mean") == pytest.approx(np.mean([losses["baseline", s] for s in (1, 2)]), rel=1e-5)
    assert read(words, "token + layer gain mean") == pytest.approx(losses["both", 1], rel=1e-5), "of the complete ones"
    picture(figure.page, "report_curves")


def test_arms_and_seeds_are_switched_everywhere(figure) -> None:
    page = figure.page
    figure.locator("button[data-key=baseline]").click()
    figure.locator("summary").click()
    figure.locator("button[data-key='2']").click()
    words = hover(figure, 0.3)
    assert read(words, "token + layer gain seed 1") and not re.search("baseline|seed 2", words)
    picture(page, "report_curves_switched")
    other = page.locator("figure[data-curves=train_loss]")
    other.scroll_into_view_if_needed()  # it is made when it is near
    assert other.locator("button[data-key=baseline]").get_attribute("aria-pressed") == "false"
    figure.locator("button[data-key=baseline]").click()
    figure.locator("button[data-key='2']").click()
    assert read(hover(figure, 0.3), "baseline seed 2")


def test_a_drag_zooms_and_keys_read(figure) -> None:
    before = read(hover(figure, 0.05), "step")
    box = figure.locator(".u-over").first.bounding_box()
    mouse, y = figure.page.mouse, box["y"] + 30
    mouse.move(box["x"] + box["width"] * 0.5, y)
    mouse.down()
    mouse.move(box["x"] + box["width"] * 0.9, y, steps=3)
    mouse.up()
    zoomed = read(hover(figure, 0.05), "step")
    assert before < 20 < zoomed
    figure.locator(".plot").first.focus()
    figure.page.keyboard.press("ArrowRight")
    assert read(figure.locator("output").first.inner_text(), "step") == zoomed + 3
    figure.get_by_role("button", name="whole range").click()
    assert read(hover(figure, 0.05), "step") == before


def test_pictures_stand_in_print_and_without_javascript(figure, browser, suite_dir: SuiteDir) -> None:
    image, curves = figure.locator("img"), figure.locator(".curves")
    assert (image.is_visible(), curves.is_visible()) == (False, True)
    figure.page.emulate_media(media="print")
    assert (image.is_visible(), curves.is_visible()) == (True, False)
    figure.page.emulate_media(media="screen")
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(suite_dir.report_html.as_uri())
    assert plain.locator("img[data-figure=validation_loss]").is_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing(figure, clean, scheme: str) -> None:
    figure.page.emulate_media(color_scheme=scheme)
    figure.page.evaluate("document.querySelectorAll('details').forEach((folded) => folded.open = true)")
    clean(figure.page)


def test_a_thinned_curve_keeps_ends_and_extremes(suite_dir: SuiteDir) -> None:
    rng, steps = np.random.default_rng(1), np.arange(1.0, 30_001)
    lines = {name: (steps, rng.normal(size=30_000)) for name in ("one", "two")}
    lines["two"][1][12_345] = 99
    kept, values = _thinned(lines, MOST_STEPS)
    assert len(kept) <= MOST_STEPS + 2 and kept[0] == 1 and kept[-1] == 30_000
    assert values["two"][kept.index(12_346)] == 99
    at = np.searchsorted(steps, kept)
    np.testing.assert_allclose(values["one"], lines["one"][1][at], rtol=1e-5)
    (panel,) = [p for p in read_json(suite_dir.figures / "curves.json")["panels"] if p["figure"] == "train_loss"]
    raw = [
        x
        for line in read_journal(suite_dir.cell("both", 1).metrics)
        for x in line.get("per_step", {}).get("train/loss_nats", [])
    ]
    assert panel["tables"][0][1]["both/seed-1"] == pytest.approx(raw, rel=1e-5), "each step, not the windows"
