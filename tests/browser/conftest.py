"""Chromium without a window, a real server of the demo model, servers of letters. Needs chromium and chromium-driver."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tests.e2e.conftest import Server, running, short_folder, start, wait_until

__all__ = ["short_folder", "start"]
DEMO = (sys.executable, "-m", "brim", "serve", "demo", "--port", "0", "--max-num-seqs", "4", "--max-model-len", "512")
PATIENCE_S = 60.0  # a start of the demo model takes 5 s on an idle machine of two cores
DESKTOP, PHONE = (1100, 900), (360, 740)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def demo(short_folder: Path) -> Iterator[Server]:
    """The demo model, served for all tests; who ends its engine waits until it is back."""
    with running(folder=short_folder, command=DEMO) as server:
        yield server.wait_ready(PATIENCE_S)


class Page:
    """A tab that shows one server's page."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Page:
        """Load it anew, in a window of that size, for a user who prefers that colour scheme."""
        width, height = size
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.driver.get(url + "/")
        return self

    def command(self, name: str, **arguments: Any) -> Any:
        """One of the browser's own (Chrome DevTools Protocol)."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        """A function's body, run in the page."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        """The first that matches."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What is seen of it."""
        return str(self.find(selector).text)

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Poll, or fail saying what did not happen and what the page says."""
        try:
            wait_until(condition, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; the page says {self.text('#state')!r} {self.text('#notice')!r}") from None

    def wait_serving(self) -> Page:
        """Until it shows figures."""
        self.wait(lambda: self.text("#state-text") == "Serving" and self.text("#kv-sum") != "–", "figures")
        return self

    def requested(self) -> list[str]:
        """Addresses of everything that was asked for since the last call."""
        log = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [str(one["params"]["request"]["url"]) for one in log if one["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser for all tests."""
    options = Options()
    options.binary_location = shutil.which("chromium") or "chromium"
    profile = tmp_path_factory.mktemp("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: Chrome) -> Iterator[Page]:
    """A tab; what the last one stored is forgotten, and what went wrong in this one fails the test."""
    one = Page(chromium)
    one.requested()
    chromium.get_log("browser")
    yield one
    wrong = [entry["message"] for entry in chromium.get_log("browser") if "Failed to load resource" not in entry["message"]]
    one.run("localStorage.clear(); sessionStorage.clear()")
    chromium.get("about:blank")
    assert not wrong
