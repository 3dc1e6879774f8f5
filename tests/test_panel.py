"""The live panel: one display, at most once a second, from the training thread only; plain lines without a notebook."""

import re
import threading

import pytest

from smollm2 import plots
from smollm2.logs import SAMPLES, TRAINING, Logs
from smollm2.notebook.panel import live_panel
from smollm2.progress import TerminalReporter


class Screen:
    """Stands in for the notebook: remembers every (time, bundle) that was displayed, and counts the displays."""

    def __init__(self):
        self.now, self.shown, self.displays = 100.0, [], 0

    def display(self, bundle, raw, display_id):
        self.displays += 1
        self.update(bundle, raw)
        return self

    def update(self, bundle, raw):
        self.shown.append((self.now, bundle))
        self.html, self.text = bundle["text/html"], bundle["text/plain"]


@pytest.fixture
def screen(monkeypatch):
    screen = Screen()
    assert isinstance(live_panel("logs"), TerminalReporter), "without a notebook: plain lines"
    monkeypatch.setattr(plots, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", screen.display)
    return screen


@pytest.fixture
def panel(screen, tmp_path):
    panel = live_panel(tmp_path)
    panel.clock = lambda: screen.now
    return panel


def train(screen, panel, last=100):
    panel.start(0, 100, 512)
    for step in range(1, last + 1):
        screen.now += 0.1
        panel.step(step, 7.0 / step, 3e-3, 5120.0)


def test_the_panel_says_what_a_person_wants_to_know(screen, panel):
    panel.message("device: <b>CPU</b>")
    train(screen, panel, last=40)
    assert screen.displays == 1 and 4 <= len(screen.shown) <= 5, "updated at most once a second"
    panel.saved(30, 20)
    panel.validation(40, 5.4321, 2.3456)
    for step in range(1, 10):
        panel.sample(step, "<script>alert(1)</script>", f"<img src=x> text number {step}")
    panel.end()
    facts = ["40 of 100", "0.175 nats per token", "3.00e-03", "5,120 tokens per second", "0:06"]
    facts += ["5.432", "2.346 bits per byte (step 40)", "on this machine: step 30, copied to Drive: step 20"]
    for fact in facts:
        assert fact in screen.text and fact in screen.html, fact
    assert 'aria-label="Loss from 7.00 to 0.17 nats per token over 40 steps."' in screen.html
    assert [int(n) for n in re.findall(r"text number (\d)", screen.html)] == [1, 6, 7, 8, 9]
    assert "&lt;script&gt;" in screen.html and not re.search("<script|<img|<b>CPU", screen.html)
    assert screen.html.startswith('<div style="background:#fff;color:#111'), "readable in dark mode, too"


def test_other_threads_and_signal_handlers_never_display(screen, panel):
    def elsewhere():
        panel.saved(7, 5)
        panel.message("saving step 8 failed (No space left on device)")
        panel._show(at_once=True)

    panel.start(0, 10, 64)
    before = len(screen.shown)
    screen.now += 60
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    panel.message("SIGINT: finishing this step and saving ...")
    assert len(screen.shown) == before
    panel.step(1, 5.0, 1e-3, 10.0)
    assert "step 7" in screen.html and "No space left" in screen.html and "SIGINT" in screen.html


def test_a_continued_run_shows_its_earlier_curve_and_samples(screen, panel, tmp_path):
    logs = Logs(tmp_path, {})
    for step in (10, 20):
        logs.write(TRAINING, step, train_loss=8.0 - step / 10, lr=1e-3)
    logs.write(TRAINING, 20, val_loss=6.5, val_bits_per_byte=2.5)
    logs.write(SAMPLES, 20, prompt="The", text=" old words")
    panel.start(20, 40, 64)
    assert panel.losses == [(10, 7.0), (20, 6.0)] and "old words" in screen.html
    assert "2.500 bits per byte (step 20)" in screen.html and "on this machine: step 20" in screen.html
