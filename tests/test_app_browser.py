"""The page in a real browser: type, watch it write, stop it, change the checkpoint, on a phone, in the dark.

Needs Chromium or Chrome with its chromedriver (Debian: `apt-get install chromium chromium-driver`) and the selenium
package. SMOLLM2_SCREENSHOTS=DIR keeps the pictures. Where timing matters the model writes at the test's pace, not at the
machine's, so a busy machine makes the tests slow and not wrong.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from test_app import run_with_two_checkpoints

pytestmark = pytest.mark.browser
DESKTOP, PHONE = (1280, 900), (390, 844)
PROMPT = "Once upon a time"


class Pace:
    """How fast the model writes: as it can, or, while held, one token for every `let`."""

    def __init__(self):
        self.is_held, self.written = False, 0
        self._tokens = threading.Semaphore(0)

    def wait(self) -> None:
        while self.is_held and not self._tokens.acquire(timeout=0.05):
            pass
        self.written += 1

    def let(self) -> None:
        self._tokens.release()
        time.sleep(0.1)  # longer than the page waits between two redraws

    def start(self, is_held: bool) -> None:
        self.is_held, self.written, self._tokens = is_held, 0, threading.Semaphore(0)


@pytest.fixture(scope="module")
def pace() -> Pace:
    return Pace()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return run_with_two_checkpoints(
        tmp_path_factory.mktemp("run"), eos_token_id=None
    )  # it never ends by itself


@pytest.fixture(scope="module")
def address(checkpoint, pace):
    pytest.importorskip("gradio", reason="pip install gradio")
    from smollm2 import serving
    from smollm2.app import launch

    stream = serving.stream

    def at_the_tests_pace(*arguments, **options):
        for step in stream(*arguments, **options):
            pace.wait()
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "stream", at_the_tests_pace)
        patch.setattr(serving, "WALL_SECONDS", 600.0)
        page, address = launch(str(checkpoint))
        yield address
        pace.start(is_held=False)
        page.close()


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    made.set_page_load_timeout(120)
    made.set_script_timeout(120)
    yield made
    made.quit()


@pytest.fixture
def browser(chromium, pace):
    pace.start(is_held=False)
    show_as(chromium, *DESKTOP)
    yield chromium
    pace.start(is_held=False)
    chromium.get("about:blank")  # whoever leaves frees the model
    complaints(chromium)


def show_as(browser, width: int, height: int) -> None:
    is_phone = (width, height) == PHONE
    size = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_for(condition, what: str, seconds: float = 120):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def element(browser, css: str):
    from selenium.webdriver.common.by import By

    return wait_for(
        lambda: next((e for e in browser.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()), None), css
    )


def value(browser, name: str) -> str:
    """What stands in a text box. One call, so that a redraw cannot come between finding and reading."""
    return browser.execute_script(
        "return document.querySelector(arguments[0])?.value ?? ''", f"#{name} textarea"
    )


def open_page(browser, address: str, dark: bool = False) -> None:
    browser.get(f"{address}?__theme={'dark' if dark else 'light'}")
    wait_for(lambda: value(browser, "prompt") == PROMPT, "the page")
    element(browser, "#write")


def click(browser, css: str) -> None:
    """As a thumb does, but wherever the page is scrolled to."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element(browser, css))
    element(browser, css).click()


def fill(browser, css: str, text: str, *end: str) -> None:
    from selenium.webdriver.common.keys import Keys

    element(browser, css).send_keys(Keys.CONTROL, "a")
    element(browser, css).send_keys(text, *end)


def open_settings(browser) -> None:
    click(browser, "#settings button")
    element(browser, "#settings input[type=number]")


def set_number(browser, label: str, number: float) -> None:
    from selenium.webdriver.common.keys import Keys

    css = f'#settings input[type=number][aria-label*="{label}"]'
    fill(browser, css, str(number), Keys.TAB)
    wait_for(lambda: float(element(browser, css).get_attribute("value")) == number, label)


def write(browser) -> None:
    click(browser, "#write")


def is_done(browser, tokens: int) -> bool:
    return f"length reached: {tokens} tokens" in value(browser, "status")


def picture(browser, name: str) -> None:
    folder = os.environ.get("SMOLLM2_SCREENSHOTS")
    if folder:
        time.sleep(0.5)  # folding and unfolding is animated
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def colors(browser, css: str) -> tuple[list[int], list[int]]:
    """(text, background) of an element as red, green, blue; the background is that of the first ancestor that has one."""
    script = """
        const background = e => getComputedStyle(e).backgroundColor;
        let behind = arguments[0];
        while (/^rgba\\(.*, 0\\)$/.test(background(behind))) behind = behind.parentElement;
        return [getComputedStyle(arguments[0]).color, background(behind)];
    """
    found = browser.execute_script(script, element(browser, css))
    return tuple(
        [int(float(part)) for part in color[color.index("(") + 1 : -1].split(",")[:3]] for color in found
    )


def contrast(one: list[int], other: list[int]) -> float:
    """Contrast ratio of two colours, as the Web Content Accessibility Guidelines define it: 1 to 21, 4.5 is readable."""

    def luminance(color: list[int]) -> float:
        parts = [part / 255 for part in color]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def complaints(browser) -> list[str]:
    return [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
    ]


def test_a_text_is_typed_written_piece_by_piece_and_scored(browser, address, pace):
    open_page(browser, address)
    fill(browser, "#prompt textarea", "The <b>king</b> said")
    open_settings(browser)
    set_number(browser, "New tokens", 200)
    pace.start(is_held=True)
    write(browser)
    length = len("The <b>king</b> said")
    for _ in range(3):  # it grows before one's eyes, while the model is still writing
        wait_for(lambda longer=length: pace.let() or len(value(browser, "text")) > longer, "more text")
        length = len(value(browser, "text"))
    assert "writing" in value(browser, "status") and pace.written < 200
    pace.is_held = False
    wait_for(lambda: is_done(browser, 200), "the end of the text")
    assert value(browser, "text").startswith("The <b>king</b> said")  # plain text: no bold king
    assert element(browser, "#likely").text.count("%") >= 5
    browser.execute_script("window.scrollTo(0, 0)")
    picture(browser, "desktop-light")
    assert not complaints(browser)


def test_stop_stops_and_the_next_text_is_written(browser, address, pace):
    open_page(browser, address)
    open_settings(browser)
    set_number(browser, "New tokens", 500)
    pace.start(is_held=True)
    write(browser)
    wait_for(lambda: pace.let() or len(value(browser, "text")) > 30, "a first piece of text")
    click(browser, "#stop")
    wait_for(lambda: value(browser, "status") == "stopped", "stopped")
    text, written = value(browser, "text"), pace.written
    pace.is_held = False  # from here it could write the rest at full speed
    wait_for(lambda: is_free(address), "the model to be free")
    assert pace.written < written + 20
    time.sleep(1.0)
    assert (value(browser, "text"), value(browser, "status")) == (text, "stopped")
    fill(browser, "#prompt textarea", "Why does")
    write(browser)
    wait_for(lambda: is_done(browser, 500), "the second text")
    assert value(browser, "text").startswith("Why does") and len(value(browser, "text")) > 100


def is_free(address: str) -> bool:
    import httpx

    return httpx.get(f"{address}health", timeout=60).json()["waiting"] == 0


def test_another_checkpoint_writes_its_own_text(browser, address, checkpoint):
    from selenium.webdriver.common.keys import Keys

    from smollm2.pretrained import load_model_and_tokenizer
    from smollm2.sampling import complete

    open_page(browser, address)
    open_settings(browser)
    set_number(browser, "New tokens", 20)
    set_number(browser, "Temperature", 0)
    texts = {}
    for name in ("step-00000010.ckpt", "step-00000020.ckpt"):
        fill(browser, "#checkpoint input", name, Keys.ENTER)
        wait_for(lambda name=name: element(browser, "#checkpoint input").get_attribute("value") == name, name)
        write(browser)
        wait_for(lambda: is_done(browser, 20), "a text")
        expected = PROMPT + complete(
            *load_model_and_tokenizer(checkpoint.parent / name), PROMPT, 20, temperature=0.0, stop_ids=()
        )
        texts[name] = value(browser, "text")
        assert texts[name] == expected
        click(browser, "#clear")
        wait_for(lambda: value(browser, "text") == value(browser, "status") == "", "an empty page")
    assert len(set(texts.values())) == 2


def test_a_request_beyond_the_limits_is_a_word_on_the_page(browser, address):
    open_page(browser, address)
    box = element(browser, "#prompt textarea")
    browser.execute_script("arguments[0].removeAttribute('maxlength')", box)  # a browser's limit binds nobody
    browser.execute_script(
        "arguments[0].value = 'word '.repeat(3000); arguments[0].dispatchEvent(new Event('input'))", box
    )
    write(browser)
    wait_for(lambda: "prompt:" in value(browser, "status"), "the refusal")
    assert "8000 characters" in value(browser, "status") and value(browser, "text") == ""


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_by_day_and_by_night(browser, address, dark):
    show_as(browser, *PHONE)
    open_page(browser, address, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("prompt", "write", "stop", "text"):
        box = element(browser, f"#{name}").rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0], name
    assert element(browser, "#write").rect["height"] >= 36  # a thumb's width
    write(browser)
    wait_for(lambda: is_done(browser, 128), "the text")
    browser.execute_script("window.scrollTo(0, 0)")
    picture(browser, f"phone-{'dark' if dark else 'light'}")
    assert (sum(colors(browser, "#text textarea")[1]) < 300) == dark
    open_settings(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.execute_script("document.querySelector('#settings').scrollIntoView()")
    picture(browser, f"phone-{'dark' if dark else 'light'}-settings")


@pytest.mark.parametrize("dark", [False, True])
def test_the_desktop_page_can_be_read_by_day_and_by_night(browser, address, dark):
    open_page(browser, address, dark)
    open_settings(browser)
    write(browser)
    wait_for(lambda: is_done(browser, 128), "the text")
    browser.execute_script("window.scrollTo(0, 0)")
    picture(browser, f"desktop-{'dark' if dark else 'day'}")
    assert (sum(colors(browser, "#text textarea")[1]) < 300) == dark
    boxes = (
        "#prompt textarea",
        "#text textarea",
        "#status textarea",
        "#checkpoint input",
        "#settings input[type=number]",
    )
    for css in (
        "#page-title h1",
        "#write",
        "#stop",
        "#clear",
        "#text [data-testid=block-info]",
        "#settings .info-text",
        *boxes,
    ):
        assert contrast(*colors(browser, css)) >= 4.5, (css, colors(browser, css))
    left, right = element(browser, "#text").rect, element(browser, "#checkpoint").rect
    assert left["x"] + left["width"] <= right["x"]  # two columns where there is room
    assert not complaints(browser)
