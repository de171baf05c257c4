"""A headless Chromium and pages to open in it. Without a browser these tests fail, none skips."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from credit_records import build_page, make_groups, make_rollout
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

from hsd.credit.records import RolloutCredit

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1440,900",
)
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")


class Browser:
    """One window, the page in it, and what it complained about or asked for."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        self.said()
        self.requests()
        self.driver.get(page.as_uri())
        self.until("return document.querySelectorAll('#strips tbody tr').length > 0")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, seconds: float = 10) -> None:
        """Waits until a script returns something true."""
        WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda _: self.run(script))

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def emulate(self, *, dark: bool = False, width: int = 1440, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def said(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        events = [
            json.loads(entry["message"])["message"]
            for entry in self.driver.get_log("performance")  # type: ignore[no-untyped-call]
        ]
        wanted = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in wanted]


@pytest.fixture(scope="session")
def _driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.fail(
            "no chromium and chromedriver here: make test-browser installs them or says how"
        )
    options = Options()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    log = str(tmp_path_factory.mktemp("chromedriver") / "log")
    driver = webdriver.Chrome(options=options, service=Service(chromedriver, log_output=log))
    yield driver
    driver.quit()


@pytest.fixture
def browser(_driver: webdriver.Chrome) -> Iterator[Browser]:
    """A browser in the light scheme; at the end nothing may have been logged or requested."""
    browser = Browser(_driver)
    browser.emulate()
    yield browser
    assert browser.said() == []
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    assert len(browser.run("return performance.getEntriesByType('resource')")) == 0


def small_rollouts() -> Iterator[RolloutCredit]:
    """Three ordinary groups; one without a peer or a teacher; a prefix; and a hostile one."""
    yield from make_groups(groups=3, group_size=4, length=30)
    yield make_rollout(
        12,
        question="lonely question",
        group_size=1,
        group_correct=0,
        peer=None,
        credits={"answer": [0.5] * 12},
    )
    yield make_rollout(
        5, question="prefix", correct=False, peer=1, divergence=5, finish_reason="length"
    )
    yield make_rollout(
        9, seed=1, question="prefix", index=1, correct=True, peer=None, text="longer answer"
    )
    yield make_rollout(
        3,
        seed=2,
        question=HOSTILE,
        prompt=HOSTILE,
        answer=HOSTILE,
        text=HOSTILE,
        peer=None,
        token_ids=[7, 8, 9],
        tokens=(HOSTILE, "<b>bold</b>", "\n\n"),
    )


def small_records() -> Iterator[RolloutCredit]:
    for number, rollout in enumerate(small_rollouts()):
        ids = np.array(rollout.token_ids)
        if rollout.question == HOSTILE:  # ids of its own, so that its texts are its own
            ids = ids + 1000 + number
        yield dataclasses.replace(rollout, token_ids=ids)


@pytest.fixture(scope="session")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_page(tmp_path_factory.mktemp("page") / "small.html", small_records)


@pytest.fixture(scope="session")
def split_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second context in files beside the page."""
    path = tmp_path_factory.mktemp("page") / "split #1.html"
    return build_page(path, small_records, sidecars=True)


@pytest.fixture(scope="session")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 rollouts of 2,000 tokens, of random numbers: nothing compresses worse."""
    return build_page(
        tmp_path_factory.mktemp("page") / "large.html",
        lambda: make_groups(groups=125, group_size=4, length=2000),
    )


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, out of a package that brings it along."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("no axe-core here: make test-browser installs it")
    path = Path(spec.submodule_search_locations[0]) / "axe.min.js"
    return path.read_text(encoding="utf-8")
