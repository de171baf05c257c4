"""The page as a person uses it: keys, search, switches, size, hostile rollouts, accessibility."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from credit_records import build_page, make_groups, make_rollout
from selenium.webdriver.common.keys import Keys

HEADING = "return document.querySelector('#pair h3').textContent"
CHOSEN = "return document.querySelector('.rollouts [aria-current]').getAttribute('aria-label')"
FOCUSED = """const token = document.activeElement;
return [token.dataset.position, token.closest('.box')?.classList.contains('peer')]"""
TOKEN = "return document.querySelector('#token').innerText"
EDGES = """return [...document.querySelectorAll(arguments[0])]
    .map((box) => box.getBoundingClientRect()[arguments[1]])"""
COLOURS = "return [...document.querySelectorAll('.token')].map((t) => t.style.backgroundColor)"


def choose(browser: Any, question: str, index: int) -> None:
    """Clicks on a rollout in the list."""
    browser.run(
        """const item = [...document.querySelectorAll('#groups li')]
             .find((li) => li.querySelector('.prompt').textContent.includes(arguments[0]));
           item.querySelectorAll('button')[arguments[1]].click()""",
        question,
        index,
    )
    browser.until(f"{CHOSEN}.includes('rollout {index},')")
    browser.until(f"{HEADING}.includes('Rollout {index} ')")


def test_opens_at_the_first_failed_rollout_with_a_peer(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    assert browser.run(HEADING).startswith("✗ Rollout 1 · failed · 30 tokens")
    assert "rollout 1, failed, leaves peer 0 at token 15" in browser.run(CHOSEN)
    assert browser.run("return document.querySelectorAll('#pair h3').length") == 2
    assert browser.run("return document.querySelector('.divergence').textContent").endswith("15")
    tops = browser.run(EDGES, ".box.rest", "top")
    assert len(tops) == 2 and tops[0] == tops[1]
    marked = browser.run(
        "return [...document.querySelectorAll('.token.tau')].map((t) => t.dataset.position)"
    )
    assert marked == ["15", "15"]


def test_keys_move_between_tokens(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    browser.press("d")
    assert browser.run(FOCUSED) == ["15", False]
    assert "at its divergence" in browser.run(TOKEN)
    browser.press(Keys.ARROW_LEFT)
    assert browser.run(FOCUSED) == ["14", False]
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.run(FOCUSED) == ["16", False]
    browser.press("p")
    assert browser.run(FOCUSED) == ["16", True]
    browser.press(Keys.END)
    assert browser.run(FOCUSED) == ["29", True]
    browser.press(Keys.ARROW_RIGHT)
    assert browser.run(FOCUSED) == ["29", True]
    browser.press(Keys.HOME)
    assert browser.run(FOCUSED) == ["0", True]
    selected = "return document.querySelectorAll('.token[aria-selected=true]').length"
    assert browser.run(selected) == 1
    assert browser.run("return document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1


def test_up_and_down_follow_the_lines(browser: Any, large_page: Path) -> None:
    browser.open(large_page)
    browser.press("d", Keys.ARROW_DOWN)
    top = "return document.activeElement.getClientRects()[0].top + scrollY"
    line = browser.run(top)
    browser.press(Keys.ARROW_DOWN)
    below = browser.run(top)
    assert 20 < below - line < 80
    browser.press(Keys.ARROW_UP)
    assert browser.run(top) == pytest.approx(line, abs=1)


def test_the_inspector_shows_the_packed_numbers(browser: Any, small_page: Path) -> None:
    (_, failed, *_) = make_groups(groups=1, group_size=4, length=30)
    browser.open(small_page)
    browser.press("d")
    cells = browser.run(
        "return [...document.querySelectorAll('#token td')]"
        ".map((cell) => Number(cell.textContent.replace('−', '-')))"
    )
    expected = [failed.logprob[15], failed.entropy[15], failed.weight[15]]
    for name in ("answer_peer", "answer"):
        context = failed.contexts[name]
        expected += [
            context.credit[15],
            context.logprob[15],
            context.kl[15],
            context.entropy[15],
        ]
    assert cells == pytest.approx(expected, abs=2e-4)
    assert f"id {failed.token_ids[15]}" in browser.run(TOKEN)
    assert browser.run("return document.querySelectorAll('.top li').length") == 10
    browser.press("m")
    largest = int(abs(failed.contexts["answer_peer"].credit).argmax())
    assert browser.run(FOCUSED) == [str(largest), False]


def test_pointing_shows_a_token_and_leaving_returns_to_the_selected(
    browser: Any, small_page: Path
) -> None:
    browser.open(small_page)
    browser.press("d")
    send = """document.querySelector(arguments[0])
        .dispatchEvent(new PointerEvent(arguments[1], {bubbles: arguments[2]}))"""
    browser.run(send, ".token[data-position='3']", "pointerover", True)
    assert "token 3 of 30" in browser.run(TOKEN)
    browser.run(send, "#pair", "pointerleave", False)
    assert "token 15 of 30" in browser.run(TOKEN)


def test_keys_move_between_rollouts(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    for key, question, index in (
        ("j", 0, 2),
        ("k", 0, 1),
        ("k", 0, 0),
        ("k", 0, 0),
        ("J", 1, 0),
        ("J", 2, 0),
        ("K", 1, 0),
    ):
        browser.press(key)
        browser.until(f"{CHOSEN}.startsWith('Prompt of question {question}.: rollout {index},')")


def test_switches_change_the_colours(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    seen = [browser.run(COLOURS)]
    for key in ("2", "3", "1", "c", "c"):
        browser.press(key)
        seen.append(browser.run(COLOURS))
    credit, kl, entropy, credit_again, answer, answer_peer = seen
    assert credit == credit_again == answer_peer
    assert len({tuple(colours) for colours in (credit, kl, entropy, answer)}) == 4
    browser.run("document.querySelector('input[name=measure][value=\"2\"]').click()")
    assert browser.run(COLOURS) == entropy
    assert "entropy" in browser.run("return document.querySelector('#scale').ariaLabel")


def test_search_and_filter(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    matches = "return document.querySelector('#matches').textContent"
    visible = """return [...document.querySelectorAll('#groups button')]
        .filter((button) => button.offsetParent).length"""
    assert browser.run(matches) == "16 of 16 rollouts"
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.press("LONELY")
    assert (browser.run(matches), browser.run(visible)) == ("1 of 16 rollouts", 1)
    browser.press(Keys.ESCAPE)
    browser.run(
        "const search = document.querySelector('#search'); search.value = '';"
        "search.dispatchEvent(new Event('input'))"
    )
    for outcome, count in (("covered", 10), ("alone", 2), ("correct", 4), ("all", 16)):
        browser.run(
            "const s = document.querySelector('#outcome'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('change'))",
            outcome,
        )
        assert browser.run(matches) == f"{count} of 16 rollouts"
        assert browser.run(visible) == count


def test_a_rollout_without_a_peer_or_a_teacher(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    choose(browser, "lonely", 0)
    note = "return document.querySelector('#note').textContent"
    assert "gives this rollout no teacher" in browser.run(note)
    assert set(browser.run(COLOURS)) == {""}
    browser.press("c", "d")
    assert "No other rollout of the group succeeded" in browser.run(note)
    assert "" not in browser.run(COLOURS)
    assert "0.5000" in browser.run(TOKEN)


def test_a_rollout_that_is_a_prefix_of_its_peer(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    choose(browser, "prefix", 0)
    assert "cut by length" in browser.run(HEADING)
    texts = browser.run(
        "return [...document.querySelectorAll('.box.rest')].map((box) => box.textContent)"
    )
    assert texts[0] == "ends here: it is a prefix of the other" and texts[1]


def test_a_file_without_any_teacher(browser: Any, tmp_path: Path) -> None:
    rollout = make_rollout(4, peer=None, correct=True, credits={})
    browser.open(build_page(tmp_path / "page.html", lambda: iter([rollout])))
    browser.press("m")
    assert browser.run("return document.querySelectorAll('.top').length") == 1
    caption = browser.run("return document.querySelector('#profile-caption').textContent")
    assert caption == "No failing rollout with a peer has this context."


def test_other_contexts_are_loaded_when_they_are_looked_at(
    browser: Any, small_page: Path, split_page: Path
) -> None:
    browser.open(small_page)
    browser.press("c", "d")
    colours, token = browser.run(COLOURS), browser.run(TOKEN)
    browser.open(split_page)
    files = "return [...document.querySelectorAll('script[src]')].map((script) => script.src)"
    assert browser.run(files) == []
    browser.press("c", "d")
    browser.until(f"{COLOURS}.some(Boolean)")
    assert browser.run(COLOURS) == colours
    assert browser.run("return document.querySelectorAll('.top li').length") == 10
    shown = browser.run(TOKEN)
    answer = [line for line in token.splitlines() if line.startswith("answer")]
    assert answer[-1] in shown.splitlines()
    assert [name.rsplit("/", 1)[1] for name in browser.run(files)] == ["answer-0.js"]
    browser.press("j", "c", "c")  # nothing is loaded twice
    assert len(browser.run(files)) == 1


def test_a_context_whose_file_is_gone_is_named(browser: Any, tmp_path: Path) -> None:
    page = build_page(
        tmp_path / "page.html",
        lambda: make_groups(groups=1, group_size=2, length=8),
        sidecars=True,
    )
    shutil.rmtree(tmp_path / "page-contexts")
    browser.open(page)
    browser.press("c")
    note = "document.querySelector('#note').textContent"
    browser.until(f"return {note}.includes('answer-0.js, which is not beside this page')")
    browser.press("c")
    assert "" not in browser.run(COLOURS)
    assert len(browser.said()) >= 1  # the browser's own word on the missing file


def test_hostile_rollouts_are_shown_and_never_run(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    choose(browser, "window.hacked", 0)
    browser.press("d")
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.querySelectorAll('img, b').length") == 0
    shown = browser.run("return document.querySelector('#pair').textContent")
    assert "</script><script>window.hacked=1</script><img src=x" in shown and "<b>bold</b>" in shown
    assert "<script>" in browser.run(TOKEN)


def test_the_help_lists_the_keys(browser: Any, small_page: Path) -> None:
    browser.open(small_page)
    browser.press("?")
    assert browser.run("return document.querySelector('#help').open") is True
    assert browser.run("return document.querySelectorAll('#keys dt').length") >= 13
    browser.press("j")  # belongs to the dialog
    assert "rollout 1," in browser.run(CHOSEN)
    browser.press(Keys.ESCAPE)
    assert browser.run("return document.querySelector('#help').open") is False


def test_five_hundred_long_rollouts_open_within_three_seconds(
    browser: Any, large_page: Path
) -> None:
    assert large_page.stat().st_size <= 40_000_000
    started = time.perf_counter()
    browser.open(large_page)
    assert time.perf_counter() - started < 3
    assert browser.run("return document.querySelectorAll('#groups button').length") == 500
    assert browser.run("return document.querySelectorAll('.token').length") == 4000
    started = time.perf_counter()
    browser.press("j")
    browser.until(f"{HEADING}.includes('Rollout 2 ')")
    assert time.perf_counter() - started < 1.5
    frames = browser.driver.execute_async_script(
        """const done = arguments[0]; let count = 0, started = performance.now();
           const step = () => { scrollBy(0, 60); ++count < 60 ? requestAnimationFrame(step)
             : done((performance.now() - started) / count); };
           requestAnimationFrame(step);"""
    )
    assert frames < 50  # milliseconds a frame, on processors that share their time


def test_the_rollout_chosen_last_is_shown(browser: Any, large_page: Path) -> None:
    """Also where one chosen before it takes longer to decode."""
    browser.open(large_page)
    browser.run(
        "const buttons = document.querySelectorAll('.rollouts button');"
        "buttons[402].click(); buttons[1].click()"
    )
    time.sleep(1)
    assert "question 0.: rollout 1," in browser.run(CHOSEN)
    assert browser.run(HEADING).startswith("✗ Rollout 1 ")


def test_a_large_file_keeps_top_tokens_where_credit_is_largest(
    browser: Any, large_page: Path
) -> None:
    browser.open(large_page)
    browser.press("m")
    assert browser.run("return document.querySelectorAll('.top li').length") == 10
    missing = "return document.querySelector('.top').textContent.includes('not kept')"
    kept = 0
    for _ in range(30):
        browser.press(Keys.ARROW_RIGHT)
        kept += not browser.run(missing)
    assert kept < 15


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1440, 1000, 390])
def test_accessibility(browser: Any, small_page: Path, axe: str, dark: bool, width: int) -> None:
    browser.emulate(dark=dark, width=width, height=844)
    browser.open(small_page)
    browser.press("d")
    browser.run(axe)  # the driver's scripts are not held back by the page's policy
    found = browser.driver.execute_async_script(
        "const done = arguments[0]; axe.run(document).then((r) => done(r.violations.map("
        "(v) => [v.id, v.nodes.map((n) => [n.html.slice(0, 150), n.failureSummary])])))"
    )
    assert found == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_readable_on_every_colour(browser: Any, small_page: Path, dark: bool) -> None:
    """Contrast of at least 4.5 (WCAG 2.2 AA) on both ends and the middle of each scale."""
    browser.emulate(dark=dark)
    browser.open(small_page)
    contrasts = browser.run(
        """const light = (css) => { const c = css.match(/\\d+/g).slice(0, 3).map((v) => v / 255)
             .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
             return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2] + 0.05; };
           const text = light(getComputedStyle(document.querySelector('.token')).color);
           const found = [];
           for (const key of ['1', '2', '3']) {
             document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
             for (const cell of document.querySelectorAll('#scale .bar i')) {
               const back = light(cell.style.backgroundColor);
               found.push(Math.max(text, back) / Math.min(text, back));
             }
           }
           return found"""
    )
    assert len(contrasts) == 3 * 41 and min(contrasts) >= 4.5


def test_zero_is_the_page_itself(browser: Any, small_page: Path) -> None:
    for dark in (False, True):
        browser.emulate(dark=dark)
        browser.open(small_page)
        middle, page = browser.run(
            "return [document.querySelectorAll('#scale .bar i')[20].style.backgroundColor,"
            "getComputedStyle(document.documentElement).backgroundColor]"
        )
        assert middle.replace(" ", "") == page.replace(" ", "")


def test_a_phone_shows_everything_in_one_column(browser: Any, small_page: Path) -> None:
    browser.emulate(width=390, height=844)
    browser.open(small_page)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    lefts = browser.run(EDGES, "#pair .box", "left")
    assert len(set(lefts)) == 1
    browser.press("d")
    hidden = browser.run(
        "return document.activeElement.getBoundingClientRect().bottom"
        " > document.querySelector('#inspector').getBoundingClientRect().top"
    )
    assert not hidden
