"""The live panel: one display, at most once a second, from the training thread only; plain lines without a notebook."""

from __future__ import annotations

import re
import threading
from itertools import pairwise

import pytest

from smollm2 import plots
from smollm2.logs import SAMPLES, TRAINING, TextLogs
from smollm2.notebook import panel as panel_module
from smollm2.notebook.panel import LivePanel, clock_time, thinned


class Screen:
    """Stands in for the notebook: remembers every (time, bundle) that was displayed, and by which display."""

    def __init__(self, monkeypatch):
        self.now, self.shown, self.displays = 100.0, [], 0
        monkeypatch.setattr(plots, "in_notebook", lambda: True)
        import IPython.display

        monkeypatch.setattr(IPython.display, "display", self.display)

    def display(self, bundle, raw, display_id):
        assert raw is True and display_id is True
        self.displays += 1
        self.update(bundle, raw)
        return self

    def update(self, bundle, raw):
        assert raw is True and set(bundle) == {"text/html", "text/plain"}
        self.shown.append((self.now, bundle))

    def panel(self, **options):
        return LivePanel(clock=lambda: self.now, **options)

    @property
    def html(self):
        return self.shown[-1][1]["text/html"]

    @property
    def text(self):
        return self.shown[-1][1]["text/plain"]


@pytest.fixture
def screen(monkeypatch):
    return Screen(monkeypatch)


def train(screen, panel, first=0, last=100, total=100, seconds=0.1):
    panel.start(first, total, 512)
    for step in range(first + 1, last + 1):
        screen.now += seconds
        panel.step(step, 7.0 / step, 3e-3, 5120.0)


def test_one_display_is_updated_at_most_once_a_second(screen):
    panel = screen.panel()
    for word in ("model", "device", "data"):
        panel.message(word)
    train(screen, panel)
    assert screen.displays == 1
    times = [time for time, _ in screen.shown]
    assert 9 <= len(times) <= 11
    assert all(later - earlier >= 1 - 1e-9 for earlier, later in pairwise(times))
    panel.end()
    assert screen.shown[-1][0] == screen.now and "100 of 100" in screen.text  # the end is always shown


def test_the_panel_says_what_a_person_wants_to_know(screen):
    panel = screen.panel()
    panel.message("device: CPU")
    panel.saved(30, 20)
    train(screen, panel, last=40)
    panel.saved(30, 20)
    panel.validation(40, 5.4321, 2.3456)
    panel.sample(40, "Once", " upon\n a time")
    panel.refresh()
    for fact in (
        "40 of 100",
        "0.175 nats per token",
        "3.00e-03",
        "5,120 tokens per second",
        "GiB",
        "0:06",
        "5.432",
        "2.346 bits per byte (step 40)",
    ):
        assert fact in screen.text and fact in screen.html, fact
    assert "on this machine: step 30, copied to Drive: step 20" in screen.html
    assert "device: CPU" in screen.html and "upon a time" in screen.html
    assert "<svg" in screen.html and 'aria-label="Loss from 7.00' in screen.html
    assert len(screen.text.splitlines()) <= 25


def test_no_theme_can_put_dark_stripes_behind_the_dark_numbers(screen):
    panel = screen.panel()
    train(screen, panel)
    rows = re.findall(r'<tr(?: style="([^"]*)")?>', screen.html)
    assert len(rows) >= 6 and all(
        "background:#fff" in style for style in rows
    )  # Jupyter's dark theme stripes rows that name none
    assert all("color:#" in style for style in re.findall(r'<td(?: style="([^"]*)")?>', screen.html))


def test_a_run_that_is_finished_shows_no_empty_numbers(screen):
    panel = screen.panel()
    panel.message("finished: the run is at step 45")
    assert (
        screen.text.splitlines()[0] == "step: not training" and "nothing yet" not in screen.text
    )  # it has not looked
    panel.saved(45, 45)
    panel.refresh()
    assert "copied to Drive: step 45" in screen.text
    assert (
        not re.search(r"loss|rate|tokens per second|time left", screen.text)
        and "finished: the run is at step 45" in screen.html
    )


def test_samples_form_a_timeline_of_the_first_and_the_last_ones(screen):
    panel = screen.panel()
    for step in range(1, 10):
        panel.sample(step * 100, "The", f" text number {step}")
    panel.refresh()
    assert [int(n) for n in re.findall(r"text number (\d)", screen.html)] == [1, 6, 7, 8, 9]


def test_what_the_model_writes_is_shown_as_text_not_as_markup(screen):
    panel = screen.panel()
    panel.message("<b>note</b>")
    panel.sample(1, "<script>alert(1)</script>", "<img src=x onerror=alert(1)>")
    panel.refresh()
    for markup in ("<script", "<img", "<b>note"):
        assert markup not in screen.html
    assert "&lt;script&gt;" in screen.html


def test_other_threads_and_signal_handlers_never_display(screen):
    panel = screen.panel()
    panel.start(0, 10, 64)
    before = len(screen.shown)
    screen.now += 60

    def elsewhere():
        panel.saved(7, 5)
        panel.message("saving step 8 failed (No space left on device)")
        panel.refresh()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    panel.message("SIGINT: finishing this step and saving ...")
    assert len(screen.shown) == before
    panel.step(1, 5.0, 1e-3, 10.0)
    assert "step 7" in screen.html and "No space left" in screen.html and "SIGINT" in screen.html


def test_a_signal_in_the_middle_of_an_update_does_not_display_inside_it(screen, monkeypatch):
    panel = screen.panel()
    monkeypatch.setattr(panel_module, "memory_in_use", lambda: panel.refresh() or "nested")
    panel.refresh()
    assert len(screen.shown) == 1


def test_a_continued_run_shows_its_earlier_curve_and_samples(screen, tmp_path):
    logs = TextLogs(tmp_path, tensorboard=False)
    for step in (10, 20, 30):
        logs.write(TRAINING, step, train_loss=8.0 - step / 10, lr=1e-3)
    logs.write(TRAINING, 20, val_loss=6.5, val_bits_per_byte=2.5)
    logs.write(SAMPLES, 20, prompt="The", text=" old words")
    panel = screen.panel(logs=tmp_path)
    panel.start(20, 40, 64)
    assert panel.losses == [(10, 7.0), (20, 6.0)]
    panel.refresh()
    assert "old words" in screen.html and "2.500 bits per byte (step 20)" in screen.html
    assert "on this machine: step 20" in screen.html


def test_numbers_that_are_not_finite_do_not_break_the_chart(screen):
    panel = screen.panel()
    panel.start(0, 5, 64)
    for step, loss in enumerate((7.0, float("nan"), 6.0, float("inf")), start=1):
        panel.step(step, loss, 1e-3, 1.0)
    panel.validation(4, float("nan"), float("nan"))
    panel.refresh()
    chart = screen.html[screen.html.index("<svg") :]
    assert "nan" not in chart.split("polyline")[1] and "inf" not in chart.split("polyline")[1]


def test_a_long_run_is_drawn_with_few_points():
    points = thinned([(step, float(step)) for step in range(1, 10_001)])
    assert len(points) <= panel_module.MAX_POINTS
    assert sum(y for _, y in points) / len(points) == pytest.approx(5000.5, rel=0.02)
    assert thinned([]) == [] and thinned([(1, 2.0)]) == [(1, 2.0)]
    assert (clock_time(65), clock_time(7389), clock_time(-3)) == ("1:05", "2:03:09", "0:00")


def test_plain_python_gets_plain_lines(capsys):
    panel = LivePanel()
    panel.message("device: CPU")
    panel.start(0, 2, 64)
    panel.step(1, 7.1234, 1e-3, 100.0)
    panel.validation(1, 6.0, 2.0)
    panel.sample(1, "The", " end")
    panel.saved(1, None)
    panel.step(2, 7.0, 1e-3, 100.0)
    panel.end()
    panel.refresh()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "device: CPU" and lines[1].startswith("step 1/2  loss 7.123")
    assert any("2.0000 bits/byte" in line for line in lines) and any(
        line.endswith("sample: The end") for line in lines
    )
