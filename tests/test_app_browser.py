"""The page in a real browser: type, watch it write, stop it, change the checkpoint, on a phone, in the dark.

Needs Debian's `chromium` and `chromium-driver` and the selenium package. SMOLLM2_SCREENSHOTS=DIR keeps the pictures.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from test_app import run_with_two_checkpoints

pytestmark = pytest.mark.browser
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pytest.importorskip("gradio", reason="pip install gradio")
    from smollm2 import serving
    from smollm2.app import launch

    checkpoint = run_with_two_checkpoints(tmp_path_factory.mktemp("run"), eos_token_id=None)  # it never ends by itself
    stream = serving.stream

    def at_a_readers_pace(*arguments, **options):
        for step in stream(*arguments, **options):
            time.sleep(0.01)
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "stream", at_a_readers_pace)
        page, address = launch(str(checkpoint))
        yield address
        page.close()


@pytest.fixture
def browser(request):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    width, height = getattr(request, "param", DESKTOP)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"):
        options.add_argument(flag)
    if (width, height) == PHONE:
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0}})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    made.set_page_load_timeout(60)
    yield made
    made.quit()


def element(browser, css: str):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda b: next((e for e in b.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()), None))


def value(browser, name: str) -> str:
    return element(browser, f"#{name} textarea").get_attribute("value")


def wait_for(condition, seconds: float = 60, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def open_page(browser, address: str, dark: bool = False) -> None:
    browser.get(f"{address}?__theme={'dark' if dark else 'light'}")
    element(browser, "#write")


def type_prompt(browser, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    box = element(browser, "#prompt textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text)


def set_new_tokens(browser, count: int) -> None:
    from selenium.webdriver.common.keys import Keys

    element(browser, "#settings button").click()
    box = element(browser, "#settings input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(count), Keys.TAB)


def picture(browser, name: str) -> None:
    folder = os.environ.get("SMOLLM2_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def brightness(browser, css: str) -> int:
    """Red + green + blue of an element's background, 0 to 765."""
    color = browser.execute_script("return getComputedStyle(arguments[0]).backgroundColor", element(browser, css))
    return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]


def test_a_text_is_typed_written_piece_by_piece_and_scored(browser, address):
    open_page(browser, address)
    type_prompt(browser, "The <b>king</b> said")
    set_new_tokens(browser, 200)
    element(browser, "#write").click()
    lengths = set()

    def is_done() -> bool:
        lengths.add(len(value(browser, "text")))
        return "length reached: 200 tokens" in value(browser, "status")

    wait_for(is_done, what="the end of the text")
    assert value(browser, "text").startswith("The <b>king</b> said")  # plain text: no bold king
    assert len(lengths) > 3  # it grew before one's eyes
    assert element(browser, "#likely").text.count("%") >= 5
    browser.execute_script("window.scrollTo(0, 0)")
    picture(browser, "desktop-light")
    assert not complaints(browser)


def test_stop_stops_and_the_next_text_is_written(browser, address):
    open_page(browser, address)
    set_new_tokens(browser, 500)
    element(browser, "#write").click()
    wait_for(lambda: len(value(browser, "text")) > 30, what="a first piece of text")
    element(browser, "#stop").click()
    wait_for(lambda: value(browser, "status") == "stopped", what="stopped")
    length = len(value(browser, "text"))
    time.sleep(1.0)
    assert len(value(browser, "text")) == length and "500 tokens" not in value(browser, "status")
    type_prompt(browser, "Why does")
    element(browser, "#write").click()
    wait_for(lambda: value(browser, "text").startswith("Why does") and len(value(browser, "text")) > 20, what="the second text")


def test_another_checkpoint_writes_another_text(browser, address):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, address)
    set_new_tokens(browser, 20)
    choice = element(browser, "#checkpoint input")
    texts = {}
    for name in ("step-00000010.ckpt", "step-00000020.ckpt"):
        choice.click()
        choice.send_keys(Keys.CONTROL, "a")
        choice.send_keys(name, Keys.ENTER)
        wait_for(lambda name=name: choice.get_attribute("value") == name, what=name)
        before = value(browser, "text")
        element(browser, "#write").click()
        wait_for(lambda before=before: value(browser, "text") != before and "20 tokens" in value(browser, "status"), what="a text")
        texts[name] = value(browser, "text")
        element(browser, "#clear").click()
        wait_for(lambda: value(browser, "text") == "", what="an empty page")
    assert len(set(texts.values())) == 2


def test_a_request_beyond_the_limits_is_a_word_on_the_page(browser, address):
    open_page(browser, address)
    box = element(browser, "#prompt textarea")
    browser.execute_script("arguments[0].removeAttribute('maxlength')", box)  # a browser's limit binds nobody
    browser.execute_script("arguments[0].value = 'word '.repeat(3000); arguments[0].dispatchEvent(new Event('input'))", box)
    element(browser, "#write").click()
    wait_for(lambda: "prompt:" in value(browser, "status"), what="the refusal")
    assert "8000 characters" in value(browser, "status") and value(browser, "text") == ""


@pytest.mark.parametrize("browser", [PHONE], indirect=True)
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_by_day_and_by_night(browser, address, dark):
    open_page(browser, address, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("prompt", "write", "stop", "text"):
        box = element(browser, f"#{name}").rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0], name
    assert element(browser, "#write").rect["height"] >= 36  # a thumb's width
    element(browser, "#write").click()
    wait_for(lambda: "tokens" in value(browser, "status") and "writing" not in value(browser, "status"), what="the text")
    picture(browser, f"phone-{'dark' if dark else 'light'}")
    assert (brightness(browser, "#text textarea") < 300) == dark
    browser.execute_script("document.querySelector('#settings button').click(); window.scrollTo(0, document.body.scrollHeight)")
    time.sleep(0.5)
    picture(browser, f"phone-{'dark' if dark else 'light'}-settings")


def test_the_desktop_page_has_a_dark_side(browser, address):
    open_page(browser, address, dark=True)
    element(browser, "#settings button").click()
    element(browser, "#write").click()
    wait_for(lambda: "tokens" in value(browser, "status") and "writing" not in value(browser, "status"), what="the text")
    browser.execute_script("window.scrollTo(0, 0)")
    picture(browser, "desktop-dark")
    assert brightness(browser, "#text textarea") < 300
    left, right = element(browser, "#text").rect, element(browser, "#checkpoint").rect
    assert left["x"] + left["width"] <= right["x"]  # two columns where there is room
    assert not complaints(browser)
