"""The memory page as people use it: in a browser, by keyboard, on a phone, while the engine dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from tests.browser.conftest import DESKTOP, PHONE, Page
from tests.e2e.conftest import Server, wait_until

Start = Callable[..., Server]
BAR = """
const bar = document.getElementById("bar"), parts = [...bar.children];
return {bar: bar.getBoundingClientRect().width, widths: parts.map((one) => one.getBoundingClientRect().width),
  bytes: parts.map((one) => Number(one.dataset.bytes)), said: bar.getAttribute("aria-label")};
"""
WIDTH = "return [document.documentElement.scrollWidth, window.innerWidth]"
# Contrast of a selector's text with what is behind it (WCAG 2.2, 1.4.3), colours read back from a canvas.
CONTRAST = """
const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function luminance(colour) {
  context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
return arguments[0].map((selector) => {
  const element = document.querySelector(selector);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const pair = [luminance(getComputedStyle(element).color), luminance(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
});
"""  # noqa: E501


def get(server: Server, path: str) -> dict[str, Any]:
    found: dict[str, Any] = server.get(path).json()
    return found


def test_the_bar_is_the_cap_and_then_the_device(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    memory = get(demo, "/memory")
    for scale, total in (("cap", memory["cap_bytes"]), ("device", memory["total_bytes"])):
        page.find(f"input[value={scale}]").click()
        found = page.run(BAR)
        assert sum(found["bytes"]) == total
        assert sum(found["widths"]) == pytest.approx(found["bar"], abs=0.5)
        for width, num_bytes in zip(found["widths"], found["bytes"], strict=True):
            assert width == pytest.approx(found["bar"] * num_bytes / total, abs=0.1)
        assert "KV cache" in found["said"]
    owners = page.run("return [...document.querySelectorAll('details.line')].map((one) => one.dataset.owner)")
    assert sorted(owners) == sorted(line["owner"] for line in memory["ledger"])


def test_a_line_is_explained_by_keyboard_and_stays_open(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    page.find("input[value=cap]").click()
    page.driver.switch_to.active_element.send_keys(Keys.TAB)
    line = page.run("return document.activeElement.closest('details.line')")
    assert not line.get_property("open")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    words = line.text
    assert "Python, torch and the other libraries" in words
    assert "Measured: " in words
    seen = page.text("#kv-since")
    page.wait(lambda: page.text("#kv-since") != seen or len(page.requested()) > 3, "two more answers")
    assert line.get_property("open")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert not line.get_property("open")


def test_a_segment_opens_its_line(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    page.run("document.querySelector('#bar .kv_cache').click()")
    assert page.run("return document.querySelector('details.line[open]').dataset.owner") == "KV cache"
    assert page.run("return document.activeElement.tagName") == "SUMMARY"


TEXTS = [
    "h1",
    "#now dt",
    "#first-note",
    "#ledger-sum",
    "details.line summary .known",
    "th",
    "#send",
    "footer",
    "#about dt",
    "#notice",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_legible(page: Page, demo: Server, scheme: str) -> None:
    page.open(demo.url, scheme=scheme).wait_serving()
    page.run("document.getElementById('notice').hidden = false")
    found = dict(zip(TEXTS, page.run(CONTRAST, TEXTS), strict=True))
    assert min(found.values()) >= 4.5, found


def test_the_switch_overrides_the_system_and_is_remembered(page: Page, demo: Server) -> None:
    brightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    page.open(demo.url, scheme="dark").wait_serving()
    assert page.run(brightness) < 120
    Select(page.find("#theme")).select_by_visible_text("Light")
    assert page.run(brightness) > 700
    page.open(demo.url, scheme="dark").wait_serving()
    assert page.run(brightness) > 700
    Select(page.find("#theme")).select_by_visible_text("Dark")
    page.open(demo.url, scheme="light").wait_serving()
    assert page.run(brightness) < 120


def test_a_phone_never_scrolls_sideways(page: Page, demo: Server) -> None:
    page.open(demo.url, size=PHONE).wait_serving()
    assert page.run(WIDTH) == [360, 360]
    page.run("for (const one of document.querySelectorAll('details')) one.open = true")
    page.find("#prompt").send_keys(" x" * 3 + "y" * 90)
    page.find("#send").click()
    page.wait(lambda: "tokens in" in page.text("#try-note"), "an answer")
    assert page.run(WIDTH) == [360, 360]
    low = "return [...document.querySelectorAll('summary, button, select')].map((one) => one.getBoundingClientRect().height)"
    assert min(height for height in page.run(low) if height) >= 24  # WCAG 2.2, 2.5.8; what is hidden has none


def test_the_prompt_box_streams_what_the_api_answers(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    prompt = "The capital of France is"
    body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{demo.url}/v1/completions", json=body, timeout=60, trust_env=False).json()["choices"][0]["text"]
    page.find("#prompt").clear()
    page.find("#prompt").send_keys(prompt)
    page.find("#max-tokens").clear()
    page.find("#max-tokens").send_keys("24")
    page.run("""
        window.grown = [];
        new MutationObserver(() => window.grown.push(document.getElementById("answer").textContent.length)).observe(
          document.getElementById("answer"), {characterData: true, subtree: true, childList: true});
    """)
    page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: "24 tokens in" in page.text("#try-note"), "an answer")
    assert page.run("return document.getElementById('answer').textContent") == prompt + answer
    grown = page.run("return window.grown")
    assert grown == sorted(grown)
    assert len(set(grown)) > 5
    assert "the first after" in page.text("#try-note")
    page.wait(lambda: int(page.text("#total-out").split()[0]) >= 48, "the tiles count it")
    assert page.find("#first-note").text.startswith("mean of ")


def test_an_answer_can_be_stopped(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    page.find("#max-tokens").clear()
    page.find("#max-tokens").send_keys("400")
    page.find("#send").click()
    page.wait(lambda: len(page.text("#answer")) > 40, "the first words")
    page.find("#stop").click()
    page.wait(lambda: page.text("#try-note") == "Stopped.", "the stop")
    wait_until(lambda: get(demo, "/memory/live")["requests"]["running"] == 0, "the engine stops too")


def test_the_certificate_downloads_and_is_this_starts(page: Page, demo: Server, tmp_path: Path) -> None:
    page.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.open(demo.url).wait_serving()
    page.find("#download").click()
    page.wait(lambda: list(tmp_path.glob("brim-*.json")), "the file")
    (path,) = tmp_path.glob("brim-*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["holds"] is True
    assert found["cap_bytes"] == get(demo, "/memory")["cap_bytes"]


def test_nothing_is_asked_of_anybody_else(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    page.find("#send").click()
    page.wait(lambda: page.text("#try-note"), "an answer")
    asked = page.requested()
    assert f"{demo.url}/memory/live" in asked
    assert not [address for address in asked if not address.startswith((f"{demo.url}/", "data:image/svg+xml"))]
    elsewhere = "return fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)"
    assert page.run(elsewhere) == "Failed to fetch"
    assert any("Content Security Policy" in entry["message"] for entry in page.driver.get_log("browser"))


def test_the_course_is_a_table_too(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    page.find("#kv-table").find_element("xpath", "ancestor::details/summary").send_keys(Keys.ENTER)
    page.wait(lambda: page.run("return document.querySelectorAll('#kv-table tr').length") >= 1, "a row")
    cells = page.run("return [...document.querySelector('#kv-table tr').children].map((one) => one.textContent)")
    assert len(cells) == 5
    assert cells[3].endswith("MiB")
    assert "At last: active" in page.find("#kv-chart").get_attribute("aria-label")


def test_everything_one_can_reach_has_a_name(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored")
        and (
            any(one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", ()))
            or node["role"]["value"] in ("image", "img")
        )
    ]
    roles = {role for role, _ in found}
    assert {"button", "textbox", "spinbutton", "combobox", "radio", "DisclosureTriangle"} <= roles
    assert not [role for role, name in found if not name and role not in ("RootWebArea", "main")]


def test_a_dead_engine_is_said_and_its_return_too(page: Page, demo: Server) -> None:
    page.open(demo.url).wait_serving()
    held = page.text("#ledger-sum").split(" held")[0]
    os.kill(demo.engine_pid(), signal.SIGKILL)
    page.wait(lambda: page.find("#state").get_attribute("data-state") == "down", "the death is seen")
    assert "killed by signal 9" in page.text("#notice")
    assert "The figures below are of" in page.text("#notice")
    assert not page.find("#send").is_enabled()
    assert page.text("#ledger-sum").split(" held")[0] == held
    page.wait(lambda: "Restarting (" in page.text("#state-text"), "the start is followed")
    assert "s so far; now " in page.text("#start-sum")
    assert page.run("return document.querySelectorAll('#phases tr').length") < 8
    page.wait_serving()
    assert page.text("#restarts") == "1"
    assert page.text("#notice") == ""
    assert page.find("#send").is_enabled()


def test_a_server_that_starts_shows_its_page_and_then_its_figures(page: Page, start: Start, tmp_path: Path) -> None:
    gate = tmp_path / "wait-for-this-to-go"
    gate.touch()
    server = start("waiting", f"revision={gate}")
    (instance,) = server.wait_instance()
    page.open(instance.url)
    page.wait(lambda: page.text("#state-text").startswith("Starting"), "the start is said")
    assert "The engine is starting" in page.text("#notice")
    gate.unlink()
    page.wait_serving()
    server.stop()
    page.wait(lambda: page.text("#state-text") == "No answer", "the end is seen")
    assert "does not answer" in page.text("#notice")


def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, start: Start) -> None:
    server = start("letters", "api_key=sesame").wait_ready()
    page.open(server.url)
    page.wait(lambda: page.find("#key-form").is_displayed(), "the question")
    assert page.text("#lines") == ""
    assert page.run("return document.activeElement.id") == "key"
    page.find("#key").send_keys("wrong", Keys.ENTER)
    page.wait(lambda: "not known to this server" in page.text("#notice"), "the refusal")
    page.find("#key").send_keys("sesame", Keys.ENTER)
    page.wait_serving()
    assert not page.find("#key-form").is_displayed()
    page.find("#prompt").clear()
    page.find("#prompt").send_keys("hello")
    page.find("#send").click()
    page.wait(lambda: "tokens in" in page.text("#try-note"), "an answer")
    page.open(server.url, size=DESKTOP).wait_serving()
    assert "sesame" not in page.run("return document.documentElement.outerHTML + location.href")
