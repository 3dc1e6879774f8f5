"""The page in a real browser: type, watch it write, stop it, on a phone, in the dark.

Needs Chromium or Chrome with its chromedriver (Debian: chromium, chromium-driver) and selenium.
SMOLLM2_SCREENSHOTS=DIR keeps the pictures. The model writes at the test's pace, not at the machine's.
"""

import os
import shutil
import threading
import time
from unittest.mock import patch

import pytest
from test_app import two_checkpoints

pytestmark = pytest.mark.browser
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def go_on():
    """While it is not set the model writes a token every half second."""
    return threading.Event()


@pytest.fixture(scope="module")
def address(tmp_path_factory, go_on):
    pytest.importorskip("gradio", reason="pip install gradio")
    from smollm2 import app
    from smollm2.cpu_decoder import FastDecoder

    write = FastDecoder.next_logits

    def write_slowly(*arguments):
        go_on.wait(0.5)
        return write(*arguments)

    # what the app changes for itself ends with these tests
    with patch.dict(os.environ), patch.object(FastDecoder, "next_logits", write_slowly):
        checkpoint = two_checkpoints(tmp_path_factory.mktemp("run"), eos_token_id=None)
        for file in checkpoint.parent.glob("*/tokenizer_config.json"):
            file.write_text("{}")  # no token ends a text: a random model would draw it anywhere
        page, address = app.launch(str(checkpoint))
        yield address
        page.close()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


def wait_for(condition, what: str, seconds: float = 120):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def element(browser, css: str):
    return wait_for(
        lambda: next((e for e in browser.find_elements("css selector", css) if e.is_displayed()), None), css
    )


def value(browser, name: str) -> str:
    """What stands in a text box. One call, so that a redraw cannot come between finding and reading."""
    script = "return document.querySelector(arguments[0])?.value ?? ''"
    return browser.execute_script(script, f"#{name} textarea")


def open_page(browser, address: str, width: int = 1280, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get(f"{address}?__theme={'dark' if dark else 'light'}")
    wait_for(lambda: value(browser, "prompt") == PROMPT, "the page")


def contrast(browser, css: str) -> float:
    """Contrast ratio of text and background, by the Web Content Accessibility Guidelines; 4.5 is readable."""
    script = """
        const background = e => getComputedStyle(e).backgroundColor;
        let behind = arguments[0];
        while (/^rgba\\(.*, 0\\)$/.test(background(behind))) behind = behind.parentElement;
        const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0.05);
        const [a, b] = [light(getComputedStyle(arguments[0]).color), light(background(behind))];
        return Math.max(a, b) / Math.min(a, b);
    """
    return browser.execute_script(script, element(browser, css))


def test_a_text_is_written_piece_by_piece_and_stops_when_told(browser, address, go_on):
    open_page(browser, address)
    go_on.clear()
    element(browser, "#prompt textarea").send_keys(" the <b>king</b>")
    element(browser, "#write").click()
    length = len(f"{PROMPT} the <b>king</b>")
    for _ in range(3):  # it grows before one's eyes, while the model is still writing
        wait_for(lambda longer=length: len(value(browser, "text")) > longer, "more text")
        length = len(value(browser, "text"))
    assert value(browser, "text").startswith(f"{PROMPT} the <b>king</b>")  # plain text: no bold king
    assert "writing" in value(browser, "status") and element(browser, "#likely").text.count("%") >= 5
    element(browser, "#stop").click()
    wait_for(lambda: value(browser, "status") == "stopped", "stopped")
    text = value(browser, "text")
    go_on.set()  # from here it could write the rest at full speed
    time.sleep(2.0)
    assert (value(browser, "text"), value(browser, "status")) == (text, "stopped")
    element(browser, "#write").click()
    wait_for(lambda: "length reached: 128 tokens" in value(browser, "status"), "the second text")
    assert not [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_a_desk_and_can_be_read_by_day_and_by_night(browser, address, go_on, width, dark):
    go_on.set()
    open_page(browser, address, width, dark)
    element(browser, "#settings button").click()
    element(browser, "#write").click()
    wait_for(lambda: "length reached" in value(browser, "status"), "the text")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert element(browser, "#write").rect["height"] >= 36  # a thumb's width
    boxes = ["#prompt textarea", "#text textarea", "#status textarea", "#checkpoint input"]
    words = ["#page-title h1", "#write", "#stop", "#settings input[type=number]", "#settings label span"]
    assert {css: ratio for css in boxes + words if (ratio := contrast(browser, css)) < 4.5} == {}
    if folder := os.environ.get("SMOLLM2_SCREENSHOTS"):
        time.sleep(0.5)  # folding and unfolding is animated
        browser.save_screenshot(os.path.join(folder, f"{width}-{'dark' if dark else 'light'}.png"))
