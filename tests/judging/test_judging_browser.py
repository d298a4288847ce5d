"""The judging page in a real browser: what a judge sees, clicks and types.

REPLICATION_SCREENSHOTS=DIR keeps a picture of every page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import picture
from required import do_without
from small_panel import SUITE, SmallPanel, served, small_panel
from sqlalchemy import select

from replication.config.study import load_study
from replication.judging.schema import judges, votes

PRESS_1 = "(how) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '1', bubbles: true, ...how}))"
PHONE = {"width": 360, "height": 740}
TOUCH = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
# The page is deaf for its first 300 ms: its clock stands still until a test turns it on.
CLOCK = "let now = 0; performance.now = () => now; window.turnOn = (ms) => { now += ms; };"

NASTY = (
    "<script>document.title = 'ran'; fetch('/healthz')</script><img src=x onerror=\"document.title='ran'\">",
    "</div></main><h1>Vote left</h1><form action=https://example.org><button>Left is better</button></form>",
    "a" * 3000,
    "\u202eturned round\u202c and \x00 \x1b[31m control",
    "",
    "   lines\n\n\n   keep their\tplace  &amp; {{ 7 * 7 }} {% raw %}",
    "word " * 20000,
    "\n \n",
)


@pytest.fixture
def panel(tmp_path: Path) -> SmallPanel:
    return small_panel(tmp_path)


@pytest.fixture
def address(panel: SmallPanel) -> Iterator[str]:
    with served(panel.store) as at:
        yield at


@pytest.fixture
def open_page(browser, address):
    """open_page(path, **context) -> a page in a fresh profile; complains of errors and of requests that leave."""
    contexts, wrong = [], []

    def opened(path: str, real_time: bool = False, **options):
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | options))
        context.set_default_timeout(60_000)
        if not real_time:
            context.add_init_script(CLOCK)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: None if r.url.startswith(address) else wrong.append(r.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def heading(page) -> str:
    return page.locator("h1").inner_text()


def wait(page) -> None:
    if page.evaluate("window.turnOn ? turnOn(301) : 'real time'") == "real time":
        page.wait_for_timeout(350)


def press(page, key: str) -> None:
    wait(page)
    with page.expect_navigation():
        page.keyboard.press(key)


def click(page, name: str) -> None:
    wait(page)
    with page.expect_navigation():
        page.get_by_role("button", name=name, exact=True).click()


def stored(panel: SmallPanel) -> list[str]:
    """The choices that stand, in order of casting."""
    with panel.database.read() as c:
        return list(
            c.execute(select(votes.c.choice).where(votes.c.undone_at.is_(None)).order_by(votes.c.vote_id)).scalars()
        )


def test_a_session_by_mouse(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}", real_time=True, permissions=["clipboard-read", "clipboard-write"])
    assert heading(page) == "Which text is the better attempt?"
    assert page.get_by_label("Keep this link").input_value() == page.url
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    picture(page, "rubric_wide_whole")
    click(page, "Start")
    picture(page, "item_wide")
    assert heading(page) == "Pair 1 of 6"
    shown = panel.store.show("judge-001")
    assert shown is not None
    assert page.locator("section[aria-labelledby=left] .words").inner_text() == shown.left
    assert page.locator("section[aria-labelledby=right] .words").inner_text() == shown.right
    left, right = (page.locator(f"section[aria-labelledby={side}]").bounding_box() for side in ("left", "right"))
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]
    said = ["Left is better", "Tie", "Right is better", "Both bad", "Tie", "Left is better"]
    for i, name in enumerate(said):
        assert heading(page) == f"Pair {i + 1} of 6"
        assert page.locator("progress").get_attribute("value") == str(i)
        click(page, name)
    assert heading(page) == "That was the last pair. Thank you!"
    assert page.get_by_label("Keep this link").input_value() == page.url
    picture(page, "finished_wide")
    assert stored(panel) == ["left", "tie", "right", "both_bad", "tie", "left"]


def test_a_session_by_keyboard(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    for said in ("", "Copy", "Start"):  # the field with the link has no words
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == said
    press(page, "Enter")
    for i, key in enumerate(["1", "2", "ArrowRight", "4", "3", "ArrowLeft"]):
        assert heading(page) == f"Pair {i + 1} of 6"
        assert page.evaluate("document.activeElement.tagName") == "H1"  # a screen reader begins at the number
        for scrolls in ("ArrowUp", "ArrowDown"):
            wait(page)
            page.keyboard.press(scrolls)
        press(page, key)
    assert stored(panel) == ["left", "tie", "right", "both_bad", "right", "left"]
    press(page, "u")
    assert heading(page) == "Pair 6 of 6"
    assert len(stored(panel)) == 5


def test_a_whole_session_takes_no_mouse_and_every_page_is_clean(tmp_path: Path, browser, clean) -> None:
    panel = small_panel(tmp_path, survey=True, votes=2)
    with served(panel.store) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.add_init_script(CLOCK)

        def enter(name: str, role: str = "button") -> None:
            """The page is checked, and what is named found and pressed by keyboard alone."""
            clean(page)
            wait(page)
            goal = page.get_by_role(role, name=name, exact=True)
            for _ in range(30):
                page.keyboard.press("Tab")
                if goal.evaluate("e => e === document.activeElement"):
                    break
            page.keyboard.press("Space" if role == "radio" else "Enter")

        page.goto(address)
        clean(page)
        page.goto(f"{address}/join/{panel.join}")
        for name in ("Take part", "Start"):
            with page.expect_navigation():
                enter(name)
        enter("Every week", "radio")
        with page.expect_navigation():
            enter("Send and go on")
        with page.expect_navigation():
            enter("Right is better")
        page.set_viewport_size(PHONE)
        with page.expect_navigation():
            enter("Undo “Second is better”")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")  # past the switch
        page.keyboard.press("Enter")
        assert page.get_by_text("You have four answers").is_visible()
        for name in ("First is better", "Both bad"):
            with page.expect_navigation():
                enter(name)
        assert heading(page) == "That was the last pair. Thank you!" and stored(panel) == ["left", "both_bad"]
        clean(page)
        page.goto(f"{page.url}/vote")
        clean(page)
        page.goto(f"{address}/admin")
        page.keyboard.type(panel.admin)
        enter("Sign in")
        page.get_by_role("heading", name=SUITE).wait_for()
        for lock in (panel.lock, str):
            clean(page)
            lock()
            page.reload()
        page.goto(f"{address}/j/{panel.links[0]}")
        clean(page)
        page.close()


def test_a_press_that_repeats_or_comes_too_early_or_with_a_modifier_does_nothing(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    page.keyboard.press("1")
    page.get_by_role("button", name="Tie", exact=True).click()
    page.evaluate("turnOn(299)")
    page.keyboard.press("1")
    page.get_by_role("button", name="Tie", exact=True).click()
    page.wait_for_timeout(100)
    assert stored(panel) == []
    page.evaluate("turnOn(1)")
    for modifier in ("ctrlKey", "altKey", "metaKey"):
        page.evaluate(PRESS_1, {modifier: True})
    page.evaluate(PRESS_1, {"repeat": True})
    page.wait_for_timeout(100)
    assert stored(panel) == []
    page.evaluate("for (const n of [1, 2]) document.querySelector('button[value=tie]').click()")
    page.get_by_role("heading", name="Pair 2 of 6").wait_for()
    assert stored(panel) == ["tie"]


def test_keys_that_vote_can_be_switched_off_for_good(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    switch = page.get_by_label("Shortcut keys")
    tie = page.get_by_role("button", name="Tie", exact=True)  # exact: no key is part of the name
    assert switch.is_checked() and tie.get_attribute("aria-keyshortcuts") == "2"
    wait(page)
    switch.uncheck()
    for key in ("1", "2", "ArrowRight", "u"):
        page.keyboard.press(key)
    assert not page.locator("kbd").first.is_visible() and tie.get_attribute("aria-keyshortcuts") is None
    picture(page, "item_keys_off")
    click(page, "Tie")
    assert not switch.is_checked(), "it is remembered"
    wait(page)
    page.keyboard.press("1")
    assert stored(panel) == ["tie"]
    switch.click()  # a mouse: the keys act at once, though the switch was clicked last
    press(page, "1")
    assert stored(panel) == ["tie", "left"] and switch.is_checked()


def test_keys_vote_only_where_nothing_else_is_meant(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    click(page, "Tie")
    wait(page)
    for where in ("button[value=right]", "summary", "#keys", ".progress button"):
        page.locator(where).focus()
        page.keyboard.press("1")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Shift+ArrowLeft")  # marks text
    page.keyboard.press("Shift+U")
    for how in ({"key": "!", "code": "Digit1", "shiftKey": True}, {"isComposing": True}, {"keyCode": 229},
                {"modifierAltGraph": True}):  # fmt: skip
        page.evaluate(PRESS_1, how)
    page.evaluate(
        "document.addEventListener('keydown', (event) => event.preventDefault(), {capture: true, once: true})"
    )
    page.keyboard.press("1")
    page.wait_for_timeout(100)
    assert stored(panel) == ["tie"]
    with page.expect_navigation():  # a French keyboard: a digit needs Shift
        page.evaluate(PRESS_1, {"key": "1", "code": "Digit1", "shiftKey": True})
    assert stored(panel) == ["tie", "left"]


def test_no_key_votes_where_a_caret_reads(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    wait(page)
    page.evaluate("getSelection().collapse(document.querySelector('.words').firstChild, 3)")  # as a screen reader does
    for key in ("1", "ArrowRight", "4"):
        page.keyboard.press(key)
    page.wait_for_timeout(100)
    assert stored(panel) == []
    page.locator(".words").first.click()  # a mouse leaves none
    press(page, "ArrowRight")
    assert stored(panel) == ["right"]


def test_a_vote_outlives_a_lost_connection(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}", **TOUCH)
    click(page, "Start")
    wait(page)
    page.context.set_offline(True)
    page.get_by_role("button", name="First is better").click()
    note = page.get_by_text("No connection. Your vote “First is better” is kept here")
    note.wait_for()
    page.get_by_role("button", name="Tie", exact=True).click()  # no vote while one may be on its way
    picture(page, "item_offline")
    assert note.is_visible() and fits(page) and stored(panel) == []
    other = page.context.new_page()
    page.close()  # kept by the browser, not by the page
    page.context.set_offline(False)
    other.goto(page.url)
    other.get_by_role("heading", name="Pair 2 of 6").wait_for()
    assert stored(panel) == ["left"]
    other.get_by_text("your vote “First is better” on the pair before was sent").wait_for()
    picture(other, "item_sent_late")
    other.context.set_offline(True)
    wait(other)
    other.get_by_role("button", name="Both bad").click()
    other.get_by_text("No connection").wait_for()
    other.context.set_offline(False)  # on the same page it is sent by itself
    other.get_by_role("heading", name="Pair 3 of 6").wait_for()
    assert stored(panel) == ["left", "both_bad"]


def test_no_button_is_named_after_its_key(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    click(page, "Tie")
    names = ["Undo “Tie”", "Left is better", "Tie", "Right is better", "Both bad"]
    assert [page.get_by_role("button", name=name, exact=True).count() for name in names] == [1] * 5
    phone = open_page(f"/j/{panel.links[0]}", **TOUCH)
    wait(phone)
    phone.keyboard.press("1")  # no keys are shown there, so none act
    phone.wait_for_timeout(100)
    assert stored(panel) == ["tie"] and not phone.get_by_label("Shortcut keys").is_visible()


def test_a_preview_says_so(panel: SmallPanel, browser) -> None:
    with served(panel.store, preview=True) as address:
        for name, options in (("wide", {}), ("phone_dark", {"viewport": PHONE, "color_scheme": "dark"})):
            page = browser.new_page(**options)
            page.goto(f"{address}/j/{panel.links[bool(options)]}")
            click(page, "Start")
            assert "votes given here are thrown away" in page.locator(".banner").inner_text() and fits(page)
            assert min(ratio for ratio, _ in page.evaluate(CONTRAST)) >= 4.5
            picture(page, f"preview_{name}")
            page.close()


def test_it_goes_on_after_the_browser_was_closed(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    click(page, "Tie")
    words = page.locator(".pair").inner_text()
    page.context.close()
    again = open_page(f"/j/{panel.links[0]}")
    assert heading(again) == "Pair 2 of 6"
    assert again.locator(".pair").inner_text() == words


def test_undo_brings_the_last_pair_again(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    assert page.get_by_role("button", name="Undo").count() == 0
    words = page.locator(".pair").inner_text()
    click(page, "Left is better")
    assert page.locator(".pair").inner_text() != words
    click(page, "Undo “Left is better”")
    assert (heading(page), page.locator(".pair").inner_text()) == ("Pair 1 of 6", words)
    assert stored(panel) == []
    click(page, "Right is better")
    assert stored(panel) == ["right"]


def test_a_press_of_back_never_votes_twice(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    click(page, "Left is better")
    page.go_back()
    page.wait_for_load_state()
    assert heading(page) != "Pair 1 of 6"
    assert stored(panel) == ["left"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(panel: SmallPanel, open_page, scheme: str) -> None:
    page = open_page(f"/j/{panel.links[0]}", **TOUCH, color_scheme=scheme)
    picture(page, f"rubric_phone_{scheme}_whole")
    assert fits(page)
    wait(page)
    with page.expect_navigation():
        page.get_by_role("button", name="Start").tap()
    picture(page, f"item_phone_{scheme}")
    assert fits(page)
    left, right = (page.locator(f"section[aria-labelledby={side}]").bounding_box() for side in ("left", "right"))
    assert left["y"] + left["height"] <= right["y"] and left["x"] == right["x"]
    assert [page.locator(f"h2#{side}").inner_text() for side in ("left", "right")] == ["First", "Second"]
    assert page.get_by_role("button", name="Second is better", exact=True).is_visible()
    for button in page.locator(".bar button").all():
        box = button.bounding_box()
        assert box["height"] >= 44 and box["width"] >= 44
        assert box["y"] + box["height"] <= PHONE["height"]  # in sight, wherever the page is scrolled to
    wait(page)
    with page.expect_navigation():
        page.get_by_role("button", name="Both bad").tap()
    assert stored(panel) == ["both_bad"]


@pytest.mark.parametrize("options", [{}, TOUCH])
def test_beside_long_texts_the_rubric_unfolds_in_view_and_labels_stay_in_sight(
    tmp_path: Path, browser, options
) -> None:
    panel = small_panel(tmp_path, text=lambda *_: "A sentence of a long text. " * 200)
    with served(panel.store) as address:
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | options))
        page = context.new_page()
        page.goto(f"{address}/j/{panel.links[0]}")
        click(page, "Start")
        name = "phone" if options else "wide"
        picture(page, f"item_long_{name}")
        jump = page.get_by_role("link", name="Second")
        assert jump.is_visible() == bool(options)
        page.locator("summary").click()
        rubric, bar = page.locator("details p").first.bounding_box(), page.locator(".bar").bounding_box()
        assert rubric["y"] > 0 and rubric["y"] + rubric["height"] <= bar["y"]
        picture(page, f"item_rubric_{name}")
        page.locator("summary").click()
        if options:
            jump.tap()
            heading_ = page.locator("h2#right").bounding_box()
            assert 0 <= heading_["y"] < PHONE["height"] / 2
            page.evaluate("scrollBy(0, 1500)")  # in the midst of the text: label and prompt are in sight all the same
            picture(page, "item_jumped_phone")
            boxes = [page.locator(f).bounding_box() for f in (".prompt", "section[aria-labelledby=right] .label")]
            assert boxes[0]["y"] == 0 and abs(boxes[1]["y"] - boxes[0]["height"]) <= 1
            page.set_viewport_size({"width": PHONE["height"], "height": PHONE["width"]})  # on its side
            left, right = (page.locator(f"h2#{side}").bounding_box() for side in ("left", "right"))
            assert left["y"] == right["y"] and fits(page) and page.locator("h2#left").inner_text() == "Left"
            assert page.locator(".bar").bounding_box()["height"] < 64
            picture(page, "item_landscape")
        context.close()


def fits(page) -> bool:
    """No horizontal scrolling."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_without_javascript(tmp_path: Path, browser) -> None:
    panel = small_panel(tmp_path, survey=True, votes=2)
    with served(panel.store) as address:
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(f"{address}/join/{panel.join}")
        picture(page, "join_wide")
        page.get_by_role("button", name="Take part").click()
        assert page.get_by_label("Keep this link").input_value() == page.url
        assert page.get_by_role("button", name="Copy").count() == 0
        page.get_by_role("button", name="Start").click()
        picture(page, "survey_wide")
        page.get_by_label("Every week").check()
        page.get_by_label("Machine learning", exact=True).check()
        page.get_by_role("button", name="Send and go on").click()
        assert not page.locator("kbd").first.is_visible()  # keys need the script
        picture(page, "item_no_script")
        page.get_by_role("button", name="Both bad", exact=True).click()
        page.get_by_role("button", name="Undo “Both bad”").click()
        page.get_by_role("button", name="Tie", exact=True).click()
        page.get_by_role("button", name="Left is better").click()
        assert heading(page) == "That was the last pair. Thank you!"
        context.close()
    assert stored(panel) == ["tie", "left"]
    with panel.database.read() as c:
        [survey] = c.execute(select(judges.c.survey).where(judges.c.survey.is_not(None))).scalars().all()
    assert survey == {"chat_models": "weekly", "background": "ml"}


def test_completions_are_text_whatever_they_hold(tmp_path: Path, browser) -> None:
    def nasty(prompt: int, seed: int, arm: str, sample: int) -> str:
        return NASTY[2 * prompt + (arm == "both")]

    panel = small_panel(tmp_path, text=nasty, n_prompts=4, votes=8)
    asked: list[str] = []
    seen = set()
    with served(panel.store) as address:
        context = browser.new_context(viewport=PHONE)
        context.add_init_script(CLOCK)
        page = context.new_page()
        page.on("request", lambda r: asked.append(r.url))
        page.goto(f"{address}/j/{panel.links[0]}")
        click(page, "Start")
        for i in range(8):
            shown = panel.store.show("judge-001")
            assert shown is not None and fits(page)
            assert page.title() == f"Pair {i + 1} of 8 · Judging"
            assert (page.locator("h1").count(), page.locator(".bar button").count()) == (1, 4)
            for side, text in (("left", shown.left), ("right", shown.right)):
                section = page.locator(f"section[aria-labelledby={side}]")
                seen.add(text)
                if not text.strip():
                    assert section.locator("p").inner_text() == "(empty)"
                    continue
                marks = re.sub("[\x00\x1b\u202a-\u202e]", lambda m: f"U+{ord(m.group()):04X}", text)
                assert section.locator(".words").evaluate("e => e.textContent") == marks
            picture(page, f"nasty_{i}")
            click(page, "Tie")
        context.close()
    assert len(seen) == len(NASTY)
    assert all(url.startswith(address) for url in asked)
    assert {url.removeprefix(address).split("?")[0].split("/")[1] for url in asked} == {"j", "static"}


def test_arabic_and_chinese_read_in_their_own_direction(tmp_path: Path, browser, clean) -> None:
    said = {"baseline": "1. القمر يدور حول الأرض. تُسمّى هذه الحركة مدارًا.", "both": "月亮绕着地球转。人们把它叫做轨道。"}
    study = replace(load_study(), language="ar")
    panel = small_panel(tmp_path, text=lambda _, __, arm, ___: said[arm], study=study)
    with served(panel.store) as address:
        page = browser.new_page(viewport=PHONE)
        page.goto(f"{address}/j/{panel.links[0]}")
        click(page, "Start")
        clean(page)
        for words in page.locator(".text .words").all():
            is_arabic = words.inner_text() == said["baseline"]
            assert words.get_attribute("lang") == "ar" and words.inner_text() in said.values()
            assert words.evaluate("e => getComputedStyle(e).direction") == ("rtl" if is_arabic else "ltr")
        picture(page, "item_arabic_chinese")
        page.close()


def test_pages_of_a_paid_study_are_clean(tmp_path: Path, browser, clean) -> None:
    study = load_study("paid")
    panel = small_panel(tmp_path, votes=2, study=study)
    assert study.check is not None
    with served(panel.store) as address:
        page = browser.new_page(**TOUCH)
        for i, link in enumerate(panel.links):
            page.goto(f"{address}/j/{link}")
            clean(page)
            picture(page, "start_paid_whole")
            page.get_by_role("checkbox").check()
            click(page, "Start")
            for _ in range(2 - i):  # the first judge fails both tries
                clean(page)
                for answers in study.check.values():
                    page.get_by_label(answers[1 - i], exact=True).check()
                click(page, "Go on")
            clean(page)
            picture(page, f"paid_{i}_whole")
        while heading(page) != "That was the last pair. Thank you!":
            for group in page.locator("fieldset:has([required])").all():
                group.get_by_label("Second is better").check()
            click(page, "First is better")
        assert fits(page) and set(stored(panel)) == {"left"}
        page.close()


MARKDOWN = """# A heading

- **bold** and *slanted* in a list
- `code <b>` and ~~gone~~

| left | right |
|------|------:|
| 1 | 2 |

```html
<script>document.title = "ran"</script>
```
<img src=x onerror="document.title='ran'"> [a link](javascript:alert(1)) ![a picture](https://example.org/x.png)
next line, \u202eturned"""


def test_markdown_is_shown_alike_on_both_sides_and_does_nothing(tmp_path: Path, browser, clean) -> None:
    try:
        import nh3  # noqa: F401
    except ImportError:
        do_without("nh3", "nh3 is not installed (pip install '.[test]')")
    panel = small_panel(tmp_path, text=lambda *_: MARKDOWN, study=replace(load_study(), format="markdown"))
    asked: list[str] = []
    with served(panel.store) as address:
        page = browser.new_page(viewport=PHONE)
        page.on("request", lambda r: asked.append(r.url))
        page.goto(f"{address}/j/{panel.links[0]}")
        click(page, "Start")
        clean(page)
        assert fits(page) and page.title() == "Pair 1 of 6 · Judging"
        picture(page, "item_markdown")
        left, right = (page.locator(f"#{side}-text .words") for side in ("left", "right"))
        assert left.inner_html() == right.inner_html()
        seen = {"h3": "A heading", "strong": "bold", "em": "slanted", "li code": "code <b>", "s": "gone"}
        for tag, words in (seen | {"td >> nth=1": "2", "pre": '<script>document.title = "ran"</script>'}).items():
            assert left.locator(tag).inner_text().strip() == words
        last = left.locator("p").inner_text()
        assert "[a link](javascript:alert(1)) ![a picture](https://example.org/x.png)\nnext line, U+202Eturned" in last
        assert "<img src=x" in last and left.locator("a, img, script").count() == 0
        page.close()
    assert all(url.startswith(address) for url in asked)


def test_of_two_windows_the_slower_is_told_and_goes_on_by_itself(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/j/{panel.links[0]}")
    click(page, "Start")
    other = open_page(f"/j/{panel.links[0]}")
    click(page, "Left is better")
    click(other, "Right is better")
    assert heading(other) == "There is a vote on this pair already"
    picture(other, "stored_already")
    assert stored(panel) == ["left"]
    other.get_by_role("heading", name="Pair 2 of 6").wait_for(timeout=60_000)


def test_the_open_link(panel: SmallPanel, open_page) -> None:
    page = open_page(f"/join/{panel.join}")
    click(page, "Take part")
    own = page.url
    assert "/j/" in own and panel.join not in own
    click(page, "Start")
    assert heading(page) == "Pair 1 of 6"
    click(open_page(f"/join/{panel.join}"), "Take part")
    third = open_page(f"/join/{panel.join}")
    click(third, "Take part")
    assert heading(third) == "All places are taken" and third.get_by_role("link").count() == 0
    picture(third, "taken_wide")


def test_the_administrator(tmp_path: Path, browser) -> None:
    panel = small_panel(tmp_path, survey=True, repeat_share=0.5, attention=1)
    for n, choice in enumerate(["left", "tie", "right", "left", "both_bad", "left", "left", "right", "left", "tie"]):
        shown = panel.store.show("judge-001")
        assert shown is not None
        panel.store.vote("judge-001", shown.impression, choice)
        if n < 4 and (other := panel.store.show("judge-002")):
            panel.store.vote("judge-002", other.impression, "left")
    panel.store.answer_survey("judge-001", {"background": "ml", "native_english": "no"})
    with served(panel.store) as address:
        context = browser.new_context(viewport={"width": 1200, "height": 900})
        page = context.new_page()
        page.goto(f"{address}/admin")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        assert page.get_by_role("alert").is_visible()
        picture(page, "sign_in_wrong")
        page.get_by_label("Token").fill(panel.admin)
        page.get_by_role("button", name="Sign in").click()
        assert heading(page) == SUITE
        picture(page, "admin_open_whole")
        assert "Hidden until the panel is locked" in page.content()
        panel.lock()
        page.get_by_role("link", name="Refresh").click()
        assert page.get_by_role("link", name="votes.csv").is_visible()
        picture(page, "admin_locked_whole")
        page.set_viewport_size(PHONE)
        assert fits(page)
        picture(page, "admin_phone_whole")
        page.goto(f"{address}/j/{panel.links[1]}")
        assert heading(page) == "The judging is closed"
        picture(page, "closed_phone")
        page.goto(f"{address}/admin")
        page.get_by_role("button", name="Sign out").click()
        assert heading(page) == "Administrator"
        context.close()


CONTRAST = """() => {
  const channels = (colour) => [...colour.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const linear = (v) => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = (e) => {
    if (!e) return [255, 255, 255];
    const colour = channels(getComputedStyle(e).backgroundColor);
    return colour[3] === 1 ? colour : behind(e.parentElement);
  };
  const isWords = (node) => node.nodeType === 3 && node.textContent.trim();
  const hasWords = (e) => e.checkVisibility() && [...e.childNodes].some(isWords);
  return [...document.querySelectorAll("body *")].filter(hasWords).map((e) => {
    const pair = [light(channels(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => a - b);
    return [(pair[1] + .05) / (pair[0] + .05), e.textContent.trim().slice(0, 40)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(panel: SmallPanel, open_page, scheme: str) -> None:
    page = open_page(f"/j/{panel.links[0]}", color_scheme=scheme, reduced_motion="reduce")
    backgrounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", backgrounds))) < 200) == (scheme == "dark")
    seen = page.evaluate(CONTRAST)
    picture(page, f"rubric_{scheme}")
    click(page, "Start")
    click(page, "Tie")
    page.locator("summary").click()
    picture(page, f"item_{scheme}_whole")
    seen += page.evaluate(CONTRAST)
    page.goto(page.url + "/vote")
    picture(page, f"error_{scheme}")
    seen += page.evaluate(CONTRAST)
    assert len(seen) > 40
    assert [text for ratio, text in seen if ratio < 4.5] == []
