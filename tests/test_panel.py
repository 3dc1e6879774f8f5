"""The live panel: one display, at most once a second, from the training thread only; plain lines without a notebook."""

from __future__ import annotations

import re
import threading
from itertools import pairwise

import pytest

from smollm2 import plots
from smollm2.logs import SAMPLES, TRAINING, Logs
from smollm2.notebook import panel as panel_module
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


def test_one_display_is_updated_at_most_once_a_second_and_at_the_end(screen, panel):
    for word in ("model", "device", "data"):
        panel.message(word)
    train(screen, panel)
    times = [time for time, _ in screen.shown]
    assert screen.displays == 1 and 9 <= len(times) <= 11
    assert all(later - earlier >= 1 - 1e-9 for earlier, later in pairwise(times))
    panel.end()
    assert screen.shown[-1][0] == screen.now and "100 of 100" in screen.text


def test_the_panel_says_what_a_person_wants_to_know(screen, panel):
    panel.message("device: CPU")
    train(screen, panel, last=40)
    panel.saved(30, 20)
    panel.validation(40, 5.4321, 2.3456)
    panel.sample(40, "Once", " upon\n a time")
    panel.end()
    facts = ["40 of 100", "0.175 nats per token", "3.00e-03", "5,120 tokens per second", "0:06"]
    facts += ["5.432", "2.346 bits per byte (step 40)", "on this machine: step 30, copied to Drive: step 20"]
    for fact in facts:
        assert fact in screen.text and fact in screen.html, fact
    assert "device: CPU" in screen.html and "upon a time" in screen.html
    assert 'aria-label="Loss from 7.00 to 0.17 nats per token over 40 steps."' in screen.html
    assert (
        screen.html.startswith('<div style="background:#fff;color:#111') and "<tr" not in screen.html
    )  # dark mode


def test_a_run_that_is_finished_shows_no_empty_numbers(screen, panel):
    panel.message("finished: the run is at step 45")
    assert screen.text.startswith("step: not training") and "safe" not in screen.text  # it has not looked
    panel.saved(45, 45)
    panel.end()
    assert "copied to Drive: step 45" in screen.text and "finished: the run is at step 45" in screen.html
    assert not re.search(r"loss|rate|tokens per second|time left", screen.text)


def test_samples_form_a_timeline_of_the_first_and_the_last_ones_and_are_text_not_markup(screen, panel):
    panel.message("<b>note</b>")
    for step in range(1, 10):
        panel.sample(step * 100, "<script>alert(1)</script>", f"<img src=x> text number {step}")
    panel.end()
    assert [int(n) for n in re.findall(r"text number (\d)", screen.html)] == [1, 6, 7, 8, 9]
    assert "&lt;script&gt;" in screen.html and not re.search("<script|<img|<b>note", screen.html)


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


def test_a_signal_in_the_middle_of_an_update_does_not_display_inside_it(screen, panel, monkeypatch):
    monkeypatch.setattr(panel, "_html", lambda facts: panel.message("SIGINT") or "nested")
    panel.message("begins")
    assert len(screen.shown) == 1


def test_a_continued_run_shows_its_earlier_curve_and_samples(screen, panel, tmp_path):
    logs = Logs(tmp_path, {})
    for step in (10, 20):
        logs.write(TRAINING, step, train_loss=8.0 - step / 10, lr=1e-3)
    logs.write(TRAINING, 20, val_loss=6.5, val_bits_per_byte=2.5)
    logs.write(SAMPLES, 20, prompt="The", text=" old words")
    panel.start(20, 40, 64)
    assert panel.losses == [(10, 7.0), (20, 6.0)] and "old words" in screen.html
    assert "2.500 bits per byte (step 20)" in screen.html and "on this machine: step 20" in screen.html


def test_a_long_run_is_drawn_with_few_points_and_numbers_that_are_not_finite_with_none(screen, panel):
    panel.start(0, 10_000, 64)
    for step in range(1, 10_001):
        panel.step(step, float("nan") if step % 1000 == 0 else 7.0 - step / 10_000, 1e-3, 1.0)
    panel.validation(4, float("nan"), float("nan"))
    panel.end()
    curve = re.search('<polyline points="([^"]*)"', screen.html)[1]
    assert "nan" not in curve and 200 < len(curve.split()) <= panel_module.MAX_POINTS
